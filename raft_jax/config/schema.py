"""The keys of a run's YAML file: their types, defaults, bounds and meanings.

Sections mirror the rooms of the package; every key has a default but `model`, `data`
and `output`. Values marked [P] are printed in the RAFT paper (arXiv 2606.00147), [R]
come from a published summary of it on a co-author's account, [O] are ours.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic

Positive = Annotated[int, pydantic.Field(gt=0)]
Seed = Annotated[int, pydantic.Field(ge=0, lt=2**31)]  # a 32-bit key for jax and grain
Probability = Annotated[float, pydantic.Field(ge=0.0, le=1.0)]


class Section(pydantic.BaseModel):
  """Immutable, and a misspelt key is an error."""

  model_config = pydantic.ConfigDict(
    extra="forbid", frozen=True, use_attribute_docstrings=True
  )


class Model(Section):
  """The model to fine-tune; also the frozen teacher."""

  source: str
  """A hub name, a folder, or `pkg://PACKAGE/FILE` (a file of an installed package)."""
  dtype: Literal["float32", "bfloat16"] = "float32"
  """Of the activations. Parameters and optimizer state are always float32 [P: bf16]."""
  remat: bool = False
  """Recompute each layer in the backward pass instead of keeping its activations."""
  unroll: Annotated[int, pydantic.Field(ge=0)] = 1
  """Layers per iteration of the scan over layers; 0 means all of them."""
  attention: Literal["xla", "cudnn"] = "xla"
  """Of teacher and update. `cudnn`: flash attention on NVIDIA GPUs, without arrays of
  [heads, tokens, tokens]; wants `model.dtype=bfloat16`."""


class Data(Section):
  """Where the questions are and how long they may be."""

  questions: str
  """For training: JSONL or Parquet {id?, domain?, question or messages, answer}."""
  test: str | None = None
  """Held-out questions for `evaluate`, in the same form."""
  validation: str | None = None
  """Others, by whose loss settings are chosen; `evaluate` scores them as well."""
  limit: Positive | None = None
  """Use only the first N questions."""
  max_prompt_tokens: Positive = 256
  """Budget of a question in its chat template."""
  max_answer_tokens: Positive = 256
  """Budget of an answer with its end-of-turn token."""
  max_teacher_tokens: Positive = 768
  """Budget of the teacher's context (answer and question), without the rollout."""
  too_long: Literal["error", "skip"] = "error"
  """What to do with a row over a budget; rows are never truncated."""
  answers: Literal["original", "rewritten", "filtered", "refined"] = "refined"
  """Learn the answers of `questions`, or those that `refine` wrote: the model's rewrite
  where that is usable, the rewrite where it is also near enough, or the refined one."""
  buckets: Positive = 2
  """Number of padded widths a run may compile for."""
  reject_threshold: Probability = 0.01
  """A larger share of unreadable rows stops the run."""


class Asked(Section):
  """A language model that is asked, wherever it runs."""

  engine: Literal["encoder", "jax", "vllm", "openai"]
  model: str | None = None
  """A source like `model.source`; null means the model to be trained. `jax` and `vllm`
  hold it in `model.dtype`. For `openai`, the model's name at the server."""
  max_new_tokens: Positive = 256
  """Longest reply, thinking included; a reply cut off there is not used."""
  batch_size: Positive = 16
  """Requests at a time; finished calls are kept after each batch. Hundreds for vLLM."""
  tensor_parallel: Positive = 1
  """`vllm`: devices that share each layer."""
  pipeline_parallel: Positive = 1
  """`vllm`: groups of devices that share the layers out."""
  context_tokens: Positive | None = None
  """`vllm`: longest prompt and reply together; null for all the model was made for."""
  memory_share: Annotated[float, pydantic.Field(gt=0.0, le=1.0)] = 0.9
  """`vllm`: of each device's memory (or the machine's), for weights and cache."""
  base_url: str | None = None
  """`openai`: the server's address, ending in /v1."""
  api_key_env: Annotated[str, pydantic.Field(pattern=r"^[A-Za-z_]\w*$")] | None = None
  """`openai`: name of the environment variable that holds the key; never the key."""
  timeout_s: Annotated[float, pydantic.Field(gt=0.0)] = 600.0
  """`openai`: longest wait for one reply in seconds; then it is asked for again."""


