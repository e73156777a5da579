"""The decoder against transformers on the real SmolLM2-135M-Instruct, in float32.

Twenty chat prompts of different lengths; padding on either side must not matter; greedy
answers must be the same tokens; the exported folder must be the same model.
"""

import json
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from raft_jax.hf import chat, model_source
from raft_jax.hf import load as hf_load
from raft_jax.hf import save as hf_save
from raft_jax.models import sampling, transformer
from raft_jax.storage.records import Message

PROMPTS = 20
ABSOLUTE = 1e-3


class Real(NamedTuple):
  """The same weights on both sides, and the prompts."""

  source: str
  config: transformer.DecoderConfig
  params: transformer.Params
  reference: transformers.PreTrainedModel
  tokenizer: chat.ChatTokenizer
  prompts: list[list[int]]


def conversations(law: pathlib.Path) -> list[list[Message]]:
  """Twenty: bare questions, with a system message, after an earlier exchange."""
  rows = [json.loads(x) for x in (law / "test.jsonl").read_text().splitlines()]
  turns = []
  for n in range(PROMPTS):
    history = [Message("system", "Answer briefly. " * n)] if n % 3 == 1 else []
    if n % 5 == 4:
      history.append(Message("user", rows[-n]["question"]))
      history.append(Message("assistant", rows[-n]["answer"]))
    turns.append([*history, Message("user", rows[n]["question"])])
  return turns


@pytest.fixture(scope="module")
def real(smollm, law) -> Real:
  path = model_source.resolve(smollm)
  reference = transformers.AutoModelForCausalLM.from_pretrained(
    path.parent, gguf_file=path.name, dtype=torch.float32
  ).eval()
  config = hf_load.load_config(smollm)
  tokenizer = chat.load(smollm)
  prompts: list[list[int]] = []
  for turns in conversations(law):
    while len(ids := chat.prompt_ids(tokenizer, turns)) in map(len, prompts):
      turns[-1] = turns[-1]._replace(content=turns[-1].content + " Why?")
    prompts.append(ids)
  return Real(
    smollm, config, hf_load.load_params(smollm, config), reference, tokenizer, prompts
  )


def padded(rows: list[list[int]], pad: int, *, left: bool) -> tuple[np.ndarray, ...]:
  """ids_BT and valid_BT."""
  width = max(map(len, rows))
  ids_BT = np.full((len(rows), width), pad, np.int32)
  valid_BT = np.zeros((len(rows), width), bool)
  for i, row in enumerate(rows):
    place = slice(width - len(row), width) if left else slice(0, len(row))
    ids_BT[i, place], valid_BT[i, place] = row, True
  return ids_BT, valid_BT


def our_hidden(real: Real, *, left: bool) -> list[np.ndarray]:
  """Final hidden states [T, D] of each prompt, out of padded batches of five."""
  hidden = []
  run = jax.jit(
    lambda params, *args: transformer.forward(params, real.config, *args)[0]
  )
  for start in range(0, PROMPTS, 5):
    rows = real.prompts[start : start + 5]
    ids_BT, valid_BT = padded(rows, real.tokenizer.pad_id, left=left)
    mask_BTT = transformer.causal_mask(jnp.asarray(valid_BT))
    positions_BT = transformer.positions(jnp.asarray(valid_BT))
    hidden_BTD = np.asarray(run(real.params, ids_BT, positions_BT, mask_BTT))
    hidden.extend(hidden_BTD[i, valid] for i, valid in enumerate(valid_BT))
  return hidden


@torch.no_grad()
def their_logits(reference, ids: list[int]) -> np.ndarray:
  return reference(torch.tensor([ids])).logits[0].numpy()


@pytest.mark.slow
def test_logits_with_padding_on_either_side(real):
  embedding_VD = np.asarray(transformer.output_embedding(real.params))
  right, left = our_hidden(real, left=False), our_hidden(real, left=True)
  worst = {"right": 0.0, "left": 0.0, "between": 0.0}
  for ids, right_TD, left_TD in zip(real.prompts, right, left, strict=True):
    want_TV = their_logits(real.reference, ids)
    right_TV, left_TV = right_TD @ embedding_VD.T, left_TD @ embedding_VD.T
    for name, gap in (
      ("right", right_TV - want_TV),
      ("left", left_TV - want_TV),
      ("between", right_TV - left_TV),
    ):
      worst[name] = max(worst[name], float(np.abs(gap).max()))
  print("largest differences of logits:", worst)
  assert max(worst.values()) <= ABSOLUTE


