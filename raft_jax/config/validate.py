"""Checks of a config whose values are each valid but do not fit together.

Each problem is a dotted key and what is wrong with its value. No check needs a model or
data.
"""

from __future__ import annotations

import math
import os
import pathlib
import re
from typing import Any

from raft_jax.config import schema, validate_endpoints, validate_training
from raft_jax.storage import mirror, row_formats, sources

Problems = validate_endpoints.Problems

QUESTION_FILES = (
  "data.questions",
  "data.test",
  "data.validation",
  "anchor.questions",
  "replay.questions",
)


def missing_files(tree: dict[str, Any]) -> Problems:
  """Files of questions that a tree of keys names and that do not exist."""
  for key in QUESTION_FILES:
    section, name = key.split(".")
    values = tree.get(section)
    value = values.get(name) if isinstance(values, dict) else None
    if not isinstance(value, str):
      continue
    if not sources.is_present(value):
      yield (
        key,
        f"{value!r} is not a file (looked in {pathlib.Path.cwd()}); give a file of "
        "rows, a folder, a glob or hub://ORG/NAME",
      )
    elif problem := sources.problem(value):
      yield key, problem


def conflicts(config: schema.Config) -> Problems:
  """Values that do not fit together."""
  yield from _paths(config.model, config.data, config.output)
  yield from _mesh(config.mesh)
  if config.train.batch_size % config.train.micro_batches:
    yield (
      "train.micro_batches",
      f"must divide train.batch_size={config.train.batch_size}, "
      f"got {config.train.micro_batches}",
    )
  yield from _attention(config.model, config.rollout)
  yield from validate_training.balance(config.train, config.distill, config.balance)
  yield from validate_training.distillation(config.distill, config.rollout)
  if config.replay is not None:
    yield from validate_training.replay(config.replay, config.synthesise)
    if config.replay.adaptive is not None:
      yield from validate_training.adaptive_replay(
        config.replay.adaptive, config.train, config.rollout, config.distill
      )
  if config.sentences is not None:
    yield from validate_training.sentences(config.data, config.extract, config.distill)
  if config.token_weights is not None:
    yield from validate_training.token_weights(config.token_weights, config.train)
  yield from _validation(config.validation, config.data)
  yield from validate_training.updates(config.anchor, config.recadam, config.freeze)
  yield from validate_training.adapter(
    config.lora,
    config.export,
    edits={
      "prune": config.prune,
      "hard_threshold": config.hard_threshold,
      "interpolate": config.interpolate,
    },
    base_methods={
      "anchor": config.anchor,
      "recadam": config.recadam,
      "freeze": config.freeze,
      "soft_mask": config.soft_mask,
    },
    validates=config.validation is not None,
  )
  yield from _export(config.export, config.sweep)
  if config.mirror is not None and not config.mirror.startswith(mirror.SCHEMES):
    yield "mirror", f"{config.mirror!r}: begin it with {', '.join(mirror.SCHEMES)}"
  yield from validate_training.unused(config.distill, config.balance, config.rollout)
  yield from _refine(config.refine)
  yield from _evaluate(config.evaluate)
  if config.extract is not None:
    yield from _extract(config.extract)
  if config.synthesise is not None:
    yield from _synthesise(config.synthesise)


def _paths(model: schema.Model, data: schema.Data, output: str) -> Problems:
  named = {"model.source": model.source, "output": output}
  if model.chat_template is not None:
    named["model.chat_template"] = model.chat_template
  for key, text in named.items():
    if not text.strip():
      yield key, "is empty; give a name"
    if "\0" in text:
      yield key, "holds a NUL character; give another name"
  if output.startswith("~"):
    yield "output", "begins with ~, which only a shell expands; write $HOME"
  for name in ("validation", "test"):
    file = getattr(data, name)
    if file is None:
      continue
    if os.path.realpath(file) == os.path.realpath(data.questions):
      yield (
        f"data.{name}",
        "is data.questions, so memorised answers would count as right; name another "
        "file",
      )
    elif shared := sources.shared(file, data.questions):
      yield (
        f"data.{name}",
        f"holds {shared}, which is also in data.questions, so memorised answers would "
        "count as right; name other files",
      )
  for field in data.columns or {}:
    if field not in row_formats.FIELDS:
      known = ", ".join(row_formats.FIELDS)
      yield "data.columns", f"{field!r} is no field of a row; fields are {known}"
  columns = [*(data.columns or {}).values()]
  twice = next((name for name in columns if columns.count(name) > 1), None)
  if twice is not None:
    yield "data.columns", f"maps two fields to the column {twice!r}; keep one"
  # os.path, unlike pathlib, returns False for a name that is too long to be looked up.
  if os.path.exists(output) and not os.path.isdir(output):
    yield "output", f"{output} is not a folder; choose another output"


