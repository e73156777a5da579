"""A model's config fields to a `DecoderConfig`; unsupported features are refused.

`config.json` and GGUF metadata both arrive as the same dict of Hugging Face config
fields, so that every rule is written once.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from raft_jax import errors
from raft_jax.hf import (
  config_checks,
  families,
  family_row,
  layer_kinds,
  rope_scaling,
  wrappers,
)

if TYPE_CHECKING:
  from raft_jax.models import rotary, transformer


def find_family(fields: family_row.Fields, place: str) -> family_row.Family:
  """The family of a model; refuses features that the decoder does not compute.

  A repository's own code (`auto_map`) is ignored if its class has the name of the
  family's class: Phi-3 and Phi-4 were published with the code of a class that is in
  transformers now. Of a model with a text tower, it is the tower's family, under the
  names of the whole model.

  Args:
    fields: the model's config.
    place: where the config was read, for messages.

  Raises:
    UserError: the family or a feature of it is not supported; the message names it.
  """
  text, wrapper = wrappers.text_fields(fields), wrappers.find(fields)
  config_checks.sections(fields, place)
  config_checks.sections(text, place)
  family = families.FAMILIES.get(str(text.get("model_type", "")))
  if family is not None and family.mixture and text.get("enable_moe_block"):
    family = family.mixture
  for name in ("quantization_config", "quantization"):  # MLX writes the second
    coding = fields.get(name) or text.get(name)
    if coding and not _is_read(coding, family):
      raise errors.UserError(
        f"{place}: {name}: quantised weights cannot be trained; use the unquantised "
        "checkpoint"
      )
  if wrapper is not None:
    if family is None:
      raise errors.UserError(
        f"{place}: a text_config of model_type {text['model_type']!r} is not "
        f"supported; supported: {', '.join(families.FAMILIES)}"
      )
    family = wrappers.wrap(family, wrapper)
  architectures = fields.get("architectures") or []
  if not isinstance(architectures, list):
    architectures = [architectures]
  if family is None or (architectures and family.architecture not in architectures):
    known = ", ".join(
      [row.architecture for row in families.FAMILIES.values()]
      + [row.architecture for row in wrappers.WRAPPERS.values()]
    )
    raise errors.UserError(
      f"{place}: architecture {', '.join(map(str, architectures)) or 'unknown'} "
      f"(model_type {fields.get('model_type')!r}) is not supported; supported: {known}"
    )
  code = fields.get("auto_map") or {}
  classes = {name.rpartition(".")[2] for key, name in code.items() if "Model" in key}
  if not classes <= {family.architecture}:
    raise errors.UserError(
      f"{place}: auto_map asks to run the repository's code (trust_remote_code), which "
      "is never done; use a model of a supported family"
    )
  common = {**family.defaults, **_common_names(text, family)}
  for section in (common, _rope_fields(text, family)):
    for field, values in family.only.items():
      if field in section and section[field] not in values:
        raise errors.UserError(
          f"{place}: {family.renamed.get(field, field)} = {section[field]!r} is not "
          f"supported (only {values[0]!r}); use another model"
        )
  return family


def _is_read(coding: Any, family: family_row.Family | None) -> bool:
  """Whether a quantised checkpoint of the family can be read."""
  is_mxfp4 = isinstance(coding, dict) and coding.get("quant_method") == "mxfp4"
  return is_mxfp4 and family is not None and family.mxfp4


def _common_names(
  fields: family_row.Fields, family: family_row.Family
) -> family_row.Fields:
  """The fields under the names that most families give them."""
  renamed = {
    name: fields[own_name]
    for name, own_name in family.renamed.items()
    if own_name in fields
  }
  # A field of the usual name means something else here.
  others = {name: value for name, value in fields.items() if name not in family.renamed}
  return {**others, **renamed}


def decoder_config(fields: family_row.Fields, place: str) -> transformer.DecoderConfig:
  """The decoder's shape; arguments and errors as for `find_family`."""
  from raft_jax.models import transformer  # imports jax

  family = find_family(fields, place)
  fields = _common_names(wrappers.text_fields(fields), family)
  rope = _rope_fields(fields, family)
  fields = {**family.defaults, **rope, **fields}
  fields["rope_theta"] = rope.get("rope_theta") or fields["rope_theta"]
  if fields["rope_theta"] is None and "none" in family.ropes:
    fields["rope_theta"] = family.defaults["rope_theta"]
    rope = {**rope, "rope_type": "none"}

  def number(name: str, kind: type, default: Any = None) -> Any:
    return config_checks.number(fields, place, name, kind, default)

  heads, width = number("num_attention_heads", int), number("hidden_size", int)
  layers = number("num_hidden_layers", int)
  config_checks.lists(fields, layers, place)
  layer_kinds.check_per_layer_inputs(fields, place)
  config = transformer.DecoderConfig(
    vocab_size=number("vocab_size", int),
    d_model=width,
    n_layers=layers,
    n_heads=heads,
    n_kv_heads=number("num_key_value_heads", int, heads),
    head_dim=number("head_dim", int, width // heads),
    d_ff=number("intermediate_size", int),
    rms_eps=number("rms_norm_eps", float),
    rope_theta=number("rope_theta", float),
    max_positions=number("max_position_embeddings", int),
    tie_embeddings=bool(fields["tie_word_embeddings"]),
    **_expert_counts(fields, family, place),
    delta=layer_kinds.delta(fields, family, place),
    global_attention=layer_kinds.global_attention(fields, family, place),
    kv_sharing=layer_kinds.kv_sharing(fields, family, place),
    **family.extra(fields),
  )
  config_checks.heads(config.n_heads, config.n_kv_heads, config.head_dim, place)
  # A field of the rope section counts more than one of the same name beside it, except
  # for this one (transformers' standardize_rope_params).
  length = fields.get("original_max_position_embeddings")
  original = {"original_max_position_embeddings": length} if length else {}
  rope = {**fields, **rope, **original}
  return dataclasses.replace(
    config,
    max_positions=_longest(rope, config, place),
    windows=_windows(fields, family, config, place),
    **_layer_ropes(rope, family, config, place),
  )


def _expert_counts(
  fields: family_row.Fields, family: family_row.Family, place: str
) -> dict[str, Any]:
  if not family.has_experts:
    return {}
  # The same model may be saved with either name (transformers' attribute_map).
  name = "num_local_experts" if "num_local_experts" in fields else "num_experts"
  count = config_checks.number(fields, place, name, int)
  per_token = config_checks.number(fields, place, "num_experts_per_tok", int)
  if per_token > count:
    raise errors.UserError(
      f"{place}: num_experts_per_tok is {per_token}, of {count} experts; fetch the "
      "file again"
    )
  counts = {"n_experts": count, "experts_per_token": per_token}
  if "layers/shared_gate" in family.names:
    width = config_checks.number(fields, place, "shared_expert_intermediate_size", int)
    counts["shared_d_ff"] = width
  return counts


def _windows(
  fields: family_row.Fields,
  family: family_row.Family,
  config: transformer.DecoderConfig,
  place: str,
) -> tuple[int, ...]:
  window, slides = fields.get("sliding_window"), family.slides
  if not window or slides is None or not fields.get("use_sliding_window", True):
    return ()
  window = config_checks.number(fields, place, "sliding_window", int)
  if window >= config.max_positions:  # then it limits no layer
    return ()
  windows = tuple(
    window if slides(fields, layer) else 0 for layer in range(config.n_layers)
  )
  return windows if any(windows) else ()


# --- Rotary embeddings ----------------------------------------------------------------


def _rope_fields(
  fields: family_row.Fields, family: family_row.Family
) -> family_row.Fields:
  """The fields of the rotary embedding.

  transformers 5 writes `rope_parameters`, and transformers 4 `rope_scaling`. If a
  config has both, transformers reads the second.
  """
  rope = fields.get("rope_parameters") or {}
  if not rope and not fields.get("rope_scaling"):
    rope = family.defaults.get("rope_parameters", {})
  # If it has one section for each kind of layer, the other one is `_local_theta`'s.
  rope = rope.get("full_attention", rope)
  scaling = dict(fields.get("rope_scaling") or {})
  if "type" in scaling:
    scaling.setdefault("rope_type", scaling["type"])
  return {**(rope or {}), **scaling}


def _rope(
  fields: family_row.Fields,
  family: family_row.Family,
  config: transformer.DecoderConfig,
  place: str,
) -> rotary.Rope:
  """The rotary embedding of the layers without a window."""
  from raft_jax.models import rotary

  kind = _rope_kind(fields)
  if kind not in family.ropes:
    raise errors.UserError(
      f"{place}: rope scaling {kind!r} is not supported; use a model without it"
    )
  share = fields.get("partial_rotary_factor") or 1
  width = config.head_dim if kind == "proportional" else int(config.head_dim * share)
  rope = rotary.Rope(config.rope_theta, None if width == config.head_dim else width)
  fields = {"original_max_position_embeddings": config.max_positions, **fields}
  scaling = _scaling(fields, kind, config, width, f"{place}: rope scaling {kind!r}")
  return dataclasses.replace(rope, **scaling)


def _rope_kind(fields: family_row.Fields) -> str:
  kind = fields.get("rope_type") or fields.get("type") or "default"
  return "longrope" if kind == "su" else kind  # its name in the first Phi-3 files


def _longest(
  fields: family_row.Fields, config: transformer.DecoderConfig, place: str
) -> int:
  """The longest sequence that the model was made for.

  Published configs that turn YaRN on (Qwen) keep the length without it, as vLLM knows.
  """
  if _rope_kind(fields) != "yarn" or not fields.get("factor"):
    return config.max_positions
  original = fields.get("original_max_position_embeddings") or config.max_positions
  return max(config.max_positions, int(original * fields["factor"]))


def _scaling(
  fields: family_row.Fields,
  kind: str,
  config: transformer.DecoderConfig,
  width: int,
  place: str,
) -> dict[str, Any]:
  """The fields of `rotary.Rope` by which a kind of scaling differs from none."""
  exponents = np.arange(0, width, 2) / width

  def number(name: str, kind_: type = float, default: float | None = None) -> Any:
    return config_checks.number(fields, place, name, kind_, default)

  def factors(name: str) -> tuple[float, ...]:
    values = fields.get(name)
    if not isinstance(values, list) or len(values) != len(exponents):
      raise errors.UserError(
        f"{place}: {name} does not hold {len(exponents)} numbers; fetch the file again"
      )
    return tuple(map(float, values))

  if kind == "none":
    return {"divisors": (math.inf,)}
  if kind == "linear":
    return {"divisors": (number("factor"),)}
  if kind == "proportional":
    share = number("partial_rotary_factor", default=1.0)
    factor = number("factor", default=1.0)
    return {
      "divisors": rope_scaling.proportional_divisors(width, share=share, factor=factor)
    }
  if kind == "llama3":
    numbers = {name: number(name) for name in rope_scaling.LLAMA3_NUMBERS}
    periods = config.rope_theta**exponents
    return {"divisors": rope_scaling.llama3_divisors(periods, **numbers)}
  if kind not in ("longrope", "yarn"):
    return {}
  original = number("original_max_position_embeddings", int)
  growth = number("factor", default=config.max_positions / original)
  if kind == "longrope":
    scale = rope_scaling.longrope_scale(growth, original)
    return {
      "divisors": factors("short_factor"),
      "long_divisors": factors("long_factor"),
      "long_after": original,
      "scale": fields.get("attention_factor") or scale,
    }
  divisors = rope_scaling.yarn_divisors(
    config.rope_theta,
    width,
    factor=growth,
    original=original,
    beta_fast=number("beta_fast", default=32.0),
    beta_slow=number("beta_slow", default=1.0),
    truncate=fields.get("truncate", True),
  )
  scale = rope_scaling.yarn_scale(
    growth, fields.get("mscale"), fields.get("mscale_all_dim")
  )
  return {"divisors": divisors, "scale": fields.get("attention_factor") or scale}


def _local_theta(fields: family_row.Fields, place: str) -> float:
  """The base of the rotary embedding that only the layers with a window use."""
  local = (fields.get("rope_parameters") or {}).get("sliding_attention") or {}
  if local.get("rope_type", "default") != "default":
    raise errors.UserError(
      f"{place}: rope scaling {local['rope_type']!r} of layers with a window is not "
      "supported; use a model without it"
    )
  if local:
    fields = {**fields, "rope_local_base_freq": local.get("rope_theta")}
  return config_checks.number(fields, place, "rope_local_base_freq", float)


def _layer_ropes(
  fields: family_row.Fields,
  family: family_row.Family,
  config: transformer.DecoderConfig,
  place: str,
) -> dict[str, Any]:
  """`ropes` and `layer_ropes` of the decoder's config, or both kinds of layers' own."""
  from raft_jax.models import hybrid, rotary

  if config.global_attention is not None:
    own = hybrid.global_config(config)
    rope = _rope(fields, family, own, place)
    return {
      "ropes": (rotary.Rope(_local_theta(fields, place)),),
      "global_attention": dataclasses.replace(config.global_attention, rope=rope),
    }
  main = _rope(fields, family, config, place)
  layers = range(config.n_layers)
  if family.rotates is not None:
    rotates = family.rotates
    no_rotation = rotary.Rope(main.theta, main.width, divisors=(math.inf,))
    indices = tuple(int(not rotates(fields, layer)) for layer in layers)
    return {"ropes": (main, no_rotation), "layer_ropes": indices}
  if "rope_local_base_freq" in family.defaults and family.slides is not None:
    local = rotary.Rope(_local_theta(fields, place))
    slides = family.slides
    indices = tuple(int(slides(fields, layer)) for layer in layers)
    return {"ropes": (main, local), "layer_ropes": indices}
  return {"ropes": () if main == rotary.Rope(config.rope_theta) else (main,)}


def interleaved_heads(
  family: family_row.Family, config: transformer.DecoderConfig
) -> dict[str, int]:
  """Heads of the parameters whose rows a GGUF file interleaves, by their paths."""
  return {
    path: config.n_heads if path.endswith("/q") else config.n_kv_heads
    for path in family.interleaved
  }


def row_groups(
  family: family_row.Family, config: transformer.DecoderConfig
) -> dict[str, int]:
  """Groups of rows of the parameters that a file fuses group by group, by their paths.

  Each group holds what belongs to one head of the linear layers' keys.
  """
  groups = config.delta.key_heads if config.delta else 1
  return dict.fromkeys(family.grouped, groups)
