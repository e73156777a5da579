"""A chat with the trained model and the base model, side by side in a terminal."""

from __future__ import annotations

import contextlib
import sys

import jax

from raft_jax import errors
from raft_jax.config import cli, run_lock, schema
from raft_jax.generation import chat_history, chat_loop
from raft_jax.hf import chat as hf_chat
from raft_jax.hf import load as hf_load
from raft_jax.models import sampling, streaming, transformer
from raft_jax.runtime import distributed, interrupts
from raft_jax.training import run_inputs, trained_model


def main(config: schema.Config, *, once: str | None, model: str | None) -> None:
  """Talks, or answers the one question `once`.

  Args:
    model: replaces the checkpoint that `evaluate` and `export` read: an export, or any
      source of a model.

  Raises:
    UserError: there is no checkpoint, or the output folder holds another run.
  """
  distributed.refuse("chat")
  check_question(once)
  settings, source = config.chat, config.model.source
  how = chat_history.Sampling(
    settings.max_new_tokens, settings.temperature, settings.top_p, config.train.seed
  )
  if model is None:
    run_lock.check_lock(config, "train", run_inputs.IDENTITY_KEYS)
    trained_model.require(config.output, config.validation)
  unroll = sampling.unrolled(
    config.rollout.unroll, config.model.unroll, jax.default_backend()
  )
  compute = transformer.Compute(dtype=config.model.dtype, unroll=unroll)
  with contextlib.redirect_stdout(sys.stderr):  # stdout is for answers
    decoder = hf_load.load_config(source)
    tokenizer = hf_chat.load(source, config.model.chat_template)
    interrupts.check()
    if model is None:
      params, step = trained_model.load(config, decoder)
      asked = speaker(f"trained, step {step}", params, decoder, tokenizer, compute)
      del params  # before the base model's are loaded
    else:
      own, words = hf_load.load_config(model), hf_chat.load(model)
      asked = speaker(model, hf_load.load_params(model, own), own, words, compute)
    base_params = hf_load.load_params(source, decoder)
    speakers = [asked, speaker("base", base_params, decoder, tokenizer, compute)]
  if once is None:
    chat_loop.talk(speakers, how)
  else:
    chat_loop.once(speakers, once, how)


def check_question(once: str | None) -> None:
  """Refuses what cannot be answered, before any weights are read.

  Raises:
    UserError: the question is empty or no text, or none can come from stdin.
  """
  if once is None:
    if sys.stdin is None:
      raise errors.UserError(
        "stdin is closed, so no question can be read; ask one by --once QUESTION"
      )
    if hasattr(sys.stdin, "reconfigure"):
      sys.stdin.reconfigure(errors="replace")
  elif not once.strip():
    raise errors.UserError("--once: the question is empty; write --once QUESTION")
  elif any("\ud800" <= letter <= "\udfff" for letter in once):
    raise errors.UserError("--once: the question is not UTF-8; write it as UTF-8")


def speaker(
  title: str,
  params: transformer.Params,
  decoder: transformer.DecoderConfig,
  tokenizer: hf_chat.ChatTokenizer,
  compute: transformer.Compute,
) -> chat_history.Speaker:
  """A model that is ready to be asked."""
  interrupts.check()
  network = streaming.network(params, decoder, compute)
  return chat_history.Speaker(title, network, tokenizer)


if __name__ == "__main__":
  cli.run(
    "chat",
    main,
    "Talk to the trained model and the base model, side by side.",
    options={
      "--once": {
        "metavar": "QUESTION",
        "help": "print both answers to one question as plain text and stop",
      },
      "--model": {
        "metavar": "SOURCE",
        "help": "talk to this model in place of the newest checkpoint, e.g. an export",
      },
    },
    without_data=True,
  )
