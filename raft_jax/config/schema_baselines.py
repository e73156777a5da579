"""Config sections of the methods that RAFT is compared with."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic

from raft_jax.config.schema_base import Positive, Probability, Section, Seed


class Anchor(Section):
  """A pull to the base model's parameters: L2-SP, and with `importance` EWC; `{}` for
  the defaults. null: none."""

  strength: Annotated[float, pydantic.Field(ge=0.0)] = 1.0
  """Strength of the pull over the whole run: a weight that nothing else moves keeps
  about exp(-strength) of its distance [O]. `coupled`: the penalty's factor in the
  loss."""
  mode: Literal["decoupled", "coupled"] = "decoupled"
  """`decoupled`: beside Adam; `coupled`: in the gradient, where Adam rescales it."""
  importance: Literal["none", "sampled", "empirical"] = "none"
  """Weights of the parameters. `none`: equal; otherwise their Fisher information,
  scaled to mean 1, from answers that the model samples or from those given
  (`empirical`)."""
  questions: str | None = None
  """General questions for `importance`, in the form of `data.questions`."""
  limit: Positive = 256
  """Use only the first N of these questions."""
  batch_size: Positive = 8
  """`sampled`: questions at a time."""
  max_new_tokens: Positive = 64
  """`sampled`: longest answer."""


class Recadam(Section):
  """RecAdam instead of AdamW: anneals from staying at the base model to the task; `{}`
  for the defaults. null: AdamW."""

  gamma: Annotated[float, pydantic.Field(ge=0.0)] = 5000.0
  """Initial strength of the pull."""
  steepness: Annotated[float, pydantic.Field(gt=0.0)] = 0.1
  """Steepness of the annealing sigmoid, per step [O]."""
  midpoint: Probability = 0.25
  """Share of the steps after which task and pull have equal weight [O]."""


class Freeze(Section):
  """Parameters that are not trained; `{}` for the defaults. null: none."""

  mode: Literal["half", "bottom", "names"] = "half"
  """`half`: about half of each layer, drawn once; `bottom`: the embedding and the lower
  layers; `names`: those that match `freeze.names`."""
  layers: Annotated[int, pydantic.Field(ge=0)] | None = None
  """`bottom`: number of layers; null: half of them."""
  names: tuple[str, ...] = ()
  """`names`: shell patterns, such as `embed` or `layers.[0-9].q`."""


class SoftMask(Section):
  """Smaller updates for important attention heads and feed-forward units (DAS); `{}`
  for the defaults. null: none."""

  limit: Positive = 256
  """Use only the first N questions to estimate importance [O]."""
  batch_size: Positive = 1
  """Questions at a time. Their gradients are averaged before the absolute value."""
  drop: Annotated[float, pydantic.Field(gt=0.0, lt=1.0)] = 0.1
  """Share of the units dropped in each of the two passes that are compared."""


class TokenWeights(Section):
  """Weights of the answers' tokens in the cross-entropy; `{}` for the defaults. null:
  every token counts alike."""

  rule: Literal["eaft", "dft", "talr", "stm", "flow"] = "eaft"
  """What a token's weight follows. `eaft`: the model's uncertainty before the token;
  `dft`: the token's probability; `talr`: that probability, tempered; `stm`: 0 for
  tokens that the base model finds improbable, else 1; `flow`: one weight for the whole
  answer, by its loss under the base model."""
  exponent: Annotated[float, pydantic.Field(ge=0.0)] = 1.0
  """`eaft`, `dft`: exponent of the weight; 0: all weights are 1."""
  top_k: Positive = 20
  """`eaft`: number of the model's most probable tokens whose entropy is taken."""
  max_entropy: Annotated[float, pydantic.Field(gt=0.0)] = 3.0
  """`eaft`: entropy in nats that gives the weight 1."""
  floor: Probability = 0.01
  """`talr`: smallest weight; 1: all weights are 1."""
  max_perplexity: Annotated[float, pydantic.Field(gt=0.0)] = 2.5
  """`stm`: largest inverse probability under the base model of a token to learn."""
  temperature: Annotated[float, pydantic.Field(gt=0.0)] | None = None
  """`talr`, `flow`: loss in nats at which the weight is 1/e. null: the median over
  answers of their mean losses; `talr`: of the batch, anew at each step; `flow`: of all
  questions under the base model."""


