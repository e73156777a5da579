"""What is wrong with a config whose every value is right by itself.

Each finding is a dotted key and what to do about it. Needs no model and no data.
"""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from raft_jax.config import schema

QUESTION_FILES = (
  *("data.questions", "data.test", "data.validation"),
  *("anchor.questions", "replay.questions"),
)


def missing_files(tree: dict[str, Any]) -> Iterator[tuple[str, str]]:
  """Files of questions that a tree of keys names and that are not there."""
  for key in QUESTION_FILES:
    section, name = key.split(".")
    values = tree.get(section)
    value = values.get(name) if isinstance(values, dict) else None
    if isinstance(value, str) and not pathlib.Path(value).is_file():
      yield (
        key,
        f"{value!r} is not a file (looked in {pathlib.Path.cwd()}); give a .jsonl or "
        f".parquet file",
      )


def find(config: schema.Config) -> Iterator[tuple[str, str]]:
  """Values that are right each by itself, but not together. Needs no model."""
  for key, text in (("model.source", config.model.source), ("output", config.output)):
    if not text.strip():
      yield key, "is empty; give a name"
    if "\0" in text:
      yield key, "holds a NUL character; give another name"
  if config.output.startswith("~"):
    yield "output", "begins with ~, which a shell expands only by itself; write $HOME"
  for name in ("validation", "test"):
    file = getattr(config.data, name)
    if file is not None and os.path.realpath(file) == os.path.realpath(
      config.data.questions
    ):
      yield (
        f"data.{name}",
        "is data.questions, so that what is learned by heart would count; name others",
      )
  # os.path, unlike pathlib, says no where a name is too long to be looked up.
  if os.path.exists(config.output) and not os.path.isdir(config.output):
    yield "output", f"{config.output} is not a folder; choose another output"
  sizes = config.mesh.model_dump()
  for axis, size in sizes.items():
    if size < 1 and size != -1:
      yield f"mesh.{axis}", f"must be a number of devices or -1, got {size}"
  if list(sizes.values()).count(-1) > 1:
    yield "mesh", "only one axis may be -1 (all devices that are left)"
  if config.train.batch_size % config.train.micro_batches:
    yield (
      "train.micro_batches",
      f"must divide train.batch_size={config.train.batch_size}, "
      f"got {config.train.micro_batches}",
    )
  if config.model.attention == "cudnn":
    if config.model.dtype != "bfloat16":
      yield "model.attention", "cudnn computes in bfloat16; set model.dtype=bfloat16"
    if config.rollout.max_new_tokens % 2:
      yield "rollout.max_new_tokens", "must be even for model.attention=cudnn"
  if config.balance.mode == "gradient_norm" and not config.train.gradient_stats_every:
    yield "train.gradient_stats_every", "must be above 0 for balance.mode=gradient_norm"
  if config.balance.mode == "gradient_norm" and not config.balance.weight:
    yield "balance.weight", "must be above 0 for balance.mode=gradient_norm"
  yield from _losses(config)
  yield from _parts(config)
  yield from _unused(config)
  yield from _engines(
    {"refine.rewriter": config.refine.rewriter, "refine.fusion": config.refine.fusion}
  )
  yield from _panel("refine.judges", config.refine.judges)
  yield from _panel("evaluate.judges", config.evaluate.judges)
  if config.evaluate.open_ended.prompts is not None and not config.evaluate.judges:
    yield (
      "evaluate.open_ended.prompts",
      "needs evaluate.judges, who say which answers are good",
    )
  for i, judge in enumerate(config.refine.judges):
    if judge.engine == "encoder" and judge.model is not None:
      yield (
        f"refine.judges.{i}.model",
        "an encoder judge uses refine.encoder; delete this line",
      )
  if config.extract is not None:
    yield from _extract(config.extract)
  if config.synthesise is not None:
    yield from _engines({"synthesise.writer": config.synthesise.writer})
    if config.synthesise.keep > config.synthesise.drafts:
      yield (
        "synthesise.keep",
        f"must not exceed synthesise.drafts={config.synthesise.drafts}",
      )


