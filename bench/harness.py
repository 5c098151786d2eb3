"""A benchmark row: one backend's time for one operation on one shape, published only if its output is in parity.

All backends of a group get the same tensors and are timed in turn in every round, because a machine's speed changes
from one second to the next. pytest-benchmark then takes each one's times from a clock that tells what was measured."""

import atexit
import contextlib
import functools
import importlib
import logging
import math
import re
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import timing
from bench.timing import Call
from parity.budget import Check, check, floor

_log = logging.getLogger(__name__)

_CASE_SECONDS, _FEWEST, _MOST = 0.4, 5, 25
_LONG_SECONDS, _FEWEST_LONG = 0.2, 3


@dataclass(frozen=True)
class Backend:
    """A way to compute an operation. `prepare` takes a working set and gives what to time: packing and compiling happen
    there. Whatever it or the call raises on a shape is why there is no row for it."""

    name: str
    prepare: Callable[[Any], Call | Callable[[], Any]]
    ours: bool = False
    absent: Callable[[], str | None] = lambda: None
    """Why it cannot run here at all: a package that is missing, no GPU."""
    wall: bool = False
    """Timed by the host's clock: it does not run on PyTorch's stream."""
    read: Callable[[Any], Any] = lambda output: output
    """What a call returned -> what is judged: tensors, say."""


@dataclass(frozen=True)
class Case:
    """One operation on one shape: a group of rows. `make(i)` gives working set number i; `judge(set 0)` gives what
    checks an output on that set."""

    suite: str
    operation: str
    shape: str
    backends: Sequence[Backend]
    make: Callable[[int], Any]
    judge: Callable[[Any], Callable[[Any], Check]]
    cost: Callable[[], tuple[float, float]] = lambda: (0, 0)
    """The fewest bytes that have to move, each input read and each output written once; floating-point operations."""
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    tokens: int | None = None
    """How many a call handles."""
    weights: int | None = None
    """How many a call reads or makes."""
    context: int | None = None
    """Where the time is plotted against it: with all cases of the same `operation` and `series`."""
    series: str = ""
    rotate: bool = True
    """Whether working sets are rotated; false where a call is far longer than reading a cache."""
    threads: int | None = None

    @property
    def group(self) -> str:
        return f"{self.operation}, {self.shape}"


@dataclass
class Row:
    """What is known of one backend in one group."""

    backend: str
    group: str
    suite: str
    ours: bool
    status: str = "published"
    """Or "absent", "refused", "not in parity"."""
    reason: str = ""
    check: Check | None = None
    times: list[float] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)

    def unpublished(self) -> dict[str, Any]:
        """JSON of a row without a number."""
        found = {"suite": self.suite, "group": self.group, "backend": self.backend, "ours": self.ours}
        found |= {"status": self.status, "reason": self.reason}
        return found | (_check_info(self.check) if self.check else {})


class Clock:
    """Time as it was measured: `tick` moves it on by the next of the measured seconds."""

    def __init__(self) -> None:
        self.now = 0.0
        self._times: list[float] = []

    def __call__(self) -> float:
        return self.now

    def load(self, times: Sequence[float]) -> None:
        self.now, self._times = 0.0, list(times)

    def tick(self) -> None:
        if self._times:
            self.now += self._times.pop(0)


clock = Clock()
timed = pytest.mark.benchmark(timer=clock, disable_gc=False)
"""Marks a test whose row `publish` fills."""


def needs(*modules: str, cuda: bool = False) -> Callable[[], str | None]:
    """A reason to be absent: no NVIDIA GPU, or a module that does not import."""

    @functools.cache
    def reason() -> str | None:
        if cuda and not torch.cuda.is_available():
            return "needs an NVIDIA GPU"
        for name in modules:
            try:
                importlib.import_module(name)
            except ModuleNotFoundError as error:
                return f"{error.name} is not installed"
            except Exception as error:
                return f"{name} does not import: {one_line(error)}"
        return None

    return reason


