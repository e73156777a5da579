"""Every family against transformers: logits, cached decoding, export, gradients.

Each model is tiny and random, made so that every feature of its family acts.
"""

import copy
import dataclasses
import functools
import json
import pathlib
import shutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from raft_jax.data import batching
from raft_jax.distillation import sequences
from raft_jax.hf import load as hf_load
from raft_jax.hf import save as hf_save
from raft_jax.models import (
  kv_cache,
  layer_functions,
  param_sharding,
  sampling,
  sharding,
  streaming,
  transformer,
)
from tests.helpers import tiny_families, tiny_step

VOCAB = tiny_families.TINY["vocab_size"]
LENGTHS = (40, 23, 7)
TINY = {
  **tiny_families.TINY,
  "initializer_range": 0.2,
  "bos_token_id": 1,
  "eos_token_id": 2,
  "pad_token_id": 0,
}


class Case(NamedTuple):
  """A tiny model of a family.

  Attributes:
    fields: of the config, beside `TINY`.
    matters: fields of our config that must change the logits when set to Llama's; not
      those, like norms and biases, with which the tree of parameters changes.
  """

  fields: dict[str, Any]
  matters: tuple[str, ...] = ()


GEMMA_MATTERS = (
  "ropes",
  "windows",
  "norm_offset",
  "activation",
  "embed_scale",
  "query_scale",
)
# Periods of 6 ... 2e3 positions, of which 16 were trained.
YARN = {
  "rope_type": "yarn",
  "rope_theta": 1e3,
  "factor": 4.0,
  "original_max_position_embeddings": 16,
  "beta_fast": 2.0,
  "beta_slow": 0.2,
}
# Periods of 6 ... 7e5 positions, of which 32 were trained: kept, blended, slowed.
LLAMA_3 = {
  "rope_type": "llama3",
  "rope_theta": 5e5,
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 32,
}
MSCALES = {"mscale": 1.0, "mscale_all_dim": 0.5}
CASES = {
  "llama": Case(
    {
      "head_dim": 16,
      "rope_parameters": LLAMA_3,
    },
    ("ropes",),
  ),
  "qwen2": Case(
    {
      "tie_word_embeddings": True,
      "use_sliding_window": True,
      "sliding_window": 5,
      "max_window_layers": 1,
    },
    ("windows",),
  ),
  "qwen3": Case({"head_dim": 16}),
  "mistral": Case({"head_dim": 16, "sliding_window": 6}, ("windows",)),
  "smollm3": Case({"num_hidden_layers": 5}, ("layer_ropes",)),
  "olmo2": Case({}),
  "phi3": Case({"sliding_window": 7}, ("windows",)),
  # The longest row is past the switch at 26 positions, the others end before it.
  "phi-4-mini": Case(
    {
      "model_type": "phi3",
      "tie_word_embeddings": True,
      "original_max_position_embeddings": 26,
      "partial_rotary_factor": 0.5,
      "auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
      "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.5,
        "short_factor": [1.0, 1.5, 2.0],
        "long_factor": [1.5, 3.0, 9.0],
        "original_max_position_embeddings": 26,
      },
    },
    ("ropes",),
  ),
  "qwen3_moe": Case(
    {
      **{"head_dim": 16, "num_hidden_layers": 2, "moe_intermediate_size": 20},
      **{"num_experts": 6, "num_experts_per_tok": 2, "norm_topk_prob": True},
    },
    ("experts_normalized",),
  ),
  "olmoe": Case(
    {
      **{"num_hidden_layers": 2, "intermediate_size": 20},
      **{"num_experts": 5, "num_experts_per_tok": 3},
    }
  ),
  "mixtral": Case(
    {
      **{"num_hidden_layers": 2, "intermediate_size": 20, "sliding_window": 6},
      **{"num_local_experts": 4, "num_experts_per_tok": 2},
    },
    ("windows", "experts_normalized"),
  ),
  "gpt_oss": Case(
    {
      **{"num_hidden_layers": 2, "intermediate_size": 20, "sliding_window": 6},
      **{"num_local_experts": 4, "num_experts_per_tok": 2, "swiglu_limit": 1.0},
      **{"head_dim": 16, "rope_parameters": {**YARN, "truncate": False}},
    },
    ("ropes", "windows", "gate_limit"),
  ),
  "gemma2": Case(
    {
      "head_dim": 16,
      "sliding_window": 6,
      "query_pre_attn_scalar": 20,
      "attn_logit_softcapping": 2.0,
      "final_logit_softcapping": 3.0,
      "hidden_activation": "gelu_pytorch_tanh",
      "tie_word_embeddings": True,
    },
    ("attention_softcap", "logit_softcap", "windows"),
  ),
  "gemma3_text": Case(
    {
      "num_hidden_layers": 4,
      "layer_types": ["sliding_attention", "full_attention"] * 2,
      "head_dim": 16,
      "sliding_window": 6,
      "query_pre_attn_scalar": 20,
      "hidden_activation": "gelu_pytorch_tanh",
      "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
      },
      "tie_word_embeddings": True,
    },
    GEMMA_MATTERS,
  ),
  # The scaling of the layers without a window blends the middle frequencies.
  "olmo3": Case(
    {
      "num_hidden_layers": 4,
      "head_dim": 16,
      "sliding_window": 6,
      "rope_parameters": {
        "full_attention": YARN,
        "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
      },
    },
    ("ropes", "windows"),
  ),
  "ministral3": Case(
    {
      "head_dim": 16,
      "tie_word_embeddings": True,
      "rope_parameters": {**YARN, "llama_4_scaling_beta": 0.4, **MSCALES},
    },
    ("ropes", "query_growth"),
  ),
  "granite": Case(
    {
      "embedding_multiplier": 3.0,
      "residual_multiplier": 0.3,
      "attention_multiplier": 0.1,
      "logits_scaling": 0.7,
    },
    ("embed_scale", "residual_scale", "query_scale", "hidden_scale"),
  ),
  "seed_oss": Case({"head_dim": 16}),
  "exaone4": Case(
    {
      "num_hidden_layers": 4,
      "sliding_window": 6,
      "sliding_window_pattern": 2,
    },
    ("layer_ropes", "windows"),
  ),
  "apertus": Case(
    {
      "rope_parameters": LLAMA_3,
    },
    ("ropes",),
  ),
  "arcee": Case({"rope_parameters": YARN}, ("ropes", "activation")),
  "glm": Case({"head_dim": 16}, ("ropes", "rope_interleaved")),
  "glm4": Case(
    {"head_dim": 16, "attention_bias": False}, ("ropes", "rope_interleaved")
  ),
  # Two periods of two layers, and a rest. A head's output is normalised, and is near 0
  # for some tokens: with 1e-6, transformers itself is 5e-5 from float64 there.
  "qwen3_5_text": Case(
    {
      "num_hidden_layers": 5,
      "rms_norm_eps": 1e-4,
      "layer_types": ["linear_attention", "full_attention"] * 2 + ["linear_attention"],
      "head_dim": 16,
      "linear_num_key_heads": 2,
      "linear_num_value_heads": 4,
      "linear_key_head_dim": 8,
      "linear_value_head_dim": 12,
    },
    ("ropes", "norm_offset"),
  ),
  # Two periods of two layers, and a rest. In the layers without a window, 2 of the 8
  # frequencies turn.
  "gemma4_text": Case(
    {
      "num_hidden_layers": 5,
      "layer_types": ["full_attention", "sliding_attention"] * 2 + ["full_attention"],
      **{"head_dim": 8, "global_head_dim": 16, "num_global_key_value_heads": 1},
      **{"attention_k_eq_v": True, "hidden_size_per_layer_input": 0},
      **{"sliding_window": 6, "final_logit_softcapping": 3.0},
      "tie_word_embeddings": True,
    },
    (
      "ropes",
      "windows",
      "value_norm",
      "activation",
      "embed_scale",
      "query_scale",
      "logit_softcap",
    ),
  ),
  # Of each kind, one period of two layers or two of them, and a rest. The last three
  # layers share the keys and values of the fourth and the fifth.
  "gemma-4-e2b": Case(
    {
      "model_type": "gemma4_text",
      "num_hidden_layers": 8,
      "layer_types": ["sliding_attention", "full_attention"] * 4,
      **{"num_kv_shared_layers": 3, "use_double_wide_mlp": True},
      **{"hidden_size_per_layer_input": 12, "vocab_size_per_layer_input": 90},
      **{"head_dim": 8, "global_head_dim": 16, "num_key_value_heads": 1},
      **{"sliding_window": 6, "final_logit_softcapping": 20.0, "rms_norm_eps": 1e-2},
      "tie_word_embeddings": True,
    }
  ),
  # Experts beside a dense feed-forward; keys are values in the global layer.
  "gemma-4-26b": Case(
    {
      "model_type": "gemma4_text",
      "num_hidden_layers": 2,
      "layer_types": ["sliding_attention", "full_attention"],
      **{"enable_moe_block": True, "num_experts": 6, "top_k_experts": 2},
      **{"moe_intermediate_size": 20, "hidden_size_per_layer_input": 0},
      **{"head_dim": 8, "global_head_dim": 16, "num_global_key_value_heads": 1},
      **{"attention_k_eq_v": True, "sliding_window": 6},
      "tie_word_embeddings": True,
    }
  ),
  # Its published models have no rotary positions.
  "olmo_hybrid": Case(
    {
      "num_hidden_layers": 2,
      "layer_types": ["linear_attention", "full_attention"],
      "rope_theta": None,
    },
    ("ropes",),
  ),
}


