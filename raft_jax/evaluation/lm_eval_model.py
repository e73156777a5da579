"""lm-evaluation-harness' model protocol over a model that is evaluated.

Replies are computed in batches of similar length and go through the journal. Texts have
the same tokens as in the harness' own Hugging Face model (HFLM): special tokens in a
text are read as such, the tokenizer adds BOS by its own rule unless the text begins
with it, and a text longer than the model's positions loses its beginning, with a
warning. Two things differ from HFLM: any of the model's end tokens ends an answer, and
chat templates with a thinking mode have it switched off, as in training.

Importing this module imports the harness (the `eval` extra).
"""

from __future__ import annotations

import bisect
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from lm_eval import defaults, utils
from lm_eval.api import model as protocol
from lm_eval.models import utils as model_utils

from raft_jax import errors, vocab_head
from raft_jax.evaluation import greedy_answers, scoring
from raft_jax.hf import chat, chat_template
from raft_jax.models import transformer
from raft_jax.storage import journal

_LOG = logging.getLogger(__name__)

FIRST_TOKENS = 16
"""Tokens written at first when a stop string may end the answer; then twice as many as
before each time, so that few tokens are written past the stop string."""

GREEDY = {"until", "do_sample", "temperature", "max_gen_toks", "top_p", "top_k"}
"""The generation options that a task may set; greedy decoding ignores the last two."""


def generation(
  options: Mapping[str, Any], place: str, positions: int
) -> tuple[tuple[str, ...], int]:
  """A task's stop strings, and the most tokens of an answer.

  Raises:
    UserError: the task needs sampling or another kind of generation, or too long an
      answer.
  """
  wanted = model_utils.normalize_gen_kwargs(
    dict(options), defaults.DEFAULT_MAX_GEN_TOKS
  )
  unknown = {key: value for key, value in wanted.items() if key not in GREEDY}
  if unknown.get("num_beams") == 1:
    del unknown["num_beams"]
  if wanted["do_sample"] or unknown:
    given = ", ".join(f"{key}={value}" for key, value in options.items())
    raise errors.UserError(
      f"{place} asks for {given}, but answers are decoded greedily; leave it out, or"
      " change its generation_kwargs in a copy in evaluate.tasks.include"
    )
  longest = wanted["max_gen_toks"]
  if longest >= positions:
    raise errors.UserError(
      f"{place} asks for answers of {longest} tokens, but the model was made for"
      f" {positions}; leave it out, or lower max_gen_toks in a copy in"
      " evaluate.tasks.include"
    )
  return tuple(stop for stop in wanted["until"] if stop), longest


@functools.partial(jax.jit, static_argnames=("config", "dtype", "unroll"))
def continuation_log_probs(
  params: transformer.Params,
  config: transformer.DecoderConfig,
  tokens_BT: Array,
  length_B: Array,
  targets_BCK: Array,
  count_B: Array,
  *,
  dtype: str = "float32",
  unroll: int = 1,
) -> tuple[Array, Array]:
  """Log-probability of K continuations a row, and whether they are the greedy ones.

  Args:
    tokens_BT: int32, context and continuation without its last token, right-padded with
      anything. The continuations of a row differ only in their last token.
    length_B: int32 tokens of each.
    targets_BCK: int32, the continuations, right-padded with any valid id.
    count_B: int32 tokens of a row's continuations, 1..C.

  Returns:
    float32 [B, K], nats, the sum over a continuation's tokens; bool [B, K].
  """
  hidden_BTD = scoring.last_hidden(params, config, tokens_BT, length_B, dtype, unroll)
  column_C = jnp.arange(targets_BCK.shape[1])
  place_BC = (length_B - count_B)[:, None] + column_C
  place_BC = jnp.minimum(place_BC, tokens_BT.shape[1] - 1)
  hidden_BCD = jnp.take_along_axis(hidden_BTD, place_BC[..., None], axis=1)
  embedding_VD = transformer.output_embedding(params).astype(dtype)
  softcap = config.logit_softcap
  logits_BCK, logsumexp_BC = vocab_head.gather_with_logsumexp(
    hidden_BCD, embedding_VD, targets_BCK, softcap=softcap
  )
  best_BC1 = vocab_head.topk(hidden_BCD, embedding_VD, 1, softcap=softcap)[1]
  counts_BC1 = (column_C < count_B[:, None])[..., None]
  log_p_BCK = jnp.where(counts_BC1, logits_BCK - logsumexp_BC[..., None], 0.0)
  greedy_BK = jnp.all((best_BC1 == targets_BCK) | ~counts_BC1, axis=1)
  return jnp.sum(log_p_BCK, axis=1), greedy_BK