def _mesh(mesh: schema.Mesh) -> Problems:
  sizes = mesh.model_dump()
  for axis, size in sizes.items():
    if size < 1 and size != -1:
      yield f"mesh.{axis}", f"must be a number of devices or -1, got {size}"
  if list(sizes.values()).count(-1) > 1:
    yield "mesh", "only one axis may be -1 (all devices that are left)"


def _attention(model: schema.Model, rollout: schema.Rollout) -> Problems:
  if model.attention == "cudnn":
    if model.dtype != "bfloat16":
      yield "model.attention", "cudnn computes in bfloat16; set model.dtype=bfloat16"
    if rollout.max_new_tokens % 2:
      yield "rollout.max_new_tokens", "must be even for model.attention=cudnn"


def _refine(refine: schema.Refine) -> Problems:
  yield from validate_endpoints.engines(
    {"refine.rewriter": refine.rewriter, "refine.fusion": refine.fusion}
  )
  yield from validate_endpoints.panel("refine.judges", refine.judges)
  for i, judge in enumerate(refine.judges):
    if judge.engine == "encoder" and judge.model is not None:
      yield (
        f"refine.judges.{i}.model",
        "an encoder judge uses refine.encoder; delete this line",
      )


def _evaluate(evaluate: schema.Evaluate) -> Problems:
  yield from validate_endpoints.panel("evaluate.judges", evaluate.judges)
  if evaluate.open_ended.prompts is not None and not evaluate.judges:
    yield (
      "evaluate.open_ended.prompts",
      "needs evaluate.judges, which judge the answers; add them",
    )


def _extract(extract: schema.Extract) -> Problems:
  yield from validate_endpoints.engines({"extract.writer": extract.writer})
  yield from validate_endpoints.panel("extract.judges", extract.judges)
  total = math.fsum(extract.shares.model_dump().values())
  if abs(total - 1) > 1e-9:
    yield "extract.shares", f"sum to {total:g}, not to 1; change one of the three"
  if extract.min_chunk_tokens > extract.chunk_tokens:
    yield (
      "extract.min_chunk_tokens",
      f"must not exceed extract.chunk_tokens={extract.chunk_tokens}",
    )


def _synthesise(synthesise: schema.Synthesise) -> Problems:
  yield from validate_endpoints.engines({"synthesise.writer": synthesise.writer})
  if synthesise.keep > synthesise.drafts:
    yield (
      "synthesise.keep",
      f"must not exceed synthesise.drafts={synthesise.drafts}",
    )


def _validation(validation: schema.Validation | None, data: schema.Data) -> Problems:
  if validation is None:
    return
  if data.validation is None:
    yield "data.validation", "is required for `validation`: name a file of questions"
  if validation.max_drift is not None and validation.drift.prompts is None:
    yield (
      "validation.max_drift",
      "needs validation.drift.prompts; name them, or delete this line",
    )


_HUB_NAME = re.compile(
  r"(?=.{1,96}$)(?!.*(--|\.\.|\.git$))[a-z0-9]([\w.-]*\w)?/\w([\w.-]*\w)?",
  re.ASCII | re.IGNORECASE,
)
"""Names of repositories that the hub accepts, with an owner."""


def _export(export: schema.Export, sweep: schema.Sweep) -> Problems:
  if export.adapter and export.gguf is not None:
    yield (
      "export.gguf",
      "needs the whole model, and export.adapter=true exports the adapter alone; "
      "delete one of the two",
    )
  if export.push is None:
    if export.public:
      yield "export.public", "is read with export.push only; set that or delete it"
    return
  if not _HUB_NAME.fullmatch(export.push):
    yield (
      "export.push",
      f"{export.push!r} is not ORGANISATION/NAME; write your user name or your "
      "organisation's, a slash, and a name for the model",
    )
  if sweep.runs and "export" in sweep.stages:
    yield (
      "export.push",
      "every run of the sweep would replace the one before in this repository; set it "
      "in the `set` of one run",
    )