CASES["qwen3_5_moe_text"] = Case(
  {
    **CASES["qwen3_5_text"].fields,
    **{"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20},
    "shared_expert_intermediate_size": 12,
  },
  ("experts_normalized",),
)
# Differs from another family in the layout of its files alone.
LAYOUTS = {
  "qwen3_next": Case(
    {
      **CASES["qwen3_5_moe_text"].fields,
      "num_hidden_layers": 2,
      "layer_types": ["linear_attention", "full_attention"],
    }
  ),
}


# Whatever generates or differentiates is compiled for long: of the later families, fast
# tests do so for the one whose queries depend on their positions; and of mixtures of
# experts not for those whose parts are others' under other names.
FIRST = (*tuple(CASES)[: tuple(CASES).index("olmo3")], "ministral3")
COSTLY = [
  name
  if name in FIRST and name not in ("olmoe", "mixtral")
  else pytest.param(name, marks=pytest.mark.slow)
  for name in CASES
]
costly = pytest.mark.parametrize("made", COSTLY, indirect=True)


# Most of the time here is the compiler's.
FAST = {"xla_backend_optimization_level": 0}
forward = jax.jit(transformer.forward, static_argnums=1, compiler_options=FAST)


class Made(NamedTuple):
  """The same weights on both sides."""

  folder: pathlib.Path
  reference: transformers.PreTrainedModel
  config: transformer.DecoderConfig
  params: transformer.Params
  rows: list[np.ndarray]
  matters: tuple[str, ...]


def part_convolutions(folder: pathlib.Path, reference) -> None:
  """Parts the filters of queries, keys and values as the published models do.

  transformers joins them when it loads, and saves them in equal thirds, although values
  are wider than keys.
  """
  file = folder / "model.safetensors"
  tensors = safetensors.numpy.load_file(file)
  for name, joined in reference.state_dict().items():
    if name.endswith(".conv1d.weight"):
      mixer = reference.get_submodule(name.removesuffix(".conv1d.weight"))
      ends = (mixer.key_dim, 2 * mixer.key_dim)
      for kind, part in zip("qkv", np.split(joined.numpy(), ends), strict=True):
        own = name.replace(".conv1d.", f".{kind}_conv1d.")
        tensors[own] = np.ascontiguousarray(part)
  safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})


