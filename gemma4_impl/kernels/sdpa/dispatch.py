"""Chooses who computes attention, by the times measured on the device at hand, and says why."""

import functools
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma4_impl.kernels.sdpa import operators
from gemma4_impl.kernels.sdpa.backends import BACKENDS, Call, Case
from gemma4_impl.kernels.sdpa.naive import check

TABLES = Path(__file__).with_name("tables")
_UNMEASURED = {
    "prefill": ("cuda", "flash", "cudnn", "triton", "efficient", "math", "torch"),
    "decode": ("cuda", "triton", "flash", "cudnn", "efficient", "math", "torch"),
}


@dataclass(frozen=True)
class Choice:
    """Which backend computes a case, and why."""

    backend: str
    reason: str
    times: Mapping[str, float] = field(default_factory=dict)
    """Milliseconds of each backend that was measured on the nearest measured case."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Why the others cannot compute it."""

    def __str__(self) -> str:
        times = ", ".join(f"{name} {ms:.4g} ms" for name, ms in sorted(self.times.items(), key=lambda item: item[1]))
        lines = [f"{self.backend}: {self.reason}", *([f"measured: {times}"] if times else [])]
        return "\n".join([*lines, *(f"not {name}: {why}" for name, why in self.refused.items())])


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_positions: Tensor | None = None,
    k_positions: Tensor | None = None,
    *,
    length: Tensor | None = None,
    ends: Tensor | None = None,
    window: int | None = None,
    scale: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """`naive.sdpa` by the fastest backend. q [B, N, T, H], k and v [B, K, S, H] -> [B, N, T, H].

    Args:
        q_positions, k_positions: int64 [B, T] and [B, S]. What is absent is known: the queries are the last T of the
            tokens so far, and position p is in slot p % S of the keys.
        length: int32 [B], tokens so far, on the device; S by default. Not with `q_positions`.
        ends: int64 [B, T], the last position that each query sees.
        backend: one of `BACKENDS`, by default $GEMMA4_SDPA or the fastest.
    Compiled and exported, it is an operator of operators.py. Raises ValueError for shapes that do not match, and for a
    backend that cannot compute the case."""
    check(q, k, v, q_positions, k_positions, ends)
    call = Call(q, k, v, q_positions, k_positions, length, ends, window, scale)
    if torch.compiler.is_compiling():
        return _operator(call)
    return BACKENDS[choose(_checked(call).case, backend or os.environ.get("GEMMA4_SDPA")).backend].run(call)


def explain(q: Tensor, k: Tensor, v: Tensor, *args: Tensor | None, backend: str | None = None, **kwargs: Any) -> Choice:
    """What `sdpa` with these arguments chooses, and why."""
    positions = dict(zip(("q_positions", "k_positions"), args, strict=False))
    rest = {"q_positions": None, "k_positions": None, "length": None, "ends": None, "window": None, "scale": 1.0}
    call = Call(q, k, v, **(rest | positions | kwargs))
    return choose(_checked(call).case, backend or os.environ.get("GEMMA4_SDPA"))


@functools.lru_cache(maxsize=4096)
def choose(case: Case, forced: str | None = None) -> Choice:
    """The fastest backend for `case`, or `forced`. Raises ValueError if that one is unknown or cannot compute it."""
    refused = {name: why for name, b in BACKENDS.items() if (why := b.refuses(case)) is not None}
    if forced is not None:
        if forced not in BACKENDS:
            raise ValueError(f"backend {forced!r} is none of {', '.join(BACKENDS)}")
        if forced in refused:
            raise ValueError(f"backend {forced!r} cannot compute this: {refused[forced]}")
        return Choice(forced, "it was asked for", {}, refused)
    able = [name for name in BACKENDS if name not in refused]
    name, capability = _device(case.device)
    measured_on, rows = _table(name, capability)
    row = _nearest(case, rows)
    times = {name: ms for name, ms in (row["ms"] if row else {}).items() if name in able}
    if not times:
        first = next(name for name in _UNMEASURED[case.op] if name in able)
        return Choice(first, f"nothing like it was measured on {name}; it is the usual choice", {}, refused)
    best = min(times, key=times.__getitem__)
    shape = ", ".join(f"{letter}={row[letter]}" for letter in ("B", "N", "K", "H", "T", "S"))
    window = "" if row["window"] is None else f", window {row['window']}"
    where = "" if measured_on == name else f" on {measured_on}, of the same compute capability"
    return Choice(best, f"the fastest at {row['op']} {row['mask']}, {shape}{window}{where}", times, refused)


