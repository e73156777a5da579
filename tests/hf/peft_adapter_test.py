"""Which kernels the names of a model's modules stand for.

Whether PEFT reads the written adapters is tested in `tests/models/lora_test.py`.
"""

import pytest

from raft_jax import errors
from raft_jax.config import schema
from raft_jax.hf import families, peft_adapter
from raft_jax.models import lora
from tests.helpers import refusals, tiny_decoder


def test_targets_are_named_as_the_files_name_them():
  llama, phi = families.FAMILIES["llama"], families.FAMILIES["phi3"]
  assert peft_adapter.targets(llama, ["v_proj", "q_proj"]) == ("q", "v")
  assert peft_adapter.targets(phi, ["qkv_proj", "down_proj"]) == ("q", "k", "v", "down")
  dense = [row for row in families.FAMILIES.values() if not row.has_experts]
  assert len(dense) > 10
  for family in dense:  # expert_tensors_test has the others' refusal
    kernels = (*lora.KERNELS, *lora.GLOBAL_KERNELS, *lora.KV_SHARED_KERNELS)
    own = tuple(
      k for k in kernels if f"layers/{k}" in family.names and "per_layer" not in k
    )
    assert peft_adapter.targets(family, schema.Lora().targets) == own
  with pytest.raises(errors.UserError) as caught:
    peft_adapter.targets(llama, ["q_proj", "qkv_proj"])
  assert str(caught.value) == (
    "lora.targets: no projection 'qkv_proj' in this model; it has q_proj, k_proj, "
    "v_proj, o_proj, gate_proj, up_proj, down_proj"
  )


def test_projections_of_embeddings_of_layers_are_adapted_by_name():
  family = families.FAMILIES["gemma4_text"]
  names = ["per_layer_input_gate", "per_layer_projection"]
  kernels = peft_adapter.targets(family, names)
  assert kernels == (
    *("per_layer_gate", "per_layer_out"),
    *("kv_shared_per_layer_gate", "kv_shared_per_layer_out"),
  )
  message = refusals.refusal(
    lora.split, tiny_decoder.CONFIG, kernels, rank=2, alpha=2.0, key=None
  )
  assert message == (
    "lora.targets: the layers of this model have no embeddings of their own, whose "
    "projections are named; name others"
  )


def test_a_gate_is_passed_over_where_there_is_none_but_not_alone():
  apertus = families.FAMILIES["apertus"]
  assert peft_adapter.targets(apertus, ["gate_proj", "up_proj"]) == ("up",)
  with pytest.raises(errors.UserError) as caught:
    peft_adapter.targets(apertus, ["gate_proj"])
  assert str(caught.value) == (
    "lora.targets: no projection 'gate_proj' in this model; it has q_proj, k_proj, "
    "v_proj, o_proj, up_proj, down_proj"
  )
