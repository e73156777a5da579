"""Trackers of a run: TensorBoard, Weights & Biases, MLflow and Trackio.

`metrics.jsonl` is the record, and a tracker follows it: what it lacks is sent when it
is opened, and a step that it has is not sent again. So a resumed run is one curve. Each
library works in a thread of its own, so that no step waits for a network, and its first
error ends it with one warning.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import importlib.util
import io
import json
import os
import pathlib
import queue
import re
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from raft_jax import errors
from raft_jax.config import schema
from raft_jax.storage import atomic
from raft_jax.training import tracker_libraries

FILE = "trackers.json"
"""File of a run's folder: which run of each tracker it is, and how far that got."""

OPEN_SECONDS = CLOSE_SECONDS = 120.0
"""The longest that a start or an end waits for a tracker."""

SETTINGS = (
  "model.source",
  "model.dtype",
  "method",
  "data.questions",
  "data.answers",
  "data.limit",
  *(
    f"train.{key}"
    for key in (
      *("epochs", "max_steps", "batch_size", "learning_rate", "weight_decay"),
      *("warmup_ratio", "clip", "cross_entropy", "loss_mean", "seed"),
    )
  ),
  *("lora", "rollout", "distill", "balance"),
)
"""The keys of the config that a tracker shows; none may hold a secret."""


def describe(
  train: schema.Train, output: pathlib.Path, settings: Mapping[str, Any]
) -> tracker_libraries.Run:
  """What trackers are told about a run.

  Args:
    settings: the values of `SETTINGS`.
  """
  shown = {
    key: redact(value) if isinstance(value, str) else value
    for key, value in settings.items()
  }
  return tracker_libraries.Run(
    output,
    project=train.tracker_project,
    group=train.tracker_group,
    offline=train.tracker_offline,
    settings=shown,
  )


def require(listed: Iterable[str]) -> None:
  """Checks that the libraries are installed.

  Raises:
    errors.UserError: one is missing.
  """
  for name in listed:
    if importlib.util.find_spec(tracker_libraries.LIBRARIES[name].module) is None:
      raise errors.UserError(
        f"train.trackers: {name} is not installed; run {errors.install(name)}, or "
        "leave it out"
      )


class Feed:
  """Hands calls to one tracker in their order, until its first error."""

  def __init__(
    self, name: str, tracker: tracker_libraries.Tracker, last_step: int, state: Any
  ):
    self.name, self.tracker, self.state = name, tracker, state
    self.last_step = last_step  # the last that was handed over
    self.sent = last_step  # the last that the library has taken
    self.error: Exception | None = None
    self._rows: collections.deque[tracker_libraries.Row] = collections.deque()
    self._calls: queue.SimpleQueue[tuple[Callable[..., None], Any] | None]
    self._calls = queue.SimpleQueue()
    self._thread: threading.Thread | None = None
    if tracker.threaded:
      self._thread = threading.Thread(target=self._work, daemon=True, name=name)
      self._thread.start()

  def log(self, step: int, values: Mapping[str, float]) -> None:
    """Adds the values of a step, unless the tracker has this step."""
    if step > self.last_step:
      self.last_step = step
      self._rows.append((step, values))
      self.call(self._log)

  def call(self, function: Callable[..., None], *arguments: Any) -> None:
    """Calls a function of the tracker, now or later."""
    if self._thread is None:
      self._try(function, *arguments)
    else:
      self._calls.put((function, arguments))

  def end(self, status: str) -> None:
    """Closes the tracker after all calls; an error is kept in `error`."""
    self.call(self.tracker.close, status)
    if self._thread is None:
      return
    self._calls.put(None)
    self._thread.join(CLOSE_SECONDS)
    if self._thread.is_alive() and self.error is None:
      self.error = TimeoutError(f"it took nothing for {CLOSE_SECONDS:.0f} s")

  def _log(self) -> None:
    """Sends the row of this call, or with it all that wait."""
    count = len(self._rows) if self.tracker.batches else 1
    rows = [self._rows.popleft() for _ in range(count)]
    if rows:  # otherwise an earlier call has sent them
      self.tracker.log(rows)
      self.sent = rows[-1][0]

  def _work(self) -> None:
    for function, arguments in iter(self._calls.get, None):
      self._try(function, *arguments)

  def _try(self, function: Callable[..., None], *arguments: Any) -> None:
    if self.error is not None and function is not self.tracker.close:
      return
    try:
      function(*arguments)
    except Exception as error:  # a library may raise anything, and the run goes on
      self.error = self.error or error


class Trackers:
  """The open trackers of a run, in its first process."""

  def __init__(self, run: tracker_libraries.Run, feeds: Sequence[Feed]):
    self._run, self.feeds = run, list(feeds)

  def write(self, step: int, values: Mapping[str, float], split: str = "train") -> None:
    """Logs the metrics after `step` steps."""
    named = {f"{split}/{name}": value for name, value in values.items()}
    for feed in self.feeds:
      feed.log(step, named)
    self._drop_failed()

  def summarise(self, step: int, scores: Mapping[str, float]) -> None:
    """Gives the run its scores, those of the checkpoint of a step."""
    for feed in self.feeds:
      if is_news(feed, "scores", json.dumps([step, scores], sort_keys=True).encode()):
        feed.call(feed.tracker.summarise, step, scores)

  def attach(self, pictures: Mapping[str, bytes]) -> None:
    """Attaches PNG files; one that the tracker has already is left out."""
    for feed in self.feeds:
      for name, png in pictures.items():
        if is_news(feed, name, png):
          feed.call(feed.tracker.attach, self._run.step, name, png)

  def close(self, status: str = "finished") -> None:
    """Waits for what was handed over; `status`: finished, stopped or failed."""
    for feed in self.feeds:
      feed.end(status)
    closed = list(self.feeds)
    self._drop_failed()
    save(self._run, closed, is_open=False)
    self.feeds = []

  def _drop_failed(self) -> None:
    failed = [feed for feed in self.feeds if feed.error is not None]
    for feed in failed:
      title = tracker_libraries.LIBRARIES[feed.name].title
      warn(f"{title} is off from now on: {feed.error}")
      self.feeds.remove(feed)
    if failed:
      save(self._run, failed, is_open=False)


