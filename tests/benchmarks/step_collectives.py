"""What the devices of a tensor-parallel step send.

`python -m tests.benchmarks.step_collectives`.

Run by `sharding_test` in a process of its own, because the number of devices is fixed
when jax starts. Prints, by program, the kinds of its collectives and the shapes of the
arrays that they bring, read from the compiled text of the step that `train` runs.
"""

import json
import os
import pathlib
import re
import sys

VOCABULARY = 1016
"""8 parts of 127: two sizes that nothing else in the step has."""


def main() -> None:
  from raft_jax.planning import machines

  os.environ.update(machines.environment(machines.parse("cpu:8")))
  from raft_jax.config import load as config_load
  from raft_jax.planning import dry_run, hlo_cost

  folder = pathlib.Path(sys.argv[1])
  (folder / "config.json").write_text(
    json.dumps(
      {
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "max_position_embeddings": 256,
        "tie_word_embeddings": "tied" in sys.argv,
      }
    )
  )
  lengths = {"prompt": 16, "answer": 16, "teacher": 32}
  (folder / "run.yaml").write_text(
    json.dumps(
      {
        "model": {"source": str(folder), "remat": True},
        "data": {"questions": "absent.jsonl"}
        | {f"max_{name}_tokens": length for name, length in lengths.items()},
        "rollout": {"max_new_tokens": 12},
        "distill": {"top_k": 32},
        "train": {"gradient_stats_every": 0},
        "mesh": {"fsdp": 1, "tensor": 8},
        "output": str(folder / "out"),
      }
    )
  )
  texts = []

  def keep(text: str) -> hlo_cost.Module:
    texts.append(text)
    return parse(text)

  parse, hlo_cost.parse = hlo_cost.parse, keep
  dry_run.measure(config_load.load(folder / "run.yaml", without_data=True), "cpu:8")
  counts = {}
  for name, text in zip(("rollout", "teacher", "update"), texts, strict=True):
    sent = hlo_cost.collectives(parse(text), 8)
    shapes = {shape for one in sent for shape in re.findall(r"\[([\d,]*)\]", one.type)}
    counts[name] = {
      "kinds": sorted({one.kind for one in sent}),
      "shapes": [[int(n) for n in shape.split(",") if n] for shape in sorted(shapes)],
    }
  print(json.dumps(counts))


if __name__ == "__main__":
  main()
