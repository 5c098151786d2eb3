"""The MLX delegate's payload as plain data. Every index is checked here, so that what runs it need not."""

import importlib
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from gemma4_impl.errors import short
from gemma4_impl.export.mlx.bindings import BACKEND, import_mlx_backend

HEADER = struct.Struct("<4x4sQQ")
MAGIC = b"MLX0"
MAX_STEPS = 200_000
"""Instructions that one run may take, both branches of every If counted; a program of 60 layers has about 4,000."""
MAX_DEPTH = 64
SPACES = ("constant", "input", "output", "mutable buffer", "temporary")
"""What a tensor slot can be; the slots of a graph are numbered in this order."""


@dataclass(frozen=True, slots=True)
class Tid:
    """Refers to a tensor slot."""

    index: int


@dataclass(frozen=True, slots=True)
class Vid:
    """Refers to a value slot: an integer that is known only when the program runs."""

    index: int


Field = Tid | Vid | int | float | str | None | list
"""A node's field; a list holds Tid, Vid, int or str. None: an optional field that is absent."""


@dataclass(frozen=True)
class Node:
    """One instruction: the schema's name of its type, and its fields by the schema's names."""

    kind: str
    fields: dict[str, Field]
    number: int
    """Its place in its chain."""
    where: str
    """How messages name it: `instruction 3 (AddNode)`."""

    def refuse(self, reason: object) -> ValueError:
        return ValueError(f"{self.where}: {reason}")


@dataclass(frozen=True)
class Meta:
    """What a slot that is no temporary holds."""

    scalar_type: int
    shape: tuple[tuple[int, int | None], ...]
    """Least and greatest size of each dimension; None: unbounded."""


@dataclass(frozen=True)
class Graph:
    """A delegate's program."""

    counts: dict[str, int]
    """Tensor slots of each of `SPACES`."""
    values: int
    chains: list[list[Node]]
    main: int
    init: int | None
    inputs: list[Tid]
    outputs: list[Tid]
    names: dict[int, str]
    """Constant slot -> key of its data."""
    metas: dict[int, Meta]
    """Of constants, inputs and mutable buffers."""

    def slots(self, space: str) -> range:
        start = sum(self.counts[other] for other in SPACES[: SPACES.index(space)])
        return range(start, start + self.counts[space])

    @property
    def tensors(self) -> int:
        return sum(self.counts.values())


def parse(payload: bytes) -> Graph:
    """Raises ValueError for anything that is not a well-formed program, naming the instruction where there is one."""
    if len(payload) < HEADER.size:
        raise ValueError(f"MLX payload of {len(payload)} bytes: too short for its header")
    magic, end, size = HEADER.unpack_from(payload)
    if magic != MAGIC:
        raise ValueError(f"MLX payload begins with {short(magic)}, not {MAGIC!r}")
    if not HEADER.size < end <= len(payload) or size:
        raise ValueError(f"MLX payload: program up to byte {end} and {size} bytes of data, in {len(payload)} bytes")
    _bindings()
    reader = _Reader(bytes(payload[HEADER.size : end]))
    try:
        graph = reader.graph()
    except (struct.error, ArithmeticError, AttributeError, LookupError, TypeError) as error:
        # What the generated accessors raise for offsets out of range and for tables that are absent.
        raise ValueError(f"{reader.where}: malformed MLX payload ({type(error).__name__})") from error
    _check(graph)
    return graph


