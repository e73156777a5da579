"""Checks of the sections that say how a model is trained.

Each problem is a dotted key and what is wrong with its value.
"""

from __future__ import annotations

from collections.abc import Mapping

from raft_jax.config import schema, validate_endpoints

Problems = validate_endpoints.Problems


def balance(
  train: schema.Train, distill: schema.Distill, balance: schema.Balance
) -> Problems:
  """Losses and their weights."""
  if balance.mode == "gradient_norm" and not train.gradient_stats_every:
    yield "train.gradient_stats_every", "must be above 0 for balance.mode=gradient_norm"
  if balance.mode == "gradient_norm" and not balance.weight:
    yield "balance.weight", "must be above 0 for balance.mode=gradient_norm"
  if train.router_loss and train.micro_batches > 1:
    yield (
      "train.router_loss",
      "needs the load of the whole batch, which train.micro_batches divides; set one "
      "of the two back",
    )
  if train.cross_entropy:
    return
  if distill.teacher == "none":
    yield (
      "train.cross_entropy",
      "with false and distill.teacher=none no loss is left; change one of the two",
    )
  elif balance.weight == 0 and (balance.mode == "fixed" or balance.start == 0):
    yield (
      "train.cross_entropy",
      "with false and with a weight of 0 no loss is left; set it to true, or raise "
      "balance.weight",
    )
  if balance.mode in ("ema", "gradient_norm"):
    yield (
      "balance.mode",
      f"{balance.mode} weighs distillation against the cross-entropy, which "
      "train.cross_entropy=false leaves out; set fixed or schedule",
    )


def distillation(distill: schema.Distill, rollout: schema.Rollout) -> Problems:
  """Teachers and rollouts."""
  if distill.teacher == "live" and distill.teacher_context == "none":
    yield (
      "distill.teacher_context",
      "with none the live teacher reads what the student reads, so its loss is 0; set "
      "another",
    )
  grouped = rollout.group > 1
  if distill.teacher_context == "sibling" and not grouped:
    yield "rollout.group", "distill.teacher_context=sibling needs 2 or more; raise it"
  if grouped and rollout.temperature == 0:
    yield (
      "rollout.temperature",
      "with 0 all rollouts of a question are equal, and rollout.group draws several; "
      "change one of the two",
    )
  if distill.trajectory != "rollout":
    for key, used in (
      ("distill.teacher_context", distill.teacher_context == "sibling"),
      ("distill.support", distill.support == "student"),
      ("distill.max_importance", distill.max_importance is not None),
      ("rollout.group", grouped),
    ):
      if used:
        yield key, "needs rollouts at every step; set distill.trajectory=rollout"
        break
  if distill.max_importance is not None and distill.temperature != 1:
    yield (
      "distill.max_importance",
      "compares probabilities as sampled, and distill.temperature changes them; set "
      "distill.temperature=1",
    )
  if distill.source is not None and distill.teacher != "base":
    yield "distill.source", "is read with distill.teacher=base only; delete this line"


def replay(replay: schema.Replay, synthesise: schema.Synthesise | None) -> Problems:
  if replay.questions is None and synthesise is None:
    yield (
      "replay.questions",
      "is required: name a file of general questions, or add a `synthesise` section, "
      "which makes one",
    )


def adaptive_replay(
  adaptive: schema.Adaptive,
  train: schema.Train,
  rollout: schema.Rollout,
  distill: schema.Distill,
) -> Problems:
  if not train.cross_entropy:
    yield (
      "replay.adaptive",
      "reads the cross-entropy of the replayed rows, which train.cross_entropy=false "
      "leaves out; set replay.adaptive=null",
    )
  if rollout.group > 1 and distill.teacher != "none":
    yield (
      "replay.adaptive",
      "counts each row of the batch as a question, and with rollout.group a question "
      "has several; set one of the two back",
    )
  if adaptive.longest < adaptive.interval:
    yield (
      "replay.adaptive.longest",
      f"must not be below replay.adaptive.interval={adaptive.interval}",
    )


def updates(
  anchor: schema.Anchor | None,
  recadam: schema.Recadam | None,
  freeze: schema.Freeze | None,
) -> Problems:
  """Methods that change or restrict the updates."""
  if anchor is not None:
    if anchor.importance != "none" and anchor.questions is None:
      yield "anchor.questions", "anchor.importance needs general questions; name a file"
    if recadam is not None:
      yield "anchor", "recadam has its own pull; delete one of the two sections"
  if freeze is not None and (freeze.mode == "names") != bool(freeze.names):
    yield (
      "freeze.names",
      "freeze.mode=names needs names, and other modes do not read them; change one",
    )
  if freeze is not None and freeze.layers is not None and freeze.mode != "bottom":
    yield "freeze.layers", "is read with freeze.mode=bottom only; set that or delete it"