def is_news(feed: Feed, name: str, content: bytes) -> bool:
  """Whether a tracker was not given this content under this name before."""
  digest = hashlib.sha256(content).hexdigest()
  given = feed.state.setdefault("given", {})
  if given.get(name) == digest:
    return False
  given[name] = digest
  return True


def open_all(
  listed: Sequence[str],
  run: tracker_libraries.Run,
  rows: Iterable[Mapping[str, Any]] = (),
) -> Trackers:
  """Opens the trackers of a run, and sends them the rows that they lack.

  Args:
    rows: of `metrics.jsonl`, up to the step at which the run goes on.
  """
  states = read_states(run.output)
  feeds = []
  for name in dict.fromkeys(listed):
    feed = open_one(name, run, states.get(name, {}))
    if feed is not None:
      feeds.append(feed)
  trackers = Trackers(run, feeds)
  save(run, feeds, is_open=True)
  for feed in feeds:
    for row in rows:
      values = {
        f"{row.get('split', 'train')}/{name}": value
        for name, value in row["values"].items()
        if value is not None
      }
      feed.log(row["step"], values)
  return trackers


def open_one(
  name: str, run: tracker_libraries.Run, state: dict[str, Any]
) -> Feed | None:
  """Continues the tracker's run, or starts one; None, with a warning, if that fails."""
  run_id, why = state.get("run"), None
  if run_id and was_copied(run.output, state):
    run_id, why = None, f"the folder is a copy of {state['output']}"
  title, _, opener = tracker_libraries.LIBRARIES[name]
  try:
    try:
      tracker = within(OPEN_SECONDS, lambda: opener(run, run_id))
    except Exception as error:
      if not run_id:
        raise
      run_id, why = None, str(error)
      tracker = within(OPEN_SECONDS, lambda: opener(run, None))
  except Exception as error:
    hint = f"; run {errors.install(name)}" if isinstance(error, ImportError) else ""
    warn(f"no {title} ({error}){hint}")
    return None
  if why is not None:
    warn(f"{title}: a new run, because the earlier one cannot go on ({why})")
  last_step = tracker.last_step
  if run_id is None:
    state = {}
    last_step = 0 if last_step is None else last_step
  elif last_step is None:
    last_step = state.get("last_step", 0)
    if state.get("open"):  # its process ended without a word
      last_step = max(last_step, run.logged_until)
  return Feed(name, tracker, last_step, state)


def within(seconds: float, function: Callable[[], Any]) -> Any:
  """The result of a function that prints nothing and may hang.

  Raises:
    TimeoutError: it took too long.
  """
  results: list[Any] = []
  failures: list[Exception] = []

  def work() -> None:
    try:
      results.append(function())
    except Exception as error:
      failures.append(error)

  thread = threading.Thread(target=work, daemon=True)
  with contextlib.redirect_stdout(io.StringIO()):
    thread.start()
    thread.join(seconds)
  if failures:
    raise failures[0]
  if not results:
    raise TimeoutError(f"no answer within {seconds:.0f} s")
  return results[0]


# --- The file of the run's identity ---------------------------------------------------


def read_states(output: pathlib.Path) -> dict[str, Any]:
  """The state of each tracker by its name; empty if there is none."""
  try:
    states = json.loads((output / FILE).read_text(encoding="utf-8"))
  except (OSError, ValueError):
    return {}
  if not isinstance(states, dict):
    return {}
  return {name: state for name, state in states.items() if isinstance(state, dict)}


def save(run: tracker_libraries.Run, feeds: Sequence[Feed], *, is_open: bool) -> None:
  """Records how far each tracker got."""
  if not feeds:
    return
  states = read_states(run.output)
  for feed in feeds:
    states[feed.name] = feed.state | {
      "run": feed.tracker.run_id,
      "output": str(run.output.resolve()),
      "last_step": feed.sent,
      "open": is_open,
    }
  try:
    with atomic.replacing(run.output / FILE) as path:
      path.write_text(json.dumps(states, indent=2) + "\n", encoding="utf-8")
  except OSError as error:
    warn(f"the trackers' runs are not recorded: {error}")


def was_copied(output: pathlib.Path, state: Mapping[str, Any]) -> bool:
  """Whether another folder, which is still there, has the same run."""
  there = pathlib.Path(str(state.get("output", output)))
  return there.resolve() != output.resolve() and (there / FILE).exists()


# --- Warnings -------------------------------------------------------------------------

SECRETS = re.compile(r"KEY|TOKEN|PASSWORD|SECRET")
"""In the names of environment variables whose values are not shown."""


def warn(text: str) -> None:
  """One warning, on one line, without secrets."""
  warnings.warn(" ".join(redact(text).split())[:500], stacklevel=3)


def redact(text: str) -> str:
  """A text without the passwords of URLs and the values of secret variables."""
  for name, value in os.environ.items():
    if SECRETS.search(name) and len(value) >= 8:
      text = text.replace(value, "***")
  text = re.sub(r"(?<=://)[^/\s@]+@", "***@", text)
  return re.sub(r"(?i)\b(\w*(?:token|api_key|password)=)[^&\s]+", r"\1***", text)
