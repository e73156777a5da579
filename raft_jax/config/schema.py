"""The keys of a run's YAML file: their types, defaults, bounds and meanings.

Every key has a default except `model.source`, `data.questions` and `output`. Values
marked [P] are printed in the RAFT paper (arXiv 2606.00147), [R] come from a published
summary of it on a co-author's account, [O] are ours.
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
  chat_template: str | None = None
  """Name of one of the source's chat templates, or the path of a .jinja file. null uses
  the only template, or the one named `default`. `export` writes it beside the model."""
  dtype: Literal["float32", "bfloat16"] = "float32"
  """Type of activations. Parameters and optimizer state are float32 [P: bf16]."""
  remat: bool = False
  """Recompute each layer in the backward pass instead of keeping its activations."""
  unroll: Annotated[int, pydantic.Field(ge=0)] = 1
  """Layers per iteration of the scan over layers; 0 means all of them."""
  attention: Literal["xla", "cudnn"] = "xla"
  """Attention kernel of the teacher and update passes. `cudnn`: flash attention on
  NVIDIA GPUs, without arrays of [heads, tokens, tokens]; needs
  `model.dtype=bfloat16`."""


class Data(Section):
  """The questions, and their length limits."""

  questions: str
  """Training questions: JSONL or Parquet {id?, domain?, question or messages,
  answer}."""
  test: str | None = None
  """Held-out questions for `evaluate`, in the same form."""
  validation: str | None = None
  """Questions for choosing settings by their loss; `evaluate` also scores them."""
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
  reject_threshold: Probability = 0.01
  """A larger share of unreadable rows stops the run, unless `data.unusable` is
  `skip`."""


Omittable = Literal["seed", "top_p", "temperature", "max_tokens"]
Word = Annotated[str, pydantic.Field(min_length=1)]
Pair = Annotated[tuple[Word, ...], pydantic.Field(min_length=2, max_length=2)]


class ModelEndpoint(Section):
  """A language model that writes or judges, and where it runs."""

  engine: Literal["encoder", "jax", "vllm", "openai"]
  model: str | None = None
  """A source like `model.source`; null means the model to be trained. `jax` and `vllm`
  use `model.dtype`. For `openai`, the model's name at the server."""
  max_new_tokens: Positive = 256
  """Longest reply, thinking included. A reply that is cut off is not used."""
  batch_size: Positive = 16
  """Requests at a time. Finished calls are saved after each batch. For vLLM use
  hundreds."""
  tensor_parallel: Positive = 1
  """`vllm`: number of devices that share each layer."""
  pipeline_parallel: Positive = 1
  """`vllm`: number of device groups, each with a part of the layers."""
  context_tokens: Positive | None = None
  """`vllm`: longest prompt and reply together; null: the model's own limit."""
  memory_share: Annotated[float, pydantic.Field(gt=0.0, le=1.0)] = 0.9
  """`vllm`: share of each device's (or the machine's) memory for weights and cache."""
  base_url: str | None = None
  """`openai`: the server's address, ending in /v1."""
  api_key_env: Annotated[str, pydantic.Field(pattern=r"^[A-Za-z_]\w*$")] | None = None
  """`openai`: name of the environment variable that holds the key; never the key."""
  timeout_s: Annotated[float, pydantic.Field(gt=0.0)] = 600.0
  """`openai`: longest wait for one reply in seconds; then it is asked for again."""
  omit: tuple[Omittable, ...] = ()
  """`openai`: parameters that the server does not take, of `seed`, `top_p`,
  `temperature` and `max_tokens` (sent as max_completion_tokens). One that the server
  clearly refuses is left out without this key."""
  thinking_marks: Pair | None = None
  """`openai`: words before and after a reply's thinking, e.g. ["[THINK]", "[/THINK]"];
  beside <think> and, at the start of a reply, other common ones."""


