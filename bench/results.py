"""The JSON of benchmark runs: what a run says of its machine, and the rows of one or more files read back."""

import importlib.metadata
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "transformers", "jax", "flax", "executorch", "gemlite", "torchao", "gguf", "numpy")


class ResultsError(ValueError):
    """A file that is not the JSON of a benchmark run; the message names it."""


def gpu() -> str | None:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def versions() -> dict[str, str]:
    """Of the packages that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["CUDA"] = torch.version.cuda
    return found


@dataclass(frozen=True)
class Published:
    """A row with a number; times in seconds."""

    group: str
    backend: str
    median: float
    low: float
    """The first quartile."""
    high: float
    """The third."""
    rounds: int
    info: dict[str, Any]
    """`extra_info` of the JSON."""

    @property
    def ours(self) -> bool:
        return bool(self.info.get("ours"))


@dataclass(frozen=True)
class Unpublished:
    """A row without one, and why."""

    group: str
    backend: str
    status: str
    reason: str
    info: dict[str, Any]


@dataclass
class Results:
    """What one or more files hold."""

    published: list[Published] = field(default_factory=list)
    unpublished: list[Unpublished] = field(default_factory=list)
    machines: list[dict[str, Any]] = field(default_factory=list)
    """Distinct `machine_info`, in the order of the files."""
    dates: list[str] = field(default_factory=list)

    @property
    def groups(self) -> list[str]:
        """In the order in which they were measured."""
        return list(dict.fromkeys(row.group for row in [*self.published, *self.unpublished]))

    @property
    def absent(self) -> list[tuple[str, str]]:
        """(backend, reason) of those that were nowhere present."""
        return sorted({(row.backend, row.reason) for row in self.unpublished if row.status == "absent"})

    @property
    def ceilings(self) -> dict[tuple[str, str, int | None], dict[str, float]]:
        """(device, dtype, threads) -> copy_gb_per_s and matmul_tflop_per_s, the best of the files'."""
        found: dict[tuple, dict[str, float]] = {}
        for row in self.published:
            if top := row.info.get("ceilings"):
                key = row.info["device"], row.info["dtype"], row.info["threads"]
                before = found.setdefault(key, dict(top))
                found[key] = {name: max(value, before[name]) for name, value in top.items()}
        return found

    def of(self, group: str) -> tuple[list[Published], list[Unpublished]]:
        """The rows of a group, fastest first."""
        published = sorted((row for row in self.published if row.group == group), key=lambda row: row.median)
        return published, [row for row in self.unpublished if row.group == group]


def load(*paths: str | Path) -> Results:
    """Reads files that `--benchmark-json` wrote. A row in several files is taken from the last one.

    Raises ResultsError for a file that cannot be read or is none of these."""
    published: dict[tuple[str, str], Published] = {}
    unpublished: dict[tuple[str, str], Unpublished] = {}
    result = Results()
    for path in paths:
        try:
            raw = json.loads(Path(path).read_text(encoding="utf-8"))
            rows = [_published(entry) for entry in raw["benchmarks"]]
            without = [_unpublished(entry) for entry in raw.get("unpublished", [])]
            machine, date = dict(raw["machine_info"]), str(raw["datetime"])
        except OSError as error:
            raise ResultsError(f"{path}: {error.strerror or error}") from None
        except (ValueError, RecursionError):
            raise ResultsError(f"{path}: not JSON of a benchmark run") from None
        except (KeyError, TypeError, AttributeError) as error:
            raise ResultsError(f"{path}: not JSON of a benchmark run ({error!r})") from None
        for row in [*rows, *without]:
            key = row.group, row.backend
            published.pop(key, None)
            unpublished.pop(key, None)
            (published if isinstance(row, Published) else unpublished)[key] = row
        if machine not in result.machines:
            result.machines.append(machine)
        result.dates.append(date)
    result.published, result.unpublished = list(published.values()), list(unpublished.values())
    return result


def _published(entry: dict[str, Any]) -> Published:
    stats, info = entry["stats"], dict(entry["extra_info"])
    times = [float(stats[name]) for name in ("median", "q1", "q3")]
    if not all(math.isfinite(time) and time > 0 for time in times):
        raise ValueError
    # Benchmarks that compare no backends have a name only.
    group, backend = str(entry["group"] or entry["fullname"]), str(info.get("backend", entry["name"]))
    return Published(group, backend, *times, int(stats["rounds"]), info)


def _unpublished(entry: dict[str, Any]) -> Unpublished:
    names = ("group", "backend", "status", "reason")
    return Unpublished(*(str(entry[name]) for name in names), {k: v for k, v in entry.items() if k not in names})


def seconds(value: float, short: bool = False) -> str:
    """With a unit, and three digits unless `short`."""
    unit, size = next(((u, s) for u, s in (("s", 1.0), ("ms", 1e-3)) if value >= s), ("µs", 1e-6))
    return f"{value / size:.3g} {unit}" if short else f"{_digits(value / size)} {unit}"


def _digits(value: float) -> str:
    """Three of them."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}" if value > 0 else "0"


def machine_line(machine: dict[str, Any]) -> str:
    """A machine and its versions in a line."""
    cpu = machine.get("cpu") or {}
    processor = f"{cpu.get('brand_raw') or machine.get('machine')}, {cpu.get('count')} cores"
    named = ", ".join(f"{name} {version}" for name, version in (machine.get("versions") or {}).items())
    return f"{machine.get('gpu') or processor}; Python {machine.get('python_version')}, {named}"
