"""Compares two benchmark runs row by row: `python -m bench.compare OLD.json NEW.json [--threshold 1.1]`.

Exits with 0 if no row is slower by the threshold or has lost its number, 1 if one is or has, 2 for bad files."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from bench.results import Results, ResultsError, load, machine_line, seconds
from parity.formats import simple_table, write_line

THRESHOLD = 1.1


@dataclass(frozen=True)
class Change:
    """A row of both runs, or of one: medians in seconds, None where it has no number."""

    group: str
    backend: str
    old: float | None
    new: float | None
    lost: str = ""
    """Why a row that had a number has none now: refused, or not in parity. Absent backends are none of it."""

    @property
    def ratio(self) -> float | None:
        """New time over old."""
        return self.new / self.old if self.old is not None and self.new is not None else None

    def regressed(self, threshold: float) -> bool:
        return bool(self.lost) or (self.ratio is not None and self.ratio > threshold)

    def improved(self, threshold: float) -> bool:
        return self.ratio is not None and self.ratio < 1 / threshold


def changes(old: Results, new: Results) -> list[Change]:
    """Every row that has a number in either run, in the order of the old one."""
    before, after = ({(r.group, r.backend): r.median for r in run.published} for run in (old, new))
    why = {(r.group, r.backend): f"{r.status}: {r.reason}" for r in new.unpublished if r.status != "absent"}
    return [
        Change(*key, before.get(key), after.get(key), why.get(key, "") if key in before else "")
        for key in dict.fromkeys([*before, *after])
    ]


def print_changes(found: Sequence[Change], threshold: float, console: Console) -> None:
    """A line for each row that changed by the threshold, lost its number, or is in one run only; then the count."""
    table = simple_table("row", "old", "new", "new / old", "")
    shown = 0
    for change in sorted(found, key=lambda c: -(c.ratio or 0)):
        note, style = "", None
        if change.regressed(threshold):
            note, style = change.lost or "slower", "red"
        elif change.improved(threshold):
            note, style = "faster", "green"
        elif change.ratio is None:
            note = "only in the new run" if change.old is None else "only in the old run"
        if note:
            times = ("-" if time is None else seconds(time) for time in (change.old, change.new))
            times = (*times, "-" if change.ratio is None else f"{change.ratio:.3f}")
            table.add_row(Text(f"{change.group}, {change.backend}"), *times, Text(note), style=style)
            shown += 1
    if shown:
        console.print(table)
    both = [change for change in found if change.ratio is not None]
    slower = sum(change.regressed(threshold) for change in found)
    faster = sum(change.improved(threshold) for change in found)
    text = f"{len(both)} rows in both runs: {slower} regressed, {faster} faster, by {threshold:g} times or more"
    write_line(console, text, "bold red" if slower else "bold green")


def _threshold(text: str) -> float:
    value = float(text)
    if not 1 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__.splitlines()[0])
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--threshold", type=_threshold, default=THRESHOLD, help="times as slow as before that counts")
    args = parser.parse_args(arguments)
    try:
        old, new = load(args.old), load(args.new)
    except ResultsError as error:
        print(error, file=sys.stderr)
        return 2
    console = Console()
    if old.machines != new.machines:
        for name, run in (("old", old), ("new", new)):
            write_line(console, f"{name}: " + "; ".join(map(machine_line, run.machines)))
        write_line(console, "the machines or versions differ", "yellow")
    found = changes(old, new)
    print_changes(found, args.threshold, console)
    return int(any(change.regressed(args.threshold) for change in found))


if __name__ == "__main__":
    sys.exit(main())
