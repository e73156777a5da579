"""Calls to models through the journal: finished ones are read, new ones recorded."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from raft_jax import errors
from raft_jax.generation import engines, ray_workers, sentence_encoder
from raft_jax.runtime import interrupts, progress
from raft_jax.storage import journal, records

PAIRS_PER_BATCH = 128
"""Pairs of texts whose cosines are recorded together."""

_SHORTEN = (
  "lower max_new_tokens, shorten the row, or set data.too_long=skip to keep its "
  "original answer"
)

Outcome = dict[str, Any] | errors.UserError
"""The value of a finished call, or why the call failed."""


class Role(NamedTuple):
  """A language model, and how it samples for one purpose."""

  name: str
  generator: engines.Generator
  max_new_tokens: int
  temperature: float
  top_p: float
  batch_size: int
  reply_schema: Mapping[str, Any] | None = None


def too_long(role: Role, name: str, count: int) -> errors.UserError:
  """The error for the row `name`, whose prompt has `count` tokens."""
  return errors.UserError(
    f"question {name}: the {role.name} prompt has {count} tokens and max_new_tokens is "
    f"{role.max_new_tokens}, but the model holds {role.generator.prompt_limit} in all; "
    f"{_SHORTEN}"
  )


class OtherModel(Exception):
  """A call needs a model in memory while another one is in use there."""


@dataclasses.dataclass
class Calls:
  """Makes calls through the journal.

  Attributes:
    book: the open journal.
    seed: the run's seed; together with a call's content it gives the call's seed.
    one_model: whether to raise OtherModel if a call needs another model in memory than
      the first that was needed since `model` was None.
    model: identity of that first model.
    too_long: keys of calls that a server found too long. The journal does not record
      them, since the server may be restarted with a longer context.
    title: text before the name of each pass where progress is shown.
    workers: processes of a Ray cluster for models in memory; None: this process.
  """

  book: journal.Journal
  seed: int
  one_model: bool = False
  model: str | None = None
  too_long: set[str] = dataclasses.field(default_factory=set)
  title: str = ""
  workers: ray_workers.Workers | None = None

  def ask(
    self,
    role: Role,
    prompts: Sequence[tuple[records.Message, ...]],
    *,
    round_number: int = 0,
    names: Sequence[str] | None = None,
  ) -> list[engines.Completion | None]:
    """One reply to each prompt, without its thinking; None for a prompt that is too
    long for the model.

    Args:
      round_number: calls with the same prompt in different rounds are different calls,
        unless sampling is greedy.
      names: of the rows. If given, a prompt that is too long raises UserError instead:
        before anything is generated, if the engine knows its limit.
    """
    sampling, generator = _sampling(role), role.generator
    keys = self._keys(role, prompts, round_number, sampling)
    workers = self.workers if generator.local else None

    def generate(rows: Sequence[int]) -> list[Outcome]:
      requests = [
        engines.Request(prompts[i], seed=journal.seed_from(keys[i]), **sampling)
        for i in rows
      ]
      replies = (
        generator.generate(requests)
        if workers is None
        else workers.generate(generator, requests)
      )
      return [
        reply if isinstance(reply, errors.UserError) else reply._asdict()
        for reply in replies
      ]

    tokens = {i: generator.count_tokens(prompts[i]) for i in self._missing(keys)}
    rows = _longest_first(role, tokens, names)
    if tokens:
      self._use_model(generator)
    title = f"{role.name}, round {round_number}" if round_number else role.name
    done = len(set(keys)) - len(tokens)
    parallel = workers.hold(generator.gpus) if workers and rows else 1
    batches = _batches(rows, role.batch_size)
    self._make(role.name, title, keys, done, batches, generate, parallel)
    for i, key in enumerate(keys):
      if key in self.too_long and names is not None:
        raise errors.UserError(
          f"question {names[i]}: the server finds the {role.name} prompt and "
          f"max_new_tokens={role.max_new_tokens} too long; {_SHORTEN}"
        )
    values = [self.book.calls.get(key) for key in keys]
    if None in values:
      print(
        f"{self.title}{title}: {values.count(None)} of {len(values)} prompts are too "
        f"long for the model with max_new_tokens={role.max_new_tokens}",
        flush=True,
      )
    return [value and _completion(value) for value in values]

  def cosines(
    self, role: str, encoder: sentence_encoder.Encoder, pairs: Sequence[tuple[str, str]]
  ) -> list[float | None]:
    """The cosine of each pair's embeddings; None where it is undefined."""
    keys = [journal.content_key(encoder=encoder.identity, texts=pair) for pair in pairs]

    workers = self.workers

    def compare(rows: Sequence[int]) -> Sequence[Outcome]:
      some = [pairs[i] for i in rows]
      if workers is None:
        return sentence_encoder.compare(encoder, some)
      return workers.compare(encoder, some)

    missing = self._missing(keys)
    done = len(set(keys)) - len(missing)
    parallel = workers.hold() if workers and missing else 1
    batches = _batches(missing, PAIRS_PER_BATCH)
    self._make(role, role, keys, done, batches, compare, parallel)
    return [self.book.calls[key]["cosine"] for key in keys]

  def _keys(
    self,
    role: Role,
    prompts: Sequence[tuple[records.Message, ...]],
    round_number: int,
    sampling: Mapping[str, Any],
  ) -> list[str]:
    shared = {
      "role": role.name,
      # Greedy decoding gives the same reply in every round.
      "round": round_number if role.temperature > 0 else 0,
      "model": role.generator.identity,
      "seed": self.seed,
      **sampling,
    }
    keyed = map(records.keyed, prompts)
    return [journal.content_key(messages=messages, **shared) for messages in keyed]

  def _missing(self, keys: Sequence[str]) -> list[int]:
    """The first row of each key that is not finished."""
    first: dict[str, int] = {}
    for i, key in enumerate(keys):
      first.setdefault(key, i)
    finished = (self.book.calls, self.too_long)
    return [
      i for key, i in first.items() if not any(key in known for known in finished)
    ]

  def _use_model(self, generator: engines.Generator) -> None:
    """Raises OtherModel if `one_model` and another model is in use."""
    if not (self.one_model and generator.local):
      return
    self.model = self.model or generator.identity
    if self.model != generator.identity:
      raise OtherModel

  def _make(
    self,
    role: str,
    title: str,
    keys: Sequence[str],
    done: int,
    batches: Sequence[Sequence[int]],
    work: Callable[[Sequence[int]], Sequence[Outcome]],
    parallel: int,
  ) -> None:
    """Does `work` on micro-batches of rows, and records what each gives.

    Args:
      parallel: number of micro-batches at a time.

    Raises:
      UserError: the first that `work` returned, after all that was in progress was
        recorded.
    """
    if not keys:
      return
    title = self.title + title
    left = sum(map(len, batches))
    print(f"{title}: {done} calls done, {left} to do", flush=True)
    bar = progress.Progress(title, left, unit="call") if left else None

    def timed(batch: Sequence[int]) -> dict[str, Outcome]:
      began = time.monotonic()
      values = work(batch)
      seconds = round((time.monotonic() - began) / len(batch), 6)
      return {
        keys[i]: value
        if isinstance(value, errors.UserError)
        else {**value, "seconds": seconds}
        for i, value in zip(batch, values, strict=True)
      }

    try:
      made = 0
      for finished in self._finished(timed, batches, parallel):
        self._record(finished)
        made += len(finished)
        if bar is not None:
          bar.advance(made)
    finally:
      if bar is not None:
        bar.close()
    interrupts.check()
    self.book.calls.use(role, keys)

  def _finished(
    self,
    timed: Callable[[Sequence[int]], dict[str, Outcome]],
    batches: Sequence[Sequence[int]],
    parallel: int,
  ) -> Iterator[dict[str, Outcome]]:
    """What each micro-batch gives, in the order of their ends.

    A signal or an error starts no further one; what is in progress is waited for.
    """
    waiting = iter(batches)
    fault: BaseException | None = None
    # In threads of their own, so that they compute while the last replies are written.
    with concurrent.futures.ThreadPoolExecutor(parallel) as threads:
      first = itertools.islice(waiting, parallel)
      running = {threads.submit(timed, batch) for batch in first}
      while running:
        ended, running = concurrent.futures.wait(
          running, return_when=concurrent.futures.FIRST_COMPLETED
        )
        for future in ended:
          crash = future.exception()
          finished = {} if crash else future.result()
          failed = (v for v in finished.values() if isinstance(v, errors.UserError))
          fault = fault or crash or next(failed, None)
          if fault is None and not interrupts.due():
            following = itertools.islice(waiting, 1)
            running |= {threads.submit(timed, batch) for batch in following}
          yield finished
    if fault is not None:
      # Ctrl-C also reaches an engine's own processes, which end at once.
      interrupts.check()
      raise fault

  def _record(self, finished: Mapping[str, Outcome]) -> None:
    """Records finished calls; those that were too long only in memory."""
    values = {k: v for k, v in finished.items() if not isinstance(v, errors.UserError)}
    long = {k for k, v in values.items() if v.get("finish_reason") == "too_long"}
    self.too_long |= long
    self.book.append({key: values[key] for key in values if key not in long})

  def totals(self, *fields: str) -> dict[str, dict[str, Any]]:
    """Sums by field and role over the calls that this run used; "calls" counts them.

    Integers stay integers. A sum is None where one of its parts is unknown.
    """
    sums: dict[str, dict[str, Any]] = {field: {} for field in ("calls", *fields)}
    for role, value in self.book.calls.used():
      for field in fields:
        if field in value:
          parts = (sums[field].get(role, 0), value[field])
          sums[field][role] = None if None in parts else sum(parts)
      sums["calls"][role] = sums["calls"].get(role, 0) + 1
    return sums

  def costs(self) -> dict[str, dict[str, Any]]:
    """Calls, seconds and tokens of this run by role, for a summary."""
    totals = self.totals("seconds", "completion_tokens", "thinking_tokens")
    return {
      "calls": totals["calls"],
      "seconds": {k: round(v, 3) for k, v in totals["seconds"].items()},
      "tokens": totals["completion_tokens"],
      "thinking_tokens": totals["thinking_tokens"],
    }