class Engine(ModelEndpoint):
  """The model that rewrites answers."""

  engine: Literal["jax", "vllm", "openai"] = "jax"
  """`jax`: built in; `vllm`: in this process; `openai`: a server with OpenAI's API."""
  temperature: Annotated[float, pydantic.Field(ge=0.0)] = 1.0
  """Sampling temperature; 0 takes the most probable token."""
  top_p: Annotated[float, pydantic.Field(gt=0.0, le=1.0)] = 1.0
  """Sample from the most probable tokens whose probabilities sum to this."""


class Fusion(Engine):
  """The model that writes one answer from the original and the rewrite."""

  rounds: Annotated[int, pydantic.Field(ge=0)] = 3
  """Largest number of answers written for one question [O]; at 0 the rewrite is
  final."""
  accept_at: Probability = 0.8
  """Stop at the first round whose mean judge score reaches this [R]."""


class Judge(ModelEndpoint):
  """A language model, or `encoder`: the sentence encoder's cosine mapped to 0..1."""

  engine: Literal["encoder", "jax", "vllm", "openai"] = "encoder"
  """`encoder`: the cosine of `refine.encoder`, mapped to 0..1; the others are
  models."""
  max_new_tokens: Positive = 64
  """Longest verdict, thinking included."""
  structured: bool = True
  """`vllm`, `openai`: constrain verdicts to the form {"score": 0..1}."""


ENGINE_KEYS = {
  "vllm": ("tensor_parallel", "pipeline_parallel", "context_tokens", "memory_share"),
  "openai": ("base_url", "api_key_env", "timeout_s", "omit", "thinking_marks"),
}
"""Keys of `ModelEndpoint` that one engine reads and the others do not."""

PLACEMENT = (
  *("batch_size", "tensor_parallel", "pipeline_parallel", "memory_share"),
  *("context_tokens", "base_url", "api_key_env", "timeout_s", "omit"),
)
"""Keys of `ModelEndpoint` that say how and where a model runs, not what it is asked
(except `context_tokens`, which decides whether it has room to answer)."""


class Writer(Engine):
  """The model that writes questions and answers from a chunk of a document."""

  max_new_tokens: Positive = 1024
  """Longest reply: all pairs of a chunk, thinking included."""
  structured: bool = True
  """`vllm`, `openai`: constrain replies to {"pairs": [{"question", "answer"}]}."""


class VerdictJudge(ModelEndpoint):
  """A language model that answers with yes or no."""

  engine: Literal["jax", "vllm", "openai"] = "jax"
  """`jax`: built in; `vllm`: in this process; `openai`: a server with OpenAI's API."""
  max_new_tokens: Positive = 64
  """Longest verdict, thinking included."""
  structured: bool = True
  """`vllm`, `openai`: constrain verdicts to their form, true or false."""


class Shares(Section):
  """How documents are split, by a hash of their ids; the shares must sum to 1."""

  train: Annotated[float, pydantic.Field(gt=0.0, le=1.0)] = 0.8
  """Share of the documents whose pairs are in train.jsonl [O]."""
  validation: Probability = 0.05
  """Share of the documents whose pairs are in validation.jsonl [O]."""
  test: Probability = 0.15
  """Share of the documents whose pairs are in test.jsonl [O]."""