@functools.cache
def scratch() -> Path:
    """A folder for the run's files, removed at its end."""
    folder = tempfile.TemporaryDirectory(prefix="gemma4-bench-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


def one_line(error: BaseException) -> str:
    text = " ".join(f"{error}".split())
    return f"{type(error).__name__}: {text}"[:240] if text else type(error).__name__


def relative_error(out: Tensor, truth: Tensor) -> float:
    """|out - truth| / |truth|; infinite for another shape, NaN or infinity: nothing is left out."""
    if out.shape != truth.shape:
        return math.inf
    difference = torch.linalg.vector_norm(out.double() - truth.double())
    error = float(difference / torch.linalg.vector_norm(truth.double()))
    return error if math.isfinite(error) else math.inf


def close_to(truth: Sequence[Tensor], naive: Sequence[Tensor], dtype: torch.dtype) -> Callable[[Any], Check]:
    """Judges outputs (a tensor, or a list of them: then the one that is worst in its budget) against the float64
    `truth`: at most twice the error of `naive`, which is the definition computed in `dtype`, plus the floor."""
    references = [relative_error(n, t) for n, t in zip(naive, truth, strict=True)]

    def judge(output: Any) -> Check:
        outputs = [output] if isinstance(output, Tensor) else list(output)
        if len(outputs) != len(truth):
            return Check(math.inf, max(references), 0)
        checks = [
            check(relative_error(o, t), [reference], floor(dtype))
            for o, t, reference in zip(outputs, truth, references, strict=True)
        ]
        return max(checks, key=lambda c: (c.red, c.ratio))

    return judge


def equal_to(want: Any, view: Callable[[Any], Any] = lambda output: output) -> Callable[[Any], Check]:
    """Judges outputs that must be the same bits: the error is the share of values that differ."""

    def judge(output: Any) -> Check:
        got = view(output)
        if not isinstance(want, Tensor):
            return Check(float(got != want), 0, 0)
        if got.shape != want.shape:
            return Check(math.inf, 0, 0)
        return Check(float((_bits(got) != _bits(want)).double().mean()), 0, 0)

    return judge


def _bits(tensor: Tensor) -> Tensor:
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(sizes[tensor.dtype.itemsize])


def measure(case: Case, names: Iterable[str], enabled: bool = True) -> dict[str, Row]:
    """Rows of the backends called `names`: each is checked, then, if `enabled`, all that are in parity are timed in
    turn, and what was timed is checked again."""
    chosen = [b for b in case.backends if b.name in set(names)]
    rows = {b.name: Row(b.name, case.group, case.suite, b.ours) for b in chosen}
    for b in chosen:
        if reason := b.absent():
            rows[b.name].status, rows[b.name].reason = "absent", reason
    present = [b for b in chosen if rows[b.name].status == "published"]
    threads = torch.get_num_threads()
    torch.set_num_threads(case.threads or threads)
    try:
        if present:
            _fill(case, present, rows, enabled)
    except Exception as error:
        # Not one backend's: the device is out of memory, or out of order.
        for b in present:
            rows[b.name].status, rows[b.name].reason = "refused", one_line(error)
            rows[b.name].times.clear()
    finally:
        torch.set_num_threads(threads)
        if case.device.type == "cuda":
            with contextlib.suppress(RuntimeError):
                torch.cuda.empty_cache()
    return rows


def _fill(case: Case, backends: Sequence[Backend], rows: dict[str, Row], enabled: bool) -> None:
    top = timing.ceilings(case.device, case.dtype) if enabled else None
    first = case.make(0)
    judge = case.judge(first)
    calls: dict[Backend, tuple[Call, float]] = {}
    for b in backends:
        with _recorded(rows[b.name], case.device):
            call = _call(b, first)
            if call.before:
                call.before()
            start = time.perf_counter()
            with timing.peak_memory(case.device) as peak:
                output = call.run()
            seconds = time.perf_counter() - start
            rows[b.name].info["peak_bytes"] = peak[0] if peak else None
            found = judge(b.read(output))
            del output
            if _judged(rows[b.name], found):
                calls[b] = call, seconds
    if not enabled:
        return
    sets = [first]
    if case.rotate:
        sets += map(case.make, range(1, timing.working_sets(int(case.cost()[0]), case.device)))
    samplers: dict[Backend, timing.Sampler] = {}
    seconds = 0.0
    for b, (call, known) in calls.items():
        row = rows[b.name]
        with _recorded(row, case.device):
            if case.device.type == "cuda":
                # The first call may have compiled kernels and tried them out.
                known = 0.0
                if call.before:
                    call.before()
                with timing.peak_memory(case.device) as peak:
                    call.run()
                row.info["peak_bytes"] = peak[0]
            ready = timing.sampler([call, *(_call(b, s) for s in sets[1:])], case.device, b.wall, known)
            row.info |= {"timer": ready.method, "working_sets": len(sets)}
            seconds += ready.seconds
            samplers[b] = ready
    fewest = _FEWEST if seconds < _LONG_SECONDS else _FEWEST_LONG
    for _ in range(max(fewest, min(_MOST, int(_CASE_SECONDS / max(seconds, 1e-9))))):
        for b, ready in samplers.items():
            if rows[b.name].status == "published":
                with _recorded(rows[b.name], case.device):
                    rows[b.name].times.append(ready.sample())
    for b, ready in samplers.items():
        if rows[b.name].status == "published":
            with _recorded(rows[b.name], case.device):
                _judged(rows[b.name], judge(b.read(ready.output())))
        if rows[b.name].status != "published":
            rows[b.name].times.clear()
    timed_rows = [row for row in rows.values() if row.times]
    for row in timed_rows:
        row.info |= _figures(case, row, top)
        row.info["times_as_fast_as"] = {o.backend: ratio(row, o) for o in timed_rows if o is not row}


@contextlib.contextmanager
def _recorded(row: Row, device: torch.device) -> Iterator[None]:
    """Whatever is raised inside is why the row has no number; what runs on the device may fail after its launch."""
    _log.debug("%s, %s", row.group, row.backend)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
            timing.synchronize(device)
        except Exception as error:
            row.status, row.reason = "refused", one_line(error)
            _log.debug("refused: %s", row.reason)


def _call(backend: Backend, inputs: Any) -> Call:
    made = backend.prepare(inputs)
    return made if isinstance(made, Call) else Call(made)


def _judged(row: Row, found: Check) -> bool:
    row.check = found
    if found.red:
        row.status = "not in parity"
        row.reason = f"error {found.error:.2e}, allowed {found.allowed:.2e}"
    return not found.red


def _check_info(found: Check) -> dict[str, Any]:
    """Infinity is the string "inf": JSON has none."""
    values = {"error": found.error, "error_naive": found.reference, "error_allowed": found.allowed}
    return {name: value if math.isfinite(value) else str(value) for name, value in values.items()}


def _figures(case: Case, row: Row, top: timing.Ceilings) -> dict[str, Any]:
    seconds = statistics.median(row.times)
    moved, flops = case.cost()
    found = {
        "suite": case.suite,
        "operation": case.operation,
        "shape": case.shape,
        "series": case.series,
        "context": case.context,
        "backend": row.backend,
        "ours": row.ours,
        "device": top.device,
        "dtype": top.dtype,
        "threads": top.threads,
        "bytes": moved,
        "flops": flops,
        **_check_info(row.check),
    }
    if moved:
        found["gb_per_s"] = moved / seconds / 1e9
    if flops:
        found["tflop_per_s"] = flops / seconds / 1e12
    if moved or flops:
        least = top.seconds(moved, flops)
        bound = "memory" if moved / top.copy >= flops / top.matmul else "compute"
        found |= {"roofline_s": least, "roofline_share": least / seconds, "bound": bound}
        found["ceilings"] = {"copy_gb_per_s": top.copy / 1e9, "matmul_tflop_per_s": top.matmul / 1e12}
    if case.tokens:
        found["tokens_per_s"] = case.tokens / seconds
    if case.weights:
        found["gweights_per_s"] = case.weights / seconds / 1e9
    return found


def grid(cases: Sequence[Case]) -> pytest.MarkDecorator:
    """Parametrizes a test with `case` and `backend`, a name: one row each."""
    rows = [pytest.param(c, b.name, id=_slug(f"{c.group} {b.name}")) for c in cases for b in c.backends]
    return pytest.mark.parametrize(("case", "backend"), rows)


def _slug(text: str) -> str:
    """What `pytest -k` takes: letters, digits, - and _."""
    return re.sub(r"[^\w-]+", "_", text.replace("=", "")).strip("_")


def ratio(row: Row, other: Row) -> float:
    """How many times as fast `row` is as `other`: the median of the rounds' ratios."""
    return statistics.median(o / r for r, o in zip(row.times, other.times, strict=True))


def publish(benchmark: Any, row: Row) -> None:
    """Ends the test of a row: its times go to pytest-benchmark, or the test says why there are none. Only ours fails:
    that a peer is absent, refuses a shape or is wrong is a fact to be shown."""
    if row.status != "published":
        benchmark.skipped = True
        text = f"{row.status}: {row.backend}: {row.reason}"
        if row.ours and row.status != "absent":
            pytest.fail(f"{text}; no time is published", pytrace=False)
        pytest.skip(text)
    benchmark.group = row.group
    clock.load(row.times)
    benchmark.extra_info |= row.info
    benchmark.pedantic(clock.tick, rounds=max(1, len(row.times)))
