"""The READMEs: generated parts are up to date, links resolve, examples run.

`python -m tests.readme_test` rewrites the generated parts.
"""

import ast
import pathlib
import re
import subprocess
import textwrap
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from raft_jax import errors
from raft_jax.config import cli, methods
from raft_jax.config import load as config_load
from raft_jax.hf import families, wrappers
from tests.helpers import fault_tables

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "raft_jax"
README = ROOT / "README.md"
DOCUMENTS = [
  README,
  *(
    path
    for folder in ("configs", "launch", "raft_jax", "tests")
    for path in sorted((ROOT / folder).rglob("*.md"))
  ),
]

# Each imports only wings above it.
WINGS = (
  *("runtime", "storage", "models", "config", "hf", "generation", "curation", "data"),
  *("distillation", "baselines", "training", "evaluation", "planning", "reporting"),
)

# Text files that commands or users write, and no part of the project.
WRITTEN = {"comparison.md", "torts.md"}


def wings() -> str:
  """A row for each wing: the first paragraph of its README, and its modules."""
  lines = ["| wing | subject | modules |", "| --- | --- | --- |"]
  for wing in WINGS:
    folder = PACKAGE / wing
    subject = (folder / "README.md").read_text(encoding="utf-8").split("\n\n")[1]
    listed = ", ".join(f"`{path.stem}`" for path in modules(folder))
    subject = subject.replace("\n", " ")
    lines.append(f"| [{wing}]({wing}/README.md) | {subject} | {listed} |")
  return "\n".join(lines) + "\n"


def modules(folder: pathlib.Path) -> list[pathlib.Path]:
  return [path for path in sorted(folder.glob("*.py")) if path.stem != "__init__"]


def module_table(folder: pathlib.Path) -> str:
  """A row for each module: its name, and the first line of its docstring."""
  lines = ["| module | subject |", "| --- | --- |"]
  for path in modules(folder):
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    lines.append(f"| `{path.stem}` | {escaped(docstring.split(chr(10))[0])} |")
  return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def escaped(text: str) -> str:
  return text.replace("|", "\\|")


LEAST = {
  "model": {"source": "some/model"},
  "data": {"questions": "configs/data/wordnet/law/train.jsonl"},
  "output": "runs/x",
}


def required_keys(name: str) -> list[str]:
  """The keys that the least config lacks with this method."""
  try:
    config_load.from_tree(LEAST, [f"method={name}"])
  except errors.UserError as error:
    return re.findall(r"^config: ([\w.]+): ", str(error), re.MULTILINE)
  return []


def method_table() -> str:
  """A row for each method: name, meaning, settings, the keys to set, source."""
  lines = [
    "| `method` | what it is | settings | required | source |",
    "| --- | --- | --- | --- | --- |",
  ]
  for name, method in methods.METHODS.items():
    settings = ", ".join(f"`{word}`" for word in methods.words(method.settings))
    required = ", ".join(f"`{key}`" for key in required_keys(name))
    cells = [method.summary, settings or "the defaults", required, method.source]
    lines.append(f"| `{name}` | {' | '.join(map(escaped, cells))} |")
  return "\n".join(lines) + "\n"


def model_table() -> str:
  """A row for each family and for each kind of model with a text tower."""
  lines = [
    "| models | `architectures` in config.json | GGUF |",
    "| --- | --- | --- |",
  ]
  for family in families.FAMILIES.values():
    gguf = "yes" if family.in_gguf else ""
    lines.append(f"| {family.models} | `{family.architecture}` | {gguf} |")
  for wrapper in wrappers.WRAPPERS.values():
    lines.append(f"| {wrapper.models}: the text tower | `{wrapper.architecture}` | |")
  return "\n".join(lines) + "\n"


def model_sentence() -> str:
  """All models, each once."""
  names = dict.fromkeys(family.models for family in families.FAMILIES.values())
  towers = dict.fromkeys(wrapper.models for wrapper in wrappers.WRAPPERS.values())
  text = f"Text models: {', '.join(names)}. Text towers, whose other parts are "
  text += f"exported unchanged: {', '.join(towers)}"
  return textwrap.fill(f"{text}.", 88, break_on_hyphens=False) + "\n"


