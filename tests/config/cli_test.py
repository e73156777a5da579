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
from raft_jax.runtime import environment
from tests.helpers import driver_lines, least_config

STAGE = """
import sys, time
from raft_jax import errors
from raft_jax.config import cli as command_line
from raft_jax.runtime import interrupts
def main(c):
  if c.output == "bad": raise errors.UserError("q.jsonl:3: is empty")
  if c.output == "slow":
    print("ready", flush=True)
    work()
  print("ran", c.train.batch_size, "jax" in sys.modules)
def work():
  for _ in range(6000):
    time.sleep(0.01)
    interrupts.check()
command_line.run("train", main, "Trains the model.")
"""


ROOT = pathlib.Path(__file__).parents[2]


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
    ([], "error: --config is missing; write `python -m raft_jax.train --config"),
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


def struck_once_ready(
  code: str, folder: pathlib.Path, *blows: signal.Signals, after_s: float = 0.4
) -> tuple[int, str]:
  """Sends signals to a stage that is at work; its status, and what it said."""
  command = [sys.executable, "-c", code, "--config", least_file(folder), "output=slow"]
  process = subprocess.Popen(
    command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )
  assert process.stdout is not None
  assert process.stdout.readline() == "ready\n"
  for blow in blows:
    time.sleep(after_s)
    process.send_signal(blow)
  _, complaint = process.communicate(timeout=20)
  return process.returncode, driver_lines.without(complaint)


HINT = "interrupted; run the same command again to continue\n"
NOTED = (
  "stopping after the current step, batch or compilation; send the signal again to "
  "stop now\n"
)


