"""One function for each tracker's library, which opens or continues a run there.

Steps count from 1. Settings of a library's own (server, account, folder) are read by it
from the environment variables that its documentation names.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import pathlib
import struct
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

PROJECT = "raft_jax"
"""Name of the project where neither config nor environment has one."""


class Run(NamedTuple):
  """What a tracker is told about a run.

  Attributes:
    output: the run's folder, whose name is the name of the run.
    project: null: from the environment, else `PROJECT`.
    group: the sweep that the run belongs to.
    offline: use no server.
    settings: keys of the config and their values.
    step: the run goes on after this step.
    logged_until: the last step that was ever logged; steps up to it are logged again.
  """

  output: pathlib.Path
  project: str | None = None
  group: str | None = None
  offline: bool = False
  settings: Mapping[str, Any] = {}
  step: int = 0
  logged_until: int = 0


Row = tuple[int, Mapping[str, float]]
"""A step, and the values after it by their names."""


class Tracker(NamedTuple):
  """A run in a library, as functions.

  Attributes:
    run_id: opens the same run again; empty if the folder is enough.
    last_step: the last step that the library has; None if it cannot say.
    log: adds rows, in the order of their steps.
    summarise: adds the scores of the checkpoint of a step.
    attach: adds a picture, given as step, name and PNG.
    close: ends the run with the status finished, stopped or failed.
    threaded: whether calls may wait for a network, and so need a thread.
    batches: whether rows that wait go into one call.
  """

  run_id: str
  last_step: int | None
  log: Callable[[Sequence[Row]], None]
  summarise: Callable[[int, Mapping[str, float]], None]
  attach: Callable[[int, str, bytes], None]
  close: Callable[[str], None]
  threaded: bool = True
  batches: bool = False


def finite(values: Mapping[str, float]) -> dict[str, float]:
  """The values that are numbers; in `metrics.jsonl` the others are null."""
  return {name: value for name, value in values.items() if math.isfinite(value)}


def one_by_one(
  log: Callable[[int, Mapping[str, float]], None],
) -> Callable[[Sequence[Row]], None]:
  """Adds rows with a function that adds one."""

  def log_all(rows: Sequence[Row]) -> None:
    for step, values in rows:
      log(step, values)

  return log_all


@contextlib.contextmanager
def png_file(name: str, png: bytes) -> Iterator[pathlib.Path]:
  """A picture as a file, for libraries that read files only."""
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / f"{name.replace('/', '-')}.png"
    path.write_bytes(png)
    yield path


# --- TensorBoard ----------------------------------------------------------------------


class Board:
  """Appends scalars to a TensorBoard event file, in the caller's thread.

  tensorboardX's `SummaryWriter` uses a thread of its own: once a full disk has ended
  that thread, nothing empties its queue and the next scalar waits for ever.
  """

  def __init__(self, folder: pathlib.Path):
    """Starts a file. Raises ImportError without tensorboardX, OSError on a bad disk."""
    import tensorboardX
    from tensorboardX.proto import event_pb2, summary_pb2

    self._event: Any = event_pb2
    self._summary: Any = summary_pb2.Summary
    folder.mkdir(parents=True, exist_ok=True)
    # TensorBoard merges the files of a folder, so a resumed run adds one.
    path = folder / f"events.out.tfevents.{time.time():.6f}"
    self._records = tensorboardX.RecordWriter(str(path))
    self._append(file_version="brain.Event:2")

  def forget_after(self, step: int) -> None:
    """Makes readers drop later steps of the files before this one."""
    start = self._event.SessionLog(status=self._event.SessionLog.START)
    self._append(step=step + 1, session_log=start)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Adds one value to each named curve. Raises OSError if that fails."""
    scalars = [
      self._summary.Value(tag=name, simple_value=value)
      for name, value in values.items()
    ]
    self._append(step=step, summary=self._summary(value=scalars))

  def picture(self, step: int, name: str, png: bytes) -> None:
    """Adds a picture. Raises OSError if that fails."""
    width, height = struct.unpack(">II", png[16:24])
    image = self._summary.Image(
      width=width, height=height, colorspace=4, encoded_image_string=png
    )
    value = self._summary.Value(tag=name, image=image)
    self._append(step=step, summary=self._summary(value=[value]))

  def close(self) -> None:
    # `write` has flushed every event, or raised.
    with contextlib.suppress(OSError):
      self._records.close()

  def _append(self, **fields: Any) -> None:
    event = self._event.Event(wall_time=time.time(), **fields)
    self._records.write(event.SerializeToString())
    self._records.flush()


