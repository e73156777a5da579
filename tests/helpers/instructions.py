"""Every command that the project prints, and what bash makes of it.

Commands are collected from Markdown files, from strings and docstrings of the package
and from comments of configs and launchers. Each is run by bash in a folder that looks
like a clone, where the words for the reader's own (FILE, N, ...) are real files and
numbers, and where `python`, pip and the clusters' tools write down how they were
called: quotes, loops and the launchers themselves are really run, up to the program's
start.
"""

import ast
import itertools
import pathlib
import re
import shutil
import subprocess
from collections.abc import Iterator
from typing import NamedTuple

import yaml

ROOT = pathlib.Path(__file__).parents[2]


class Printed(NamedTuple):
  """A command and the file:line that prints it."""

  where: str
  text: str


class Call(NamedTuple):
  """A program's start: its name and folder as the shell saw them, and its arguments."""

  program: str
  folder: str
  arguments: tuple[str, ...]


# --- Collecting -----------------------------------------------------------------------

STARTS = (
  r"(?:[A-Z_]+=\S+ +)*"
  r"(?:(?:\.venv\S*/bin/)?python[\d.]* +(?:-[mc]\b|\S+\.py\b)"
  r"|(?:\S*/)?pip[\d.]* +install|launch/\S+\.(?:sh|sbatch)\b"
  r"|sbatch +\S|kubectl +\S|gcloud +\S|vllm +serve|ray +(?:job +submit|start) +-"
  r"|nohup +\S|pre-commit +\S|source +\S*activate|for +\w+ +in\b)"
)
COMMAND = re.compile(STARTS)
ASIDE = re.compile(rf"(?:: |\bor )({STARTS}.*)")
SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
FENCE = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)


