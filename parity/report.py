"""Turns an `engine.Report` into report.json, a self-contained report.html, and a table for the terminal."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
from rich.console import Console
from rich.text import Text

from gemma4_impl.files import replacing
from gemma4_impl.taps import VISION
from parity import budget, plots, plots_images
from parity.compare import Comparison, Divergence, TapResult
from parity.engine import DTYPES, Case, Report
from parity.formats import cosine, count, plain, ratio, sci, simple_table, write_line
from parity.report_quantized import print_splits, section, split_json, split_name, tensor_reasons
from parity.report_three_way import print_three_way, three_way_json, three_way_reasons, three_way_section

FORMAT = "gemma4-parity-1"

_SHOWN_FLIPS = 50
_SHOWN_RED = 12
_NAMED_TAPS = 8
_LISTED_TAPS = 10


def to_json(report: Report, meta: Mapping[str, Any]) -> dict[str, Any]:
    """The report as strict JSON: `json.dumps(..., allow_nan=False)` accepts it.

    `summary` has the verdict and the worst case, `cases` every comparison, tap by tap, `quantized` an entry for each
    quantized candidate (`report_quantized.split_json`), and `three_way` one for each checkpoint and dtype in which both
    our models were held against transformers (`report_three_way.three_way_json`). Infinities and NaN are the strings
    "inf", "-inf" and "nan", which `float` reads back; null means that there is nothing (no local run, no first
    divergence). `k`, `floors` and, if `meta` has none, `created` are added to it."""
    worst = report.worst
    tap = worst.comparison.worst if worst else None
    top1 = [c.comparison.logits.top1 for c in report.cases if c.dtype == "float32" and c.comparison.logits]
    return _strict(
        {
            "format": FORMAT,
            "meta": {
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                **meta,
                "k": budget.K,
                "floors": {name: budget.floor(dtype) for name, dtype in DTYPES.items()},
            },
            "summary": {
                "cases": len(report.cases),
                "red": len(report.red),
                "verdict": "red" if report.failed or not report.cases else "green",
                "worst_ratio": worst.comparison.worst_ratio if worst else None,
                "worst": {
                    "checkpoint": worst.checkpoint,
                    "dtype": worst.dtype,
                    "path": worst.path,
                    "candidate": worst.candidate,
                    "tap": tap.name if tap else None,
                    "check": _decisive(tap) if tap else None,
                }
                if worst
                else None,
                "top1_float32": min(top1, default=None),
            },
            "cases": [_case(case) for case in report.cases],
            "quantized": [split_json(split) for split in report.splits],
            "three_way": [three_way_json(entry) for entry in report.three_way],
        }
    )


def write(report: Report, folder: str | Path, meta: Mapping[str, Any]) -> None:
    """Writes report.json and report.html to `folder`, which is made if need be. Both are complete before either one
    replaces an older one; on an error the older ones stay."""
    data = to_json(report, meta)
    text = json.dumps(data, allow_nan=False, separators=(",", ":")) + "\n"
    page = to_html(report, data)
    with replacing(Path(folder) / "report.json") as json_path, replacing(Path(folder) / "report.html") as html_path:
        json_path.write_text(text, encoding="utf-8")
        # A folder name that is not Unicode reaches us as lone surrogates, which UTF-8 cannot hold.
        html_path.write_text(page, encoding="utf-8", errors="backslashreplace")


def to_html(report: Report, data: Mapping[str, Any]) -> str:
    """The page for `data`, which is `to_json(report, ...)`; needs no other file and no network."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"sci": sci, "ratio": ratio, "cosine": cosine, "plain": plain, "count": count}
    groups = _groups(report)
    paths = list(dict.fromkeys(case.path for case in report.cases))
    colours = {path: i % plots.PATH_COLOURS for i, path in enumerate(paths)}
    records = list(zip(report.cases, data["cases"], strict=True))
    figures = [
        {
            "title": group.label,
            "worst": _worst_of(group.cases, short=True),
            "ratio": plots.ratio_by_depth(by_path, colours, f"{group.label}: error ratio by depth"),
            "error": plots.error_by_depth(list(by_path.values()), f"{group.label}: error by depth"),
        }
        for group in groups
        if (by_path := {case.path: case.comparison for case in group.cases if case.comparison.taps})
    ]
    return environment.get_template("report.html.j2").render(
        meta=data["meta"],
        summary=data["summary"],
        k=budget.K,
        paths=paths,
        colours=colours,
        groups=groups,
        figures=figures,
        heat_maps=_heat_maps(report),
        images=_image_figures(report, groups),
        red=_red(report),
        quantized=[section(split) for split in report.splits],
        three_way=three_way_section(report.three_way),
        wrong_tensors=any(split.wrong for split in report.splits),
        level=_level,
        short=_short,
        decisive=lambda tap: max(tap["checks"], key=lambda name: float(tap["checks"][name]["ratio"])),
        logits=[(group, _logits(group)) for group in groups],
        routing=[(_name(case), record["routing"]) for case, record in records if case.comparison.choices],
        dense=plots.DENSE_TAPS,
        shown_flips=_SHOWN_FLIPS,
        shown_red=_SHOWN_RED,
        cases=[(_name(case), reasons(case.comparison), record) for case, record in records],
    )


