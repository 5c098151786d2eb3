"""Where a token's time goes: each part of a step run by itself, beside the time in which its bytes could be copied."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from gemma4_impl.engine.session import Session
from gemma4_impl.engine.step import ATTENTION, HEAD, LINEARS, PARTS
from gemma4_impl.generate import cache_bytes

ROUNDS, RUNS = 9, 3
GAPS = "between them"


@dataclass(frozen=True)
class Part:
    """A part of a step, or all of it."""

    name: str
    seconds: float
    """Median of `ROUNDS`."""
    nbytes: int
    """What it must read at least."""


@dataclass(frozen=True)
class Profile:
    """A step at batch size B."""

    context: int
    batch_size: int
    parts: tuple[Part, ...]
    whole: Part
    copy: float
    """Bytes a second that a large copy reads and writes."""

    @property
    def gaps(self) -> float:
        """Seconds that the whole takes longer than its parts by themselves: launches, and kernels of one part that wait
        until those of another have left the multiprocessors. Below 0 where they overlap instead."""
        return self.whole.seconds - sum(part.seconds for part in self.parts)

    def lines(self) -> list[str]:
        """A table."""
        head = f"a token after {self.context}, {self.batch_size} row(s); copy {self.copy / 1e9:.0f} GB/s"
        lines = [head, f"{'':12} {'us':>9} {'share':>7} {'MB':>9} {'floor us':>9} {'of copy':>8}"]
        for part in (*self.parts, Part(GAPS, self.gaps, 0), self.whole):
            line = f"{part.name:12} {part.seconds * 1e6:9.1f} {part.seconds / self.whole.seconds:7.1%}"
            if part.nbytes:
                floor = part.nbytes / self.copy
                line += f" {part.nbytes / 1e6:9.1f} {floor * 1e6:9.1f} {floor / part.seconds:8.1%}"
            lines.append(line)
        return lines


@torch.inference_mode()
def profile(session: Session) -> Profile:
    """Profiles the step that comes next in a session that was started, which can then go on unless it is full: there
    the last positions are computed once more, and overwritten.

    On a GPU each part is captured in a graph of its own, and the whole is the graph that decodes."""
    step, model = session.step, session.model
    context = max(session.lengths) + 1
    kept = [(t, t.clone()) for t in step.moving]
    step.position -= max(0, max(session.lengths) + RUNS - session.max_seq_len)
    begin = step.position.clone()

    def restored() -> None:
        for tensor, value in kept:
            tensor.copy_(value)
        step.position.copy_(begin)

    seconds = (_on_gpu if model.device.type == "cuda" else _on_cpu)(session, restored)
    for tensor, value in kept:
        tensor.copy_(value)
    cached = session.step.batch_size * cache_bytes(model.config, model.dtype, context)
    head = model.lm_head.nbytes
    sizes = {LINEARS: model.nbytes_read - head, HEAD: head, ATTENTION: cached}
    parts = tuple(Part(name, seconds[name], sizes.get(name, 0)) for name in PARTS if name in seconds)
    whole = Part("all", seconds["all"], model.nbytes_read + cached)
    return Profile(context, step.batch_size, parts, whole, copy_speed(model.device))


def _on_gpu(session: Session, restored: Callable[[], None]) -> dict[str, float]:
    step = session.step
    seconds = {"all": _timed(session.graph.replay, restored)}
    present: list[str] = []
    try:
        step.watch = lambda part, work: present.append(part)
        step(session.sampling)
        for name in dict.fromkeys(present):
            step.watch = lambda part, work, name=name: work() if part == name else None
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step(session.sampling)
            seconds[name] = _timed(graph.replay, restored)
    finally:
        step.watch = None
    return seconds


def _timed(run: Callable[[], None], restored: Callable[[], None]) -> float:
    taken = []
    for _ in range(ROUNDS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        restored()
        run()  # what waits for the host comes before
        start.record()
        for _ in range(1, RUNS):
            run()
        stop.record()
        torch.cuda.synchronize()
        taken.append(start.elapsed_time(stop) / 1e3 / (RUNS - 1))
    restored()
    return statistics.median(taken)


def _on_cpu(session: Session, restored: Callable[[], None]) -> dict[str, float]:
    step, rounds = session.step, []

    def timed(part: str, work: Callable[[], None]) -> None:
        begin = time.perf_counter()
        work()
        rounds[-1][part] = rounds[-1].get(part, 0.0) + time.perf_counter() - begin

    step.watch = timed
    try:
        for _ in range(ROUNDS):
            rounds.append({})
            begin = time.perf_counter()
            step(session.sampling)
            rounds[-1]["all"] = time.perf_counter() - begin
            restored()
    finally:
        step.watch = None
    return {name: statistics.median(taken[name] for taken in rounds) for name in rounds[0]}


def copy_speed(device: torch.device) -> float:
    """Bytes read and written a second by a copy that no cache holds: the best of some."""
    size = (1 << 30) if device.type == "cuda" else (1 << 28)
    source = torch.ones(size // 4, device=device)
    target, best = torch.empty_like(source), 0.0
    for _ in range(6):
        if device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            target.copy_(source)
            stop.record()
            torch.cuda.synchronize()
            seconds = start.elapsed_time(stop) / 1e3
        else:
            begin = time.perf_counter()
            target.copy_(source)
            seconds = time.perf_counter() - begin
        best = max(best, 2 * size / seconds)
    return best
