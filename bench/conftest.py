"""Measures a group when its first row is asked for, and says at the end what no table of times shows."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench import results
from bench.harness import Case, Row, measure

_ROWS = pytest.StashKey[dict[str, dict[str, Row]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_ROWS] = {}


@pytest.fixture
def rows(request: pytest.FixtureRequest) -> Callable[[Case], dict[str, Row]]:
    """case -> its rows, by backend; the whole group is measured at once, as far as its rows were selected."""
    known = request.config.stash[_ROWS]

    def of(case: Case) -> dict[str, Row]:
        if case.group not in known:
            enabled = not request.getfixturevalue("benchmark").disabled
            names = [
                item.callspec.params["backend"]
                for item in request.session.items
                if getattr(item, "callspec", None) and item.callspec.params.get("case") is case
            ]
            known[case.group] = measure(case, names, enabled)
        return known[case.group]

    return of


def _all(config: pytest.Config) -> list[Row]:
    return [row for group in config.stash[_ROWS].values() for row in group.values()]


@pytest.hookimpl
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """What figures depend on, and no name of a host."""
    cpu = {key: machine_info["cpu"].get(key) for key in ("brand_raw", "count", "arch")}
    kept = {key: machine_info[key] for key in ("system", "machine", "python_version")}
    machine_info.clear()
    machine_info |= kept | {"cpu": cpu, "gpu": results.gpu(), "versions": results.versions()}


@pytest.hookimpl
def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    for key in ("project", "branch"):
        commit_info.pop(key, None)


@pytest.hookimpl
def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Beside the rows with numbers, those without; single rounds are left out."""
    for bench in output_json["benchmarks"]:
        bench["stats"].pop("data", None)
        for key in ("options", "params", "param"):
            bench.pop(key, None)
    output_json["unpublished"] = [row.unpublished() for row in _all(config) if row.status != "published"]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    write, found = terminalreporter.write_line, _all(config)
    measured = [row for row in found if row.times]
    if measured:
        terminalreporter.section("ours against peers, median of the rounds' ratios")
        for row in measured:
            faster = row.info["times_as_fast_as"]
            if row.ours and faster:
                write(f"{row.group}, {row.backend}: " + ", ".join(f"{x:.2f} x {name}" for name, x in faster.items()))
        tops = {
            (row.info["device"], row.info["dtype"], row.info["threads"]): row.info["ceilings"]
            for row in measured
            if "ceilings" in row.info
        }
        for (device, dtype, threads), top in tops.items():
            on = device if threads is None else f"{device}, {threads} threads"
            speeds = f"copy {top['copy_gb_per_s']:.0f} GB/s, {dtype} matmul {top['matmul_tflop_per_s']:.2f} TFLOP/s"
            write(f"ceilings, {on}: {speeds}")
    hidden = [row for row in found if row.status in ("refused", "not in parity")]
    if hidden:
        terminalreporter.section("rows without a number")
        for row in hidden:
            write(f"{row.group}, {row.backend}: {row.status}: {row.reason}")
    absent = {(row.backend, row.reason) for row in found if row.status == "absent"}
    if absent:
        terminalreporter.section("absent")
        for backend, reason in sorted(absent):
            write(f"{backend}: {reason}")


@pytest.fixture(autouse=True)
def _threads():
    """A benchmark sets as many as it needs."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
