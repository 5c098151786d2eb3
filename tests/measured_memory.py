"""Peak memory of code that runs in a process of its own: `run` starts it, and `watched` measures in there."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

MEASURABLE = Path("/proc/self/status").exists()
"""Whether this system tells a process's memory as Linux does."""


def run(code: str, *arguments: str, **environment: str) -> str:
    """What `code` prints; it can import what tests can. Fails with its error if it has one."""
    root = Path(__file__).parents[1]
    path = os.pathsep.join(map(str, (root, root / "tests")))
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=root,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def resident(kind: str) -> float:
    """MB: `RssAnon`, which a process owns, or `VmRSS`, mapped pages of files among it."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(kind + ":")) / 1024


@dataclass
class Watched:
    peak: float = 0.0
    """MB above what it was at first."""


@contextmanager
def watched(kind: str = "RssAnon") -> Iterator[Watched]:
    """Samples `resident(kind)` every half millisecond while the block runs, and at its end."""
    sys.setswitchinterval(1e-4)
    done, found, start = threading.Event(), Watched(), resident(kind)

    def sample() -> None:
        while not done.wait(0.0005):
            found.peak = max(found.peak, resident(kind) - start)

    watcher = threading.Thread(target=sample, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        found.peak = max(found.peak, resident(kind) - start)
        done.set()
        watcher.join()
