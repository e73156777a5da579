"""The user's one YAML file, checked whole before anything heavy is imported.

Sections mirror the rooms of the package; every key has a default but `model`, `data`
and `output`. Values marked [P] are printed in the RAFT paper (arXiv 2606.00147), [R]
come from a published summary of it on a co-author's account, [O] are ours.
"""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic

Positive = Annotated[int, pydantic.Field(gt=0)]
Probability = Annotated[float, pydantic.Field(ge=0.0, le=1.0)]


class Section(pydantic.BaseModel):
  """Immutable, and a misspelt key is an error."""

  model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class Model(Section):
  """The model to fine-tune; also the frozen teacher."""

  source: str
  """A hub name, a folder, or `pkg://PACKAGE/FILE` for a file in an installed package."""
  dtype: Literal["float32", "bfloat16"] = "float32"
  """Of the activations. Parameters and optimizer state are always float32 [P: bf16]."""
  remat: bool = False
  """Recompute each layer in the backward pass instead of keeping its activations."""
  unroll: Annotated[int, pydantic.Field(ge=0)] = 1
  """Layers per iteration of the scan over layers; 0 means all of them."""


class Data(Section):
  questions: str
  """Training questions: JSONL or Parquet with {id?, domain?, question|messages, answer}."""
  validation: str | None = None
  test: str | None = None
  limit: Positive | None = None
  """Use only the first N questions."""
  max_prompt_tokens: Positive = 256
  max_answer_tokens: Positive = 256
  max_teacher_tokens: Positive = 768
  """Budget of the teacher's context (answer and question), without the rollout."""
  too_long: Literal["error", "skip"] = "error"
  """What to do with a row over a budget; rows are never truncated."""
  buckets: Positive = 2
  """Number of padded widths a run may compile for."""
  reject_threshold: Probability = 0.01
  """A larger share of unreadable rows stops the run."""


class Engine(Section):
  """Who generates text. `model: null` means the model to be trained."""

  engine: Literal["jax", "vllm", "openai"] = "jax"
  model: str | None = None
  max_new_tokens: Positive = 256
  temperature: Annotated[float, pydantic.Field(ge=0.0)] = 1.0
  top_p: Annotated[float, pydantic.Field(gt=0.0, le=1.0)] = 1.0
  batch_size: Positive = 16


class Fusion(Engine):
  rounds: Positive = 3  # [O]
  accept_at: Probability = 0.8  # [R]
  """Stop at the first round whose mean judge score reaches this."""


class Judge(Section):
  """A language model, or `encoder`: the sentence encoder's cosine mapped to 0..1."""

  engine: Literal["jax", "vllm", "openai", "encoder"] = "encoder"
  model: str | None = None
  max_new_tokens: Positive = 64
  batch_size: Positive = 16


class Refine(Section):
  rewriter: Engine = Engine()
  encoder: str = "sentence-transformers/all-MiniLM-L6-v2"
  similarity_threshold: Annotated[float, pydantic.Field(ge=-1.0, le=1.0)] = 0.8  # [R]
  fusion: Fusion = Fusion()
  judges: Annotated[tuple[Judge, ...], pydantic.Field(min_length=1)] = (Judge(),)
  seed: int = 0
  records_per_shard: Positive = 1024


class Train(Section):
  epochs: Positive = 3  # [P]
  max_steps: Positive | None = None
  batch_size: Positive = 16  # [P]
  micro_batches: Positive = 1
  """Split the batch; the result equals the unsplit step."""
  learning_rate: Annotated[float, pydantic.Field(ge=0.0)] = 5e-6  # [R]
  weight_decay: Annotated[float, pydantic.Field(ge=0.0)] = 0.01  # [P]
  warmup_ratio: Probability = 0.03  # [O]
  clip: Annotated[float, pydantic.Field(gt=0.0)] | None = 1.0  # [O]
  loss_mean: Literal["sequence", "token"] = "sequence"
  """Mean over sequences of the mean over tokens, or over all tokens alike."""
  seed: int = 0
  checkpoint_every: Positive = 100
  keep_checkpoints: Positive = 2
  measure_every: Annotated[int, pydantic.Field(ge=0)] = 20
  """Every N steps: each loss's gradient norm, their cosine, and the time of each phase;
  costs one more backward pass. 0 turns it off."""
  tensorboard: bool = False


class Rollout(Section):
  max_new_tokens: Positive = 256  # [O]
  temperature: Annotated[float, pydantic.Field(ge=0.0)] = 1.0
  top_p: Annotated[float, pydantic.Field(gt=0.0, le=1.0)] = 1.0


class Distill(Section):
  top_k: Positive = 512  # [P]
  temperature: Annotated[float, pydantic.Field(gt=0.0)] = 1.5  # [R]
  direction: Literal["forward", "reverse", "jsd"] = "forward"  # [R]
  beta: Annotated[float, pydantic.Field(gt=0.0, lt=1.0)] = 0.5
  """Mixture weight of `jsd`."""
  tail: Literal["renormalize", "bucket"] = "renormalize"  # [P]
  scale_by_t2: bool = True  # [P]
  teacher_context: Literal["chat", "paper", "none"] = "chat"
  trajectory: Literal["rollout", "answer"] = "rollout"
  """Where teacher and student are compared: the student's rollout, or the answer."""
  skip_first: Annotated[int, pydantic.Field(ge=0)] = 0
  """Rollout tokens at the start that the distillation loss leaves out."""
  mask_eos: bool = False


class Balance(Section):
  mode: Literal["ema", "fixed", "schedule", "gradient_norm"] = "ema"  # [P]
  decay: Annotated[float, pydantic.Field(ge=0.0, lt=1.0)] = 0.9  # [P]
  eps: Annotated[float, pydantic.Field(gt=0.0)] = 1e-8  # [O]
  max_weight: Annotated[float, pydantic.Field(gt=0.0)] | None = 100.0  # [O]
  weight: Annotated[float, pydantic.Field(ge=0.0)] = 1.0
  """`fixed`: the weight; `schedule`: its value at the end; `gradient_norm`: the target
  ratio of the two gradients' norms."""
  start: Annotated[float, pydantic.Field(ge=0.0)] = 0.0
  """`schedule`: the weight at step 0, from which it moves linearly."""


class Mesh(Section):
  """Devices per axis; one axis may be -1, meaning all that are left."""

  data: int = 1
  fsdp: int = -1
  tensor: int = 1


class Evaluate(Section):
  limit: Positive | None = None
  max_new_tokens: Positive = 64
  batch_size: Positive = 16
  samples: Annotated[int, pydantic.Field(ge=0)] = 8
  """Answers shown in the report."""


class Config(Section):
  model: Model
  data: Data
  refine: Refine = Refine()
  method: str = "raft"
  train: Train = Train()
  rollout: Rollout = Rollout()
  distill: Distill = Distill()
  balance: Balance = Balance()
  mesh: Mesh = Mesh()
  evaluate: Evaluate = Evaluate()
  output: str