class Extract(Section):
  """Stage 0: question/answer pairs from documents, for `data.questions`. null: none."""

  documents: str
  """A file or a folder: .txt, .md, and .jsonl or .parquet with {text, id?, domain?}."""
  text_field: str = "text"
  """The field of JSONL and Parquet rows that holds a document's text."""
  domain: str = ""
  """Domain of documents that do not name one."""
  chunk_tokens: Annotated[int, pydantic.Field(ge=16)] = 512
  """Longest chunk of a document, in tokens of `model` [O]."""
  min_chunk_tokens: Annotated[int, pydantic.Field(ge=1)] = 16
  """Shorter documents, and shorter ends of documents, are left out [O]."""
  pairs_per_chunk: Positive = 4
  """Largest number of pairs written from one chunk [O]."""
  writer: Writer = Writer()
  judges: Annotated[tuple[VerdictJudge, ...], pydantic.Field(min_length=1)] = (
    VerdictJudge(),
  )
  """A pair is kept if more than half of the judges approve of it."""
  near_duplicate: Annotated[float, pydantic.Field(gt=0.0, le=1.0)] = 0.8
  """Documents, chunks and pairs are dropped if the Jaccard index of their character
  5-grams with those of an earlier one reaches this [O]."""
  shares: Shares = Shares()
  seed: Seed = 0
  """Seed of sampling in this stage, and of the split."""


class Refine(Section):
  """Stage 1: rewrite, filter, fuse and judge the answers."""

  rewriter: Engine = Engine()
  prompt: Literal["rewrite", "sdft"] = "rewrite"
  """Template of the request for a rewrite: `raft_jax/prompts/NAME.txt`."""
  encoder: str = "sentence-transformers/all-MiniLM-L6-v2"
  """Sentence encoder: a hub name, a folder, or `pkg://PACKAGE/FOLDER`."""
  similarity_threshold: Annotated[float, pydantic.Field(ge=-1.0, le=1.0)] = 0.8
  """Smallest cosine of answer and rewrite at which the rewrite is kept [R]. At 1, every
  original answer is kept; at 0 or below, every rewrite passes."""
  fusion: Fusion = Fusion()
  judges: Annotated[tuple[Judge, ...], pydantic.Field(min_length=1)] = (Judge(),)
  """Each judge scores every fused answer; the mean score decides."""
  seed: Seed = 0
  """Seed of sampling in this stage."""
  records_per_shard: Positive = 1024
  """Refined records per file."""
  journal: str | None = None
  """File of finished calls; null: one in `output`. Runs that share the file never
  repeat a call, even with other thresholds."""


class QuestionWriter(Engine):
  """The model that writes and answers questions: the model to be trained."""

  max_new_tokens: Positive = 128
  """Longest question, thinking included; `data.max_answer_tokens` bounds answers."""
  temperature: Annotated[float, pydantic.Field(ge=0.0)] = 0.9
  """Sampling temperature of questions; answers take the most probable token."""
  top_p: Annotated[float, pydantic.Field(gt=0.0, le=1.0)] = 0.6
  """Sample questions from the most probable tokens whose probabilities sum to this."""


class Synthesise(Section):
  """Questions for `replay` that the model itself writes and answers (SSR). null:
  none."""

  seeds: str
  """Two or more general questions as examples: JSONL or Parquet {question}."""
  writer: QuestionWriter = QuestionWriter()
  drafts: Positive = 1140
  """Number of questions to write, each from an ordered pair of seeds. The default uses
  each of the 380 pairs of 20 seeds three times."""
  near_duplicate: Annotated[float, pydantic.Field(gt=0.0, le=1.0)] = 0.8
  """Drafts are dropped if the Jaccard index of their character 5-grams with those of a
  seed or an earlier draft reaches this [O]."""
  clusters: Positive = 20
  """Number of clusters of the drafts' embeddings by `refine.encoder`."""
  keep: Positive = 200
  """Number of drafts to keep and answer: each cluster's share, nearest to its
  centre."""
  seed: Seed = 0
  """Seed of the order of pairs, of sampling and of clustering."""


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
  seed: Seed = 0
  """Seed of the order of the questions and of the rollouts."""
  checkpoint_every: Positive = 100
  """Steps between checkpoints."""
  keep_checkpoints: Positive = 2
  """Number of newest checkpoints to keep."""
  gradient_stats_every: Annotated[int, pydantic.Field(ge=0)] = 20
  """Every N steps, measure each loss's gradient norm, their cosine, and the time of
  each phase. Costs one more backward pass. 0: never."""
  tensorboard: bool = False
  """Also write TensorBoard events. metrics.jsonl is always written."""


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


