"""A built wheel in an environment of its own, used from an empty folder."""

import email
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest

import raft_jax
from raft_jax.config import commands

ROOT = pathlib.Path(__file__).parents[1]
BUILT_FROM = ("pyproject.toml", "setup.py", "README.md", "LICENSE")

pytestmark = pytest.mark.slow


def run(*words, cwd):
  """A program without the checkout on its path."""
  environment = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith("PYTHON") and name != "VIRTUAL_ENV"
  }
  return subprocess.run(
    [str(word) for word in words],
    capture_output=True,
    text=True,
    check=False,
    cwd=cwd,
    env=environment,
  )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
  """Built from a copy, since a build leaves files beside its sources."""
  source = tmp_path_factory.mktemp("source")
  for name in BUILT_FROM:
    shutil.copy(ROOT / name, source)
  shutil.copytree(
    ROOT / "raft_jax",
    source / "raft_jax",
    ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"),
  )
  done = run(
    *(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"),
    *("--wheel-dir", source / "wheels", source),
    cwd=source,
  )
  assert done.returncode == 0, done.stderr
  (built,) = (source / "wheels").glob("*.whl")
  return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> pathlib.Path:
  """The `bin` of a fresh environment that holds the wheel and sees our libraries."""
  folder = tmp_path_factory.mktemp("environment")
  assert run(sys.executable, "-m", "venv", folder, cwd=folder).returncode == 0
  (site,) = folder.glob("lib/python*/site-packages")
  (site / "libraries.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
  done = run(
    *(folder / "bin/python", "-m", "pip", "install", "--no-deps", "--no-index", wheel),
    cwd=folder,
  )
  assert done.returncode == 0, done.stderr
  return folder / "bin"


def test_the_wheel_holds_every_file_that_the_package_opens(wheel):
  tree = {
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "raft_jax").rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
  }
  # What is for readers of the repository.
  tree -= {name for name in tree if name.endswith(".md") or "/pictures/" in name}
  assert any(name.endswith(".txt") for name in tree)
  held = set(zipfile.ZipFile(wheel).namelist())
  assert {name for name in held if ".dist-info/" not in name} == tree


def test_the_description_has_no_link_into_the_repository(wheel):
  archive = zipfile.ZipFile(wheel)
  (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
  message = email.message_from_string(archive.read(name).decode())
  assert message["Version"] == raft_jax.__version__
  assert message["Description-Content-Type"] == "text/markdown"
  text = message.get_payload()
  assert "fine-tune" in text.lower()
  assert "## Quickstart" in text
  targets = re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", text)
  assert targets
  assert all(link.startswith("https://") for pair in targets for link in pair if link)
  assert not re.search(r":\n\n\n*## ", text)  # nothing announces a missing picture


def test_commands_run_from_an_empty_folder(installed, tmp_path):
  place = run(
    installed / "python",
    "-c",
    "import raft_jax; print(raft_jax.__file__)",
    cwd=tmp_path,
  )
  assert place.stdout.startswith(str(installed.parent))
  listed = run(installed / "raft-jax", cwd=tmp_path)
  assert (listed.returncode, listed.stderr) == (0, "")
  assert listed.stdout == commands.listing() + "\n"
  ways = (
    [installed / "raft-jax", "refine"],
    [installed / "python", "-m", "raft_jax", "refine"],
    [installed / "python", "-m", "raft_jax.refine"],
  )
  helped = [run(*way, "--help", cwd=tmp_path) for way in ways]
  assert [(done.returncode, done.stderr) for done in helped] == [(0, "")] * 3
  assert len({done.stdout for done in helped}) == 1
  for name in commands.COMMANDS:
    helped = run(installed / "raft-jax", name, "--help", cwd=tmp_path)
    (usage,) = re.findall(r"^usage: (.*?)\n", helped.stdout)
    assert usage.startswith(f"python -m raft_jax.{name} ")
    assert "--config FILE" in usage
  unknown = run(installed / "raft-jax", "refin", cwd=tmp_path)
  assert (unknown.returncode, unknown.stdout) == (2, "")
  assert "did you mean refine" in unknown.stderr
  # The working folder is no place of modules for a script.
  (tmp_path / "yaml.py").write_text("raise SystemExit('the wrong yaml')")
  assert run(installed / "raft-jax", "report", "--help", cwd=tmp_path).returncode == 0


def test_prompts_and_templates_are_found(installed, tmp_path):
  names = {
    kind: [path.name for path in sorted((ROOT / "raft_jax" / kind).iterdir())]
    for kind in ("generation/prompts", "reporting/templates")
  }
  code = f"""
from raft_jax.generation import judging
from raft_jax.reporting import html_page
for name in {names["generation/prompts"]}:
  assert judging.template(name.removesuffix(".txt")).template
for name in {names["reporting/templates"]}:
  assert html_page.template(name).filename
print("all")
"""
  done = run(installed / "python", "-c", code, cwd=tmp_path)
  assert (done.stdout, done.stderr) == ("all\n", "")
