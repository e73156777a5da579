"""Every key, value and option that a message, document or header names exists."""

import ast
import fnmatch
import functools
import pathlib
import re

import pytest
import yaml

from raft_jax import errors
from raft_jax.config import load as config_load
from raft_jax.config import reference as config_reference
from tests.helpers import instructions

ROOT = instructions.ROOT


SECTIONS = sorted(
  {
    key.name.split(".")[0].removesuffix("[]")
    for key in config_reference.every_key()
    if not key.type or "section" in key.type
  }
)
KEY = re.compile(
  rf"(?<![\w./\-])(?:{'|'.join(SECTIONS)})(?:\.[a-z_*][\w*]*|\.\d+|\[\])+(?![\w/(])"
)
FILES = r"\w+(\.\w+)?\.(jsonl?|safetensors\S*|html|yaml|sh|py|parquet|sbatch|npz|md)"
# Names of tensors in Hugging Face's files, which begin as our section does.
TENSORS = r"model\.(layers|embed_tokens\w*|per_layer_\w+|norm|rotary_emb)\b.*"


@functools.cache
def keys() -> list[str]:
  names = [key.name.replace("[]", "") for key in config_reference.every_key()]
  free = [
    f"{key.name}.*" for key in config_reference.every_key() if key.type == "mapping"
  ]
  return names + free


@functools.cache
def functions() -> set[str]:
  """`train.run_step`: of our modules that share their names with sections."""
  return {
    f"{path.stem}.{node.name}"
    for path in (ROOT / "raft_jax").rglob("*.py")
    for node in ast.parse(path.read_text()).body
    if isinstance(node, (ast.FunctionDef, ast.ClassDef))
  }


def unknown_keys(text: str) -> list[str]:
  """Tokens like `section.key` that name no key of the file."""
  faults = []
  for match in KEY.finditer(text.replace("{PLACE}", "*")):
    token = re.sub(r"\.\d+(?=\.|$)|\[\]", "", match[0])
    if re.fullmatch(FILES, token) or re.fullmatch(TENSORS, token):
      continue
    if token.count(".") == 1 and token in functions():
      continue
    if token in config_load.RENAMED:
      continue
    known = any(
      fnmatch.fnmatch(key, pattern) or fnmatch.fnmatch(token, key)
      for pattern in (token, token.replace(".*.", "."))
      for key in keys()
    )
    if not known:
      faults.append(match[0])
  return faults


def texts_that_name_keys() -> list[tuple[str, str]]:
  faults = []
  for path in instructions.tracked("raft_jax/*.py"):
    faults += [
      (f"{instructions.name(path)}:{line}", text)
      for line, text in instructions.strings(path)
    ]
  for path in instructions.tracked("*.md", "configs/*.yaml", "launch/*"):
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".md":
      text = "\n".join(re.findall(r"#(?!SBATCH).*", text))
    faults.append((instructions.name(path), text))
  return faults


def test_every_key_that_is_named_is_in_the_schema():
  faults = [
    f"{where}: {key}"
    for where, text in texts_that_name_keys()
    for key in unknown_keys(text)
  ]
  assert faults == []


@pytest.mark.parametrize(
  ("text", "unknown"),
  [
    ("lower data.max_prompt_tokens", []),
    ("lower data.max_*_tokens or rollout.new_tokens", ["rollout.new_tokens"]),
    ("`refine.judges.0.model` and `refine.judges[].model`", []),
    ("set train.batchsize=8", ["train.batchsize"]),
    ("read runs/x/extract.jsonl and model.safetensors", []),
    ("evaluate.ifeval.nltk_data, evaluate.ifeval.nltk", ["evaluate.ifeval.nltk"]),
  ],
)
def test_keys_that_do_not_exist_are_seen(text, unknown):
  assert unknown_keys(text) == unknown


SETTING = re.compile(rf"(?<![\w.])((?:{'|'.join(SECTIONS)})\.[\w.]+=[^\s`,;:)]+)")


def wrong_settings(text: str, here: pathlib.Path) -> list[str]:
  """Settings `section.key=value` whose value the schema does not take."""
  faults = []
  for match in SETTING.finditer(text):
    if re.search(r"[{$<]|=$", match[1]):
      continue  # filled in by the program
    (setting,) = instructions.filled(match[1].rstrip("."))
    try:
      config_load.load(here / "my.yaml", [setting], without_data=True)
    except errors.UserError as error:
      # What goes with what is another matter: a section that is absent here, say.
      if re.search(r"unknown key|must be", str(error)):
        faults.append(f"{setting}: {error}")
  return faults


def test_every_setting_that_is_named_is_one(tmp_path, monkeypatch):
  here = instructions.clone(tmp_path)
  monkeypatch.chdir(here)
  faults = [
    f"{where}: {fault}"
    for where, text in texts_that_name_keys()
    for fault in wrong_settings(text, here)
  ]
  assert faults == []
  assert wrong_settings("set train.batch_size=lots", here)
  assert wrong_settings("set `distill.teacher=answer`", here)


@pytest.mark.parametrize(
  "path", instructions.tracked("configs/*.yaml"), ids=lambda path: path.stem
)
def test_a_header_refines_what_its_run_learns_from(path, monkeypatch):
  """A loop over stages has `refine` where the answers are its own, and only there."""
  monkeypatch.chdir(ROOT)
  loop = re.search(r"# for s in (.*); do", path.read_text())
  if loop is None:
    return
  stages, settings = loop[1].split(), config_load.load(path)
  assert ("refine" in stages) == (settings.data.answers != "original")
  assert ("synthesise" in stages) == (settings.synthesise is not None)
  assert "evaluate" not in stages or settings.data.test


@pytest.mark.parametrize("path", instructions.tracked("*.md"), ids=instructions.name)
def test_every_config_that_is_printed_is_one(path, tmp_path):
  """Each YAML block, on top of the least that a file must have."""
  for block in re.findall(r"```yaml\n(.*?)```", path.read_text(), re.DOTALL):
    least = {"model": {"source": "m"}, "data": {"questions": "q"}, "output": "runs/x"}
    tree = yaml.safe_load(block)
    for section, value in least.items():
      if isinstance(value, dict):
        tree[section] = value | tree.get(section, {})
      tree.setdefault(section, value)
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(tree))
    assert config_load.load(file, without_data=True)


# Other programs' options; ours are in the code that reads them.
OTHER_OPTIONS = {
  *("--served-model-name", "--generation-config", "--model", "--help"),
  *("--no-enable-chunked-prefill", "--constraint", "--editable", "--no-deps"),
  *("--upgrade", "--recurse", "--ntasks", "--merge", "--build-arg"),
}


def test_every_option_that_is_named_is_one():
  option = re.compile(r"(?<![\w-])--[a-z][a-z-]+(?![\w.])")
  known = set(OTHER_OPTIONS)
  for path in instructions.tracked("raft_jax/*.py"):
    known |= {text for _, text in instructions.strings(path) if option.fullmatch(text)}
  for path in instructions.tracked("tests/benchmarks/*.py"):
    known |= set(re.findall(r'add_argument\(\s*"(--[a-z-]+)"', path.read_text()))
  for path in instructions.tracked("launch/*"):
    code = re.sub(r"^#.*", "", path.read_text(), flags=re.MULTILINE)
    known |= set(option.findall(code))
  faults = [
    f"{where}: {name}"
    for where, text in texts_that_name_keys()
    for name in option.findall(text)
    if name not in known
  ]
  assert faults == []
