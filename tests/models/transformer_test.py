"""The decoder against transformers' Llama and against itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from raft_jax.models import kv_cache, param_sharding, rotary, transformer
from tests.helpers import tiny_decoder


def torch_llama(params, config):
  """transformers' Llama with our parameters under its names."""
  theirs = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
      vocab_size=config.vocab_size,
      hidden_size=config.d_model,
      num_hidden_layers=config.n_layers,
      num_attention_heads=config.n_heads,
      num_key_value_heads=config.n_kv_heads,
      head_dim=config.head_dim,
      intermediate_size=config.d_ff,
      rms_norm_eps=config.rms_eps,
      rope_theta=config.rope_theta,
      max_position_embeddings=config.max_positions,
      tie_word_embeddings=config.tie_embeddings,
    )
  ).eval()
  names = {
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    **{short: f"self_attn.{short}_proj" for short in "qkvo"},
    **{short: f"mlp.{short}_proj" for short in ("gate", "up", "down")},
  }
  state = {
    "model.embed_tokens.weight": params["embed"],
    "model.norm.weight": params["final_norm"],
    "lm_head.weight": transformer.output_embedding(params),
  }
  for short, leaf in params["layers"].items():
    for index in range(config.n_layers):
      state[f"model.layers.{index}.{names[short]}.weight"] = leaf[index]
  theirs.load_state_dict({k: torch.tensor(np.array(v)) for k, v in state.items()})
  return theirs


@pytest.mark.parametrize("tie", [True, False])
def test_logits_equal_transformers(tie):
  config = dataclasses.replace(tiny_decoder.CONFIG, tie_embeddings=tie)
  params = tiny_decoder.random_params(config)
  tokens = np.random.default_rng(0).integers(0, 97, (3, 40))
  with torch.no_grad():
    theirs = torch_llama(params, config)(torch.tensor(tokens)).logits.numpy()
  ours = tiny_decoder.logits(
    params, config, jnp.array(tokens), jnp.ones(tokens.shape, bool)
  )
  np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max())


def test_random_parameters_have_the_types_of_loaded_ones():
  """With a weak type, the second step of a run would compile again."""
  params = transformer.init(jax.random.key(0), tiny_decoder.CONFIG)
  for path, leaf in jax.tree.leaves_with_path(params):
    assert leaf.dtype == jnp.float32, path
    assert not leaf.weak_type, path


def test_padding_on_either_side_is_immaterial():
  params = tiny_decoder.random_params()
  row = jnp.arange(1, 8)[None]
  alone = tiny_decoder.logits(params, tiny_decoder.CONFIG, row, jnp.ones((1, 7), bool))
  for left, right in ((0, 5), (5, 0), (2, 3)):
    padded = jnp.pad(row, ((0, 0), (left, right)), constant_values=96)
    valid = jnp.pad(jnp.ones((1, 7), bool), ((0, 0), (left, right)))
    got = tiny_decoder.logits(params, tiny_decoder.CONFIG, padded, valid)[
      :, left : left + 7
    ]
    np.testing.assert_allclose(got, alone, atol=1e-5)


def test_no_gradient_reaches_a_later_token():
  params = tiny_decoder.random_params()
  params["head"] = params["embed"]  # so that the head's own gradient is kept apart
  tokens = jnp.arange(10)[None]
  valid = jnp.ones((1, 10), bool)

  def scores_of_token_3(embed):
    return tiny_decoder.logits(
      {**params, "embed": embed}, tiny_decoder.CONFIG, tokens, valid
    )[0, 3].sum()

  touched = jnp.abs(jax.grad(scores_of_token_3)(params["embed"])).sum(axis=-1)
  assert (touched[:4] > 0).all()
  assert (touched[4:10] == 0).all()


