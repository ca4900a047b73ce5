"""Reading a compiled program: loops, fusions, collectives, and a real one against arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from byolx.planning import costs, hlo, tpu

CONFIG = 'backend_config={{"window_config":{{"estimated_cycles":"{}"}}}}'


def cycles(count):
  return CONFIG.format(count)


# Cycles: 100 + 3 * (10 + 2 * 7 + max(5, 50)) + 4 * 1 (conditions) + 30 (called).
PROGRAM = f"""HloModule jit_step, is_scheduled=true, entry_computation_layout={{(f32[4]{{0}})->f32[4]}}

%fused.1 (p: f32[64,64]) -> f32[64,64] {{
  %p = f32[64,64]{{1,0:T(8,128)}} parameter(0)
  %w = f32[64,64]{{1,0:T(8,128)}} parameter(1)
  ROOT %dot.1 = f32[64,64]{{1,0:T(8,128)}} dot(%p, %w), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}, {cycles(9999)}
}}

%add (x: f32[], y: f32[]) -> f32[] {{
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}}

%inner_condition (s: (s32[], f32[8])) -> pred[] {{
  %s = (s32[], f32[8]) parameter(0)
  %k = s32[] get-tuple-element(%s), index=0
  %odd = s32[] custom-call(%k), custom_call_target="Odd"
  ROOT %less = pred[] compare(%odd, %k), direction=LT
}}

%inner_body (s: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %s = (s32[], f32[8]) parameter(0)
  %v = f32[8]{{0}} get-tuple-element(%s), index=1
  %twice = f32[8]{{0}} add(%v, %v), {cycles(7)}
  ROOT %t = (s32[], f32[8]) tuple(%s, %twice)
}}

%cheap (v: f32[8]) -> f32[8] {{
  %v = f32[8]{{0}} parameter(0)
  ROOT %c = f32[8]{{0}} copy(%v), {cycles(5)}
}}

%dear (v: f32[8]) -> f32[8] {{
  %v = f32[8]{{0}} parameter(0)
  ROOT %c = f32[8]{{0}} multiply(%v, %v), {cycles(50)}
}}

%condition (s: (s32[], f32[8])) -> pred[] {{
  %s = (s32[]{{:T(256)}}, /*index=1*/f32[8]{{0:T(8,128)}}) parameter(0)
  %end = s32[] constant(7)
  %i = s32[] get-tuple-element(%s), index=0
  ROOT %less = pred[] compare(%i, %end), direction=LT, {cycles(1)}
}}

%body (s: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %s = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %step = s32[] constant(2)
  %next = s32[] add(%i, %step)
  %v = f32[8]{{0}} get-tuple-element(%s), index=1
  %scaled = f32[8]{{0}} multiply(%v, %v), {cycles(10)}
  %reduced = (f32[8]{{0}}, bf16[2,3]{{1,0:T(8,128)(2,1)}}) all-reduce(%scaled, %v), to_apply=%add
  %inner = (s32[], f32[8]) while(%s), condition=%inner_condition, body=%inner_body, backend_config={{"known_trip_count":{{"n":"2"}}}}
  %chosen = f32[8]{{0}} conditional(%i, %v, %v), branch_computations={{%cheap, %dear}}
  ROOT %t = (s32[], f32[8]) tuple(%next, %chosen)
}}

%collecting (p: f32[8]) -> f32[32] {{
  %p = f32[8]{{0}} parameter(0)
  ROOT %g = (f32[8]{{0}}, f32[32]{{0}}) all-gather-start(%p), dimensions={{0}}
}}

%called (v: f32[8]) -> f32[8] {{
  %v = f32[8]{{0}} parameter(0)
  ROOT %c = f32[8]{{0}} negate(%v), {cycles(30)}
}}

