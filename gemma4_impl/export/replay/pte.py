"""What the replay needs of a program file: each method's call of its MLX delegate, and the delegates' constants, which
stay in the mapped file."""

import mmap
from dataclasses import dataclass
from pathlib import Path

from gemma4_impl.errors import one_line, plain, short
from gemma4_impl.export.flatbuffer import Table
from gemma4_impl.export.inspect import Program, constant, item

DELEGATE = "MLXBackend"
_DELEGATE_CALL = 2
Constant = bool | int | float | str | list | None


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
    """Methods that only return something: a number, a string, or a list of those."""
    others: dict[str, str]
    """Methods that are neither, and why."""
    data: dict[str, memoryview]
    """Bytes of the delegates' constants."""

    def call(self, method: str) -> Call:
        """Raises ValueError if there is no such method, or it is not an MLX delegate's alone."""
        if method in self.calls:
            return self.calls[method]
        there = ", ".join(plain(name) for name in [*self.calls, *self.others, *self.constants])
        raise ValueError(
            f"method {short(method)}: {self.others.get(method) or f'not in the program, which has {there}'}"
        )


def open_pte(path: str | Path) -> Pte:
    """Raises OSError if the file cannot be read, ValueError if it is no complete ExecuTorch program."""
    with open(path, "rb") as file:
        try:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise ValueError(f"{path}: empty, no ExecuTorch program") from None
    try:
        return parse_pte(mapped)
    except ValueError as error:
        raise ValueError(f"{path}: {one_line(error)}") from error


def parse_pte(data: bytes | mmap.mmap) -> Pte:
    """The same of the file's bytes."""
    program = Program(memoryview(data))
    calls: dict[str, Call] = {}
    constants: dict[str, Constant] = {}
    others: dict[str, str] = {}
    for plan in program.plans:
        name = plan.text(0)
        if name in calls or name in constants or name in others:
            raise ValueError(f"damaged: method {short(name)} twice")
        instructions = [instruction for chain in plan.tables(5) for instruction in chain.tables(2)]
        backends = [delegate.text(0) for delegate in plan.tables(7)]
        if not instructions and not backends:
            constants[name] = constant(plan)
        elif backends != [DELEGATE]:
            others[name] = f"run by {short(backends) if backends else 'no delegate'}, not by one {DELEGATE}"
        elif [instruction.number(0, "B") for instruction in instructions] != [_DELEGATE_CALL]:
            others[name] = f"{len(instructions)} instructions, not one call of {DELEGATE}"
        else:
            calls[name] = _call(program, plan, instructions[0])
    return Pte(calls, constants, others, {t.text(0): program.segment(t.number(1, "I")) for t in program.root.tables(7)})


def _call(program: Program, plan: Table, instruction: Table) -> Call:
    call = instruction.table(1)
    payload = bytes(program.payload_of(item(plan.tables(7), call)))
    arguments, inputs, outputs = call.numbers(1, "i"), plan.numbers(3, "i"), plan.numbers(4, "i")
    for values in (arguments, inputs, outputs):
        if any(not 0 <= value < plan.length(2) for value in values):
            raise ValueError(f"damaged: values {short(values)} of {plan.length(2)}")
    return Call(payload, arguments, inputs, outputs)