# The parts of the first are those of Gemma 4 E2B and 26B, too.
ALL = [
  pytest.param(name, marks=pytest.mark.slow) if name == "gemma4_text" else name
  for name in CASES
]


@pytest.fixture(scope="module", params=ALL)
def made(request, tokenizer_folder, tmp_path_factory) -> Made:
  case = {**CASES, **LAYOUTS}[request.param]
  folder = tmp_path_factory.mktemp(request.param)
  fields = {**TINY, "model_type": request.param, **case.fields}
  torch.manual_seed(0)
  reference = transformers.AutoModelForCausalLM.from_config(
    transformers.AutoConfig.for_model(**fields), attn_implementation="eager"
  ).eval()
  with torch.no_grad():  # norms are born the same and biases 0: either hides a mistake
    for name, parameter in reference.named_parameters():
      if "norm" in name:
        parameter += torch.empty_like(parameter).uniform_(-0.5, 0.5)
      if name.endswith("scale"):  # of a router and of its experts
        parameter.uniform_(0.5, 1.5)
      if name.endswith("bias") or "alpha" in name:
        parameter.normal_()
    for name, buffer in reference.named_buffers():
      if name.endswith("layer_scalar"):
        buffer.uniform_(0.5, 1.5)
  reference.save_pretrained(folder)
  if request.param == "olmo_hybrid":
    part_convolutions(folder, reference)
  shutil.copytree(tokenizer_folder, folder, dirs_exist_ok=True)
  config = hf_load.load_config(str(folder))
  rng = np.random.default_rng(0)
  rows = [rng.integers(3, VOCAB, length).astype(np.int32) for length in LENGTHS]
  params = hf_load.load_params(str(folder), config)
  return Made(folder, reference, config, params, rows, case.matters)