def _sampling(role: Role) -> dict[str, Any]:
  """The part of a call's content that the role decides."""
  sampling: dict[str, Any] = {
    "max_new_tokens": role.max_new_tokens,
    "temperature": role.temperature,
    "top_p": role.top_p,
  }
  if role.reply_schema is not None:
    sampling["reply_schema"] = role.reply_schema
  return sampling


def _batches(rows: Sequence[int], size: int) -> list[Sequence[int]]:
  return [rows[i : i + size] for i in range(0, len(rows), size)]


def _longest_first(
  role: Role, tokens: Mapping[int, int], names: Sequence[str] | None
) -> list[int]:
  """The rows whose prompts fit the model; memory runs out at the first batch or never.

  Raises:
    UserError: with `names`, a prompt does not fit.
  """
  limit = math.inf
  if role.generator.prompt_limit is not None:
    limit = role.generator.prompt_limit - role.max_new_tokens
  for i, count in tokens.items():
    if count > limit and names is not None:
      raise too_long(role, names[i], count)
  return sorted((i for i in tokens if tokens[i] <= limit), key=lambda i: -tokens[i])


def _completion(value: Mapping[str, Any]) -> engines.Completion:
  """The reply of a journalled call; an earlier version may not have had all fields."""
  fields = (field for field in engines.Completion._fields if field in value)
  reply = engines.Completion(**{field: value[field] for field in fields})
  return reply._replace(left_out=tuple(reply.left_out))


@contextlib.contextmanager
def interruptible(calls: Calls) -> Iterator[None]:
  """Lets a signal stop the calls after a micro-batch; at the end, frees the model."""
  try:
    with interrupts.listening():
      yield
  except interrupts.Stopped:
    print(f"stopped: {len(calls.book.calls)} calls are kept", flush=True)
    raise
  finally:
    engines.release()
