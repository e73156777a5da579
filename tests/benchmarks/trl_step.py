"""A step of on-policy self-distillation beside that of TRL's SDFTTrainer.

`python -m tests.benchmarks.trl_step FOLDER [NEW_TOKENS [ROUNDS]]`

The same work: SmolLM2-135M in float32, eight questions of about 90 tokens, rollouts of
NEW_TOKENS, the base model as a teacher that reads the answer, forward KL over its 512
most probable tokens, AdamW. "raft" is our step with the cross-entropy of the answers as
well, which TRL's has not. Each has a process of its own; they take turns, one step at a
time, so that what else the machine does meets them all. FOLDER gets the model as a
folder for transformers, and the questions.
"""

import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

BATCH = 8
TOP_K = 512
QUESTION = (
  "In American law, what is a lien, and what may a mechanic, a landlord, an innkeeper "
  "or a bank do with the property of somebody who owes them money? Explain it to a "
  "student who has never opened a law book: first the rule in one sentence, then who "
  "has the right and how it ends, and at last an example out of daily life."
)
ANSWER = (
  "A lien is a right of one person to keep or to sell what belongs to another until a "
  "debt is paid. It comes from a contract, from a statute or from long custom, it "
  "follows the thing and not its owner, and it ends when the debt is paid, when the "
  "thing is given back, or when the creditor says that it shall end."
)


def write_questions(path: pathlib.Path) -> None:
  lines = [
    json.dumps({"question": f"{QUESTION} ({number})", "answer": ANSWER})
    for number in range(4 * BATCH)
  ]
  path.write_text("\n".join(lines) + "\n")


def write_model(folder: pathlib.Path) -> None:
  """The quickstart's model, as transformers reads it from the GGUF file."""
  import torch
  import transformers

  from raft_jax.config import load as config_load
  from raft_jax.hf import model_source

  config = config_load.load("configs/quickstart.yaml")
  path = model_source.resolve(config.model.source)
  options = {"gguf_file": path.name}
  network = transformers.AutoModelForCausalLM.from_pretrained(
    path.parent, dtype=torch.float32, **options
  )
  # They are plain floats by now, and transformers saves no quantised ones.
  network.hf_quantizer, network.is_quantized = None, False
  network.quantization_method = None
  if hasattr(network.config, "quantization_config"):
    del network.config.quantization_config
  network.save_pretrained(folder)
  transformers.AutoTokenizer.from_pretrained(path.parent, **options).save_pretrained(
    folder
  )


# --- The processes that take turns ----------------------------------------------------


def wait_for_turn() -> None:
  if not sys.stdin.readline():
    os._exit(0)


def end_turn(seconds: float, rollout: float, tokens: int) -> None:
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  result = {"step": seconds, "rollout": rollout, "tokens": tokens, "peak": peak}
  print("TURN " + json.dumps(result), flush=True)


def run_trl(folder: str, new_tokens: int) -> None:
  import datasets
  import torch
  import transformers
  from trl.experimental.sdft import SDFTConfig, SDFTTrainer

  class Turns(transformers.TrainerCallback):
    def __init__(self) -> None:
      self.began, self.rollout, self.tokens = 0.0, 0.0, 0

    def on_step_begin(self, *args: Any, **options: Any) -> None:
      wait_for_turn()
      self.began = time.perf_counter()

    def on_step_end(self, *args: Any, **options: Any) -> None:
      end_turn(time.perf_counter() - self.began, self.rollout, self.tokens)

  lines = pathlib.Path(folder, "questions.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  data = datasets.Dataset.from_list(
    [
      {
        "prompt": [{"role": "user", "content": row["question"]}],
        "privileged_context": row["answer"],
      }
      for row in rows
    ]
  )
  turns = Turns()
  trainer = SDFTTrainer(
    model=f"{folder}/model",
    args=SDFTConfig(
      output_dir=tempfile.mkdtemp(),
      per_device_train_batch_size=BATCH,
      num_generations=1,
      max_steps=10**6,
      max_prompt_length=256,
      max_completion_length=new_tokens,
      distillation_alpha=0.0,  # forward KL
      distillation_mode="topk_logits",
      distillation_topk=TOP_K,
      teacher_model_kind="base",
      learning_rate=5e-6,
      save_strategy="no",
      report_to=[],
      use_cpu=True,
      bf16=False,
      gradient_checkpointing=False,
      disable_tqdm=True,
      generation_kwargs={"min_new_tokens": new_tokens},
      model_init_kwargs={"dtype": torch.float32},
    ),
    train_dataset=data,
    callbacks=[turns],
  )
  generate = trainer.model.generate

  def timed(*args: Any, **options: Any) -> Any:
    began = time.perf_counter()
    result = generate(*args, **options)
    turns.rollout, turns.tokens = time.perf_counter() - began, new_tokens
    return result

  trainer.model.generate = timed
  trainer.train()