ENTRY %main (a: f32[64,64], b: f32[8]) -> f32[8] {{
  %a = f32[64,64]{{1,0:T(8,128)}} parameter(0)
  %b = f32[8]{{0}} parameter(1)
  %one = s32[] constant(1)
  %from = s32[]{{:T(256)}} copy(%one)
  %start = (s32[], f32[8]) tuple(%from, /*index=1*/%b)
  %fusion.1 = f32[64,64]{{1,0:T(8,128)}} fusion(%a, %a), kind=kOutput, calls=%fused.1, metadata={{op_name="jit(step)/it\\'s/dot(a, b)" stack_frame_id=3}}, {cycles(100)}
  %loop = (s32[]{{:T(256)}}, f32[8]{{0}}) while(%start), condition=%condition, body=%body
  %gathering = (f32[8]{{0}}, f32[32]{{0}}) fusion(%b), kind=kCustom, calls=%collecting
  %gathered = f32[32]{{0}} all-gather-done(%gathering)
  %moving = (f32[8]{{0}}, f32[8]{{0}}, u32[], u32[]) collective-permute-start(%b), source_target_pairs={{{{0,1}}}}
  %moved = f32[8]{{0}} collective-permute-done(%moving)
  %kept = f32[2]{{0}} reduce-scatter(%b), dimensions={{0}}, to_apply=%add
  %big = s8[65536]{{0}} sort(%b), dimensions={{0}}
  %small = s8[65535]{{0}} sort(%b), dimensions={{0}}
  ROOT %out = f32[8]{{0}} call(%b), to_apply=%called
}}
"""  # noqa: E501


@pytest.fixture(scope="module")
def program():
  return hlo.parse(PROGRAM)


def test_cycles_of_loops_branches_and_calls(program):
  assert costs.cycles(program) == 100 + 3 * (10 + 2 * 7 + 50) + 4 * 1 + 30
  assert costs.cycles(program, loops=False) == 100 + (10 + 7 + 50) + 2 * 1 + 30
  assert hlo.unknown_loops(program) == 0


def test_a_loop_that_ends_nobody_knows_when_counts_once():
  text = PROGRAM.replace('backend_config={"known_trip_count":{"n":"2"}}', "metadata={}")
  program = hlo.parse(text)
  assert hlo.unknown_loops(program) == 1
  assert costs.cycles(program) == 100 + 3 * (10 + 7 + 50) + 4 * 1 + 30


def test_a_loop_that_does_not_turn():
  program = hlo.parse(PROGRAM.replace("constant(7)", "constant(1)"))
  assert costs.cycles(program) == 100 + 1 + 30


def test_collectives_are_counted_as_often_as_they_run(program):
  assert costs.collectives(program) == {
    "all-reduce": {"count": 3, "bytes": 3 * (8 * 4 + 6 * 2)},
    "all-gather": {"count": 1, "bytes": 32 * 4},
    "reduce-scatter": {"count": 1, "bytes": 2 * 4},
    "collective-permute": {"count": 1, "bytes": 8 * 4},
  }


def test_what_costs_most(program):
  found = costs.costs(program)
  assert sum(cost.total for cost in found) == costs.cycles(program)
  dear, first, inner = found[0], found[1], found[2]
  assert (dear.name, dear.cycles, dear.times, dear.kind) == ("c", 50, 3, "elementwise")
  assert (first.name, first.kind) == ("fusion.1", costs.CONVOLUTIONS)
  assert (first.shape, first.source) == ("f32[64,64]", "jit(step)/it\\'s/dot(a, b)")
  assert (inner.name, inner.total, inner.times) == ("twice", 42, 6)
  assert costs.by_kind(found) == {
    "elementwise": 150 + 42 + 30 + 30 + 4,
    costs.CONVOLUTIONS: 100,
  }


def test_what_has_no_estimate(program):
  assert costs.unestimated(program) == {"sort": 1}


@pytest.mark.parametrize(
  ("shape", "size"),
  [
    ("f32[2,3]{1,0:T(8,128)}", 24),
    ("(bf16[5]{0}, /*index=1*/pred[7]{0:T(1024)S(6)})", 17),
    ("s32[]", 4),
    ("u4[10]{0}", 5),
    ("f8e4m3fn[3]", 3),
    ("((f64[2]{0}), token[])", 16),
    ("c64[2]", 16),
  ],
)
def test_sizes(shape, size):
  assert hlo.size(shape) == size


def test_what_is_no_program_is_refused():
  with pytest.raises(ValueError, match="ENTRY"):
    hlo.parse("HloModule empty\n")


def test_flops_of_a_strided_convolution():
  text = """
ENTRY %main (x: f32[8,32,32,3]) -> f32[8,16,16,64] {
  %x = f32[8,32,32,3]{3,2,1,0} parameter(0)
  %w = f32[7,7,3,64]{3,2,1,0} parameter(1)
  ROOT %y = f32[8,16,16,64]{3,2,1,0} convolution(%x, %w), window={size=7x7 stride=2x2 pad=2_3x2_3}, dim_labels=b01f_01io->b01f
}
"""  # noqa: E501
  program = hlo.parse(text)
  total = sum(costs.flops(program, name, one) for name, one, _ in hlo.executed(program))
  assert total == 2 * (8 * 16 * 16 * 64) * (7 * 7 * 3)


@pytest.mark.parametrize("name", ["v2:2x2", "v5e:2x2"])
def test_a_real_program_of_a_scan(name):
  """Products of a scan, forward and backward, counted by hand; XLA counts a loop's body once."""
  turns, side = 6, 256
  devices = np.array(tpu.devices(tpu.topology(name)))
  mesh = Mesh(devices, ("data",), axis_types=(AxisType.Auto,))

  def step(weights, x):
    def loss(weights):
      y, _ = jax.lax.scan(lambda y, w: (jnp.tanh(y @ w), None), x, weights)
      return jnp.sum(y**2)

    return weights - jax.grad(loss)(weights)

  def shape(dims, spec):
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(dims, jnp.float32, sharding=sharding)

  arguments = shape((turns, side, side), ()), shape((side * len(devices), side), ("data",))
  compiled = jax.jit(step).trace(*arguments).lower(lowering_platforms=("tpu",)).compile()
  program = hlo.parse(compiled.as_text())
  products = sum(
    times * costs.flops(program, name, one) for name, one, times in hlo.executed(program)
  )
  # A product forward, two backward, in each turn.
  assert products == 3 * turns * 2 * side**3
  assert hlo.unknown_loops(program) == 0
  scaled = compiled.cost_analysis()["flops"] * costs.loop_factor(program, costs.flops)
  assert scaled == pytest.approx(products, rel=0.05)
  reduced = costs.collectives(program)["all-reduce"]
  assert reduced["bytes"] == pytest.approx(turns * side * side * 4, rel=0.01)
  assert costs.cycles(program) > 1.5 * costs.cycles(program, loops=False)