def _extract(extract: schema.Extract) -> Iterator[tuple[str, str]]:
  yield from _engines({"extract.writer": extract.writer})
  yield from _panel("extract.judges", extract.judges)
  total = math.fsum(extract.shares.model_dump().values())
  if abs(total - 1) > 1e-9:
    yield "extract.shares", f"sum to {total:g}, not to 1; change one of the three"
  if extract.min_chunk_tokens > extract.chunk_tokens:
    yield (
      "extract.min_chunk_tokens",
      f"must not exceed extract.chunk_tokens={extract.chunk_tokens}",
    )


def _panel(place: str, judges: Sequence[schema.Asked]) -> Iterator[tuple[str, str]]:
  yield from _engines({f"{place}.{i}": judge for i, judge in enumerate(judges)})
  # Replies are kept by what is asked of which model, wherever it runs.
  asked = [judge.model_dump(exclude={*schema.PLACEMENT}) for judge in judges]
  for i, judge in enumerate(judges):
    if asked[i] in asked[:i]:
      other = " (servers tell models apart by name)" if judge.engine == "openai" else ""
      yield f"{place}.{i}", f"is the same judge again{other}; delete it or change it"


def _engines(roles: Mapping[str, schema.Asked]) -> Iterator[tuple[str, str]]:
  """Keys of other engines than the one a role names, and keys that its own needs."""
  for place, role in roles.items():
    for engine, keys in schema.ENGINE_KEYS.items():
      for key in keys:
        default = type(role).model_fields[key].default
        if role.engine != engine and getattr(role, key) != default:
          yield (
            f"{place}.{key}",
            f"is read with engine: {engine} only; set that or delete it",
          )
    if role.engine == "openai":
      if not (role.base_url or "").startswith(("http://", "https://")):
        yield (
          f"{place}.base_url",
          "must be the server's address, like http://localhost:8000/v1",
        )
      if not role.model:
        yield f"{place}.model", "is required with engine: openai: its name there"


def _losses(config: schema.Config) -> Iterator[tuple[str, str]]:
  """Losses, teachers and rollouts that do not go together."""
  distill = config.distill
  if not config.train.cross_entropy:
    balance = config.balance
    if distill.teacher == "none":
      yield (
        "train.cross_entropy",
        "without it and with distill.teacher=none no loss is left; set one of the two",
      )
    elif balance.weight == 0 and (balance.mode == "fixed" or balance.start == 0):
      yield (
        "train.cross_entropy",
        "without it and with a weight of 0 no loss is left; set it, or balance.weight",
      )
    if config.balance.mode in ("ema", "gradient_norm"):
      yield (
        "balance.mode",
        f"{config.balance.mode} weighs distillation against the cross-entropy, which "
        "train.cross_entropy=false leaves out; set fixed or schedule",
      )
  if distill.teacher == "live" and distill.teacher_context == "none":
    yield (
      "distill.teacher_context",
      "none shows the live teacher what the student sees: its loss is 0; set another",
    )
  grouped = config.rollout.group > 1
  if distill.teacher_context == "sibling" and not grouped:
    yield "rollout.group", "distill.teacher_context=sibling needs 2 or more; raise it"
  if grouped and config.rollout.temperature == 0:
    yield (
      "rollout.temperature",
      "0 makes the rollouts of a question equal, and rollout.group draws several; set "
      "one of the two",
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
      "compares probabilities as sampled, and distill.temperature changes them; set it "
      "to 1",
    )
  if distill.source is not None and distill.teacher != "base":
    yield "distill.source", "is read with distill.teacher=base only; delete this line"


