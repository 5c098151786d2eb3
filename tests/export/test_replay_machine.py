"""The machine that runs MLX programs: state, branches, the chain that runs at load, taps, and what it refuses."""

import struct

import pytest

pytest.importorskip("mlx.core")
pytest.importorskip("executorch")

import mlx.core as mx
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from replay_graphs import Tid, Vid, graph, make, pte, serialize_mlx_graph
from torch import Tensor

from gemma4_impl.export.replay.graph import parse
from gemma4_impl.export.replay.machine import Machine, Tap
from gemma4_impl.export.replay.session import to_mlx, to_torch

FLOAT = 6


def counter() -> Machine:
    """out = state + x, which becomes the state [3]. Slots: 0 is x, 1 the output, 2 the state."""
    nodes = [
        make("AddNode", a=Tid(2), b=Tid(0), out=Tid(1)),
        make("NoopNode"),
        make("IdCopyNode", x=Tid(1), out=Tid(2)),
    ]
    return Machine(pte(graph(nodes, inputs=[torch.zeros(3)], buffers=[torch.zeros(3)])))


def step(machine: Machine, *inputs: Tensor) -> Tensor:
    (out,), _ = machine.run([to_mlx(x) for x in inputs])
    return to_torch(out)


def test_state_goes_on_and_starts_over():
    machine, other = counter(), counter()
    one = torch.ones(3)
    assert [float(step(machine, one)[0]) for _ in range(3)] == [1, 2, 3]
    assert step(other, one).tolist() == [1, 1, 1]
    machine.reset()
    assert step(machine, one).tolist() == [1, 1, 1]


def test_a_failed_run_loses_the_state():
    nodes = [
        make("TakeNode", x=Tid(2), index=Tid(0), axis=0, out=Tid(1)),
        make("SliceUpdateNode", dst=Tid(2), update=Tid(1), axis=0, start=0, stop=1, out=Tid(2)),
    ]
    machine = Machine(pte(graph(nodes, inputs=[torch.zeros(1, dtype=torch.long)], buffers=[torch.zeros(3)])))
    step(machine, torch.tensor([2]))
    with pytest.raises(ValueError, match=r"^instruction 0 \(TakeNode\): an index outside -3 .. 2$"):
        step(machine, torch.tensor([3]))
    with pytest.raises(ValueError, match="an earlier run failed, and its state with it: reset first"):
        step(machine, torch.tensor([2]))
    machine.reset()
    step(machine, torch.tensor([2]))


def test_a_buffer_is_updated_in_place():
    """A copy for each of 64 buffers of 1 MiB would show in what MLX has allocated at most."""
    count, buffers = 8, [torch.zeros(1 << 18)] * 8
    nodes = [
        make("SliceUpdateNode", dst=Tid(2 + i), update=Tid(0), axis=0, start=5, stop=6, out=Tid(2 + i))
        for i in range(count)
    ]
    nodes.append(make("IdCopyNode", x=Tid(0), out=Tid(1)))
    machine = Machine(pte(graph(nodes, inputs=[torch.zeros(1)], buffers=buffers)))
    step(machine, torch.ones(1))
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    assert before >= count << 20
    step(machine, torch.ones(1))
    assert mx.get_peak_memory() - before < 1 << 20


def test_the_first_chain_runs_once_at_load():
    """It may write constants, which the others may not."""
    constants = [torch.tensor([2.0, 3.0]), torch.tensor(0.0)]
    initial = [make("MultiplyNode", a=Tid(0), b=Tid(0), out=Tid(1))]
    main = [make("AddNode", a=Tid(1), b=Tid(2), out=Tid(3))]
    program = graph(main, initial, constants=constants, inputs=[torch.zeros(2)], init=1)
    machine = Machine(pte(program, constants))
    for _ in range(2):
        assert step(machine, torch.ones(2)).tolist() == [5, 10]
    with pytest.raises(ValueError, match=r"^instruction 0 \(MultiplyNode\): writes the constant in slot 1$"):
        Machine(pte(graph(initial, constants=constants), constants))


def branching(*, value: int) -> Machine:
    nodes = [
        make("SymSizeNode", a=Tid(0), dim=0, out=Vid(0)),
        make("SubtractIntNode", a=Vid(0), b=value, out=Vid(0)),
        make("IfNode", cond=Vid(0), then_chain_idx=1, else_chain_idx=2),
    ]
    then, other = ([make(f"{name}Node", x=Tid(0), out=Tid(1))] for name in ("Neg", "Square"))
    return Machine(pte(graph(nodes, then, other, inputs=[torch.zeros(3)], values=1)))


