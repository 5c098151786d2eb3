"""Prints, after the benchmarks, how much faster ours is than each peer, measured in turn within one run."""

from typing import Any

import pytest


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    ratios = {
        name: value
        for bench in getattr(session, "benchmarks", ())
        for name, value in bench.extra_info.items()
        if ": times as fast as " in name
    }
    if ratios:
        terminalreporter.section("ours against peers, median of the rounds' ratios")
        for name, value in ratios.items():
            terminalreporter.write_line(f"{name} {value:.2f}")
