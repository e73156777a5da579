"""What the README says of the code is what the code says.

`python -m tests.readme_test` writes the generated parts anew.
"""

import ast
import pathlib
import re
import subprocess
import types

import jax.numpy as jnp
import numpy as np
import pytest

from raft_jax.config import cli, methods
from raft_jax.config import load as config_load
from tests import imports_test

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / "README.md"


def rooms() -> str:
  """The table of rooms: name, and the first line of its docstring."""
  lines = ["| module | what lives there |", "| --- | --- |"]
  for room in imports_test.ROOMS:
    path = ROOT / "raft_jax" / f"{room}.py"
    if path.exists():
      summary = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0]
      lines.append(f"| `{room}` | {summary.replace('|', chr(92) + '|')} |")
  return "\n".join(lines) + "\n"


GENERATED = {
  "config reference": cli.reference,
  "methods": methods.table,
  "rooms": rooms,
}


def block(name: str) -> re.Pattern[str]:
  return re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)


def filled(text: str) -> str:
  for name, make in GENERATED.items():
    text, count = block(name).subn(
      lambda match, make=make: match[1] + make() + match[2], text
    )
    assert count == 1, f"README.md: no place for {name}"
  return text


def test_generated_parts_are_up_to_date():
  text = README.read_text(encoding="utf-8")
  assert filled(text) == text, "run `python -m tests.readme_test`"


def test_the_losses_example_runs():
  """As printed, with a one-layer model in the place of the reader's."""
  code = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[1]
  namespace = {"apply": lambda params, batch: params["embed"][batch.tokens]}
  exec(code, namespace)
  rng = np.random.default_rng(0)
  batch = types.SimpleNamespace(
    tokens=rng.integers(0, 11, (2, 5)),
    targets=rng.integers(0, 11, (2, 5)),
    teacher_ids=rng.integers(0, 11, (2, 5, 3)),
    teacher_logits=rng.normal(size=(2, 5, 3)),
    answer_mask=np.arange(5) < np.array([[2], [3]]),
    rollout_mask=np.arange(5) > np.array([[2], [1]]),
  )
  params = {"embed": jnp.array(rng.normal(size=(11, 4)), jnp.float32)}
  opt_state = namespace["tx"].init(params)
  moved, opt_state, terms = namespace["train_step"](params, opt_state, batch)
  weight = terms["sft"] / (terms["kd"] + 1e-8)
  np.testing.assert_allclose(opt_state["balance"].weights["kd"], weight, rtol=1e-5)
  assert not np.array_equal(moved["embed"], params["embed"])


def test_every_file_that_the_readme_names_exists():
  named = re.findall(r"`?((?:launch|configs|tests)/[\w./-]+\w)`?", README.read_text())
  assert named
  for name in set(named):
    assert (ROOT / name).exists(), name


@pytest.mark.parametrize("script", sorted((ROOT / "launch").glob("*.sh")))
def test_scripts_parse(script):
  assert subprocess.run(["bash", "-n", script], check=False).returncode == 0


def test_every_config_loads():
  paths = sorted((ROOT / "configs").rglob("*.yaml"))
  assert {path.stem for path in paths} >= methods.METHODS.keys()
  for path in paths:
    assert config_load.load(path).output
    header = path.read_text().split("\n\n")[0]
    assert header.startswith("# "), f"{path}: say command, hardware, time, result"


if __name__ == "__main__":
  README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
