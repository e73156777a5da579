"""Who may import whom: the order of the rooms and the fences around libraries."""

import ast
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "raft_jax"

# A room imports only rooms before it. DESIGN: "Rooms"; the README draws it.
ROOMS = [
  "errors",
  "host_memory",
  "hosts",
  "statistics",
  "bootstrap",
  "rouge",
  "losses",
  "vocab_head",
  "balance",
  "sharding",
  "anchors",
  "masks",
  "optim",
  "strict_yaml",
  "durable",
  "records",
  "shards",
  "rotary",
  "model",
  "prune",
  "trainable",
  "families",
  "family_config",
  "lora",
  "gguf_file",
  "hf",
  "hf_tokenizer",
  "hf_export",
  "text",
  "data",
  "sample",
  "engines",
  "jax_engine",
  "vllm_engine",
  "openai_engine",
  "encode",
  "methods",
  "schema",
  "key_table",
  "conflicts",
  "config",
  "command_line",
  "progress",
  "journal",
  "asking",
  "roles",
  "judge",
  "benchmarks",
  "run_folder",
  "pages",
  "panel",
  "refinement",
  "refine_report",
  "refined_folder",
  "documents",
  "duplicates",
  "sealed",
  "pairs",
  "extract",
  "clusters",
  "synthesise",
  "refine",
  "examples",
  "replay",
  "objective",
  "step",
  "siblings",
  "fisher",
  "units",
  "checkpoint",
  "metrics",
  "recipe",
  "programs",
  "wiring",
  "outcome",
  "starting",
  "footprint",
  "measure",
  "distance",
  "harness_model",
  "harness",
  "exam",
  "watch",
  "train",
  "evaluate",
  "export",
  "collected",
  "sweep",
  "machines",
  "cost",
  "dry_run",
  "plan",
  "figures",
  "contrasts",
  "curves",
  "comparison",
  "report",
]

# Library -> the rooms that may import it, anywhere in the file.
FENCES = {
  "vllm": {"vllm_engine"},
  "openai": {"openai_engine"},
  "sentence_transformers": {"encode"},
  "torch": {"encode"},
  "orbax": {"checkpoint"},
  "lm_eval": {"benchmarks", "harness_model", "harness"},
  "nltk": {"benchmarks"},
  "langdetect": {"benchmarks"},
  "datasets": {"benchmarks"},
  "safetensors": {"hf", "hf_export"},
  "gguf": {"gguf_file"},
  "grain": {"shards", "data"},
  "array_record": {"shards", "data"},
  "datasketch": {"duplicates"},
  "sklearn": {"clusters"},
  "semantic_text_splitter": {"documents"},
  "matplotlib": {"figures", "curves"},
  # Chat templates, and pages.
  "jinja2": {"hf_tokenizer", "text", "pages", "harness_model"},
  "pickle": set(),
  "cloudpickle": set(),
  "dill": set(),
  "joblib": set(),
}

# Rooms for other people's stacks: these libraries, the standard one, and no room.
ALONE = {"losses", "vocab_head", "balance"}
ALONE_LIBRARIES = {"jax", "optax", "numpy"}

# Rooms that start without jax, whatever they import; grain imports jax.
LIGHT = {
  *("errors", "strict_yaml", "records", "shards", "text", "engines", "encode"),
  *("jax_engine", "vllm_engine", "openai_engine", "roles", "methods"),
  *("schema", "conflicts", "config", "command_line", "journal", "judge", "refine"),
  *("documents", "duplicates", "sealed", "pairs", "extract"),
  *("clusters", "synthesise"),
}
HEAVY = {"jax", "flax", "optax", "orbax", "grain", "chex"}


class Import(NamedTuple):
  library: str  # top-level name; "raft_jax" for our own
  room: str  # "" unless ours
  at_start: bool  # runs when the module is imported


def imports(source: str) -> list[Import]:
  return list(_walk(ast.parse(source), at_start=True))


def _walk(node: ast.AST, at_start: bool) -> Iterator[Import]:
  for child in ast.iter_child_nodes(node):
    if isinstance(child, ast.Import):
      for alias in child.names:
        library, *rest = alias.name.split(".")
        ours = rest[0] if library == "raft_jax" and rest else ""
        yield Import(library, ours, at_start)
    elif isinstance(child, ast.ImportFrom):
      path = (child.module or "").split(".")
      if child.level:
        path = ["raft_jax", *filter(None, path)]
      if path[0] != "raft_jax":
        yield Import(path[0], "", at_start)
      elif len(path) > 1:
        yield Import("raft_jax", path[1], at_start)
      else:
        for alias in child.names:
          yield Import("raft_jax", alias.name, at_start)
    else:
      lazy = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
      typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(
        child.test
      )
      yield from _walk(child, at_start and not lazy and not typing_only)


