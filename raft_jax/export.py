"""Stage 4: the trained model as a Hugging Face folder with a model card.

transformers and vLLM load the folder: float32 safetensors (the master weights, not
rounded), config, tokenizer with its chat template, generation config and README.md. A
model trained with LoRA can be exported as an adapter, which PEFT applies to the base
model. The folder can also be written as a GGUF file, and uploaded to the hub.
"""

from __future__ import annotations

import functools
import pathlib
import re
from collections.abc import Callable
from typing import NamedTuple

from raft_jax.config import cli, run_lock, schema
from raft_jax.hf import (
  carried_tensors,
  gguf_vocabulary,
  gguf_writer,
  hub_upload,
  ollama,
)
from raft_jax.hf import load as hf_load
from raft_jax.hf import save as hf_save
from raft_jax.hf import tokenizer as hf_tokenizer
from raft_jax.models import transformer
from raft_jax.reporting import model_card
from raft_jax.runtime import distributed, interrupts
from raft_jax.storage import atomic
from raft_jax.training import run_identity, run_inputs, run_plan, trained_model


class Exported(NamedTuple):
  """What was written: the folder, the bytes of all its files, its tensors, the step."""

  folder: pathlib.Path
  size: int
  tensors: int
  step: int


def main(config: schema.Config) -> None:
  """Exports the trained model and prints what was written."""
  distributed.refuse("export")
  wanted = config.export
  if wanted.gguf is not None:
    for target in _gguf_targets(config.output, wanted.gguf):
      check = gguf_writer if target.suffix == ".gguf" else ollama
      check.check_target(target)
    gguf_writer.describe(config.model.source, config.model.chat_template)
  if wanted.push is not None:
    hub_upload.check(wanted.push, public=wanted.public)
  exported = export(config)
  print(
    f"exported {exported.folder}: {exported.size / 1e6:,.1f} MB,"
    f" {exported.tensors} tensors, float32"
  )
  if wanted.gguf is not None:
    write_gguf(exported.folder, config.output, wanted.gguf)
  if wanted.push is not None:
    message = f"{config.method}, step {exported.step} (raft_jax)"
    address = hub_upload.push(
      exported.folder, wanted.push, public=wanted.public, message=message
    )
    print(f"pushed {wanted.push}: {address}")


def _gguf_targets(output: str, kind: str) -> tuple[pathlib.Path, pathlib.Path]:
  """The GGUF file and the Modelfile, named after the run's folder."""
  name = re.sub(r"[^\w.+-]", "_", pathlib.Path(output).resolve().name) or "model"
  folder = pathlib.Path(output) / "gguf"
  return folder / f"{name}-{kind}.gguf", folder / f"{name}-{kind}.Modelfile"


def write_gguf(folder: pathlib.Path, output: str, kind: str) -> None:
  """Writes the exported folder as a GGUF file with a Modelfile, and prints which."""
  path, modelfile = _gguf_targets(output, kind)
  name = path.stem.removesuffix(f"-{kind}")
  written = gguf_writer.write(folder, path, kind, name=name)
  print(
    f"wrote {path}: {written.size / 1e6:,.1f} MB, {written.tensors} tensors, {kind}"
  )
  tokenizer = hf_tokenizer.load(str(folder))
  ends = hf_tokenizer.eos_ids(str(folder), tokenizer)
  add_bos = gguf_vocabulary.adds_bos(tokenizer, str(folder))
  with atomic.replacing(modelfile) as temporary:
    text = ollama.modelfile(path.name, tokenizer, ends, add_bos=add_bos)
    temporary.write_text(text, encoding="utf-8")
  print(f"wrote {modelfile}")


def export(config: schema.Config) -> Exported:
  """Writes `output/export`, or the adapter alone to `output/adapter`.

  An export of an earlier checkpoint there is replaced.
  """
  # The card shows this config, so it must be the one that was trained.
  run_lock.check_lock(config, "train", run_inputs.IDENTITY_KEYS)
  source = config.model.source
  decoder = hf_load.load_config(source)
  interrupts.check()
  count = transformer.parameter_count(decoder)
  tower = carried_tensors.describe(source, count)
  if tower is not None:
    print(tower)
  card = functools.partial(
    model_card.render,
    source,
    tower=tower,
    method=config.method,
    adapter=config.export.adapter,
    data=model_card.describe_data(
      pathlib.Path(config.output),
      config.data.answers,
      sentences=config.sentences is not None,
    ),
    hyperparameters=config.model_dump(mode="json", include=model_card.HYPERPARAMETERS),
    scores=model_card.read_scores(pathlib.Path(config.output)),
    edits=trained_model.edits(config),
  )
  adapter_alone = config.export.adapter and config.lora is not None
  save = save_adapter if adapter_alone else save_model
  folder, step = save(config, decoder, card)
  size = sum(path.stat().st_size for path in folder.rglob("*"))
  return Exported(folder, size, hf_save.count_tensors(folder), step)


def save_adapter(
  config: schema.Config, decoder: transformer.DecoderConfig, card: Callable[..., str]
) -> tuple[pathlib.Path, int]:
  """Writes the adapter alone; returns its folder and the checkpoint's step."""
  source, lora = config.model.source, config.lora
  assert lora is not None
  split = run_plan.make_split(lora, source, decoder, config.train.seed)
  params, step = trained_model.load_trained_tree(
    config.output,
    config.validation,
    run_identity.model_identity(source, lora),
    split.shapes,
  )
  interrupts.check()
  folder = pathlib.Path(config.output) / "adapter"
  hf_save.save_adapter(
    folder,
    params["lora"],
    decoder,
    source,
    rank=lora.rank,
    alpha=lora.alpha,
    base_name=model_card.hub_name(source),
    template=hf_tokenizer.changed_template(
      source, config.model.chat_template, thinking=config.data.thinking == "keep"
    ),
    card=card(step=step),
    overwrite=True,
  )
  return folder, step


def save_model(
  config: schema.Config, decoder: transformer.DecoderConfig, card: Callable[..., str]
) -> tuple[pathlib.Path, int]:
  """Writes the whole model; returns its folder and the checkpoint's step."""
  params, step = trained_model.load(config, decoder)
  interrupts.check()
  folder = pathlib.Path(config.output) / "export"
  hf_save.save(
    folder,
    params,
    decoder,
    config.model.source,
    template=config.model.chat_template,
    thinking=config.data.thinking == "keep",
    card=card(step=step),
    overwrite=True,
  )
  return folder, step


if __name__ == "__main__":
  cli.run("export", main, "Write the trained model as a Hugging Face folder.")