class _Reader:
    """Reads the generated bindings' tables. Vectors that are read several times over, which only a hostile file has,
    are bounded by a budget of items."""

    def __init__(self, data: bytes):
        self.data, self.budget, self.where = data, 4 * len(data), "MLX payload"

    def graph(self) -> Graph:
        root = _table("MLXGraph").GetRootAs(self.data, 0)
        numbers = (
            root.NumConstantTensors(),
            root.NumInputTensors(),
            root.NumOutputTensors(),
            root.NumMutableBufferTensors(),
            root.NumTempTensors(),
        )
        counts = dict(zip(SPACES, numbers, strict=True))
        self.tensors, self.values = sum(numbers), root.NumValues()
        self.spend(self.tensors + self.values)
        chains = [
            [self.node(chain.Instructions(i), index, i) for i in self.count(chain.InstructionsLength())]
            for index, chain in enumerate(self.items(root.InstructionChains, root.InstructionChainsLength()))
        ]
        self.where = "MLX payload"
        main, init = root.MainChainIdx(), root.InitChainIdx()
        if main >= len(chains) or not -1 <= init < len(chains) or init == main:
            raise ValueError(f"MLX payload: main chain {main} and init chain {init} of {len(chains)} chains")
        graph = Graph(
            counts=counts,
            values=self.values,
            chains=chains,
            main=main,
            init=None if init == -1 else init,
            inputs=[self.tensor_slot(s) for s in self.items(root.InputMap, root.InputMapLength())],
            outputs=[self.tensor_slot(s) for s in self.items(root.OutputMap, root.OutputMapLength())],
            names={},
            metas={},
        )
        for slot in self.items(root.NamedSlots, root.NamedSlotsLength()):
            if slot.Slot().SlotType() == 0 and (index := self.tid(slot.Slot()).index) in graph.slots("constant"):
                graph.names[index] = self.string(slot.Name())
        if missing := [i for i in graph.slots("constant") if i not in graph.names]:
            raise ValueError(f"MLX payload: constants without a name: slots {short(missing)}")
        for space in ("constant", "input", "mutable buffer"):
            for index in graph.slots(space):
                self.where = f"MLX payload, {space} in slot {index}"
                if index >= root.TensorMetaLength():
                    raise ValueError(f"{self.where}: no metadata")
                graph.metas[index] = meta = self.meta(root.TensorMeta(index))
                if space != "input" and any(low != high for low, high in meta.shape):
                    raise ValueError(f"{self.where}: its shape is not fixed")
        return graph

    def meta(self, table: Any) -> Meta:
        shape = []
        for dim in self.items(table.Shape, table.ShapeLength()):
            value, low, high = dim.Value(), dim.MinValue(), dim.MaxValue()
            if value < -1 or low < 0 or high < -1:
                raise ValueError(f"{self.where}: dimension {value}, from {low} to {high}")
            shape.append((value, value) if value >= 0 else (low, None if high == -1 else high))
        order = self.items(table.DimOrder, table.DimOrderLength())
        if order and order != list(range(len(shape))):
            raise ValueError(f"{self.where}: dimension order {short(order)}, not contiguous")
        return Meta(table.ScalarType(), tuple(shape))

    def tensor_slot(self, slot: Any) -> Tid:
        if slot.SlotType() != 0:
            raise ValueError("MLX payload: an input or output that is not a tensor")
        return self.tid(slot)

    def node(self, instruction: Any, chain: int, index: int) -> Node:
        self.where = f"instruction {index}" + (f" of chain {chain}" if chain else "")
        names, fields = _bindings()
        kind = names.get(instruction.OpType())
        if kind is None or kind not in fields:
            raise ValueError(f"{self.where}: unknown node type {instruction.OpType()}")
        self.where += f" ({kind})"
        union = instruction.Op()
        table = _table(kind)()
        table.Init(union.Bytes, union.Pos)
        return Node(kind, {n: self.field(table, get, type_) for n, get, type_ in fields[kind]}, index, self.where)

    def field(self, table: Any, accessor: str, kind: str) -> Field:
        get = getattr(table, accessor)
        if kind == "scalar":
            return get()
        if kind.endswith("_list"):
            read: Callable[[Any], Field] = {
                "int_list": int,
                "tid_list": self.tid,
                "string_list": self.string,
                "int_or_vid_list": self.int_or_vid,
            }[kind]
            return [read(item) for item in self.items(get, getattr(table, f"{accessor}Length")())]
        value = get()
        if value is None:
            return None
        return {
            "tid": self.tid,
            "vid": self.vid,
            "string": self.string,
            "int_or_vid": self.int_or_vid,
            "float_or_vid": self.int_or_vid,
            "vid_or_tid": lambda v: self.vid(v.Vid()) if v.IsVid() else self.tid(v.Tid()),
            "int_or_vid_or_tid": self.int_or_vid_or_tid,
        }[kind](value)

    def int_or_vid(self, item: Any) -> Vid | int | float:
        return self.vid(item.Vid()) if item.IsVid() else item.Literal()

    def int_or_vid_or_tid(self, item: Any) -> Field:
        reads = (item.Literal, lambda: self.vid(item.Vid()), lambda: self.tid(item.Tid()))
        return reads[item.Kind()]()

    def tid(self, item: Any) -> Tid:
        if item.Idx() >= self.tensors:
            raise ValueError(f"{self.where}: tensor slot {item.Idx()} of {self.tensors}")
        return Tid(item.Idx())

    def vid(self, item: Any) -> Vid:
        if item.Idx() >= self.values:
            raise ValueError(f"{self.where}: value slot {item.Idx()} of {self.values}")
        return Vid(item.Idx())

    def string(self, raw: bytes) -> str:
        self.spend(len(raw))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{self.where}: {short(raw)} is not UTF-8") from None

    def items(self, get: Callable[[int], Any], length: int) -> list:
        return [get(i) for i in self.count(length)]

    def count(self, length: int) -> range:
        self.spend(length)
        return range(length)

    def spend(self, items: int) -> None:
        self.budget -= items
        if self.budget < 0:
            raise ValueError(f"{self.where}: more items than {len(self.data)} bytes can hold")


