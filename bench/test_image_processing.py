"""Image processing: ours and transformers' Pillow-based processor, which give the same bits, timed in turn."""

import io
import os
import statistics
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

from gemma4_impl.vision.processing import ImageProcessor


def picture(mode: str, width: int, height: int) -> Image.Image:
    """Smooth, with some detail, so that a file of it is as large as a photograph's."""
    rng = np.random.default_rng(0)
    bands = len(Image.new(mode, (1, 1)).getbands())
    coarse = rng.integers(0, 256, (height // 16, width // 16, bands), dtype=np.uint8).squeeze()
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def file(mode: str, width: int, height: int, format: str) -> bytes:
    data = io.BytesIO()
    picture(mode, width, height).save(data, format)
    return data.getvalue()


CASES = {
    "JPEG file of 12 megapixels": lambda: file("RGB", 4000, 3000, "JPEG"),
    "PNG file of 1 megapixel": lambda: file("RGB", 1152, 864, "PNG"),
    "12 megapixels in memory": lambda: picture("RGB", 4000, 3000),
    "1 megapixel in memory": lambda: picture("RGB", 1152, 864),
    "1 megapixel in memory, RGBA": lambda: picture("RGBA", 1152, 864),
    "224 x 224 in memory": lambda: picture("RGB", 224, 224),
}


@pytest.mark.parametrize("case", CASES)
def test_ratio(benchmark, tmp_path: Path, case: str) -> None:
    """One after the other in every round, because a machine's speed changes from one second to the next."""
    image = CASES[case]()
    if isinstance(image, bytes):
        (tmp_path / "image").write_bytes(image)
        image = os.fspath(tmp_path / "image")
    processor, peer = ImageProcessor(), Gemma4ImageProcessorPil()
    backends = {"ours": lambda: processor([image]), "transformers": lambda: peer([image], return_tensors="pt")}
    got, want = (run() for run in backends.values())
    if not torch.equal(got.pixel_values, want["pixel_values"]):
        pytest.fail("other pixels than transformers'; no time is published")
    times: dict[str, list[float]] = {name: [] for name in backends}

    def alternate() -> None:
        for name, run in backends.items():
            start = time.process_time()
            run()
            times[name].append(time.process_time() - start)

    benchmark.group = "image processing, ratios"
    benchmark.pedantic(alternate, rounds=10 if "12 mega" in case else 30, warmup_rounds=1)
    ratio = statistics.median(p / o for p, o in zip(times["transformers"], times["ours"], strict=True))
    benchmark.extra_info[f"image processing, {case}: times as fast as transformers"] = ratio
