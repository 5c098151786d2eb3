"""The report's figures as inline SVG: error ratio by depth, error by depth, and a heat map of taps x positions.

Colours are written as CSS variables, so that the page decides what they are in light and in dark mode.
"""

import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from gemma4_impl.taps import VISION
from parity import budget
from parity.compare import Comparison

# matplotlib wants a real colour; each of these is replaced by a variable of the page's style sheet.
_VARIABLES = {
    name: f"#0101{i:02x}" for i, name in enumerate(("ink", "muted", "line", "shade", "page", "bad", "total", "local"))
}
INK, MUTED, LINE, SHADE, PAGE, BAD, TOTAL, LOCAL = _VARIABLES.values()
PATH_COLOURS = 8
"""Number of the style sheet's variables `--path-0`, `--path-1`, ...: one a cache path."""

STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 8,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.facecolor": "none",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "lines.solid_joinstyle": "round",
}
DENSE_TAPS = 200
"""Above this many taps, the plots by depth show one point a layer: its largest value."""
_LABELLED_TAPS = 120
_LOG_ABOVE = 4
"""A ratio beyond this many budgets is drawn on a log scale."""


@dataclass(frozen=True)
class Block:
    """Neighbouring taps of one layer: [start, end) in the tap order."""

    label: str
    start: int
    end: int
    full: bool
    """Whether its attention is full. Not recorded in a comparison: the layers with the larger of two head sizes are."""


def tap_order(comparisons: Sequence[Comparison]) -> list[str]:
    """The taps of all comparisons in execution order, whichever of them each one lacks."""
    order: list[str] = []
    for comparison in comparisons:
        at = 0
        for tap in comparison.taps:
            if tap.name in order:
                at = order.index(tap.name) + 1
            else:
                order.insert(at, tap.name)
                at += 1
    return order


def blocks(order: Sequence[str], shapes: Mapping[str, Sequence[int]]) -> list[Block]:
    """The layers in `order`; taps outside of any layer belong to no block."""
    found: list[list] = []
    for i, name in enumerate(order):
        match = re.match(r"((?:.*\.)?)layers\.(\d+)\.", name)
        if not match:
            continue
        if found and found[-1][0] == match[0]:
            found[-1][3] = i + 1
        else:
            found.append([match[0], match[1][:1] + match[2], i, i + 1])
    heads = [shapes.get(f"{prefix}self_attn.q", (0,))[-1] for prefix, *_ in found]
    # The vision tower's layers, labelled v0, v1, ..., are no part of the comparison.
    sizes = {head for head, (_, label, *_) in zip(heads, found, strict=True) if head and label.isdigit()}
    return [
        Block(label, start, end, label.isdigit() and len(sizes) == 2 and head == max(sizes))
        for (_, label, start, end), head in zip(found, heads, strict=True)
    ]


def ratio_by_depth(comparisons: Mapping[str, Comparison], colours: Mapping[str, int], label: str) -> Markup:
    """One line a path (name -> comparison): a tap's worst ratio, in execution order, with the budget."""
    with matplotlib.rc_context(STYLE):
        figure, axes, order = _depth_figure(list(comparisons.values()))
        lines = {path: _by_tap(order, {t.name: t.ratio for t in c.taps}) for path, c in comparisons.items()}
        finite = [value for line in lines.values() for value in line if math.isfinite(value)]
        top = max([budget.K, *finite])
        log = top > _LOG_ABOVE * budget.K
        if log:
            axes.set_yscale("log")
            low = max(min((value for value in finite if value > 0), default=0.1), 0.02)
            axes.set_ylim(low / 1.3, top * 2)
            axes.yaxis.set_major_locator(LogLocator(numticks=6))
            axes.yaxis.set_minor_locator(NullLocator())
        else:
            axes.set_ylim(0, max(1.25 * budget.K, 1.1 * top))
        limit = axes.get_ylim()[1]
        for path, line in lines.items():
            clipped = np.where(np.isposinf(line), limit, line)
            style = {"color": path_colour(colours[path]), "linewidth": 1.3, "marker": _marker(order), "alpha": 0.9}
            axes.plot(*_thin_line(order, clipped), **style)
            first = comparisons[path].first_divergence
            if first:
                at = order.index(first.tap)
                axes.plot(at, clipped[at], "X", color=BAD, markersize=8, markeredgecolor=PAGE, clip_on=False, zorder=5)
        axes.axhline(budget.K, color=BAD, linewidth=1, linestyle=(0, (5, 3)))
        axes.axhline(1, color=MUTED, linewidth=0.6, linestyle=(0, (1, 2)))
        axes.yaxis.set_major_formatter(FuncFormatter(power if log else lambda y, _: f"{y:g}"))
        axes.set_ylabel("error ratio")
        return svg(figure, label)