class Engine(Asked):
  """Who generates text. `model: null` means the model to be trained."""

  engine: Literal["jax", "vllm", "openai"] = "jax"
  """`jax`: built in; `vllm`: in this process; `openai`: a server of that protocol."""
  temperature: Annotated[float, pydantic.Field(ge=0.0)] = 1.0
  """Of sampling; 0 takes the most probable token."""
  top_p: Annotated[float, pydantic.Field(gt=0.0, le=1.0)] = 1.0
  """Sample from the most probable tokens that hold this mass."""


class Fusion(Engine):
  """Who writes one answer from the original and the rewrite."""

  rounds: Annotated[int, pydantic.Field(ge=0)] = 3
  """Most answers written for one question [O]; with 0 the rewrite is final."""
  accept_at: Probability = 0.8
  """Stop at the first round whose mean judge score reaches this [R]."""


class Judge(Asked):
  """A language model, or `encoder`: the sentence encoder's cosine mapped to 0..1."""

  engine: Literal["encoder", "jax", "vllm", "openai"] = "encoder"
  """`encoder`: the cosine of `refine.encoder` mapped to 0..1; others ask a model."""
  max_new_tokens: Positive = 64
  """Longest verdict, thinking included."""
  structured: bool = True
  """`vllm`, `openai`: hold verdicts to the form {"score": 0..1}."""


ENGINE_KEYS = {
  "vllm": ("tensor_parallel", "pipeline_parallel", "context_tokens", "memory_share"),
  "openai": ("base_url", "api_key_env", "timeout_s"),
}
"""Keys of `Asked` that one engine reads and the others do not."""

PLACEMENT = (
  *("batch_size", "tensor_parallel", "pipeline_parallel", "memory_share"),
  *("context_tokens", "base_url", "api_key_env", "timeout_s"),
)
"""Keys of `Asked` that say how and where a model runs, not what it answers (but for
`context_tokens`, whether it has room to)."""


class Writer(Engine):
  """Who writes questions and answers from a chunk of a document."""

  max_new_tokens: Positive = 1024
  """Longest reply, all pairs of a chunk and thinking included."""
  structured: bool = True
  """`vllm`, `openai`: hold replies to the form {"pairs": [{"question", "answer"}]}."""


class VerdictJudge(Asked):
  """A language model that answers with yes or no."""

  engine: Literal["jax", "vllm", "openai"] = "jax"
  """`jax`: built in; `vllm`: in this process; `openai`: a server of that protocol."""
  max_new_tokens: Positive = 64
  """Longest verdict, thinking included."""
  structured: bool = True
  """`vllm`, `openai`: hold verdicts to their form, true or false."""


class Shares(Section):
  """Shares of the documents, by a hash of their ids; they must sum to 1."""

  train: Annotated[float, pydantic.Field(gt=0.0, le=1.0)] = 0.8
  """Whose pairs are in train.jsonl [O]."""
  validation: Probability = 0.05
  """Whose pairs are in validation.jsonl [O]."""
  test: Probability = 0.15
  """Whose pairs are in test.jsonl [O]."""


