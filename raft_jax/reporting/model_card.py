"""The model card of an exported model: its README.md."""

from __future__ import annotations

import hashlib
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import yaml

from raft_jax import errors
from raft_jax.config import schema
from raft_jax.hf import model_source
from raft_jax.storage import sealed_folder, shards

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
"""`organisation/model`, the only form of a base model that the hub accepts."""

HYPERPARAMETERS: Any = {
  "train": True,
  **dict.fromkeys(
    (
      *("lora", "recadam", "freeze", "soft_mask", "token_weights", "sentences"),
      *("prune", "hard_threshold", "interpolate"),
    ),
    True,
  ),
  "anchor": schema.Anchor.model_fields.keys() - {"questions"},
  "replay": {"share", "adaptive"},
  "validation": {"every", "limit", "max_drift", "patience", "keep"},
  "rollout": True,
  "distill": schema.Distill.model_fields.keys() - {"source"},
  "balance": True,
  "refine": {"similarity_threshold": True, "fusion": {"rounds", "accept_at"}},
}
"""The parts of the config that the card shows. They contain no paths and no hosts."""

CARD = """\
---
{front_matter}---

# {name}

{model}, fine-tuned for {step} steps with the method
`{method}` of raft_jax. RAFT adapts an instruction-tuned model to a domain. It refines
the training answers, and it distills from the original model on the student's own
rollouts, so that the student keeps its general abilities.
{tower}
## Use

{use}

## Data

{data}

## Hyperparameters

```yaml
{hyperparameters}```

## Evaluation

{evaluation}

## Citation

```bibtex
@misc{{raft,
  title  = {{Data Refinement and Adaptive Distillation for Domain Fine-Tuning with
            Alleviated Forgetting}},
  year   = {{2026}},
  eprint = {{2606.00147}},
  archivePrefix = {{arXiv}}
}}
```
"""


ANSWER = """\
prompt = tokenizer.apply_chat_template(
    [{"role": "user", "content": "Your question"}],
    add_generation_prompt=True, return_dict=True, return_tensors="pt",
)
answer = model.generate(**prompt, max_new_tokens=256, do_sample=False)
start = prompt["input_ids"].shape[1]
print(tokenizer.decode(answer[0, start:], skip_special_tokens=True))
"""

USE_MODEL = f"""\
The folder holds the chat template that the model was trained with. It is that of the
original model, unless the folder has a `chat_template.jinja`: then another template was
chosen, or the original one opens a thinking part in every prompt, which is closed here,
as in training. `FOLDER` is the folder of this file.

```python
import transformers

folder = "FOLDER"
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
model = transformers.AUTO_CLASS.from_pretrained(folder)
{ANSWER}```

```sh
vllm serve FOLDER
```"""

USE_ADAPTER = f"""\
This is a LoRA adapter (arXiv 2106.09685). `BASE` is the model that it was trained on,
`FOLDER` is where this file lies. If it holds a `chat_template.jinja`, the adapter was
trained with that: set `tokenizer.chat_template` to its text.

```python
import peft
import transformers

base, folder = "BASE", "FOLDER"
tokenizer = transformers.AutoTokenizer.from_pretrained(base)
model = transformers.AUTO_CLASS.from_pretrained(base)
model = peft.PeftModel.from_pretrained(model, folder)
{ANSWER}```"""


def hub_name(source: str) -> str | None:
  """The source if it names a model on the hub, else None."""
  named = HUB_NAME.fullmatch(source) and not pathlib.Path(source).exists()
  return source if named else None


def read_license(source: str) -> str | None:
  """The licence in the model card of the source folder, if it has one."""
  path = model_source.resolve(source) / "README.md"
  if not path.is_file():
    return None
  parts = path.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
  if len(parts) < 3 or parts[0].strip():
    return None
  try:
    front = yaml.safe_load(parts[1])
  except yaml.YAMLError:
    return None
  value = front.get("license") if isinstance(front, dict) else None
  return value if isinstance(value, str) else None


