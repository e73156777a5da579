"""Calls to models through the journal: finished ones are read, new ones kept."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from raft_jax import errors
from raft_jax.generation import engines, sentence_encoder
from raft_jax.runtime import progress
from raft_jax.storage import journal, records

PAIRS_PER_BATCH = 128
"""Encoder calls made durable together."""


_SHORTEN = (
  "lower max_new_tokens, shorten the row, or set data.too_long=skip to keep its "
  "original answer"
)


class Role(NamedTuple):
  """A language model and how it samples in one part of the refinement."""

  name: str
  generator: engines.Generator
  max_new_tokens: int
  temperature: float
  top_p: float
  batch_size: int
  reply_schema: Mapping[str, Any] | None = None


def too_long(role: Role, name: str, count: int) -> errors.UserError:
  """What is wrong with the row `name`, whose prompt has `count` tokens."""
  return errors.UserError(
    f"question {name}: the {role.name} prompt has {count} tokens and max_new_tokens is "
    f"{role.max_new_tokens}, but the model holds {role.generator.prompt_limit} in all; "
    f"{_SHORTEN}"
  )


class Stopped(SystemExit):
  """A signal asked the run to end; all finished calls are in the journal."""


class OtherModel(Exception):
  """A call wants a model in memory while another one is at work there."""


@dataclasses.dataclass
class Calls:
  """Makes calls through the journal: finished ones are read, new ones made and kept.

  Attributes:
    book: the open journal.
    seed: of the run; with a call's content it makes that call's own seed.
    one_model: raise OtherModel where a call wants to put another model in memory than
      the first that was wanted since `model` was None.
    model: identity of that first model.
    too_long: keys of calls that a server found too long. They are not kept: it may be
      started again with room for more.
    title: stands before the name of each pass where progress is shown.
    signals: filled by `listening` when the run is asked to end.
  """

  book: journal.Journal
  seed: int
  one_model: bool = False
  model: str | None = None
  too_long: set[str] = dataclasses.field(default_factory=set)
  title: str = ""
  signals: list[int] = dataclasses.field(default_factory=list)

  def ask(
    self,
    role: Role,
    prompts: Sequence[tuple[records.Message, ...]],
    *,
    round_number: int = 0,
    names: Sequence[str] | None = None,
  ) -> list[engines.Completion | None]:
    """One reply a prompt, without its thinking; None where the prompt is too long for
    the model.

    With `names` of the rows, a prompt that is too long raises UserError instead: before
    anything is generated, if the engine's limit is known here.
    """
    sampling: dict[str, Any] = {
      "max_new_tokens": role.max_new_tokens,
      "temperature": role.temperature,
      "top_p": role.top_p,
    }
    if role.reply_schema is not None:
      sampling["reply_schema"] = role.reply_schema
    shared = {
      "role": role.name,
      # Without sampling every round's reply is the same reply.
      "round": round_number if role.temperature > 0 else 0,
      "model": role.generator.identity,
      "seed": self.seed,
      **sampling,
    }
    keys = [journal.content_key(messages=prompt, **shared) for prompt in prompts]

    def generate(rows: Sequence[int]) -> list[dict[str, Any] | errors.UserError]:
      requests = [
        engines.Request(prompts[i], seed=journal.seed_from(keys[i]), **sampling)
        for i in rows
      ]
      replies = role.generator.generate(requests)
      return [
        reply
        if isinstance(reply, errors.UserError)
        else engines.without_thinking(reply)._asdict()
        for reply in replies
      ]

    tokens = {i: role.generator.count_tokens(prompts[i]) for i in self._missing(keys)}
    limit = math.inf
    if role.generator.prompt_limit is not None:
      limit = role.generator.prompt_limit - role.max_new_tokens
    for i, count in tokens.items():
      if count > limit and names is not None:
        raise too_long(role, names[i], count)
    if tokens and self.one_model and role.generator.local:
      self.model = self.model or role.generator.identity
      if self.model != role.generator.identity:
        raise OtherModel
    # Longest first: memory runs out at once or not at all.
    fitting = sorted(
      (i for i in tokens if tokens[i] <= limit), key=lambda i: -tokens[i]
    )
    title = f"{role.name}, round {round_number}" if round_number else role.name
    done = len(set(keys)) - len(tokens)
    self._make(role.name, title, keys, done, fitting, role.batch_size, generate)
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
        f"long for the model beside max_new_tokens={role.max_new_tokens}",
        flush=True,
      )
    return [value and _completion(value) for value in values]

  def cosines(
    self, role: str, encoder: sentence_encoder.Encoder, pairs: Sequence[tuple[str, str]]
  ) -> list[float | None]:
    """Cosine of each pair's embeddings; None where it is undefined."""
    keys = [journal.content_key(encoder=encoder.identity, texts=pair) for pair in pairs]

    def compare(rows: Sequence[int]) -> list[dict[str, Any]]:
      left, right = zip(*(pairs[i] for i in rows))
      cosines = sentence_encoder.cosine(encoder(left), encoder(right)).tolist()
      cut = zip(encoder.truncated(left), encoder.truncated(right))
      return [
        {"cosine": None if math.isnan(c) else c, "truncated": any(either)}
        for c, either in zip(cosines, cut)
      ]

    missing = self._missing(keys)
    done = len(set(keys)) - len(missing)
    self._make(role, role, keys, done, missing, PAIRS_PER_BATCH, compare)
    return [self.book.calls[key]["cosine"] for key in keys]

  def _missing(self, keys: Sequence[str]) -> list[int]:
    """The first row of each key that the journal lacks."""
    first: dict[str, int] = {}
    for i, key in enumerate(keys):
      first.setdefault(key, i)
    known = (self.book.calls, self.too_long)
    return [i for key, i in first.items() if not any(key in those for those in known)]

  def _make(
    self,
    role: str,
    title: str,
    keys: Sequence[str],
    done: int,
    rows: Sequence[int],
    batch_size: int,
    work: Callable[[Sequence[int]], Sequence[dict[str, Any] | errors.UserError]],
  ) -> None:
    """Does `work` on micro-batches of rows; each is durable before the next begins.

    Raises:
      UserError: the first that `work` returned, after the rest of its batch was kept.
    """
    if not keys:
      return
    title = self.title + title
    print(f"{title}: {done} calls done, {len(rows)} to do", flush=True)
    bar = progress.Progress(title, len(rows), unit="call") if rows else None

    def timed(batch: Sequence[int]) -> dict[str, dict[str, Any] | errors.UserError]:
      began = time.monotonic()
      values = work(batch)
      seconds = round((time.monotonic() - began) / len(batch), 6)
      return {
        keys[i]: value
        if isinstance(value, errors.UserError)
        else {**value, "seconds": seconds}
        for i, value in zip(batch, values, strict=True)
      }

    batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    made = 0
    try:
      # In a thread of its own, so that a signal is heard while the model computes, and
      # that it computes while the last replies are written.
      with concurrent.futures.ThreadPoolExecutor(1) as worker:
        running = worker.submit(timed, batches[0]) if batches else None
        for following in [*batches[1:], None]:
          if running is None:
            break
          finished = self._wait(running)
          running = None
          failed = [v for v in finished.values() if isinstance(v, errors.UserError)]
          if following is not None and not self.signals and not failed:
            running = worker.submit(timed, following)
          self._keep(finished)
          if failed:
            raise failed[0]
          made += len(finished)
          if bar is not None:
            bar.advance(made)
          if self.signals and running is None:
            raise Stopped(128 + self.signals[0])
    finally:
      if bar is not None:
        bar.close()
    self.book.calls.use(role, keys)

  def _keep(self, finished: Mapping[str, dict[str, Any] | errors.UserError]) -> None:
    """Notes what came of calls, but for errors; what was too long, in memory only."""
    whole = {k: v for k, v in finished.items() if not isinstance(v, errors.UserError)}
    long = {k for k, v in whole.items() if v.get("finish_reason") == "too_long"}
    self.too_long |= long
    self.book.append({key: whole[key] for key in whole if key not in long})

  def _wait(self, running: concurrent.futures.Future[dict[str, Any]]) -> dict[str, Any]:
    while not running.done():
      # Waking up is what lets Python handle a signal that another thread got.
      concurrent.futures.wait([running], timeout=0.2)
    try:
      return running.result()
    except Exception as error:
      # Ctrl-C reaches an engine's own processes too, and they end at once.
      if self.signals:
        raise Stopped(128 + self.signals[0]) from error
      raise

  def totals(self, *fields: str) -> dict[str, dict[str, float]]:
    """Sums by field and role over the calls that this run needed; "calls" counts them.

    Integers stay integers.
    """
    sums: dict[str, dict[str, float]] = {field: {} for field in ("calls", *fields)}
    for role, value in self.book.calls.used():
      for field in fields:
        if field in value:
          sums[field][role] = sums[field].get(role, 0) + value[field]
      sums["calls"][role] = sums["calls"].get(role, 0) + 1
    return sums


