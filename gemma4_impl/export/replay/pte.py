"""Reads an ExecuTorch program file: its methods, the payload of each one's delegate, its constants. Maps it, copies
nothing but the program itself."""

import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from gemma4_impl.errors import plain, short

IDENTIFIER = b"ET12"
EXTENDED = struct.Struct("<4sIQQ")
EXTENDED_AT, EXTENDED_MAGIC = 8, b"eh00"
DELEGATE = "MLXBackend"
_SERIALIZE = "executorch.exir._serialize"

Constant = bool | int | float | str | list


@dataclass(frozen=True)
class Call:
    """A method that is one call of one MLX delegate."""

    payload: bytes
    arguments: list[int]
    """Values of the method that the delegate takes, in its own order, and then those that it gives."""
    inputs: list[int]
    outputs: list[int]
    """Values that the method takes and gives."""


@dataclass(frozen=True)
class Pte:
    """An open program file."""

    calls: dict[str, Call]
    """Methods that an MLX delegate runs."""
    constants: dict[str, Constant]
    """Methods that only return something: a number, a string, or a list of numbers."""
    others: dict[str, str]
    """Methods that are neither, and why."""
    data: dict[str, memoryview]
    """Bytes of the delegates' constants, in the mapped file."""

    def call(self, method: str) -> Call:
        """Raises ValueError if there is no such method, or it is not an MLX delegate's alone."""
        if method in self.calls:
            return self.calls[method]
        there = ", ".join(plain(name) for name in [*self.calls, *self.others, *self.constants])
        raise ValueError(
            f"method {short(method)}: {self.others.get(method) or f'not in the program, which has {there}'}"
        )


def open_pte(path: str | Path) -> Pte:
    """Raises OSError if the file cannot be read, ValueError if it is not an ExecuTorch program."""
    with open(path, "rb") as file:
        try:
            mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except ValueError:
            raise ValueError(f"{path}: empty, not an ExecuTorch program") from None
    try:
        return parse_pte(mapped)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error.__cause__


def parse_pte(data: memoryview) -> Pte:
    """The bytes of a program file; see `open_pte`."""
    if bytes(data[4:8]) != IDENTIFIER:
        raise ValueError(f"not an ExecuTorch program: {short(bytes(data[4:8]))} where {IDENTIFIER!r} should be")
    size, segments = len(data), 0
    if bytes(data[EXTENDED_AT : EXTENDED_AT + 4]) == EXTENDED_MAGIC and len(data) >= EXTENDED_AT + EXTENDED.size:
        _, _, size, segments = EXTENDED.unpack_from(data, EXTENDED_AT)
        if not size <= len(data) or segments > len(data):
            raise ValueError(f"truncated: program of {size} bytes, segments from {segments}, in {len(data)} bytes")
    try:
        return _Reader(data, bytes(data[:size]), segments).pte()
    except (struct.error, ArithmeticError, AttributeError, LookupError, TypeError, UnicodeDecodeError) as error:
        # What the generated accessors raise for offsets out of range and for tables that are absent.
        raise ValueError(f"malformed ExecuTorch program ({type(error).__name__})") from error


