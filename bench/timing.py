"""How long a call takes on its device, how much memory, and what the device can do at most: copy and matmul."""

import functools
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

_GRAPH_SECONDS, _GRAPH_CALLS = 2e-3, 512
_WALL_SECONDS, _LONG_SECONDS = 2e-3, 0.1
_MOST_SETS = 64


@dataclass(frozen=True)
class Call:
    """Something to time: `run`, after `before` in every round, which is not timed."""

    run: Callable[[], Any]
    before: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Sampler:
    """Times a call: `sample()` gives the seconds of one, the mean over a round."""

    sample: Callable[[], float]
    method: str
    """"graph" or "events" (device time), "wall" (a host's clock)."""
    output: Callable[[], Any]
    """What the timed call on the first working set returned."""
    seconds: float
    """That `sample()` takes."""
    calls: Sequence[Any]
    """What a graph needs to be alive: it holds addresses, not tensors."""


def cache_bytes(device: torch.device) -> int:
    """Size of the device's L2; on a CPU, all cores' together (0 if the system does not tell)."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    total = 0
    for path in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index2/size"):
        size = re.fullmatch(r"(\d+)([KM])", path.read_text().strip())
        total += int(size[1]) << {"K": 10, "M": 20}[size[2]] if size else 0
    return total


def working_sets(nbytes: int, device: torch.device) -> int:
    """How many sets of `nbytes` to rotate so that none is still in the cache when its turn comes again."""
    return max(1, min(_MOST_SETS, -(-2 * cache_bytes(device) // max(1, nbytes))))


def sampler(calls: Sequence[Call], device: torch.device, wall: bool = False, known: float = 0) -> Sampler:
    """A sampler over `calls`, the same operation on different working sets, warmed up. A single call that has run in
    `known` seconds is taken to be warm if these are long."""
    if device.type == "cuda" and not wall and not any(call.before for call in calls):
        return _device_sampler([call.run for call in calls])
    return _wall_sampler(calls, device, known if len(calls) == 1 and known > _LONG_SECONDS else 0)


def _wall_sampler(calls: Sequence[Call], device: torch.device, known: float) -> Sampler:
    last: list[Any] = [None]

    def once(call: Call) -> float:
        if call.before:
            call.before()
        synchronize(device)
        start = time.perf_counter()
        result = call.run()
        synchronize(device)
        seconds = time.perf_counter() - start
        if call is calls[0]:
            last[0] = result
        return seconds

    def sample() -> float:
        times = []
        while len(times) < len(calls) or sum(times) < _WALL_SECONDS:
            times += map(once, calls)
        return statistics.mean(times)

    if not known:
        start = time.perf_counter()
        sample()
        known = time.perf_counter() - start
    return Sampler(sample, "wall", lambda: last[0], known, calls)


def _device_sampler(runs: Sequence[Callable[[], Any]]) -> Sampler:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for run in runs:
            run()
        seconds = _events(lambda: [run() for run in runs])
    torch.cuda.current_stream().wait_stream(side)
    cycles = max(1, min(int(_GRAPH_SECONDS / max(seconds, 1e-9)), _GRAPH_CALLS // len(runs)))
    count, last = cycles * len(runs), [None]
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for i in range(count):
                result = runs[i % len(runs)]()
                if i % len(runs) == 0:
                    last[0] = result
        replay, method = graph.replay, "graph"
    except Exception:
        # Some calls may not be captured (they synchronize, say): their launches are then part of the time.
        torch.cuda.synchronize()
        # After a capture that failed, torch draws no random numbers until one has succeeded.
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            torch.zeros(1, device="cuda")

        def replay() -> None:
            for i in range(count):
                result = runs[i % len(runs)]()
                if i % len(runs) == 0:
                    last[0] = result

        method = "events"
    # A graph is on its way to the device while the same one runs: its launch is not part of the time.
    ahead = replay if method == "graph" else None
    seconds = [_events(replay, ahead) for _ in range(3)][-1]
    return Sampler(lambda: _events(replay, ahead) / count, method, lambda: last[0], seconds * (2 if ahead else 1), runs)


def _events(run: Callable[[], Any], ahead: Callable[[], Any] | None = None) -> float:
    """Seconds of `run` on the device, which does `ahead` just before it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if ahead:
        ahead()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def peak_memory(device: torch.device) -> Iterator[list[int]]:
    """The list that it gives holds, after the block, the most bytes that the block had beyond those held before it; on
    a CPU, resident memory of the process; it stays empty where the system does not tell."""
    found: list[int] = []
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        torch.cuda.synchronize(device)
        found.append(torch.cuda.max_memory_allocated(device) - before)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
    except OSError:
        yield found
        return
    yield found
    found.append(max(0, _resident("VmHWM") - before))


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    raise OSError(f"/proc/self/status has no {field}")


@dataclass(frozen=True)
class Ceilings:
    """What the device reached, at best, in this process."""

    device: str
    dtype: str
    threads: int | None
    """Of a CPU."""
    copy: float
    """Bytes read and written a second, of a large copy."""
    matmul: float
    """Floating-point operations a second of a large matrix product in `dtype`."""

    def seconds(self, nbytes: float, flops: float) -> float:
        """The least time for so many bytes and operations: the roofline."""
        return max(nbytes / self.copy, flops / self.matmul)


def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measured once a process, for a CPU once for each number of threads."""
    return _ceilings(device, dtype, torch.get_num_threads() if device.type == "cpu" else None)


@functools.cache
def _ceilings(device: torch.device, dtype: torch.dtype, threads: int | None) -> Ceilings:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    copy, matmul = _copy_speed(device, threads), _matmul_speed(device, dtype, threads)
    return Ceilings(name, str(dtype).removeprefix("torch."), threads, copy, matmul)


@functools.cache
def _copy_speed(device: torch.device, threads: int | None) -> float:
    source = torch.ones(1 << (29 if device.type == "cuda" else 26), device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best(lambda: target.copy_(source), device)


@functools.cache
def _matmul_speed(device: torch.device, dtype: torch.dtype, threads: int | None) -> float:
    n = 8192 if device.type == "cuda" else 2048
    # Zeros multiply faster than numbers: they switch fewer transistors.
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * n**3 / _best(lambda: torch.mm(a, b, out=out), device)


def _best(run: Callable[[], Any], device: torch.device) -> float:
    rounds = 12 if device.type == "cuda" else 4
    times = []
    for _ in range(rounds):
        if device.type == "cuda":
            times.append(_events(run))
        else:
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return min(times[1:])
