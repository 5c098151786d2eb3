"""Prints, after the benchmarks, how each of ours compares with its peer in the same run."""

from collections import defaultdict
from typing import Any

import pytest


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    groups: dict[str, dict[str, float]] = defaultdict(dict)
    for bench in getattr(session, "benchmarks", ()):
        if bench.stats.rounds:
            groups[bench.group][bench.extra_info.get("backend", bench.name)] = bench.stats.median
    lines = []
    for group, medians in groups.items():
        ours = medians.pop("ours", None)
        lines += [f"{group}: ours {peer / ours:.2f}x as fast as {name}" for name, peer in medians.items() if ours]
    if lines:
        terminalreporter.section("ours against peers, medians of this run")
        terminalreporter.write_line("\n".join(lines))
