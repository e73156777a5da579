"""The list of commands: the modules, the README and what `python -m raft_jax` does."""

import pathlib
import re
import subprocess
import sys

import pytest

import raft_jax
from raft_jax.config import commands
from tests.helpers import driver_lines

ROOT = pathlib.Path(__file__).parents[2]


def run(*words: str, options: tuple[str, ...] = ("-m",), **more):
  command = [sys.executable, *options[:-1], options[-1], "raft_jax", *words]
  return subprocess.run(command, capture_output=True, text=True, check=False, **more)


def test_every_command_is_listed_and_no_other_module():
  found = {
    path.stem
    for path in (ROOT / "raft_jax").glob("*.py")
    if "\n  cli.run(" in path.read_text(encoding="utf-8")
  }
  assert found == set(commands.COMMANDS)


def test_the_readme_has_the_same_words():
  text = (ROOT / "README.md").read_text(encoding="utf-8")
  table = text.partition("| command | what it does | read more |")[2].split("\n\n")[0]
  rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", table, re.MULTILINE)
  assert rows == list(commands.COMMANDS.items())


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",), ("help",)])
def test_the_list_comes_without_loading_anything_heavy(words):
  done = run(*words, options=("-X", "importtime", "-m"))
  assert done.returncode == 0
  listed = re.findall(r"^  (\w+)  ", done.stdout, re.MULTILINE)
  assert listed == list(commands.COMMANDS)
  loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
  assert "raft_jax.config.commands" in loaded
  assert not loaded & {"jax", "numpy", "pydantic", "rich", "transformers"}


def test_the_version():
  assert run("--version").stdout == f"raft_jax {raft_jax.__version__}\n"


@pytest.mark.parametrize(
  ("word", "says"),
  [
    ("trian", "there is no command 'trian'; did you mean train?"),
    ("exprt", "did you mean export or report?"),
    ("losses", "there is no command 'losses'; `raft-jax` lists them"),
    ("--config", "there is no command '--config'"),
    ("", "there is no command ''"),
    ("train.batch_size=8", "there is no command 'train.batch_size=8'"),
  ],
)
def test_an_unknown_command_is_one_line(word, says):
  done = run(word)
  assert (done.returncode, done.stdout) == (2, "")
  (line,) = done.stderr.splitlines()
  assert line.startswith("error: command line: ")
  assert says in line


@pytest.mark.parametrize("options", [("-m",), ("-s", "-B", "-m"), ("-Bm",)])
def test_a_command_is_what_it_is_under_its_own_name(options):
  named = run("report", "--config", "none.yaml", options=options)
  own = subprocess.run(
    [sys.executable, "-m", "raft_jax.report", "--config", "none.yaml"],
    capture_output=True,
    text=True,
    check=False,
  )
  assert own.returncode == 2
  assert (named.returncode, named.stdout, driver_lines.without(named.stderr)) == (
    own.returncode,
    own.stdout,
    driver_lines.without(own.stderr),
  )


def test_a_reader_that_closes_the_pipe_gets_no_traceback():
  done = subprocess.run(
    f"{sys.executable} -m raft_jax | true; exit ${{PIPESTATUS[0]}}",
    shell=True,
    executable="/bin/bash",
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode in (0, 141)
  assert done.stderr == ""
