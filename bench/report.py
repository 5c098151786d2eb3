"""Benchmark results as one self-contained page: `python -m bench.report RUN.json... -o report.html`."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup

from bench import plots
from bench.results import Published, Results, ResultsError, Unpublished, load, machine_line, seconds
from gemma4_impl.files import replacing
from parity.budget import K

SUITES = {
    "prefill": "Prefill",
    "decode": "Decode",
    "sdpa": "Attention",
    "int4_linear": "Four-bit linears",
    "load": "Loading",
}


@dataclass(frozen=True)
class Group:
    """A section of the page: the rows of one operation on one shape."""

    name: str
    published: Sequence[Published]
    unpublished: Sequence[Unpublished]
    figure: Markup | None

    @property
    def times(self) -> float | None:
        """As fast as the fastest peer that ours, its fastest, is; None without both."""
        ours, peers = ([row.median for row in self.published if row.ours == kind] for kind in (True, False))
        return min(peers) / min(ours) if ours and peers else None

    @property
    def verdict(self) -> str:
        if self.times is None:
            return ""
        peer = next(row.backend for row in self.published if not row.ours)
        return f"{self.times:.2f} x as fast as the fastest peer, {peer}"


def to_html(results: Results) -> str:
    """The page; needs no other file and no network."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"seconds": seconds, "size": _size, "error": _error, "figure": _figure}
    suites: dict[str, list[Group]] = {}
    for name in results.groups:
        group = _group(results, name)
        rows = [*group.published, *group.unpublished]
        suites.setdefault(str(rows[0].info.get("suite", "other")), []).append(group)
    compared = [group.times for groups in suites.values() for group in groups if group.times is not None]
    order = [*SUITES, *(suite for suite in suites if suite not in SUITES)]
    return environment.get_template("report.html.j2").render(
        machines=[machine_line(machine) for machine in results.machines],
        dates=sorted(set(results.dates)),
        ceilings=results.ceilings,
        absent=results.absent,
        k=K,
        rows=len(results.published),
        groups=len(results.groups),
        ahead=sum(times >= 1 for times in compared),
        compared=len(compared),
        rooflines=_rooflines(results),
        contexts=_contexts(results),
        suites=[(SUITES.get(suite, suite), suites[suite]) for suite in order if suite in suites],
    )


def _group(results: Results, name: str) -> Group:
    published, unpublished = results.of(name)
    figure = plots.bars(published, f"{name}: median times") if published else None
    return Group(name, published, unpublished, figure)


def _rooflines(results: Results) -> list[tuple[str, Markup]]:
    """A figure for each device, dtype and number of threads, of the rows whose bytes and operations are counted."""
    figures = []
    for (device, dtype, threads), top in results.ceilings.items():
        rows = [
            row
            for row in results.published
            if "ceilings" in row.info
            and (row.info["device"], row.info["dtype"], row.info["threads"]) == (device, dtype, threads)
            and row.info["bytes"]
            and row.info["flops"]
        ]
        on = device if threads is None else f"{device}, {threads} thread{'s' * (threads > 1)}"
        if rows:
            speeds = top["copy_gb_per_s"] * 1e9, top["matmul_tflop_per_s"] * 1e12
            figures.append((f"{on}, {dtype}", plots.roofline(rows, *speeds, f"roofline of {on}, {dtype}")))
    return figures


def _contexts(results: Results) -> list[tuple[str, Markup]]:
    """A figure for each operation and series with two contexts or more."""
    series: dict[tuple[str, str], dict[str, list[Published]]] = {}
    for row in sorted(results.published, key=lambda row: not row.ours):
        if row.info.get("context"):
            key = row.info["operation"], row.info["series"]
            series.setdefault(key, {}).setdefault(row.backend, []).append(row)
    figures = []
    for (operation, name), lines in series.items():
        if len({row.info["context"] for rows in lines.values() for row in rows}) > 1:
            title = f"{operation}, {name}"
            figures.append((title, plots.against_context(lines, f"{title}: time against context")))
    return figures


def _size(value: float | None) -> str:
    if not value:
        return "-" if value is None else "0"
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:,.3g} {unit}"
    return f"{value:.0f} B"


def _error(value: float | str | None) -> str:
    return "-" if value is None else value if isinstance(value, str) else f"{value:.1e}" if value else "0"


def _figure(value: float | None, scale: float = 1.0) -> str:
    return "-" if value is None else f"{value * scale:,.3g}" if value * scale < 1000 else f"{value * scale:,.0f}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("json", nargs="+", help="what --benchmark-json wrote")
    parser.add_argument("-o", "--output", default="build/bench/report.html")
    args = parser.parse_args(arguments)
    try:
        page = to_html(load(*args.json))
    except ResultsError as error:
        print(error, file=sys.stderr)
        return 2
    with replacing(args.output) as path:
        path.write_text(page, encoding="utf-8")
    print(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
