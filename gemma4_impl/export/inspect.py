"""What is in a program file: its methods, what their delegates run and what is left outside, and its sizes."""

import mmap
import struct
from collections import Counter
from pathlib import Path
from typing import Any

from gemma4_impl.errors import one_line, short
from gemma4_impl.export.flatbuffer import Buffer, Table

_IDENTIFIER, _EXTENDED = b"ET12", b"eh00"
_HEAD = struct.Struct("<4s4s4sIQQ")
_KERNEL, _DELEGATE = 1, 2
_SEGMENT = 1
_SCALARS, _TENSOR, _STRING = {2: "q", 3: "?", 4: "d"}, 5, 6
"""Kinds of values; those of numbers with the format of their only field."""
_DTYPES = {
    0: "uint8",
    1: "int8",
    2: "int16",
    3: "int32",
    4: "int64",
    5: "float16",
    6: "float32",
    7: "float64",
    11: "bool",
    15: "bfloat16",
}


def inspect(path: str | Path) -> dict[str, Any]:
    """What is in the .pte file `path`, JSON-ready. A node is an operation inside a delegate, or a call of a kernel
    outside; `None` where a delegate does not tell how many it has.

    Raises FileNotFoundError, and ValueError for a file that is no complete program."""
    path = Path(path)
    with path.open("rb") as file:
        try:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise ValueError(f"{path}: empty, no ExecuTorch program") from None
    try:
        return {"file": str(path)} | Program(memoryview(data)).describe()
    except ValueError as error:
        raise ValueError(f"{path}: {one_line(error)}") from None


class Program:
    """The tables of ExecuTorch's program.fbs, by the numbers of their fields."""

    def __init__(self, data: memoryview):
        self.data, self.base, self.size = data, 0, len(data)
        if len(data) < _HEAD.size:
            raise ValueError(f"{len(data)} bytes are no ExecuTorch program")
        _, identifier, magic, _, size, base = _HEAD.unpack_from(data)
        if identifier != _IDENTIFIER:
            raise ValueError(f"no ExecuTorch program: {short(identifier)} where {_IDENTIFIER!r} should be")
        if magic == _EXTENDED:
            if max(size, base) > len(data):
                raise ValueError(f"truncated: {len(data)} bytes of at least {max(size, base)}")
            self.base, self.size = base, size
        self.root = Buffer(data[: self.size]).root()
        self.plans = self.root.tables(1)
        self.segments = [(t.number(0, "Q"), t.number(1, "Q")) for t in self.root.tables(4)]
        for index in range(len(self.segments)):
            self.segment(index)

    def describe(self) -> dict[str, Any]:
        methods: dict[str, Any] = {}
        constants: dict[str, Any] = {}
        for plan in self.plans:
            name = plan.text(0)
            if plan.length(3) or any(chain.length(2) for chain in plan.tables(5)):
                methods[name] = self._method(plan)
            else:
                constants[name] = constant(plan)
        return {"bytes": self._sizes(), "methods": methods, "constants": constants}

    def segment(self, index: int) -> memoryview:
        if index >= len(self.segments):
            raise ValueError(f"damaged: segment {index} of {len(self.segments)}")
        offset, size = self.segments[index]
        if (end := self.base + offset + size) > len(self.data):
            raise ValueError(f"truncated: segment {index} ends at byte {end} of {len(self.data)}")
        return self.data[self.base + offset : end]

    def _sizes(self) -> dict[str, int]:
        """Bytes of the file and of its parts; a segment that several use counts once."""
        constant, places = self.root.table(5), [where for p in self.plans for where in map(_processed, p.tables(7))]
        used = {
            "constants": {constant.number(0, "I")} if constant is not None and constant.length(1) else set(),
            "delegates": {index for location, index in places if location == _SEGMENT},
            "delegates' constants": {t.number(1, "I") for t in self.root.tables(7)},
        }
        parts = {name: sum(len(self.segment(i)) for i in indices) for name, indices in used.items()}
        return {"file": len(self.data), "program": self.size, **parts}

    def _method(self, plan: Table) -> dict[str, Any]:
        operators = [_joined(t.text(0), t.text(1)) for t in plan.tables(6)]
        delegates = plan.tables(7)
        kernels: Counter[str] = Counter()
        parts: dict[str, dict[str, Any]] = {}
        for instruction in (i for chain in plan.tables(5) for i in chain.tables(2)):
            kind, call = instruction.number(0, "B"), instruction.table(1)
            if kind == _KERNEL:
                kernels[item(operators, call)] += 1
            elif kind == _DELEGATE:
                delegate = item(delegates, call)
                backend, payload = delegate.text(0), self.payload_of(delegate)
                part = parts.setdefault(backend, {"calls": 0, "nodes": 0, "bytes": 0})
                nodes = count_nodes(backend, payload)
                part["calls"] += 1
                part["nodes"] = None if nodes is None or part["nodes"] is None else part["nodes"] + nodes
                part["bytes"] += len(payload)
        values = plan.tables(2)
        return {
            "inputs": [_tensor(values, i) for i in plan.numbers(3, "i")],
            "outputs": [_tensor(values, i) for i in plan.numbers(4, "i")],
            "planned_bytes": sum(plan.numbers(8, "q")),
            "delegates": parts,
            "nodes_outside": kernels.total(),
            "operators": dict(kernels),
            "share_delegated": _share([part["nodes"] for part in parts.values()], kernels.total()),
        }

    def payload_of(self, delegate: Table) -> memoryview:
        location, index = _processed(delegate)
        if location == _SEGMENT:
            return self.segment(index)
        return _at(self.root.tables(3), index).bytes(0)


