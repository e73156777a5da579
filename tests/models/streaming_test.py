"""Tokens one at a time: the sampler's own, whatever the cache holds of other turns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from raft_jax import errors
from raft_jax.models import sampling, streaming, transformer
from tests.helpers import tiny_decoder

CONFIG = tiny_decoder.CONFIG
EOS = (5, 11)


@pytest.fixture(scope="module")
def params():
  return tiny_decoder.sharp_params()


@pytest.fixture(scope="module", params=[1, 0], ids=["scan", "apart"])
def network(request, params):
  return streaming.network(params, CONFIG, transformer.Compute(unroll=request.param))


def drawing(temperature=0.0, **changes):
  values = {"max_new_tokens": 12, "top_p": 0.9, "eos_ids": EOS, "seed": 3, "step": 7}
  return streaming.Drawing(**values | {"temperature": temperature} | changes)


def sampled(params, prompt, how):
  """The sampler's tokens, in one program for the whole answer."""
  rollout = sampling.generate(
    params,
    CONFIG,
    jnp.array([prompt], jnp.int32),
    jnp.array([len(prompt)], jnp.int32),
    jnp.zeros(1, jnp.int32),
    pad_id=0,
    **how._asdict(),
  )
  return rollout.tokens_BR[0, : rollout.length_B[0]].tolist()


def drawn(network, memory, prompt, how):
  return [t for t in streaming.stream(network, memory, prompt, how) if t is not None]


def words(count, seed=0):
  return np.random.default_rng(seed).integers(12, 97, count).tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 130])
def test_tokens_are_the_samplers(params, network, temperature, length):
  how = drawing(temperature)
  expected = sampled(params, words(length), how)
  assert drawn(network, streaming.Memory(), words(length), how) == expected


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_later_turns_read_only_what_is_new(params, network, temperature, monkeypatch):
  how, memory = drawing(temperature), streaming.Memory()
  prompt = words(70)
  first = drawn(network, memory, prompt, how)
  pieces = []
  read = streaming.read_and_draw

  def counted(weights, config, cache, tokens, count, *rest, **options):
    pieces.append(int(count))
    return read(weights, config, cache, tokens, count, *rest, **options)

  monkeypatch.setattr(streaming, "read_and_draw", counted)
  second = prompt + first + words(9, seed=1)
  assert drawn(network, memory, second, how) == sampled(params, second, how)
  # The last token of an answer was drawn and not read.
  assert pieces[0] == 10
  assert set(pieces[1:]) <= {1}
  # A conversation that parts from the former one inside the first piece.
  pieces.clear()
  other = [*prompt[:20], *words(50, seed=2)]
  assert drawn(network, memory, other, how) == sampled(params, other, how)
  assert pieces[0] == 50


def test_the_same_prompt_again_reads_its_last_token(params, network):
  how, memory = drawing(), streaming.Memory()
  once = drawn(network, memory, words(30), how)
  assert drawn(network, memory, words(30), how) == once


@pytest.mark.parametrize("after", [0, 1, 2, 5])
def test_a_stopped_answer_leaves_what_was_read(params, network, after):
  how, memory = drawing(), streaming.Memory()
  stream = streaming.stream(network, memory, words(200), how)
  for _ in range(after):
    next(stream)
  stream.close()
  read = list(memory.ids)
  assert len(read) == min(64 * after, 200) + max(after - 4, 0)
  assert drawn(network, memory, words(200), how) == sampled(params, words(200), how)


def test_programs_are_compiled_once_for_each_length_of_the_cache(params):
  network = streaming.network(params, CONFIG, transformer.FLOAT32)
  streaming.read_and_draw.clear_cache()
  memory, prompt = streaming.Memory(), words(40)
  for turn in range(4):
    prompt += drawn(network, memory, prompt, drawing(step=turn)) + words(20, turn)
  assert streaming.read_and_draw._cache_size() == 2
  assert memory.cache["k"].shape[2] == streaming.SHORTEST
  kept = memory.ids[:]
  prompt += words(streaming.SHORTEST, seed=8)
  expected = sampled(params, prompt, drawing())
  assert drawn(network, memory, prompt, drawing()) == expected
  assert memory.ids[: len(kept)] == kept
  assert memory.cache["k"].shape[2] == 2 * streaming.SHORTEST
  assert streaming.read_and_draw._cache_size() == 4
  # Another model of the same shape needs no programs of its own, be it from a
  # checkpoint, whose arrays are bound to a device.
  restored = jax.device_put(params, jax.local_devices()[0])
  other = streaming.network(restored, CONFIG, transformer.FLOAT32)
  drawn(other, streaming.Memory(), words(40), drawing())
  assert streaming.read_and_draw._cache_size() == 4


def test_logits_that_are_not_finite_are_an_error(params):
  spoiled = params | {"final_norm": params["final_norm"].at[0].set(jnp.inf)}
  network = streaming.network(spoiled, CONFIG, transformer.Compute())
  with pytest.raises(errors.UserError, match="logits are not finite"):
    drawn(network, streaming.Memory(), words(3), drawing())
