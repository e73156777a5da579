"""Stage 4: the trained model as a Hugging Face folder with a model card.

The folder is what transformers and vLLM load: float32 safetensors (the master weights,
unrounded), config, tokenizer with its chat template, generation config and README.md.
Or, of a model trained with LoRA, an adapter that PEFT lays over the base model.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import yaml

from raft_jax import errors
from raft_jax.config import cli, run_lock, schema
from raft_jax.hf import load as hf_load
from raft_jax.hf import save as hf_save
from raft_jax.hf import tokenizer as hf_tokenizer
from raft_jax.runtime import distributed, interrupts
from raft_jax.storage import sealed_folder, shards
from raft_jax.training import run_inputs, run_plan, trained_model

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
"""`organisation/model`, the only form that a card may give as its base model."""

HYPERPARAMETERS: Any = {
  "train": True,
  **dict.fromkeys(
    ("lora", "recadam", "freeze", "soft_mask", "prune", "interpolate"), True
  ),
  "anchor": schema.Anchor.model_fields.keys() - {"questions"},
  "replay": {"share", "adaptive"},
  "validation": {"every", "limit", "max_drift", "patience", "keep"},
  "rollout": True,
  "distill": schema.Distill.model_fields.keys() - {"source"},
  "balance": True,
  "refine": {"similarity_threshold": True, "fusion": {"rounds", "accept_at"}},
}
"""The parts of the config that the card shows; paths and hosts stay out of it."""

CARD = """\
---
{front_matter}---

# {name}

{model}, fine-tuned for {step} steps with the method
`{method}` of raft_jax. RAFT adapts an instruction-tuned model to a domain by refining
the answers that it learns from and by distilling from the original model on the
student's own rollouts, so that general abilities are kept.

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
The folder holds the chat template that the model was trained with: that of the model
that it was made from, or `chat_template.jinja` where another was chosen, or where its
own opens a thinking part in every prompt (here it is closed, as in training). `FOLDER`
is where this file lies.

```python
import transformers

folder = "FOLDER"
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
model = transformers.AutoModelForCausalLM.from_pretrained(folder)
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
model = transformers.AutoModelForCausalLM.from_pretrained(base)
model = peft.PeftModel.from_pretrained(model, folder)
{ANSWER}```"""


class Exported(NamedTuple):
  """What was written: the folder, bytes of all its files, tensors in it."""

  folder: pathlib.Path
  size: int
  tensors: int


def hub_name(source: str) -> str | None:
  """The source, if it is the name of a model on the hub."""
  named = HUB_NAME.fullmatch(source) and not pathlib.Path(source).exists()
  return source if named else None


def read_license(source: str) -> str | None:
  """The licence that the source folder's own model card states, if it has one."""
  path = hf_load.resolve(source) / "README.md"
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


def describe_data(output: pathlib.Path, answers: str) -> str:
  """Counts and hash of the refined records that the run learnt from."""
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
      f" similarity of {summary['threshold']:g} or more; the others kept their original"
      " answer."
    )
  return "\n".join(lines)


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  if not path.is_file():
    return {}
  try:
    found = json.loads(path.read_bytes())
  except ValueError:
    found = None
  if not isinstance(found, dict):
    raise errors.UserError(
      f"{path}: damaged; run the stage that wrote it again, or delete the file to "
      "export without it"
    )
  return found


