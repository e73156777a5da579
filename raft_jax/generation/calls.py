"""Calls to models through the journal: finished ones are read, new ones recorded."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import itertools
import math
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

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

T = TypeVar("T")

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

    def replies(some: Iterator[int]) -> Iterator[tuple[int, Outcome]]:
      requests = (
        engines.Request(prompts[i], seed=journal.seed_from(keys[i]), **sampling)
        for i in some
      )
      finished = (
        generator.generate(requests, role.batch_size)
        if workers is None
        else workers.generate(generator, requests, role.batch_size)
      )
      for place, reply in finished:
        yield place, reply if isinstance(reply, errors.UserError) else reply._asdict()

    tokens = {i: generator.count_tokens(prompts[i]) for i in self._missing(keys)}
    rows = _longest_first(role, tokens, names)
    if tokens:
      self._use_model(generator)
    title = f"{role.name}, round {round_number}" if round_number else role.name
    done = len(set(keys)) - len(tokens)
    if workers and rows:
      workers.hold(generator.gpus)
    self._make(role.name, title, keys, done, rows, replies)
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

    def compare(some: Iterator[int]) -> Iterator[tuple[int, Outcome]]:
      texts = (pairs[i] for i in some)
      if workers is not None:
        return workers.compare(encoder, texts, PAIRS_PER_BATCH)
      batches = iter(lambda: list(itertools.islice(texts, PAIRS_PER_BATCH)), [])
      values = (sentence_encoder.compare(encoder, batch) for batch in batches)
      return enumerate(itertools.chain.from_iterable(values))

    missing = self._missing(keys)
    done = len(set(keys)) - len(missing)
    if workers and missing:
      workers.hold()
    self._make(role, role, keys, done, missing, compare)
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
    rows: Sequence[int],
    work: Callable[[Iterator[int]], Iterator[tuple[int, Outcome]]],
  ) -> None:
    """Does `work` on rows, and records what it gives as it comes.

    Args:
      work: gives outcomes in any order, each with its row's place in `rows`. It gets an
        iterator, which ends at a signal or an error: what is in progress then is
        waited for and recorded.

    Raises:
      UserError: the first outcome that is one.
    """
    if not keys:
      return
    title = self.title + title
    print(f"{title}: {done} calls done, {len(rows)} to do", flush=True)
    if rows:
      self._work([keys[i] for i in rows], title, rows, work)
    interrupts.check()
    self.book.calls.use(role, keys)

  def _work(
    self,
    keys: Sequence[str],
    title: str,
    rows: Sequence[int],
    work: Callable[[Iterator[int]], Iterator[tuple[int, Outcome]]],
  ) -> None:
    """As `_make`, for rows that are to do, and their keys."""
    faults: list[errors.UserError] = []
    over = threading.Event()

    def outcomes() -> Iterator[tuple[int, Outcome]]:
      going = itertools.takewhile(
        lambda _: not (over.is_set() or interrupts.due()), rows
      )
      for place, outcome in work(going):
        if isinstance(outcome, errors.UserError):
          faults.append(outcome)
          over.set()
        yield place, outcome

    bar = progress.Progress(title, len(rows), unit="call")
    groups = _together(outcomes())
    began, made = time.monotonic(), 0
    try:
      for finished in groups:
        seconds = round((time.monotonic() - began) / len(finished), 6)
        began = time.monotonic()
        self._record(
          {
            keys[place]: {**value, "seconds": seconds}
            for place, value in finished.items()
            if not isinstance(value, errors.UserError)
          }
        )
        made += len(finished)
        bar.advance(made)
    except Exception:
      interrupts.check()  # Ctrl-C also reaches an engine's own processes, which end
      raise
    finally:
      over.set()
      groups.close()
      bar.close()
    if faults:
      interrupts.check()
      raise faults[0]

  def _record(self, finished: Mapping[str, dict[str, Any]]) -> None:
    """Records finished calls; those that were too long only in memory."""
    long = {k for k, v in finished.items() if v.get("finish_reason") == "too_long"}
    self.too_long |= long
    self.book.append({key: finished[key] for key in finished if key not in long})

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


def _together(
  outcomes: Iterator[tuple[int, T]],
) -> Generator[dict[int, T], None, None]:
  """Outcomes in groups: each holds what came while the one before was recorded.

  A thread takes them, so that the engine goes on while the disk writes.
  """
  came: queue.SimpleQueue[tuple[int, T] | None] = queue.SimpleQueue()

  def take() -> None:
    for outcome in outcomes:
      came.put(outcome)

  with concurrent.futures.ThreadPoolExecutor(1) as thread:
    taking = thread.submit(take)
    taking.add_done_callback(lambda _: came.put(None))
    last = False
    while not last:
      group = [came.get()]
      while not came.empty():
        group.append(came.get())
      last = group[-1] is None
      if some := dict(filter(None, group)):
        yield some
  taking.result()


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
