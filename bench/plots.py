"""The report's figures as inline SVG: a roofline, bars of a group's backends, and time against context length."""

import math
import textwrap
from collections.abc import Mapping, Sequence

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from bench.results import Published, seconds
from parity.plots import INK, LINE, LOCAL, MUTED, PAGE, STYLE, TOTAL, path_colour, svg

_MARKERS = "osD^vP*X"
_BAR, _LABELS = 0.24, 2.05


def roofline(rows: Sequence[Published], copy: float, matmul: float, label: str) -> Markup:
    """Operations a second against operations a byte, with the measured ceilings `copy` (bytes/s) and `matmul` (FLOP/s)
    as the roof. Ours are filled."""
    points = [(row, row.info["flops"] / row.info["bytes"], row.info["tflop_per_s"]) for row in rows]
    operations = list(dict.fromkeys(row.info["operation"] for row in rows))
    with matplotlib.rc_context(STYLE):
        figure = Figure((8.6, 4.2))
        axes = figure.add_axes((0.09, 0.115, 0.66, 0.865))
        ridge = matmul / copy
        low = min([x for _, x, _ in points] + [ridge]) / 2
        high = max([x for _, x, _ in points] + [ridge]) * 2
        roof = [min(copy * x, matmul) / 1e12 for x in (low, ridge, high)]
        text = f"roof: {copy / 1e9:,.0f} GB/s,\n{matmul / 1e12:,.3g} TFLOP/s"
        axes.plot([low, ridge, high], roof, color=INK, linewidth=1.4, zorder=2, label=text)
        axes.fill_between([low, ridge, high], roof, [max(roof) * 3] * 3, color=LINE, alpha=0.35, linewidth=0, zorder=0)
        for row, x, y in points:
            colour = path_colour(operations.index(row.info["operation"]))
            marker = _MARKERS[operations.index(row.info["operation"]) % len(_MARKERS)]
            face, size = (colour, 6.5) if row.ours else (PAGE, 4.5)
            order = 5 if row.ours else 4
            axes.plot(x, y, marker, color=colour, markerfacecolor=face, markersize=size, zorder=order, linestyle="none")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(low, high)
        axes.set_ylim(min([y for *_, y in points] + [roof[0]]) / 2, max(roof) * 2)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("floating-point operations a byte")
        axes.set_ylabel("TFLOP/s")
        axes.grid(color=LINE, linewidth=0.5)
        axes.set_axisbelow(True)
        for i, operation in enumerate(operations):
            axes.plot([], [], _MARKERS[i % len(_MARKERS)], color=path_colour(i), markersize=6, label=operation)
        axes.plot([], [], "o", color=MUTED, markersize=6, label="filled: ours")
        axes.plot([], [], "o", color=MUTED, markerfacecolor=PAGE, markersize=4.5, label="hollow: a peer")
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, handletextpad=0.2, borderaxespad=0)
        return svg(figure, label)


def bars(rows: Sequence[Published], label: str) -> Markup:
    """Median times, the fastest first, with the quartiles as whiskers and the roofline's time as a dashed line."""
    ordered = sorted(rows, key=lambda row: row.median)
    best = next((row.median for row in ordered if row.ours), ordered[0].median)
    with matplotlib.rc_context(STYLE):
        height = _BAR * len(ordered) + 0.16
        figure = Figure((6.4, height))
        axes = figure.add_axes((_LABELS / 6.4, 0.1 / height, 1 - (_LABELS + 1.25) / 6.4, _BAR * len(ordered) / height))
        top = max(row.high for row in ordered)
        for i, row in enumerate(ordered):
            axes.barh(i, row.median, 0.66, color=TOTAL if row.ours else MUTED, alpha=1 if row.ours else 0.45)
            axes.plot([row.low, row.high], [i, i], color=INK, linewidth=0.9)
            text = seconds(row.median) if row.median == best else f"{seconds(row.median)} ({row.median / best:.2f} x)"
            axes.annotate(text, (1.012, i), xycoords=("axes fraction", "data"), va="center", fontsize=7.4, color=INK)
        if least := max((row.info.get("roofline_s") or 0 for row in ordered), default=0):
            axes.axvline(least, color=LOCAL, linewidth=1.1, linestyle=(0, (3, 2)), zorder=3)
        axes.set_xlim(0, top * 1.02)
        axes.set_ylim(len(ordered) - 0.5, -0.5)
        axes.set_yticks(range(len(ordered)), [row.backend for row in ordered])
        axes.tick_params(length=0)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        return svg(figure, label)


def against_context(lines: Mapping[str, Sequence[Published]], label: str) -> Markup:
    """Time against context length on log scales: backend -> its rows; the roofline dashed."""
    with matplotlib.rc_context(STYLE):
        figure = Figure((6.4, 2.9))
        axes = figure.add_axes((0.105, 0.145, 0.53, 0.835))
        every = sorted((row for rows in lines.values() for row in rows), key=lambda row: row.info["context"])
        for i, (backend, rows) in enumerate(lines.items()):
            points = sorted((row.info["context"], row.median) for row in rows)
            ours = rows[0].ours
            style = {"linewidth": 2.0, "markersize": 5} if ours else {"linewidth": 1.1, "markersize": 3.5}
            name = textwrap.fill(backend, 32)
            axes.plot(*zip(*points, strict=True), marker="o", color=path_colour(i), label=name, **style)
        least = {row.info["context"]: row.info["roofline_s"] for row in every if row.info.get("roofline_s")}
        if least:
            axes.plot(
                *zip(*least.items(), strict=True), color=INK, linewidth=1, linestyle=(0, (3, 2)), label="roofline"
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        contexts = sorted({row.info["context"] for row in every})
        axes.set_xticks(contexts, [f"{c:,}" for c in contexts])
        axes.xaxis.set_minor_locator(NullLocator())
        _log_seconds(axes)
        axes.set_xlabel("context, tokens")
        axes.grid(color=LINE, linewidth=0.5)
        axes.set_axisbelow(True)
        axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False, borderaxespad=0, fontsize=7.4)
        axes.patch.set_edgecolor(PAGE)
        return svg(figure, label)


def _log_seconds(axes: Axes) -> None:
    low, high = axes.get_ylim()
    many = math.log10(high / low) > 2
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if many else (1.0, 2.0, 5.0), numticks=9))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: seconds(value, short=True)))
