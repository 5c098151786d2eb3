"""Images to what the vision tower takes: patches, their positions, and how many soft tokens they become.

Every pixel is the one that transformers' Pillow-based processor gives, which treats the same picture differently when
it is handed over as a file (there: a path or base64 text) and when as a Pillow image:

| | a file (path or bytes) | a Pillow image |
|---|---|---|
| EXIF orientation | applied | ignored (Pillow itself applies it to TIFF) |
| alpha channel (RGBA, LA, PA) | dropped: hidden colours show | composited on white |
| transparency of a palette, one entry | that colour, wherever it occurs, becomes white | that entry becomes white |
| transparency of a palette, a table | dropped | composited on white |
| one transparent colour or grey level | becomes white | becomes white |
| animation | first frame | the frame it stands at |

Greyscale (L, 1) is repeated in three channels; 16 bits (I;16), 32 bits (I) and floats (F) are not scaled but clipped to
0..255, so that most 16-bit images come out white; CMYK, YCbCr, LAB and HSV are converted as Pillow does, without colour
profiles. Then, for all: resized (bicubic, both up and down) to the most pixels that fit, in multiples of
patch_size * pooling_kernel_size a side, the aspect ratio kept but for that rounding; a side that would round to
nothing gets one multiple.

One difference: an uncompressed TIFF with an EXIF orientation may come out scrambled when transformers is given a path,
because Pillow maps such a file into memory in its turned shape. Here a file is read first, as from base64 text."""

import io
import math
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from gemma4_impl.config import ConfigError
from gemma4_impl.errors import one_line
from gemma4_impl.vision.config import VisionConfig, processor_sizes

ImageSource = Image.Image | str | Path | bytes
"""A Pillow image, the path of an image file, or the file's content."""

MAX_PIXELS = 89_478_485
"""From here on Pillow warns of a decompression bomb. Decoding takes up to 24 bytes a pixel (JPEG 2000)."""

MAX_SIDE = 2**20
"""Resizing needs 32 bytes for each pixel of a side."""

MAX_FILE_BYTES = 2**29
MAX_JPEG_SCANS = 100
"""Each pass over a progressive JPEG costs as much as decoding all of it; encoders write about ten."""

# Formats with a signature that Pillow decodes by itself. Not EPS (runs Ghostscript), nor containers of other images.
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "TIFF", "WEBP")


class ImageError(ValueError):
    """An image that cannot be used; the message names the file."""


@dataclass(frozen=True)
class ProcessedImages:
    """Images, padded with patches at the end: I images, P patches each, C = 3 * patch_size**2 values a patch."""

    pixel_values: Tensor
    """[I, P, C] float32 in [0, 1]; row, column, channel of the patch, the channel (RGB) fastest. 0 in padding."""
    positions: Tensor
    """[I, P, 2] int64: x and y of each patch, row by row of the image; -1 in padding."""
    num_soft_tokens: tuple[int, ...]
    """Soft tokens of each image: its patches / pooling_kernel_size**2."""

    def trimmed(self) -> "ProcessedImages":
        """Views without the padding that all images have in common; the tower computes the same from them."""
        patches = int((self.positions[..., 0] >= 0).any(dim=0).sum())
        return ProcessedImages(self.pixel_values[:, :patches], self.positions[:, :patches], self.num_soft_tokens)


