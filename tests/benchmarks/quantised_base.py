"""What a quantised base costs and saves: bytes, held-out loss, seconds of each phase.

`python -m tests.benchmarks.quantised_base FOLDER`.

On the quickstart's model and questions, with LoRA and the answers as they are. The
bases take turns at every step, so that what else the machine does meets them all; the
fastest of the rounds counts. FOLDER gets what a run claims of its output.
"""

import pathlib
import sys

import jax

from raft_jax.config import load as config_load
from raft_jax.evaluation import scoring, test_sets
from raft_jax.models import sharding
from raft_jax.storage import journal
from raft_jax.training import initial_state, run_inputs, step_memory
from raft_jax.training import programs as programs_lib

ROUNDS = 3
BASES = [
  (dtype, form) for dtype in ("float32", "bfloat16") for form in ("null", "int8", "nf4")
]
TIMED = "float32"
PHASES = ("rollout", "teacher", "update")


def load(folder: str, dtype: str, form: str):
  config = config_load.load(
    "configs/quickstart.yaml",
    [
      f"output={folder}",
      f"model.dtype={dtype}",
      f"lora={{base: {form}}}",
      "data.answers=original",
      "data.validation=configs/data/wordnet/law/test.jsonl",
    ],
  )
  plan, inputs = run_inputs.prepare(config)
  params = initial_state.load_params(
    config.model.source,
    plan.decoder,
    plan.base_dtype,
    plan.base_shardings,
    form=plan.base_form,
  )
  return config, plan, inputs, params


def held_out_loss(folder: str, config, plan, inputs, params) -> float:
  """Mean over the test questions, nats per token."""
  questions = test_sets.read_validation(config.data, inputs.tokenizer, None)
  settings = scoring.Settings(8, config.model.dtype, 1)
  model = scoring.eval_model(params, plan.decoder, inputs.tokenizer, settings, None)
  with journal.open_journal(pathlib.Path(folder) / "losses.jsonl") as log:
    losses = scoring.losses(model, questions.rows, log, name="held-out loss")
  return sum(losses) / len(losses)


def main(folder: str) -> None:
  runs = {}
  print("model.dtype  lora.base  bytes of the base  held-out loss")
  for dtype, form in BASES:
    config, plan, inputs, params = load(folder, dtype, form)
    reference = step_memory.reference_shapes(plan)
    size = step_memory.bytes_per_device(reference.teacher)
    loss = held_out_loss(folder, config, plan, inputs, params)
    print(f"{dtype:11}  {form:9}  {size:17,}  {loss:13.4f}", flush=True)
    if dtype != TIMED:
      continue
    state = initial_state.new_state(
      plan, inputs, params, anchor=None, soft_mask=None, seed=config.train.seed
    )
    runs[form] = (plan, inputs, initial_state.reference_params(plan, params, None))
    runs[form] = (*runs[form], state)
  seconds = {form: [] for form in runs}
  for _ in range(ROUNDS + 1):
    for form, (plan, inputs, reference, state) in runs.items():
      with jax.set_mesh(plan.mesh):
        batch = sharding.spread(sharding.batch(plan.mesh), inputs.dataset[0])
        state, done = programs_lib.run_step(
          plan.programs, state, reference, batch, 0, timed=True
        )
      runs[form] = (plan, inputs, reference, state)
      seconds[form].append(done.seconds)
  print(f"lora.base  {'  '.join(f'{phase:>8}' for phase in PHASES)}")
  for form, rounds in seconds.items():
    fastest = [min(times[phase] for times in rounds[1:]) for phase in PHASES]
    print(f"{form:9}  {'  '.join(f'{one:8.2f}' for one in fastest)}")


if __name__ == "__main__":
  main(sys.argv[1])