class _Reader:
    def __init__(self, data: memoryview, program: bytes, segments: int):
        self.data, self.base = data, segments
        # Vectors read several times over, which only a hostile file has, are bounded by this many items.
        self.budget = 4 * len(program)
        self.root = _table("Program").GetRootAs(program, 0)

    def pte(self) -> Pte:
        calls: dict[str, Call] = {}
        constants: dict[str, Constant] = {}
        others: dict[str, str] = {}
        for plan in self.items(self.root.ExecutionPlan, self.root.ExecutionPlanLength()):
            name = self.string(plan.Name())
            if name in calls or name in constants or name in others:
                raise ValueError(f"method {short(name)} twice")
            instructions = [
                instruction
                for chain in self.items(plan.Chains, plan.ChainsLength())
                for instruction in self.items(chain.Instructions, chain.InstructionsLength())
            ]
            backends = [self.string(d.Id()) for d in self.items(plan.Delegates, plan.DelegatesLength())]
            if not instructions and not backends and plan.InputsLength() == 0:
                constants[name] = self.constant(plan)
            elif backends != [DELEGATE]:
                others[name] = f"run by {short(backends) if backends else 'no delegate'}, not by one {DELEGATE}"
            elif len(instructions) != 1 or instructions[0].InstrArgsType() != _union(
                "InstructionArguments.DelegateCall"
            ):
                others[name] = f"{len(instructions)} instructions, not one call of {DELEGATE}"
            else:
                calls[name] = self.call(plan, instructions[0])
        named = self.items(self.root.NamedData, self.root.NamedDataLength())
        data = {self.string(item.Key()): self.segment(item.SegmentIndex()) for item in named}
        return Pte(calls, constants, others, data)

    def call(self, plan: Any, instruction: Any) -> Call:
        call = _table("DelegateCall")()
        call.Init(instruction.InstrArgs().Bytes, instruction.InstrArgs().Pos)
        arguments = self.items(call.Args, call.ArgsLength())
        inputs = self.items(plan.Inputs, plan.InputsLength())
        outputs = self.items(plan.Outputs, plan.OutputsLength())
        if call.DelegateIndex() != 0:
            raise ValueError(f"call of delegate {call.DelegateIndex()} of 1")
        for values in (arguments, inputs, outputs):
            if any(not 0 <= value < plan.ValuesLength() for value in values):
                raise ValueError(f"values {short(values)} of {plan.ValuesLength()}")
        where = plan.Delegates(0).Processed()
        if where.Location() == 1:
            return Call(bytes(self.segment(where.Index())), arguments, inputs, outputs)
        if not 0 <= where.Index() < self.root.BackendDelegateDataLength():
            raise ValueError(f"delegate's data {where.Index()} of {self.root.BackendDelegateDataLength()}")
        inline = self.root.BackendDelegateData(where.Index())
        offset = inline._tab.Offset(4)
        start, length = inline._tab.Vector(offset), inline._tab.VectorLen(offset)
        self.spend(length)
        if not offset or start + length > len(inline._tab.Bytes):
            raise ValueError(f"delegate's data of {length} bytes is not in the file")
        return Call(bytes(inline._tab.Bytes[start : start + length]), arguments, inputs, outputs)

    def constant(self, plan: Any) -> Constant:
        out = [self.value(plan.Values(i)) for i in self.items(plan.Outputs, plan.OutputsLength())]
        return out[0] if len(out) == 1 else out

    def value(self, item: Any) -> Constant:
        kind, union = item.ValType(), item.Val()
        for name, get in (("Int", "IntVal"), ("Double", "DoubleVal"), ("Bool", "BoolVal"), ("String", "StringVal")):
            if kind == _union(f"KernelTypes.{name}"):
                table = _table(name)()
                table.Init(union.Bytes, union.Pos)
                value = getattr(table, get)()
                return self.string(value) if name == "String" else value
        raise ValueError(f"a constant of kind {kind}, which is not a number or a string")

    def segment(self, index: int) -> memoryview:
        if index >= self.root.SegmentsLength():
            raise ValueError(f"segment {index} of {self.root.SegmentsLength()}")
        segment = self.root.Segments(index)
        start = self.base + segment.Offset()
        if not self.base or start + segment.Size() > len(self.data):
            raise ValueError(f"truncated: segment {index} ends at byte {start + segment.Size()} of {len(self.data)}")
        return self.data[start : start + segment.Size()]

    def string(self, raw: bytes) -> str:
        self.spend(len(raw))
        return raw.decode("utf-8")

    def items(self, get: Callable[[int], Any], length: int) -> list:
        self.spend(length)
        return [get(i) for i in range(length)]

    def spend(self, items: int) -> None:
        self.budget -= items
        if self.budget < 0:
            raise ValueError("malformed ExecuTorch program: more items than its bytes can hold")


@cache
def _table(name: str) -> type:
    # The generated modules take each other for classes, until this has run.
    import_module(f"{_SERIALIZE}._flatbuffer_program")._patch_generated_flatbuffer_aliases()
    return getattr(import_module(f"{_SERIALIZE}.generated.executorch_flatbuffer.{name}"), name)


def _union(member: str) -> int:
    union, name = member.split(".")
    return getattr(_table(union), name)
