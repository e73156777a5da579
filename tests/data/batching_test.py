"""Batches of token rows, on the real tokenizer and the real questions."""

import collections
import itertools

import jax
import numpy as np
import pytest

from raft_jax import errors
from raft_jax.config import schema
from raft_jax.data import batching, token_rows
from raft_jax.hf import chat
from raft_jax.storage import question_files, rejects


@pytest.fixture(scope="module")
def tokenizer(smollm):
  return chat.load(smollm)


def made_rows(lengths) -> list[token_rows.Row]:
  """Rows whose tokens tell which row and which part they are of."""
  return [
    token_rows.Row(
      prompt=tuple(1000 * i + j for j in range(1, p + 1)),
      answer=tuple(1000 * i + 300 + j for j in range(1, a + 1)),
      teacher=tuple(1000 * i + 600 + j for j in range(1, c + 1)),
      row_id=i,
    )
    for i, (p, a, c) in enumerate(lengths)
  ]


@pytest.fixture
def rows() -> list[token_rows.Row]:
  rng = np.random.default_rng(0)
  return made_rows(rng.integers([5, 3, 20], [60, 40, 200], (50, 3)).tolist())


def batches(rows, **options):
  options = {"batch_size": 8, "seed": 0, "pad_id": 0, "epochs": 3} | options
  return batching.dataset(rows, widths=batching.widths(rows, 2), **options)


def equal(a: batching.Batch, b: batching.Batch) -> bool:
  return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


# Widths


def test_widths_by_hand():
  # Lengths 1..100 in each part, batches of 1: bucket 1 of 2 stands at the median, 51
  # (the higher of 50 and 51), rounded up to 64; the last at 100, rounded up to 112.
  lengths = [(n, n, n) for n in range(1, 101)]
  assert batching.widths(made_rows(lengths), 2, batch_size=1) == [(64,) * 3, (112,) * 3]
  assert batching.widths(made_rows(lengths), 1) == [(112, 112, 112)]
  # Half of all batches of 16 stay within the 0.5^(1/16) = 0.958 quantile: 96.
  assert batching.widths(made_rows(lengths), 2, batch_size=16)[0] == (96, 96, 96)
  # The quantile 0.5 of 1, 17 lies between them: the higher counts.
  assert batching.widths(made_rows([(1, 1, 1), (17, 17, 17)]), 2, batch_size=1) == [
    (32, 32, 32)
  ]
  assert batching.widths(made_rows([(16, 17, 1)] * 3), 4) == [(16, 32, 16)]


@pytest.mark.parametrize("buckets", [1, 2, 3, 8])
def test_widths_ascend_and_hold_every_row(rows, buckets):
  actual = batching.widths(rows, buckets)
  assert 1 <= len(actual) <= buckets
  for low, high in itertools.pairwise(actual):
    assert all(a <= b for a, b in zip(low, high))
  for triple, part in zip(zip(*actual), ("prompt", "answer", "teacher")):
    assert all(width % 16 == 0 for width in triple)
    assert 0 <= triple[-1] - max(len(getattr(row, part)) for row in rows) < 16


# Batches


def test_a_batch_holds_its_rows_and_only_pad_beside_them(rows):
  for batch in batches(rows, pad_id=-7):
    for i, row_id in enumerate(batch.row_id_B):
      row = rows[row_id]
      for ids, array, length in (
        (row.prompt, batch.prompt_BP, batch.prompt_length_B),
        (row.answer, batch.answer_BA, batch.answer_length_B),
        (row.teacher, batch.teacher_BC, batch.teacher_length_B),
      ):
        assert length[i] == len(ids)
        assert tuple(array[i, : length[i]]) == ids
        assert (array[i, length[i] :] == -7).all()
    assert {array.dtype for array in jax.tree.leaves(batch)} == {np.dtype(np.int32)}


def test_a_batch_takes_the_smallest_width_that_holds_it(rows):
  table = batching.widths(rows, 2, batch_size=8)
  seen = collections.Counter()
  every = batching.dataset(
    rows, batch_size=8, epochs=20, seed=0, pad_id=0, widths=table
  )
  for batch in every:
    shape = (batch.prompt_BP, batch.answer_BA, batch.teacher_BC)
    shape = tuple(array.shape[1] for array in shape)
    seen[shape] += 1
    lengths = (batch.prompt_length_B, batch.answer_length_B, batch.teacher_length_B)
    fits = [all(n.max() <= w for n, w in zip(lengths, triple)) for triple in table]
    assert shape == table[fits.index(True)]
  assert set(seen) == set(table)


def test_rows_wider_than_every_width_are_refused(rows):
  every = batching.dataset(
    rows, batch_size=8, epochs=1, seed=0, pad_id=0, widths=[(16, 16, 16)]
  )
  with pytest.raises(ValueError, match="fit none of the widths"):
    every[0]


def test_an_epoch_sees_every_row_once_but_the_remainder(rows):
  every = batches(rows)  # 50 rows, batches of 8: 6 steps an epoch, 2 rows over
  assert len(every) == 18
  epochs = [
    np.concatenate([every[step].row_id_B for step in range(6 * e, 6 * e + 6)])
    for e in range(3)
  ]
  for ids in epochs:
    assert len(set(ids)) == len(ids) == 48
  assert not np.array_equal(epochs[0], epochs[1])
  assert not np.array_equal(epochs[1], epochs[2])
  assert len(set(np.concatenate(epochs))) == 50


def test_order_depends_on_the_seed_alone(rows):
  def order(seed):
    return [batch.row_id_B.tolist() for batch in batches(rows, seed=seed)]

  assert order(0) == order(0)
  assert order(0) != order(1)
  # A seed's later epochs are not another seed's earlier ones.
  assert order(0)[6:12] != order(1)[:6]


