"""Models with a text tower beside other parts: their config and names of tensors.

The config.json of such a model has a `text_config`. That tower is read and trained as a
text model of `families`; all other tensors are carried through to the export. Nothing
here opens a file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from raft_jax.hf import family_row


class Wrapper(NamedTuple):
  """One `model_type` with a text tower.

  Attributes:
    models: what people call them, for the READMEs.
    architecture: the class name in config.json.
    tower: `model_type` of the text tower, if `text_config` does not give it.
    defaults: fields that `text_config` may leave out, beside those of its family.
  """

  models: str
  architecture: str
  tower: str
  defaults: Mapping[str, Any] = {}


WRAPPERS = {
  "gemma3": Wrapper(
    models="Gemma 3 from 4B on",
    architecture="Gemma3ForConditionalGeneration",
    tower="gemma3_text",
    # The published 4B leaves these out (transformers' Gemma3TextConfig has them).
    defaults={
      "vocab_size": 262208,
      "num_attention_heads": 8,
      "num_key_value_heads": 4,
    },
  ),
  "gemma4": Wrapper(
    models="Gemma 4",
    architecture="Gemma4ForConditionalGeneration",
    tower="gemma4_text",
  ),
  "gemma4_unified": Wrapper(
    models="Gemma 4",
    architecture="Gemma4UnifiedForConditionalGeneration",
    tower="gemma4_unified_text",
  ),
  "mistral3": Wrapper(
    models="Mistral Small 3.1 and later, Ministral 3 with images",
    architecture="Mistral3ForConditionalGeneration",
    tower="mistral",
  ),
  "qwen3_5": Wrapper(
    models="Qwen3.5",
    architecture="Qwen3_5ForConditionalGeneration",
    tower="qwen3_5_text",
  ),
  "qwen3_5_moe": Wrapper(
    models="Qwen3.5-MoE",
    architecture="Qwen3_5MoeForConditionalGeneration",
    tower="qwen3_5_moe_text",
  ),
}


# --- Config ---------------------------------------------------------------------------


def find(fields: family_row.Fields) -> Wrapper | None:
  """The wrapper that a config.json belongs to; None for a text model."""
  if not isinstance(fields.get("text_config"), Mapping):
    return None
  return WRAPPERS.get(str(fields.get("model_type", "")))


def text_fields(fields: family_row.Fields) -> family_row.Fields:
  """The config of the text tower; that of a text model is returned as it is.

  If the whole model's config says whether the head is the embedding, that counts, as in
  transformers 5.
  """
  wrapper = find(fields)
  if wrapper is None:
    return fields
  text = {
    "model_type": wrapper.tower,
    **wrapper.defaults,
    **fields["text_config"],
  }
  if fields.get("tie_word_embeddings") is not None:
    text["tie_word_embeddings"] = fields["tie_word_embeddings"]
  return text


def exported_fields(
  fields: family_row.Fields, family: family_row.Family, *, dtype: str, tied: bool
) -> family_row.Fields:
  """The config.json of an export, with what its `text_config` must say.

  vLLM reads the tower's type and tie there.

  Args:
    fields: of the source. A text model's are returned as they are.
    family: from `wrap`, or a text model's.
    dtype: of the exported tower.
    tied: whether its head is the embedding.
  """
  if not family.wrapped:
    return fields
  text = dict(fields["text_config"])
  text |= {name: dtype for name in ("dtype", "torch_dtype") if name in text}
  default = family.defaults["tie_word_embeddings"]
  if text.get("tie_word_embeddings", default) != tied:
    text["tie_word_embeddings"] = tied
  return {**fields, "text_config": text}


# --- Names of tensors -----------------------------------------------------------------


class Naming(NamedTuple):
  """How names of the tower's tensors begin: `body` for `model.`, `head` for `lm_head.`.

  They are what a text model of the same family has in their places.
  """

  body: str
  head: str


_TOWER = "language_model."
MODULES = Naming(f"model.{_TOWER}", "lm_head.")
"""Names of the modules in transformers 5, and in the files of newer models."""
_NAMINGS = (
  MODULES,
  # In the files of models that were published with transformers 4; transformers 5 saves
  # them so, too.
  Naming(f"{_TOWER}model.", f"{_TOWER}lm_head."),
)
_INSIDE = (MODULES.body, _TOWER, "lm_head.")


def wrap(family: family_row.Family, wrapper: Wrapper) -> family_row.Family:
  """The text tower's family, under the names of the whole model's modules."""

  def whole_model(names: Mapping[str, family_row.Name]) -> dict[str, family_row.Name]:
    return {
      path: name._replace(hf=_renamed(name.hf, _TEXT_MODEL, MODULES), gguf="")
      for path, name in names.items()
    }

  return family._replace(
    architecture=wrapper.architecture,
    names=whole_model(family.names),
    stacked=whole_model(family.stacked),
    wrapped=True,
  )


_TEXT_MODEL = Naming("model.", "lm_head.")


def _renamed(name: str, old: Naming, new: Naming) -> str:
  if name.startswith(old.head):
    return new.head + name.removeprefix(old.head)
  return new.body + name.removeprefix(old.body)


def file_names(names: Mapping[str, str], stored: Iterable[str]) -> dict[str, str]:
  """The table of a family from `wrap` with the names that a checkpoint has.

  Args:
    names: path in our tree -> name of the module's tensor.
    stored: all names in the checkpoint.
  """
  known = tuple(stored)
  naming = next(
    (n for n in _NAMINGS if any(name.startswith(n.body) for name in known)), MODULES
  )
  return {path: _renamed(name, MODULES, naming) for path, name in names.items()}


def is_inside(name: str) -> bool:
  """Whether a tensor belongs to the text tower, under any naming."""
  return name.startswith(_INSIDE)


def outside(stored: Iterable[str]) -> set[str]:
  """The names of tensors that do not belong to the text tower."""
  return {name for name in stored if not is_inside(name)}