class Extract(Section):
  """Stage 0: question/answer pairs from documents, for `data.questions`. null: none."""

  documents: str
  """A file or a folder: .txt, .md, and .jsonl or .parquet with {text, id?, domain?}."""
  text_field: str = "text"
  """Where JSONL and Parquet rows hold a document's text."""
  domain: str = ""
  """Of documents that name none."""
  chunk_tokens: Annotated[int, pydantic.Field(ge=16)] = 512
  """Longest part of a document that is shown at once, in tokens of `model` [O]."""
  min_chunk_tokens: Annotated[int, pydantic.Field(ge=1)] = 16
  """Shorter documents, and shorter ends of documents, are left out [O]."""
  pairs_per_chunk: Positive = 4
  """Most pairs written from one chunk [O]."""
  writer: Writer = Writer()
  judges: Annotated[tuple[VerdictJudge, ...], pydantic.Field(min_length=1)] = (
    VerdictJudge(),
  )
  """A pair is kept when more than half of them approve of it."""
  near_duplicate: Annotated[float, pydantic.Field(gt=0.0, le=1.0)] = 0.8
  """Documents, chunks and pairs that share this much (Jaccard index of their character
  5-grams) with an earlier one are dropped [O]."""
  shares: Shares = Shares()
  seed: Seed = 0
  """Of all sampling in this stage, and of the split."""


class Refine(Section):
  """Stage 1: rewrite, filter, fuse and judge the answers."""

  rewriter: Engine = Engine()
  prompt: Literal["rewrite", "sdft"] = "rewrite"
  """What asks for a rewrite: the template `raft_jax/prompts/NAME.txt`."""
  encoder: str = "sentence-transformers/all-MiniLM-L6-v2"
  """Sentence encoder: a hub name, a folder, or `pkg://PACKAGE/FOLDER`."""
  similarity_threshold: Annotated[float, pydantic.Field(ge=-1.0, le=1.0)] = 0.8
  """Least cosine of answer and rewrite; below it the original answer is kept [R]. From
  1 on all are; up to 0 every rewrite passes."""
  fusion: Fusion = Fusion()
  judges: Annotated[tuple[Judge, ...], pydantic.Field(min_length=1)] = (Judge(),)
  """Each scores every fused answer; their mean decides."""
  seed: Seed = 0
  """Of all sampling in this stage."""
  records_per_shard: Positive = 1024
  """Refined records per file."""
  journal: str | None = None
  """File of finished calls; null means one in `output`. Runs that share it, with other
  thresholds perhaps, ask nothing twice."""


class QuestionWriter(Engine):
  """Who writes questions after the example of others, and answers them: the model to
  be trained."""

  max_new_tokens: Positive = 128
  """Longest question, thinking included; `data.max_answer_tokens` bounds answers."""
  temperature: Annotated[float, pydantic.Field(ge=0.0)] = 0.9
  """Of sampling questions; answers take the most probable token."""
  top_p: Annotated[float, pydantic.Field(gt=0.0, le=1.0)] = 0.6
  """Sample questions from the most probable tokens that hold this mass."""


class Synthesise(Section):
  """Questions for `replay` that the model itself writes and answers (SSR). null:
  none."""

  seeds: str
  """Questions of general kind as examples: JSONL or Parquet {question}, two or more."""
  writer: QuestionWriter = QuestionWriter()
  drafts: Positive = 1140
  """Questions to write, each after an ordered pair of seeds: 20 make 380 pairs, which
  are each asked three times."""
  near_duplicate: Annotated[float, pydantic.Field(gt=0.0, le=1.0)] = 0.8
  """Drafts that share this much (Jaccard index of their character 5-grams) with a seed
  or an earlier draft are dropped [O]."""
  clusters: Positive = 20
  """Of the drafts' embeddings by `refine.encoder`."""
  keep: Positive = 200
  """Drafts to keep and answer: from each cluster its share, nearest to its centre."""
  seed: Seed = 0
  """Of the order of pairs, of sampling and of clustering."""


