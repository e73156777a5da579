"""Stage 5: the report of a run, or the comparison of a sweep, as one HTML page."""

from __future__ import annotations

import pathlib

from raft_jax import errors
from raft_jax.config import cli, schema
from raft_jax.config import load as config_load
from raft_jax.reporting import (
  run_folder,
  run_page,
  run_plots,
  sweep_page,
  sweep_results,
)
from raft_jax.training import metrics_log, trackers


def main(config: schema.Config) -> None:
  """Writes the page of the run or the sweep in the output folder of the config."""
  output = pathlib.Path(config.output)
  trackers.require(config.train.trackers)
  if sweep_results.exist(output):
    print(f"comparison: {sweep_page.write(output)}")
    return
  if not (output / "config").is_dir():
    raise errors.UserError(
      f"output: {output} holds no run of raft_jax, so there is nothing to report; run"
      " `python -m raft_jax.train` with this config first"
    )
  sft = config.report.sft
  page = run_page.write(output, sft=None if sft is None else pathlib.Path(sft))
  print(f"report: {page}")
  tracked = config.train.trackers
  if tracked:
    run = trackers.describe(
      config.train, output, config_load.values(config, trackers.SETTINGS)
    )
    pictures = run_plots.pictures(run_folder.read(output))
    with metrics_log.tracked(tracked, run) as opened:
      opened.attach(pictures)


if __name__ == "__main__":
  cli.run("report", main, "Draw a run as one self-contained HTML page.")
