"""Image processing: bit for bit what transformers' Pillow-based processor gives, and hostile files refused."""

import base64
import io
import logging
import re
import struct
import subprocess
import sys
import textwrap
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn_images import FORMATS, MODES, ORIENTATION, WITH_EXIF, encode, exif, files, images, noise
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.gemma4.image_processing_pil_gemma4 import (
    Gemma4ImageProcessorPil,
    get_aspect_ratio_preserving_size,
)

from gemma4_impl.vision import processing
from gemma4_impl.vision.processing import ImageError, ImageProcessor

SMALL = ImageProcessor(patch_size=4, max_soft_tokens=70)


@pytest.fixture(autouse=True)
def quiet():
    """transformers warns of images 1 or 3 pixels wide."""
    logging.getLogger("transformers").setLevel(logging.ERROR)


def theirs(sources: list, processor: ImageProcessor = SMALL) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    sizes = {key: getattr(processor, key) for key in ("patch_size", "pooling_kernel_size", "max_soft_tokens")}
    with warnings.catch_warnings(action="ignore"):
        batch = Gemma4ImageProcessorPil(**sizes)(sources, return_tensors="pt")
    return batch["pixel_values"], batch["image_position_ids"], batch["num_soft_tokens_per_image"].tolist()


def assert_same(sources: list, processor: ImageProcessor = SMALL, given: list | None = None) -> None:
    """`given` is what transformers is handed instead: it takes paths, but no bytes."""
    pixels, positions, counts = theirs(given or sources, processor)
    got = processor(sources)
    assert got.pixel_values.dtype == pixels.dtype == torch.float32
    assert got.positions.dtype == positions.dtype == torch.int64
    assert torch.equal(got.pixel_values, pixels)
    assert torch.equal(got.positions, positions)
    assert list(got.num_soft_tokens) == counts


def assert_same_or_both_refuse(sources: list, given: object) -> None:
    """Each of `sources` is the same image as `given`, which transformers is handed."""
    try:
        theirs([given])
    except Exception:
        for source in sources:
            with pytest.raises(ImageError):
                SMALL([source])
    else:
        for source in sources:
            assert_same([source], given=[given])


def as_text(data: bytes) -> str:
    """A file's content as transformers takes it."""
    return "data:image/any;base64," + base64.b64encode(data).decode()


def colour(source: object) -> tuple[int, ...]:
    """The one colour of an image of one colour."""
    values = SMALL([source]).trimmed().pixel_values.reshape(-1, 3).unique(dim=0)
    assert len(values) == 1
    return tuple((values[0] * 255).round().int().tolist())


# The same as transformers


@settings(max_examples=150, deadline=None)
@given(images())
def test_any_pillow_image(image):
    assert_same_or_both_refuse([image], image)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files())
def test_any_file(tmp_path, data):
    """From its path and from its bytes, as transformers from its bytes, and but for one case from its path."""
    path = tmp_path / "image"
    path.write_bytes(data)
    assert_same_or_both_refuse([path, str(path), data], as_text(data))
    # Pillow maps an uncompressed TIFF into memory as if it were turned already: that is another image.
    if not data.startswith((b"II", b"MM")):
        assert_same_or_both_refuse([path], str(path))


@settings(max_examples=20, deadline=None)
@given(
    st.lists(images(("RGB", "L", "RGBA")), min_size=2, max_size=4),
    st.sampled_from([(4, 2, 140), (16, 3, 280), (6, 4, 70)]),
)
def test_any_batch_and_any_sizes(sources, sizes):
    assert_same(sources, ImageProcessor(*sizes))


@settings(max_examples=1000, deadline=None)
@given(
    st.integers(1, 20_000),
    st.integers(1, 20_000),
    st.sampled_from([70, 140, 280, 560, 1120]),
    st.sampled_from([14, 16]),
)
@example(1, 20_000, 70, 16)
@example(280, 1, 280, 16)
@example(48 * 17, 48 * 16, 280, 16)
def test_any_target_size(width, height, max_soft_tokens, patch_size):
    processor = ImageProcessor(patch_size, 3, max_soft_tokens)
    want = get_aspect_ratio_preserving_size(height, width, patch_size, processor.max_patches, 3)
    assert processor.target_size(width, height) == want[::-1]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode(mode):
    """`La` is the one that Pillow does not turn into RGB."""
    image = noise(mode, 31, 20, 0)
    if mode == "La":
        with pytest.raises(ImageError, match=r"image 1: not a readable image \(ValueError: conversion from La"):
            SMALL([image])
    else:
        assert_same([image])