def _check(graph: Graph) -> None:
    """That runs end, and read only what was written before."""
    steps = [0] * len(graph.chains)
    depth = [0] * len(graph.chains)
    for index in reversed(range(len(graph.chains))):
        for node in graph.chains[index]:
            steps[index] += 1
            for branch in branches(node):
                # The exporter numbers a chain after the one that calls it: a cycle cannot be written that way.
                if not index < branch < len(graph.chains):
                    raise node.refuse(f"branches to chain {branch}, from chain {index} of {len(graph.chains)}")
                steps[index] += steps[branch]
                depth[index] = max(depth[index], depth[branch] + 1)
        if steps[index] > MAX_STEPS or depth[index] > MAX_DEPTH:
            raise ValueError(f"MLX payload: chain {index} may run {steps[index]} instructions, {depth[index]} deep")
    constants = set(graph.slots("constant"))
    if graph.init is not None:
        _flow(graph, graph.init, constants, set())
    given = constants | {tid.index for tid in graph.inputs} | set(graph.slots("mutable buffer"))
    written = _flow(graph, graph.main, given, constants)
    if lost := [tid.index for tid in graph.outputs if tid.index not in written]:
        raise ValueError(f"MLX payload: nothing writes the output in slot {lost[0]}")


def _flow(graph: Graph, chain: int, given: set[int], fixed: set[int]) -> set[int]:
    """Tensor slots that hold something after a chain that began with `given` (values: the same, negative)."""
    have = set(given)
    for node in graph.chains[chain]:
        read, write = reads(node), writes(node)
        for item in read:
            if _key(item) not in have:
                raise node.refuse(f"reads {short(item)}, which nothing has written")
        if ends := [_flow(graph, branch, have, fixed) for branch in branches(node)]:
            have = set.intersection(*ends)
        for item in write:
            if isinstance(item, Tid) and item.index in fixed:
                raise node.refuse(f"writes the constant in slot {item.index}")
            have.add(_key(item))
    return have


def _key(item: Tid | Vid) -> int:
    return item.index if isinstance(item, Tid) else -1 - item.index


def writes(node: Node) -> list[Tid | Vid]:
    """The slots that a node fills."""
    out = [node.fields.get("out"), *(node.fields.get("outs") or [])]
    return [item for item in out if item is not None]


def reads(node: Node) -> list[Tid | Vid]:
    """The slots that a node's fields refer to, but for those that it fills."""
    found: list = []
    for name, value in node.fields.items():
        if name not in ("out", "outs"):
            found += value if isinstance(value, list) else [value]
    return [item for item in found if isinstance(item, Tid | Vid)]


def branches(node: Node) -> Sequence[int]:
    """The chains that an If may run."""
    return [node.fields[name] for name in ("then_chain_idx", "else_chain_idx")] if node.kind == "IfNode" else ()


@cache
def _bindings() -> tuple[dict[int, str], dict[str, list[tuple[str, str, str]]]]:
    """Union tag -> node type, and node type -> (field, accessor, kind of field)."""
    import_mlx_backend()
    names = importlib.import_module(f"{BACKEND}.serialization._generated_serializers").MLX_OP_TYPE_NAMES
    return names, importlib.import_module(f"{BACKEND}._generated_inspector").OP_NODE_FIELDS


@cache
def _table(name: str) -> type:
    return getattr(importlib.import_module(f"{BACKEND}.serialization._generated.mlx_delegate.{name}"), name)