def print_table(report: Report, console: Console) -> None:
    """Worst ratio of every case, then a line for each reason why a case is red. Readable without colour."""
    paths = list(dict.fromkeys(case.path for case in report.cases))
    table = simple_table("", *paths)
    # Stage B is one path in one dtype: a column of the second table.
    dense = {id(case) for split in report.splits for case in split.dense}
    for group in _groups(Report([case for case in report.cases if id(case) not in dense])):
        table.add_row(Text(group.label), *(_cell(group, path) for path in paths))
    if report.cases:
        console.print(table)
    if report.splits:
        print_splits(report.splits, console)
    if report.three_way:
        print_three_way(report.three_way, console)
    for name, why in _red(report):
        for reason in why:
            write_line(console, f"{name}: {reason}", "red")
    text = f"{len(report.cases)} cases" + (f", {len(report.red)} of them red (!)" if report.red else "")
    if wrong := sum(len(split.wrong) for split in report.splits):
        text += f", {wrong} tensors wrong (!)"
    if apart := sum(entry.red for entry in report.three_way):
        text += f", {apart} truths apart (!)"
    if report.worst:
        text += f"; budget {budget.K:g}, worst ratio {_worst_of(report.cases)}"
    verdict = "green" if report.cases and not report.failed else "red"
    write_line(console, f"{verdict}: {text}", f"bold {verdict}")


def print_verdict(comparison: Comparison, console: Console) -> None:
    """The taps with the largest ratios, the reasons if it is red, and the verdict."""
    table = simple_table("tap", "error", "reference", "allowed", "ratio", "of")
    ranked = sorted(comparison.taps, key=lambda tap: tap.ratio, reverse=True)
    for tap in ranked[:_LISTED_TAPS]:
        name = _decisive(tap)
        check = tap.checks[name]
        figures = (sci(check.error), sci(check.reference), sci(check.allowed), ratio(check.ratio) + "!" * check.red)
        table.add_row(Text(tap.name), *figures, name, style="red" if tap.red else None)
    console.print(table)
    for reason in reasons(comparison):
        write_line(console, reason, "red")
    _unexpected(comparison, console)
    verdict = "red" if comparison.red else "green"
    text = f"{len(comparison.taps)} taps, worst ratio {ratio(comparison.worst_ratio)}, budget {budget.K:g}"
    write_line(console, f"{verdict}: {text}", f"bold {verdict}")


def print_differences(comparison: Comparison, console: Console) -> None:
    """Every tap's difference from what it was compared with; no verdict."""
    table = simple_table("tap", "rel. L2", "max abs.", "cosine", "worst at")
    for tap in comparison.taps:
        row, position = tap.metrics.worst_position
        figures = (sci(tap.metrics.rel_l2), sci(tap.metrics.max_abs), cosine(tap.metrics.cosine))
        table.add_row(Text(tap.name), *figures, f"{row}, {position}")
    console.print(table)
    if comparison.missing:
        write_line(console, f"missing: {_named(comparison.missing)}")
    _unexpected(comparison, console)
    write_line(console, f"{len(comparison.taps)} taps compared; without a truth there is no verdict", "bold")


