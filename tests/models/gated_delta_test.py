"""The gated delta rule against a recurrence in float64, and the order of the tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from raft_jax.models import delta_rule, gated_delta

HEADS, KEY, VALUE = 3, 6, 5


def inputs(length: int, *, alike: float = 0.0, seed: int = 0) -> list[np.ndarray]:
  """Queries, keys of length 1, values, log decays, strengths in 0..2, and a state.

  Args:
    alike: how near all keys are to the first one.
  """
  rng = np.random.default_rng(seed)
  q, k = rng.normal(size=(2, 2, length, HEADS, KEY))
  k = (1 - alike) * k + alike * k[:, :1]
  k /= np.linalg.norm(k, axis=-1, keepdims=True)
  v = rng.normal(size=(2, length, HEADS, VALUE))
  decay = -np.exp(rng.uniform(-8, 3, (2, length, HEADS)))  # a of 0.9997 to 2e-9
  strength = rng.uniform(0, 2, (2, length, HEADS))
  state = rng.normal(size=(2, HEADS, KEY, VALUE))
  return [q, k, v, decay, strength, state]


def recurrence(q, k, v, decay, strength, state):
  """The rule of arXiv 2412.06464, eq. 10, token by token in torch's float64."""
  outputs = []
  for t in range(q.shape[1]):
    kept = torch.exp(decay[:, t])[..., None, None] * state
    known = torch.einsum("bhkv,bhk->bhv", kept, k[:, t])
    change = strength[:, t][..., None] * (v[:, t] - known)
    state = kept + torch.einsum("bhk,bhv->bhkv", k[:, t], change)
    outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
  return torch.stack(outputs, dim=1), state


@pytest.mark.parametrize("length", [1, 5, 150])
@pytest.mark.parametrize("alike", [0.0, 0.95])
def test_rule_equals_the_recurrence(length, alike):
  arrays = inputs(length, alike=alike)
  want = recurrence(*map(torch.tensor, arrays))
  got = jax.jit(delta_rule.delta_rule)(*(jnp.array(x, jnp.float32) for x in arrays))
  for ours, theirs in zip(got, want, strict=True):
    scale = np.abs(theirs.numpy()).max()
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * scale)


def test_strong_decays_before_leave_weak_ones_exact():
  """Their logs add up to -3000, in which float32 has steps of 2e-4."""
  arrays = inputs(64)
  arrays[3] = np.broadcast_to(np.repeat([-100, -1e-3], 32)[:, None], (2, 64, HEADS))
  want, _ = recurrence(*map(torch.tensor, arrays))
  got, _ = jax.jit(delta_rule.delta_rule)(*(jnp.array(x, jnp.float32) for x in arrays))
  scale = np.abs(want.numpy()).max()
  np.testing.assert_allclose(got, want, atol=3e-6 * scale)


def test_gradients_equal_those_of_the_recurrence():
  arrays = inputs(70, alike=0.5)
  rng = np.random.default_rng(1)
  weights = [rng.normal(size=(2, 70, HEADS, VALUE)), rng.normal(size=arrays[-1].shape)]
  leaves = [torch.tensor(x, requires_grad=True) for x in arrays]
  outputs = recurrence(*leaves)
  sum((w * x).sum() for w, x in zip(map(torch.tensor, weights), outputs)).backward()

  @jax.jit
  def gradients(*arrays):
    def total(*arrays):
      return sum(
        jnp.sum(w * x) for w, x in zip(weights, delta_rule.delta_rule(*arrays))
      )

    return jax.grad(total, argnums=tuple(range(len(arrays))))(*arrays)

  got = gradients(*(jnp.array(x, jnp.float32) for x in arrays))
  for ours, leaf in zip(got, leaves, strict=True):
    scale = np.abs(leaf.grad.numpy()).max()
    np.testing.assert_allclose(ours, leaf.grad, atol=2e-5 * scale)