@pytest.mark.parametrize(
  ("blow", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
def test_a_signal_gives_a_hint_and_its_status(tmp_path, blow, status):
  assert struck_once_ready(STAGE, tmp_path, blow) == (status, NOTED + HINT)


@pytest.mark.parametrize(
  "blows",
  [
    (signal.SIGINT, signal.SIGINT),
    (signal.SIGTERM, signal.SIGINT),
    (signal.SIGINT, signal.SIGTERM),
  ],
)
def test_a_second_signal_ends_the_process_in_the_middle_of_work(tmp_path, blows):
  code = STAGE.replace("interrupts.check()", "pass")
  assert struck_once_ready(code, tmp_path, *blows) == (128 + blows[1], NOTED + HINT)


def test_a_signal_sent_twice_at_once_is_one(tmp_path):
  # As by a terminal and by a launcher that passes on what it gets.
  blows = [signal.SIGTERM] * 2
  outcome = struck_once_ready(
    STAGE.replace("0.01", "0.5"), tmp_path, *blows, after_s=0.02
  )
  assert outcome == (143, NOTED + HINT)


SWALLOWERS = {
  # As jax's own callback of the garbage collector, which runs all through compilation.
  "gc": """
def slow(phase, info): time.sleep(0.01)
import gc
gc.callbacks.append(slow)
def work():
  for _ in range(2000):
    gc.collect()
    interrupts.check()
""",
  "jax": """
import gc
import jax
def work():
  for _ in range(200):
    gc.collect()
    interrupts.check()
""",
  "del": """
class Slow:
  def __del__(self): time.sleep(0.01)
def work():
  for _ in range(2000):
    Slow()
    interrupts.check()
""",
  "except": """
def work():
  for _ in range(2000):
    try: time.sleep(0.01)
    except BaseException: pass
    interrupts.check()
""",
  # A finaliser of an object that a library holds weakly.
  "weakref": """
import weakref
class Held: pass
def slow(ref): time.sleep(0.01)
def work():
  for _ in range(2000):
    held = Held(); ref = weakref.ref(held, slow); del held
    interrupts.check()
""",
}


@pytest.mark.parametrize("place", SWALLOWERS)
def test_no_callback_can_swallow_a_signal(tmp_path, place):
  code = STAGE.replace("command_line.run(", SWALLOWERS[place] + "command_line.run(")
  assert struck_once_ready(code, tmp_path, signal.SIGINT) == (130, NOTED + HINT)


def test_a_signal_after_all_was_done_still_ends_a_script(tmp_path):
  code = STAGE.replace("interrupts.check()", "pass").replace("6000", "100")
  assert struck_once_ready(code, tmp_path, signal.SIGINT) == (130, NOTED + HINT)


def test_a_stage_passes_signals_on_to_the_process_that_it_started(tmp_path):
  # In a session of its own, where no terminal reaches it.
  code = STAGE.replace(
    "def work():",
    """import subprocess
def work():
  command = [sys.executable, "-c", "import time; time.sleep(60)"]
  child = subprocess.Popen(command, start_new_session=True)
  with interrupts.passing_on(child.pid):
    print("child", child.wait(), file=sys.stderr, flush=True)
""",
  )
  status, said = struck_once_ready(code, tmp_path, signal.SIGTERM)
  assert status == 143
  assert sorted(said.splitlines(keepends=True)) == sorted([NOTED, "child -15\n", HINT])


def test_what_fails_while_stopping_is_said(tmp_path):
  code = STAGE.replace(
    "interrupts.check()", "if interrupts.received: raise errors.UserError('disk full')"
  )
  said = f"{NOTED}error while stopping: disk full\n{HINT}"
  assert struck_once_ready(code, tmp_path, signal.SIGINT) == (130, said)


def test_a_process_started_meanwhile_has_signals_of_its_own(tmp_path):
  # Also where it is forked: a signal to the group must not count twice, nor be lost.
  code = STAGE.replace(
    "def work():",
    """import os, signal, warnings
def work():
  warnings.simplefilter("ignore")  # Python 3.12 warns of forks among threads
  child = os.fork()
  if child == 0:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
  status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
  print("child", status, interrupts.received, file=sys.stderr, flush=True)
""",
  )
  status, said = struck_once_ready(code, tmp_path, signal.SIGINT)
  assert (status, said) == (130, f"child -15 []\n{NOTED}{HINT}")


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
  assert (process.returncode, complaint) == (130, HINT)


def test_a_full_disk_says_so(tmp_path):
  # A file that may not grow stands for a disk that is full: written in pieces, neither
  # names the file.
  code = STAGE.replace(
    "    work()",
    "    import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)); "
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


def stage_that_calls(call, tmp_path, *, platform):
  """A stage whose work is one call of jax, on a platform."""
  code = STAGE.replace("    work()", f"    __import__('jax').{call}")
  return subprocess.run(
    [sys.executable, "-c", code, "--config", least_file(tmp_path), "output=slow"],
    capture_output=True,
    text=True,
    env={**os.environ, "JAX_PLATFORMS": platform},
    check=False,
  )


def test_full_memory_says_which_keys_to_turn(tmp_path):
  done = stage_that_calls("numpy.zeros(2**50)", tmp_path, platform="cpu")
  assert done.returncode == 2, done.stderr
  line = done.stderr.splitlines()[-1]
  assert line.startswith("error: a device's memory is full (RESOURCE_EXHAUSTED: ")
  assert "4503599627370496" in line
  assert "train.micro_batches" in line
  assert "Traceback" not in done.stderr


@pytest.mark.parametrize("platform", ["cuda", "rocm", "nonsense"])
def test_an_accelerator_that_is_demanded_and_missing_is_one_line(tmp_path, platform):
  done = stage_that_calls("devices()", tmp_path, platform=platform)
  assert done.returncode == 2, done.stderr
  line = done.stderr.splitlines()[-1]
  assert line.startswith("error: ")
  assert "unset JAX_PLATFORMS" in line
  assert platform in line


def test_print_config_shows_every_value_and_stops(tmp_path):
  path = least_file(tmp_path)
  done = stage("--config", path, "--print-config", "train.seed=3")
  assert done.returncode == 0
  assert done.stdout == config_load.dump(config_load.load(path, ["train.seed=3"]))


def test_help_and_reference_list_every_key(tmp_path):
  """Each key of a whole config once: in full, or as one that roles share."""
  leaves = set(config_load.flat(least_config.least(tmp_path).model_dump(mode="json")))
  leaves = {leaf.replace("judges.0", "judges[]") for leaf in leaves}
  leaves = {re.sub(r"\.\d+$", "", leaf) for leaf in leaves}  # items of plain lists
  help_text = stage("--help").stdout
  tables = cli.reference() + cli.engine_reference()
  roles = {leaf.removesuffix(".engine") for leaf in leaves if leaf.endswith(".engine")}
  assert roles == {"refine.rewriter", "refine.fusion", "refine.judges[]"}
  for leaf in leaves:
    section, _, last = leaf.rpartition(".")
    names = {leaf, f"<role>.{last}"} if section in roles else {leaf}
    assert any(f"\n  {name}  " in help_text for name in names), leaf
    assert any(f"\n| `{name}` | " in tables for name in names), leaf
  assert "train.batch_size  int > 0 = 16\n      Questions per step" in help_text
  assert "| `train.learning_rate` | float >= 0 | `5e-06` | " in tables
  assert "| `data.questions` | text | required | " in tables
  rows = [line.split(" | ") for line in tables.splitlines()]
  assert all(len(row) == 4 and row[3].strip(" |") for row in rows if len(row) > 1)


def test_what_roles_share_is_listed_once():
  """And what a role has of its own, beside it."""
  tables = cli.reference() + cli.engine_reference()
  for key in ("base_url", "timeout_s", "tensor_parallel", "memory_share", "top_p"):
    assert tables.count(f"| `<role>.{key}` | ") == 1
    assert f"| `refine.fusion.{key}` | " not in tables
  assert "| `refine.judges[].engine` | one of encoder, jax" in tables
  assert "| `extract.writer.max_new_tokens` | int > 0 | `1024` | " in tables
  assert "| `synthesise.writer.top_p` | float > 0 and <= 1 | `0.6` | " in tables
  top_p = next(line for line in tables.splitlines() if "<role>.top_p" in line)
  assert "Not a key of `extract.judges[]`, `refine.judges[]`, `evaluate." in top_p


# What the shell brings along

PRINTS = """
import sys
from raft_jax.config import cli as command_line
from rich import console, table
def main(c):
  print("λ 1.5 – «caf\u00e9» ≥ 0.3 … " + chr(0xd83d))
  rows = table.Table(title="λ·L_KD", box=__import__("rich.box").box.HEAVY)
  rows.add_column("λ"); rows.add_row("–")
  console.Console().print(rows)
  print("error: λ", file=sys.stderr)
command_line.run("train", main, "Trains the model.")
"""


@pytest.mark.parametrize(
  "shell",
  [
    {"PYTHONIOENCODING": "latin-1"},
    {"PYTHONIOENCODING": "ascii"},
    {"PYTHONIOENCODING": "cp1252"},
    {"PYTHONIOENCODING": "koi8-r:strict"},
    {"PYTHONIOENCODING": "utf-8"},
    {"LC_ALL": "C"},
    {"LANG": "POSIX", "LC_ALL": ""},
    {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
  ],
)
def test_output_is_readable_in_any_encoding(tmp_path, shell):
  (tmp_path / "prints.py").write_text(PRINTS, encoding="utf-8")
  command = [sys.executable, str(tmp_path / "prints.py")]
  command += ["--config", str(least_file(tmp_path))]
  done = subprocess.run(
    command,
    capture_output=True,
    check=False,
    env={**os.environ, "PYTHONPATH": str(ROOT), **shell},
  )
  assert done.returncode == 0, done.stderr
  encoding = shell.get("PYTHONIOENCODING", "utf-8").partition(":")[0]
  said = done.stdout.decode(encoding)
  letter = "λ" if "λ".encode(encoding, "ignore") else "lambda"
  if "LC_ALL" not in shell:  # which Python may turn into UTF-8
    assert said.startswith(f"{letter} 1.5")
    assert f"error: {letter}" in done.stderr.decode(encoding)
  assert re.match("(λ|lambda) 1.5 ", said)


@pytest.mark.parametrize("argument", ["--help", "--print-config", "output=slow"])
def test_a_reader_that_leaves_ends_a_command_quietly(tmp_path, argument):
  code = STAGE.replace("    work()", "    [print('x' * 99) for _ in range(9999)]")
  process = subprocess.Popen(
    [sys.executable, "-c", code, "--config", str(least_file(tmp_path)), argument],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )
  assert process.stdout is not None
  process.stdout.close()
  assert process.stderr is not None
  assert process.stderr.read() == b""
  # As a shell says of other programs; argparse passes over it.
  assert process.wait() == (0 if argument == "--help" else 128 + signal.SIGPIPE)


@pytest.mark.parametrize("argument", ["--print-config", "output=other"])
def test_output_on_a_full_disk_says_so(tmp_path, argument):
  with open("/dev/full", "w") as full:
    done = subprocess.run(
      [sys.executable, "-c", STAGE, "--config", str(least_file(tmp_path)), argument],
      stdout=full,
      stderr=subprocess.PIPE,
      text=True,
      check=False,
    )
  assert (done.returncode, done.stderr) == (
    2,
    "error: No space left on device: make room, then run the same command again\n",
  )


def report(folder: pathlib.Path, *options: str, **shell: str):
  """A command of its own, which imports little and refuses a folder without a run."""
  path = least_file(folder)
  done = subprocess.run(
    [sys.executable, *options, "-m", "raft_jax.report", "--config", str(path)],
    capture_output=True,
    text=True,
    check=False,
    env={**os.environ, **shell},
  )
  done.stderr = driver_lines.without(done.stderr)
  return done


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("JAX_ENABLE_X64", "1"),
    ("JAX_ENABLE_X64", "perhaps"),  # which jax refuses with a traceback
    ("JAX_DEBUG_NANS", "True"),
    ("JAX_NUMPY_RANK_PROMOTION", "raise"),
    ("JAX_NUMPY_DTYPE_PROMOTION", "strict"),
    ("JAX_DEFAULT_PRNG_IMPL", "rbg"),
    ("JAX_THREEFRY_PARTITIONABLE", "0"),
    ("JAX_TRANSFER_GUARD", "disallow"),
  ],
)
def test_settings_of_jax_that_decide_results_are_set_aside(tmp_path, name, value):
  done = report(tmp_path, **{name: value})
  assert done.returncode == 2
  line, error = done.stderr.splitlines()
  assert line == f"ignored, because it would change this command: {name}={value}"
  assert error.startswith("error: output: ")


def test_settings_at_their_usual_values_pass_without_a_word(tmp_path):
  shell = {"JAX_ENABLE_X64": "0", "JAX_THREEFRY_PARTITIONABLE": "1"}
  shell |= {"JAX_NUMPY_RANK_PROMOTION": "allow", "JAX_LOG_COMPILES": "1"}
  (error,) = report(tmp_path, **shell).stderr.splitlines()
  assert error.startswith("error: output: ")


def test_compiled_programs_are_kept_unless_the_user_says_where(tmp_path):
  cache = "JAX_COMPILATION_CACHE_DIR"
  for given in ("", "/elsewhere"):
    settings = {cache: given, "XDG_CACHE_HOME": str(tmp_path)}
    environment.keep_programs(settings)
    assert settings[cache] == given
  assert not list(tmp_path.iterdir())
  settings = {"XDG_CACHE_HOME": str(tmp_path)}
  environment.keep_programs(settings)
  folder = pathlib.Path(settings[cache])
  assert folder.is_dir()
  assert folder.parent == tmp_path / "raft_jax"
  again = {"XDG_CACHE_HOME": str(tmp_path)}
  environment.keep_programs(again)
  assert again == settings
  (tmp_path / "file").touch()
  settings = {"XDG_CACHE_HOME": str(tmp_path / "file")}
  environment.keep_programs(settings)
  assert cache not in settings


COMPILE = """
import jax, jax.numpy as jnp
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
print(jax.jit(lambda x: (x @ x.T).sum())(jnp.ones((8, 4))))
"""


@pytest.mark.parametrize("damage", [b"", b"not a program", None])
def test_a_damaged_compiled_program_is_compiled_again(tmp_path, damage):
  def run():
    done = subprocess.run(
      [sys.executable, "-c", COMPILE],
      env={**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path)},
      capture_output=True,
      text=True,
      check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout

  first = run()
  kept = [path for path in tmp_path.rglob("*-cache") if path.is_file()]
  assert kept
  for path in kept:
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2] if damage is None else damage)
  assert run() == first == "256.0\n"


