"""A row has a time only if its output is in parity, and everything that has none is named with its reason."""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench import timing
from bench.harness import Backend, Case, Row, close_to, equal_to, measure, needs, ratio, relative_error
from bench.timing import Call
from parity.budget import K, floor

ROOT = Path(__file__).parents[2]


def _square(x: torch.Tensor) -> torch.Tensor:
    return x * x


def _case(*backends: Backend, **options) -> Case:
    return Case(
        "sdpa",
        "square",
        "100",
        backends,
        make=lambda i: torch.arange(1, 101) / (i + 1),
        judge=lambda x: close_to([_square(x.double())], [_square(x)], torch.float32),
        cost=lambda: (800, 100),
        **options,
    )


def _measured(*backends: Backend, **options) -> dict[str, Row]:
    case = _case(*backends, **options)
    return measure(case, [b.name for b in backends])


def _raises(x: torch.Tensor) -> None:
    raise ValueError("takes no\nhead size of 100")


RIGHT = Backend("right", lambda x: lambda: _square(x), ours=True)
WRONG = {
    "a little off": lambda x: lambda: _square(x) * (1 + 1e-6),
    "NaN": lambda x: lambda: _square(x).index_fill(0, torch.tensor([5]), math.nan),
    "infinite": lambda x: lambda: _square(x).index_fill(0, torch.tensor([5]), math.inf),
    "another shape": lambda x: lambda: _square(x)[:-1],
    "two outputs": lambda x: lambda: [_square(x), _square(x)],
    "zeros": lambda x: lambda: torch.zeros_like(x),
}


@pytest.mark.parametrize("how", WRONG)
def test_a_wrong_backend_publishes_nothing(how: str) -> None:
    rows = _measured(RIGHT, Backend(how, WRONG[how]))
    assert rows["right"].status == "published"
    assert rows["right"].times
    assert rows["right"].info["times_as_fast_as"] == {}
    assert rows[how].status == "not in parity"
    assert not rows[how].times
    assert "gb_per_s" not in rows[how].info
    assert rows[how].check.error > rows[how].check.allowed
    assert "allowed" in rows[how].reason


def test_what_was_timed_is_checked_too() -> None:
    """The first call is right, those that are timed are not."""

    def prepare(x: torch.Tensor) -> Call:
        calls = itertools.count()
        return Call(lambda: _square(x) if next(calls) == 0 else torch.zeros_like(x))

    row = _measured(RIGHT, Backend("lazy", prepare))["lazy"]
    assert (row.status, row.times) == ("not in parity", [])


def test_before_every_timed_call_what_it_needs_is_done() -> None:
    """A call that runs once for each `before`, as one that goes on in a cache of limited room."""
    ready: list[int] = []

    def prepare(x: torch.Tensor) -> Call:
        def run() -> torch.Tensor:
            ready.pop()
            return _square(x)

        return Call(run, before=lambda: ready.append(1))

    row = _measured(RIGHT, Backend("once", prepare), rotate=False)["once"]
    assert row.times
    assert ready == []


def test_a_call_that_fails_after_a_while_has_no_number() -> None:
    def prepare(x: torch.Tensor) -> Call:
        calls = itertools.count()
        return Call(lambda: _square(x) if next(calls) < 500 else _raises(x))

    rows = _measured(RIGHT, Backend("tired", prepare), rotate=False)
    assert (rows["tired"].status, rows["tired"].times) == ("refused", [])
    assert rows["right"].times


def test_absent_and_refused_are_named_with_their_reason() -> None:
    absent = Backend("gone", _raises, absent=needs("no_such_module_here"))
    rows = _measured(RIGHT, absent, Backend("picky", _raises), Backend("late", lambda x: lambda: _raises(x)))
    assert (rows["gone"].status, rows["gone"].reason) == ("absent", "no_such_module_here is not installed")
    for name in ("picky", "late"):
        assert (rows[name].status, rows[name].reason) == ("refused", "ValueError: takes no head size of 100")
    assert rows["right"].times