@pytest.mark.parametrize("size", [1, 2, 32])
def test_inverse_of_unit_lower_triangles(size):
  lower = np.tril(np.random.default_rng(0).normal(size=(2, size, size)) * 0.3, -1)
  got = jax.jit(delta_rule.unit_lower_inverse)(jnp.array(lower, jnp.float32))
  want = np.linalg.inv(np.eye(size) + lower)
  np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_columns_bring_each_parts_tokens_to_its_front():
  valid = np.array([[1, 1, 0, 1, 0, 1], [0, 1, 1, 0, 0, 0]], bool)
  columns = gated_delta.columns(jnp.array(valid), (3, 0, 3))
  np.testing.assert_array_equal(
    columns.order_BT, [[0, 1, 2, 3, 5, 4], [1, 2, 0, 3, 4, 5]]
  )
  assert [part.width for part in columns.parts] == [3, 3]  # an empty one is left out
  np.testing.assert_array_equal(
    [part.count_B for part in columns.parts], [[2, 2], [2, 0]]
  )
  back = np.take_along_axis(
    np.asarray(columns.order_BT), np.asarray(columns.place_BT), axis=1
  )
  np.testing.assert_array_equal(back, [np.arange(6)] * 2)
  with pytest.raises(ValueError, match="add up"):
    gated_delta.columns(jnp.array(valid), (3, 2))


def test_branches_start_from_the_trunks_last_state():
  """Each has the outputs of its own pass over [trunk | branch]."""
  widths = (70, 9, 30)
  arrays = inputs(sum(widths))
  got, state = jax.jit(lambda *args: delta_rule.delta_rule(*args, widths=widths))(
    *(jnp.array(x, jnp.float32) for x in arrays)
  )
  ends = np.cumsum(widths)
  for width, end in zip(widths[1:], ends[1:], strict=True):
    columns = [*range(widths[0]), *range(end - width, end)]
    alone = [torch.tensor(x[:, columns]) for x in arrays[:-1]]
    want, _ = recurrence(*alone, torch.tensor(arrays[-1]))
    ours = np.asarray(got)[:, columns]
    np.testing.assert_allclose(ours, want, atol=1e-5 * np.abs(want.numpy()).max())
  trunk = [torch.tensor(x[:, : widths[0]]) for x in arrays[:-1]]
  _, want = recurrence(*trunk, torch.tensor(arrays[-1]))
  np.testing.assert_allclose(state, want, atol=1e-5 * np.abs(want.numpy()).max())


def test_gradients_of_all_branches_reach_the_trunk():
  """Against those of the recurrence over [trunk | branch], added up, in float64."""
  widths = (35, 9, 20)
  arrays = inputs(sum(widths), alike=0.5)
  weights = np.random.default_rng(1).normal(size=(2, sum(widths), HEADS, VALUE))
  ends = np.cumsum(widths)
  leaves = [torch.tensor(x, requires_grad=True) for x in arrays]
  total = torch.tensor(0.0)
  for width, end in zip(widths[1:], ends[1:], strict=True):
    columns = [*range(widths[0]), *range(end - width, end)]
    outputs, _ = recurrence(*(x[:, columns] for x in leaves[:-1]), leaves[-1])
    own = outputs[:, widths[0] :] * torch.tensor(weights[:, end - width : end])
    total = total + own.sum()
  total.backward()

  def of_branches(*arrays):
    outputs, _ = delta_rule.delta_rule(*arrays, widths=widths)
    return jnp.sum((outputs * weights)[:, widths[0] :])

  gradients = jax.jit(jax.grad(of_branches, argnums=tuple(range(len(arrays)))))
  got = gradients(*(jnp.array(x, jnp.float32) for x in arrays))
  for ours, leaf in zip(got, leaves, strict=True):
    scale = np.abs(leaf.grad.numpy()).max()
    np.testing.assert_allclose(ours, leaf.grad, atol=2e-5 * scale)


def test_convolution_of_each_part_reads_what_the_part_continues():
  """Against torch's convolution over [before | trunk | branch], of valid tokens."""
  rng = np.random.default_rng(0)
  x, kernel, before = (
    rng.normal(size=shape).astype(np.float32)
    for shape in ((1, 12, 2), (2, 4), (1, 3, 2))
  )
  counts = (5, 2, 1)  # of 6, 4 and 2 columns
  parts = [
    gated_delta.Part(width, jnp.array([count]))
    for width, count in zip((6, 4, 2), counts, strict=True)
  ]
  got, after = jax.jit(lambda *args: gated_delta.convolve(*args, parts))(
    x, kernel, before
  )
  trunk = np.concatenate([before[0], x[0, : counts[0]]])
  np.testing.assert_array_equal(after[0], trunk[-3:])
  for start, count in ((0, counts[0]), (6, counts[1]), (10, counts[2])):
    earlier = before[0] if start == 0 else trunk
    whole = torch.tensor(np.concatenate([earlier, x[0, start : start + count]]).T)
    want = torch.nn.functional.conv1d(whole, torch.tensor(kernel[:, None]), groups=2)
    want = torch.nn.functional.silu(want).T[-count:]
    np.testing.assert_allclose(got[0, start : start + count], want, atol=1e-6)