@pytest.mark.parametrize(
    ("format", "orientation"), [(f, 0) for f in FORMATS] + [(f, i) for f in WITH_EXIF for i in range(1, 9)]
)
def test_every_format_and_orientation(format, orientation, tmp_path):
    options = {"exif": exif(orientation)} if orientation else {}
    path = tmp_path / "image"
    path.write_bytes(encode(noise("RGB", 31, 20, 0), format, **options))
    assert_same([path, path.read_bytes()], given=[str(path)] * 2)


def test_every_grey_level():
    """Rescaling is exact for each of the 256 values."""
    image = Image.frombytes("L", (16, 16), bytes(range(256)))
    processor = ImageProcessor(patch_size=4, pooling_kernel_size=2, max_soft_tokens=4)
    assert processor.target_size(16, 16) == (16, 16)
    want = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    assert set(processor([image]).pixel_values.unique().tolist()) == set(want.tolist())


def test_a_huge_image():
    """Decoded, converted and made smaller in one go."""
    assert_same([noise("RGB", 6000, 4000, 0)], ImageProcessor())


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 1), (2, 3), (1, 100_000)])
def test_one_pixel_wide(size):
    assert_same([noise("RGB", *size, 0)])


def test_order_of_patches_and_channels():
    """Row by row, x first; within a patch rows, columns, then red, green, blue."""
    processor = ImageProcessor(patch_size=2, pooling_kernel_size=2, max_soft_tokens=2)
    image = Image.new("RGB", (8, 4))
    image.putdata([(10 * y, x, 200) for y in range(4) for x in range(8)])
    got = processor([image])
    assert got.num_soft_tokens == (2,)
    assert got.positions[0].tolist() == [[0, 0], [1, 0], [2, 0], [3, 0], [0, 1], [1, 1], [2, 1], [3, 1]]
    patch = (got.pixel_values[0, 5] * 255).round().int().reshape(2, 2, 3)
    assert patch.tolist() == [[[20, 2, 200], [20, 3, 200]], [[30, 2, 200], [30, 3, 200]]]


def test_trimmed():
    got = SMALL([noise("RGB", 30, 30, 0), noise("RGB", 90, 30, 0)])
    assert got.pixel_values.shape[1] == SMALL.max_patches
    short = got.trimmed()
    assert short.pixel_values.shape[1] == 9 * max(got.num_soft_tokens)
    assert (got.positions[:, short.positions.shape[1] :] == -1).all()
    assert torch.equal(got.pixel_values[:, : short.positions.shape[1]], short.pixel_values)


def test_no_images():
    assert SMALL([]).trimmed().pixel_values.shape == (0, 0, 48)


def test_pillow_images_are_left_as_they_are():
    image = noise("RGBA", 10, 20, 0)
    image.getexif()[ORIENTATION] = 6
    before = image.tobytes()
    SMALL([image])
    assert (image.size, image.mode, image.tobytes()) == ((10, 20), "RGBA", before)


# What the module's docstring says of odd images

WHITE, RED, BLUE = (255, 255, 255), (255, 0, 0), (0, 0, 255)


def palette_image(transparency: object) -> Image.Image:
    """One colour, red; entries 1 and 2 of the palette are both red, and the pixels are 1."""
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 255, *RED, *RED])
    image.info["transparency"] = transparency
    return image


def test_transparency():
    """As a Pillow image it shows white, as a file what lies under it."""
    for image in (Image.new("RGBA", (8, 8), (*RED, 0)), Image.new("RGBA", (8, 8), (*RED, 0)).convert("PA")):
        assert colour(image) == WHITE
    hidden = Image.new("RGBA", (8, 8), (*RED, 0))
    for format in ("PNG", "TIFF", "WEBP"):
        options = {"lossless": True, "exact": True} if format == "WEBP" else {}
        assert colour(encode(hidden, format, **options)) == RED
    assert colour(Image.new("RGBA", (8, 8), (*RED, 128))) == (255, 127, 127)
    assert colour(Image.new("LA", (8, 8), (0, 0))) == WHITE
    assert colour(encode(Image.new("LA", (8, 8), (7, 0)), "PNG")) == (7, 7, 7)