def describe_scores(
  scores: Mapping[str, Any], step: int, edits: Mapping[str, Any]
) -> str:
  """The score table of this very model, or a sentence that says there is none.

  Args:
    edits: what was done to the checkpoint, as `trained_model.edits`.
  """
  if scores.get("checkpoint_step") != step or scores.get("edits", {}) != edits:
    return "This checkpoint was not evaluated."
  lines = [
    f"{scores['items']} held-out questions of the domain, greedy answers, 95 %"
    " intervals over items; differences are paired. Loss is in nats per token: lower is"
    " better.",
    "",
    "| score | base model | this model | difference |",
    "|---|---|---|---|",
  ]

  def cell(value: float, interval: Mapping[str, Any]) -> str:
    if "low" not in interval:  # no mean of items
      return f"{value:.3f}"
    return f"{value:.3f} ({interval['low']:.3f} to {interval['high']:.3f})"

  for name, paired in scores["paired"].items():
    base, trained = (scores["scores"][who][name] for who in ("base", "trained"))
    lines.append(
      f"| {name.replace('_', ' ')} | {cell(base['value'], base)}"
      f" | {cell(trained['value'], trained)} | {cell(paired['difference'], paired)} |"
    )
  return "\n".join(lines)


def card(config: schema.Config, step: int) -> str:
  """README.md of the exported folder, with the hub's front matter."""
  source, output = config.model.source, pathlib.Path(config.output)
  adapter = config.export.adapter
  scores = _read_json(output / "evaluation" / "scores.json")
  front: dict[str, Any] = {
    "library_name": "peft" if adapter else "transformers",
    "pipeline_tag": "text-generation",
    "tags": sorted({"raft", "raft_jax", config.method}),
  }
  base = hub_name(source)
  if base is not None:
    front["base_model"] = base
  license_name = read_license(source)
  if license_name is not None:
    front["license"] = license_name
  shown = config.model_dump(mode="json", include=HYPERPARAMETERS)
  # The last part names the model and, unlike the whole path, nothing of the machine.
  name = source.rstrip("/").rsplit("/", 1)[-1].removesuffix(".gguf")
  return CARD.format(
    front_matter=yaml.safe_dump(front, sort_keys=True),
    name=f"{name}-{config.method}",
    model=name,
    method=config.method,
    step=f"{step:,}",
    use=USE_ADAPTER if adapter else USE_MODEL,
    data=describe_data(output, config.data.answers),
    hyperparameters=yaml.safe_dump(shown, sort_keys=False),
    evaluation=describe_scores(
      scores, step, trained_model.edits(config.prune, config.interpolate)
    ),
  )


def export(config: schema.Config) -> Exported:
  """Writes `output/export`, or the adapter alone to `output/adapter`.

  An export of an earlier checkpoint there is replaced.
  """
  # The card states this config: it must be the one that was trained.
  run_lock.check_lock(config, "train", run_inputs.IDENTITY_KEYS)
  output, source = pathlib.Path(config.output), config.model.source
  decoder = hf_load.load_config(source)
  interrupts.check()
  if config.export.adapter and config.lora is not None:
    folder = output / "adapter"
    split = run_plan.make_split(config.lora, source, decoder, config.train.seed)
    identity = run_inputs.model_identity(source, config.lora)
    params, step = trained_model.load_trained_tree(
      config.output, config.validation, identity, split.shapes
    )
    interrupts.check()
    hf_save.save_adapter(
      folder,
      params["lora"],
      decoder,
      source,
      rank=config.lora.rank,
      alpha=config.lora.alpha,
      base_name=hub_name(source),
      template=hf_tokenizer.changed_template(source, config.model.chat_template),
      card=card(config, step),
      overwrite=True,
    )
  else:
    folder = output / "export"
    params, step = trained_model.load(config, decoder)
    interrupts.check()
    hf_save.save(
      folder,
      params,
      decoder,
      source,
      template=config.model.chat_template,
      card=card(config, step),
      overwrite=True,
    )
  size = sum(path.stat().st_size for path in folder.rglob("*"))
  return Exported(folder, size, hf_save.count_tensors(folder))


def main(config: schema.Config) -> None:
  """Exports and says what was written."""
  distributed.refuse("export")
  exported = export(config)
  print(
    f"exported {exported.folder}: {exported.size / 1e6:,.1f} MB,"
    f" {exported.tensors} tensors, float32"
  )


if __name__ == "__main__":
  cli.run("export", main, "Write the trained model as a Hugging Face folder.")
