"""Images in the sequence that a check runs on: the user's, or two that are drawn."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from gemma4_impl.config import ConfigError, TextConfig
from gemma4_impl.generate import check_prompt
from gemma4_impl.vision.config import VisionConfig
from gemma4_impl.vision.images import ImageEncoder
from gemma4_impl.vision.processing import ImageSource, ProcessedImages

KINDS = ("E2B", "26B-A4B", "31B")
"""Variants whose towers and masks differ: clipped linears; standardised and seen both ways, with experts and without.
The tiny ones are checked with images if nothing is asked for."""
PATHS = ("full", "chunked", "generate")
"""The cache paths that they are checked through."""


def drawn() -> list[Image.Image]:
    """Two pictures of different shapes: a landscape with a sun, and a tall one of stripes. No two corners, colour
    channels or directions look the same."""
    y, x = np.mgrid[0:60, 0:96]
    wide = Image.fromarray(np.stack([255 - 2 * y, 90 + x, 60 + 3 * y], axis=-1).clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(wide)
    pen.ellipse((60, 6, 84, 30), fill=(255, 220, 40))
    pen.polygon(((0, 60), (28, 24), (58, 60)), fill=(40, 90, 60))
    y, x = np.mgrid[0:80, 0:44]
    stripes = ((x + 2 * y) // 9 % 3)[..., None] == np.arange(3)
    tall = Image.fromarray((stripes * 150 + np.stack([y, x, 105 - y], axis=-1)).clip(0, 255).astype(np.uint8))
    ImageDraw.Draw(tall).rectangle((8, 50, 24, 70), fill=(250, 250, 250))
    return [wide, tall]


def place(path: Path, tokens: Sequence[int], images: Sequence[ImageSource]) -> tuple[list[int], ProcessedImages | None]:
    """The tokens with room for the images, and what the checkpoint's tower is given; None without images.

    Tokens that hold no image token get the first image after their first token and the others at equal distances;
    otherwise there must be an image token for each image, or one for each soft token.
    Raises ValueError for image tokens without an image, other numbers of them, and a sequence that exceeds the context;
    ConfigError for a checkpoint that takes text only, CheckpointError for tensors that its tower lacks, ImageError."""
    ids = list(tokens)
    if not images:
        if (marker := _image_token(path)) in ids:
            raise ValueError(f"the sequence has image tokens ({marker}) but no image comes with it; give one (--image)")
        return ids, None
    encoder = ImageEncoder.from_pretrained(path, device="meta")
    marker, processed = encoder.config.image_token_id, encoder.processor(images)
    if ids.count(marker) != sum(processed.num_soft_tokens):
        if marker not in ids:
            cuts = [1 + i * (len(ids) - 1) // len(images) for i in range(len(images))]
            for cut in reversed(cuts):
                ids.insert(cut, marker)
        ids = encoder.expand(ids, processed.num_soft_tokens)
    check_prompt(TextConfig.from_file(path), ids)
    return ids, processed.trimmed()


def fingerprint(images: ProcessedImages | None) -> str:
    """Changes with any pixel and any patch's position; empty without images."""
    if images is None:
        return ""
    images, digest = images.trimmed(), hashlib.sha256()
    for tensor in (images.pixel_values, images.positions):
        digest.update(repr(tuple(tensor.shape)).encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def tiny_checkpoints(folder: Path) -> dict[str, Path]:
    """Label -> a tiny multimodal checkpoint of each of KINDS, made in `folder`."""
    from reference.tiny import make_tiny

    return {f"tiny {kind}": make_tiny(kind, folder / f"{kind} images", multimodal=True) for kind in KINDS}


def labelled(checkpoints: Mapping[str, Path]) -> dict[str, Path]:
    """The same under the labels that cases with images have."""
    return {f"{label} + images": path for label, path in checkpoints.items()}


def _image_token(path: Path) -> int | None:
    """The checkpoint's image token; None if it takes text only."""
    try:
        return VisionConfig.from_file(path).image_token_id if path.is_dir() else None
    except ConfigError:
        return None