def error_by_depth(comparisons: Sequence[Comparison], label: str) -> Markup:
    """Relative error on a log scale, largest over the paths: accumulated and local, candidate and reference."""
    with matplotlib.rc_context(STYLE):
        figure, axes, order = _depth_figure(comparisons)
        for check, colour in (("total", TOTAL), ("local", LOCAL)):
            for field, style in (("error", "-"), ("reference", (0, (2, 1.5)))):
                values = [_by_tap(order, _errors(comparison, check, field)) for comparison in comparisons]
                x, line = _thin_line(order, np.fmax.reduce(values))
                # A log axis has no place for zero and infinity: a gap in the line.
                line = np.where(np.isfinite(line) & (line > 0), line, np.nan)
                if not np.isnan(line).all():
                    width = 1.3 if style == "-" else 1
                    axes.plot(x, line, color=colour, linewidth=width, linestyle=style, marker=_marker(order))
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        if high < 3 * low:  # one tap; its labels would all be the same
            low, high = axes.set_ylim(low / 3, high * 3)
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if high < 100 * low else (1.0,), numticks=6))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(power))
        axes.set_ylabel("relative error")
        return svg(figure, label)


def heat_map(comparison: Comparison, mark: tuple[str, int, int, str] | None, label: str) -> Markup:
    """Taps x positions, log10 of the relative error, one panel a row of the batch.

    `mark` is tap, row, position and text of the place to point at; only taps with the same positions as that one are
    drawn, because those of the vision tower are patches or soft tokens of an image."""
    names = [tap.name for tap in comparison.taps if tap.name in comparison.by_position]
    if mark:
        size = comparison.by_position[mark[0]].shape
        names = [name for name in names if comparison.by_position[name].shape == size]
    unit, row_of = "position", "row"
    if names[0].startswith(VISION):
        unit, row_of = "patch" if f"{VISION}patch_embed" in names else "soft token", "image"
    rows, length = (max(comparison.by_position[n].shape[i] for n in names) for i in (0, 1))
    error = np.full((rows, len(names), length), np.nan)
    for i, name in enumerate(names):
        value = comparison.by_position[name].numpy()
        error[: value.shape[0], i, : value.shape[1]] = value
    finite = np.log10(error[np.isfinite(error) & (error > 0)])
    # A few lucky roundings must not take half of the scale.
    low, high = (float(np.quantile(finite, 0.005)), float(finite.max())) if finite.size else (-1.0, 0.0)
    # A zero lies below the scale, an infinity above it; NaN stays transparent.
    values = np.log10(np.where(error == 0, 10.0 ** (low - 2), error))
    named = len(names) <= _LABELLED_TAPS
    # With few colours a large and noisy picture takes half of the space.
    colours = matplotlib.colormaps["viridis"].resampled(64 if named else 16)
    colormap = colours.with_extremes(over="#d55e00", bad=(0, 0, 0, 0))
    norm = Normalize(low, max(high, low + 1e-3))
    with matplotlib.rc_context(STYLE):
        height = max(2.0, 0.108 * len(names)) if named else min(10.0, 0.02 * len(names) + 2)
        width, left, right, bottom, gap = 12.0, 1.75 if named else 0.75, 0.85, 0.45, 0.25
        total = height + bottom + 0.3
        figure = Figure((width, total))
        panel = (width - left - right - gap * (rows - 1)) / rows
        shapes = {tap.name: tap.shape for tap in comparison.taps}
        for row in range(rows):
            place = (left + row * (panel + gap)) / width, bottom / total, panel / width, height / total
            axes = figure.add_axes(place)
            axes.set_facecolor(SHADE)
            image = axes.imshow(values[row], cmap=colormap, norm=norm, aspect="auto", interpolation="none")
            axes.set_xlabel(unit if rows == 1 else f"{unit} in {row_of} {row}")
            axes.tick_params(length=2)
            _label_taps(axes, names, shapes, named and row == 0, row == 0, height)
            if mark and mark[1] == row and mark[0] in names:
                colour = BAD if comparison.red else INK
                _point_at(axes, mark[2], names.index(mark[0]), mark[3], length, len(names), colour)
        tall = min(height, 3.0)
        bar = figure.add_axes(
            ((width - right + 0.15) / width, (bottom + height - tall) / total, 0.14 / width, tall / total)
        )
        figure.colorbar(image, cax=bar).set_label("log10 relative error")
        bar.tick_params(length=2)
        bar.spines[:].set_visible(False)
        return svg(figure, label)


def _label_taps(axes: Axes, names: list[str], shapes: Mapping, named: bool, first: bool, height: float) -> None:
    found = blocks(names, shapes)
    for block in found:
        axes.axhline(block.start - 0.5, color=PAGE, linewidth=0.8 if named else 0.4)
    axes.spines[:].set_visible(False)
    if named:
        axes.set_yticks(range(len(names)), names, fontsize=6.2, family="monospace")
    elif first:
        kept = _thin(found, int(height * 72 / 11))
        axes.set_yticks([(b.start + b.end - 1) / 2 for b in kept], [f"layer {b.label}" for b in kept])
    else:
        axes.set_yticks([])


