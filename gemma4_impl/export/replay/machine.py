"""Runs a method of a program node by node with `mlx.core`, its mutable buffers kept between runs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from gemma4_impl.errors import one_line, short
from gemma4_impl.export.replay import arithmetic  # noqa: F401  (defines its nodes)
from gemma4_impl.export.replay.graph import Node, Tid, Vid, branches, parse, writes
from gemma4_impl.export.replay.nodes import DTYPES, INT64, OPS, Guard, Op
from gemma4_impl.export.replay.pte import Pte

DTYPE_FIELDS = ("scalar_type", "dtype")
LEAST_LIMIT = 1 << 30


@dataclass(frozen=True)
class Tap:
    """A tensor slot to copy, right after an instruction."""

    chain: int
    instruction: int
    tensor: int


@dataclass(frozen=True)
class _Step:
    node: Node
    op: Op | None
    """None: an If."""
    arguments: list
    """What `op` takes; slots stand in the places of what they will hold."""
    slots: list[tuple[int, Any]]
    """The places in `arguments` that hold slots, or lists of them."""
    outs: list[Tid | Vid]


class Machine:
    """One method of a program, and its state.

    Peak memory is the constants (copied once from the mapped file), the mutable buffers and the largest intermediates
    of one run: buffers are updated in place. On the CPU, attention also holds a score for every query and key.
    """

    def __init__(self, pte: Pte, method: str = "forward", limit: int | None = None):
        """
        Args:
            limit: bytes that one intermediate array may take: four times the constants and buffers by default, and at
                least 1 GiB.
        Raises ValueError, naming the instruction, for what is malformed or unknown. MLX's own errors (shapes that do
        not fit each other) are ValueErrors of `run`.
        """
        call = pte.call(method)
        self.method, self.graph = method, parse(call.payload)
        graph = self.graph
        given, taken = call.arguments[: len(graph.inputs)], call.arguments[len(graph.inputs) :]
        if len(taken) != len(graph.outputs) or set(given) - set(call.inputs) or set(call.outputs) - set(taken):
            raise ValueError(f"method {short(method)}: its delegate's inputs and outputs are not its own")
        # The delegate takes the inputs in the order of their first use.
        self._inputs = [(call.inputs.index(v), tid) for v, tid in zip(given, graph.inputs, strict=True)]
        self._outputs = [graph.outputs[taken.index(value)] for value in call.outputs]
        self._takes = len(call.inputs)
        self._chains = [[_bind(node) for node in chain if node.kind != "NoopNode"] for chain in graph.chains]
        self._buffers = graph.slots("mutable buffer")
        self._types = {
            index: (_dtype(meta.scalar_type, f"slot {index}"), tuple(low for low, _ in meta.shape))
            for index, meta in graph.metas.items()
        }
        fixed = sum(_nbytes(*self._types[i]) for i in (*graph.slots("constant"), *self._buffers))
        self.limit = limit or max(LEAST_LIMIT, 4 * sum(len(raw) for raw in pte.data.values()))
        if fixed > self.limit:
            raise ValueError(f"method {short(method)}: constants and buffers of {fixed} bytes, more than {self.limit}")
        self._constants = [self._constant(pte, index) for index in graph.slots("constant")]
        if graph.init is not None:
            self._initialise(graph.init)
        self.reset()

    def reset(self) -> None:
        """Starts over: every mutable buffer is 0, as in a program that was just loaded."""
        self._state: list[mx.array] | None = [
            mx.zeros(shape, dtype) for dtype, shape in map(self._types.get, self._buffers)
        ]

    @property
    def signature(self) -> list[tuple[mx.Dtype, tuple[int, ...]]]:
        """dtype and shape of each input, in the method's order; a size that may vary is the least one."""
        tids = dict(self._inputs)
        return [self._types[tids[number].index] for number in sorted(tids)]

    def run(
        self, inputs: Sequence[mx.array], taps: Mapping[str, Tap] | None = None
    ) -> tuple[list[mx.array], dict[str, mx.array]]:
        """The method's outputs for its inputs, both in its own order, and what the taps saw; all are computed.

        Raises ValueError for inputs that do not match; and for what the program does that cannot be done (an index
        out of range, shapes that do not fit): the state is then lost, and `reset` comes before the next run."""
        if self._state is None:
            raise ValueError("an earlier run failed, and its state with it: reset first")
        self._check_inputs(inputs)
        tensors: list[mx.array | None] = [None] * self.graph.tensors
        tensors[: len(self._constants)] = self._constants
        for number, tid in self._inputs:
            tensors[tid.index] = inputs[number]
        tensors[self._buffers.start : self._buffers.stop] = self._state
        # Nobody else may hold the buffers, or updating one would copy it.
        self._state = None
        run = _Run(self._chains, tensors, self.graph.values, self.limit, taps or {})
        run.chain(self.graph.main)
        outputs = [tensors[tid.index] for tid in self._outputs]
        state = tensors[self._buffers.start : self._buffers.stop]
        for index, buffer in zip(self._buffers, state, strict=True):
            if (buffer.dtype, buffer.shape) != self._types[index]:
                raise ValueError(f"the mutable buffer in slot {index} became {buffer.dtype} {buffer.shape}")
        tensors.clear()
        run.finish([*outputs, *state, *run.taps.values()])
        self._state = state
        return outputs, run.taps

    def _check_inputs(self, inputs: Sequence[mx.array]) -> None:
        if len(inputs) != self._takes:
            raise ValueError(f"method {short(self.method)} takes {self._takes} inputs, not {len(inputs)}")
        for number, tid in self._inputs:
            value, (dtype, _), shape = inputs[number], self._types[tid.index], self.graph.metas[tid.index].shape
            # The exporter writes 2 as the least size where it allows 1: only the greatest counts.
            fits = len(shape) == value.ndim and all(
                size == high if low == high else 0 < size <= (high or size)
                for size, (low, high) in zip(value.shape, shape, strict=True)
            )
            if value.dtype != dtype or not fits:
                sizes = ", ".join(str(low) if low == high else f"1-{high or 'any'}" for low, high in shape)
                got = f"{value.dtype} {list(value.shape)}"
                raise ValueError(f"input {number} of {short(self.method)} must be {dtype} [{sizes}], got {got}")

    def _constant(self, pte: Pte, index: int) -> mx.array:
        name, (dtype, shape) = self.graph.names[index], self._types[index]
        if name not in pte.data:
            raise ValueError(f"the program lacks the data of its constant {short(name)}")
        raw = pte.data[name]
        if len(raw) != _nbytes(dtype, shape):
            raise ValueError(f"constant {short(name)}: {len(raw)} bytes for {dtype} {list(shape)}")
        if dtype == mx.bfloat16:
            # numpy has none.
            return mx.array(np.frombuffer(raw, np.uint16).reshape(shape)).view(dtype)
        return mx.array(np.frombuffer(raw, str(dtype).removeprefix("mlx.core.")).reshape(shape))

    def _initialise(self, chain: int) -> None:
        """Runs the chain that computes constants from others, once."""
        tensors = [*self._constants, *[None] * (self.graph.tensors - len(self._constants))]
        run = _Run(self._chains, tensors, self.graph.values, self.limit, {})
        run.chain(chain)
        self._constants = tensors[: len(self._constants)]
        run.finish(self._constants)