def test_golden_order():
  # Grain's shuffle is part of a run's identity: a release that changed it would break
  # the resumption of older runs. Recorded with grain 0.2.18.
  rows = made_rows([(4, 4, 4)] * 6)
  every = batches(rows, batch_size=2, epochs=2)
  expected = [[1, 2], [4, 5], [3, 0], [5, 3], [1, 4], [2, 0]]
  assert [batch.row_id_B.tolist() for batch in every] == expected


def test_steps_bound_or_replace_epochs(rows):
  assert len(batches(rows, epochs=3, steps=7)) == 7
  assert len(batches(rows, epochs=1, steps=7)) == 6
  longer = batches(rows, epochs=None, steps=20)
  assert len(longer) == 20
  assert all(equal(longer[step], batches(rows)[step]) for step in range(18))
  with pytest.raises(ValueError, match="epochs, steps or both"):
    batches(rows, epochs=None)


@pytest.mark.parametrize("start", [0, 1, 6, 17, 18])
def test_iterating_from_a_step_is_the_tail_of_the_run(rows, start):
  every = batches(rows)
  whole = list(batching.iterate(every, start_step=0))
  tail = list(batching.iterate(batches(rows), start_step=start))
  assert len(tail) == 18 - start
  for step, batch in enumerate(tail, start=start):
    assert equal(batch, whole[step])
    assert equal(batch, every[step])


def test_iterating_from_outside_the_run_is_refused(rows):
  for step in (-1, 19):
    with pytest.raises(ValueError, match="outside a run of 18 steps"):
      batching.iterate(batches(rows), start_step=step)


def test_fewer_rows_than_a_batch(rows):
  with pytest.raises(errors.UserError, match=r"batch_size=51 .*there are 50.*=50 or"):
    batches(rows, batch_size=51)
  assert len(batches(rows, batch_size=50)) == 3


# Replay


@pytest.fixture
def general() -> list[token_rows.Row]:
  return [r._replace(row_id=100 + r.row_id) for r in made_rows([(4, 4, 4)] * 11)]


def test_every_batch_holds_its_replayed_rows_beside_the_same_others(rows, general):
  plain = batches(rows)
  mixed = batches(rows, replayed=general, replays_per_batch=2)
  assert len(mixed) == len(plain) == 18
  passes = []
  for with_replay, without in zip(mixed, plain, strict=True):
    ids = with_replay.row_id_B.tolist()
    assert ids[:8] == without.row_id_B.tolist()
    assert len(ids) == 10
    assert min(ids[8:]) >= 100
    passes += ids[8:]
  # 11 rows by twos: five batches a pass, one row over, another order in each.
  assert all(len(set(passes[i : i + 10])) == 10 for i in range(0, 30, 10))
  assert passes[:10] != passes[10:20]
  tail = list(
    batching.iterate(batches(rows, replayed=general, replays_per_batch=2), start_step=7)
  )
  assert all(equal(a, mixed[7 + i]) for i, a in enumerate(tail))


def test_copies_follow_their_row_under_ids_of_their_own(rows):
  options = {"batch_size": 2, "seed": 0, "pad_id": 0, "steps": 2}
  widths = batching.widths(rows, 1)
  plain = batching.dataset(rows, widths=widths, **options)
  grouped = batching.dataset(rows, widths=widths, copies=3, **options)
  for one, three in zip(plain, grouped):
    ids = [3 * row_id + copy for row_id in one.row_id_B for copy in range(3)]
    assert three.row_id_B.tolist() == ids
    others = (batch._replace(row_id_B=None) for batch in (one, three))
    for plainly, copied in zip(*map(jax.tree.leaves, others), strict=True):
      np.testing.assert_array_equal(copied, np.repeat(plainly, 3, axis=0))


def test_no_replay_is_the_plain_run(rows, general):
  without = batches(rows)
  for step, batch in enumerate(batches(rows, replayed=general, replays_per_batch=0)):
    assert equal(batch, without[step])


def test_fewer_replayed_rows_than_are_replayed_at_once(rows, general):
  with pytest.raises(errors.UserError, match=r"replay\.questions: 11 rows .* 12"):
    batches(rows, replayed=general, replays_per_batch=12)


@pytest.mark.parametrize(
  ("size", "share", "count"), [(16, 0.2, 4), (16, 0.0, 0), (8, 0.5, 8), (19, 0.05, 1)]
)
def test_replays_are_a_share_of_the_whole_batch(size, share, count):
  assert batching.count_replays(size, share) == count


def test_a_share_that_is_no_number_of_rows_is_refused_with_the_nearest():
  # 8 * 0.25 / 0.75 = 2.67 rows: 2 of 10 or 3 of 11.
  with pytest.raises(errors.UserError, match=r"2\.67 rows; set 0\.2 or 0\.272727"):
    batching.count_replays(8, 0.25)


def test_law_questions_end_to_end(law, tokenizer):
  questions = question_files.read_questions(law / "train.jsonl")
  rows, _ = token_rows.encode(
    [(q.messages, q.answer) for q in questions],
    schema.Data(questions="q.jsonl"),
    tokenizer=tokenizer,
    teacher_context="chat",
    places=[rejects.Place(q.id) for q in questions],
  )
  every = batches(rows, batch_size=16, pad_id=tokenizer.pad_id)
  shapes = {(b.prompt_BP.shape, b.answer_BA.shape, b.teacher_BC.shape) for b in every}
  assert len(every) == 3 * (705 // 16)
  assert len(shapes) <= 2  # all that a run compiles for