@pytest.mark.slow
def test_greedy_answers_are_the_same_tokens(real):
  new = 64
  ids_BP, valid_BP = padded(real.prompts, real.tokenizer.pad_id, left=False)
  rollout = sampling.generate(
    real.params,
    real.config,
    ids_BP,
    valid_BP.sum(axis=1, dtype=np.int32),
    np.arange(PROMPTS, dtype=np.int32),
    seed=0,
    step=0,
    max_new_tokens=new,
    temperature=0.0,
    eos_ids=real.tokenizer.eos_ids,
    pad_id=real.tokenizer.pad_id,
  )
  ids_BP, valid_BP = padded(real.prompts, real.tokenizer.pad_id, left=True)
  with torch.no_grad():
    theirs_BT = real.reference.generate(
      torch.tensor(ids_BP, dtype=torch.long),
      attention_mask=torch.tensor(valid_BP, dtype=torch.long),
      do_sample=False,
      max_new_tokens=new,
      eos_token_id=list(real.tokenizer.eos_ids),
      pad_token_id=real.tokenizer.pad_id,
    ).numpy()[:, ids_BP.shape[1] :]
  lengths, ended = np.asarray(rollout.length_B), np.asarray(rollout.ended_B)
  for row, theirs in enumerate(theirs_BT):
    stops = np.flatnonzero(np.isin(theirs, real.tokenizer.eos_ids))
    length = int(stops[0]) + 1 if stops.size else new
    ours = np.asarray(rollout.tokens_BR[row, : lengths[row]])
    assert ours.tolist() == theirs[:length].tolist(), row
    assert bool(ended[row]) == bool(stops.size)
  assert 0 < ended.sum() < PROMPTS, "no row ends, or all do: choose other prompts"


@pytest.mark.slow
def test_exported_folder_gives_the_same_logits(real, tmp_path):
  hf_save.save(tmp_path / "out", real.params, real.config, real.source, card="")
  again = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "out", dtype=torch.float32
  ).eval()
  for ids in real.prompts[::5]:
    ours, want = their_logits(again, ids), their_logits(real.reference, ids)
    np.testing.assert_array_equal(ours, want)


@pytest.mark.parametrize("tied", [True, False])
def test_random_model_logits(tmp_path, tied):
  """A geometry unlike the real one: head width not D / H, a head of its own."""
  torch.manual_seed(0)
  reference = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
      vocab_size=90,
      hidden_size=48,
      intermediate_size=56,
      num_hidden_layers=2,
      num_attention_heads=6,
      num_key_value_heads=2,
      head_dim=12,
      max_position_embeddings=64,
      rope_theta=500.0,
      rms_norm_eps=1e-3,
      initializer_range=0.3,
      tie_word_embeddings=tied,
    )
  ).eval()
  with torch.no_grad():  # norms are born as ones, which would hide a swapped pair
    for name, parameter in reference.named_parameters():
      if "norm" in name:
        parameter.uniform_(0.5, 1.5)
  reference.save_pretrained(tmp_path)
  config = hf_load.load_config(str(tmp_path))
  params = hf_load.load_params(str(tmp_path), config)
  ids_BT = np.random.default_rng(0).integers(0, 90, (3, 20))
  valid_BT = jnp.ones(ids_BT.shape, bool)
  hidden_BTD, _ = transformer.forward(
    params,
    config,
    ids_BT,
    transformer.positions(valid_BT),
    transformer.causal_mask(valid_BT),
  )
  ours = np.asarray(hidden_BTD) @ np.asarray(transformer.output_embedding(params)).T
  with torch.no_grad():
    want = reference(torch.tensor(ids_BT)).logits.numpy()
  assert np.abs(want).max() > 1
  np.testing.assert_allclose(ours, want, atol=1e-4)