def padded(rows: list[np.ndarray], *, left: bool) -> tuple[np.ndarray, np.ndarray]:
  width = max(map(len, rows)) + 3
  ids_BT = np.full((len(rows), width), VOCAB - 1, np.int32)
  valid_BT = np.zeros((len(rows), width), bool)
  for i, row in enumerate(rows):
    place = slice(width - len(row), width) if left else slice(0, len(row))
    ids_BT[i, place], valid_BT[i, place] = row, True
  return ids_BT, valid_BT


def head(
  params: transformer.Params, config: transformer.DecoderConfig, hidden
) -> np.ndarray:
  logits = np.asarray(hidden) @ np.asarray(transformer.output_embedding(params)).T
  cap = config.logit_softcap
  return cap * np.tanh(logits / cap) if cap else logits


def our_logits(
  params, config, rows: list[np.ndarray], *, left: bool = False
) -> list[np.ndarray]:
  ids_BT, valid_BT = padded(rows, left=left)
  hidden_BTD, _ = forward(
    params,
    config,
    ids_BT,
    transformer.positions(jnp.asarray(valid_BT)),
    transformer.causal_mask(jnp.asarray(valid_BT)),
  )
  logits_BTV = head(params, config, hidden_BTD)
  return [logits_BTV[i, valid] for i, valid in enumerate(valid_BT)]


@torch.no_grad()
def their_logits(reference, rows: list[np.ndarray]) -> list[np.ndarray]:
  return [reference(torch.tensor(row[None])).logits[0].numpy() for row in rows]


def gap(ours: list[np.ndarray], theirs: list[np.ndarray]) -> float:
  """Largest difference, relative to the largest logit."""
  scale = max(np.abs(x).max() for x in theirs)
  return max(np.abs(a - b).max() for a, b in zip(ours, theirs, strict=True)) / scale


def test_logits_equal_transformers(made):
  theirs = their_logits(made.reference, made.rows)
  gaps = [
    gap(our_logits(made.params, made.config, made.rows, left=left), theirs)
    for left in (False, True)
  ]
  print(f"{made.folder.name}: {max(gaps):.1e}")
  assert max(gaps) <= 2e-5
  assert max(np.abs(x).max() for x in theirs) > 1


def test_every_feature_acts(made):
  """The logits above would not have been equal without it."""
  theirs = their_logits(made.reference, made.rows)
  defaults = {f.name: f.default for f in dataclasses.fields(transformer.DecoderConfig)}
  for name in made.matters:
    plain = dataclasses.replace(made.config, **{name: defaults[name]})
    assert plain != made.config, name
    assert gap(our_logits(made.params, plain, made.rows), theirs) > 1e-3, name


@pytest.mark.parametrize("made", ["gemma4_text"], indirect=True)
def test_global_layers_have_a_rotation_of_their_own(made):
  own = made.config.global_attention
  theirs = their_logits(made.reference, made.rows)
  for rope in (dataclasses.replace(own.rope, divisors=()), made.config.ropes[0]):
    other = dataclasses.replace(own, rope=rope)
    plain = dataclasses.replace(made.config, global_attention=other)
    assert gap(our_logits(made.params, plain, made.rows), theirs) > 1e-3


