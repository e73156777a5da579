"""What a row of the table of families holds: names and forms of tensors, config fields.

Nothing here opens a file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

Fields = dict[str, Any]
"""Hugging Face config fields, as in config.json."""


ROPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
"""The kinds of rotary scaling that transformers' models share. `dynamic` changes
nothing within the length that a model was made for, and longer rows are refused."""


class Form(NamedTuple):
  """How files store the stack of a layer's experts, beside the order of the axes here.

  Attributes:
    transposed: kernels are [E, in, out].
    alternating: outputs of fused parameters alternate; otherwise they follow each
      other.
  """

  transposed: bool = False
  alternating: bool = False


class Name(NamedTuple):
  """Names of a parameter in files; `{}` stands for the layer's number.

  A second `{}` stands for the expert's number: each expert has a tensor of its own.

  Parameters of the same name are fused: their rows follow each other in one tensor, in
  the order of the table. An empty `gguf`: not read from GGUF files. With a `form`, one
  tensor holds a parameter of all experts of a layer.
  """

  hf: str
  gguf: str
  form: Form | None = None

  @property
  def of_experts(self) -> bool:
    """Whether each layer has one parameter of this name for each expert."""
    return self.form is not None or self.hf.count("{}") > 1


class Family(NamedTuple):
  """One `model_type`: the names and layout of its files, and its config fields.

  Attributes:
    models: what people call them, for the READMEs.
    architecture: the class name in config.json.
    names: our path in the tree -> names in files.
    defaults: config fields that a config.json may leave out, as in transformers' class.
    only: config field -> supported values; other values are refused.
    renamed: config field -> its name in this family's config.json, where that differs
      from Llama's. `defaults`, `only` and `extra` use Llama's name.
    extra: config -> fields of `DecoderConfig` in which it differs from Llama; not those
      that `decoder_config` sets for every family.
    ropes: kinds of rotary scaling that are read.
    slides: config and layer -> whether the layer has a sliding window; None: never.
    delta: config -> fields of `DeltaConfig` beside those of transformers' names, for
      families with layers of Gated DeltaNet; None: it has none.
    aliases: other names of modules in its files -> those of the table, as far as the
      same transformers' class reads both.
    grouped: paths whose rows a fused tensor holds head by head of the linear layers'
      keys, not one parameter after the other.
    rotates: config and layer -> whether the layer has rotary positions; None: always.
    constants: tensors that hold the same number in every model -> that number.
    gguf: the architecture in its GGUF files, if that is not its `model_type`.
    gguf_fields: metadata of a GGUF file (key -> value or None) and the fields that all
      families share -> further fields, or others.
    interleaved: paths whose rows a GGUF file stores in interleaved rotary order.
    ignored: tensors of GGUF files that hold no parameter.
    stacked: path -> name in those of its files that stack all experts of a layer in one
      tensor, where other files have a tensor for each expert.
    mxfp4: whether kernels of experts may be stored as MXFP4, which is read and not
      written.
    mixture: the row of those of its models that are a mixture of experts beside a
      dense feed-forward, as their config's `enable_moe_block` says; None: none is.
    wrapped: whether it is the text tower of a model with other parts, as `wrappers`
      makes it; then `architecture` and `names` are the whole model's.
  """

  models: str
  architecture: str
  names: Mapping[str, Name]
  defaults: Mapping[str, Any]
  only: Mapping[str, tuple[Any, ...]]
  renamed: Mapping[str, str] = {}
  extra: Callable[[Fields], dict[str, Any]] = lambda fields: {}
  ropes: tuple[str, ...] = ROPES
  slides: Callable[[Fields, int], bool] | None = None
  delta: Callable[[Fields], dict[str, Any]] | None = None
  aliases: Mapping[str, str] = {}
  grouped: frozenset[str] = frozenset()
  rotates: Callable[[Fields, int], bool] | None = None
  constants: Mapping[str, float] = {}
  gguf: str | None = None
  gguf_fields: Callable[[Callable[[str], Any], Fields], Fields] = lambda meta, f: {}
  interleaved: frozenset[str] = frozenset()
  ignored: re.Pattern[str] = re.compile("(?!)")  # none
  stacked: Mapping[str, Name] = {}
  mxfp4: bool = False
  mixture: Any = None
  wrapped: bool = False

  @property
  def has_experts(self) -> bool:
    """Whether its feed-forward is a mixture of experts."""
    return "layers/router" in self.names

  @property
  def has_global_attention(self) -> bool:
    """Whether layers without a window have attention of another shape."""
    return "layers/global_q" in self.names

  @property
  def has_kv_sharing(self) -> bool:
    """Whether the last layers may share the keys and values of earlier ones."""
    return "layers/kv_shared_q" in self.names

  def as_stored(self, stored: Iterable[str]) -> Family:
    """The family under the names of a checkpoint that has the tensors `stored`."""
    stacks = tuple(name.hf.rpartition("{}")[2] for name in self.stacked.values())
    if not any(name.endswith(stacks) for name in stored):
      return self
    return self._replace(names={**self.names, **self.stacked})

  @property
  def in_gguf(self) -> bool:
    """Whether its GGUF files are read."""
    return all(name.gguf for name in self.names.values())
