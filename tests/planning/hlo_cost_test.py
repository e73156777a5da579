"""FLOPs, collectives and traffic against counts made by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo as fused_attention

from raft_jax.models import layer_functions, transformer
from raft_jax.planning import hlo_cost, machines
from tests.helpers import tiny_decoder


def counted(f, *args) -> float:
  return hlo_cost.flops(jax.jit(f).trace(*args).jaxpr.jaxpr)


@pytest.mark.parametrize("remat", [False, True])
def test_flops_of_a_decoder_are_those_of_the_formula(remat):
  """2 a weight and token, and 2·2·T·T·h a head for scores and their mixture; backward
  twice that, and the scores and their mixture again. Recomputing repeats the whole
  layer, but for its last product, which is only added."""
  c, rows, length = tiny_decoder.CONFIG, 2, 10
  heads, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
  weights = c.d_model * (2 * heads + 2 * kv + 3 * c.d_ff)
  tokens = rows * length
  attention = 4 * rows * c.n_heads * c.head_dim * length**2
  layer = 2 * weights * tokens + attention
  last = 2 * tokens * c.d_model * c.d_ff
  expected = c.n_layers * (4 * layer - last if remat else 3 * layer + attention)

  def loss(params, tokens_BT):
    valid_BT = jnp.ones(tokens_BT.shape, bool)
    hidden_BTD, _ = transformer.forward(
      params,
      c,
      tokens_BT,
      transformer.positions(valid_BT),
      transformer.causal_mask(valid_BT),
      compute=transformer.Compute(remat=remat),
    )
    return jnp.sum(hidden_BTD)

  tokens_BT = jax.ShapeDtypeStruct((rows, length), jnp.int32)
  assert counted(jax.grad(loss), transformer.shapes(c), tokens_BT) == expected


def test_flops_of_cudnns_attention_are_those_of_its_products(monkeypatch):
  """Two products forward, five backward; only traced, so that it needs no GPU."""
  monkeypatch.setattr(fused_attention, "check_cudnn_version", None)
  monkeypatch.setattr(fused_attention, "check_compute_capability", None)
  machines.pretend_cudnn(machines.parse("a100_80:1"))
  rows, queries, keys, heads, width = 2, 6, 10, 4, 8

  def attended(q_BTHh, k_BSNh):
    mask_BTS = jnp.ones((rows, queries, keys), bool)
    out_BTHh = layer_functions.attention(
      q_BTHh, k_BSNh, k_BSNh, mask_BTS, implementation="cudnn"
    )
    return jnp.sum(out_BTHh.astype(jnp.float32))

  arrays = (
    jax.ShapeDtypeStruct((rows, queries, heads, width), jnp.bfloat16),
    jax.ShapeDtypeStruct((rows, keys, 2, width), jnp.bfloat16),
  )
  product = 2 * rows * heads * queries * keys * width
  assert counted(attended, *arrays) == 2 * product
  assert counted(jax.grad(attended), *arrays) == 7 * product


def test_loops_count_as_often_as_they_can_run():
  square = jnp.ones((4, 4))  # a product of two: 2·4·4·4 = 128

  def early(x):
    """At most 7 rounds of 3 products."""
    return jax.lax.while_loop(
      lambda state: (state[0] < 7) & ~jnp.all(state[1] > 1e9),
      lambda state: (
        state[0] + 1,
        jax.lax.scan(lambda y, _: (y @ square, None), state[1], length=3)[0],
      ),
      (0, x),
    )

  def either(x):
    return jax.lax.cond(x[0, 0] > 0, lambda y: y @ square, lambda y: y @ y @ y, x)

  assert counted(early, square) == 7 * 3 * 128
  assert counted(either, square) == 2 * 128


# Eight devices. The entry gathers bf16[8,16] (256 bytes of which 32 are a device's) and
# runs a loop 5 times, in which another gathers f32[4,4] in groups of 2 and reduces
# f32[10] over all. Its bound is known, or stands in the condition, as on TPU.
HLO = """HloModule test, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%slices (p.0: f32[5,100], p.1: s32[]) -> f32[1,100] {
  %p.0 = f32[5,100]{1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %ds = f32[1,100]{1,0} dynamic-slice(%p.0, %p.1, %zero)
}

%nests (p.2: f32[5,100], p.3: s32[]) -> f32[1,100] {
  %p.2 = f32[5,100]{1,0} parameter(0)
  %p.3 = s32[] parameter(1)
  ROOT %inner = f32[1,100]{1,0} fusion(%p.2, %p.3), kind=kLoop, calls=%slices
}

%body (t: (s32[], f32[2,4], f32[5,100])) -> (s32[], f32[2,4], f32[5,100]) {
  %t = (s32[], f32[2,4]{1,0}, f32[5,100]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[2,4]{1,0} get-tuple-element(%t), index=1
  %w = f32[5,100]{1,0} get-tuple-element(%t), index=2
  %row = f32[1,100]{1,0} fusion(%w, %i), kind=kOutput, calls=%nests
  %ag = f32[4,4]{1,0} all-gather(%x), channel_id=2, replica_groups=[4,2]<=[8]
  %v = f32[10]{0} slice(%row), slice={[0:1], [0:10]}
  %ar = f32[10]{0} all-reduce(%v), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%sum
  ROOT %next = (s32[], f32[2,4]{1,0}, f32[5,100]{1,0}) tuple(%i, %x, %w)
}

%condition (t.1: (s32[], f32[2,4], f32[5,100])) -> pred[] {
  %t.1 = (s32[], f32[2,4]{1,0}, f32[5,100]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%t.1), index=0
  %bound = s32[] constant(BOUND)
  ROOT %less = pred[] compare(%i.1, %bound), direction=LT
}

ENTRY %main (p: bf16[1,16], q: (s32[], f32[2,4], f32[5,100])) -> f32[2,4] {
  %p = bf16[1,16]{1,0} parameter(0)
  %q = (s32[], /*index=1*/f32[2,4]{1,0}, f32[5,100]{1,0}) parameter(1)
  %on = (bf16[1,16]{1,0}, bf16[8,16]{1,0:S(1)}) all-gather-start(/*index=0*/%p), MESH
  %done = bf16[8,16]{1,0:S(1)} all-gather-done(%on)
  %loop = (s32[], f32[2,4]{1,0}, f32[5,100]{1,0}) while(%q), LOOP
  ROOT %end = f32[2,4]{1,0} get-tuple-element(%loop), index=1
}
"""
MESH = "channel_id=1, replica_groups=mesh['axis_0'=1,'axis_1'=8] {'axis_1'}"
LOOP = "condition=%condition, body=%body"
KNOWN = ', backend_config={"known_trip_count":{"n":"5"}}'


def module(bound: str, known: str) -> hlo_cost.Module:
  text = HLO.replace("BOUND", bound).replace("MESH", MESH)
  return hlo_cost.parse(text.replace("LOOP", LOOP + known))


@pytest.mark.parametrize(("bound", "known"), [("9", KNOWN), ("5", "")])
def test_collectives_of_a_program_by_hand(bound, known):
  listed = hlo_cost.collectives(module(bound, known), 8)
  # By a ring: gathering sends (g - 1) / g of the whole, reducing twice that.
  assert [(one.kind, one.group, one.times, one.wire) for one in listed] == [
    ("all-gather", 8, 1, 8 * 16 * 2 * 7 / 8),
    ("all-gather", 2, 5, 5 * 4 * 4 * 4 / 2),
    ("all-reduce", 8, 5, 5 * 2 * 40 * 7 / 8),
  ]


def test_traffic_counts_slices_by_themselves():
  """Per round: row 400 read and written, the index 4; slice 2·40, gather 32 + 64,
  reduce 40 + 40. Before the loop the gather reads 32 and writes 32 + 256, of which what
  is in S(1), on the chip, is free: its type names the operand once more."""
  program = module("5", KNOWN)
  per_round = (400 + 4 + 400) + 80 + (32 + 64) + (40 + 40)
  assert hlo_cost.traffic(program) == 5 * per_round + (32 + 32)
  assert hlo_cost.largest(program, 2)[0] == ("f32[1,100]", 400.0)


def test_sizes_of_types():
  assert (
    hlo_cost.size("(f32[2,3]{1,0}, /*index=1*/pred[8], s32[], u4[6])") == 24 + 8 + 4 + 3
  )
  assert hlo_cost.size("bf16[8,16]{1,0:T(8,128)(2,1)}") == 256