def tensorboard(run: Run, run_id: str | None) -> Tracker:
  """A new event file in the run's folder."""
  del run_id
  board = Board(run.output / "tensorboard")
  if run.logged_until > run.step:
    board.forget_after(run.step)
  return Tracker(
    run_id="",
    last_step=run.step,
    log=one_by_one(board.write),
    summarise=board.write,
    attach=board.picture,
    close=lambda status: board.close(),
    threaded=False,
  )


# --- Weights & Biases -----------------------------------------------------------------


def wandb(run: Run, run_id: str | None) -> Tracker:
  """A run of Weights & Biases; offline if nobody has logged in."""
  import wandb as library

  mode = "offline" if run.offline else os.environ.get("WANDB_MODE")
  settings = library.Settings(
    # No copy of the terminal, of the code, of the command line or of the packages.
    console="off",
    disable_code=True,
    disable_git=True,
    x_disable_meta=True,
    x_disable_stats=True,
    x_save_requirements=False,
    silent=True,
    init_timeout=30,
  )
  if mode is None and not library.login(prompt=False):
    mode = "offline"
  written = last_offline_step(run.output, run_id) if run_id else None
  live = library.init(
    project=run.project or os.environ.get("WANDB_PROJECT") or PROJECT,
    name=run.output.name,
    group=run.group or os.environ.get("WANDB_RUN_GROUP"),
    id=run_id or uuid.uuid4().hex[:8],
    # Offline there is nothing to resume from: `wandb sync` joins the parts by their id.
    resume=None if mode == "offline" else "allow",
    mode=mode,  # type: ignore[arg-type]
    dir=str(run.output),
    config=None if run_id else dict(run.settings),
    settings=settings,
  )

  def attach(step: int, name: str, png: bytes) -> None:
    with png_file(name, png) as path:
      live.summary[f"report/{name}"] = library.Image(str(path))

  return Tracker(
    run_id=live.id,
    last_step=written if live.offline else live.starting_step - 1,
    log=one_by_one(lambda step, values: live.log(finite(values), step=step)),
    summarise=lambda step, scores: live.summary.update(finite(scores)),
    attach=attach,
    close=lambda status: live.finish(exit_code=0 if status == "finished" else 1),
  )


def last_offline_step(output: pathlib.Path, run_id: str) -> int:
  """The last step in the files of an offline run; 0 if there is none.

  A killed process may have handed over more rows than wandb had written.
  """
  from wandb.proto import wandb_internal_pb2

  messages: Any = wandb_internal_pb2
  last = 0
  for path in output.glob(f"wandb/offline-run-*-{run_id}/*.wandb"):
    for record in _leveldb_records(path.read_bytes(), 7):
      for item in messages.Record.FromString(record).history.item:
        if "_step" in (item.key, *item.nested_key):
          last = max(last, int(item.value_json))
  return last


def _leveldb_records(raw: bytes, place: int) -> Iterator[bytes]:
  """The whole records of a LevelDB log, from a place in the file on.

  Blocks have 32 KiB. A record is in one or several parts, and each part has a header of
  7 bytes: checksum, length (2 bytes) and kind (1 whole, 2 first, 3 middle, 4 last).
  https://github.com/google/leveldb/blob/main/doc/log_format.md
  """
  record = b""
  while place + 7 <= len(raw):
    left = 32768 - place % 32768
    if left < 7:  # too short for a header
      place += left
      continue
    length = int.from_bytes(raw[place + 4 : place + 6], "little")
    kind = raw[place + 6]
    place += 7
    if place + length > len(raw):  # torn
      return
    record += raw[place : place + length]
    place += length
    if kind in (1, 4):
      yield record
      record = b""


# --- MLflow ---------------------------------------------------------------------------

MLFLOW_BATCH = 800
"""Metrics of a call; it may have 1000, and a row is added whole."""

MLFLOW_STEP = "raft_jax.last_step"
"""The tag of an MLflow run that says how far it got."""


