"""What a method makes of a config, without a model's files."""

import pathlib

from raft_jax.config import load as config_load
from raft_jax.config import schema
from raft_jax.distillation import objective
from raft_jax.training import run_plan
from tests.helpers import tiny_decoder


def resolve(
  folder: pathlib.Path, name: str, *overrides: str
) -> tuple[schema.Config, objective.Settings]:
  """The config of a method and some keys beside it, and the settings of its step."""
  path = folder / "c.yaml"
  (folder / "q.jsonl").touch()
  path.write_text(
    f"model: {{source: a/b}}\ndata: {{questions: {folder}/q.jsonl}}\n"
    f"output: {folder}/x\n"
  )
  config = config_load.load(path, [f"method={name}", *overrides])
  settings = run_plan.make_settings(config, tiny_decoder.CONFIG, None, (0,), "cpu")
  return config, settings
