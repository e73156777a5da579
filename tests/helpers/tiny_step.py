"""One training step of the tiny decoder: batch, settings, rollout."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from raft_jax.config import schema
from raft_jax.data import batching
from raft_jax.distillation import objective, sequences
from raft_jax.models import sampling, transformer
from raft_jax.training import run_plan
from tests.helpers import tiny_decoder

CONFIG = tiny_decoder.CONFIG
SETTINGS = run_plan.make_settings(
  schema.Config(
    model=schema.Model(source="tiny"),
    data=schema.Data(questions="none"),
    output="none",
    distill=schema.Distill(top_k=20),
  ),
  CONFIG,
  teacher_decoder=None,
  eos_ids=(5,),
  device_platform="cpu",
)


def make_batch(rows=4, prompt=7, answer=6, context=11, seed=0):
  rng = np.random.default_rng(seed)

  def segment(width, low):
    length = rng.integers(low, width + 1, rows).astype(np.int32)
    tokens = rng.integers(6, 97, (rows, width)).astype(np.int32)
    return np.where(np.arange(width) < length[:, None], tokens, 5), length

  prompts, answers, contexts = (
    segment(prompt, 2),
    segment(answer, 1),
    segment(context, 3),
  )
  return batching.Batch(*prompts, *answers, *contexts, np.arange(rows, dtype=np.int32))


def roll_out(params, batch, new=5):
  rollout = sampling.generate(
    params,
    CONFIG,
    batch.prompt_BP,
    batch.prompt_length_B,
    batch.row_id_B,
    seed=0,
    step=0,
    max_new_tokens=new,
    eos_ids=(5,),
    pad_id=5,
  )
  return sequences.Trajectory(rollout.tokens_BR, rollout.length_B)


@jax.jit
def score_teacher(params, batch, trajectory):
  return objective.score_teacher(
    params, batch.teacher_BC, batch.teacher_length_B, trajectory, settings=SETTINGS
  )


@functools.cache
def setting():
  """Parameters, a teacher that differs, a batch, its rollout and the teacher's view."""
  params = tiny_decoder.random_params()
  batch = make_batch()
  trajectory = roll_out(params, batch)
  return params, batch, trajectory, score_teacher(params, batch, trajectory)


def assert_trees_close(a, b, tolerance):
  """Relative, per tensor, in norm."""

  def compare(path, x, y):
    error = np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-12)
    assert error <= tolerance, f"{jax.tree_util.keystr(path)}: {error}"

  jax.tree_util.tree_map_with_path(compare, a, b)


def plain_hidden(params, tokens, length):
  """One row on its own, without padding or packing."""
  tokens = jnp.array([tokens[:length]])
  valid = jnp.ones(tokens.shape, bool)
  return transformer.forward(
    params, CONFIG, tokens, transformer.positions(valid), transformer.causal_mask(valid)
  )[0][0]
