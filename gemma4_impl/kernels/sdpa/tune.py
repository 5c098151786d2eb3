"""Measures who computes attention fastest: `python -m gemma4_impl.kernels.sdpa.tune -o table.json`, on a GPU.

dispatch.py reads the tables in `tables/`, or the one that $GEMMA4_SDPA_TABLE names. A backend that errs by more than
twice what `naive.sdpa` does, both against float64, gets no time."""

import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import cycle, islice
from pathlib import Path

import torch
from torch import Tensor

from gemma4_impl.kernels.sdpa import naive
from gemma4_impl.kernels.sdpa.backends import BACKENDS, Call, Case

# What the models ask for: full layers and sliding ones of the 31B, the 26B-A4B and the E2B, new tokens in a long cache,
# a ring that has gone round, images.
_FULL, _SLIDING = {"N": 32, "K": 4, "H": 512}, {"N": 32, "K": 16, "H": 256}
_SMALL_FULL, _SMALL_SLIDING = {"N": 8, "K": 1, "H": 512}, {"N": 8, "K": 1, "H": 256}
SHAPES: list[dict] = [
    *({**_FULL, "T": 1, "S": S, "mask": "length"} for S in (512, 2048, 4096, 8192, 32768, 131072)),
    *({**_FULL, "T": 8, "S": S, "mask": "length"} for S in (2048, 32768)),
    *({**_SLIDING, "T": 1, "S": S, "window": 1024, "mask": "length"} for S in (512, 1024)),
    *({**_SMALL_FULL, "T": 1, "S": S, "mask": "length"} for S in (2048, 32768)),
    {**_SMALL_SLIDING, "T": 1, "S": 512, "window": 512, "mask": "length"},
    *({**_FULL, "T": 1, "S": S, "mask": "causal"} for S in (512, 4096, 32768)),
    *({**_SLIDING, "T": 1, "S": S, "mask": "causal"} for S in (256, 1024)),
    *({"N": 16, "K": 4, "H": H, "T": 1, "S": 4096, "mask": "causal"} for H in (64, 128)),
    {**_SLIDING, "T": 1, "S": 1535, "window": 1024, "mask": "positions"},
    {**_SLIDING, "T": 8, "S": 1535, "window": 1024, "mask": "positions"},
    {**_FULL, "T": 1, "S": 4096, "mask": "positions"},
    *({**_FULL, "T": T, "S": T, "mask": "causal"} for T in (128, 512, 2048, 8192)),
    *({**_FULL, "T": 512, "S": S, "mask": "causal"} for S in (4096, 32768)),
    *({**_SLIDING, "T": T, "S": T, "mask": "causal"} for T in (128, 512, 1024, 2048)),
    *({**_SLIDING, "T": T, "S": T, "window": 1024, "mask": "causal"} for T in (2048, 8192)),
    *({**_SMALL_FULL, "T": T, "S": T, "mask": "causal"} for T in (512, 2048)),
    *({**_SMALL_SLIDING, "T": T, "S": T, "window": 512, "mask": "causal"} for T in (1024, 4096)),
    *({"N": 16, "K": 4, "H": H, "T": 2048, "S": 2048, "mask": "causal"} for H in (64, 128)),
    {**_SLIDING, "T": 512, "S": 1535, "window": 1024, "mask": "positions"},
    {**_FULL, "T": 512, "S": 4096, "mask": "positions"},
    {**_SLIDING, "T": 2048, "S": 2048, "window": 1024, "mask": "ends"},
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True, help="the table, as JSON")
    parser.add_argument("--only", default="", help="measure only shapes whose description contains this")
    parser.add_argument("--backends", nargs="+", default=[name for name in BACKENDS if name != "naive"])
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile beforehand")
    args = parser.parse_args()
    shapes = [shape for shape in SHAPES if args.only in _text(shape)]
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_compile, shapes, [args.backends] * len(shapes)))
    table = {
        "device": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda, "triton": _triton_version()},
    }
    rows = []
    for shape in shapes:
        rows.append(_measure(shape, args.backends))
        lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
        args.output.write_text(f'{json.dumps(table)[:-1]}, "rows": [\n{lines}\n]}}\n', encoding="utf-8")