def _point_at(axes: Axes, x: int, y: int, text: str, length: int, taps: int, colour: str) -> None:
    for edge, width in ((PAGE, 3.5), (colour, 1.8)):
        axes.plot(x, y, "s", markersize=11, markerfacecolor="none", color=edge, markeredgewidth=width)
    right, up = x < length * 0.6, y > taps * 0.3
    axes.annotate(
        text,
        (x, y),
        xytext=(28 if right else -28, 26 if up else -26),
        textcoords="offset points",
        ha="left" if right else "right",
        va="bottom" if up else "top",
        bbox={"boxstyle": "round,pad=0.45", "facecolor": PAGE, "edgecolor": colour, "linewidth": 1},
        arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 1.2, "shrinkB": 7},
    )


def _depth_figure(comparisons: Sequence[Comparison]) -> tuple[Figure, Axes, list[str]]:
    """An empty panel whose x axis is depth: layer numbers below, full-attention layers shaded."""
    order = tap_order(comparisons)
    shapes = {tap.name: tap.shape for comparison in comparisons for tap in comparison.taps}
    figure = Figure((6.4, 2.1))
    axes = figure.add_axes((0.082, 0.13, 0.912, 0.84))
    found = blocks(order, shapes)
    for block in found:
        if block.full:
            axes.axvspan(block.start - 0.5, block.end - 0.5, color=SHADE, linewidth=0, zorder=0)
        axes.axvline(block.start - 0.5, color=LINE, linewidth=0.5, zorder=0)
    kept = _thin(found, 20)
    axes.set_xticks([(b.start + b.end - 1) / 2 for b in kept], [b.label for b in kept])
    if len(order) == 1:
        axes.set_xticks([0], order)
    axes.tick_params(length=2)
    axes.set_xlim(-0.5, max(len(order), 1) - 0.5)
    axes.grid(axis="y", color=LINE, linewidth=0.5)
    axes.set_axisbelow(True)
    return figure, axes, order


def _marker(order: Sequence[str]) -> str | None:
    """One tap makes no line: a program that returns its logits alone."""
    return "o" if len(order) == 1 else None


def _thin(found: Sequence[Block], most: int) -> list[Block]:
    step = next((s for s in (1, 2, 5, 10, 20, 50) if len(found) <= s * most), 100)
    return [block for i, block in enumerate(found) if i % step == 0]


def power(value: float, _: int) -> str:
    return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")


def _thin_line(order: Sequence[str], values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x and y of a line by depth."""
    x = np.arange(len(order), dtype=float)
    if len(order) <= DENSE_TAPS:
        return x, values
    x, y, kept = x.copy(), values.copy(), np.ones(len(order), dtype=bool)
    for block in blocks(order, {}):
        x[block.start] = (block.start + block.end - 1) / 2
        y[block.start] = np.fmax.reduce(values[block.start : block.end])
        kept[block.start + 1 : block.end] = False
    return x[kept], y[kept]


def _by_tap(order: Sequence[str], values: Mapping[str, float]) -> np.ndarray:
    return np.array([values.get(name, math.nan) for name in order], dtype=float)


def _errors(comparison: Comparison, check: str, field: str) -> dict[str, float]:
    return {tap.name: getattr(tap.checks[check], field) for tap in comparison.taps if check in tap.checks}


def path_colour(index: int) -> str:
    return f"#0202{index % PATH_COLOURS:02x}"


def svg(figure: Figure, label: str) -> Markup:
    """The figure as an <svg> element that fills its container; `label` is read out in its place."""
    buffer = io.StringIO()
    # The salt makes ids of clip paths differ between the figures of a page, and repeat from run to run.
    with matplotlib.rc_context({"svg.hashsalt": ascii(label)}):
        figure.savefig(buffer, format="svg", transparent=False, facecolor="none")
    text = re.sub(r"<metadata>.*?</metadata>|<style .*?</style>", "", buffer.getvalue(), flags=re.DOTALL)
    text = re.sub(r' id="[\w.]+_\d+"', "", text[text.index("<svg") :])
    text = re.sub(r'(?<= d=")[^"]*', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]).replace("\n", ""), text)
    text = re.sub(r">\s+<", "><", text)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    colours = {value: name for name, value in _VARIABLES.items()}
    colours |= {path_colour(i): f"path-{i}" for i in range(PATH_COLOURS)}
    text = re.sub(r"#0[12]0[12]0[0-9a-f]", lambda m: f"var(--{colours[m[0]]})", text)
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1))
