"""Images of every mode and file format, for Hypothesis and by hand."""

import io

import numpy as np
from hypothesis import strategies as st
from PIL import Image

MODES = (
    "1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16",
    "I;16B", "I;16L",
)  # fmt: skip

# What each format can be written from, of lossless ones with every mode worth having.
FORMATS = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "JPEG": ("L", "RGB", "CMYK"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I", "F"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("1", "L", "P", "RGB"),
    "BMP": ("1", "L", "P", "RGB"),
    "JPEG2000": ("L", "LA", "RGB", "RGBA", "I;16"),
    "PPM": ("1", "L", "RGB"),
    "AVIF": ("RGB", "RGBA"),
    "QOI": ("RGB", "RGBA"),
}
WITH_EXIF = ("PNG", "JPEG", "TIFF", "WEBP", "AVIF")
ORIENTATION = 0x0112


def noise(mode: str, width: int, height: int, seed: int) -> Image.Image:
    """An image of random pixels, a palette too where the mode has one."""
    rng = np.random.default_rng(seed)
    if mode == "F":
        return Image.fromarray(rng.normal(100, 100, (height, width)).astype(np.float32))
    if mode == "I":
        return Image.fromarray(rng.integers(-200, 600, (height, width), dtype=np.int32))
    if mode.startswith("I;16"):
        values = rng.integers(0, 600, (height, width)).astype(">u2" if mode == "I;16B" else "<u2")
        return Image.frombytes(mode, (width, height), values.tobytes())
    if mode == "1":
        return Image.fromarray(rng.integers(0, 256, (height, width), dtype=np.uint8)).convert("1", dither=0)
    bands = 4 if mode == "RGBX" else len(Image.new(mode, (1, 1)).getbands())
    image = Image.frombytes(
        mode, (width, height), rng.integers(0, 256, width * height * bands, dtype=np.uint8).tobytes()
    )
    if mode in ("P", "PA"):
        image.putpalette(rng.integers(0, 256, 768, dtype=np.uint8).tobytes())
    return image


@st.composite
def transparencies(draw: st.DrawFn, mode: str) -> object:
    """A value for `info["transparency"]` that suits the mode."""
    level = st.integers(0, 255)
    if mode == "P":
        return draw(st.none() | level | st.binary(min_size=1, max_size=256))
    if mode in ("1", "L", "I", "I;16"):
        return draw(st.none() | level)
    if mode == "RGB":
        return draw(st.none() | st.tuples(level, level, level))
    return None


SIDES = st.integers(1, 40) | st.sampled_from([1, 2, 3, 48, 97, 300])


@st.composite
def images(draw: st.DrawFn, modes: tuple[str, ...] = MODES) -> Image.Image:
    """A Pillow image, some of its pixels transparent, and with an EXIF orientation that is to be ignored."""
    mode = draw(st.sampled_from(modes))
    image = noise(mode, draw(SIDES), draw(SIDES), draw(st.integers(0, 2**32)))
    if (transparency := draw(transparencies(mode))) is not None:
        image.info["transparency"] = transparency
    if draw(st.booleans()):
        image.getexif()[ORIENTATION] = draw(st.integers(1, 8))
    return image


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """The content of an image file, of several frames where the format has them, and with any orientation."""
    format = draw(st.sampled_from(sorted(FORMATS)))
    image = draw(images(FORMATS[format]))
    options = {}
    transparency = image.info.pop("transparency", None)
    if transparency is not None and (format == "PNG" or (format == "GIF" and isinstance(transparency, int))):
        options["transparency"] = transparency
    if format in ("GIF", "WEBP", "TIFF", "PNG") and not options and draw(st.booleans()):
        options |= {"save_all": True, "append_images": [noise(image.mode, *image.size, 1)]}
    if format in WITH_EXIF and (orientation := draw(st.integers(0, 9))):
        options["exif"] = exif(orientation)
    return encode(image, format, **options)


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    return tags.tobytes()


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    if format == "AVIF":
        options["speed"] = 10
    image.save(file, format, **options)
    return file.getvalue()