def _completion(value: Mapping[str, Any]) -> engines.Completion:
  """From a journalled call; one of an earlier version may lack the later fields."""
  fields = (field for field in engines.Completion._fields if field in value)
  return engines.Completion(**{field: value[field] for field in fields})


@contextlib.contextmanager
def at_work(calls: Calls) -> Iterator[None]:
  """Where a stage makes its calls: a signal ends it after a micro-batch and says how to
  go on, and in the end no model is left in memory."""
  try:
    with listening(calls.signals):
      yield
  except Stopped:
    kept = f"{len(calls.book.calls)} calls are kept"
    print(f"stopped: {kept}; run the same command again to continue", file=sys.stderr)
    raise
  finally:
    engines.release()


@contextlib.contextmanager
def listening(signals: list[int]) -> Iterator[None]:
  """Notes the first SIGINT or SIGTERM in `signals`; a second one ends the process."""
  watched = (signal.SIGINT, signal.SIGTERM)

  def note(number: int, frame: Any) -> None:
    signals.append(number)
    for each in watched:
      signal.signal(each, signal.SIG_DFL)
    print(
      "stopping after this micro-batch (again: at once)", file=sys.stderr, flush=True
    )

  if threading.current_thread() is not threading.main_thread():
    yield
    return
  before = {each: signal.signal(each, note) for each in watched}
  try:
    yield
  finally:
    for each, handler in before.items():
      signal.signal(each, handler)
