"""The page of a quantization report: tables, and a picture of the signal-to-noise ratios if matplotlib is there."""

import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from gemma4_impl.quant.sqnr import QuantizationReport, TensorReport, decibels

COLOURS = 12
"""Number of the style sheet's variables `--kind-0`, `--kind-1`, ...: one a kind of linear."""
# matplotlib wants a real colour; each of these is replaced by a variable of the page's style sheet.
_VARIABLES = {name: f"#0101{i:02x}" for i, name in enumerate(("ink", "muted", "line", "page"))}
_INK, _MUTED, _LINE, _PAGE = _VARIABLES.values()
_MARKERS = "osD^vPX*"


def to_html(report: QuantizationReport) -> str:
    """The page; it needs no other file and no network."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"size": size, "db": _db, "how": _how}
    kinds = _kinds(report.tensors)
    layered = [kind for kind in kinds if kind["layered"]]
    try:
        picture = _picture(layered) if layered else None
    except ImportError:
        picture = None
    return environment.get_template("page.html.j2").render(
        report=report,
        kinds=kinds,
        layered=layered,
        largest=max((kind["before"] for kind in kinds), default=0) or 1,
        picture=picture,
        rules=report.recipe["rules"],
        lowest=min(report.quantized, key=lambda t: t.sqnr_db),
    )


def size(count: int) -> str:
    """Bytes in a unit that fits: 2.8 GB."""
    unit, scale = next(((u, s) for u, s in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if count >= s), ("bytes", 1))
    return f"{count / scale:.{1 if scale > 1 else 0}f} {unit}"


def _kinds(tensors: Sequence[TensorReport]) -> list[dict[str, Any]]:
    """Quantized tensors by kind: all layers' q_proj are one. The rest is one kind at the end."""
    found: dict[str, list[TensorReport]] = {}
    rest = [t for t in tensors if t.bits is None]
    for t in tensors:
        if t.bits is not None:
            found.setdefault(t.place[0], []).append(t)
    # Tensors outside of the layers first, as they are few and large.
    order = sorted(found, key=lambda kind: found[kind][0].place[1] is not None)
    return [_kind(name, found[name]) for name in order] + ([_kind("not quantized", rest)] if rest else [])


def _kind(name: str, tensors: list[TensorReport]) -> dict[str, Any]:
    weights = sum(math.prod(t.shape) for t in tensors)
    after = sum(t.bytes_after for t in tensors)
    quantized = tensors[0].bits is not None
    lowest = min(tensors, key=lambda t: t.sqnr_db)
    return {
        "name": name,
        "tensors": tensors,
        "quantized": quantized,
        "layered": quantized and tensors[0].place[1] is not None,
        "how": list(dict.fromkeys(_how(t) for t in tensors)),
        "weights": weights,
        "before": sum(t.bytes_before for t in tensors),
        "after": after,
        "bits": 8 * after / weights if weights else 0.0,
        "db": decibels(sum(t.signal for t in tensors), sum(t.noise for t in tensors)),
        "lowest": lowest.sqnr_db,
        "lowest_at": lowest.place[1],
    }


def _how(t: TensorReport) -> str:
    if t.bits is None:
        return t.stored
    group = "per row" if t.group_size is None else f"group {t.group_size}"
    return f"int{t.bits} {group}, {t.method}{'' if t.symmetric else ', asymmetric'}"


def _db(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else "exact" if value > 0 else "-"


def _picture(kinds: list[dict[str, Any]]) -> Markup:
    """SQNR by layer, a line for each kind. Columns are parts of the layer; int8 and int4 have a row of panels each,
    since they lie 24 dB apart."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    style = {
        "svg.fonttype": "none", "svg.hashsalt": "sqnr", "text.parse_math": False, "font.size": 9, "text.color": _INK,
        "axes.edgecolor": _LINE, "axes.labelcolor": _MUTED, "axes.facecolor": "none", "axes.linewidth": 0.8,
        "axes.spines.top": False, "axes.spines.right": False, "xtick.color": _MUTED, "ytick.color": _MUTED,
    }  # fmt: skip
    parts: dict[str, list[tuple[str, str, list[TensorReport]]]] = {}
    for i, kind in enumerate(kinds):
        part, _, name = kind["name"].rpartition(".")
        parts.setdefault(part or "per-layer input", []).append((name, _colour(i), kind["tensors"]))
    rows = sorted({t.bits for kind in kinds for t in kind["tensors"]}, reverse=True)
    depth = 1 + max(t.place[1] for kind in kinds for t in kind["tensors"])
    with matplotlib.rc_context(style):
        height = 0.8 + 2.5 * len(rows)
        figure = Figure((11.5, height))
        grid = figure.subplots(len(rows), len(parts), sharex=True, sharey="row", squeeze=False)
        figure.subplots_adjust(0.058, 0.42 / height, 0.995, 1 - 0.38 / height, wspace=0.04, hspace=0.08)
        for row, bits in zip(grid, rows, strict=True):
            row[0].set_ylabel(f"int{bits}: SQNR, dB")
            for axes, (part, lines) in zip(row, parts.items(), strict=True):
                for i, (name, colour, tensors) in enumerate(lines):
                    line = [math.nan] * depth
                    for t in tensors:
                        if t.bits == bits and math.isfinite(t.sqnr_db):
                            line[t.place[1]] = t.sqnr_db
                    # A layer without this kind is a gap, not a value between its neighbours'.
                    axes.plot(
                        line, color=colour, label=name, marker=_MARKERS[i % len(_MARKERS)], markersize=4.5,
                        linewidth=1.2, markeredgecolor=_PAGE, markeredgewidth=0.5,
                    )  # fmt: skip
                axes.grid(axis="y", color=_LINE, linewidth=0.6)
                axes.set_axisbelow(True)
                axes.margins(y=0.08)
                axes.tick_params(length=2)
                axes.yaxis.set_major_locator(MaxNLocator(6))
                axes.set_xticks(range(0, depth, _step(depth, 12)))
                axes.set_xlim(-0.6, depth - 0.4)
                if bits == rows[0]:
                    axes.legend(
                        loc="lower left", bbox_to_anchor=(0, 1), ncols=len(lines), frameon=False, borderpad=0,
                        borderaxespad=0.4, handlelength=1.6, handletextpad=0.4, columnspacing=1.4,
                    )  # fmt: skip
                if bits == rows[-1]:
                    axes.set_xlabel(f"layer ({part})")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=False, facecolor="none")
    return _inline(buffer.getvalue())


def _step(count: int, most: int) -> int:
    return next((step for step in (1, 2, 5, 10, 20, 50) if count <= step * most), 100)


def _inline(text: str) -> Markup:
    """An <svg> element that fills its container, in the page's colours."""
    text = re.sub(r"<metadata>.*?</metadata>|<style .*?</style>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    # What nothing refers to, and digits that nobody sees.
    text = re.sub(r' id="[\w.]+_\d+"', "", text)
    text = re.sub(r'(?<= d=")[^"]*', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]).replace("\n", ""), text)
    text = re.sub(r">\s+<", "><", text)
    colours = {value: name for name, value in _VARIABLES.items()} | {_colour(i): f"kind-{i}" for i in range(COLOURS)}
    text = re.sub(r"#0[12]0[12]0[0-9a-f]", lambda match: f"var(--{colours[match[0]]})", text)
    label = "Signal-to-quantization-noise ratio by layer, one line for each kind of linear"
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1))


def _colour(index: int) -> str:
    return f"#0202{index % COLOURS:02x}"