def test_transparent_palette_entries():
    table = b"\xff\x00\xff"
    assert colour(palette_image(1)) == colour(palette_image(table)) == WHITE
    assert colour(palette_image(0)) == RED
    # In a file the entry stands for its colour, which entry 1 has too; a table is dropped.
    assert colour(encode(palette_image(2), "PNG", transparency=2)) == WHITE
    assert colour(encode(palette_image(b"\xff\x80"), "PNG", transparency=b"\xff\x80")) == RED


def test_one_transparent_colour():
    for image, key in ((Image.new("RGB", (8, 8), RED), RED), (Image.new("L", (8, 8), 7), 7)):
        image.info["transparency"] = key
        assert colour(image) == colour(encode(image, "PNG", transparency=key)) == WHITE


def test_more_than_8_bits_are_clipped():
    for mode in ("I;16", "I", "F"):
        assert colour(Image.new(mode, (8, 8), 300)) == WHITE
        assert colour(Image.new(mode, (8, 8), 90)) == (90, 90, 90)
    assert colour(encode(Image.new("I;16", (8, 8), 40_000), "PNG")) == WHITE


def test_greyscale_and_cmyk():
    assert colour(Image.new("L", (8, 8), 90)) == (90, 90, 90)
    assert colour(Image.new("1", (8, 8), 1)) == WHITE
    assert colour(Image.new("CMYK", (8, 8), (0, 255, 255, 0))) == RED


def test_orientation():
    """Top half red: turned by 90 degrees, the right half is; a Pillow image stays as it lies."""
    image = Image.new("RGB", (64, 64), BLUE)
    image.paste(RED, (0, 0, 64, 32))
    got = SMALL([encode(image, "PNG", exif=exif(6))])
    n = 9 * got.num_soft_tokens[0]
    right = got.positions[0, :n, 0] > 15
    assert (got.pixel_values[0, :n][right].reshape(-1, 3).mean(dim=0)[0]) > 0.9
    image.getexif()[ORIENTATION] = 6
    assert torch.equal(SMALL([image]).pixel_values, SMALL([encode(image, "PNG")]).pixel_values)


def test_animation():
    frames = [Image.new("RGB", (8, 8), RED), Image.new("RGB", (8, 8), BLUE)]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert colour(data) == RED
    with Image.open(io.BytesIO(data)) as image:
        assert colour(image) == RED
        image.seek(1)
        assert colour(image) == BLUE


# Hostile images