class Train(Section):
  """Stage 2: cross-entropy beside on-policy distillation."""

  epochs: Positive = 3
  """Passes over the questions [P]."""
  max_steps: Positive | None = None
  """Stop after this many steps even if epochs are left."""
  batch_size: Positive = 16
  """Questions per step, over all devices [P]."""
  micro_batches: Positive = 1
  """Split the batch; the result equals the unsplit step."""
  learning_rate: Annotated[float, pydantic.Field(ge=0.0)] = 5e-6
  """Its peak, after the warm-up and before the cosine to 0 [R]."""
  weight_decay: Annotated[float, pydantic.Field(ge=0.0)] = 0.01
  """Of AdamW [P]."""
  warmup_ratio: Probability = 0.03
  """Share of the steps with a linearly rising learning rate [O]."""
  clip: Annotated[float, pydantic.Field(gt=0.0)] | None = 1.0
  """Largest norm of the whole gradient; null for no clipping [O]."""
  cross_entropy: bool = True
  """Learn the answers themselves; without it the distillation loss trains alone."""
  loss_mean: Literal["sequence", "token"] = "sequence"
  """Mean over sequences of the mean over tokens, or over all tokens alike."""
  seed: Seed = 0
  """Of the order of the questions and of the rollouts."""
  checkpoint_every: Positive = 100
  """Steps between checkpoints."""
  keep_checkpoints: Positive = 2
  """Older checkpoints are deleted."""
  gradient_stats_every: Annotated[int, pydantic.Field(ge=0)] = 20
  """Every N steps: each loss's gradient norm, their cosine, and the time of each phase;
  costs one more backward pass. 0 turns it off."""
  tensorboard: bool = False
  """Write TensorBoard events too; metrics.jsonl is always written."""


class Lora(Section):
  """LoRA: trains low-rank updates of a frozen model (arXiv 2106.09685); `{}` for the
  defaults. null: full fine-tuning. Wants a learning rate about 40 times as high."""

  rank: Positive = 16
  """Of each update [O]."""
  alpha: Annotated[float, pydantic.Field(gt=0.0)] = 32.0
  """An update is multiplied by alpha / rank [O]."""
  targets: Annotated[tuple[str, ...], pydantic.Field(min_length=1)] = (
    *("q_proj", "k_proj", "v_proj", "o_proj"),
    *("gate_proj", "up_proj", "down_proj"),
  )
  """The projections that get an update, by their Hugging Face names."""


class Rollout(Section):
  """The answers the model being trained samples, on which it is distilled."""

  group: Positive = 1
  """Rollouts of each question of a batch, which grows for it."""
  max_new_tokens: Positive = 256
  """Longest rollout [O]."""
  temperature: Annotated[float, pydantic.Field(ge=0.0)] = 1.0
  """Of sampling; 0 takes the most probable token."""
  top_p: Annotated[float, pydantic.Field(gt=0.0, le=1.0)] = 1.0
  """Sample from the most probable tokens that hold this mass."""
  unroll: Annotated[int, pydantic.Field(ge=0)] | None = None
  """Layers per iteration of the scan over layers; 0 means no scan, each layer's weights
  by themselves. null: 0 on GPUs, where a scan copies them for every token, and
  `model.unroll` elsewhere."""