GENERATED: dict[pathlib.Path, dict[str, Callable[[], str]]] = {
  README: {"models": model_sentence},
  ROOT / "configs/README.md": {
    "methods": method_table,
    "config reference": cli.reference,
    "engine keys": cli.engine_reference,
  },
  ROOT / "tests/README.md": {"fault counts": fault_tables.counts},
  ROOT / "tests/FAULTS.md": {"faults": fault_tables.tables},
  PACKAGE / "README.md": {
    "wings": wings,
    "modules": lambda: module_table(PACKAGE),
  },
  **{
    PACKAGE / wing / "README.md": {
      "modules": lambda wing=wing: module_table(PACKAGE / wing),
      **({"models": model_table} if wing == "hf" else {}),
    }
    for wing in WINGS
  },
}


def filled(path: pathlib.Path) -> str:
  """The text of a README with its generated parts written anew."""
  text = path.read_text(encoding="utf-8")
  for name, make in GENERATED[path].items():
    block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
    text, count = block.subn(
      lambda match, make=make: match[1] + make() + match[2], text
    )
    assert count == 1, f"{path}: no place for {name}"
  return text


@pytest.fixture(autouse=True)
def _root(monkeypatch):
  monkeypatch.chdir(ROOT)  # paths in configs start there


@pytest.mark.parametrize(
  "path", GENERATED, ids=lambda path: str(path.relative_to(ROOT))
)
def test_generated_parts_are_up_to_date(path):
  assert filled(path) == path.read_text(encoding="utf-8"), (
    "run `python -m tests.readme_test`"
  )


def test_every_wing_has_a_readme():
  folders = {path.parent.name for path in PACKAGE.glob("*/README.md")}
  assert folders == set(WINGS)


def test_methods_name_the_keys_that_they_require():
  required = {name: required_keys(name) for name in methods.METHODS}
  assert {name: keys for name, keys in required.items() if keys} == {
    "opd_recover": ["distill.source"],
    "disc": ["extract.documents"],
    "ewc": ["anchor.questions"],
    "replay": ["replay.questions"],
    "ssr": ["synthesise.seeds"],
    "mssr": ["replay.questions"],
  }


def printed_code(path: pathlib.Path) -> str:
  """The first Python example of a document."""
  return re.search(r"```python\n(.*?)```", path.read_text(), re.DOTALL)[1]


class Batch(NamedTuple):
  tokens: jax.Array
  targets: jax.Array
  teacher_ids: jax.Array
  teacher_logits: jax.Array
  answer_mask: np.ndarray
  rollout_mask: np.ndarray


def example_batch() -> Batch:
  rng = np.random.default_rng(0)
  return Batch(
    tokens=jnp.array(rng.integers(0, 11, (2, 5))),
    targets=jnp.array(rng.integers(0, 11, (2, 5))),
    teacher_ids=jnp.array(rng.integers(0, 11, (2, 5, 3))),
    teacher_logits=jnp.array(rng.normal(size=(2, 5, 3))),
    answer_mask=np.arange(5) < np.array([[2], [3]]),
    rollout_mask=np.arange(5) > np.array([[2], [1]]),
  )


def test_the_losses_example_runs():
  """As printed, with a one-layer model in the place of the reader's."""
  namespace = {"apply": lambda params, batch: params["embed"][batch.tokens]}
  exec(printed_code(README), namespace)
  embed = np.random.default_rng(0).normal(size=(11, 4))
  params = {"embed": jnp.array(embed, jnp.float32)}
  opt_state = namespace["tx"].init(params)
  moved, opt_state, terms = namespace["train_step"](params, opt_state, example_batch())
  weight = terms["sft"] / (terms["kd"] + 1e-8)
  np.testing.assert_allclose(opt_state["balance"].weights["kd"], weight, rtol=1e-5)
  assert not np.array_equal(moved["embed"], params["embed"])


def test_the_nnx_example_trains_as_the_optax_one():
  class Model(nnx.Module):
    def __init__(self):
      self.embed = nnx.Embed(11, 4, rngs=nnx.Rngs(0))

    def __call__(self, tokens_BT):
      return self.embed(tokens_BT)

  model = Model()
  params = {"embed": jnp.array(model.embed.embedding[...])}
  ours: dict = {"apply": lambda params, batch: params["embed"][batch.tokens]}
  exec(printed_code(README), ours)
  theirs: dict = {"network": model}
  exec(printed_code(PACKAGE / "README.md"), theirs)
  batch = example_batch()
  expected, _, _ = ours["train_step"](params, ours["tx"].init(params), batch)
  moved, _, terms = theirs["train_step"](theirs["params"], theirs["opt_state"], batch)
  nnx.update(model, moved)
  assert float(terms["kd"]) > 0
  np.testing.assert_allclose(model.embed.embedding[...], expected["embed"], rtol=1e-6)
  assert not np.array_equal(expected["embed"], params["embed"])