def tracked(*patterns: str) -> list[pathlib.Path]:
  """Files of the repository, new ones included."""
  listed = subprocess.run(
    ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  paths = [ROOT / name for name in sorted(set(listed.stdout.splitlines()))]
  return [path for path in paths if path.is_file()]


def everything() -> list[Printed]:
  printed: list[Printed] = []
  for path in tracked("*.md"):
    printed += in_text(path.read_text(encoding="utf-8"), name(path))
  for path in tracked("raft_jax/*.py", "tests/*.py"):
    for line, text in strings(path):
      printed += in_text(text, name(path), line)
  for path in tracked("*.yaml", "*.sh", "*.sbatch", "*.txt", "*.toml"):
    printed += in_comments(path.read_text(encoding="utf-8"), name(path))
  return printed


def name(path: pathlib.Path) -> str:
  return str(path.relative_to(ROOT))


def in_text(text: str, file: str, line: int = 1) -> Iterator[Printed]:
  """Shell blocks, inline code, and lines that are a command and nothing else."""

  def at(position: int) -> str:
    return f"{file}:{line + text.count(chr(10), 0, position)}"

  def blank(match: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", match[0])

  for block in FENCE.finditer(text):
    if block[1] in ("bash", "sh", "shell", "console"):
      yield Printed(at(block.start()), block[2])
  text = FENCE.sub(blank, text)
  for span in SPAN.finditer(text):
    code = " ".join(span[1].split())
    if COMMAND.match(code):
      yield Printed(at(span.start()), code)
  text = SPAN.sub(blank, text)
  for match in re.finditer(rf"^ *({STARTS}.*)$", text, re.MULTILINE):
    yield Printed(at(match.start()), match[1])


def unmarked(text: str) -> list[str]:
  """Commands in the middle of a sentence and not in backticks: where do they end?"""
  text = SPAN.sub("", FENCE.sub("", text))
  starts = [(match.start(), match[0]) for match in COMMAND.finditer(text)]
  at_start = [match.end() for match in re.finditer(r"^ *", text, re.MULTILINE)]
  names = r"launch/\S+|for +\w+ +in"  # a script may be named, and English has `for`
  return [
    start
    for position, start in starts
    if position not in at_start and not re.fullmatch(names, start)
  ]


def strings(path: pathlib.Path) -> Iterator[tuple[int, str]]:
  """The package's strings; of the tests, whose strings are data, the docstrings."""
  tree = ast.parse(path.read_text(encoding="utf-8"))
  if ROOT / "tests" in path.parents:
    text = ast.get_docstring(tree)
    yield from [(1, text)] if text else []
    return
  inner = {
    id(part)
    for node in ast.walk(tree)
    if isinstance(node, ast.JoinedStr)
    for part in node.values
  }
  for node in ast.walk(tree):
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
      if id(node) not in inner:
        yield node.lineno, node.value
    elif isinstance(node, ast.JoinedStr):
      parts = [
        str(part.value) if isinstance(part, ast.Constant) else "{PLACE}"
        for part in node.values
      ]
      yield node.lineno, "".join(parts)


def in_comments(text: str, file: str) -> Iterator[Printed]:
  """Of shell and YAML: lines that are a command, or end in one after a colon."""
  lines = iter(enumerate(text.splitlines(), 1))
  for number, line in lines:
    comment = re.match(r"\s*# ?(.*)", line)
    if comment is None:
      continue
    for span in SPAN.finditer(comment[1]):
      if COMMAND.match(span[1]):
        yield Printed(f"{file}:{number}", span[1])
    rest = SPAN.sub("", comment[1]).strip()
    aside = ASIDE.search(rest)
    command = rest if COMMAND.match(rest) else aside[1] if aside else None
    if command is None:
      continue
    while command.endswith("\\") or (
      command.startswith("for ") and "done" not in command
    ):
      command += "\n" + next(lines)[1].lstrip().removeprefix("#")
    yield Printed(f"{file}:{number}", command)


# --- Words for the reader's own -------------------------------------------------------

USAGE = (
  (r"<stage>|(?<=raft_jax\.)(STAGE|COMMAND|\{PLACE\})", "train"),
  (r"(?<=\.\[)\{PLACE\}", "refine"),
  (r"\{PLACE\}", "place"),
  (r" \[--print-config\]", ""),
  (r"\[key=value \.\.\.\]", "train.seed=1"),
  (r"\[CONFIG\]", "configs/raft_paper.yaml"),
  (r"\[DOMAIN \.\.\.\]", "law"),
  (r"COMMAND \[ARGUMENT \.\.\.\]", "true"),
  (r"(?<= )\[(-{0,2}[\w|-]+(?: [A-Z]+)?)\]$", r"\1"),
  (r"\[(--[\w-]+ [A-Z]+)\]", r"\1"),
  (r"(?<=\d) \.\.\.$", " --config my.yaml"),
)
WORDS = {
  "C": "my.yaml",
  "COUNT": "2",
  "EXTRAS": "refine",
  "FILE": "my.yaml",
  "FOLDER": "folder",
  "N": "2",
  "T": "v5e:4x4",
}


def filled(text: str) -> list[str]:
  """The command with files and numbers in the place of words; one for each of `a|b`."""
  for pattern, value in USAGE:
    text = re.sub(pattern, value, text)
  for word, value in WORDS.items():
    text = re.sub(rf"(?<![\w./$-]){word}(?![\w./=])", value, text)
  # Named and not written out: `python -m raft_jax.refine` with this config.
  if re.fullmatch(r"python -m raft_jax\.\w+", text):
    text += " --config my.yaml"
  choice = re.search(r"(?<= )\w+(\|\w+)+(?= |$)", text)
  if choice is None:
    return [text]
  return [text.replace(choice[0], option) for option in choice[0].split("|")]


def only_named(text: str) -> bool:
  """A script that a sentence names: that it is there is enough."""
  return re.fullmatch(r"launch/\S+", text) is not None


# --- Running --------------------------------------------------------------------------

RECORDER = """\
#!/usr/bin/env bash
printf '%s\\0' "$0" "$PWD" "$@" > "$(mktemp "$CALLS/XXXXXXXX")"
case ${0##*/} in
  gcloud)
    while [ "$1" != --command ]; do shift; done
    cd .. && exec bash -euc "$2"
    ;;
  sbatch)
    export SLURM_JOB_ID=7 SLURM_ARRAY_JOB_ID=7 SLURM_ARRAY_TASK_ID=0
    export SLURM_ARRAY_TASK_COUNT=8 SLURM_JOB_NODELIST=n1,n2 SLURM_JOB_NUM_NODES=2
    export SLURM_GPUS_ON_NODE=8 SLURM_PROCID=0
    exec bash "$@"
    ;;
  srun) exec "$@" ;;
  nvidia-smi) exit 1 ;;
esac
"""
PROGRAMS = (
  *("bin/python", "bin/python3", "bin/python3.11", "bin/pip", "bin/vllm"),
  *("bin/gcloud", "bin/kubectl", "bin/sbatch", "bin/srun", "bin/scontrol"),
  *("bin/scancel", "bin/squeue", "bin/nvidia-smi", "bin/pre-commit", "bin/ray"),
  *(".venv/bin/python", ".venv/bin/ruff", ".venv/bin/mypy", ".venv/bin/activate"),
  *(".venv-vllm/bin/python", ".venv-vllm/bin/ray"),
)
MY_YAML = """\
model: {source: some/model}
data: {questions: train.jsonl, test: test.jsonl}
extract: {documents: folder, writer: {engine: jax}, judges: [{engine: jax}]}
method: ssr
synthesise: {seeds: train.jsonl}
sweep: {runs: [{name: one}]}
output: runs/mine
"""


def clone(folder: pathlib.Path) -> pathlib.Path:
  """A folder like a clone, called raft_jax, with recorders for what would run long."""
  here = folder / "raft_jax"
  here.mkdir()
  shutil.copytree(ROOT / "launch", here / "launch")
  files = ("pyproject.toml", "setup.py", "constraints.txt", "README.md", "LICENSE")
  for kept in ("configs", "raft_jax", *files):
    (here / kept).symlink_to(ROOT / kept)
  for program in PROGRAMS:
    path = here / program
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("" if path.name == "activate" else RECORDER)
    path.chmod(0o755)
  law = ROOT / "configs/data/wordnet/law"
  (here / "folder").mkdir()
  shutil.copytree(law, here / "folder/law")
  (here / "folder/ifeval.jsonl").write_text("")
  for split in ("train", "test", "validation"):
    shutil.copy(law / f"{split}.jsonl", here)
  shutil.copy(law / "train.jsonl", here / "YOURS.jsonl")
  (here / "my.yaml").write_text(MY_YAML)
  return here


class Ran(NamedTuple):
  status: int
  said: str
  calls: list[Call]


def run(command: str, here: pathlib.Path) -> Ran:
  """What bash makes of a command in `here`."""
  calls = here.parent / "calls"
  shutil.rmtree(calls, ignore_errors=True)
  calls.mkdir()
  # Of the machine's own programs these alone: nothing is started that is not replaced.
  environment = {
    "PATH": f"{here / 'bin'}:/usr/bin:/bin",
    "HOME": str(here.parent),
    "CALLS": str(calls),
    "PAUSE": "0",
    "RESTARTS": "0",
  }
  done = subprocess.run(
    ["bash", "-euo", "pipefail", "-c", f"{command}\nwait"],
    cwd=here,
    env=environment,
    capture_output=True,
    text=True,
    check=False,
    timeout=60,
  )
  made = [path.read_bytes().decode().split("\0")[:-1] for path in calls.iterdir()]
  started = [Call(call[0], call[1], tuple(call[2:])) for call in made]
  for call in list(started):
    if pathlib.Path(call.program).name == "kubectl":
      for inside in containers(here / call.arguments[-1]):
        started += run(inside, here).calls
  return Ran(done.returncode, done.stderr, started)


def containers(manifest: pathlib.Path) -> Iterator[str]:
  """The commands that a Kubernetes manifest starts, with /run in the clone."""

  def walk(node: object) -> Iterator[dict]:
    if isinstance(node, dict):
      yield from node.get("containers", ())
    below = node.values() if isinstance(node, dict) else node
    if isinstance(node, (dict, list)):
      yield from itertools.chain.from_iterable(walk(part) for part in below)

  for tree in yaml.safe_load_all(manifest.read_text()):
    for container in walk(tree):
      words = [*container["command"], *container.get("args", ())]
      quoted = " ".join("'" + word.replace("/run/", "") + "'" for word in words)
      yield f"export JOB_COMPLETION_INDEX=0; {quoted}"