class Distill(Section):
  """The distillation loss."""

  top_k: Positive = 512
  """Tokens compared at each position: the most probable of `support` [P]."""
  support: Literal["teacher", "student"] = "teacher"
  """Whose most probable tokens are compared; the student's as it sampled [P]."""
  temperature: Annotated[float, pydantic.Field(gt=0.0)] = 1.5
  """Divides both models' logits in the loss; not the sampling temperature [R]."""
  direction: Literal["forward", "reverse", "jsd"] = "forward"
  """`forward` is KL(teacher, student), `reverse` the other way, `jsd` between [R]."""
  beta: Annotated[float, pydantic.Field(gt=0.0, lt=1.0)] = 0.5
  """Mixture weight of `jsd`."""
  tail: Literal["renormalize", "bucket"] = "renormalize"
  """The tokens outside the top K: left out, or one more class [P]."""
  scale_by_t2: bool = True
  """Multiply the loss by the squared temperature [P]."""
  teacher: Literal["none", "base", "average", "live"] = "base"
  """`none`: no distillation; `base`: the model before training [P]; `average`: the
  student's moving average; `live`: the student itself."""
  source: str | None = None
  """`base`: another teacher, with the same tokenizer; null: model.source."""
  average_rate: Probability = 0.01
  """`average`: share of the student in each step's average."""
  teacher_context: Literal["chat", "paper", "example", "sibling", "none"] = "chat"
  """How the teacher sees the answer: in a chat turn, as raw text [P], as an example of
  an answer, or not at all. `sibling`: it sees another rollout of the same question that
  succeeded; rollouts without one leave the loss."""
  success: Probability = 0.5
  """`sibling`: least ROUGE-L F1 with the answer at which a rollout succeeds [O]."""
  trajectory: Literal["rollout", "answer", "mixed"] = "rollout"
  """Where teacher and student are compared: the student's rollout, the answer, or one
  of the two, drawn for each step."""
  on_policy: Probability = 0.5
  """`mixed`: share of the steps that compare on rollouts."""
  skip_first: Annotated[int, pydantic.Field(ge=0)] = 0
  """Rollout tokens at the start that the distillation loss leaves out."""
  max_importance: Annotated[float, pydantic.Field(gt=0.0)] | None = None
  """Weigh each rollout token by how much more probable it is in the update than when it
  was sampled, up to this; null: all alike."""
  mask_eos: bool = False
  """Leave the rollout's end-of-turn token out of the distillation loss."""


class Balance(Section):
  """The weight of the distillation loss beside the cross-entropy."""

  mode: Literal["ema", "fixed", "schedule", "gradient_norm"] = "ema"
  """`ema`: the ratio of both losses' moving averages [P]; the others see `weight`."""
  decay: Annotated[float, pydantic.Field(ge=0.0, lt=1.0)] = 0.9
  """`ema`: of the moving averages [P]."""
  eps: Annotated[float, pydantic.Field(gt=0.0)] = 1e-8
  """`ema`, `gradient_norm`: added to the divisor [O]."""
  max_weight: Annotated[float, pydantic.Field(gt=0.0)] | None = 100.0
  """`ema`, `gradient_norm`: upper bound of the weight; null for none [O]."""
  weight: Annotated[float, pydantic.Field(ge=0.0)] = 1.0
  """`fixed`: the weight; `schedule`: its value at the end; `gradient_norm`: the target
  ratio of the two gradients' norms."""
  start: Annotated[float, pydantic.Field(ge=0.0)] = 0.0
  """`schedule`: the weight at step 0, from which it moves linearly."""


class Anchor(Section):
  """A pull to the base model's parameters: L2-SP, and with `importance` EWC; `{}` for
  the defaults. null: none."""

  strength: Annotated[float, pydantic.Field(ge=0.0)] = 1.0
  """Of the pull over the whole run: a weight that nothing else moves keeps about
  exp(-strength) of its distance [O]. `coupled`: the penalty's factor in the loss."""
  mode: Literal["decoupled", "coupled"] = "decoupled"
  """Beside Adam, or in the gradient, where Adam rescales it."""
  importance: Literal["none", "sampled", "empirical"] = "none"
  """Weights of the parameters: all alike, or their Fisher information of mean 1, from
  answers that the model samples or from those given."""
  questions: str | None = None
  """Questions of general kind, in the form of `data.questions`, for `importance`."""
  limit: Positive = 256
  """Use only the first N of them."""
  batch_size: Positive = 8
  """Questions at a time (`sampled`)."""
  max_new_tokens: Positive = 64
  """Longest sampled answer."""


class Recadam(Section):
  """RecAdam in the place of AdamW: anneals from staying at the base model to the task;
  `{}` for the defaults. null: AdamW."""

  gamma: Annotated[float, pydantic.Field(ge=0.0)] = 5000.0
  """Strength of the pull at first."""
  steepness: Annotated[float, pydantic.Field(gt=0.0)] = 0.1
  """Of the sigmoid, per step [O]."""
  midpoint: Probability = 0.25
  """Share of the steps after which task and pull weigh the same [O]."""


