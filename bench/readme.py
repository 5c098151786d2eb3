"""Writes the README's benchmark tables from runs, a section for each machine:
`python -m bench.readme docs/bench/*.json`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.report import SUITES
from bench.results import Published, Results, ResultsError, load, machine_line, seconds
from gemma4_impl.files import replacing

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
README = Path(__file__).parents[1] / "README.md"
_IN_TOKENS = ("prefill", "decode")
"""Suites whose cells are tokens a second; those of the others are times."""


def tables(paths: Sequence[Path]) -> str:
    """All sections; files of the same machine and versions are one."""
    machines: dict[str, list[Path]] = {}
    for path in paths:
        machines.setdefault(machine_line(load(path).machines[0]), []).append(path)
    return "\n\n".join(section(files) for files in machines.values())


def section(paths: Sequence[Path]) -> str:
    """Tables of one machine: for each operation a row for each shape but tiny ones, a column for each backend, the
    fastest in bold."""
    results = load(*paths)
    lines = [f"**{machine_line(results.machines[0])}** ({', '.join(f'`{_named(path)}`' for path in paths)})."]
    tops = [
        f"copy {top['copy_gb_per_s']:,.0f} GB/s, {dtype} matmul {top['matmul_tflop_per_s']:,.3g} TFLOP/s"
        for (_, dtype, threads), top in results.ceilings.items()
        if threads in (None, max(threads or 0 for *_, threads in results.ceilings))
    ]
    if tops:
        lines[0] += f" Ceilings in the same run: {'; '.join(tops)}."
    operations: dict[tuple[str, str], list[str]] = {}
    for row in results.published:
        shape = row.info.get("shape", "")
        if row.info.get("suite") in SUITES and not shape.startswith("tiny"):
            operations.setdefault((row.info["suite"], row.info["operation"]), []).append(row.group)
    for (suite, operation), groups in sorted(operations.items(), key=lambda item: [*SUITES].index(item[0][0])):
        lines += ["", *_table(results, suite, operation, list(dict.fromkeys(groups)))]
    if results.absent:
        names = "; ".join(f"{backend} ({reason})" for backend, reason in results.absent)
        lines += ["", f"Absent from this run: {names}."]
    return "\n".join(lines)


def _table(results: Results, suite: str, operation: str, groups: Sequence[str]) -> list[str]:
    found = {group: results.of(group) for group in groups}
    rows = [row for published, _ in found.values() for row in published]
    backends = list(dict.fromkeys(row.backend for row in sorted(rows, key=lambda row: not row.ours)))
    head = f"{operation}, tokens/s" if suite in _IN_TOKENS else operation
    floors = any(row.info.get("roofline_s") for row in rows)
    lines = ["| " + " | ".join([head, *backends, *(["roofline", "reached"] if floors else [])]) + " |"]
    lines.append("|---|" + "---:|" * (len(backends) + 2 * floors))
    for published, unpublished in found.values():
        cells = {row.backend: _cell(row, suite) for row in published}
        cells |= {row.backend: "wrong" for row in unpublished if row.status == "not in parity"}
        cells |= {row.backend: "refuses" for row in unpublished if row.status == "refused"}
        if len(published) > 1:
            cells[published[0].backend] = f"**{cells[published[0].backend]}**"
        row = [published[0].info["shape"], *(cells.get(backend, "-") for backend in backends)]
        if floors:
            row += _floor(published, suite)
        lines.append("| " + " | ".join(row) + " |")
    return lines


def _cell(row: Published, suite: str) -> str:
    return f"{row.info['tokens_per_s']:,.0f}" if suite in _IN_TOKENS else seconds(row.median)


def _floor(published: Sequence[Published], suite: str) -> list[str]:
    """The least time (or most tokens a second), and the share of it that ours reaches: its fastest row's."""
    row = next((row for row in published if row.ours), published[0])
    least = row.info.get("roofline_s")
    if not least:
        return ["-", "-"]
    tokens = row.info.get("tokens_per_s", 0) * row.median
    share = f"{100 * row.info['roofline_share']:.0f} %" if row.ours else "-"
    return [f"{tokens / least:,.0f}" if suite in _IN_TOKENS else seconds(least), share]


def replaced(text: str, inside: str) -> str:
    """`text` with `inside` between the two markers. Raises ValueError unless each of them is there once, in order."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"needs one line {BEGIN} and after it one line {END}")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{inside}\n\n{END}{rest.split(END)[1]}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.readme", description=__doc__)
    parser.add_argument("json", nargs="+", type=Path)
    parser.add_argument("--readme", type=Path, default=README)
    args = parser.parse_args(arguments)
    try:
        text = args.readme.read_text(encoding="utf-8")
        text = replaced(text, tables(args.json))
        with replacing(args.readme) as path:
            path.write_text(text, encoding="utf-8")
    except ResultsError as error:
        print(error, file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:
        print(f"{args.readme}: {error}", file=sys.stderr)
        return 2
    return 0


def _named(path: Path) -> str:
    root = README.parent
    return str(path.resolve().relative_to(root)) if path.resolve().is_relative_to(root) else path.name


if __name__ == "__main__":
    sys.exit(main())