def test_nothing_is_timed_when_benchmarks_are_disabled() -> None:
    case = _case(RIGHT, Backend("wrong", WRONG["zeros"]))
    rows = measure(case, ["right", "wrong"], enabled=False)
    assert not rows["right"].times
    assert (rows["right"].status, rows["wrong"].status) == ("published", "not in parity")


def test_a_group_without_inputs_has_no_numbers_and_does_not_stop_the_run() -> None:
    case = Case("sdpa", "square", "100", [RIGHT], make=_raises, judge=lambda x: equal_to(x))
    row = measure(case, ["right"])["right"]
    assert (row.status, row.reason) == ("refused", "ValueError: takes no head size of 100")


def test_figures_follow_from_bytes_operations_and_the_median() -> None:
    info = _measured(RIGHT, tokens=7)["right"].info
    seconds = 800 / info["gb_per_s"] / 1e9
    assert info["tflop_per_s"] == pytest.approx(100 / seconds / 1e12)
    assert info["tokens_per_s"] == pytest.approx(7 / seconds)
    assert info["roofline_share"] == pytest.approx(info["roofline_s"] / seconds)
    top = info["ceilings"]
    least = max(800 / top["copy_gb_per_s"] / 1e9, 100 / top["matmul_tflop_per_s"] / 1e12)
    assert info["roofline_s"] == pytest.approx(least)
    assert info["bound"] == "memory"


@given(st.floats(-30, 0))
def test_the_budget_is_twice_the_naive_error_and_the_floor(exponent: float) -> None:
    truth = torch.arange(1, 11).double() / 3
    error = 2.0**exponent
    found = close_to([truth], [truth.float()], torch.float32)(truth * (1 + error))
    naive = relative_error(truth.float(), truth)
    assert found.allowed == K * naive + floor(torch.float32)
    assert found.red == (found.error > found.allowed)
    assert found.error == pytest.approx(error, rel=1e-6)


@given(st.integers(0, 9), st.sampled_from([math.nan, math.inf, -math.inf]))
def test_no_output_is_left_out_of_the_error(at: int, value: float) -> None:
    truth = torch.arange(1, 11).double()
    assert relative_error(truth, truth) == 0
    assert relative_error(truth.index_fill(0, torch.tensor([at]), value), truth) == math.inf
    assert relative_error(truth[:at], truth) == math.inf


@given(st.integers(0, 31))
def test_equal_outputs_are_the_same_bits(bit: int) -> None:
    want = torch.tensor([1.0, math.nan, -0.0])
    judge = equal_to(want)
    assert not judge(want.clone()).red
    changed = (want.view(torch.int32) ^ torch.tensor([0, 0, (1 << bit) - (1 << 32) * (bit == 31)])).int()
    assert judge(changed.view(torch.float32)).error == pytest.approx(1 / 3)
    assert judge(want[:2]).red


@given(st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=9), st.floats(0.1, 10))
def test_ratios_are_of_the_same_round(times: list[float], factor: float) -> None:
    row, other = (Row(name, "group", "sdpa", False) for name in ("row", "other"))
    row.times, other.times = times, [time * factor for time in times]
    assert ratio(row, other) == pytest.approx(factor)


@given(st.integers(1, 1 << 32))
def test_working_sets_are_larger_than_the_cache(nbytes: int) -> None:
    device = torch.device("cpu")
    count = timing.working_sets(nbytes, device)
    assert 1 <= count <= 64
    assert count == 64 or count * nbytes >= 2 * timing.cache_bytes(device)


def test_ceilings_bound_what_a_call_can_reach() -> None:
    top = timing.Ceilings("CPU", "float32", 1, copy=1e9, matmul=1e12)
    assert top.seconds(2e9, 1e12) == 2
    assert top.seconds(1e9, 3e12) == 3


@pytest.mark.cuda
def test_device_time_of_a_copy_is_that_of_the_ceiling() -> None:
    device = torch.device("cuda")
    pairs = [(torch.ones(1 << 26, device=device), torch.empty(1 << 26, device=device)) for _ in range(2)]
    calls = [Call(lambda a=a, b=b: b.copy_(a)) for a, b in pairs]
    sampler = timing.sampler(calls, device)
    speed = 2 * pairs[0][0].nbytes / min(sampler.sample() for _ in range(5))
    assert sampler.method == "graph"
    assert 0.8 < speed / timing.ceilings(device, torch.bfloat16).copy < 1.1