def test_jax_has_the_settings_that_are_set_aside():
  import jax

  names = {name.upper() for name in jax.config.values}
  gone = {name for name in environment.JAX_SETTINGS if name not in names}
  assert gone == {"JAX_DEFAULT_DTYPE_BITS"}  # of earlier versions
  for name, usual in environment.JAX_SETTINGS.items():
    value = jax.config.values.get(name.lower())
    text = str(getattr(value, "value", value) or "").lower()
    if name in names and name != "JAX_EXPLICIT_X64_DTYPES":
      assert value is None or text in usual or not text, name


def test_flags_that_xla_does_not_know_are_one_line(tmp_path):
  done = report(tmp_path, XLA_FLAGS="--xla_no_such_flag=1")
  assert done.returncode == 2
  (line,) = done.stderr.splitlines()
  assert line.startswith("error: XLA_FLAGS: ")
  assert "--xla_no_such_flag=1" in line
  known = report(tmp_path, XLA_FLAGS="--xla_force_host_platform_device_count=2")
  assert known.stderr.startswith("error: output: ")


@pytest.mark.parametrize(
  ("options", "shell"),
  [
    (["-W", "error"], {}),
    ([], {"PYTHONWARNINGS": "error"}),
    ([], {"PYTHONWARNINGS": "error::DeprecationWarning"}),
  ],
)
def test_warnings_are_no_errors(tmp_path, options, shell):
  line, error = report(tmp_path, *options, **shell).stderr.splitlines()
  assert line.endswith("change this command: warnings as errors")
  assert error.startswith("error: output: ")


