"""Who may import whom: the order of the wings and the fences around libraries.

The order is that of the table in raft_jax/README.md; modules are found in the folders.
"""

import ast
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "raft_jax"
TABLE = (PACKAGE / "README.md").read_text(encoding="utf-8")
WINGS = re.findall(r"^\| \[(\w+)\]\(\w+/README\.md\)", TABLE, re.MULTILINE)

# For other people's stacks: these import the standard library and the libraries below.
ALONE = {"losses", "vocab_head", "balance"}
ALONE_LIBRARIES = {"jax", "optax", "numpy"}
BOTTOM = {*ALONE, "errors"}

# Library -> the wings or modules that may import it, anywhere in the file.
FENCES = {
  "vllm": {"generation"},
  "openai": {"generation"},
  "sentence_transformers": {"generation"},
  "torch": {"generation"},
  "ray": {"generation.ray_workers"},
  "orbax": {"training.checkpoint"},
  "lm_eval": {"evaluation"},
  "nltk": {"evaluation"},
  "langdetect": {"evaluation"},
  "datasets": {"evaluation", "storage.hub_datasets"},
  "safetensors": {"hf"},
  "gguf": {"hf"},
  "grain": {"storage", "data"},
  "array_record": {"storage", "data"},
  "datasketch": {"curation"},
  "sklearn": {"curation"},
  "semantic_text_splitter": {"curation"},
  "matplotlib": {"reporting"},
  "jinja2": {"reporting"},
  **{
    name: {"training.tracker_libraries"}
    for name in ("tensorboardX", "wandb", "mlflow", "trackio")
  },
  **{name: set() for name in ("pickle", "cloudpickle", "dill", "joblib")},
}

# Modules that start without jax, whatever they import; grain imports jax.
LIGHT = {
  "errors",
  "refine",
  "extract",
  "synthesise",
  "config.cli",
  "config.load",
  "config.methods",
  "config.run_lock",
  "config.schema",
  "config.strict_yaml",
  "config.validate",
  "generation.engines",
  "generation.jax_engine",
  "generation.judging",
  "generation.openai_engine",
  "generation.ray_workers",
  "generation.roles",
  "generation.sentence_encoder",
  "generation.thinking",
  "generation.vllm_engine",
  "hf.chat",
  "hf.teacher_prompts",
  "runtime.environment",
  "runtime.interrupts",
  "config.data_layout",
  "storage.arrow_rows",
  "storage.delimited",
  "storage.hub_datasets",
  "storage.hub_errors",
  "storage.journal",
  "storage.question_files",
  "storage.records",
  "storage.rejects",
  "storage.row_files",
  "storage.row_formats",
  "storage.row_layout",
  "storage.sealed_folder",
  "storage.shards",
  "storage.sources",
  "curation.clusters",
  "curation.documents",
  "curation.extraction",
  "curation.extraction_run",
  "curation.near_duplicates",
  "curation.qa_pairs",
  "curation.refined_folder",
  "curation.refinement",
  "curation.refinement_run",
  "curation.reselection",
  "curation.stage_run",
  "curation.synthesis",
  "curation.synthesis_run",
}
HEAVY = {"jax", "flax", "optax", "orbax", "grain", "chex"}


class Import(NamedTuple):
  library: str  # top-level name; "raft_jax" for our own
  module: str  # of ours, below the package: "hf.load", "errors"; "" for others
  at_start: bool  # runs when the importing module is imported


def module_name(path: pathlib.Path) -> str:
  return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def modules() -> dict[str, str]:
  """Name -> source of every module, in wings and at the top."""
  return {
    module_name(path): path.read_text(encoding="utf-8")
    for path in PACKAGE.rglob("*.py")
    if path.stem != "__init__"
  }


def wing(module: str) -> str:
  return module.partition(".")[0] if "." in module else ""


def imports(source: str) -> list[Import]:
  return list(_walk(ast.parse(source), at_start=True))


def _walk(node: ast.AST, at_start: bool) -> Iterator[Import]:
  for child in ast.iter_child_nodes(node):
    if isinstance(child, ast.Import):
      for alias in child.names:
        yield _import(alias.name, at_start)
    elif isinstance(child, ast.ImportFrom):
      parent = ".".join(["raft_jax"] * bool(child.level) + [child.module or ""])
      for alias in child.names:
        yield _import(f"{parent.strip('.')}.{alias.name}", at_start)
    else:
      lazy = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
      typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(
        child.test
      )
      yield from _walk(child, at_start and not lazy and not typing_only)


def _import(dotted: str, at_start: bool) -> Import:
  library, _, rest = dotted.partition(".")
  if library != "raft_jax":
    return Import(library, "", at_start)
  parts = rest.split(".")
  known = ".".join(parts[: 2 if parts[0] in WINGS else 1])
  return Import(library, "" if known.startswith("__") else known, at_start)


def rank(module: str) -> int:
  """Its place in the order: 0 at the bottom, then the wings, then the commands."""
  if module in BOTTOM:
    return 0
  return WINGS.index(wing(module)) + 1 if wing(module) else len(WINGS) + 1


def faults(sources: dict[str, str]) -> list[str]:
  """Every breach in {module: source}, as text."""
  imported = {name: imports(source) for name, source in sources.items()}
  result = []
  for name, listed in imported.items():
    if wing(name) and wing(name) not in WINGS:
      result.append(f"{name}: its folder is not in the table of raft_jax/README.md")
      continue
    for item in listed:
      result += [f"{name}: {fault}" for fault in _faults(name, item)]
    if name in LIGHT:
      heavy = sorted(_loads(name, imported) & HEAVY)
      result += [f"{name}: loads {library} at its start" for library in heavy]
  return result


