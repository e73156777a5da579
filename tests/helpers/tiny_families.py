"""The config.json of a tiny model of each family."""

TINY = {
  "vocab_size": 90,
  "hidden_size": 48,
  "intermediate_size": 56,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": 64,
}