def reasons(comparison: Comparison) -> list[str]:
    """Why it is red, a line each; empty if it is green."""
    out = []
    if first := comparison.first_divergence:
        row = "image" if first.tap.startswith(VISION) else "row"
        out.append(
            f"first divergence {first.tap}, {row} {first.row} position {first.position}, {_origin(first)} "
            f"({first.check}: {sci(first.error)}, allowed {sci(first.allowed)})"
        )
    if not comparison.taps:
        out.append("no taps captured")
    if comparison.missing:
        out.append(f"missing: {_named(comparison.missing)}")
    if comparison.partial:
        out.append(f"not at every position: {_named(comparison.partial)}")
    if bugs := comparison.bugs:
        worst = max(bugs, key=lambda flip: flip.margin)
        out.append(
            f"routing: {len(bugs)} of {comparison.choices} choices flipped and no tie, worst in layer {worst.layer}, "
            f"row {worst.row} position {worst.position} (margin: {sci(worst.margin)}, allowed {sci(worst.allowed)})"
        )
    return out


def _red(report: Report) -> list[tuple[str, list[str]]]:
    """What is red, and why: quantized tensors and truths first, because wrong ones explain what follows."""
    tensors = [(split_name(split), tensor_reasons(split)) for split in report.splits if split.wrong]
    truths = [(entry.name, three_way_reasons(entry)) for entry in report.three_way if entry.red]
    return tensors + truths + [(_name(case), reasons(case.comparison)) for case in report.red]


@dataclass(frozen=True)
class _Group:
    """A line of the summary: the cases of one checkpoint, dtype and candidate."""

    label: str
    cases: list[Case]

    def get(self, path: str) -> Case | None:
        return next((case for case in self.cases if case.path == path), None)


def _groups(report: Report) -> list[_Group]:
    groups: dict[str, list[Case]] = {}
    for case in report.cases:
        groups.setdefault(f"{case.checkpoint} {case.dtype}{_pair(case)}", []).append(case)
    return [_Group(label, cases) for label, cases in groups.items()]


def _pair(case: Case) -> str:
    if case.reference != "hf":
        return f" {case.candidate}/{case.reference}"
    return "" if case.candidate == "torch" else f" {case.candidate}"


def _name(case: Case) -> str:
    return f"{case.checkpoint} {case.dtype}{_pair(case)} {case.path}"


def _worst_of(cases: Sequence[Case], short: bool = False) -> str:
    case = Report(list(cases)).worst
    tap = case.comparison.worst
    where = f"{tap.name} ({_decisive(tap)})" if tap else "(no taps)"
    return f"{ratio(case.comparison.worst_ratio)} at {case.path if short else _name(case)} {where}"


def _case(case: Case) -> dict[str, Any]:
    comparison = case.comparison
    first = comparison.first_divergence
    return {
        "checkpoint": case.checkpoint,
        "dtype": case.dtype,
        "path": case.path,
        "candidate": case.candidate,
        "reference": case.reference,
        "verdict": "red" if comparison.red else "green",
        "worst_ratio": comparison.worst_ratio,
        "worst_tap": comparison.worst.name if comparison.worst else None,
        "first_divergence": dataclasses.asdict(first) if first else None,
        "missing": comparison.missing,
        "partial": comparison.partial,
        "unexpected": comparison.unexpected,
        "routing": {
            "choices": comparison.choices,
            "flips": [dataclasses.asdict(flip) | {"tie": flip.tie} for flip in comparison.flips],
        },
        "logits": dataclasses.asdict(comparison.logits) if comparison.logits else None,
        "taps": [
            {
                "name": tap.name,
                "shape": tap.shape,
                "metrics": dataclasses.asdict(tap.metrics),
                "local": dataclasses.asdict(tap.local) if tap.local else None,
                "checks": {
                    name: dataclasses.asdict(check) | {"ratio": check.ratio, "red": check.red}
                    for name, check in tap.checks.items()
                },
                "ratio": tap.ratio,
                "red": tap.red,
            }
            for tap in comparison.taps
        ],
    }


