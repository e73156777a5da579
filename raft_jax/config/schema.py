"""The keys of a run's YAML file: their types, defaults, bounds and meanings.

The sections of one subject are defined in a `schema_*` module; other modules name them
from here, as `schema.Train`. Every key has a default except `model.source`,
`data.questions` and `output`. Values marked [P] are printed in the RAFT paper (arXiv
2606.00147), [R] come from a published summary of it on a co-author's account, [O] are
ours.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic

from raft_jax.config.schema_base import Positive, Probability, Section
from raft_jax.config.schema_baselines import (
  Adaptive,
  Anchor,
  Freeze,
  HardThreshold,
  Interpolate,
  Prune,
  Recadam,
  Replay,
  Sentences,
  SoftMask,
  TokenWeights,
)
from raft_jax.config.schema_curation import (
  Extract,
  Fusion,
  QuestionWriter,
  Refine,
  Shares,
  Synthesise,
  Writer,
)
from raft_jax.config.schema_endpoints import (
  ENGINE_KEYS,
  PLACEMENT,
  Engine,
  Judge,
  ModelEndpoint,
  VerdictJudge,
)
from raft_jax.config.schema_evaluation import (
  Chat,
  Choice,
  Drift,
  Evaluate,
  Ifeval,
  Mmlu,
  OpenEnded,
  Server,
  Servers,
  Tasks,
  Validation,
  ValidationDrift,
  ValidationIfeval,
)
from raft_jax.config.schema_training import Balance, Distill, Lora, Rollout, Train

__all__ = [
  "ENGINE_KEYS",
  "PLACEMENT",
  "Adaptive",
  "Anchor",
  "Balance",
  "Chat",
  "Choice",
  "Cluster",
  "Config",
  "Data",
  "Distill",
  "Drift",
  "Engine",
  "Evaluate",
  "Export",
  "Extract",
  "Freeze",
  "Fusion",
  "HardThreshold",
  "Ifeval",
  "Interpolate",
  "Judge",
  "Lora",
  "Mesh",
  "Mmlu",
  "Model",
  "ModelEndpoint",
  "OpenEnded",
  "Prune",
  "QuestionWriter",
  "Recadam",
  "Refine",
  "Replay",
  "Rollout",
  "Section",
  "Sentences",
  "Server",
  "Servers",
  "Shares",
  "SoftMask",
  "Sweep",
  "SweepRun",
  "Synthesise",
  "Tasks",
  "TokenWeights",
  "Train",
  "Validation",
  "ValidationDrift",
  "ValidationIfeval",
  "VerdictJudge",
  "Writer",
]


class Model(Section):
  """The model to fine-tune; also the frozen teacher."""

  source: str
  """A hub name, a folder, or `pkg://PACKAGE/FILE` (a file of an installed package)."""
  chat_template: str | None = None
  """Name of one of the source's chat templates, or the path of a .jinja file. null uses
  the only template, or the one named `default`. `export` writes it beside the model."""
  dtype: Literal["float32", "bfloat16"] = "float32"
  """Type of activations. Parameters and optimizer state are float32 [P: bf16]."""
  remat: bool = False
  """Recompute each layer in the backward pass instead of keeping its products with
  parameters. Mixtures of experts and Gated DeltaNet keep all activations without it."""
  unroll: Annotated[int, pydantic.Field(ge=0)] = 1
  """Layers per iteration of the scan over layers; 0 means all of them."""
  attention: Literal["xla", "cudnn"] = "xla"
  """Attention kernel of the teacher and update passes. `cudnn`: flash attention on
  NVIDIA GPUs, without arrays of [heads, tokens, tokens]; needs
  `model.dtype=bfloat16`."""


class Data(Section):
  """The questions, and their length limits."""

  questions: str
  """Training questions: a file, a folder, a glob, or `hub://ORG/NAME[:CONFIG][/SPLIT]
  [@REVISION]`. [Formats](../raft_jax/storage/README.md#formats) are found by the fields
  of the rows."""
  test: str | None = None
  """Held-out questions for `evaluate`, in the same form."""
  validation: str | None = None
  """Questions for choosing settings by their loss; `evaluate` also scores them."""
  format: (
    Literal["question", "messages", "prompt_completion", "alpaca", "sharegpt"] | None
  ) = None
  """Format of the rows of `questions`, `test` and `validation`; null: found by their
  fields, file by file."""
  columns: dict[str, str] | None = None
  """Names of the columns of these files, by field, where they have other names:
  `{question: q, answer: a}`."""
  turns: Literal["last", "each"] = "last"
  """The answers of a conversation that are examples. `last`: its last; `each`: every
  turn of the assistant, each with all that comes before it; the id of the second is
  `ID#2`."""
  limit: Positive | None = None
  """Use only the first N questions."""
  max_prompt_tokens: Positive = 256
  """Token limit of a question in its chat template."""
  max_answer_tokens: Positive = 256
  """Token limit of an answer with its end-of-turn token."""
  max_teacher_tokens: Positive = 768
  """Token limit of the teacher's context (answer and question), without the rollout."""
  too_long: Literal["error", "skip"] = "error"
  """What to do with a row over a limit. Rows are never truncated."""
  unusable: Literal["error", "skip"] = "error"
  """What to do with a row that cannot be used: its turns are refused by the chat
  template, its id is taken, or it is one unreadable row too many. `skip` sets it aside;
  `rejects.jsonl` then lists its line, id and reason."""
  answers: Literal["original", "rewritten", "filtered", "refined"] = "refined"
  """The answers to learn. `original`: those of `questions`. The others are written by
  `refine`. `rewritten`: the model's rewrite where it is usable; `filtered`: where it
  also passes the similarity filter; `refined`: the chosen answer."""
  buckets: Positive = 2
  """Largest number of padded widths that a run compiles for."""
  thinking: Literal["drop", "keep"] = "drop"
  """What to do with the thinking of an answer (`reasoning_content`, or a leading
  `<think>...</think>`). `drop` leaves it out, and prompts switch thinking off. `keep`
  learns it, and thinking is on in prompts, rollouts and `evaluate`. Thinking of earlier
  turns is always the chat template's matter."""
  reject_threshold: Probability = 0.01
  """A larger share of unreadable rows stops the run, unless `data.unusable` is
  `skip`."""


class Mesh(Section):
  """Devices per axis of the mesh; one axis may be -1, meaning all remaining devices."""

  data: int = 1
  """Number of copies of the model, each with a part of the batch."""
  fsdp: int = -1
  """Number of shards of parameters and batch."""
  tensor: int = 1
  """Number of shards of every matrix product."""


class Cluster(Section):
  """Several processes that train together; `launch/` has examples."""

  join: bool | None = None
  """Whether to join other processes. null: if Slurm, Open MPI, GKE or a coordinator's
  address announces some; true: as JAX detects them (Cloud TPU VMs need this); false:
  never."""
  coordinator: str | None = None
  """host:port of process 0; null: JAX_COORDINATOR_ADDRESS, or as JAX detects it."""
  processes: Positive | None = None
  """Number of processes; null: JAX_NUM_PROCESSES, or as JAX detects it."""
  index: Annotated[int, pydantic.Field(ge=0)] | None = None
  """Index of this process, from 0; null: JAX_PROCESS_ID, or as JAX detects it."""
  heartbeat_s: Positive = 100
  """Seconds without a heartbeat after which a process counts as lost, which ends the
  others."""


class SweepRun(Section):
  """A run of a sweep, or several."""

  name: Annotated[str, pydantic.Field(pattern=r"^[A-Za-z0-9][\w.+-]*$")]
  """Name of the run's folder and of its row in the tables."""
  set: dict[str, Any] = pydantic.Field({})
  """Dotted keys of this file and their values in this run."""
  over: dict[str, Annotated[list[Any], pydantic.Field(min_length=1)]] = pydantic.Field(
    {}
  )
  """Dotted keys and lists of values; one run for each combination."""


class Sweep(Section):
  """Many runs of this config (`raft_jax.sweep`), each in a folder under `output`."""

  stages: tuple[Literal["refine", "train", "evaluate", "export", "report"], ...] = (
    "refine",
    "train",
    "evaluate",
  )
  """The stages of each run, in this order."""
  only: Positive | None = None
  """Run only the Nth run (from 1), as one task of an array job."""
  runs: tuple[SweepRun, ...] = ()
  """Each is a run of this config with some keys set, or several."""


class Export(Section):
  """What `export` writes."""

  adapter: bool = False
  """With `lora`: a PEFT adapter for the base model, in `output/adapter`, instead of the
  whole model in `output/export`."""
  gguf: Literal["f16", "q8_0", "bf16", "f32"] | None = None
  """Also write the model as a GGUF file of this type, with a Modelfile for Ollama, into
  `output/gguf`. null: no GGUF file."""
  push: str | None = None
  """Also upload the exported folder to this repository of the Hugging Face hub,
  `ORGANISATION/NAME`, with the token of `hf auth login` or of HF_TOKEN. null: no
  upload."""
  public: bool = False
  """Whether the repository that `push` creates is public. A public repository that is
  there is written to only with true."""


class Report(Section):
  """What `report` compares a run with."""

  sft: str | None = None
  """The evaluated `output` of a run of `method: sft` on the same test questions. The
  report then says what plain SFT forgets when it fits the domain as well. null: no
  comparison."""


class Config(Section):
  """The whole file."""

  model: Model
  data: Data
  extract: Extract | None = None
  refine: Refine = Refine()
  synthesise: Synthesise | None = None
  method: str = "raft"
  """RAFT, or a method it is compared with: a word for values of the other keys."""
  train: Train = Train()
  lora: Lora | None = None
  rollout: Rollout = Rollout()
  distill: Distill = Distill()
  balance: Balance = Balance()
  anchor: Anchor | None = None
  recadam: Recadam | None = None
  freeze: Freeze | None = None
  soft_mask: SoftMask | None = None
  token_weights: TokenWeights | None = None
  replay: Replay | None = None
  sentences: Sentences | None = None
  prune: Prune | None = None
  hard_threshold: HardThreshold | None = None
  interpolate: Interpolate | None = None
  validation: Validation | None = None
  mesh: Mesh = Mesh()
  cluster: Cluster = Cluster()
  evaluate: Evaluate = Evaluate()
  sweep: Sweep = Sweep()
  export: Export = Export()
  report: Report = Report()
  chat: Chat = Chat()
  output: str
  """Folder for everything a run writes; each run needs its own."""
  mirror: str | None = None
  """Object store that keeps a copy of `output` while a stage runs: `s3://BUCKET/PATH`,
  `gs://`, `az://` or `file:///FOLDER`. Where `output` is empty, the stage continues
  from the copy. Needs the extra `store`. null: no copy."""