def mlflow(run: Run, run_id: str | None) -> Tracker:
  """A run of MLflow, on its server or in its local store."""
  import mlflow as library
  from mlflow import entities

  for noisy in ("mlflow", "alembic"):
    logging.getLogger(noisy).setLevel(logging.WARNING)
  uri = library.get_tracking_uri()
  if run.offline and not uri.startswith(("sqlite:", "file:", "/", ".")):
    uri = "sqlite:///mlflow.db"
  client = library.MlflowClient(tracking_uri=uri)
  if run_id is None:
    run_id, last_step = start_mlflow(client, run), 0
  else:
    found = client.get_run(run_id)
    if found.info.lifecycle_stage != "active":
      raise LookupError("the run was deleted")
    last_step = int(found.data.tags.get(MLFLOW_STEP, 0))
    client.update_run(run_id, status="RUNNING")

  def metrics(step: int, values: Mapping[str, float]) -> list[Any]:
    now = int(time.time() * 1000)
    return [entities.Metric(n, v, now, step) for n, v in finite(values).items()]

  def log(rows: Sequence[Row]) -> None:
    batch: list[Any] = []
    for number, (step, values) in enumerate(rows, 1):
      batch += metrics(step, values)
      if len(batch) >= MLFLOW_BATCH or number == len(rows):
        tag = entities.RunTag(MLFLOW_STEP, str(step))
        # Synchronous: this is a thread of its own already.
        client.log_batch(run_id, metrics=batch, tags=[tag], synchronous=True)
        batch = []

  def summarise(step: int, scores: Mapping[str, float]) -> None:
    client.log_batch(run_id, metrics=metrics(step, scores), synchronous=True)

  def attach(step: int, name: str, png: bytes) -> None:
    with png_file(name, png) as path:
      client.log_artifact(run_id, str(path), "report")

  status_names = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
  return Tracker(
    run_id=run_id,
    last_step=last_step,
    log=log,
    summarise=summarise,
    attach=attach,
    close=lambda status: client.set_terminated(run_id, status_names[status]),
    batches=True,  # a call takes 0.1 s, however short
  )


def start_mlflow(client: Any, run: Run) -> str:
  """Creates a run in the experiment of the project; returns its id."""
  from mlflow import entities

  name = run.project or os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
  experiment_id = mlflow_experiment(client, name)
  tags = {"group": run.group} if run.group else {}
  created = client.create_run(experiment_id, run_name=run.output.name, tags=tags)
  params = [entities.Param(key, str(value)) for key, value in run.settings.items()]
  for start in range(0, len(params), 100):
    batch = params[start : start + 100]
    client.log_batch(created.info.run_id, params=batch, synchronous=True)
  return str(created.info.run_id)


def mlflow_experiment(client: Any, name: str) -> str:
  """The id of an experiment, which is created if there is none."""
  found = client.get_experiment_by_name(name)
  if found is None:
    try:
      return str(client.create_experiment(name))
    except Exception:  # another task of the sweep may have been faster
      found = client.get_experiment_by_name(name)
      if found is None:
        raise
  return str(found.experiment_id)


# --- Trackio --------------------------------------------------------------------------


def trackio(run: Run, run_id: str | None) -> Tracker:
  """A run of Trackio, in its local database or on its server."""
  if run.offline:
    for variable in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
      os.environ.pop(variable, None)
  import trackio as library

  live = library.init(
    project=run.project or os.environ.get("TRACKIO_PROJECT") or PROJECT,
    # A run is found by its name, so that of two folders must differ.
    name=run_id or f"{run.output.name}-{uuid.uuid4().hex[:6]}",
    group=run.group,
    config=dict(run.settings),
    resume="must" if run_id else "never",
    embed=False,
    auto_log_cpu=False,
    auto_log_gpu=False,
  )
  next_step = getattr(live, "_next_step", None)

  def close(status: str) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
      live.finish()

  def attach(step: int, name: str, png: bytes) -> None:
    with png_file(name, png) as path:
      live.log({f"report/{name}": library.Image(str(path))}, step=step)

  return Tracker(
    run_id=live.name,
    last_step=None if next_step is None else next_step - 1,
    log=one_by_one(lambda step, values: live.log(finite(values), step=step)),
    summarise=lambda step, scores: live.log(finite(scores), step=step),
    attach=attach,
    close=close,
  )


class Library(NamedTuple):
  """A library that the config can name.

  Attributes:
    title: its name in messages.
    module: what Python imports.
    open: starts a run, or continues that of an id; raises if that one is gone.
  """

  title: str
  module: str
  open: Callable[[Run, str | None], Tracker]


LIBRARIES = {
  "tensorboard": Library("TensorBoard", "tensorboardX", tensorboard),
  "wandb": Library("Weights & Biases", "wandb", wandb),
  "mlflow": Library("MLflow", "mlflow", mlflow),
  "trackio": Library("Trackio", "trackio", trackio),
}
"""The libraries by their names in the config, which are those of their extras."""