class _Run:
    """One run of a chain, which builds MLX's lazy graph; `finish` computes it."""

    def __init__(
        self,
        chains: list[list[_Step]],
        tensors: list[mx.array | None],
        values: int,
        limit: int,
        taps: Mapping[str, Tap],
    ):
        self.chains, self.tensors, self.values = chains, tensors, [None] * values
        self.guard, self.taps = Guard(limit), {}
        self.wanted: dict[tuple[int, int], list[tuple[str, int]]] = {}
        for name, tap in taps.items():
            self.wanted.setdefault((tap.chain, tap.instruction), []).append((name, tap.tensor))

    def chain(self, index: int) -> None:
        for step in self.chains[index]:
            if step.op is None:
                condition = step.node.fields["cond"]
                if isinstance(condition, Vid):
                    condition = self.values[condition.index]
                then, other = branches(step.node)
                self.chain(then if condition else other)
                continue
            try:
                self.step(step)
            except Exception as error:
                # MLX raises whatever its C++ does; a program that fails is bad input here.
                raise step.node.refuse(one_line(error)) from error
            if self.wanted:
                for name, tensor in self.wanted.get((index, step.node.number), ()):
                    self.taps[name] = self.tensors[tensor]

    def step(self, step: _Step) -> None:
        arguments = step.arguments.copy()
        for place, slot in step.slots:
            arguments[place] = [self.read(s) for s in slot] if isinstance(slot, list) else self.read(slot)
        if step.op.guarded:
            self.guard.where = step.node.where
            out = step.op.run(self.guard, *arguments)
        else:
            out = step.op.run(*arguments)
        if len(step.outs) != 1:
            if len(out) != len(step.outs):
                raise ValueError(f"{len(out)} parts for {len(step.outs)} slots")
        else:
            out = [out]
        for slot, value in zip(step.outs, out, strict=True):
            if isinstance(slot, Vid):
                if value not in INT64:
                    raise ValueError(f"{short(value)} does not fit 64 bits")
                self.values[slot.index] = value
            else:
                self.guard.fits(math.prod(value.shape) * value.dtype.size)
                self.tensors[slot.index] = value

    def read(self, slot: Any) -> Any:
        if isinstance(slot, Tid):
            return self.tensors[slot.index]
        return self.values[slot.index] if isinstance(slot, Vid) else slot

    def finish(self, arrays: list[mx.array]) -> None:
        try:
            mx.eval(arrays, [condition for _, condition in self.guard.conditions])
        except Exception as error:
            raise ValueError(f"the program cannot be computed: {one_line(error)}") from error
        for wrong, condition in self.guard.conditions:
            if not condition.item():
                raise ValueError(wrong)


