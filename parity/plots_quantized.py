"""The figures of a quantized candidate: its three stages by depth, and where in the model quantizing hurts."""

import math
import re
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from parity.plots import BAD, LINE, MUTED, STYLE, path_colour, power, svg
from parity.quantized import Split

STAGES = {
    "weights": BAD,
    "activations": path_colour(4),
    "packed bfloat16": path_colour(3),
    "packed float16": path_colour(2),
    "packed float32": path_colour(0),
}
"""Stage -> its line's colour; stage B, dequantized, is dotted."""
_DENSE = path_colour(1)
_NUMBERED = 24
"""With more layers than this, cells are too narrow for a number."""


def stages_by_depth(split: Split, label: str) -> Markup:
    """Error of each layer's output and of the logits, in the three stages, on a log scale."""
    lines = []
    if split.damage:
        lines.append((split.damage.taps, STAGES["weights"], "-"))
    if split.activations:
        lines.append((split.activations.taps, STAGES["activations"], "-"))
    for dtype in dict.fromkeys(case.dtype for case in split.packed):
        cases = [case for case in split.packed if case.dtype == dtype]
        lines.append((_totals(cases), STAGES[f"packed {dtype}"], "-"))
    lines += [(_totals([case]), _DENSE, (0, (1, 1.2))) for case in split.dense]
    # A program may have no taps but the logits.
    taps = sorted({name for line, *_ in lines for name in line if _shown(name)}, key=_depth)
    with matplotlib.rc_context(STYLE):
        figure = Figure((6.4, 2.4))
        axes = figure.add_axes((0.082, 0.12, 0.912, 0.85))
        for line, colour, style in lines:
            values = np.array([line.get(name, math.nan) for name in taps], dtype=float)
            values = np.where(np.isfinite(values) & (values > 0), values, np.nan)
            axes.plot(values, color=colour, linestyle=style, linewidth=1.5, marker=".", markersize=4)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=8))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(power))
        axes.set_ylabel("relative error")
        labels = [name if name == "logits" else name.split(".")[1] for name in taps]
        step = math.ceil(len(taps) / 24)
        kept = [i for i in range(len(taps)) if i % step == 0 or i == len(taps) - 1]
        axes.set_xticks(kept, [labels[i] for i in kept])
        axes.tick_params(length=2)
        axes.grid(axis="y", color=LINE, linewidth=0.5)
        axes.set_axisbelow(True)
        return svg(figure, label)


def sqnr_map(split: Split, label: str) -> Markup:
    """SQNR in dB of every quantized tensor, by kind and layer."""
    values = {t.name.removesuffix(".weight"): t.sqnr_db for t in split.tensors if t.quantized}
    return _map(values, "SQNR, dB", "viridis", 6.0, label)


def created_map(split: Split, label: str) -> Markup:
    """log10 of the error that quantizing creates at each tap, by kind and layer."""
    created = split.damage.created if split.damage else {}
    # A layer's output is a product with its scalar, which is not quantized.
    taps = {name: value for name, value in created.items() if not re.fullmatch(r"layers\.\d+\.out", name)}
    values = {name: math.log10(value) for name, value in taps.items() if value > 1e-12 and math.isfinite(value)}
    return _map(values, "log10 error", "viridis_r", 0.5, label)


def _map(values: Mapping[str, float | None], unit: str, colours: str, least: float, label: str) -> Markup:
    """name -> value as kinds x layers; what is outside of the layers spans them all."""
    places = {name: re.match(r"(?:layers\.(\d+)\.)?(.*)", name).groups() for name in values}
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    layers = 1 + max((int(layer) for layer, _ in places.values() if layer), default=0)
    grid = np.full((len(kinds), layers), np.nan)
    spans = set()
    for name, value in values.items():
        layer, kind = places[name]
        row = kinds.index(kind)
        if layer is None:
            spans.add(row)
        if value is not None and math.isfinite(value):
            grid[row, slice(None) if layer is None else int(layer)] = value
    finite = grid[np.isfinite(grid)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    # A spread this small is none to look at.
    middle, half = (low + high) / 2, max((high - low) / 2, least / 2)
    norm = Normalize(middle - half, middle + half)
    colormap = matplotlib.colormaps[colours].with_extremes(bad=(0, 0, 0, 0))
    with matplotlib.rc_context(STYLE):
        height, width, left, right, bottom = 0.19 * max(len(kinds), 1), 6.4, 1.75, 0.85, 0.26
        total = height + bottom + 0.06
        figure = Figure((width, total))
        axes = figure.add_axes((left / width, bottom / total, (width - left - right) / width, height / total))
        image = axes.imshow(grid, cmap=colormap, norm=norm, aspect="auto", interpolation="none")
        axes.set_yticks(range(len(kinds)), kinds, fontsize=7, family="monospace")
        step = math.ceil(layers / _NUMBERED)
        axes.set_xticks(range(0, layers, step), [str(i) for i in range(0, layers, step)])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        if layers <= _NUMBERED:
            _write(axes, grid, spans, norm, colormap)
        tall = min(height, 1.6)
        bar = figure.add_axes(
            ((width - right + 0.1) / width, (bottom + height - tall) / total, 0.1 / width, tall / total)
        )
        figure.colorbar(image, cax=bar).set_label(unit, color=MUTED)
        bar.tick_params(length=2)
        bar.spines[:].set_visible(False)
        return svg(figure, label)


def _write(axes, grid: np.ndarray, spans: set[int], norm: Normalize, colormap) -> None:
    """The value in each cell, in black or white."""
    for row, values in enumerate(grid):
        for layer, value in enumerate(values[:1] if row in spans else values):
            if math.isnan(value):
                continue
            red, green, blue, _ = colormap(norm(value))
            light = 0.3 * red + 0.59 * green + 0.11 * blue > 0.5
            at = (grid.shape[1] - 1) / 2 if row in spans else layer
            text = f"{value:.0f}" if abs(value) >= 10 else f"{value:.1f}"
            axes.text(at, row, text, ha="center", va="center", fontsize=6.5, color="black" if light else "white")


def _shown(name: str) -> bool:
    return name == "logits" or bool(re.fullmatch(r"layers\.\d+\.out", name))


def _depth(name: str) -> tuple[bool, int]:
    """Sorts layers by their number, and the logits after them."""
    return name == "logits", 0 if name == "logits" else int(name.split(".")[1])


def _totals(cases: Sequence) -> dict[str, float]:
    """tap -> accumulated error, the largest of the paths."""
    out: dict[str, float] = {}
    for case in cases:
        for tap in case.comparison.taps:
            out[tap.name] = max(out.get(tap.name, 0.0), tap.checks["total"].error)
    return out
