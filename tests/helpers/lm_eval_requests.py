"""What lm-evaluation-harness asks a model, for comparison."""

import json
import pathlib

PUNKT = "pkg://llama_index/core/_static/nltk_cache"


TASK = """include: {harness}/tasks/mmlu/default/_default_template_yaml
task: quiz_{subject}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {test}, dev: {dev}}}}}
process_docs: !function keep.{subject}
fewshot_config: {{sampler: first_n, process_docs: !function keep.{subject}}}
num_fewshot: {shots}
description: "The following are multiple choice questions (with answers) about\\
  \\ {topic}.\\n\\n"
"""


def asked_by_the_harness(
  folder: str, tasks: pathlib.Path, files: dict[str, pathlib.Path], shots: int
) -> list[dict]:
  """Samples of lm-eval's own MMLU tasks and Hugging Face model, subject by subject.

  Args:
    tasks: where their files go.
    files: the questions, "test" and "dev", each subject's in one piece.
  """
  import lm_eval
  from lm_eval.models import huggingface

  rows = map(json.loads, files["test"].read_text().splitlines())
  subjects = list(dict.fromkeys(row["subject"] for row in rows))
  tasks.mkdir()
  keep = "def {s}(rows):\n  return rows.filter(lambda row: row['subject'] == '{s}')\n"
  (tasks / "keep.py").write_text("".join(keep.format(s=s) for s in subjects))
  for subject in subjects:
    (tasks / f"{subject}.yaml").write_text(
      TASK.format(
        harness=pathlib.Path(lm_eval.__file__).parent,
        subject=subject,
        topic=subject.replace("_", " "),
        shots=shots,
        **files,
      )
    )
  harness = lm_eval.simple_evaluate(
    huggingface.HFLM(pretrained=folder, dtype="float32", device="cpu", batch_size=2),
    tasks=[f"quiz_{subject}" for subject in subjects],
    task_manager=lm_eval.tasks.TaskManager(include_path=str(tasks)),
    bootstrap_iters=0,
  )
  return [row for s in subjects for row in harness["samples"][f"quiz_{s}"]]