class Distill(Section):
  """The distillation loss."""

  top_k: Positive = 512
  """Number of tokens compared at each position: the most probable of `support` [P]."""
  support: Literal["teacher", "student"] = "teacher"
  """Whose most probable tokens are compared [P]. `student`: as it sampled the
  rollout."""
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
  rollout of the same question that succeeded; rollouts without one leave the loss."""
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


class Prune(Section):
  """After training, keep only a part of each tensor's change (FAPM); `{}` for the
  defaults. null: keep all. Read by `evaluate` and `export`."""

  keep: Probability = 0.1
  """Share of the entries that keep their change."""


class Interpolate(Section):
  """After training (and `prune`), interpolate every weight between the base model's and
  the trained one (WiSE-FT); `{}` for the defaults. null: no interpolation. Read by
  `evaluate` and `export`."""

  weight: Probability = 0.5
  """Weight of the trained model: 1 is the trained model, 0 the base model."""


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


class Ifeval(Section):
  """Verifiable instructions (IFEval)."""

  items: str | None = None
  """A JSONL or Parquet file, or `google/IFEval` on the hub; null: not measured."""
  limit: Positive | None = None
  """Use only the first N prompts."""
  max_new_tokens: Positive = 1280
  """Longest answer; 1280 is lm-evaluation-harness' limit."""
  nltk_data: str | None = None
  """Folder with tokenizers/punkt_tab; null: where NLTK looks."""


class Mmlu(Section):
  """Multiple-choice questions (MMLU), answered by the most probable letter."""

  items: str | None = None
  """A JSONL or Parquet file, or `cais/mmlu` on the hub; null: not measured."""
  examples: str | None = None
  """File of solved questions shown first; null: the hub dataset's own."""
  shots: Annotated[int, pydantic.Field(ge=0)] = 5
  """Number of solved questions per prompt [P]."""
  limit: Positive | None = None
  """Use only the first N questions."""


class Drift(Section):
  """Drift from the base model's distribution, KL(base ‖ trained)."""

  prompts: str | None = None
  """General prompts, JSONL or Parquet {prompt}; null: not measured."""
  limit: Positive | None = 64
  """Use only the first N prompts."""
  max_new_tokens: Positive = 64
  """Tokens of the base model's answers on which both are compared."""


class Tasks(Section):
  """Any task of lm-evaluation-harness. The built-in engine answers these even where
  `servers` are set."""

  names: tuple[str, ...] = ()
  """Names of the harness' tasks, groups and tags, such as arc_easy; empty: none."""
  include: str | None = None
  """Folder with your own tasks' YAML files. Functions that these name are executed."""
  limit: Positive | None = None
  """Use only the first N items of each task."""
  shots: Annotated[int, pydantic.Field(ge=0)] | None = None
  """Number of solved examples per prompt; null: each task's own."""
  chat: bool = False
  """Apply the chat template to prompts, with examples as turns."""


class OpenEnded(Section):
  """Answers to general requests, judged by `evaluate.judges` (as the paper's
  MS-Bench)."""

  prompts: str | None = None
  """JSONL or Parquet {prompt, reference?}; null: not measured."""
  limit: Positive | None = None
  """Use only the first N prompts."""
  max_new_tokens: Positive = 512
  """Longest answer [O]."""