def test_cached_decoding_equals_one_forward():
  params = tiny_decoder.random_params()
  tokens = jax.random.randint(jax.random.key(2), (2, 12), 0, 97)
  valid = jnp.ones((2, 12), bool)
  hidden, _ = transformer.forward(
    params,
    tiny_decoder.CONFIG,
    tokens,
    transformer.positions(valid),
    transformer.causal_mask(valid),
  )
  cache = kv_cache.init(tiny_decoder.CONFIG, 2, 12)
  column = jnp.arange(12)
  pieces = []
  for start, stop in ((0, 5), (5, 6), (6, 7), (7, 12)):
    mask = jnp.broadcast_to(
      column[None, :] <= jnp.arange(start, stop)[:, None], (2, stop - start, 12)
    )
    piece, cache = transformer.forward(
      params,
      tiny_decoder.CONFIG,
      tokens[:, start:stop],
      jnp.broadcast_to(jnp.arange(start, stop), (2, stop - start)),
      mask,
      cache=cache,
      column=start,
    )
    pieces.append(piece)
  np.testing.assert_allclose(jnp.concatenate(pieces, 1), hidden, atol=2e-5)


@pytest.mark.parametrize("change", [{"remat": True}, {"unroll": 0}])
def test_remat_and_unroll_change_no_gradient(change):
  params = tiny_decoder.random_params()
  tokens = jnp.arange(12).reshape(2, 6)
  valid = jnp.ones((2, 6), bool)

  def gradient(compute):
    return jax.grad(
      lambda p: jnp.sum(
        jnp.square(
          tiny_decoder.logits(p, tiny_decoder.CONFIG, tokens, valid, compute=compute)
        )
      )
    )(params)

  plain = gradient(transformer.FLOAT32)
  other = gradient(transformer.Compute(**change))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      b, a, rtol=1e-4, atol=1e-5 * float(jnp.abs(a).max())
    ),
    plain,
    other,
  )


def test_layers_apart_compute_what_they_compute_in_a_stack():
  """With all that may differ between layers, in prefill and decoding."""
  config = dataclasses.replace(
    tiny_decoder.CONFIG,
    ropes=(rotary.Rope(1e4), rotary.Rope(1e2)),
    layer_ropes=(0, 1, 0),
    windows=(2, 0, 3),
  )
  params = tiny_decoder.random_params(config)
  valid = jnp.arange(6) < jnp.array([[6], [4]])
  seen = jnp.pad(transformer.causal_mask(valid), ((0, 0), (0, 0), (0, 2)))
  next_seen = jnp.concatenate([valid, jnp.array([[True, False]] * 2)], 1)[:, None]

  def run(params):
    cache = kv_cache.init(config, 2, 8)
    tokens, places = jnp.arange(12).reshape(2, 6), transformer.positions(valid)
    first, cache = transformer.forward(
      params, config, tokens, places, seen, cache=cache
    )
    second, cache = transformer.forward(
      *(params, config, jnp.array([[7], [9]]), jnp.array([[6], [4]]), next_seen),
      cache=cache,
      column=6,
    )
    return first, second, cache

  apart = param_sharding.gathered(params, config, "float32", apart=True)
  assert len(apart["layers"]) == 3
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
    run(params),
    run(apart),
  )


def test_bfloat16_activations_stay_near_float32():
  params = tiny_decoder.random_params()
  tokens = jnp.arange(12).reshape(2, 6)
  valid = jnp.ones((2, 6), bool)
  exact, _ = transformer.forward(
    params,
    tiny_decoder.CONFIG,
    tokens,
    transformer.positions(valid),
    transformer.causal_mask(valid),
  )
  rounded, _ = transformer.forward(
    params,
    tiny_decoder.CONFIG,
    tokens,
    transformer.positions(valid),
    transformer.causal_mask(valid),
    compute=transformer.Compute(dtype="bfloat16"),
  )
  assert rounded.dtype == jnp.bfloat16
  # bfloat16 keeps 8 bits: a relative error of a few 2^-8 after three layers.
  error = np.linalg.norm(rounded.astype(jnp.float32) - exact) / np.linalg.norm(exact)
  assert 1e-4 < error < 0.03


def test_axes_name_every_dimension_of_every_parameter():
  for tie in (True, False):
    config = dataclasses.replace(tiny_decoder.CONFIG, tie_embeddings=tie)
    ranks = jax.tree.map(lambda leaf: leaf.ndim, transformer.shapes(config))
    named = jax.tree.map(
      len, param_sharding.axes(config), is_leaf=lambda node: isinstance(node, tuple)
    )
    assert ranks == named
