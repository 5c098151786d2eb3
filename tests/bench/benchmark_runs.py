"""JSON of benchmark runs that never took place."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MACHINE = {
    "system": "Linux",
    "machine": "x86_64",
    "python_version": "3.12.3",
    "cpu": {"brand_raw": "A processor", "count": 2},
    "gpu": None,
    "versions": {"torch": "2.13.0"},
}
CEILINGS = {"copy_gb_per_s": 4000.0, "matmul_tflop_per_s": 700.0}


def row(group: str, backend: str, median: float, **info: Any) -> dict[str, Any]:
    """An entry of `benchmarks`; `group` is "operation, shape"."""
    operation, _, shape = group.partition(", ")
    known = {
        "suite": "sdpa",
        "operation": operation,
        "shape": shape,
        "series": "",
        "context": None,
        "backend": backend,
        "ours": backend == "gemma4",
        "device": "CPU",
        "dtype": "float32",
        "threads": 1,
        "bytes": 4e6,
        "flops": 8e9,
        "roofline_s": 1e-6,
        "roofline_share": 1e-6 / median,
        "ceilings": CEILINGS,
        "gb_per_s": 4e-3 / median,
        "tflop_per_s": 8e-3 / median,
        "error": 1e-7,
        "error_naive": 1e-7,
        "error_allowed": 2e-7,
        "peak_bytes": 1024,
        "timer": "wall",
        "working_sets": 1,
    }
    stats = {"median": median, "q1": median * 0.98, "q3": median * 1.03, "rounds": 7}
    return {
        "group": group,
        "name": backend,
        "fullname": f"{group} {backend}",
        "stats": stats,
        "extra_info": known | info,
    }


def without(group: str, backend: str, status: str, reason: str, ours: bool = False) -> dict[str, Any]:
    """An entry of `unpublished`."""
    return {"suite": "sdpa", "group": group, "backend": backend, "ours": ours, "status": status, "reason": reason}


def write(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    unpublished: Sequence[Mapping[str, Any]] = (),
    machine: Mapping[str, Any] = MACHINE,
) -> Path:
    run = {"machine_info": machine, "datetime": "2026-01-02T03:04:05+00:00", "benchmarks": rows}
    path.write_text(json.dumps(run | {"unpublished": unpublished}), encoding="utf-8")
    return path
