"""torch, jax and transformers beside each other in report.json, on the page, and in the terminal."""

import math
from collections.abc import Sequence
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from rich.console import Console
from rich.text import Text

from parity.formats import ratio, sci, simple_table, write_line
from parity.plots import LINE, MUTED, PAGE, STYLE, path_colour, power, svg
from parity.three_way import ThreeWay

NAMES = {"torch": "PyTorch", "jax": "JAX", "hf": "transformers"}
_MARKS = {"torch": ("o", 0), "jax": ("D", 1), "hf": ("s", 2)}
"""Implementation -> its mark and the number of its colour."""


def three_way_json(entry: ThreeWay) -> dict[str, Any]:
    """One entry of report.json's `three_way`."""
    return {
        "checkpoint": entry.checkpoint,
        "dtype": entry.dtype,
        "verdict": "red" if entry.red else "green",
        "implementations": {name: vars(standing) for name, standing in entry.standings.items()},
        "truths": {
            "rel_l2": entry.truths,
            "tap": entry.truths_tap,
            "logits": entry.truths_logits,
            "allowed": entry.allowed,
        },
    }


def three_way_reasons(entry: ThreeWay) -> list[str]:
    """Why it is red, a line each; empty if it is green."""
    if not entry.red:
        return []
    apart, allowed = sci(entry.truths), sci(entry.allowed)
    return [f"the truths of transformers and JAX differ by {apart} at {entry.truths_tap} (allowed {allowed})"]


def three_way_section(entries: Sequence[ThreeWay]) -> dict[str, Any] | None:
    """What the page shows of them; None if there is none."""
    if not entries:
        return None
    keys = {name: colour for name, (_, colour) in _MARKS.items()}
    return {"entries": entries, "names": NAMES, "keys": keys, "figure": errors_by_implementation(entries)}


def errors_by_implementation(entries: Sequence[ThreeWay]) -> Markup:
    """Errors of the logits, a row a checkpoint and dtype, on a log scale, and how far apart the two truths are."""
    with matplotlib.rc_context(STYLE):
        height = 0.19 * len(entries) + 0.45
        figure = Figure((9.6, height))
        axes = figure.add_axes((0.215, 0.3 / height, 0.775, 1 - 0.35 / height))
        for row, entry in enumerate(entries):
            # Errors are close together: each implementation a little below the one before.
            for at, (name, (mark, colour)) in enumerate(_MARKS.items()):
                error = entry.standings[name].logits
                if 0 < error < math.inf:
                    style = {"color": path_colour(colour), "markersize": 5, "markeredgecolor": PAGE}
                    axes.plot(error, row + 0.22 * (at - 1), mark, markeredgewidth=0.5, **style)
            if 0 < entry.truths_logits < math.inf:
                axes.plot(entry.truths_logits, row, "|", color=MUTED, markersize=7, markeredgewidth=1.5)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(numticks=10))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(power))
        axes.set_yticks(range(len(entries)), [entry.name for entry in entries])
        axes.set_ylim(len(entries) - 0.4, -0.6)
        axes.tick_params(length=2)
        axes.grid(color=LINE, linewidth=0.5)
        axes.set_axisbelow(True)
        return svg(figure, "errors of the logits by implementation")


def print_three_way(entries: Sequence[ThreeWay], console: Console) -> None:
    """A line for each checkpoint and dtype. Readable without colour."""
    table = simple_table("", *(f"{name}:\nlogits" for name in NAMES), *NAMES, "truths\napart")
    for column in table.columns[1:]:
        column.no_wrap = True
    for entry in entries:
        stands = [entry.standings[name] for name in NAMES]
        errors, ratios = [sci(s.logits) for s in stands], [ratio(s.ratio) for s in stands]
        apart = Text(sci(entry.truths) + "!" * entry.red, style="bold red" if entry.red else "")
        table.add_row(Text(entry.name), *errors, *ratios, apart)
    write_line(console, "Errors of the logits, worst error ratios, and float64 of hf against JAX's:")
    console.print(table)