class Freeze(Section):
  """Parameters that stay as they are; `{}` for the defaults. null: none."""

  mode: Literal["half", "bottom", "names"] = "half"
  """About half of each layer, drawn once; the embedding and the lower layers; or by
  name."""
  layers: Annotated[int, pydantic.Field(ge=0)] | None = None
  """`bottom`: how many; null for half of them."""
  names: tuple[str, ...] = ()
  """`names`: shell patterns, such as `embed` or `layers.[0-9].q`."""


class SoftMask(Section):
  """Smaller updates for attention heads and feed-forward units that matter (DAS); `{}`
  for the defaults. null: none."""

  limit: Positive = 256
  """Use only the first N questions to find out which matter [O]."""
  batch_size: Positive = 1
  """Questions at a time; their gradients are averaged before the absolute value."""
  drop: Annotated[float, pydantic.Field(gt=0.0, lt=1.0)] = 0.1
  """Share of the units that are dropped in each of two passes, which are compared."""


class Adaptive(Section):
  """Replays what is forgotten, at growing intervals; between these events all rows of a
  batch are the domain's. OUR RECONSTRUCTION of MSSR (arXiv 2603.09892), whose equations
  were not to be had; `{}` for the defaults. null: the same share of every batch."""

  strength: Annotated[float, pydantic.Field(gt=0.0)] = 20.0
  """Of each memory at first, in steps: after so many 1/e of it is left [O]."""
  growth: Annotated[float, pydantic.Field(ge=0.0)] = 1.0
  """Share by which a replay strengthens a memory whose loss has not risen [O]."""
  age_exponent: Annotated[float, pydantic.Field(ge=0.0)] = 1.0
  """Of what faded since the last replay, in the chance to be drawn; 0: no part [O]."""
  loss_exponent: Annotated[float, pydantic.Field(ge=0.0)] = 1.0
  """Of `floor` and the loss's rise over the base model's, there; 0: no part [O]."""
  floor: Annotated[float, pydantic.Field(gt=0.0)] = 0.1
  """Beside that rise: keeps questions whose loss has not risen in the draw [O]."""
  decay: Annotated[float, pydantic.Field(ge=0.0, lt=1.0)] = 0.5
  """Of the moving average of each question's loss, per replay [O]."""
  interval: Annotated[int, pydantic.Field(ge=2)] = 4
  """Steps to the first event, and the fewest between two [O]."""
  factor: Annotated[float, pydantic.Field(ge=1.0)] = 1.3
  """By which the interval grows after each event, or shrinks [O]."""
  longest: Annotated[int, pydantic.Field(ge=2)] = 32
  """Most steps between two events [O]."""
  tolerance: Annotated[float, pydantic.Field(ge=0.0)] = 0.1
  """Mean rise of an event's losses above which the interval shrinks [O]."""


class Replay(Section):
  """General questions beside those of the domain in every batch. null: none."""

  questions: str | None = None
  """In the form of `data.questions`; their answers are learnt as they are. null: those
  that `synthesise` wrote into `output`."""
  share: Annotated[float, pydantic.Field(ge=0.0, lt=1.0)] = 0.2
  """Of each batch, which grows for it: `train.batch_size` counts the domain's [O]. With
  `adaptive`, of the batches of its events, which do not grow."""
  adaptive: Adaptive | None = None


class Prune(Section):
  """After training each tensor keeps some of its change (FAPM); `{}` for the defaults.
  null: all. Read by `evaluate` and `export`."""

  keep: Probability = 0.1
  """Share of the entries that keep their change."""


class Interpolate(Section):
  """After training (and `prune`) every weight goes back a part of the way to the base
  model's (WiSE-FT); `{}` for the defaults. null: none does. Read by `evaluate` and
  `export`."""

  weight: Probability = 0.5
  """Of the trained model: 1 is that, 0 the base model."""


class Mesh(Section):
  """Devices per axis; one axis may be -1, meaning all that are left."""

  data: int = 1
  """Copies of the model, each reading a share of the batch."""
  fsdp: int = -1
  """Shares of parameters and batch."""
  tensor: int = 1
  """Shares of every matrix product."""


