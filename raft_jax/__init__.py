"""RAFT: domain fine-tuning of language models without losing general abilities.

Importing this package imports nothing else: `raft_jax.losses`, `raft_jax.vocab_head`
and `raft_jax.balance` need only jax, optax and numpy.
"""

__version__ = "0.1.0"