def test_branches():
    x = torch.tensor([1.0, 2.0, 3.0])
    assert torch.equal(step(branching(value=1), x), -x)
    assert torch.equal(step(branching(value=3), x), x * x)


def test_taps_see_a_slot_as_it_was_then():
    nodes = [make("NegNode", x=Tid(0), out=Tid(1)), make("SquareNode", x=Tid(1), out=Tid(1))]
    machine = Machine(pte(graph(nodes, inputs=[torch.zeros(2)])))
    _, seen = machine.run([mx.array([1.0, 2.0])], {"neg": Tap(0, 0, 1), "out": Tap(0, 1, 1), "in": Tap(0, 1, 0)})
    assert {name: value.tolist() for name, value in seen.items()} == {"neg": [-1, -2], "out": [1, 4], "in": [1, 2]}


def test_inputs_are_checked():
    machine = counter()
    for wrong in (torch.ones(4), torch.ones(1, 3), torch.ones(3, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"input 0 of 'forward' must be mlx.core.float32 \[3\], got"):
            step(machine, wrong)
    with pytest.raises(ValueError, match="takes 1 inputs, not 2"):
        step(machine, torch.ones(3), torch.ones(3))
    # Nothing was run: the state is as it was.
    assert step(machine, torch.ones(3)).tolist() == [1, 1, 1]


X = Tid(0)


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([make("RandomBitsNode", out=Tid(1), shape=[3])], r"instruction 0 \(RandomBitsNode\): .* does not know"),
        ([make("NegNode", x=Tid(9), out=Tid(1))], r"instruction 0 \(NegNode\): tensor slot 9 of 3"),
        ([make("NegNode", x=X, out=Tid(9))], r"instruction 0 \(NegNode\): tensor slot 9 of 3"),
        ([make("NegNode", x=Tid(2), out=Tid(1))], r"instruction 0 \(NegNode\): reads .*index=2.*nothing has written"),
        ([make("SymSizeNode", a=X, dim=0, out=Vid(4))], r"\(SymSizeNode\): value slot 4 of 1"),
        ([make("ReshapeNode", x=X, shape=[Vid(0)], out=Tid(1))], r"\(ReshapeNode\): reads .*nothing has written"),
        ([make("AsTypeNode", x=X, scalar_type=7, out=Tid(1))], r"\(AsTypeNode\): dtype 7 is not one of MLX's"),
        ([make("NegNode", x=X, out=Tid(2))], "nothing writes the output in slot 1"),
        ([make("IfNode", cond=1, then_chain_idx=0, else_chain_idx=0)], "branches to chain 0, from chain 0"),
        ([make("IfNode", cond=1, then_chain_idx=1, else_chain_idx=7)], "branches to chain 1, from chain 0"),
    ],
)  # fmt: skip
def test_malformed_programs_are_refused_at_load(nodes, message):
    with pytest.raises(ValueError, match=message):
        Machine(pte(graph(nodes, inputs=[torch.zeros(3)], temps=1, values=1)))


def test_programs_that_would_take_forever_are_refused():
    """Each of 24 chains runs the next one twice."""
    chains = [[make("IfNode", cond=1, then_chain_idx=i, else_chain_idx=i)] * 2 for i in range(1, 25)]
    last = [make("NegNode", x=X, out=Tid(1))]
    with pytest.raises(ValueError, match=r"chain \d+ may run \d+ instructions, \d+ deep"):
        Machine(pte(graph(*chains, last, inputs=[torch.zeros(3)])))


@pytest.mark.parametrize(
    ("node", "fields"),
    [
        ("FullNode", {"shape": [1 << 20] * 4, "v": 0.0, "scalar_type": FLOAT}),
        ("ARangeNode", {"start": 0, "stop": 1 << 40, "step": 1}),
        ("BroadcastToNode", {"x": X, "shape": [1 << 30, 3]}),
        ("TileNode", {"x": X, "reps": [1 << 30]}),
        ("RepeatNode", {"x": X, "repeats": 1 << 30, "axis": 0}),
        ("PadNode", {"x": X, "pad_width": [1 << 30, 0], "mode": "constant"}),
        ("TriNode", {"n": 1 << 20, "m": 1 << 20, "scalar_type": FLOAT}),
        ("AsStridedNode", {"x": X, "shape": [1 << 30], "strides": [0]}),
    ],
)
def test_giant_arrays_are_refused(node, fields):
    machine = Machine(pte(graph([make(node, **fields, out=Tid(1))], inputs=[torch.zeros(3)])))
    with pytest.raises(
        ValueError, match=rf"instruction 0 \({node}\): an array of \d+ bytes, more than the \d+ allowed"
    ):
        step(machine, torch.ones(3))