def png(width: int, height: int, data: bytes = b"") -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def many_scans() -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    data = encode(noise("L", 16, 16, 0), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * 200 + data[-2:]


def with_bytes(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


WHOLE = encode(noise("RGB", 64, 64, 0), "PNG")
HOSTILE = {
    "empty.png": (b"", "not an image that can be read; supported: .*PNG"),
    "text.png": (b"GIF is not this\n" * 100, "not an image that can be read"),
    "page.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n", "not an image that can be"),
    "cut.png": (WHOLE[: len(WHOLE) // 2], "not a readable image"),
    "cut.jpg": (encode(noise("RGB", 64, 64, 0), "JPEG")[:1000], r"not a readable image \(OSError: image file is trunc"),
    "cut.webp": (encode(noise("RGB", 64, 64, 0), "WEBP")[:600], "not a"),
    "crc.png": (with_bytes(WHOLE, 60, b"\0\0\0\0"), "not a readable image"),
    "zero.png": (png(0, 10), "not a"),
    "bomb.png": (png(60_000, 60_000), "60000|3600000000 pixels"),
    "large.png": (png(10_000, 10_000), "10000 x 10000 pixels; an image may have 89478485"),
    "long.png": (png(2**21, 1), "2097152 x 1 pixels; a side may have 1048576 at most"),
    "absurd.png": (png(2**31 - 1, 2**31 - 1), "pixels"),
    "absurd.bmp": (with_bytes(encode(noise("RGB", 8, 8, 0), "BMP"), 18, struct.pack("<ii", 2**30, 2**30)), "pixels"),
    "absurd.gif": (with_bytes(encode(noise("L", 8, 8, 0), "GIF"), 6, struct.pack("<HH", 65535, 65535)), "pixels"),
    "absurd.ppm": (b"P6 99999999 99999999 255\n", "pixels"),
    "absurd.qoi": (b"qoif" + struct.pack(">IIBB", 2**31, 2**31, 3, 0), "pixels|not a"),
    "scans.jpg": (many_scans(), "a JPEG of more than 100 scans takes too long"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(name, tmp_path):
    """One line, naming the file; from bytes, naming which image."""
    data, message = HOSTILE[name]
    (tmp_path / name).write_bytes(data)
    for source, called in ((tmp_path / name, str(tmp_path / name)), (str(tmp_path / name), str(tmp_path / name))):
        with pytest.raises(ImageError, match=message) as caught:
            SMALL([source])
        assert str(caught.value).startswith(f"{called}: ")
        assert "\n" not in str(caught.value)
    with pytest.raises(ImageError, match=f"^image 2: .*({message})"):
        SMALL([WHOLE, data])


def test_refused_before_memory_is_taken(tmp_path):
    """All of them together, in another process, whose memory is measured."""
    for name, (data, _) in HOSTILE.items():
        (tmp_path / name).write_bytes(data)
    code = """
        import resource, sys
        from pathlib import Path
        from PIL import Image
        from gemma4_impl.vision.processing import ImageError, ImageProcessor
        Image.init()
        processor = ImageProcessor()
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        before, refused = peak(), 0
        for path in Path(sys.argv[1]).iterdir():
            try:
                processor([path])
            except ImageError:
                refused += 1
        print(refused, (peak() - before) // 1024)
    """
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    refused, grown = map(int, done.stdout.split())
    assert refused == len(HOSTILE)
    # The result's own arrays, of 8 MB, are made first.
    assert grown < 40


def test_other_bad_inputs(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png: no such file$"):
        SMALL([tmp_path / "nowhere.png"])
    with pytest.raises(ImageError, match=f"{re.escape(str(tmp_path))}: not a file"):
        SMALL([tmp_path])
    with pytest.raises(ImageError, match="/dev/zero: not a file"):
        SMALL(["/dev/zero"])
    with pytest.raises(ImageError, match="image 1: not a readable image"):
        SMALL([np.zeros((4, 4, 3), np.uint8)])
    with pytest.raises(ImageError, match="image 1: 0 x 5 pixels; an empty image has nothing to show"):
        SMALL([Image.new("RGB", (0, 5))])
    with pytest.raises(ImageError, match=r"image 1: 20 x 10 pixels; an image may have 199 \(max_pixels\)"):
        ImageProcessor(max_pixels=199)([Image.new("RGB", (20, 10))])
    monkeypatch.setattr(processing, "MAX_FILE_BYTES", 10)
    (tmp_path / "big.png").write_bytes(WHOLE)
    with pytest.raises(ImageError, match=r"big\.png: \d+ bytes; an image file may have 10 at most"):
        SMALL([tmp_path / "big.png"])


def test_more_patches_than_positions():
    processor = ImageProcessor(4, 3, 70, position_embedding_size=30)
    assert processor([Image.new("RGB", (30, 30))]).num_soft_tokens == (64,)
    with pytest.raises(
        ImageError, match="image 1: 300 x 20 pixels make 96 x 6 patches, but the model has positions for 30"
    ):
        processor([Image.new("RGB", (300, 20))])


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(sorted(FORMATS)),
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=6),
    st.integers(0, 10_000),
)
def test_damaged_files(format, changes, length):
    """Bytes changed anywhere and the end cut off: the same as transformers, or refused."""
    data = bytearray(encode(noise("RGB", 20, 13, 0), format))
    for at, value in changes:
        data[at % len(data)] = value
    data = bytes(data[: max(1, length % (2 * len(data)))])
    processor = ImageProcessor(patch_size=4, max_soft_tokens=70, max_pixels=10**6)
    try:
        got = processor([data])
    except ImageError:
        return
    pixels, positions, _ = theirs([as_text(data)], processor)
    assert torch.equal(got.pixel_values, pixels)
    assert torch.equal(got.positions, positions)