def _parts(config: schema.Config) -> Iterator[tuple[str, str]]:
  """Other parts of methods that do not go together."""
  anchor = config.anchor
  if anchor is not None:
    if anchor.importance != "none" and anchor.questions is None:
      yield "anchor.questions", "anchor.importance needs general questions; name a file"
    if config.recadam is not None:
      yield "anchor", "recadam has a pull of its own; delete one of the two sections"
  replay = config.replay
  if replay is not None and replay.questions is None and config.synthesise is None:
    yield (
      "replay.questions",
      "is required: name a file of general questions, or add a `synthesise` section, "
      "which makes one",
    )
  yield from _adaptive(config)
  if config.watch is not None:
    if config.data.validation is None:
      yield "data.validation", "is required for `watch`: name a file of questions"
    if config.watch.max_drift is not None and config.watch.drift.prompts is None:
      yield (
        "watch.max_drift",
        "needs watch.drift.prompts; name them, or delete this line",
      )
  if config.export.adapter:
    for name, what in (("prune", "pruned"), ("interpolate", "interpolated")):
      if getattr(config, name) is not None:
        yield (
          "export.adapter",
          f"an adapter is not written of {what} weights; delete one of both",
        )
  freeze = config.freeze
  if freeze is not None and (freeze.mode == "names") != bool(freeze.names):
    yield "freeze.names", "goes with freeze.mode=names, and that with names; change one"
  if freeze is not None and freeze.layers is not None and freeze.mode != "bottom":
    yield "freeze.layers", "is read with freeze.mode=bottom only; set that or delete it"
  if config.lora is not None:
    for name, what in (
      ("anchor", "pulls to the base model's parameters"),
      ("recadam", "pulls to the base model's parameters"),
      ("freeze", "names the base model's parameters"),
      ("soft_mask", "masks the base model's parameters"),
    ):
      if getattr(config, name) is not None:
        yield name, f"{what}, and `lora` trains none of these; delete one of the two"


def _adaptive(config: schema.Config) -> Iterator[tuple[str, str]]:
  """What adaptive replay cannot do without."""
  adaptive = None if config.replay is None else config.replay.adaptive
  if adaptive is None:
    return
  if not config.train.cross_entropy:
    yield (
      "replay.adaptive",
      "reads the cross-entropy of what it replays, which train.cross_entropy=false "
      "leaves out; set replay.adaptive=null",
    )
  if config.rollout.group > 1 and config.distill.teacher != "none":
    yield (
      "replay.adaptive",
      "counts a row of the batch as a question, and rollout.group makes it several; "
      "set one of the two back",
    )
  if adaptive.longest < adaptive.interval:
    yield (
      "replay.adaptive.longest",
      f"must not be below replay.adaptive.interval={adaptive.interval}",
    )


def _unused(config: schema.Config) -> Iterator[tuple[str, str]]:
  """Keys somebody set that this run would never read."""
  distill, balance = config.distill, config.balance
  undistilled = distill.teacher == "none"  # a sweep's file has the keys for others
  for section, key, read, needs in (
    (distill, "beta", distill.direction == "jsd", "direction=jsd"),
    (
      *(distill, "success", distill.teacher_context == "sibling"),
      "teacher_context=sibling",
    ),
    (
      *(distill, "average_rate", undistilled or distill.teacher == "average"),
      "teacher=average",
    ),
    (
      *(distill, "on_policy", undistilled or distill.trajectory == "mixed"),
      "trajectory=mixed",
    ),
    (balance, "start", balance.mode == "schedule", "mode=schedule"),
  ):
    if not read and getattr(section, key) != type(section).model_fields[key].default:
      name = type(section).__name__.lower()
      yield (
        f"{name}.{key}",
        f"is read with {name}.{needs} only; set that or delete it",
      )
  if balance.mode == "ema" and balance.weight != schema.Balance().weight:
    yield (
      "balance.weight",
      "is not read with balance.mode=ema; change that or delete it",
    )
  if config.export.adapter and config.lora is None:
    yield "export.adapter", "needs a `lora` section; add it, or delete this line"
  length = config.rollout.max_new_tokens
  if distill.trajectory == "rollout" and distill.skip_first >= length:
    yield (
      "distill.skip_first",
      f"leaves no token of rollout.max_new_tokens={length}; make it smaller",
    )
