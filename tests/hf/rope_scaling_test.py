"""Every kind of rotary scaling against transformers, for every family that reads it."""

import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from transformers import modeling_rope_utils

from raft_jax.hf import decoder_config, families
from raft_jax.models import rotary
from tests.helpers import tiny_families

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
BETAS = {"beta_fast": 2.0, "beta_slow": 0.2}
KINDS = {
  "linear": {"rope_type": "linear", "factor": 4.0},
  "dynamic": {"rope_type": "dynamic", "factor": 4.0},
  "yarn": YARN,
  "yarn with all numbers": {**YARN, **BETAS, "mscale": 1.0, "mscale_all_dim": 0.5},
  "yarn with its own factor": {**YARN, **BETAS, "attention_factor": 1.3},
  "yarn within a dimension": {**YARN, **BETAS, "truncate": False},
  "longrope": {
    "rope_type": "longrope",
    "original_max_position_embeddings": 16,
    "short_factor": [1.0, 1.5, 2.0, 3.0],
    "long_factor": [1.5, 3.0, 9.0, 10.0],
  },
  "llama3": {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
  },
}
NESTED = ("gemma3_text", "olmo3")


def read_by(kind: str) -> list[str]:
  rope_type = KINDS[kind]["rope_type"]
  names = [n for n, family in families.FAMILIES.items() if rope_type in family.ropes]
  # transformers reads `truncate` beside the sections of the kinds of layers.
  return [name for name in names if "truncate" not in KINDS[kind] or name not in NESTED]


@pytest.mark.parametrize("kind", KINDS)
def test_rotations_are_those_of_transformers(kind):
  """Up to 4 times the original length, which is the longest that `dynamic` leaves."""
  assert len(read_by(kind)) > 1
  positions = jnp.arange(tiny_families.TINY["max_position_embeddings"])[None]
  for name in read_by(kind):
    rope = {"rope_theta": 1e3, "partial_rotary_factor": 1.0, **KINDS[kind]}
    local = {"rope_type": "default", "rope_theta": 1e3}
    sections = {"full_attention": rope, "sliding_attention": local}
    fields = {
      **tiny_families.TINY,
      "hidden_size": 32,
      "head_dim": 8,
      "pad_token_id": 0,
      "original_max_position_embeddings": 16,
      "rope_parameters": sections if name in NESTED else rope,
    }
    if name != "phi3":
      del fields["original_max_position_embeddings"]
    theirs = transformers.AutoConfig.for_model(name, **fields)
    of_layer = {"layer_type": "full_attention"} if name in NESTED else {}
    inverse, scale = modeling_rope_utils.ROPE_INIT_FUNCTIONS[rope["rope_type"]](
      theirs, **of_layer
    )
    ours = decoder_config.decoder_config(theirs.to_dict(), name)
    (first, *_) = ours.ropes or (rotary.Rope(ours.rope_theta),)
    cos, sin = rotary.rotation(first, positions, ours.head_dim, jnp.array([16]))
    angle = np.asarray(positions[0, :, None], np.float32) * inverse.numpy()
    for table, want in ((cos, np.cos(angle)), (sin, np.sin(angle))):
      np.testing.assert_allclose(table[0, :, 0], want * scale, atol=2e-5, err_msg=name)


def test_proportional_rotation_is_that_of_transformers():
  """Of Gemma 4's global layers: 3 of the 12 frequencies turn, half as fast."""
  rope = {"rope_type": "proportional", "rope_theta": 1e3}
  rope |= {"partial_rotary_factor": 0.3, "factor": 2.0}
  theirs = transformers.AutoConfig.for_model(
    "gemma4_text",
    **tiny_families.TINY,
    hidden_size_per_layer_input=0,
    global_head_dim=24,
    rope_parameters={
      "full_attention": rope,
      "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
  )
  inverse, _ = modeling_rope_utils.ROPE_INIT_FUNCTIONS["proportional"](
    theirs, layer_type="full_attention"
  )
  own = decoder_config.decoder_config(theirs.to_dict(), "m").global_attention
  assert own is not None
  positions = jnp.arange(64)[None]
  cos, sin = rotary.rotation(own.rope, positions, own.head_dim)
  angle = np.asarray(positions[0, :, None], np.float32) * inverse.numpy()
  assert (inverse.numpy() > 0).sum() == 3
  np.testing.assert_allclose(cos[0, :, 0], np.cos(angle), atol=2e-5)
  np.testing.assert_allclose(sin[0, :, 0], np.sin(angle), atol=2e-5)


def test_yarn_lengthens_what_a_model_reads():
  """Qwen's published switch: max_position_embeddings stays that without YaRN."""
  fields = {**tiny_families.TINY, "model_type": "qwen3", "rope_scaling": YARN}
  assert decoder_config.decoder_config(fields, "m").max_positions == 64
  longer = {**YARN, "original_max_position_embeddings": 40}
  config = decoder_config.decoder_config({**fields, "rope_scaling": longer}, "m")
  assert config.max_positions == 160


def test_layers_without_positions_are_not_scaled():
  fields = {**tiny_families.TINY, "model_type": "smollm3", "rope_scaling": YARN}
  scaled, none = decoder_config.decoder_config(fields, "m").ropes
  assert scaled.scale > 1
  cos, sin = rotary.rotation(none, jnp.arange(9)[None], 12)
  assert (cos == 1).all()
  assert (sin == 0).all()