def sentences(
  data: schema.Data, extract: schema.Extract | None, distill: schema.Distill
) -> Problems:
  """Learning from documents, which have no answers of their own."""
  if extract is None:
    yield "extract.documents", "not set; `sentences` learns from these documents"
  if data.answers != "original":
    yield (
      "data.answers",
      f"{data.answers} answers are of questions, and `sentences` learns from documents;"
      " set data.answers=original",
    )
  for key, value in (("trajectory", "answer"), ("teacher_context", "none")):
    if distill.teacher != "none" and getattr(distill, key) != value:
      yield (
        f"distill.{key}",
        f"{getattr(distill, key)} needs questions, and `sentences` learns from "
        f"documents; set distill.{key}={value}",
      )


def adapter(
  lora: schema.Lora | None,
  export: schema.Export,
  *,
  edits: Mapping[str, schema.Section | None],
  base_methods: Mapping[str, schema.Section | None],
  validates: bool,
) -> Problems:
  """LoRA beside other methods, and the export of an adapter.

  Args:
    edits: the sections that edit the model after training.
    base_methods: the sections of methods that need the base model's parameters to be
      trained.
    validates: whether there is a `validation` section.
  """
  edits_while_training = validates and any(edits.values())
  if export.adapter:
    for name, participle in (
      ("prune", "pruned"),
      ("hard_threshold", "thresholded"),
      ("interpolate", "interpolated"),
    ):
      if edits[name] is not None:
        yield (
          "export.adapter",
          f"{participle} weights cannot be exported as an adapter; delete one of the "
          "two",
        )
  if lora is not None:
    if lora.base is not None and edits_while_training:
      yield (
        "lora.base",
        "keeps no whole weights, which `validation` with `prune` or `interpolate` "
        "would edit; delete one of them",
      )
    for name, verb in (
      ("anchor", "pulls to the base model's parameters"),
      ("recadam", "pulls to the base model's parameters"),
      ("freeze", "names the base model's parameters"),
      ("soft_mask", "masks the base model's parameters"),
    ):
      if base_methods[name] is not None:
        yield name, f"{verb}, and `lora` trains none of these; delete one of the two"
  elif export.adapter:
    yield "export.adapter", "needs a `lora` section; add it, or delete this line"


TOKEN_WEIGHT_KEYS = {
  "exponent": ("eaft", "dft"),
  "top_k": ("eaft",),
  "max_entropy": ("eaft",),
  "floor": ("talr",),
  "max_perplexity": ("stm",),
  "temperature": ("talr", "flow"),
}
"""The rules of `token_weights` that read each of its other keys."""


def token_weights(settings: schema.TokenWeights, train: schema.Train) -> Problems:
  """Weights of the answers' tokens."""
  if not train.cross_entropy:
    yield (
      "token_weights",
      "weighs the tokens of the cross-entropy, which train.cross_entropy=false leaves "
      "out; set token_weights=null",
    )
  for key, rules in TOKEN_WEIGHT_KEYS.items():
    default = schema.TokenWeights.model_fields[key].default
    if settings.rule not in rules and getattr(settings, key) != default:
      yield (
        f"token_weights.{key}",
        f"is read with token_weights.rule={' or '.join(rules)} only; set that or "
        "delete it",
      )


def unused(
  distill: schema.Distill, balance: schema.Balance, rollout: schema.Rollout
) -> Problems:
  """Keys that were set and that this run would never read."""
  # Without distillation these are allowed: a sweep's file sets them for other runs.
  undistilled = distill.teacher == "none"
  for section, key, is_read, condition in (
    (distill, "beta", distill.direction == "jsd", "direction=jsd"),
    (
      distill,
      "success",
      distill.teacher_context == "sibling",
      "teacher_context=sibling",
    ),
    (
      distill,
      "average_rate",
      undistilled or distill.teacher == "average",
      "teacher=average",
    ),
    (
      distill,
      "on_policy",
      undistilled or distill.trajectory == "mixed",
      "trajectory=mixed",
    ),
    (balance, "start", balance.mode == "schedule", "mode=schedule"),
  ):
    default = type(section).model_fields[key].default
    if not is_read and getattr(section, key) != default:
      name = type(section).__name__.lower()
      yield (
        f"{name}.{key}",
        f"is read with {name}.{condition} only; set that or delete it",
      )
  if balance.mode == "ema" and balance.weight != schema.Balance().weight:
    yield (
      "balance.weight",
      "is not read with balance.mode=ema; change that or delete it",
    )
  length = rollout.max_new_tokens
  if distill.trajectory == "rollout" and distill.skip_first >= length:
    yield (
      "distill.skip_first",
      f"leaves no token of rollout.max_new_tokens={length}; make it smaller",
    )
