"""The rule for the best step and for early stopping, by hand."""

from raft_jax.evaluation import early_stopping


def status(*measured, **rule):
  """Best step, validations since, over; of (loss, drift) after steps 10, 20, ..."""
  rule = {"max_drift": None, "patience": None, **rule}
  points = [
    early_stopping.ValidationPoint(10 * i, *values)
    for i, values in enumerate(measured, start=1)
  ]
  reached = early_stopping.status(points, **rule)
  return reached.best and reached.best.step, reached.since_best, reached.over


def test_the_rule_by_hand():
  assert status() == (None, 0, False)
  assert status(patience=1) == (None, 0, False)
  assert status((3.0, None)) == (10, 0, False)
  assert status((3.0, None), (2.0, None), (2.5, None)) == (20, 1, False)
  # Of equal losses the first is the best.
  assert status((2.0, None), (2.0, None)) == (10, 1, False)
  # The lowest loss drifted too far; a drift of exactly the limit is allowed.
  measured = (3.0, 0.1), (2.0, 0.3), (2.5, 0.2)
  assert status(*measured) == (20, 1, False)
  assert status(*measured, max_drift=0.2) == (30, 0, False)
  assert status(*measured, max_drift=0.15) == (10, 2, False)
  assert status(*measured, max_drift=0.05) == (None, 3, False)
  # Patience counts validations since the best, those with too much drift included.
  assert status(*measured, max_drift=0.15, patience=3) == (10, 2, False)
  assert status(*measured, max_drift=0.15, patience=2) == (10, 2, True)
  assert status(*measured, max_drift=0.05, patience=3) == (None, 3, True)
  assert status(*measured, max_drift=0.2, patience=1) == (30, 0, False)