@pytest.mark.cuda
def test_a_graph_keeps_what_its_calls_hold() -> None:
    """What `prepare` made for a working set is in nobody else's hands."""
    device = torch.device("cuda")

    def prepare(x: torch.Tensor) -> Call:
        held = x.expand(1 << 22, 4).contiguous()
        return Call(lambda: held.sum())

    sampler = timing.sampler([prepare(torch.full((4,), i + 1.0, device=device)) for i in range(3)], device)
    others = [torch.full((1 << 22, 4), 7.0, device=device) for _ in range(3)]
    sampler.sample()
    assert float(sampler.output()) == 4 << 22
    assert {float(run()) for run in sampler.calls} == {4 << 22, 8 << 22, 12 << 22}
    del others


@pytest.mark.cuda
def test_a_call_that_synchronizes_is_timed_by_events() -> None:
    x = torch.ones(1 << 20, device="cuda")
    sampler = timing.sampler([Call(lambda: x.sum().item())], torch.device("cuda"))
    assert sampler.method == "events"
    assert sampler.sample() > 0
    assert torch.randn(4, device="cuda").isfinite().all(), "random numbers can still be drawn"


SUITE = """
import torch
from bench.harness import Backend, Case, close_to, grid, needs, publish, timed

square = lambda x: lambda: x * x
BACKENDS = [
    Backend("gemma4", square, ours=True),
    Backend("peer", square),
    Backend("off", lambda x: lambda: x * x * 1.01, ours={ours}),
    Backend("gone", square, absent=needs("no_such_module_here")),
]
CASE = Case(
    "sdpa", "square", "tiny", BACKENDS, make=lambda i: torch.ones(64),
    judge=lambda x: close_to([x.double() ** 2], [x * x], torch.float32), cost=lambda: (512, 64),
)


@timed
@grid([CASE])
def test_square(benchmark, rows, case, backend):
    publish(benchmark, rows(case)[backend])
"""


@pytest.mark.parametrize("ours", [False, True])
def test_a_run_names_what_it_does_not_publish(tmp_path: Path, ours: bool) -> None:
    """A wrong peer is shown; a wrong backend of ours fails the run as well."""
    (tmp_path / "test_square.py").write_text(SUITE.format(ours=ours))
    out = tmp_path / "run.json"
    command = [sys.executable, "-m", "pytest", str(tmp_path), "-p", "bench.conftest", "--benchmark-only", "-q"]
    command += [f"--benchmark-json={out}", "-p", "no:cacheprovider", f"--rootdir={tmp_path}"]
    # In a worker of a parallel run, pytest-benchmark would turn itself off.
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == int(ours), done.stdout + done.stderr
    assert "gone: no_such_module_here is not installed" in done.stdout
    assert "square, tiny, off: not in parity" in done.stdout
    assert "square, tiny, gemma4: " in done.stdout
    run = json.loads(out.read_text())
    assert {row["extra_info"]["backend"] for row in run["benchmarks"]} == {"gemma4", "peer"}
    for row in run["benchmarks"]:
        info, stats = row["extra_info"], row["stats"]
        assert row["group"] == "square, tiny"
        assert 512 / stats["median"] / 1e9 == pytest.approx(info["gb_per_s"])
        assert stats["rounds"] >= 5
        assert info["timer"] == "wall"
    assert {(row["backend"], row["status"]) for row in run["unpublished"]} == {
        ("off", "not in parity"),
        ("gone", "absent"),
    }
    off = next(row for row in run["unpublished"] if row["backend"] == "off")
    assert off["error"] == pytest.approx(0.01, rel=1e-4)
    assert not {"median", "gb_per_s"} & set(off)
    assert set(run["machine_info"]) == {"system", "machine", "python_version", "cpu", "gpu", "versions"}