class Cluster(Section):
  """Several processes that train together; `launch/` has examples."""

  join: bool | None = None
  """null: where Slurm, Open MPI, GKE or a coordinator's address says that there are
  several; true: as JAX finds them (Cloud TPU VMs need this); false: never."""
  coordinator: str | None = None
  """host:port of process 0; null for JAX_COORDINATOR_ADDRESS, or what JAX finds."""
  processes: Positive | None = None
  """How many; null for JAX_NUM_PROCESSES, or what JAX finds."""
  index: Annotated[int, pydantic.Field(ge=0)] | None = None
  """This process, from 0; null for JAX_PROCESS_ID, or what JAX finds."""
  heartbeat_s: Positive = 100
  """Seconds of silence after which a process is lost, which ends the others."""


class Ifeval(Section):
  """Verifiable instructions (IFEval), beside the base model's score."""

  items: str | None = None
  """A JSONL or Parquet file, or `google/IFEval` on the hub; null leaves it out."""
  limit: Positive | None = None
  """Use only the first N prompts."""
  max_new_tokens: Positive = 1280
  """Longest answer; 1280 is lm-evaluation-harness' limit."""
  nltk_data: str | None = None
  """Folder with tokenizers/punkt_tab; null looks where NLTK does."""


class Mmlu(Section):
  """Multiple-choice questions (MMLU), answered by the most probable letter."""

  items: str | None = None
  """A JSONL or Parquet file, or `cais/mmlu` on the hub; null leaves it out."""
  examples: str | None = None
  """Solved questions shown first; null means the hub dataset's own."""
  shots: Annotated[int, pydantic.Field(ge=0)] = 5
  """Solved questions per prompt [P]."""
  limit: Positive | None = None
  """Use only the first N questions."""


class Drift(Section):
  """How far the model moved from the base model's distribution, KL(base, trained)."""

  prompts: str | None = None
  """General prompts, JSONL or Parquet {prompt}; null leaves it out."""
  limit: Positive | None = 64
  """Use only the first N prompts."""
  max_new_tokens: Positive = 64
  """Tokens of the base model's answers on which both are compared."""


class Tasks(Section):
  """Any task of lm-evaluation-harness, beside the base model's scores. `servers` do not
  answer these."""

  names: tuple[str, ...] = ()
  """Tasks, groups and tags by the harness' names, such as arc_easy; empty: none."""
  include: str | None = None
  """Folder of more tasks' YAML files; functions that these name are run."""
  limit: Positive | None = None
  """Use only the first N items of each task."""
  shots: Annotated[int, pydantic.Field(ge=0)] | None = None
  """Solved examples per prompt; null: each task's own number."""
  chat: bool = False
  """Prompts as the chat template has them, examples as turns."""


class OpenEnded(Section):
  """Answers to general requests, judged by `evaluate.judges` (as the paper's MS-Bench),
  beside the base model's."""

  prompts: str | None = None
  """JSONL or Parquet {prompt, reference?}; null leaves it out."""
  limit: Positive | None = None
  """Use only the first N prompts."""
  max_new_tokens: Positive = 512
  """Longest answer [O]."""


class Server(Section):
  """An OpenAI-compatible server that writes a model's answers."""

  model: str
  """The model's name there."""
  base_url: str
  """The server's address, ending in /v1."""
  api_key_env: Annotated[str, pydantic.Field(pattern=r"^[A-Za-z_]\w*$")] | None = None
  """Name of the environment variable that holds the key; never the key."""
  timeout_s: Annotated[float, pydantic.Field(gt=0.0)] = 600.0
  """Longest wait for one reply in seconds; then it is asked for again."""


class Servers(Section):
  """Servers in the place of the built-in sampler: for greedy answers to test questions,
  IFEval and open-ended requests, `batch_size` asked at a time. null: none."""

  trained: Server
  """Of the folder that `export` wrote of the checkpoint that is evaluated."""
  base: Server
  """Of `model.source`."""