class Server(Section):
  """An OpenAI-compatible server that writes a model's answers."""

  model: str
  """The model's name at the server."""
  base_url: str
  """The server's address, ending in /v1."""
  api_key_env: Annotated[str, pydantic.Field(pattern=r"^[A-Za-z_]\w*$")] | None = None
  """Name of the environment variable that holds the key; never the key."""
  timeout_s: Annotated[float, pydantic.Field(gt=0.0)] = 600.0
  """Longest wait for one reply in seconds; then it is asked for again."""
  omit: tuple[Omittable, ...] = ()
  """Parameters that the server does not take, of `seed`, `top_p`,
  `temperature` and `max_tokens` (sent as max_completion_tokens). One that the server
  clearly refuses is left out without this key."""
  thinking_marks: Pair | None = None
  """Words before and after a reply's thinking, e.g. ["[THINK]", "[/THINK]"];
  beside <think> and, at the start of a reply, other common ones."""


class Servers(Section):
  """Servers instead of the built-in engine, for greedy answers to test questions,
  IFEval and open-ended requests, `batch_size` at a time. null: none."""

  trained: Server
  """The server of the trained model: the export of the evaluated checkpoint."""
  base: Server
  """The server of the base model: `model.source`."""


class Evaluate(Section):
  """Scores on `data.test` and of general abilities, each beside the base model's."""

  limit: Positive | None = None
  """Use only the first N test questions, and as many of `data.validation`."""
  max_new_tokens: Positive = 64
  """Longest answer."""
  batch_size: Positive = 16
  """Questions answered at a time."""
  servers: Servers | None = None
  samples: Annotated[int, pydantic.Field(ge=0)] = 8
  """Number of answers shown in the report."""
  journal: str | None = None
  """File of finished items; null: one in `output`. Runs that share the file measure the
  base model once."""
  judges: tuple[VerdictJudge, ...] = ()
  """The panel that judges test answers. D-Acc is the share that a majority calls
  correct. Empty: not measured. The paper has three judges of different families."""
  open_ended: OpenEnded = OpenEnded()
  ifeval: Ifeval = Ifeval()
  mmlu: Mmlu = Mmlu()
  drift: Drift = Drift()
  tasks: Tasks = Tasks()


class ValidationDrift(Drift):
  """Drift from the base model, as `evaluate.drift`."""

  limit: Positive | None = 16
  """Use only the first N prompts."""
  max_new_tokens: Positive = 48
  """Tokens of the base model's answers on which both are compared."""


class ValidationIfeval(Ifeval):
  """Strict share of instructions obeyed, as `evaluate.ifeval`."""

  limit: Positive | None = 16
  """Use only the first N prompts."""
  max_new_tokens: Positive = 96
  """Longest answer."""


class Validation(Section):
  """Measure the loss on `data.validation` and general abilities during training. The
  best step has the lowest loss among those whose drift is at most `max_drift`. `{}` for
  the defaults. null: no validation."""

  every: Positive = 25
  """Steps between two validations. The last step is validated, too [O]."""
  limit: Positive = 32
  """Use only the first N questions of `data.validation` [O]."""
  drift: ValidationDrift = ValidationDrift()
  ifeval: ValidationIfeval = ValidationIfeval()
  max_drift: Annotated[float, pydantic.Field(gt=0.0)] | None = None
  """A step with more drift, in nats per token, cannot be the best; null: no limit."""
  patience: Positive | None = None
  """Stop training after this many validations in a row without a new best; null:
  never."""
  keep: Literal["best", "last"] = "best"
  """The step that `evaluate` and `export` read: the best, if there is one, or the
  last."""


class SweepRun(Section):
  """A run of a sweep, or several."""

  name: Annotated[str, pydantic.Field(pattern=r"^[A-Za-z0-9][\w.+-]*$")]
  """Name of the run's folder and of its row in the tables."""
  set: dict[str, Any] = {}
  """Dotted keys of this file and their values in this run."""
  over: dict[str, Annotated[list[Any], pydantic.Field(min_length=1)]] = {}
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
  validation: Validation | None = None
  mesh: Mesh = Mesh()
  cluster: Cluster = Cluster()
  evaluate: Evaluate = Evaluate()
  sweep: Sweep = Sweep()
  export: Export = Export()
  output: str
  """Folder for everything a run writes; each run needs its own."""
