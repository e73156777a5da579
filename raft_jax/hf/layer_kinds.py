"""The layers of a model that are of another kind, from its config fields.

They have Gated DeltaNet instead of attention, or attention with heads of another shape,
or share the keys and values of earlier layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from raft_jax import errors
from raft_jax.hf import config_checks, family_row, gemma4_families, hybrid_families

if TYPE_CHECKING:
  from raft_jax.models import gated_delta, hybrid


def delta(
  fields: family_row.Fields, family: family_row.Family, place: str
) -> gated_delta.DeltaConfig | None:
  """The layers of Gated DeltaNet; errors as for `decoder_config.find_family`."""
  if family.delta is None:
    return None
  from raft_jax.models import gated_delta

  layers = range(fields["num_hidden_layers"])
  if not fields.get("layer_types"):
    config_checks.number(fields, place, "full_attention_interval", int)
  for kind in fields.get("layer_types") or ():
    if kind not in ("linear_attention", "full_attention"):
      raise errors.UserError(
        f"{place}: model_type {fields['model_type']}: layers of kind {kind!r} are not "
        "read; use another model"
      )
  linear = tuple(layer for layer in layers if hybrid_families.is_linear(fields, layer))
  if len(linear) in (0, len(layers)):
    raise errors.UserError(
      f"{place}: model_type {fields['model_type']} is read with layers of both kinds, "
      f"and {len(linear)} of its {len(layers)} are linear; use another model"
    )

  def number(name: str, default: int | None = None) -> int:
    return config_checks.number(fields, place, f"linear_{name}", int, default)

  heads = fields["num_attention_heads"]
  key_heads = number("num_key_heads", heads)
  key_width = number("key_head_dim", int(0.75 * fields["hidden_size"] / key_heads))
  config = gated_delta.DeltaConfig(
    layers=linear,
    key_heads=key_heads,
    value_heads=number("num_value_heads", heads),
    key_width=key_width,
    value_width=number("value_head_dim", 2 * key_width),
    conv_width=number("conv_kernel_dim"),
    **family.delta(fields),
  )
  if config.value_heads % config.key_heads or config.conv_width < 2:
    raise errors.UserError(
      f"{place}: linear attention with {config.key_heads} key heads, "
      f"{config.value_heads} value heads and a convolution over {config.conv_width} "
      "tokens is not read; use another model"
    )
  return config


def global_attention(
  fields: family_row.Fields, family: family_row.Family, place: str
) -> hybrid.GlobalAttention | None:
  """The layers with heads of another shape, with a rotary embedding that stands in.

  Errors are as for `decoder_config.find_family`.
  """
  if not family.has_global_attention:
    return None
  from raft_jax.models import hybrid, rotary

  assert family.slides is not None
  count = fields["num_hidden_layers"]
  layers = tuple(layer for layer in range(count) if not family.slides(fields, layer))
  if len(layers) == count:
    raise errors.UserError(
      f"{place}: model_type {fields['model_type']} is read with layers of both kinds, "
      f"and all of its {count} have full attention; use another model"
    )
  shape = gemma4_families.global_shape(fields)
  if shape is None or set(shape) - {"head_dim", "num_key_value_heads"}:
    raise errors.UserError(
      f"{place}: per_layer_config gives its layers with full attention different "
      "shapes, or more than heads; use another model"
    )
  shape = {**fields, **shape}
  own = hybrid.GlobalAttention(
    layers,
    n_kv_heads=config_checks.number(shape, place, "num_key_value_heads", int),
    head_dim=config_checks.number(shape, place, "head_dim", int),
    rope=rotary.Rope(1.0),  # `decoder_config` replaces it
    keys_are_values=bool(fields["attention_k_eq_v"]),
  )
  heads = fields["num_attention_heads"]
  config_checks.heads(heads, own.n_kv_heads, own.head_dim, place)
  return own


def kv_sharing(
  fields: family_row.Fields, family: family_row.Family, place: str
) -> hybrid.KvSharing | None:
  """The last layers, which share keys and values, and the width of their feed-forward.

  Errors are as for `decoder_config.find_family`.
  """
  if not family.has_kv_sharing or not fields["num_kv_shared_layers"]:
    return None
  from raft_jax.models import hybrid

  assert family.slides is not None
  slides = family.slides
  count = fields["num_hidden_layers"]
  first = count - config_checks.number(fields, place, "num_kv_shared_layers", int)
  own, sharing = (
    {slides(fields, layer) for layer in layers}
    for layers in (range(first), range(max(first, 0), count))
  )
  if not sharing <= own:
    raise errors.UserError(
      f"{place}: the last {count - first} of {count} layers share keys and values, and "
      "some have no layer of their kind before them; fetch the file again"
    )
  width = config_checks.number(fields, place, "intermediate_size", int)
  return hybrid.KvSharing(first, width * (2 if fields["use_double_wide_mlp"] else 1))


def check_per_layer_inputs(fields: family_row.Fields, place: str) -> None:
  """Checks that each token has an embedding in the second table, too, if there is one.

  Raises:
    UserError: the tables are not for the same vocabulary, or a width is no number.
  """
  if not fields.get("hidden_size_per_layer_input"):
    return
  config_checks.number(fields, place, "hidden_size_per_layer_input", int)
  vocabulary = fields["vocab_size"]
  own = fields.get("vocab_size_per_layer_input", vocabulary)
  if own != vocabulary:
    raise errors.UserError(
      f"{place}: vocab_size_per_layer_input is {own}, and vocab_size {vocabulary}; use "
      "a model in which they are the same"
    )
