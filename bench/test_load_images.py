"""Image processing: ours and transformers' Pillow-based processor, which give the same bits."""

import io
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from bench.harness import Backend, Case, equal_to, grid, needs, publish, scratch, timed
from gemma4_impl.vision.processing import ImageProcessor


def _picture(mode: str, width: int, height: int) -> Image.Image:
    """Smooth, with some detail, so that a file of it is as large as a photograph's."""
    rng = np.random.default_rng(0)
    bands = len(Image.new(mode, (1, 1)).getbands())
    coarse = rng.integers(0, 256, (height // 16, width // 16, bands), dtype=np.uint8).squeeze()
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def _file(width: int, height: int, format: str) -> str:
    path, data = scratch() / f"{width}x{height}.{format.lower()}", io.BytesIO()
    _picture("RGB", width, height).save(data, format)
    path.write_bytes(data.getvalue())
    return os.fspath(path)


IMAGES: dict[str, Callable[[], Any]] = {
    "tiny, 64 x 64 in memory": lambda: _picture("RGB", 64, 64),
    "JPEG file of 12 megapixels": lambda: _file(4000, 3000, "JPEG"),
    "PNG file of 1 megapixel": lambda: _file(1152, 864, "PNG"),
    "12 megapixels in memory": lambda: _picture("RGB", 4000, 3000),
    "1 megapixel in memory": lambda: _picture("RGB", 1152, 864),
    "1 megapixel in memory, RGBA": lambda: _picture("RGBA", 1152, 864),
    "224 x 224 in memory": lambda: _picture("RGB", 224, 224),
}


def _peer() -> Any:
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

    return Gemma4ImageProcessorPil()


def _ours(image: Any) -> Callable[[], Any]:
    processor = ImageProcessor()
    return lambda: processor([image]).pixel_values


def _theirs(image: Any) -> Callable[[], Any]:
    processor = _peer()
    return lambda: processor([image], return_tensors="pt")["pixel_values"]


BACKENDS = [
    Backend("gemma4", _ours, ours=True, absent=needs("transformers")),
    Backend("Hugging Face, with Pillow", _theirs, absent=needs("transformers")),
]
CASES = [
    Case(
        suite="load",
        operation="process an image",
        shape=name,
        backends=BACKENDS,
        make=lambda i, image=image: image(),
        judge=lambda image: equal_to(_theirs(image)()),
        rotate=False,
        threads=1,
    )
    for name, image in IMAGES.items()
]


@timed
@grid(CASES)
def test_images(benchmark: Any, rows: Callable, case: Case, backend: str) -> None:
    publish(benchmark, rows(case)[backend])
