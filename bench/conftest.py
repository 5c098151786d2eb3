"""Prints, after the benchmarks, speeds, and how much faster ours is than each peer, measured in turn within one run."""

from typing import Any

import pytest


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    for title, part in (
        ("speeds, medians", "weights/s"),
        ("ours against peers, median of the rounds' ratios", ": times as"),
    ):
        rows = {
            name: value
            for bench in getattr(session, "benchmarks", ())
            for name, value in bench.extra_info.items()
            if part in name
        }
        if rows:
            terminalreporter.section(title)
            for name, value in rows.items():
                terminalreporter.write_line(f"{name} {value:.2f}")
