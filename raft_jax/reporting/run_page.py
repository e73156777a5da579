"""The report of a run, as one self-contained HTML page.

It reads only files that the stages wrote (`metrics.jsonl`, `refined/summary.json`,
`evaluation/scores.json`, `evaluation/samples.jsonl`, `config/*.yaml`), so it works
after a crash and for an unfinished run; the page names what is missing. It does not
plot the total loss: under the EMA balance that is about twice the SFT loss by
construction, and shows no progress.
"""

from __future__ import annotations

import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

from raft_jax.reporting import html_page, run_folder, run_plots, sft_comparison

SCORES = {
  "held_out_loss": ("Held-out loss, nats per token", -1),
  "validation_loss": ("Loss on validation questions, nats per token", -1),
  "rouge_l": ("ROUGE-L F1", 1),
  "similarity": ("Encoder similarity, cosine", 1),
  "answer_tokens": ("Tokens per answer", 0),
  "ended": ("Share of answers that end with EOS", 0),
  "choice": ("Right answer chosen, by log-probability per token", 1),
  "choice_ece": ("… expected calibration error", -1),
  "choice_letter": ("Right answer chosen, by letter", 1),
  "choice_letter_ece": ("… expected calibration error", -1),
  "d_acc": ("Correct by majority of the judges (D-Acc)", 1),
  "d_acc_undecided": ("D-Acc, share without a majority", 0),
  "open_ended": ("Open-ended requests, good by majority", 1),
  "open_ended_undecided": ("Open-ended, share without a majority", 0),
  "ifeval_prompt_strict": ("IFEval, prompts, strict", 1),
  "ifeval_prompt_loose": ("IFEval, prompts, loose", 1),
  "ifeval_instruction_strict": ("IFEval, instructions, strict", 1),
  "ifeval_instruction_strict_but_no_comma": ("… except those on commas", 1),
  "ifeval_instruction_strict_same_length": ("… with answers cut to equal lengths", 1),
  "ifeval_instruction_loose": ("IFEval, instructions, loose", 1),
  "ifeval_answer_tokens": ("Tokens per IFEval answer", 0),
  "mmlu": ("MMLU", 1),
  "mmlu_kept": ("MMLU, right before training and after it", 1),
}
"""Name of a score -> its label, and 1 if higher is better, -1 if lower is, else 0."""


SUMMARY = ("open_ended", "ifeval_prompt_strict", "mmlu")
"""General scores that stand in the page's first lines, beside those of tasks."""


def score_rows(run: run_folder.Run) -> list[dict[str, Any]]:
  """One row for each score: base, trained, their paired difference, and a verdict.

  The verdict is "better" or "worse" only if the 95 % interval of the paired difference
  does not contain 0.
  """
  scores = run.scores.get("scores") or {}
  directions = run.scores.get("directions") or {}  # of tasks of lm-evaluation-harness
  tasks = {name: (name.replace("_", " "), sign) for name, sign in directions.items()}
  rows = []
  for name, (label, direction) in {**SCORES, **tasks}.items():
    base = (scores.get("base") or {}).get(name) or {}
    trained = (scores.get("trained") or {}).get(name) or {}
    paired = (run.scores.get("paired") or {}).get(name) or {}
    if not base and not trained:
      continue
    low, high = paired.get("low"), paired.get("high")
    if not (run_folder.is_number(low) and run_folder.is_number(high)):
      verdict = "not compared"
    elif low <= 0 <= high:
      verdict = "no clear change"
    elif direction == 0:
      verdict = "higher" if low > 0 else "lower"
    else:
      verdict = "better" if low * direction > 0 else "worse"
    rows.append(
      {
        "name": name,
        "label": label,
        "direction": {1: "higher is better, ", -1: "lower is better, "}.get(
          direction, ""
        ),
        "base": base,
        "trained": trained,
        "paired": paired,
        "retention": (run.scores.get("retention") or {}).get(name) or {},
        "general": name.startswith(("open_ended", "ifeval", "mmlu", "task_")),
        "first": name in SUMMARY or name.startswith("task_"),
        "verdict": verdict,
      }
    )
  return rows


