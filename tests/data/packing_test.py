"""Rows in lanes: every token has one place, and the room is the cheapest."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from raft_jax.data import packing
from raft_jax.distillation import step

LENGTHS = strategies.lists(strategies.integers(1, 30), min_size=1, max_size=12)


@hypothesis.given(LENGTHS, strategies.integers(30, 90))
def test_every_row_is_in_one_lane_that_holds_it(lengths, width):
  lanes = packing.assign(np.array(lengths), width)
  assert sorted(row for lane in lanes for row in lane) == list(range(len(lengths)))
  filled = [sum(lengths[row] for row in lane) for lane in lanes]
  assert max(filled) <= width
  # First fit: no lane could also hold the shortest row of a later one.
  for i, lane in enumerate(lanes[1:], 1):
    shortest = min(lengths[row] for row in lane)
    assert all(before + shortest > width for before in filled[:i])


def batch_of(groups, rows, seed=0):
  rng = np.random.default_rng(seed)
  widths = (9, 6, 4)
  lengths = np.stack([rng.integers(1, width + 1, rows) for width in widths], axis=1)
  lengths[:, 2] = widths[2]
  return lengths, widths, packing.Groups(*groups)


@pytest.mark.parametrize("groups", [(1, 1), (1, 3), (2, 1), (2, 3)])
def test_a_token_has_one_place_and_a_place_one_token(groups):
  lengths, widths, groups = batch_of(groups, 12)
  room = packing.Room(12 // groups.total, 2 * sum(widths), 72)
  packed = packing.pack(lengths, widths, room, groups)
  part = np.repeat(np.arange(3), widths)
  start = np.cumsum([0, *widths[:2]])[part]
  held_BT = np.arange(sum(widths)) - start < lengths[:, part]
  # As a step splits rows: over devices in blocks, and these over micro-batches.
  arrays = (packed.token_GNL, packed.place_BT, packed.answer_GK, held_BT)
  for lanes, places, answers, held in zip(
    *(step.stack_micro_batches(array, groups.micro_batches) for array in arrays)
  ):
    for device in range(groups.devices):
      token = lanes[device].ravel()
      place, tokens = (
        rows.reshape(groups.devices, -1)[device] for rows in (places, held)
      )
      np.testing.assert_array_equal(token[place[tokens]], np.flatnonzero(tokens))
      assert np.sum(token >= 0) == np.sum(tokens)
      trained = tokens.reshape(-1, sum(widths))[:, part == 1]
      head = answers[device][answers[device] >= 0]
      np.testing.assert_array_equal(head, np.flatnonzero(trained))


def test_too_little_room_is_no_packing():
  lengths, widths, groups = batch_of((1, 1), 8)
  assert packing.pack(lengths, widths, packing.Room(8, 19, 48), groups) is not None
  assert packing.pack(lengths, widths, packing.Room(2, 19, 48), groups) is None
  assert packing.pack(lengths, widths, packing.Room(8, 19, 5), groups) is None


def test_the_room_is_the_cheapest_of_all():
  groups = packing.Groups(1, 1)
  lengths = [batch_of((1, 1), 6, seed)[0] for seed in range(9)]
  widths, attention = (9, 6, 4), 0.01

  def cost(lanes, width):
    """Of all batches, each packed if it fits, and padded to its rows if not."""
    room = packing.Room(lanes, width, 36)
    sizes = [
      (6, 19) if packing.pack(each, widths, room, groups) is None else room[:2]
      for each in lengths
    ]
    return sum(n * w * (1 + attention * w) for n, w in sizes)

  chosen = packing.choose_room(
    lengths, widths, groups, head=True, lane_widths=(19, 38), attention=attention
  )
  least = min(cost(n, width) for n in range(1, 7) for width in (19, 38))
  assert cost(*chosen[:2]) == pytest.approx(least)
  assert least < cost(6, 19)
  # Attention to other rows' columns is computed and costs, until no lane is shared.
  alone = packing.choose_room(
    lengths, widths, groups, head=False, lane_widths=(19, 38), attention=100.0
  )
  assert alone.width == 19
  assert alone.answers is None