def _bind(node: Node) -> _Step:
    """What a node runs. Raises ValueError for a node that is not known, or lacks a field."""
    if node.kind == "IfNode":
        if not isinstance(node.fields["cond"], int | Vid):
            raise node.refuse("no condition")
        return _Step(node, None, [], [], [])
    if node.kind not in OPS:
        raise node.refuse("the replay does not know this node type")
    op, outs = OPS[node.kind], writes(node)
    if not outs:
        raise node.refuse("no output")
    if unknown := set(node.fields) - set(op.fields) - {"out", "outs"}:
        raise node.refuse(f"the replay does not know the fields {sorted(unknown)}")
    arguments, slots = [], []
    for place, name in enumerate(op.fields):
        value = node.fields[name]
        if value is None and name not in op.optional and name not in DTYPE_FIELDS:
            raise node.refuse(f"no {name}")
        if isinstance(value, list) and None in value:
            raise node.refuse(f"a gap in {name}")
        if name in DTYPE_FIELDS and (value is not None or name not in op.optional):
            value = _dtype(value, node.where)
        if isinstance(value, Tid | Vid) or (isinstance(value, list) and any(isinstance(v, Tid | Vid) for v in value)):
            slots.append((place, value))
        arguments.append(value)
    return _Step(node, op, arguments, slots, outs)


def _dtype(scalar_type: object, where: str) -> mx.Dtype:
    if scalar_type not in DTYPES:
        raise ValueError(f"{where}: dtype {short(scalar_type)} is not one of MLX's")
    return DTYPES[scalar_type]


def _nbytes(dtype: mx.Dtype, shape: Sequence[int]) -> int:
    return math.prod(shape) * dtype.size