def _strict(value: Any) -> Any:
    """`value` with what JSON lacks written as strings."""
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    return value if value is None or isinstance(value, str | int | float) else str(value)


def _decisive(tap: TapResult) -> str:
    return max(tap.checks, key=lambda name: tap.checks[name].ratio)


def _origin(first: Divergence) -> str:
    return {"created": "created here", "unknown": "origin unknown"}.get(first.origin, first.origin)


def _short(comparison: Comparison) -> str:
    """Why it is red, in the few words that a cell holds."""
    if first := comparison.first_divergence:
        return f"{first.tap}, {_origin(first)}"
    if comparison.missing or comparison.partial or not comparison.taps:
        return f"{len(comparison.missing + comparison.partial)} taps incomplete" if comparison.taps else "no taps"
    return f"{len(comparison.bugs)} routing flips"


def _level(comparison: Comparison) -> str:
    """How near to the budget: the style sheet's class of a cell."""
    if comparison.red:
        return "bad"
    ratio = comparison.worst_ratio
    return "best" if ratio <= 1 else "good" if ratio <= 0.75 * budget.K else "near"


def _unexpected(comparison: Comparison, console: Console) -> None:
    if comparison.unexpected:
        write_line(console, f"not compared, only the candidate has: {_named(comparison.unexpected)}")


def _named(taps: Sequence[str]) -> str:
    more = len(taps) - _NAMED_TAPS
    return ", ".join(taps[:_NAMED_TAPS]) + (f" and {more} more" if more > 0 else "")


def _cell(group: _Group, path: str) -> Text:
    case = group.get(path)
    if not case:
        return Text("-")
    red = case.comparison.red
    return Text(ratio(case.comparison.worst_ratio) + "!" * red, style="bold red" if red else "green")


def _logits(group: _Group) -> dict[str, float] | None:
    """The worst of each figure over the paths."""
    found = [case.comparison.logits for case in group.cases if case.comparison.logits]
    if not found:
        return None
    worst = {"kl_mean": max, "kl_max": max, "top1": min, "top5": min}
    return {name: pick(getattr(logits, name) for logits in found) for name, pick in worst.items()}


def _image_figures(report: Report, groups: Sequence[_Group]) -> list[dict[str, Any]]:
    """The images of each group that has some; every path runs the tower once, so that one stands for all."""
    out = []
    for group in groups:
        shown = report.images.get(group.cases[0].checkpoint)
        found = next((c.comparison for c in group.cases if plots_images.SOFT_TOKENS in c.comparison.by_position), None)
        if shown is not None and found is not None:
            label = f"{group.label}: errors of soft tokens"
            out.append({"title": group.label, "figure": plots_images.soft_token_errors(shown, found, label)})
    return out


def _heat_maps(report: Report) -> list[dict[str, Any]]:
    """The first red case with its first divergence, and the case with the worst ratio if it is of another model."""
    first = next((case for case in report.red if case.comparison.first_divergence), None)
    worst = report.worst
    wanted = [("first red case", first)] if first else []
    # Two paths of one model mostly show the same thing.
    if worst and not (first and (first.checkpoint, first.dtype) == (worst.checkpoint, worst.dtype)):
        wanted.append(("worst case", worst))
    out = []
    for title, case in wanted:
        if not (case.comparison.taps and case.comparison.by_position):
            continue
        found, tap = case.comparison.first_divergence, case.comparison.worst
        if found:
            mark = (found.tap, found.row, found.position, f"first divergence\n{found.tap}\nposition {found.position}")
        else:
            row, position = (tap.local if _decisive(tap).startswith("local") else tap.metrics).worst_position
            mark = (tap.name, row, position, f"largest ratio: {ratio(tap.ratio)}\n{tap.name}\nposition {position}")
        figure = plots.heat_map(case.comparison, mark, f"{_name(case)}: relative error by tap and position")
        out.append({"title": title, "case": _name(case), "figure": figure})
    return out