def describe_data(
  output: pathlib.Path, answers: str, *, sentences: bool = False
) -> str:
  """The number and the digest of the refined records that the run was trained on.

  Args:
    sentences: whether it was trained on sentences of documents instead.
  """
  if sentences:
    return "Trained on sentences of documents, without questions and answers."
  folder = output / "refined"
  if answers == "original" or not (folder / sealed_folder.MANIFEST).is_file():
    return "Trained on the original answers; there are no refined records."
  manifest = shards.read_manifest(folder)
  digest = hashlib.sha256((folder / sealed_folder.MANIFEST).read_bytes()).hexdigest()
  lines = [f"{manifest.records:,} refined records; sha256 of the manifest `{digest}`."]
  summary = _read_json(folder / "summary.json")
  if {"accepted", "questions", "threshold"} <= summary.keys():
    lines.append(
      f"{summary['accepted']:,} of {summary['questions']:,} rewrites were accepted at a"
      f" similarity of {summary['threshold']:g} or more; the other questions kept their"
      " original answer."
    )
  return "\n".join(lines)


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  if not path.is_file():
    return {}
  try:
    value = json.loads(path.read_bytes())
  except ValueError:
    value = None
  if not isinstance(value, dict):
    raise errors.UserError(
      f"{path}: damaged; run the stage that wrote it again, or delete the file to "
      "export without it"
    )
  return value


def read_scores(output: pathlib.Path) -> Mapping[str, Any]:
  """What `evaluate` wrote into a run's folder; {} if it was not run."""
  return _read_json(output / "evaluation" / "scores.json")


def describe_scores(
  scores: Mapping[str, Any], step: int, edits: Mapping[str, Any]
) -> str:
  """The table of scores, or a sentence that this checkpoint was not evaluated.

  Args:
    scores: from `read_scores`.
    step: the step of the exported checkpoint.
    edits: how the checkpoint was edited, as `trained_model.edits` returns it.
  """
  if scores.get("checkpoint_step") != step or scores.get("edits", {}) != edits:
    return "This checkpoint was not evaluated."
  lines = [
    f"Greedy answers to {scores['items']} held-out questions of the domain, with 95 %"
    " intervals over the questions. Differences are paired. Loss is in nats per token;"
    " lower is better.",
    "",
    "| score | base model | this model | difference |",
    "|---|---|---|---|",
  ]

  def cell(value: float, interval: Mapping[str, Any]) -> str:
    if "low" not in interval:  # not a mean over items
      return f"{value:.3f}"
    return f"{value:.3f} ({interval['low']:.3f} to {interval['high']:.3f})"

  for name, paired in scores["paired"].items():
    base, trained = (scores["scores"][model][name] for model in ("base", "trained"))
    lines.append(
      f"| {name.replace('_', ' ')} | {cell(base['value'], base)}"
      f" | {cell(trained['value'], trained)} | {cell(paired['difference'], paired)} |"
    )
  return "\n".join(lines)


def render(
  source: str,
  *,
  tower: str | None,
  method: str,
  adapter: bool,
  step: int,
  data: str,
  hyperparameters: Mapping[str, Any],
  scores: Mapping[str, Any],
  edits: Mapping[str, Any],
) -> str:
  """README.md of an exported folder, with the front matter of the hub.

  Args:
    source: of the base model.
    tower: what is trained of a model with a text tower, from
      `carried_tensors.describe`; None for a text model.
    adapter: whether the folder holds a LoRA adapter alone.
    step: the step of the exported checkpoint.
    data: from `describe_data`.
    hyperparameters: the config's values under `HYPERPARAMETERS`.
    scores: from `read_scores`.
    edits: how the checkpoint was edited, as `trained_model.edits` returns it.
  """
  front_matter: dict[str, Any] = {
    "library_name": "peft" if adapter else "transformers",
    "pipeline_tag": "text-generation" if tower is None else "image-text-to-text",
    "tags": sorted({"raft", "raft_jax", method}),
  }
  base = hub_name(source)
  if base is not None:
    front_matter["base_model"] = base
  license_name = read_license(source)
  if license_name is not None:
    front_matter["license"] = license_name
  use = USE_ADAPTER if adapter else USE_MODEL
  loader = "AutoModelForCausalLM" if tower is None else "AutoModelForImageTextToText"
  # The last part names the model; the whole path would tell of the user's machine.
  name = source.rstrip("/").rsplit("/", 1)[-1].removesuffix(".gguf")
  return CARD.format(
    front_matter=yaml.safe_dump(front_matter, sort_keys=True),
    name=f"{name}-{method}",
    model=name,
    method=method,
    step=f"{step:,}",
    tower="" if tower is None else f"\nWhat was trained is the {tower}.\n",
    use=use.replace("AUTO_CLASS", loader),
    data=data,
    hyperparameters=yaml.safe_dump(dict(hyperparameters), sort_keys=False),
    evaluation=describe_scores(scores, step, edits),
  )
