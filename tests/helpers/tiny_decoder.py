"""A tiny random decoder and its logits."""

import jax
import jax.numpy as jnp

from raft_jax.models import transformer

CONFIG = transformer.DecoderConfig(
  vocab_size=97,
  d_model=32,
  n_layers=3,
  n_heads=4,
  n_kv_heads=2,
  head_dim=8,
  d_ff=48,
  rms_eps=1e-5,
  rope_theta=10_000.0,
  max_positions=128,
  tie_embeddings=True,
)


def random_params(config=CONFIG):
  """Parameters with norm scales away from 1, so that every tensor matters."""
  params = transformer.init(jax.random.key(0), config)
  keys = iter(jax.random.split(jax.random.key(1), 8))
  noisy = {"attn_norm", "mlp_norm"}
  params["layers"] = {
    name: leaf * jax.random.uniform(next(keys), leaf.shape, minval=0.5, maxval=1.5)
    if name in noisy
    else leaf
    for name, leaf in params["layers"].items()
  }
  params["final_norm"] *= jax.random.uniform(next(keys), params["final_norm"].shape) + 1
  return params


def sharp_params():
  """So sharp that greedy decoding has no near ties."""
  params = random_params()
  return {**params, "final_norm": params["final_norm"] * 8}


def logits(params, config, tokens, valid, **options):
  hidden, _ = transformer.forward(
    params,
    config,
    tokens,
    transformer.positions(valid),
    transformer.causal_mask(valid),
    **options,
  )
  return jnp.einsum("btd,vd->btv", hidden, transformer.output_embedding(params))