@dataclass(frozen=True)
class ImageProcessor:
    """Turns images into `ProcessedImages`, as the module's docstring says.

    Args:
        max_soft_tokens: the most that an image may take up; the released processors know 70, 140, 280, 560 and 1120.
        position_embedding_size: patches a side that the tower has positions for.
        max_pixels: width * height from which an image is refused before it is decoded.
    """

    patch_size: int = 16
    pooling_kernel_size: int = 3
    max_soft_tokens: int = 280
    position_embedding_size: int = 10_240
    max_pixels: int = MAX_PIXELS

    @classmethod
    def from_pretrained(cls, path: str | Path, config: VisionConfig | None = None) -> "ImageProcessor":
        """The sizes of the checkpoint folder: those of `config`, by default config.json's, and the processor's own
        file's where there is one.

        Raises FileNotFoundError, and ConfigError also if the two contradict each other."""
        config, sizes = config or VisionConfig.from_file(path), processor_sizes(path)
        for key in ("patch_size", "pooling_kernel_size"):
            if sizes.get(key, getattr(config, key)) != getattr(config, key):
                want = getattr(config, key)
                raise ConfigError(f"{path}: the image processor's {key} is {sizes[key]}, but the tower's is {want}")
        return cls.from_config(config, sizes.get("max_soft_tokens", cls.max_soft_tokens))

    @classmethod
    def from_config(cls, config: VisionConfig, max_soft_tokens: int = 280) -> "ImageProcessor":
        return cls(config.patch_size, config.pooling_kernel_size, max_soft_tokens, config.position_embedding_size)

    @property
    def max_patches(self) -> int:
        return self.max_soft_tokens * self.pooling_kernel_size**2

    def __call__(self, images: Iterable[ImageSource]) -> ProcessedImages:
        """Images -> their patches, padded to `max_patches`; Pillow images are left as they are.

        Raises ImageError naming the image for one that is not an image, damaged, too large or empty; FileNotFoundError
        for a missing file. Memory: up to 24 bytes a pixel of the largest image, plus the result."""
        images = list(images)
        pixels = np.zeros((len(images), self.max_patches, 3 * self.patch_size**2), np.float32)
        positions = np.full((len(images), self.max_patches, 2), -1, np.int64)
        counts = []
        for i, source in enumerate(images):
            rgb = self._resized(source, _name(source, i))
            rows, columns = rgb.height // self.patch_size, rgb.width // self.patch_size
            n = rows * columns
            self._patches(rgb, pixels[i, :n])
            positions[i, :n, 0] = np.tile(np.arange(columns), rows)
            positions[i, :n, 1] = np.repeat(np.arange(rows), columns)
            counts.append(n // self.pooling_kernel_size**2)
        return ProcessedImages(torch.from_numpy(pixels), torch.from_numpy(positions), tuple(counts))

    def target_size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) that an image of this size is resized to."""
        side, k = self.patch_size * self.pooling_kernel_size, self.pooling_kernel_size
        # The same roundings as transformers', or a size that fits exactly may come out one multiple smaller.
        factor = math.sqrt(self.max_patches * self.patch_size**2 / (width * height))
        w, h = (math.floor(factor * length / side) for length in (width, height))
        if h == 0:
            w, h = min(width // height, self.max_patches // k**2), 1
        elif w == 0:
            w, h = 1, min(height // width, self.max_patches // k**2)
        return w * side, h * side

    def _resized(self, source: ImageSource, name: str) -> Image.Image:
        """The image in RGB and in its target size."""
        with warnings.catch_warnings(action="ignore"):
            try:
                image = source if isinstance(source, Image.Image) else _open(source, name)
                self._check(image, name)
                rgb = _to_rgb(image if image is source else _as_file(image))
                size = self.target_size(rgb.width, rgb.height)
                self._check_grid(size, rgb.size, name)
                return rgb if rgb.size == size else rgb.resize(size, Image.Resampling.BICUBIC)
            except (ImageError, FileNotFoundError):
                raise
            except Exception as error:
                # A damaged file makes Pillow's decoders raise nearly anything.
                raise ImageError(f"{name}: not a readable image ({type(error).__name__}: {one_line(error)})") from error

    def _check(self, image: Image.Image, name: str) -> None:
        width, height = image.size
        if min(width, height) < 1:
            raise ImageError(f"{name}: {width} x {height} pixels; an empty image has nothing to show")
        if width * height > self.max_pixels:
            raise ImageError(f"{name}: {width} x {height} pixels; an image may have {self.max_pixels} (max_pixels)")
        if max(width, height) > MAX_SIDE:
            raise ImageError(f"{name}: {width} x {height} pixels; a side may have {MAX_SIDE} at most")

    def _check_grid(self, size: tuple[int, int], original: tuple[int, int], name: str) -> None:
        columns, rows = (length // self.patch_size for length in size)
        if max(columns, rows) > self.position_embedding_size:
            raise ImageError(
                f"{name}: {original[0]} x {original[1]} pixels make {columns} x {rows} patches, but the model has "
                f"positions for {self.position_embedding_size} a side; crop it"
            )

    def _patches(self, rgb: Image.Image, out: np.ndarray) -> None:
        """Writes the image to `out` [rows * columns, C], rescaled."""
        p = self.patch_size
        grid = np.asarray(rgb).reshape(rgb.height // p, p, rgb.width // p, p * 3).swapaxes(1, 2)
        # For all 256 values this is transformers' product with 1/255 in float64, rounded to float32.
        np.divide(grid, np.float32(255), out=out.reshape(grid.shape), dtype=np.float32)


def _name(source: ImageSource, index: int) -> str:
    return str(source) if isinstance(source, str | Path) else f"image {index + 1}"


def _open(source: str | Path | bytes, name: str) -> Image.Image:
    """The file's first image, not decoded yet."""
    data = source if isinstance(source, bytes) else _read(Path(source), name)
    Image.init()
    formats = [format for format in _FORMATS if format in Image.OPEN]
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
    except Image.UnidentifiedImageError:
        raise ImageError(f"{name}: not an image that can be read; supported: {', '.join(formats)}") from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: {error}") from None
    if image.format in ("JPEG", "MPO") and data.count(b"\xff\xda") > MAX_JPEG_SCANS:
        raise ImageError(f"{name}: a JPEG of more than {MAX_JPEG_SCANS} scans takes too long to decode")
    return image


def _read(path: Path, name: str) -> bytes:
    if not path.exists():
        raise FileNotFoundError(f"{name}: no such file")
    if not path.is_file():
        raise ImageError(f"{name}: not a file")
    if (size := os.path.getsize(path)) > MAX_FILE_BYTES:
        raise ImageError(f"{name}: {size} bytes; an image file may have {MAX_FILE_BYTES} at most")
    return path.read_bytes()


def _as_file(image: Image.Image) -> Image.Image:
    """What transformers does to a file before it treats it as an image: upright, and without its alpha channel."""
    ImageOps.exif_transpose(image, in_place=True)
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB, with anything transparent composited on white."""
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image if image.mode == "RGB" else image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")