def count_nodes(backend: str, payload: bytes | memoryview) -> int | None:
    """How many operations the payload of an XNNPACK or MLX delegate has; None for others, which do not say."""
    if backend == "XnnpackBackend":
        start = int.from_bytes(payload[10:14], "little") if payload[4:8] == b"XH00" else 0
        return Buffer(payload).root(start).length(1)
    if backend == "MLXBackend" and payload[4:8] == b"MLX0":
        return sum(chain.length(0) for chain in Buffer(payload).root(24).tables(7))
    return None


def _share(inside: list[int | None], outside: int) -> float | None:
    if None in inside:
        return None if outside else 1.0
    return sum(inside) / max(1, sum(inside) + outside)


def _processed(delegate: Table) -> tuple[int, int]:
    where = delegate.table(1)
    return (0, 0) if where is None else (where.number(0, "b"), where.number(1, "I"))


def item(items: list, call: Table | None) -> Any:
    """What a call of a kernel or a delegate refers to. Raises ValueError for what is not there."""
    return _at(items, -1 if call is None else call.number(0, "i"))


def _at(items: list, index: int) -> Any:
    if not 0 <= index < len(items):
        raise ValueError(f"damaged: item {index} of {len(items)}")
    return items[index]


def _joined(name: str, overload: str) -> str:
    return f"{name}.{overload}" if overload else name


def _tensor(values: list[Table], index: int) -> dict[str, Any]:
    value = _at(values, index)
    tensor = value.table(1)
    if value.number(0, "B") != _TENSOR or tensor is None:
        return {"kind": value.number(0, "B")}
    dtype = tensor.number(0, "b")
    return {
        "dtype": _DTYPES.get(dtype, f"scalar type {dtype}"),
        "shape": tensor.numbers(2, "i"),
        "dynamic": tensor.number(8, "b") != 0,
    }


def constant(plan: Table) -> Any:
    """What a method without instructions returns: a number or text, or a list of those; None for anything else."""
    values = plan.tables(2)
    out = [_scalar(_at(values, i)) for i in plan.numbers(4, "i")]
    return out[0] if len(out) == 1 else out


def _scalar(value: Table) -> Any:
    kind, held = value.number(0, "B"), value.table(1)
    if held is None:
        return None
    if kind in _SCALARS:
        return held.number(0, _SCALARS[kind])
    return held.text(0) if kind == _STRING else None
