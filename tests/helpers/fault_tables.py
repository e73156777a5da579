"""The tables of `faults.yaml`: what goes wrong, and the test of each fault."""

import ast
import functools
import pathlib
import textwrap

import yaml

ROOT = pathlib.Path(__file__).parents[2]
FAULTS = ROOT / "tests/faults.yaml"
SLOW = "pytest.mark.slow"
# How a reason begins that a fault has no test, and what the counts say of it.
REASONS = {
  "not tested yet": "are not tested yet",
  "needs": "need what the tests do not have",
  "does not apply": "do not apply",
}


def read() -> dict[str, list[dict[str, str]]]:
  """Stage -> faults that hit it, each with a test or a reason why it has none."""
  return yaml.safe_load(FAULTS.read_text(encoding="utf-8"))


@functools.cache
def marks(path: pathlib.Path) -> dict[str, str]:
  """Test -> slow, partly slow or nothing, in a file that is parsed and not imported."""
  tree = ast.parse(path.read_text(encoding="utf-8"))
  all_slow = any(
    isinstance(node, ast.Assign)
    and ast.unparse(node.targets[0]) == "pytestmark"
    and SLOW in ast.unparse(node.value)
    for node in tree.body
  )
  found = {}
  for node in tree.body:
    if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
      decorators = [*map(ast.unparse, node.decorator_list)]
      part = "partly slow" if any(SLOW in text for text in decorators) else ""
      found[node.name] = "slow" if all_slow or SLOW in decorators else part
  return found


def mark(test: str) -> str:
  path, _, name = test.partition("::")
  return marks(ROOT / path)[name]


def counts() -> str:
  """How many faults have a test, and of the others how many have which reason."""
  rows = [row for stage in read().values() for row in stage]
  tests = [row["test"] for row in rows if "test" in row]
  reasons = [row["reason"] for row in rows if "reason" in row]
  without = ", ".join(
    f"{sum(reason.startswith(start) for reason in reasons)} {words}"
    for start, words in REASONS.items()
  )
  slow = [*map(mark, tests)].count("slow")
  text = (
    f"{len(rows)} faults: {len(tests)} with a test ({slow} with a slow one), "
    f"{len(reasons)} without, of which {without}."
  )
  return textwrap.fill(text, 88) + "\n"


def tables() -> str:
  """A table of the faults of each stage."""
  lines = []
  for stage, rows in read().items():
    title = stage[0].upper() + stage[1:]
    lines += [f"## {title}", "", "| fault | test |", "| --- | --- |"]
    for row in rows:
      cell = row.get("reason", "")
      if "test" in row:
        path, _, name = row["test"].partition("::")
        cell = f"[`{name}`]({path.removeprefix('tests/')})"
        cell = ", ".join(filter(None, (cell, mark(row["test"]))))
      lines.append(f"| {row['fault']} | {cell} |")
    lines.append("")
  return "\n".join(lines)
