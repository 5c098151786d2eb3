"""What the report says of a quantized candidate: as JSON, on the page, and as a table for the terminal."""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from parity import plots_quantized
from parity.engine import Case
from parity.formats import ratio, sci, simple_table
from parity.quantized import Damage, Split
from parity.weights import STEPS, TensorCheck

_NAMED = 4


def split_json(split: Split) -> dict[str, Any]:
    """One entry of `quantized` in report.json; the cases of stages B and C are among `cases`, under `candidate
    dequantized` and `candidate`. `program` is what a program was exported for, null for a model that was loaded."""
    return {
        "checkpoint": split.checkpoint,
        "candidate": split.candidate,
        "program": split.program,
        "verdict": "red" if split.red else "green",
        "stored_bytes": split.stored_bytes,
        "bits_per_weight": split.bits_per_weight,
        "tensors": [
            dataclasses.asdict(t) | {"bits_per_weight": t.bits_per_weight, "wrong": t.why} for t in split.tensors
        ],
        "stages": {
            "weights": None if split.damage is None else dataclasses.asdict(split.damage),
            "activations": None if split.activations is None else dataclasses.asdict(split.activations),
            "dequantized": [_case(case) for case in split.dense],
            "packed": [_case(case) for case in split.packed],
        },
    }


def _case(case: Case) -> dict[str, Any]:
    comparison = case.comparison
    return {
        "dtype": case.dtype,
        "path": case.path,
        "verdict": "red" if comparison.red else "green",
        "worst_ratio": comparison.worst_ratio,
        "worst_tap": comparison.worst.name if comparison.worst else None,
    }


def split_name(split: Split) -> str:
    return f"{split.checkpoint} {split.candidate}"


def tensor_reasons(split: Split) -> list[str]:
    """What is wrong with its tensors, a line for each thing that is; empty if nothing is."""
    found: dict[str, list[TensorCheck]] = {}
    for tensor in split.wrong:
        for why in tensor.why:
            found.setdefault(why.partition(":")[0], []).append(tensor)
    out = []
    for kind, tensors in found.items():
        first = next(why for why in tensors[0].why if why.startswith(kind))
        others = ", ".join(t.name for t in tensors[1:_NAMED])
        more = len(tensors) - _NAMED
        also = f"; also {others}" + (f" and {more} more" if more > 0 else "") if others else ""
        out.append(f"{tensors[0].name} is {first.removeprefix('is ')}{also}")
    return out


@dataclasses.dataclass(frozen=True)
class Stage:
    """A line of the table of stages."""

    name: str
    what: str
    figure: str
    verdict: str
    """green, red, or reported."""


def stages(split: Split) -> list[Stage]:
    """The file's tensors, then A, B, what rounding activations costs, and C in each dtype."""
    quantized = [t for t in split.tensors if t.quantized]
    levels = sorted(t.sqnr_db for t in quantized if t.sqnr_db is not None)
    what = f"{len(split.tensors)} tensors, {len(quantized)} of them quantized, against another reader"
    what += " and the original" if split.damage else ""
    figure = f"SQNR {levels[0]:.1f} to {levels[-1]:.1f} dB" if levels else f"{split.bits_per_weight:.2f} bits a weight"
    out = [Stage("file", what, figure, "red" if split.wrong else "green")]
    if split.damage:
        what = "transformers in float64 on the dequantized weights, against the original ones"
        out.append(_reported("A weights", what, split.damage))
    for case in split.dense:
        what = "our model on dense dequantized weights, float32"
        out.append(_judged("B dequantized", what, [case]))
    if split.activations:
        what = "the same in float64 with the inputs of linears rounded to int8, against without"
        out.append(_reported("activations", what, split.activations))
    for dtype in dict.fromkeys(case.dtype for case in split.packed):
        cases = [case for case in split.packed if case.dtype == dtype]
        ours = f"the {split.program} program" if split.program else "our model as loaded"
        what = f"{ours}, {dtype}, worst of {len(cases)} cache path{'s' * (len(cases) > 1)}"
        if forms := [t.packed[dtype] for t in split.tensors if dtype in t.packed]:
            kernels = Counter(form.kernel for form in forms)
            what += "; " + ", ".join(f"{count} x {kernel}" for kernel, count in kernels.most_common())
            off = max(form.error for form in forms)
            what += f"; weights off by at most {sci(off)}" if off else "; weights exact"
        out.append(_judged(f"C {packed_name(split)} {dtype}", what, cases))
    return out


