"""What identifies a run."""

from raft_jax.config import schema
from raft_jax.training import run_inputs

# Sections that a resumed run may change: they decide other stages, the places of arrays
# and files, or what is done with the trained model.
MAY_CHANGE = {
  *("extract", "refine", "synthesise", "evaluate", "export", "report", "chat", "sweep"),
  *("mesh", "cluster", "output", "mirror", "prune", "hard_threshold", "interpolate"),
}


def test_every_section_identifies_a_run_or_may_change():
  """A new section belongs into one of the two lists."""
  identifying = {key.split(".")[0] for key in run_inputs.IDENTITY_KEYS}
  assert not identifying & MAY_CHANGE
  assert identifying | MAY_CHANGE == set(schema.Config.model_fields)