def test_the_first_readme_is_short():
  assert len(README.read_text(encoding="utf-8").splitlines()) <= 200


def test_pictures_are_small():
  pictures = [path for path in (PACKAGE / "pictures").iterdir() if path.is_file()]
  assert {path.suffix for path in pictures} == {".svg", ".png"}
  assert all(path.stat().st_size < 150_000 for path in pictures)


def prose(path: pathlib.Path) -> str:
  """A document without its code blocks."""
  text = path.read_text(encoding="utf-8")
  return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def links(path: pathlib.Path) -> Iterator[str]:
  """The targets in a document that are not on the web."""
  matches = re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", prose(path))
  for target in (link or source for link, source in matches):
    if not target.startswith(("https://", "http://")):
      yield target


def anchors(path: pathlib.Path) -> set[str]:
  """The names that GitHub gives the headings of a document."""
  headings = re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE)
  kept = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
  return {heading.strip().replace(" ", "-") for heading in kept}


@pytest.mark.parametrize(
  "path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT))
)
def test_links_resolve(path):
  for link in links(path):
    name, _, anchor = link.partition("#")
    target = (path.parent / name).resolve() if name else path
    assert target.exists(), f"{path}: {link}"
    assert target.is_relative_to(ROOT), f"{path}: {link} is outside of the project"
    if anchor:
      assert anchor in anchors(target), f"{path}: {link}"


@pytest.mark.parametrize(
  "path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT))
)
def test_named_files_exist(path):
  text = path.read_text(encoding="utf-8")
  for name in re.findall(r"[\w./-]+\.md\b", text):
    if name not in WRITTEN:
      here, root = path.parent / name, ROOT / name
      assert here.exists() or root.exists(), f"{path}: {name}"
  for name in re.findall(r"(?<![\w/.])(?:launch|configs|tests)/[\w./-]*\w", text):
    assert (ROOT / name).exists() or (path.parent / name).exists(), f"{path}: {name}"


def test_promises_name_tests_that_exist():
  text = (ROOT / "tests/README.md").read_text(encoding="utf-8")
  named = set(re.findall(r"`(\w+_test)`", text))
  assert named <= {path.stem for path in (ROOT / "tests").rglob("*_test.py")}
  assert named


def test_every_fault_names_a_test_that_exists_or_a_reason():
  rows = [row for stage in fault_tables.read().values() for row in stage]
  for row in rows:
    assert row.keys() in ({"fault", "test"}, {"fault", "reason"}), row
    if "test" in row:
      path, _, name = row["test"].partition("::")
      assert path.startswith("tests/"), row
      assert name in fault_tables.marks(ROOT / path), row
    else:
      assert row["reason"].startswith(tuple(fault_tables.REASONS)), row
  for stage, faults in fault_tables.read().items():
    assert len({row["fault"] for row in faults}) == len(faults) > 0, stage


def test_every_readme_is_reached_from_the_first():
  reached, todo = set(), [README]
  while todo:
    path = todo.pop()
    if path not in reached:
      reached.add(path)
      named = [(path.parent / link.partition("#")[0]).resolve() for link in links(path)]
      todo += [target for target in named if target.suffix == ".md"]
  assert reached == set(DOCUMENTS)


def sentences(path: pathlib.Path) -> list[str]:
  """The sentences of a document, without its tables."""
  lines = [line for line in prose(path).splitlines() if not line.startswith("|")]
  text = " ".join("\n".join(lines).split())
  return re.split(r"(?<=[.:?]) ", text)


def test_nothing_is_said_twice():
  places: dict[str, str] = {}
  for path in DOCUMENTS:
    for sentence in sentences(path):
      if len(sentence) > 40:
        assert sentence not in places, f"{path} and {places[sentence]}: {sentence}"
        places[sentence] = str(path)


@pytest.mark.parametrize("script", sorted((ROOT / "launch").glob("*.sh")))
def test_scripts_parse(script):
  assert subprocess.run(["bash", "-n", script], check=False).returncode == 0


def test_every_config_loads():
  for path in sorted((ROOT / "configs").rglob("*.yaml")):
    assert config_load.load(path).output
    header = path.read_text().split("\n\n")[0]
    assert header.startswith("# "), f"{path}: say command, hardware, time, result"


if __name__ == "__main__":
  for document in GENERATED:
    document.write_text(filled(document), encoding="utf-8")