def _faults(name: str, item: Import) -> Iterator[str]:
  ours = item.module
  if ours and name in ALONE:
    yield f"imports {ours}, and other people's stacks have none of it"
  elif ours and not wing(ours) and ours not in BOTTOM:
    yield f"imports {ours}, which is a command"
  elif ours and rank(ours) > rank(name):
    yield f"imports {ours}, which is not above it"
  allowed = FENCES.get(item.library)
  if allowed is not None and not {name, wing(name)} & allowed:
    yield f"imports {item.library}, which is fenced"
  known = ALONE_LIBRARIES | sys.stdlib_module_names
  if name in ALONE and not ours and item.library not in known:
    yield f"imports {item.library}"


def _loads(name: str, imported: dict[str, list[Import]]) -> set[str]:
  """Libraries that importing a module loads, through our other modules too."""
  result, todo, done = set(), [name], set()
  while todo:
    current = todo.pop()
    done.add(current)
    for item in imported.get(current, []):
      if item.at_start:
        result.add(item.library)
        todo += [item.module] if item.module and item.module not in done else []
  return result


def test_the_table_lists_every_wing_and_no_other():
  folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
  assert len(WINGS) == len(folders)
  assert set(WINGS) == folders


def test_the_package_keeps_its_order_and_fences():
  assert len(modules()) > 60
  assert faults(modules()) == []


def test_within_a_wing_no_imports_go_in_a_circle():
  imported = {name: imports(source) for name, source in modules().items()}

  def reachable(name: str) -> set[str]:
    todo, seen = [name], set()
    while todo:
      for item in imported.get(todo.pop(), []):
        if item.at_start and item.module and item.module not in seen:
          seen.add(item.module)
          todo.append(item.module)
    return seen

  assert [name for name in imported if name in reachable(name)] == []


def test_init_files_of_wings_are_empty():
  for path in PACKAGE.glob("*/__init__.py"):
    assert path.read_text() == "", path


def test_importing_the_package_imports_only_the_standard_library():
  imported = imports((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
  ours = {item.module for item in imported if item.module}
  libraries = {item.library for item in imported if not item.module} - {"raft_jax"}
  for name in ours:
    libraries |= _loads(name, {name: imports(modules()[name])}) - {"raft_jax"}
  assert libraries <= sys.stdlib_module_names


def test_no_module_has_the_name_of_a_standard_one_or_of_a_library_it_uses():
  # `python -m` puts the working folder on the path, never that of the package, so the
  # name of a command is no danger: tests/inspect_test.py.
  names = [name.rpartition(".")[2] for name in modules() if name != "inspect"]
  libraries = {
    item.library for source in modules().values() for item in imports(source)
  }
  assert not set(names) & (sys.stdlib_module_names | libraries)


def test_no_test_imports_another_test():
  folder = pathlib.Path(__file__).parent
  tests = [*folder.rglob("*_test.py"), *folder.rglob("conftest.py")]
  names = {path.stem for path in tests}
  assert len(names) > 60
  for path in folder.rglob("*.py"):
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    imported = {
      part
      for node in nodes
      if isinstance(node, (ast.Import, ast.ImportFrom))
      for name in (getattr(node, "module", None), *(item.name for item in node.names))
      for part in (name or "").split(".")
    }
    assert not imported & names, f"{path} imports {sorted(imported & names)}"


@pytest.mark.parametrize(
  ("module", "source", "fault"),
  [
    ("storage.records", "from raft_jax.data import batching", "imports data.batching"),
    ("storage.records", "def f():\n  import raft_jax.train", "imports train, which is"),
    ("hf.chat", "from raft_jax.training.optim import chain", "imports training.optim"),
    ("models.lora", "from raft_jax import sweep", "imports sweep, which is a command"),
    ("train", "from raft_jax import evaluate", "imports evaluate, which is a command"),
    ("losses", "from raft_jax import errors", "imports errors, and other people's"),
    ("balance", "import flax", "imports flax"),
    ("train", "import torch.nn", "imports torch, which is fenced"),
    ("train", "try:\n  import orbax\nexcept ImportError: pass", "imports orbax"),
    ("training.optim", "import orbax.checkpoint", "imports orbax, which is fenced"),
    ("data.batching", "import pickle", "imports pickle, which is fenced"),
    ("hf.chat", "import jax.numpy as jnp", "loads jax at its start"),
    ("storage.journal", "class A:\n  import optax", "loads optax at its start"),
    ("utils.misc", "", "its folder is not in the table"),
  ],
)
def test_each_breach_is_seen(module, source, fault):
  (seen,) = faults({module: source})
  assert seen.startswith(f"{module}: {fault}")


def test_a_light_module_may_not_load_jax_through_another():
  sources = {
    "refine": "from raft_jax.models import sampling",
    "models.sampling": "import jax",
  }
  assert faults(sources) == ["refine: loads jax at its start"]


@pytest.mark.parametrize(
  ("module", "source"),
  [
    ("generation.vllm_engine", "def f():\n  import jax, vllm"),
    ("hf.chat", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n  import jax"),
    ("losses", "import math\nimport jax\nimport numpy as np\nimport optax"),
    ("hf.load", "import raft_jax\nfrom raft_jax import __version__"),
    ("storage.shards", "from raft_jax.storage import records"),
    ("sweep", "from raft_jax.runtime import stage_process"),
  ],
)
def test_what_is_allowed(module, source):
  assert faults({module: source}) == []


@pytest.mark.parametrize("module", sorted(LIGHT & modules().keys()))
def test_light_modules_really_start_without_jax(module):
  code = f"import sys, raft_jax.{module}; print('jax' in sys.modules)"
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  assert done.stdout == "False\n"


def test_light_modules_exist():
  assert modules().keys() >= LIGHT


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