def run_ours(folder: str, new_tokens: int, *, cross_entropy: bool) -> None:
  import jax
  import numpy as np

  from raft_jax.config import load as config_load
  from raft_jax.models import sharding
  from raft_jax.training import programs as programs_lib
  from raft_jax.training import run_inputs
  from tests.benchmarks import started_run

  config = config_load.load(
    "configs/quickstart.yaml",
    [
      f"output={folder}/ours",
      f"data.questions={folder}/questions.jsonl",
      "data.test=null",
      "data.limit=null",
      "data.answers=original",
      "data.max_prompt_tokens=256",
      "data.max_teacher_tokens=512",
      f"train.batch_size={BATCH}",
      f"train.cross_entropy={str(cross_entropy).lower()}",
      "train.learning_rate=5.0e-6",
      f"rollout.max_new_tokens={new_tokens}",
      f"distill.top_k={TOP_K}",
      "distill.teacher_context=chat",
      "distill.temperature=1.0",
    ],
  )
  plan, inputs = run_inputs.prepare(config)
  reference, state = started_run.begin(config, plan, inputs)
  with jax.set_mesh(plan.mesh):
    for step in range(10**6):
      batch = inputs.dataset[step % len(inputs.dataset)]
      wait_for_turn()
      began = time.perf_counter()
      state, done = programs_lib.run_step(
        plan.programs,
        state,
        reference,
        sharding.spread(sharding.batch(plan.mesh), batch),
        step,
        timed=True,
      )
      longest = int(np.max(done.trajectory.length_B))
      end_turn(time.perf_counter() - began, done.seconds["rollout"], longest)


WORKERS: dict[str, Callable[[str, int], None]] = {
  "trl": run_trl,
  "ours": lambda folder, new: run_ours(folder, new, cross_entropy=False),
  "raft": lambda folder, new: run_ours(folder, new, cross_entropy=True),
}


# --- The comparison -------------------------------------------------------------------


def start(name: str, folder: str, new_tokens: int) -> subprocess.Popen[str]:
  return subprocess.Popen(
    [sys.executable, "-m", __spec__.name, "worker", name, folder, str(new_tokens)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
    env={**os.environ, "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"},
  )


def take_turn(process: subprocess.Popen[str]) -> dict[str, float]:
  assert process.stdin is not None
  assert process.stdout is not None
  process.stdin.write("go\n")
  process.stdin.flush()
  for line in process.stdout:
    if line.startswith("TURN "):
      return json.loads(line.removeprefix("TURN "))
  raise SystemExit(f"{process.args}: ended")


def main(folder: str, new_tokens: int = 64, rounds: int = 5) -> None:
  path = pathlib.Path(folder).resolve()
  path.mkdir(parents=True, exist_ok=True)
  write_questions(path / "questions.jsonl")
  if not (path / "model").exists():
    write_model(path / "model")
  # One after the other, or loading would take the time of others' first steps.
  processes = {}
  for name in WORKERS:
    processes[name] = start(name, str(path), new_tokens)
    take_turn(processes[name])  # compiles or warms up
  turns: dict[str, list[dict[str, float]]] = {name: [] for name in WORKERS}
  for _ in range(rounds):
    for name, process in processes.items():
      turns[name].append(take_turn(process))
      last = turns[name][-1]
      print(
        f"{name:4}  step {last['step']:6.2f} s, rollout {last['rollout']:6.2f} s of "
        f"{last['tokens']:.0f} tokens",
        flush=True,
      )
  for process in processes.values():
    process.kill()

  print(f"\nmedians of {rounds} (least to most), and their share of TRL's")
  for name in WORKERS:
    print(name)
    for what, unit in {"step": "s", "rollout": "s", "peak": "GB"}.items():
      scale = 1e9 if unit == "GB" else 1.0
      own = sorted(turn[what] / scale for turn in turns[name])
      theirs = statistics.median(turn[what] / scale for turn in turns["trl"])
      middle = statistics.median(own)
      spread = f"({own[0]:.2f} to {own[-1]:.2f})"
      print(f"  {what:7} {middle:6.2f} {unit:2} {spread:18} {middle / theirs:.2f}")


if __name__ == "__main__":
  if sys.argv[1:2] == ["worker"]:
    WORKERS[sys.argv[2]](sys.argv[3], int(sys.argv[4]))
  else:
    main(sys.argv[1], *map(int, sys.argv[2:]))
