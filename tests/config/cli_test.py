"""The command line: one line for the user's faults, one for Ctrl-C, and the help."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from raft_jax.config import cli
from raft_jax.config import load as config_load
from tests.helpers import least_config

STAGE = """
import sys, time
from raft_jax import errors; from raft_jax.config import cli as command_line
def main(c):
  if c.output == "bad": raise errors.UserError("q.jsonl:3: is empty")
  if c.output == "slow":
    print("ready", flush=True)
    time.sleep(60)
  print("ran", c.train.batch_size, "jax" in sys.modules)
command_line.run("train", main, "Trains the model.")
"""


def least_file(folder: pathlib.Path) -> pathlib.Path:
  return least_config.write(folder, least_config.LEAST)


def stage(*arguments: object) -> subprocess.CompletedProcess[str]:
  command = [sys.executable, "-c", STAGE, *map(str, arguments)]
  return subprocess.run(command, capture_output=True, text=True, check=False)


def test_command_runs_without_jax(tmp_path):
  done = stage("--config", least_file(tmp_path), "train.batch_size=8")
  assert (done.returncode, done.stdout, done.stderr) == (0, "ran 8 False\n", "")


@pytest.mark.parametrize(
  ("arguments", "says"),
  [
    (["--config", "{path}", "--train.bach_size", "8"], "`train.batch_size`?"),
    (["--config", "{path}", "output=bad"], "error: q.jsonl:3: is empty"),
    (["--config", "none.yaml"], "error: none.yaml: cannot read"),
    ([], "error: --config is missing; e.g. python -m raft_jax.train --config"),
    (["--config"], "error: command line: argument --config: expected one argument"),
    (["--config", "{path}", "output={path}"], "is not a folder; choose another output"),
    (["--config", "{path}", "data.questions=" + 999 * "a"], "aaa: File name too long;"),
  ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, arguments, says):
  path = least_file(tmp_path)
  done = stage(*[argument.format(path=path) for argument in arguments])
  assert done.returncode == 2
  assert done.stdout == ""
  (line,) = done.stderr.splitlines()
  assert line.startswith("error: ")
  assert says in line


def interrupted_once_ready(code: str, folder: pathlib.Path) -> tuple[int, str]:
  """Sends Ctrl-C to a stage that is at work; its status, and what it said."""
  command = [sys.executable, "-c", code, "--config", least_file(folder), "output=slow"]
  process = subprocess.Popen(
    command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )
  assert process.stdout is not None
  assert process.stdout.readline() == "ready\n"
  time.sleep(0.1)
  process.send_signal(signal.SIGINT)
  _, complaint = process.communicate(timeout=20)
  return process.returncode, complaint


AS_THE_README_SAYS = 130, "interrupted; run the same command again to continue\n"


def test_interrupt_gives_a_hint_and_130(tmp_path):
  assert interrupted_once_ready(STAGE, tmp_path) == AS_THE_README_SAYS


def test_interrupt_while_a_stage_is_being_imported(tmp_path):
  # A library in the working folder that stays half loaded and swallows what comes.
  (tmp_path / "yaml.py").write_text("""import time
print("loading", flush=True)
try: time.sleep(60)
except KeyboardInterrupt: pass
""")
  process = subprocess.Popen(
    [sys.executable, "-m", "raft_jax.refine", "--help"],
    cwd=tmp_path,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert process.stdout is not None
  assert process.stdout.readline() == "loading\n"
  process.send_signal(signal.SIGINT)
  _, complaint = process.communicate(timeout=20)
  assert (process.returncode, complaint) == AS_THE_README_SAYS


def test_interrupt_that_a_library_turns_into_its_own_error(tmp_path):
  code = STAGE.replace(
    "time.sleep(60)",
    """try: time.sleep(60)
    except KeyboardInterrupt: raise ImportError("half loaded") from None""",
  )
  assert interrupted_once_ready(code, tmp_path) == AS_THE_README_SAYS


def test_a_full_disk_says_so(tmp_path):
  # A file that may not grow stands for a disk that is full: written in pieces, neither
  # names the file.
  code = STAGE.replace(
    "time.sleep(60)",
    "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)); "
    f"open('{tmp_path}/log', 'ab', 0).write(b'x')",
  )
  done = subprocess.run(
    [sys.executable, "-c", code, "--config", least_file(tmp_path), "output=slow"],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 2, done.stderr
  line = "error: File too large: make room, then run the same command again\n"
  assert done.stderr.endswith(line)


def test_full_memory_says_which_keys_to_turn(tmp_path):
  code = STAGE.replace("time.sleep(60)", "__import__('jax').numpy.zeros(2**50)")
  command = [sys.executable, "-c", code, "--config", least_file(tmp_path)]
  done = subprocess.run(
    [*command, "output=slow"],
    capture_output=True,
    text=True,
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
    check=False,
  )
  assert done.returncode == 2, done.stderr
  line = done.stderr.splitlines()[-1]
  assert line.startswith("error: a device's memory is full (RESOURCE_EXHAUSTED: ")
  assert "4503599627370496" in line
  assert "train.micro_batches" in line
  assert "Traceback" not in done.stderr


def test_print_config_shows_every_value_and_stops(tmp_path):
  path = least_file(tmp_path)
  done = stage("--config", path, "--print-config", "train.seed=3")
  assert done.returncode == 0
  assert done.stdout == config_load.dump(config_load.load(path, ["train.seed=3"]))


def test_help_and_reference_list_every_key(tmp_path):
  leaves = set(config_load._flat(least_config.least(tmp_path).model_dump(mode="json")))
  leaves = {leaf.replace("judges.0", "judges[]") for leaf in leaves}
  leaves = {re.sub(r"\.\d+$", "", leaf) for leaf in leaves}  # items of plain lists
  help_text = stage("--help").stdout
  table = cli.reference()
  for leaf in leaves:
    assert f"\n  {leaf}  " in help_text
    assert f"\n| `{leaf}` | " in table
  assert "train.batch_size  int > 0 = 16\n      Questions per step" in help_text
  assert "| `train.learning_rate` | float >= 0 | `5e-06` | Its peak" in table
  assert "| `data.questions` | text | required | For training: JSONL" in table
  rows = [line.split(" | ") for line in table.splitlines()[2:]]
  assert all(len(row) == 4 and row[3].strip(" |") for row in rows)  # each has a meaning
