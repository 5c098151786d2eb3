"""The report's pictures of images: what the vision tower was given, beside the errors of its soft tokens."""

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from gemma4_impl.taps import VISION
from gemma4_impl.vision.processing import ProcessedImages
from parity.compare import Comparison
from parity.plots import SHADE, STYLE, svg

SOFT_TOKENS = f"{VISION}proj"
_PANEL, _GAP, _BAR, _TITLE = 2.1, 0.2, 0.95, 0.3


def soft_token_errors(images: ProcessedImages, comparison: Comparison, label: str) -> Markup:
    """Each image, and log10 of the relative error of each of its soft tokens where it stands in the image."""
    rows_of = comparison.by_position[SOFT_TOKENS].numpy()
    errors = [grid(images, i, values) for i, values in enumerate(rows_of)]
    finite = np.concatenate([np.log10(e[np.isfinite(e) & (e > 0)]) for e in errors])
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (-1.0, 0.0)
    norm = Normalize(low, max(high, low + 1e-3))
    colours = matplotlib.colormaps["viridis"].with_extremes(over="#d55e00", bad=(0, 0, 0, 0))
    width, height = 2 * (_PANEL + _GAP) + _BAR, len(errors) * (_PANEL + _TITLE)
    with matplotlib.rc_context(STYLE):
        figure = Figure((width, height))

        def panel(row: int, column: int) -> Axes:
            bottom = height - (row + 1) * (_PANEL + _TITLE) + 0.02
            place = column * (_PANEL + _GAP) / width, bottom / height, _PANEL / width, _PANEL / height
            axes = figure.add_axes(place)
            axes.set_axis_off()
            axes.set_anchor("N")
            return axes

        for i, error in enumerate(errors):
            picture, heat = panel(i, 0), panel(i, 1)
            picture.imshow(pixels(images, i), interpolation="nearest")
            tall, wide = error.shape
            picture.set_title(f"image {i}: {wide} x {tall} soft tokens", fontsize=8)
            heat.add_patch(Rectangle((-0.5, -0.5), wide, tall, facecolor=SHADE, zorder=-1))
            values = np.log10(np.where(error == 0, 10.0 ** (low - 2), error))
            shown = heat.imshow(values, cmap=colours, norm=norm, interpolation="nearest")
            heat.set_title(f"largest error {np.nanmax(error):.1e}", fontsize=8)
        bar = figure.add_axes(((width - _BAR + 0.1) / width, 0.1 / height, 0.13 / width, (_PANEL - 0.2) / height))
        figure.colorbar(shown, cax=bar).set_label("log10 relative error")
        bar.tick_params(length=2)
        bar.spines[:].set_visible(False)
        return svg(figure, label)


def pixels(images: ProcessedImages, index: int) -> np.ndarray:
    """[height, width, 3] in [0, 1] of one image, put together from its patches."""
    positions, values = _own(images, index)
    side = round((values.shape[-1] / 3) ** 0.5)
    columns, rows = positions.max(axis=0) + 1
    out = np.zeros((rows, columns, side, side, 3), dtype=np.float32)
    out[positions[:, 1], positions[:, 0]] = values.reshape(-1, side, side, 3)
    return out.swapaxes(1, 2).reshape(rows * side, columns * side, 3)


def grid(images: ProcessedImages, index: int, values: np.ndarray) -> np.ndarray:
    """One image's values [L], of which its soft tokens come first, as [rows, columns]."""
    positions, _ = _own(images, index)
    kernel = round((len(positions) / images.num_soft_tokens[index]) ** 0.5)
    columns, rows = (positions.max(axis=0) + 1) // kernel
    return values[: rows * columns].reshape(rows, columns)


def _own(images: ProcessedImages, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions [P, 2] and values [P, C] of an image's patches, without padding."""
    at, values = images.positions[index], images.pixel_values[index]
    return at[at[:, 0] >= 0].numpy(), values[at[:, 0] >= 0].numpy()