class Row(NamedTuple):
  """Continuations of one context that differ only in their last token."""

  inputs: tuple[int, ...]
  length: int
  last: tuple[int, ...]


def _padded(
  rows: Sequence[Row], count: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """The arrays of `continuation_log_probs`; copies of the last row fill the batch."""
  tokens_BT, length_B = scoring.pad(
    [row.inputs for row in rows],
    count=count,
    multiple=scoring.LOSS_WIDTH,
    pad_id=pad_id,
  )
  count_B = np.ones(count, np.int32)
  # Powers of two, so that few shapes are compiled.
  longest, most = (
    1 << (max(size) - 1).bit_length()
    for size in ([row.length for row in rows], [len(row.last) for row in rows])
  )
  targets_BCK = np.full((count, longest, most), rows[0].last[0], np.int32)
  for i, row in enumerate(rows):
    count_B[i] = row.length
    before = row.inputs[len(row.inputs) - row.length + 1 :]
    targets_BCK[i, : row.length - 1] = np.array(before, np.int32)[:, None]
    targets_BCK[i, row.length - 1, : len(row.last)] = row.last
  return tokens_BT, length_B, targets_BCK, count_B


class Adapter(protocol.TemplateLM):
  """The harness' model protocol over a model and its journal."""

  def __init__(self, model: scoring.EvalModel, log: journal.Journal) -> None:
    super().__init__()
    self.eval_model, self.log = model, log
    self.tokenizer = model.tokenizer.hf_tokenizer

  @property
  def eot_token_id(self) -> int:
    eos = self.tokenizer.eos_token_id
    return self.eval_model.tokenizer.eos_ids[0] if eos is None else eos

  @property
  def prefix_token_id(self) -> int:
    """The token that stands for an empty context: BOS, or EOS if there is no BOS."""
    bos = self.tokenizer.bos_token_id
    return self.eot_token_id if bos is None else bos

  @property
  def tokenizer_name(self) -> str:
    return self.eval_model.tokenizer.digest

  def tok_encode(
    self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
  ) -> list[int]:
    del kwargs
    if add_special_tokens is None and string.startswith(
      str(self.tokenizer.decode(self.prefix_token_id))
    ):
      add_special_tokens = False
    added = True if add_special_tokens is None else add_special_tokens
    return chat.raw_ids(self.eval_model.tokenizer, string, add_special_tokens=added)

  def apply_chat_template(
    self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
  ) -> str:
    form: dict[str, Any] = {
      "prompt": add_generation_prompt,
      "unfinished": not add_generation_prompt,
      "thinking": self.eval_model.tokenizer.thinking,
    }
    try:
      return chat_template.render(self.tokenizer, chat_history, **form)
    except errors.UserError:
      turns = [turn for turn in chat_history if turn["role"] != "system"]
      if turns == chat_history:
        raise
      _LOG.warning("the chat template takes no system message; it is left out")
      return chat_template.render(self.tokenizer, turns, **form)

  def _loglikelihood_tokens(
    self,
    requests: list[tuple[tuple[str, str], list[int], list[int]]],
    **kwargs: Any,
  ) -> list[tuple[float, bool]]:
    del kwargs
    longest, cut = self.eval_model.config.max_positions, 0
    keys: list[tuple[tuple[tuple[int, ...], int], int]] = []
    alternatives: dict[tuple[tuple[int, ...], int], set[int]] = {}
    for _, context, continuation in requests:
      if not 0 < len(continuation) <= longest:
        raise errors.UserError(
          f"evaluate.tasks: a task asks for the probability of {len(continuation)}"
          f" tokens, but the model was made for 1 to {longest}; leave it out"
        )
      # The harness moves the spaces of a context of only spaces to the continuation.
      joined = (*(context or [self.prefix_token_id]), *continuation)
      cut += len(joined) > longest + 1
      inputs = joined[-(longest + 1) :][:-1]
      keys.append(((inputs, len(continuation)), continuation[-1]))
      alternatives.setdefault(keys[-1][0], set()).add(continuation[-1])
    self._warn(cut, len(requests))
    rows = {
      key: Row(key[0], key[1], tuple(sorted(last)))
      for key, last in alternatives.items()
    }
    values = dict(zip(rows, self._rows(list(rows.values()))))
    return [values[key][rows[key].last.index(last)] for key, last in keys]

  def _rows(self, rows: list[Row]) -> list[list[tuple[float, bool]]]:
    """For every continuation of every row: log-probability, and if it is greedy."""
    model = self.eval_model

    def compute(batch: list[int]) -> list[list[tuple[float, bool]]]:
      chosen = [rows[i] for i in batch]
      count = min(model.settings.batch_size, len(rows))
      log_p_BK, greedy_BK = continuation_log_probs(
        model.params,
        model.config,
        *_padded(chosen, count, model.tokenizer.pad_id),
        **scoring.precision(model),
      )
      sums = scoring.check_finite(
        np.asarray(log_p_BK)[: len(batch)], "a task's log-probability"
      )
      return [
        list(zip(sums[i], np.asarray(greedy_BK)[i].tolist()))[: len(row.last)]
        for i, row in enumerate(chosen)
      ]

    return scoring.compute_missing(
      self.log,
      [scoring.item_key(model, call="continuations", **row._asdict()) for row in rows],
      [len(row.inputs) for row in rows],
      compute,
      batch_size=model.settings.batch_size,
      title=scoring.bar_title(model, "tasks, log-probabilities"),
    )

  def loglikelihood_rolling(
    self, requests: list[Any], disable_tqdm: bool = False
  ) -> list[float]:
    del disable_tqdm
    windows, owners = [], []
    for number, request in enumerate(requests):
      for window in utils.get_rolling_token_windows(
        token_list=self.tok_encode(request.args[0]),
        prefix_token=self.prefix_token_id,
        max_seq_len=self.eval_model.config.max_positions,
        context_len=1,
      ):
        windows.append((("", ""), *utils.make_disjoint_window(window)))
        owners.append(number)
    sums = [0.0] * len(requests)
    for number, (log_p, _) in zip(owners, self._loglikelihood_tokens(windows)):
      sums[number] += log_p
    return sums

  def generate_until(
    self, requests: list[Any], disable_tqdm: bool = False
  ) -> list[str]:
    del disable_tqdm
    positions, cut = self.eval_model.config.max_positions, 0
    keys: list[tuple[tuple[int, ...], tuple[str, ...], int]] = []
    for request in requests:
      context, options = request.args
      place = f"evaluate.tasks.names: {request.task_name}"
      stops, limit = generation(options, place, positions)
      ids = self.tok_encode(context)
      cut += len(ids) > positions - limit
      keys.append((tuple(ids[-(positions - limit) :]), stops, limit))
    self._warn(cut, len(requests))
    answers: dict[tuple[Any, ...], str] = {}
    for stops, limit in dict.fromkeys(key[1:] for key in keys):
      prompts = list(dict.fromkeys(key[0] for key in keys if key[1:] == (stops, limit)))
      texts = answers_until(self.eval_model, prompts, stops, limit, self.log)
      answers |= {(ids, stops, limit): text for ids, text in zip(prompts, texts)}
    return [answers[key] for key in keys]

  def _warn(self, cut: int, count: int) -> None:
    if cut:
      _LOG.warning(
        "evaluate.tasks: %d of %d requests were longer than the model's %d positions"
        " and lost their beginning",
        cut, count, self.eval_model.config.max_positions,
      )  # fmt: skip


def answers_until(
  model: scoring.EvalModel,
  prompts: Sequence[Sequence[int]],
  stops: Sequence[str],
  limit: int,
  log: journal.Journal,
) -> list[str]:
  """Greedy answers up to the first stop string, or to `limit` tokens."""
  ids: list[list[int]] = [[] for _ in prompts]

  def stopped(row: Sequence[int]) -> bool:
    # A stop string may be a special token, which the text itself leaves out.
    raw = model.tokenizer.hf_tokenizer.decode(list(row), skip_special_tokens=False)
    return any(stop in raw for stop in stops)

  open_rows, spent = list(range(len(prompts))), 0
  while open_rows and spent < limit:
    # Without a stop string only an end token ends the answer; the sampler stops there.
    new = min(max(spent, FIRST_TOKENS), limit - spent) if stops else limit
    answers = greedy_answers.generate(
      model,
      [(*prompts[i], *ids[i]) for i in open_rows],
      log,
      max_new_tokens=new,
      name="tasks, answers",
    )
    for i, answer in zip(open_rows, answers):
      ids[i] += answer.ids
    ended = {i for i, answer in zip(open_rows, answers) if answer.ended}
    open_rows = [i for i in open_rows if i not in ended and not stopped(ids[i])]
    spent += new
  ends = [*stops, *filter(None, [model.tokenizer.hf_tokenizer.eos_token])]
  return [
    model_utils.postprocess_generated_text(
      chat.decode(model.tokenizer, _until(row, stopped)), ends, None
    )
    for row in ids
  ]


def _until(row: list[int], stopped: Callable[[Sequence[int]], bool]) -> list[int]:
  """The tokens up to the first that completes a stop string."""
  if not stopped(row):
    return row
  count = bisect.bisect_left(range(len(row)), True, key=lambda n: stopped(row[:n]))
  return row[:count]