@pytest.mark.parametrize(
  ("options", "shell"),
  [
    (["-OO"], {}),
    (["-O", "-O", "-B"], {}),
    ([], {"PYTHONOPTIMIZE": "2"}),
    (["-OO"], {"PYTHONOPTIMIZE": "3", "JAX_ENABLE_X64": "1"}),
  ],
)
def test_docstrings_are_kept_for_the_libraries_that_read_them(tmp_path, options, shell):
  line, error = report(tmp_path, *options, **shell).stderr.splitlines()
  assert line.endswith("Python without docstrings")
  assert line.count("JAX_ENABLE_X64=1") == ("JAX_ENABLE_X64" in shell)
  assert error.startswith("error: output: ")


@pytest.mark.parametrize(
  "shell",
  [
    {"PYTHONOPTIMIZE": "1"},
    {"HOME": "/proc/nowhere"},
    {"TMPDIR": "/nowhere", "MPLCONFIGDIR": "/proc/nowhere"},
    {"TERM": "", "COLUMNS": "1"},
    {"PYTHONHASHSEED": "7", "PYTHONDONTWRITEBYTECODE": "1"},
  ],
)
@pytest.mark.slow
def test_other_things_of_a_shell_change_nothing(tmp_path, shell):
  (error,) = report(tmp_path, **shell).stderr.splitlines()
  assert error.startswith("error: output: ")


def test_others_keep_their_settings_of_jax():
  code = (
    "import raft_jax.losses, raft_jax.vocab_head, raft_jax.balance, jax, os; "
    "print(jax.config.jax_enable_x64, os.environ['JAX_ENABLE_X64'])"
  )
  done = subprocess.run(
    [sys.executable, "-c", code],
    capture_output=True,
    text=True,
    check=True,
    env={**os.environ, "JAX_ENABLE_X64": "1"},
  )
  assert done.stdout == "True 1\n"