def _checked(call: Call) -> Call:
    B = call.q.shape[0]
    if call.length is not None:
        if call.length.shape != (B,) or call.length.dtype != torch.int32:
            got = f"{tuple(call.length.shape)} {call.length.dtype}"
            raise ValueError(f"length must be int32 of shape {(B,)}, got {got}")
        if call.q_positions is not None:
            raise ValueError("length and q_positions both say where the queries are; give one")
    elif call.q_positions is None and call.q.shape[2] > call.k.shape[2]:
        raise ValueError(f"{call.q.shape[2]} queries cannot be the last of {call.k.shape[2]} keys; give q_positions")
    if call.window is not None and call.window < 1:
        raise ValueError(f"window = {call.window}: must be at least 1")
    if not call.scale > 0:
        raise ValueError(f"scale = {call.scale}: must be positive")
    return call


def _operator(call: Call) -> Tensor:
    rest = (call.window, call.scale)
    if call.length is not None and call.ends is None:
        return operators.sdpa_decode(call.q, call.k, call.v, call.length, call.k_positions, *rest)
    at, keys = (call.q_positions, call.k_positions) if call.length is None else call.positions()
    return operators.sdpa_prefill(call.q, call.k, call.v, at, keys, call.ends, *rest)


def _nearest(case: Case, rows: list[dict]) -> dict | None:
    """The measured row of the same operation, head dim, dtype and kind of mask that is nearest in its sizes."""
    masks = {
        "causal": ("causal", "length"),
        "length": ("length", "positions"),
        "ends": ("ends", "positions"),
    }.get(case.mask, (case.mask,))
    for mask in masks:
        alike = [
            row
            for row in rows
            if (row["op"], row["H"], row["mask"], row["dtype"]) == (case.op, case.H, mask, str(case.dtype)[6:])
            and (row["window"] is None) == (case.window is None)
        ]
        if alike:
            return min(alike, key=lambda row: _distance(case, row))
    return None


def _distance(case: Case, row: dict) -> float:
    """How many doublings away a row is, a size counting the more the more it decides."""
    pairs = [
        (case.T, row["T"], 2.0),
        (min(case.S, case.window or case.S), min(row["S"], row["window"] or row["S"]), 1.0),
        (case.S, row["S"], 0.25),
        (case.B * case.K, row["B"] * row["K"], 0.5),
        (case.N // case.K, row["N"] // row["K"], 0.5),
    ]
    return sum(weight * abs(math.log2(max(1, a) / b)) for a, b, weight in pairs)


@functools.cache
def _table(name: str, capability: tuple[int, ...] | None) -> tuple[str, list[dict]]:
    """Device and rows of the table measured on a device of this name, or else of this compute capability: of those
    beside this module, or of $GEMMA4_SDPA_TABLE."""
    chosen = os.environ.get("GEMMA4_SDPA_TABLE")
    paths = [Path(chosen)] if chosen else sorted(TABLES.glob("*.json"))
    tables = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    tables = [table for table in tables if capability and tuple(table["capability"]) == capability]
    table = next((table for table in tables if table["device"] == name), tables[0] if tables else None)
    return (table["device"], table["rows"]) if table else (name, [])


@functools.cache
def _device(device: torch.device) -> tuple[str, tuple[int, ...] | None]:
    """Name and compute capability."""
    if device.type != "cuda":
        return device.type, None
    return torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