def greedy(
  made: Made, rows: list[np.ndarray], *, new: int, unroll: int = 1
) -> np.ndarray:
  ids_BP, valid_BP = padded(rows, left=False)
  arrays = (
    ids_BP,
    valid_BP.sum(axis=1, dtype=np.int32),
    np.arange(len(ids_BP), dtype=np.int32),
  )
  program = sampling.generate.lower(
    made.params,
    made.config,
    *arrays,
    seed=0,
    step=0,
    max_new_tokens=new,
    temperature=0.0,
    eos_ids=(VOCAB,),  # none: every row runs on
    pad_id=0,
    unroll=unroll,
  ).compile(FAST)
  return np.asarray(program(made.params, *arrays, seed=0, step=0).tokens_BR)


@pytest.mark.parametrize("made", ["qwen3_5_text", "gemma-4-e2b"], indirect=True)
def test_layers_of_several_kinds_have_parts_of_the_cache(made):
  """Ragged prompts, with layers apart, as rollouts on GPUs have them."""
  check_greedy(made, made.rows[1:], new=6, unroll=0)


@costly
def test_greedy_answers_equal_transformers(made):
  """Prefill and cached decoding of right-padded prompts, against no cache at all."""
  check_greedy(made, made.rows, new=14)


def check_greedy(made: Made, rows: list[np.ndarray], **options: int) -> None:
  for row, answer in zip(rows, greedy(made, rows, **options), strict=True):
    whole = np.concatenate([row, answer])
    (logits_TV,) = their_logits(made.reference, [whole])
    want = logits_TV[len(row) - 1 : -1].argmax(axis=-1)
    np.testing.assert_array_equal(answer, want)


@costly
def test_cached_decoding_equals_one_forward(made):
  """In two pieces, the second of which begins inside every window."""
  row = made.rows[0][None]
  column = jnp.arange(row.shape[1])
  want = our_logits(made.params, made.config, made.rows)[0]
  cache, parts = kv_cache.init(made.config, 1, row.shape[1]), []
  for start, stop in ((0, 9), (9, 40)):
    part, cache = forward(
      made.params,
      made.config,
      row[:, start:stop],
      column[None, start:stop],
      (column[None, :] <= column[start:stop, None])[None],
      cache=cache,
      column=start,
      reach_B=jnp.array([row.shape[1]]),
    )
    parts.append(head(made.params, made.config, part[0]))
  assert gap([np.concatenate(parts)], [want]) <= 2e-5


@costly
def test_two_turns_of_a_chat_equal_transformers(made):
  """The second one reads the first from the cache; it reaches behind every window."""
  network = streaming.network(made.params, made.config, transformer.FLOAT32)
  drawing = streaming.Drawing(8, 0.0, 1.0, eos_ids=(VOCAB,), seed=0, step=0)
  memory, row = streaming.Memory(), made.rows[2]
  for question in (row, made.rows[1]):
    prompt = np.concatenate([row, question]) if question is not row else row
    answer = list(streaming.stream(network, memory, prompt.tolist(), drawing))
    row = np.concatenate([prompt, answer])
    (logits_TV,) = their_logits(made.reference, [row])
    want = logits_TV[len(prompt) - 1 : -1].argmax(axis=-1)
    np.testing.assert_array_equal(answer, want)


@pytest.mark.parametrize(
  "made",
  [
    "olmo3",
    "ministral3",
    "exaone4",
    pytest.param("gemma4_text", marks=pytest.mark.slow),
  ],
  indirect=True,
)
def test_two_answers_in_one_row_equal_separate_passes(made):
  """Both follow the prompt in their positions, and neither sees the other."""
  prompt, first, second = made.rows[1], made.rows[0][:20], made.rows[0][20:]
  row = np.concatenate([prompt, first, second])
  part = np.repeat([0, 1, 2], [len(prompt), len(first), len(second)])
  place = np.concatenate([np.arange(len(prompt) + 20), len(prompt) + np.arange(20)])
  shared = (part[:, None] == part) | (part == 0)
  mask_TS = shared & (place <= place[:, None])
  hidden, _ = forward(made.params, made.config, row[None], place[None], mask_TS[None])
  logits = head(made.params, made.config, hidden[0])
  for branch, answer in ((1, first), (2, second)):
    (want,) = their_logits(made.reference, [np.concatenate([prompt, answer])])
    own = (part == 0) | (part == branch)
    assert gap([logits[own]], [want]) <= 2e-5