def make_call(shape: dict, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Call:
    """Random tensors for a shape; queries so small that scores are about 1."""
    N, K, H, T, S = (shape[letter] for letter in "NKHTS")
    generator = torch.Generator("cuda").manual_seed(seed)

    def random(heads: int, length: int) -> Tensor:
        return torch.randn(1, heads, length, H, generator=generator, device="cuda", dtype=dtype)

    q, k, v = random(N, T) * H**-0.5, random(K, S), random(K, S)
    window, mask = shape.get("window"), shape["mask"]
    # A ring with a window has gone round; what has none ends where its keys end.
    total = S if window is None or mask != "positions" else 2 * S - S // 3
    length = torch.tensor([total], dtype=torch.int32, device="cuda")
    at = keys = ends = None
    if mask in ("positions", "ends"):
        at, keys = naive.known_positions(q, k, length)
    if mask == "ends":
        ends = at // 256 * 256 + 255
    return Call(q, k, v, at, keys, length if mask == "length" else None, ends, window, 1.0)


def graph_times(runs: list[Callable[[], Tensor]], seconds: float = 0.005, replays: int = 7) -> list[float]:
    """Seconds of one run, a value for each replay of a CUDA graph of about `seconds`, in which the runs take turns."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for run in runs:
            run()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for run in runs:
            run()
        end.record()
        end.synchronize()
        once = start.elapsed_time(end) / 1e3 / len(runs)
        count = max(len(runs), min(300, int(seconds / once)))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for run in islice(cycle(runs), count):
                run()
        times = []
        for _ in range(replays + 2):
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3 / count)
    return times[2:]


def _measure(shape: dict, backends: list[str]) -> dict:
    first = make_call(shape)
    case = first.case
    moved = 2 * first.k.nbytes + 2 * first.q.nbytes
    # Together larger than the L2, or the keys of one call would wait there for the next.
    copies = min(12, 1 + int(3 * torch.cuda.get_device_properties(0).L2_cache_size / moved))
    calls = [first, *(make_call(shape, seed) for seed in range(1, copies))]
    at, keys = first.positions()
    rest = {"window": first.window, "ends": first.ends}
    truth = naive.sdpa(first.q.double(), first.k.double(), first.v.double(), at, keys, **rest)
    allowed = 2 * _error(naive.sdpa(first.q, first.k, first.v, at, keys, **rest), truth)
    times: dict[str, float] = {}
    for name in backends:
        backend = BACKENDS[name]
        if backend.refuses(case) or (name == "math" and case.N * case.T * case.S > 2**27):
            continue
        try:
            if (error := _error(backend.run(first), truth)) > allowed:
                print(f"{_text(shape)}: {name} errs by {error:.2e}, allowed {allowed:.2e}", file=sys.stderr)
                continue
            taken = graph_times([lambda b=backend, c=call: b.run(c) for call in calls])
        except Exception as problem:  # Whatever a backend raises, the others are measured.
            print(f"{_text(shape)}: {name}: {str(problem).splitlines()[0]}", file=sys.stderr)
            continue
        times[name] = round(statistics.median(taken) * 1e3, 5)
    print(f"{_text(shape)}: {times}", flush=True)
    return row_of(case, times)


def row_of(case: Case, times: dict[str, float]) -> dict:
    """The row of a table: what the case is, and milliseconds by backend."""
    sizes = {letter: getattr(case, letter) for letter in "BNKHTS"}
    return {"op": case.op, "mask": case.mask, "window": case.window, **sizes, "dtype": str(case.dtype)[6:], "ms": times}


def _error(out: Tensor, truth: Tensor) -> float:
    return float((out.double() - truth).norm() / truth.norm())


def _compile(shape: dict, backends: list[str]) -> None:
    """Fills the compilers' caches on disk."""
    call = make_call(shape)
    for name in ("cuda", "triton"):
        if name in backends and BACKENDS[name].refuses(call.case) is None:
            with contextlib.suppress(Exception):  # `_measure` reports it.
                BACKENDS[name].run(call)


def case_of(shape: dict) -> Case:
    """What `make_call` makes, without making it."""
    return Case(torch.device("cuda"), torch.bfloat16, 1, **({"window": None} | shape))


def _text(shape: dict) -> str:
    case = case_of(shape)
    window = "" if case.window is None else f" window {case.window}"
    return f"{case.op} {case.mask} N={case.N} K={case.K} H={case.H} T={case.T} S={case.S}{window}"


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


if __name__ == "__main__":
    main()