def test_a_constant_without_its_data():
    constants = [torch.ones(3)]
    program = graph([make("IdCopyNode", x=Tid(0), out=Tid(1))], constants=constants)
    with pytest.raises(ValueError, match="lacks the data of its constant 'c0'"):
        Machine(pte(program))
    with pytest.raises(ValueError, match=r"constant 'c0': 16 bytes for mlx.core.float32 \[3\]"):
        Machine(pte(program, [torch.ones(4)]))


def busy() -> tuple[bytes, list[Tensor]]:
    """A program with a bit of everything."""
    constants = [torch.arange(12.0).reshape(4, 3), torch.ones(3), torch.tensor(0.0)]
    # Slots: 0-2 constants, 3-5 inputs, 6 the output, 7 the buffer, 8-11 temporary.
    main = [
        make("ItemIntNode", x=Tid(4), out=Vid(0)),
        make("SymSizeNode", a=Tid(3), dim=0, out=Vid(1)),
        make("AddIntNode", a=Vid(0), b=Vid(1), out=Vid(2)),
        make("TakeNode", x=Tid(0), index=Tid(3), axis=0, out=Tid(8)),
        make("RMSNormNode", x=Tid(8), weight=Tid(1), eps=1e-6, out=Tid(8)),
        make("SliceUpdateNode", dst=Tid(7), update=Tid(8), axis=0, start=Vid(0), stop=Vid(2), out=Tid(7)),
        make("SliceNode", x=Tid(7), axis=0, start=0, stop=Vid(2), out=Tid(9)),
        make("TransposeNode", x=Tid(9), perm=[1, 0], out=Tid(10)),
        make("AddmmNode", mat1=Tid(8), mat2=Tid(10), out=Tid(10)),
        make("SoftmaxNode", x=Tid(10), axis=-1, out=Tid(10)),
        make("IfNode", cond=Vid(0), then_chain_idx=2, else_chain_idx=3),
        make("ConcatenateNode", tensors=[Tid(11), Tid(11)], axis=0, out=Tid(11)),
        make("ReshapeNode", x=Tid(11), shape=[-1], out=Tid(6)),
    ]
    initial = [make("AddNode", a=Tid(1), b=Tid(1), out=Tid(2))]
    then = [make("AddmmNode", mat1=Tid(10), mat2=Tid(9), out=Tid(11))]
    other = [make("MultiplyNode", a=Tid(9), b=Tid(5), out=Tid(11))]
    inputs = [torch.tensor([1, 3]), torch.tensor([0]), torch.ones(3)]
    buffers, chains = [torch.zeros(6, 3)], (main, initial, then, other)
    program = graph(*chains, constants=constants, inputs=inputs, buffers=buffers, temps=4, values=3, init=1)
    return serialize_mlx_graph(program), constants


PAYLOAD, CONSTANTS = busy()
INPUTS = [mx.array([1, 3]).astype(mx.int64), mx.array([0]).astype(mx.int64), mx.ones(3)]


def attempt(payload: bytes) -> None:
    """Runs it, or gets a ValueError; anything else, an end of the process too, fails the test."""
    try:
        machine = Machine(pte(payload, CONSTANTS), limit=1 << 22)
        for _ in range(2):
            machine.run(INPUTS)
    except ValueError:
        pass


def test_the_program_that_is_damaged_below_runs():
    machine = Machine(pte(PAYLOAD, CONSTANTS))
    (out,), _ = machine.run(INPUTS)
    assert out.shape == (12,)
    assert len(parse(PAYLOAD).chains) == 4


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(24, len(PAYLOAD) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_damaged_bytes(changes):
    damaged = bytearray(PAYLOAD)
    for place, value in changes:
        damaged[place] = value
    attempt(bytes(damaged))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, len(PAYLOAD) - 1), st.binary(max_size=40))
def test_truncated_or_replaced_bytes(length, tail):
    attempt(PAYLOAD[:length] + tail)
    attempt(PAYLOAD[:24] + tail + PAYLOAD[24 + len(tail) :])


WORDS = st.sampled_from([0, 1, 2, 3, 4, 6, 7, 12, 13, 255, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])


@settings(max_examples=150, deadline=None)
@given(st.integers(6, len(PAYLOAD) // 4 - 1), WORDS)
def test_damaged_words(place, value):
    damaged = bytearray(PAYLOAD)
    struct.pack_into("<I", damaged, 4 * place, value)
    attempt(bytes(damaged))
