"""A parity run in pieces, one after another or, on models too small to keep a processor busy, in several processes."""

import concurrent.futures
import logging
import multiprocessing
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from gemma4_impl.config import TextConfig
from gemma4_impl.vision.processing import ImageSource
from parity import engine, exported, grad, quantized
from parity.engine import Report
from parity.images import place

Sequences = Callable[[TextConfig, Path], list[int]]
_MOST = 4
_WORTH = 4
"""Fewer pieces than this take less time than starting processes for them."""


@dataclass(frozen=True)
class Task:
    """A piece of a run. To go to another process it must be picklable."""

    name: str
    steps: int
    """How often `run` calls the `advance` that it is given."""
    run: Callable[..., Report]


def plain_tasks(
    checkpoints: Mapping[str, Path],
    sequences: Sequences,
    dtypes: Sequence[str],
    paths: Mapping[str, Sequence[str]],
    device: torch.device,
    stream: bool,
    images: Sequence[ImageSource] = (),
    reference: str = "hf",
) -> list[Task]:
    """Arguments as `engine.run` has them."""
    steps = engine.steps(1, 1, paths, reference, stream)

    def piece(label: str, dtype: str) -> partial:
        here = {label: checkpoints[label]}, sequences, [dtype], paths, device, stream
        return partial(engine.run, *here, images=images, reference=reference)

    return [Task(f"{label} {dtype}", steps, piece(label, dtype)) for label in checkpoints for dtype in dtypes]


def gradient_tasks(
    checkpoints: Mapping[str, Path],
    sequences: Sequences,
    dtypes: Sequence[str],
    candidates: Sequence[str],
    device: torch.device,
    images: Sequence[ImageSource] = (),
) -> list[Task]:
    """Arguments as `grad.run` has them."""
    steps = grad.steps(1, 1, candidates)

    def piece(label: str, dtype: str) -> partial:
        return partial(grad.run, {label: checkpoints[label]}, sequences, candidates, [dtype], device, images=images)

    return [Task(f"{label} {dtype}", steps, piece(label, dtype)) for label in checkpoints for dtype in dtypes]


def quantized_tasks(
    targets: Sequence[quantized.Target],
    sequences: Sequences,
    dtypes: Sequence[str],
    paths: Sequence[str],
    device: torch.device,
    stream: bool,
) -> list[Task]:
    """Arguments as `quantized.run` has them."""
    steps = quantized.steps(dtypes, paths)
    return [Task(t.label, steps, partial(_quantized, t, sequences, dtypes, paths, device, stream)) for t in targets]


def program_tasks(
    programs: Sequence[exported.Program],
    sequences: Sequences,
    paths: Sequence[str],
    device: torch.device,
    stream: bool,
) -> list[Task]:
    """Arguments as `exported.run` has them."""
    return [
        Task(p.label, exported.steps(p, paths), partial(_program, p, sequences, paths, device, stream))
        for p in programs
    ]


def run_tasks(tasks: Sequence[Task], processes: int, advance: Callable[[str], None]) -> Report:
    """The reports of all tasks as one, in their order. With several processes `advance` is called for a task when it is
    done. Raises what a task raises, and MemoryError if a process is killed."""
    if processes < 2 or len(tasks) < _WORTH:
        return sum((task.run(advance=advance) for task in tasks), Report())
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(processes, len(tasks)), context, _start) as pool:
        # The longest first, so that none is left at the end for one process alone.
        order = sorted(range(len(tasks)), key=lambda i: -tasks[i].steps)
        futures = {i: pool.submit(_pickled, tasks[i].run) for i in order}
        numbers = {future: i for i, future in futures.items()}
        try:
            for future in concurrent.futures.as_completed(numbers):
                future.result()
                task = tasks[numbers[future]]
                for _ in range(task.steps):
                    advance(task.name)
            return sum((pickle.loads(futures[i].result()) for i in range(len(tasks))), Report())
        except BrokenProcessPool:
            raise MemoryError("a process of this run was killed, most likely because memory ran out") from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def processes_for(device: torch.device) -> int:
    """How many processes tiny models are worth on `device`: a GPU is one, and so is a single processor."""
    if device.type != "cpu":
        return 1
    there = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return min(len(there), _MOST)


def _start() -> None:
    torch.set_num_threads(1)
    # Of what transformers finds missing the first process has told, or not, as it likes.
    logging.disable(logging.WARNING)


def _pickled(run: Callable[..., Report]) -> bytes:
    """Plain pickle: torch would send each of thousands of tensors through a file descriptor of its own."""
    return pickle.dumps(run())


def _quantized(
    target: quantized.Target,
    sequences: Sequences,
    dtypes: Sequence[str],
    paths: Sequence[str],
    device: torch.device,
    stream: bool,
    advance: Callable[[str], None] = lambda what: None,
) -> Report:
    report, at = Report(), target.original or target.candidate.path
    sequence = place(at, sequences(TextConfig.from_file(at), at), ())[0]
    quantized.run(report, target, sequence, dtypes, paths, device, stream, advance)
    return report


def _program(
    target: exported.Program,
    sequences: Sequences,
    paths: Sequence[str],
    device: torch.device,
    stream: bool,
    advance: Callable[[str], None] = lambda what: None,
) -> Report:
    report, at = Report(), target.original or target.source
    sequence = place(at, sequences(TextConfig.from_file(at), at), ())[0]
    exported.run(report, target, sequence, paths, device, stream, advance)
    return report