def packed_name(split: Split) -> str:
    """What stage C is called."""
    return "program" if split.program else "packed"


def _reported(name: str, what: str, cost: Damage) -> Stage:
    logits, off = cost.logits, cost.taps["logits"]
    figure = f"logits off by {sci(off)}, KL {sci(logits.kl_mean)}, top-1 {100 * logits.top1:.1f} %"
    return Stage(name, what, figure, "reported")


def _judged(name: str, what: str, cases: Sequence[Case]) -> Stage:
    worst = max(cases, key=lambda case: case.comparison.worst_ratio)
    red = any(case.comparison.red for case in cases)
    at = worst.comparison.worst.name if worst.comparison.worst else "no taps"
    return Stage(name, what, f"ratio {ratio(worst.comparison.worst_ratio)} at {at}", "red" if red else "green")


def print_splits(splits: Sequence[Split], console: Console) -> None:
    """A line for each candidate. Readable without colour."""
    dtypes = list(dict.fromkeys(case.dtype for split in splits for case in split.packed))
    headers = ("bits", "SQNR,\ndB", "A:\nKL", "A:\ntop-1", "B", *(f"C\n{dtype}" for dtype in dtypes))
    table = simple_table("", *headers)
    for column in table.columns[1:]:
        column.no_wrap = True
    for split in splits:
        levels = [t.sqnr_db for t in split.tensors if t.quantized and t.sqnr_db is not None]
        wrong = bool(split.wrong)
        bits = Text(f"{split.bits_per_weight:.2f}" + "!" * wrong, style="bold red" if wrong else "")
        sqnr = f"{min(levels):.1f}" if levels else "-"
        logits = split.damage.logits if split.damage else None
        cost = (sci(logits.kl_mean), f"{100 * logits.top1:.1f} %") if logits else ("-", "-")
        packed = [[case for case in split.packed if case.dtype == dtype] for dtype in dtypes]
        table.add_row(Text(split_name(split)), bits, sqnr, *cost, *map(_worst, [split.dense, *packed]))
    console.print(table)


def _worst(cases: Sequence[Case]) -> Text:
    if not cases:
        return Text("-")
    red = any(case.comparison.red for case in cases)
    return Text(ratio(_worst_ratio(cases)) + "!" * red, style="bold red" if red else "green")


def _worst_ratio(cases: Sequence[Case]) -> float:
    return max((case.comparison.worst_ratio for case in cases), default=math.nan)


def section(split: Split) -> dict[str, Any]:
    """What the page shows of it."""
    name = split_name(split)
    quantized = [t for t in split.tensors if t.quantized]
    known = [t for t in quantized if t.sqnr_db is not None]
    kinds: dict[str, int] = {}
    for tensor in split.tensors:
        kinds[tensor.kind] = kinds.get(tensor.kind, 0) + math.prod(tensor.shape)
    return {
        "name": name,
        "split": split,
        "stages": stages(split),
        "stage_c": packed_name(split),
        "reasons": tensor_reasons(split),
        "limit": STEPS,
        "dtypes": {case.dtype for case in split.packed},
        "packed": list(dict.fromkeys(dtype for t in split.tensors for dtype in t.packed)),
        "dense": _worst_ratio(split.dense),
        "loaded": _worst_ratio(split.packed),
        "megabytes": split.stored_bytes / 1e6,
        "kinds": sorted(kinds.items(), key=lambda item: -item[1]),
        "quantized": quantized,
        "depth": plots_quantized.stages_by_depth(split, f"{name}: error by depth, in three stages"),
        "sqnr": plots_quantized.sqnr_map(split, f"{name}: SQNR by tensor") if known else None,
        "created": plots_quantized.created_map(split, f"{name}: error created by quantizing") if split.damage else None,
    }