def faults(sources: dict[str, str]) -> list[str]:
  """Every breach in {room: source}, as text."""
  found = {room: imports(source) for room, source in sources.items()}
  result = []
  for room, seen in found.items():
    if room not in ROOMS:
      result.append(f"{room}: not a room; name it in ROOMS and in the README")
      continue
    above = set() if room in ALONE else set(ROOMS[: ROOMS.index(room)])
    for item in seen:
      if item.room and item.room not in above and not item.room.startswith("__"):
        result.append(f"{room}: imports {item.room}, which is not above it")
      if room not in FENCES.get(item.library, {room}):
        result.append(f"{room}: imports {item.library}, which is fenced")
      known = ALONE_LIBRARIES | sys.stdlib_module_names
      if room in ALONE and item.library not in known and not item.room:
        result.append(f"{room}: imports {item.library}")
    if room in LIGHT:
      heavy = sorted(_loads(room, found) & HEAVY)
      result += [f"{room}: loads {library} at its start" for library in heavy]
  return result


def _loads(room: str, found: dict[str, list[Import]]) -> set[str]:
  """Libraries that importing a room loads, through other rooms too."""
  result, todo, done = set(), [room], set()
  while todo:
    current = todo.pop()
    done.add(current)
    for item in found.get(current, []):
      if item.at_start:
        result.add(item.library)
        todo += [item.room] if item.room and item.room not in done else []
  return result


def test_the_package_keeps_its_order_and_fences():
  sources = {
    path.stem: path.read_text(encoding="utf-8")
    for path in PACKAGE.glob("*.py")
    if path.stem != "__init__"
  }
  assert len(sources) > 5
  assert faults(sources) == []


def test_importing_the_package_imports_only_the_standard_library():
  found = imports((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
  assert {item.library for item in found} <= sys.stdlib_module_names


def test_every_room_is_named_once():
  assert len(set(ROOMS)) == len(ROOMS)


@pytest.mark.parametrize(
  ("room", "source", "fault"),
  [
    (
      "records",
      "from raft_jax.data import batching as data",
      "imports data, which is not above",
    ),
    ("records", "def f():\n  import raft_jax.train", "imports train, which is not"),
    (
      "records",
      "from raft_jax.models.transformer import init",
      "imports model, which is not",
    ),
    ("records", "from . import text", "imports text, which is not above it"),
    ("records", "from .text import load", "imports text, which is not above it"),
    ("losses", "from raft_jax import errors", "imports errors, which is not above"),
    ("balance", "import flax", "imports flax"),
    ("train", "import torch.nn", "imports torch, which is fenced"),
    ("train", "try:\n  import orbax\nexcept ImportError: pass", "imports orbax"),
    ("data", "import pickle", "imports pickle, which is fenced"),
    ("text", "import jax.numpy as jnp", "loads jax at its start"),
    ("journal", "class A:\n  import optax", "loads optax at its start"),
    ("utils", "", "not a room"),
  ],
)
def test_each_breach_is_seen(room, source, fault):
  (seen,) = faults({room: source})
  assert seen.startswith(f"{room}: {fault}")


def test_a_light_room_may_not_load_jax_through_another():
  sources = {
    "refine": "from raft_jax.models import sampling as sample",
    "sample": "import jax",
  }
  assert faults(sources) == ["refine: loads jax at its start"]


@pytest.mark.parametrize(
  ("room", "source"),
  [
    (
      "vllm_engine",
      "def f():\n  import jax, vllm\n  from raft_jax.models import sampling as sample",
    ),
    ("text", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n  import jax"),
    ("losses", "import math\nimport jax\nimport numpy as np\nimport optax"),
    ("hf", "import raft_jax\nfrom raft_jax import __version__"),
    ("shards", "from raft_jax.storage import records\nfrom array_record import python"),
  ],
)
def test_what_is_allowed(room, source):
  assert faults({room: source}) == []


@pytest.mark.parametrize("room", sorted(LIGHT & {p.stem for p in PACKAGE.glob("*.py")}))
def test_light_rooms_really_start_without_jax(room):
  code = f"import sys, raft_jax.{room}; print('jax' in sys.modules)"
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  assert done.stdout == "False\n"


def test_another_programs_ctrl_c_stays_its_own(tmp_path):
  """Its `python -m` may import our losses while it starts."""
  (tmp_path / "their_stack.py").write_text(
    "import signal\n"
    "import raft_jax.losses\n"
    "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
  )
  (tmp_path / "their_package").mkdir()
  (tmp_path / "their_package/__init__.py").write_text("from their_stack import *\n")
  (tmp_path / "their_package/run.py").write_text("")
  done = subprocess.run(
    [sys.executable, "-m", "their_package.run"],
    check=False,
    capture_output=True,
    text=True,
    cwd=tmp_path,
    env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
  )
  assert done.returncode == 0, done.stderr