def warnings(run: run_folder.Run) -> list[str]:
  """Signs of trouble in the curves, each with its number.

  The limits are rules of thumb: they separate runs of a 135M model that kept writing
  sensible English from runs that collapsed.
  """
  lines = list(run.damage)
  tail = slice(-max(1, len(run.metrics) // 5), None)

  def mean(name: str, part: slice = tail) -> float | None:
    values = run_folder.series(run, name)[1][part]
    return statistics.fmean(values) if values else None

  start, end = mean("rollout_length", slice(0, 3)), mean("rollout_length")
  if start and end is not None and end < start / 2:
    lines.append(
      f"Rollouts shrank from {html_page.number(start, 1)} to "
      f"{html_page.number(end, 1)} tokens; read the sample answers."
    )
  first, overall = mean("kd_at_0"), mean("loss_kd")
  if first and overall and first > 3 * overall:
    lines.append(
      f"Rollout position 0 carries {html_page.number(first, 2)} nats, the mean position"
      f" {html_page.number(overall, 2)}: teacher and student disagree on how an answer"
      " starts (distill.teacher_context)."
    )
  ratio = mean("kd_ratio")
  ema = run_folder.setting(run, "balance", "mode") in (None, "ema")
  if ratio is not None and ema and not 0.5 <= ratio <= 2:
    lines.append(
      f"λ·L_KD / L_SFT is {html_page.number(ratio, 2)} at the end; it should be near 1."
    )
  for name, limit, words in (
    ("rollout_leaked", 0.05, "of the last rollouts quote the teacher's prompt."),
    ("rollout_repeated_4gram", 0.5, "of the last rollouts' 4-grams are repetitions."),
    ("rollout_empty", 0.05, "of the last rollouts are empty."),
  ):
    share = mean(name)
    if share is not None and share > limit:
      lines.append(f"{html_page.percent(share)} {words}")
  lost = len(run.metrics) - len(run_folder.series(run, "loss_sft")[0])
  if lost and run_folder.setting(run, "train", "cross_entropy") is not False:
    lines.append(f"{lost} step(s) have no finite SFT loss.")
  return lines


def _phases(run: run_folder.Run) -> list[tuple[str, Any, str]]:
  """Rows of the time table: phase, seconds and a remark."""
  rows: list[tuple[str, Any, str]] = []
  tokens = run.summary.get("tokens") or {}
  for role, seconds in (run.summary.get("seconds") or {}).items():
    remark = f"{html_page.number(tokens[role])} tokens" if role in tokens else ""
    rows.append((f"refine: {role}", seconds, remark))
  seconds_N = run_folder.series(run, "step_seconds")[1]
  if seconds_N:
    median = html_page.duration(statistics.median(seconds_N))
    rows.append(("train", sum(seconds_N), f"{len(seconds_N)} steps, median {median}"))
  for phase in ("rollout", "teacher", "update"):
    rate_N = run_folder.series(run, f"{phase}_tokens_per_s")[1]
    if rate_N:
      median = html_page.number(statistics.median(rate_N), 0)
      rows.append((f"train: {phase}", None, f"median {median} tokens/s"))
  validation_N = run_folder.series(run, "validation_seconds")[1]
  if validation_N:
    count = f"{len(validation_N)} validations"
    rows.append(("train: validation", sum(validation_N), count))
  for model, seconds in (run.scores.get("seconds") or {}).items():
    rows.append((f"evaluate: {model}", seconds, ""))
  return rows


def _stage_seconds(phases: Sequence[tuple[str, Any, str]]) -> dict[str, float]:
  """Seconds of each stage, over its phases."""
  seconds: dict[str, float] = {}
  for phase, duration, _ in phases:
    if run_folder.is_number(duration):
      stage = phase.partition(":")[0]
      seconds[stage] = seconds.get(stage, 0.0) + duration
  return seconds


def render(
  run: run_folder.Run, title: str, *, sft: sft_comparison.Comparison | None = None
) -> str:
  """The page as one HTML string, which loads no other files.

  Args:
    title: its heading.
    sft: plain SFT on the same questions, if the run is compared with it.
  """
  configs: dict[str, list[str]] = {}
  for stage, text in run.configs.items():
    configs.setdefault(text, []).append(stage)
  phases = _phases(run)
  source = str(run_folder.setting(run, "model", "source") or "")
  return html_page.template("report.html").render(
    title=title,
    run=run,
    model=source.rstrip("/").rsplit("/", 1)[-1].removesuffix(".gguf") or "The model",
    method=run_folder.setting(run, "method") or "unknown",
    encoder=run_folder.setting(run, "refine", "encoder") or "the sentence encoder",
    ifeval=run_folder.setting(run, "evaluate", "ifeval", "items"),
    warnings=warnings(run),
    figures=run_plots.figures(run),
    scores=score_rows(run),
    counts={
      key: html_page.bars(run.summary.get(key))
      for key in ("rounds", "reasons", "chosen")
    },
    phases=phases,
    costs=_stage_seconds(phases),
    sft=sft,
    configs=[(", ".join(stages), text) for text, stages in configs.items()],
  )


def write(output: pathlib.Path, *, sft: pathlib.Path | None = None) -> pathlib.Path:
  """Writes `report.html` into a run's output folder and returns its path.

  Args:
    output: the run's folder.
    sft: the folder of a run of SFT to compare with; see `sft_comparison.compare`.
  """
  path = output / "report.html"
  compared = None if sft is None else sft_comparison.compare(output, sft)
  html_page.write(path, render(run_folder.read(output), output.name, sft=compared))
  return path