@pytest.mark.parametrize("made", ["phi-4-mini"], indirect=True)
@pytest.mark.parametrize("reach", [26, 27])
def test_a_row_is_turned_by_the_length_it_may_come_to(made, reach):
  """20 tokens of a row of 26, which is short, or of 27, which is long."""
  start, row = 20, made.rows[0][:reach]
  (whole,) = their_logits(made.reference, [row])
  (alone,) = their_logits(made.reference, [row[:start]])
  column, valid = jnp.arange(start)[None], jnp.ones((1, start), bool)
  hidden, _ = forward(
    made.params,
    made.config,
    row[None, :start],
    column,
    transformer.causal_mask(valid),
    reach_B=jnp.array([reach]),
  )
  ours = head(made.params, made.config, hidden[0])
  assert gap([ours], [whole[:start]]) <= 2e-5
  assert (gap([ours], [alone]) <= 2e-5) == (reach == 26)


HYBRIDS = ["qwen3_5_text", "olmo_hybrid", "qwen3_5_moe_text"]


def packed(rows: list[tuple[np.ndarray, ...]]) -> tuple[batching.Batch, Any]:
  """Prompts, answers and trajectories of different lengths, as one batch."""
  segments = []
  for part in zip(*rows, strict=True):
    ids_BT, valid_BT = padded(list(part), left=False)
    segments += [ids_BT, valid_BT.sum(axis=1, dtype=np.int32)]
  prompts, answers, trajectory = segments[:2], segments[2:4], segments[4:]
  batch = batching.Batch(*prompts, *answers, *prompts, np.arange(len(rows)))
  return batch, sequences.Trajectory(*trajectory)


@pytest.mark.parametrize("made", [*HYBRIDS, "gemma-4-e2b"], indirect=True)
def test_packed_row_equals_separate_passes(made):
  """[prompt | answer | trajectory], of which the last two do not see each other."""
  rng = np.random.default_rng(1)
  lengths = ((40, 7, 3), (2, 1, 11), (19, 5, 6))
  rows = [tuple(rng.integers(3, VOCAB, n) for n in row) for row in lengths]
  compute = transformer.FLOAT32
  packed_hidden = jax.jit(
    lambda *args: sequences.student_hidden(args[0], made.config, *args[1:], compute),
    compiler_options=FAST,
  )
  hidden = packed_hidden(made.params, *packed(rows))
  for part, hidden_BTD in enumerate(hidden, 1):
    wholes = [np.concatenate([row[0], row[part]]) for row in rows]
    theirs = [
      logits[len(row[0]) - 1 : -1]
      for logits, row in zip(their_logits(made.reference, wholes), rows, strict=True)
    ]
    ours = [
      head(made.params, made.config, hidden_TD[: len(row[part])])
      for hidden_TD, row in zip(hidden_BTD, rows, strict=True)
    ]
    assert gap(ours, theirs) <= 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("made", HYBRIDS[:1], indirect=True)