class Adaptive(Section):
  """Replay what is forgotten, at growing intervals; between these events all rows of a
  batch are the domain's. OUR RECONSTRUCTION of MSSR (arXiv 2603.09892), whose equations
  were not available to us; `{}` for the defaults. null: the same share of every
  batch."""

  strength: Annotated[float, pydantic.Field(gt=0.0)] = 20.0
  """Initial strength of a memory in steps: after this many, 1/e of it is left [O]."""
  growth: Annotated[float, pydantic.Field(ge=0.0)] = 1.0
  """Relative gain in strength by a replay, if the loss has not risen [O]."""
  age_exponent: Annotated[float, pydantic.Field(ge=0.0)] = 1.0
  """Exponent of the faded share of a memory in the probability to be drawn; 0: it is
  ignored [O]."""
  loss_exponent: Annotated[float, pydantic.Field(ge=0.0)] = 1.0
  """Exponent of `floor` plus the loss's rise over the base model's, in the same
  probability; 0: it is ignored [O]."""
  floor: Annotated[float, pydantic.Field(gt=0.0)] = 0.1
  """Added to the loss's rise, so that questions whose loss has not risen can be drawn
  [O]."""
  decay: Annotated[float, pydantic.Field(ge=0.0, lt=1.0)] = 0.5
  """Decay of the moving average of each question's loss, per replay [O]."""
  interval: Annotated[int, pydantic.Field(ge=2)] = 4
  """Steps before the first event, and the smallest number between two events [O]."""
  factor: Annotated[float, pydantic.Field(ge=1.0)] = 1.3
  """Factor by which the interval grows or shrinks after each event [O]."""
  longest: Annotated[int, pydantic.Field(ge=2)] = 32
  """Largest number of steps between two events [O]."""
  tolerance: Annotated[float, pydantic.Field(ge=0.0)] = 0.1
  """Mean rise of an event's losses above which the interval shrinks [O]."""


class Replay(Section):
  """General questions beside those of the domain in every batch. null: none."""

  questions: str | None = None
  """General questions in the form of `data.questions`, with the answers to learn. null:
  those that `synthesise` wrote into `output`."""
  share: Annotated[float, pydantic.Field(ge=0.0, lt=1.0)] = 0.2
  """Share of general questions in each batch. `train.batch_size` counts only the
  domain's rows, so the batch grows [O]. With `adaptive`: their share in the batch of an
  event, which does not grow."""
  adaptive: Adaptive | None = None


class Sentences(Section):
  """Learn from the documents of `extract`, without questions and answers (DiSC): the
  student predicts a sentence alone as the base model does after the document up to
  there; `{}` for the defaults. null: learn from `data.questions`."""

  splits: Positive = 5
  """Sentences to learn from each chunk of a document: its last one, and others drawn
  once."""
  seed: Seed = 0
  """Seed of the draw."""


class Prune(Section):
  """After training, keep only a part of each tensor's change (FAPM); `{}` for the
  defaults. null: keep all. Read by `evaluate` and `export`."""

  keep: Probability = 0.1
  """Share of the entries that keep their change."""


class HardThreshold(Section):
  """After training (and `prune`), keep of each matrix's change only the singular
  directions that stand out from noise (DG-Hard); `{}` for the defaults. null: keep all.
  Read by `evaluate` and `export`."""

  scale: Annotated[float, pydantic.Field(ge=0.0)] = 1.0
  """Factor of the threshold of singular values, which follows their median; 0: keep
  all."""
  keep_vectors: bool = True
  """Whether norms, biases and other tensors that are no matrices keep their change
  [O]."""


class Interpolate(Section):
  """After training (and the edits above), interpolate every weight between the base
  model's and the trained one (WiSE-FT); `{}` for the defaults. null: no interpolation.
  Read by `evaluate` and `export`."""

  weight: Probability = 0.5
  """Weight of the trained model: 1 is the trained model, 0 the base model."""