class Evaluate(Section):
  """Scores on `data.test` and of general abilities, beside the base model's."""

  limit: Positive | None = None
  """Use only the first N test questions, and as many of `data.validation`."""
  max_new_tokens: Positive = 64
  """Longest answer."""
  batch_size: Positive = 16
  """Questions answered at a time."""
  servers: Servers | None = None
  samples: Annotated[int, pydantic.Field(ge=0)] = 8
  """Answers shown in the report."""
  journal: str | None = None
  """File of finished items; null means one in `output`. Runs that share it measure the
  base model once."""
  judges: tuple[VerdictJudge, ...] = ()
  """Say which test answers are correct: the share that a majority of them calls so is
  D-Acc. Empty: not measured. The paper has three of different families."""
  open_ended: OpenEnded = OpenEnded()
  ifeval: Ifeval = Ifeval()
  mmlu: Mmlu = Mmlu()
  drift: Drift = Drift()
  tasks: Tasks = Tasks()


class WatchDrift(Drift):
  """Drift from the base model, as `evaluate.drift`."""

  limit: Positive | None = 16
  """Use only the first N prompts."""
  max_new_tokens: Positive = 48
  """Tokens of the base model's answers on which both are compared."""


class WatchIfeval(Ifeval):
  """The strict share of instructions obeyed, as `evaluate.ifeval`."""

  limit: Positive | None = 16
  """Use only the first N prompts."""
  max_new_tokens: Positive = 96
  """Longest answer."""


class Watch(Section):
  """Looks, while it trains, at the loss on `data.validation` and at general abilities.
  The best step is that of the lowest loss among the looks whose drift is at most
  `max_drift`. `{}` for the defaults. null: none."""

  every: Positive = 25
  """Steps between two looks; the last step is looked at, too [O]."""
  limit: Positive = 32
  """Use only the first N questions of `data.validation` [O]."""
  drift: WatchDrift = WatchDrift()
  ifeval: WatchIfeval = WatchIfeval()
  max_drift: Annotated[float, pydantic.Field(gt=0.0)] | None = None
  """Nats per token above which a step is not the best, whatever its loss; null: any."""
  patience: Positive | None = None
  """Training ends after so many looks in a row without a new best; null: never."""
  keep: Literal["best", "last"] = "best"
  """The step that `evaluate` and `export` read: the best, if there is one, or the
  last."""


class SweepRun(Section):
  """A run of a sweep, or several."""

  name: Annotated[str, pydantic.Field(pattern=r"^[A-Za-z0-9][\w.+-]*$")]
  """Names its folder and its line in the tables."""
  set: dict[str, Any] = {}
  """Dotted keys of this file and the values they get."""
  over: dict[str, Annotated[list[Any], pydantic.Field(min_length=1)]] = {}
  """Dotted keys and lists of values: one run for each combination."""


class Sweep(Section):
  """Many runs of this config (`raft_jax.sweep`), each in a folder under `output`."""

  stages: tuple[Literal["refine", "train", "evaluate", "export", "report"], ...] = (
    "refine",
    "train",
    "evaluate",
  )
  """What is done of each run, in this order."""
  only: Positive | None = None
  """Run only the Nth run (from 1), as one task of an array job."""
  runs: tuple[SweepRun, ...] = ()
  """Each is a run of this config with some keys set, or several."""


class Export(Section):
  """What `export` writes."""

  adapter: bool = False
  """With `lora`: a PEFT adapter for the base model, in `output/adapter`, instead of the
  whole model in `output/export`."""


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
  replay: Replay | None = None
  prune: Prune | None = None
  interpolate: Interpolate | None = None
  watch: Watch | None = None
  mesh: Mesh = Mesh()
  cluster: Cluster = Cluster()
  evaluate: Evaluate = Evaluate()
  sweep: Sweep = Sweep()
  export: Export = Export()
  output: str
  """Folder for everything a run writes; each run needs its own."""