def test_a_packed_rows_gradient_is_that_of_separate_passes(made):
  """Also with recomputed layers, and with all layers in one iteration."""
  rng = np.random.default_rng(2)
  row = tuple(rng.integers(3, VOCAB, n) for n in (9, 4, 5))
  weights = [rng.normal(size=(n, made.config.d_model)) for n in (4, 5)]

  def of_packed(params, compute):
    hidden = sequences.student_hidden(params, made.config, *packed([row]), compute)
    return sum(jnp.sum(h[0, : len(w)] * w) for h, w in zip(hidden, weights))

  def of_separate(params):
    total = 0.0
    for part, weight in zip(row[1:], weights):
      ids, valid = (
        np.concatenate([row[0], part])[None],
        jnp.ones((1, 9 + len(part)), bool),
      )
      hidden, _ = transformer.forward(
        params,
        made.config,
        ids,
        transformer.positions(valid),
        transformer.causal_mask(valid),
      )
      total += jnp.sum(hidden[0, 8:-1] * weight)
    return total

  def gradient(function):
    return jax.jit(jax.grad(function), compiler_options=FAST)(made.params)

  want = gradient(of_separate)
  for compute in (transformer.FLOAT32, transformer.Compute(remat=True, unroll=0)):
    got = gradient(functools.partial(of_packed, compute=compute))
    tiny_step.assert_trees_close(got, want, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("made", HYBRIDS[:1], indirect=True)
def test_a_chat_whose_history_was_changed_is_read_anew(made):
  """A state cannot be taken back to an earlier token, as keys and values can."""
  network = streaming.network(made.params, made.config, transformer.FLOAT32)
  drawing = streaming.Drawing(3, 0.0, 1.0, eos_ids=(VOCAB,), seed=0, step=0)
  memory = streaming.Memory()
  first, second = made.rows[1], np.concatenate([made.rows[1][:9], made.rows[2]])
  for prompt in (first, second, second):
    answer = list(streaming.stream(network, memory, prompt.tolist(), drawing))
    (logits_TV,) = their_logits(made.reference, [np.concatenate([prompt, answer])])
    want = logits_TV[len(prompt) - 1 : -1].argmax(axis=-1)
    np.testing.assert_array_equal(answer, want)


@pytest.mark.parametrize("made", ["qwen3_next"], indirect=True)
def test_projections_that_are_fused_head_by_head(made, tmp_path):
  theirs = their_logits(made.reference, made.rows)
  assert gap(our_logits(made.params, made.config, made.rows), theirs) <= 2e-5
  hf_save.save(tmp_path / "out", made.params, made.config, str(made.folder), card="")
  before, after = (
    safetensors.numpy.load_file(folder / "model.safetensors")
    for folder in (made.folder, tmp_path / "out")
  )
  jax.tree.map(np.testing.assert_array_equal, after, before)


@pytest.mark.parametrize("made", ["qwen3_5_moe_text"], indirect=True)
def test_files_that_stack_a_layers_experts(made, tmp_path):
  """As the published models have them; transformers writes one by one."""
  shutil.copytree(made.folder, tmp_path / "stacked")
  file = tmp_path / "stacked/model.safetensors"
  tensors = safetensors.numpy.load_file(file)
  for layer in range(made.config.n_layers):
    prefix = f"model.layers.{layer}.mlp.experts"
    parts = {
      kind: np.stack(
        [
          tensors.pop(f"{prefix}.{expert}.{kind}_proj.weight")
          for expert in range(made.config.n_experts)
        ]
      )
      for kind in ("gate", "up", "down")
    }
    both = np.concatenate([parts["gate"], parts["up"]], axis=1)
    tensors |= {f"{prefix}.gate_up_proj": both, f"{prefix}.down_proj": parts["down"]}
  safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
  again = hf_load.load_params(str(file.parent), made.config)
  jax.tree.map(np.testing.assert_array_equal, again, made.params)
  hf_save.save(tmp_path / "out", again, made.config, str(file.parent), card="")
  after = safetensors.numpy.load_file(tmp_path / "out/model.safetensors")
  jax.tree.map(np.testing.assert_array_equal, after, tensors)


@pytest.mark.parametrize("made", ["qwen3_5_moe_text"], indirect=True)
@pytest.mark.parametrize("unroll", [1, 0])
def test_every_layer_of_a_hybrid_measures_its_load(made, unroll):
  """Two periods and a rest; each counted token chooses two experts in each layer."""
  ids_BT, valid_BT = padded(made.rows, left=False)
  compute = transformer.FLOAT32._replace(unroll=unroll)
  load = jax.jit(
    lambda params: (
      transformer.run(
        params,
        made.config,
        ids_BT,
        transformer.positions(jnp.asarray(valid_BT)),
        transformer.causal_mask(jnp.asarray(valid_BT)),
        compute=compute,
        counted_BT=valid_BT,
      ).load
    ),
    compiler_options=FAST,
  )(made.params)
  assert load.chosen_E.shape == (5, 5)
  np.testing.assert_allclose(load.chosen_E.sum(axis=1), 2 * valid_BT.sum())
  (blocks,) = ([layer.mlp for layer in made.reference.model.layers],)
  seen: list[torch.Tensor] = []
  hooks = [
    mlp.gate.register_forward_hook(lambda _, __, out: seen.append(out[2]))
    for mlp in blocks
  ]
  their_logits(made.reference, made.rows)
  for hook in hooks:
    hook.remove()
  for layer in range(5):
    chosen = torch.cat([ids.reshape(-1) for ids in seen[layer::5]])
    want = np.bincount(chosen.numpy(), minlength=5)
    np.testing.assert_array_equal(load.chosen_E[layer], want)


def test_norm_rounds_as_in_transformers(made):
  """In bfloat16 the order of scaling and rounding shows."""
  norm = copy.deepcopy(made.reference.model.norm).to(torch.bfloat16)
  x = torch.randn(200, norm.weight.shape[0]).to(torch.bfloat16)
  want = norm(x).float().detach().numpy()

  def share_that_differs(config: transformer.DecoderConfig) -> float:
    scale = made.params["final_norm"].astype(jnp.bfloat16)
    ours = layer_functions.rms_norm(
      jnp.array(x.float().numpy(), "bfloat16"),
      scale,
      eps=config.rms_eps,
      offset=config.norm_offset,
      rounds_last=config.norm_rounds_last,
    )
    return float(np.mean(np.asarray(ours, np.float32) != want))

  other = not made.config.norm_rounds_last
  wrong = dataclasses.replace(made.config, norm_rounds_last=other)
  print(share_that_differs(made.config), share_that_differs(wrong))
  assert share_that_differs(made.config) < 1e-3 < 0.1 < share_that_differs(wrong)


# The files of published OLMo Hybrids have the second names; transformers reads both.
WRITTEN = {
  "attention_layer_norm": "input_layernorm",
  "feedforward_layer_norm": "post_attention_layernorm",
}


def tensor_names(folder: pathlib.Path) -> set[str]:
  names = set()
  for path in folder.glob("*.safetensors"):
    with safetensors.safe_open(path, framework="numpy") as file:
      names |= {
        ".".join(WRITTEN.get(part, part) for part in name.split("."))
        for name in file.keys()  # noqa: SIM118 (not a dict)
      }
  return names


def test_export_and_second_load(made, tmp_path):
  out = tmp_path / "out"
  hf_save.save(out, made.params, made.config, str(made.folder), card="")
  again = transformers.AutoModelForCausalLM.from_pretrained(
    out, dtype=torch.float32, attn_implementation="eager"
  ).eval()
  for ours, want in zip(
    their_logits(again, made.rows),
    their_logits(made.reference, made.rows),
    strict=True,
  ):
    np.testing.assert_array_equal(ours, want)
  assert hf_load.load_config(str(out)) == made.config
  assert tensor_names(out) == tensor_names(made.folder)
  second = hf_load.load_params(str(out), made.config)
  assert jax.tree.structure(second) == jax.tree.structure(made.params)
  jax.tree.map(np.testing.assert_array_equal, second, made.params)
  before, after = (
    json.loads((folder / "config.json").read_text()) for folder in (made.folder, out)
  )
  assert after.pop(hf_save.MARK)
  assert after.pop("tie_word_embeddings") == made.config.tie_embeddings
  for name in ("tie_word_embeddings", "auto_map"):
    before.pop(name, None)
  assert before == after


@costly
def test_tree_is_shardable_and_trainable(made):
  """Every parameter has axes that the table knows, and a gradient that is not 0."""
  shapes = transformer.shapes(made.config)
  assert jax.tree.map(lambda x: x.shape, shapes) == jax.tree.map(
    lambda x: x.shape, made.params
  )
  mesh = sharding.make_mesh(1, -1, 1)
  places = sharding.tree(mesh, param_sharding.axes(made.config), shapes)
  loaded = hf_load.load_params(str(made.folder), made.config, shardings=places)
  jax.tree.map(np.testing.assert_array_equal, loaded, made.params)
  row = jnp.asarray(made.rows[1][None])
  valid = jnp.ones(row.shape, bool)

  @functools.partial(jax.jit, compiler_options=FAST)
  @jax.grad
  def gradient(params):
    hidden, _ = transformer.forward(
      params,
      made.config,
      row,
      transformer.positions(valid),
      transformer.causal_mask(valid),
    )
    logits = jnp.einsum("btd,vd->btv", hidden, transformer.output_embedding(params))
    return -jnp.mean(jax.nn.log_softmax(logits)[..., 5])

  for path, leaf in jax.tree.leaves_with_path(gradient(made.params)):
    largest = jnp.abs(leaf).max(axis=tuple(range(1, leaf.ndim)))
    if "layer_scale" in str(path):  # it is a buffer, and stays as it is
      assert (largest == 0).all(), path
      continue
    if "layers" in str(path):
      assert (largest > 0).all(), path
    assert jnp.isfinite(leaf).all(), path
    assert largest.max() > 0, path
