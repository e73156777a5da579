"""Config sections of RAFT training: optimizer, LoRA, rollouts and losses."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic

from raft_jax.config.schema_base import Positive, Probability, Section, Seed


class Train(Section):
  """Stage 2: cross-entropy and on-policy distillation."""

  epochs: Positive = 3
  """Passes over the questions [P]."""
  max_steps: Positive | None = None
  """Stop after this many steps even if epochs are left."""
  batch_size: Positive = 16
  """Questions per step, over all devices [P]."""
  micro_batches: Positive = 1
  """Split the batch; the result equals the unsplit step."""
  packing: bool = False
  """Compute several rows of a batch in one sequence, so that less padding is computed;
  the result equals the unpacked step."""
  learning_rate: Annotated[float, pydantic.Field(ge=0.0)] = 5e-6
  """Peak learning rate, between the linear warm-up and the cosine decay to 0 [R]."""
  weight_decay: Annotated[float, pydantic.Field(ge=0.0)] = 0.01
  """Weight decay of AdamW [P]."""
  warmup_ratio: Probability = 0.03
  """Share of the steps in which the learning rate rises linearly [O]."""
  clip: Annotated[float, pydantic.Field(gt=0.0)] | None = 1.0
  """Clip the gradient to this global norm; null: no clipping [O]."""
  cross_entropy: bool = True
  """Add the cross-entropy on the answers; false: the distillation loss trains alone."""
  loss_mean: Literal["sequence", "token"] = "sequence"
  """`sequence`: the mean over sequences of each one's mean over tokens; `token`: the
  mean over all tokens."""
  router_loss: Annotated[float, pydantic.Field(ge=0.0)] = 0.0
  """Mixture of experts: weight of the loss that spreads tokens evenly over the experts
  (arXiv 2101.03961), in the gradient only. 0: none, as fine-tuning rarely needs it."""
  seed: Seed = 0
  """Seed of the order of the questions and of the rollouts."""
  checkpoint_every: Positive = 100
  """Steps between checkpoints."""
  keep_checkpoints: Positive = 2
  """Number of newest checkpoints to keep."""
  gradient_stats_every: Annotated[int, pydantic.Field(ge=0)] = 20
  """Every N steps, measure each loss's gradient norm, their cosine, and the time of
  each phase. Costs one more backward pass. 0: never."""
  trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ()
  """Libraries that get the metrics of metrics.jsonl, the scores of `evaluate` and the
  figures of `report` as well; each is an extra of its own name."""
  tracker_project: str | None = None
  """Project (MLflow: experiment) of the trackers. null: from the library's environment
  variable, else `raft_jax`."""
  tracker_group: str | None = None
  """Runs with the same group belong together. null: in a sweep, the name of its
  folder."""
  tracker_offline: bool = False
  """Trackers use no server: they write to local files only."""


class Lora(Section):
  """LoRA: train low-rank updates of a frozen model (arXiv 2106.09685); `{}` for the
  defaults. null: full fine-tuning. Needs a learning rate about 40 times as high."""

  rank: Positive = 16
  """Rank of each update [O]."""
  alpha: Annotated[float, pydantic.Field(gt=0.0)] = 32.0
  """Each update is multiplied by alpha / rank [O]."""
  targets: Annotated[tuple[str, ...], pydantic.Field(min_length=1)] = (
    *("q_proj", "k_proj", "v_proj", "o_proj"),
    *("gate_proj", "up_proj", "down_proj"),
  )
  """The projections that get an update, by their Hugging Face names."""
  base: Literal["int8", "nf4"] | None = None
  """Keep the projections of the frozen model, which is also the teacher, in 8 bits
  (`int8`) or 4 (`nf4`, arXiv 2305.14314); null: in `model.dtype`. `evaluate`, `chat`
  and `export` add the updates to the source's own weights. Not for mixtures of
  experts."""


class Rollout(Section):
  """Answers that the student samples, on which it is distilled."""

  group: Positive = 1
  """Number of rollouts of each question; a batch has so many times more rows."""
  max_new_tokens: Positive = 256
  """Longest rollout [O]."""
  temperature: Annotated[float, pydantic.Field(ge=0.0)] = 1.0
  """Sampling temperature; 0 takes the most probable token."""
  top_p: Annotated[float, pydantic.Field(gt=0.0, le=1.0)] = 1.0
  """Sample from the most probable tokens whose probabilities sum to this."""
  unroll: Annotated[int, pydantic.Field(ge=0)] | None = None
  """Layers per iteration of the scan over layers; 0 means no scan, with each layer's
  weights in arrays of their own. null: 0 on GPUs, where a scan copies the weights for
  every token, and `model.unroll` elsewhere."""
  tensor: Positive | None = None
  """Number of neighbouring devices that share the weights while the student samples, in
  place of `mesh.tensor`; null: `mesh.tensor`. Weights that are sharded over `mesh.fsdp`
  are then not gathered on every device."""


class Distill(Section):
  """The distillation loss."""

  top_k: Positive = 512
  """Number of tokens compared at each position: the most probable of `support` [P]."""
  support: Literal["teacher", "student"] = "teacher"
  """Whose most probable tokens are compared [P]. `student`: those of the student that
  sampled the rollout."""
  temperature: Annotated[float, pydantic.Field(gt=0.0)] = 1.5
  """Divides both models' logits in the loss; not the sampling temperature [R]."""
  direction: Literal["forward", "reverse", "jsd"] = "forward"
  """`forward`: KL(teacher ‖ student) [R]; `reverse`: KL(student ‖ teacher); `jsd`: the
  generalised Jensen-Shannon divergence."""
  beta: Annotated[float, pydantic.Field(gt=0.0, lt=1.0)] = 0.5
  """Mixture weight of `jsd`."""
  tail: Literal["renormalize", "bucket"] = "renormalize"
  """Tokens outside the top K. `renormalize`: left out; `bucket`: one more class [P]."""
  scale_by_t2: bool = True
  """Multiply the loss by the squared temperature [P]."""
  teacher: Literal["none", "base", "average", "live"] = "base"
  """`none`: no distillation; `base`: the model before training [P]; `average`: the
  student's moving average; `live`: the student itself."""
  source: str | None = None
  """`base`: source of another teacher with the same tokenizer; null: `model.source`."""
  average_rate: Probability = 0.01
  """`average`: weight of the student in each step's average."""
  teacher_context: Literal["chat", "paper", "example", "sibling", "none"] = "chat"
  """How the teacher sees the answer. `chat`: in a chat turn; `paper`: as raw text [P];
  `example`: as an example of an answer; `none`: not at all. `sibling`: it sees another
  rollout of the same question that succeeded; the loss leaves out rollouts without
  one."""
  success: Probability = 0.5
  """`sibling`: a rollout succeeds if its ROUGE-L F1 with the answer reaches this
  [O]."""
  trajectory: Literal["rollout", "answer", "mixed"] = "rollout"
  """Text on which teacher and student are compared: the student's rollout, the answer,
  or one of the two, drawn for each step."""
  on_policy: Probability = 0.5
  """`mixed`: share of the steps that use rollouts."""
  skip_first: Annotated[int, pydantic.Field(ge=0)] = 0
  """Number of tokens at the start of a rollout that the distillation loss leaves
  out."""
  max_importance: Annotated[float, pydantic.Field(gt=0.0)] | None = None
  """Cap on the importance weight p_now / p_sampled of each rollout token; null: no
  importance weights."""
  mask_eos: bool = False
  """Leave the rollout's end-of-turn token out of the distillation loss."""


class Balance(Section):
  """λ, the weight of the distillation loss beside the cross-entropy."""

  mode: Literal["ema", "fixed", "schedule", "gradient_norm"] = "ema"
  """`ema`: the ratio of both losses' moving averages [P]. For the others see
  `weight`."""
  decay: Annotated[float, pydantic.Field(ge=0.0, lt=1.0)] = 0.9
  """`ema`: decay of the moving averages [P]."""
  eps: Annotated[float, pydantic.Field(gt=0.0)] = 1e-8
  """`ema`, `gradient_norm`: added to the divisor [O]."""
  max_weight: Annotated[float, pydantic.Field(gt=0.0)] | None = 100.0
  """`ema`, `gradient_norm`: upper bound of the weight; null: none [O]."""
  weight: Annotated[float, pydantic.Field(ge=0.0)] = 1.0
  """`fixed`: the weight; `schedule`: its value at the end; `gradient_norm`: the target
  ratio of the two gradients' norms."""
  start: Annotated[float, pydantic.Field(ge=0.0)] = 0.0
  """`schedule`: the weight at step 0; it changes linearly from here."""
