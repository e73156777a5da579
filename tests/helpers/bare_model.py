"""A small Llama of which there is nothing but a config.json: what a plan reads."""

import json
import pathlib
from typing import Any

# 8 divides every size, so that every array is spread over all of 8 devices.
FIELDS = {
  "model_type": "llama",
  "vocab_size": 512,
  "hidden_size": 64,
  "intermediate_size": 128,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": 256,
  "tie_word_embeddings": True,
}
# Embedding, final norm, and by layer q, o, k, v, gate, up, down and two norms.
COUNT = 512 * 64 + 64 + 3 * (64 * (64 * 2 + 32 * 2 + 128 * 3) + 2 * 64)


def save(folder: pathlib.Path, **fields: Any) -> pathlib.Path:
  """Writes the config.json, with other fields where they are given."""
  folder.mkdir()
  (folder / "config.json").write_text(json.dumps(FIELDS | fields))
  return folder
