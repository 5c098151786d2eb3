"""Images in a check's sequence: where they are put, the clear lines, tap files, and their pictures in the report."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file

from gemma4_impl.vision.processing import ImageProcessor
from parity import engine, report
from parity.cli import cli
from parity.images import drawn, fingerprint, labelled, place
from parity.inputs import default_tokens
from parity.plots_images import grid, pixels

IMAGE, BOI, EOI = 99, 98, 100


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("drawn")
    paths = [folder / f"{i}.png" for i in range(2)]
    for image, path in zip(drawn(), paths, strict=True):
        image.save(path)
    return [str(path) for path in paths]


def run(*args: object) -> tuple[int, str]:
    result = CliRunner().invoke(cli, [str(arg) for arg in args])
    return result.exit_code, result.output


def counts(path: Path) -> tuple[int, ...]:
    return ImageProcessor.from_pretrained(path)(drawn()).num_soft_tokens


# The sequence


def test_the_first_comes_after_the_first_token_and_the_others_between(tiny_images):
    path = tiny_images("31B")
    text = [2, *range(200, 209)]
    ids, images = place(path, text, drawn())
    first, second = ([BOI, *[IMAGE] * n, EOI] for n in counts(path))
    assert images.num_soft_tokens == counts(path)
    assert ids == [2, *first, *text[1:5], *second, *text[5:]]


def test_image_tokens_are_where_the_prompt_has_them(tiny_images):
    path = tiny_images("31B")
    first, second = ([BOI, *[IMAGE] * n, EOI] for n in counts(path))
    ids, _ = place(path, [2, 7, IMAGE, 8, IMAGE, 9], drawn())
    assert ids == [2, 7, *first, 8, *second, 9]
    assert place(path, ids, drawn())[0] == ids


def test_without_images_nothing_changes(tiny, tiny_images):
    assert place(tiny_images("31B"), [2, 7, 8], ()) == ([2, 7, 8], None)
    assert place(tiny("31B"), [2, IMAGE, 8], ()) == ([2, IMAGE, 8], None)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [([2, IMAGE, 8], "1 image tokens"), ([2] * 500, "the context holds 512")],
)
def test_what_does_not_fit_is_refused(tokens, message, tiny_images):
    with pytest.raises(ValueError, match=message):
        place(tiny_images("31B"), tokens, drawn())


def test_the_fingerprint_is_of_pixels_and_places(tiny_images):
    processor = ImageProcessor.from_pretrained(tiny_images("31B"))
    one, again, turned = processor(drawn()), processor(drawn()).trimmed(), processor(drawn()[::-1])
    other = drawn()
    other[0].putpixel((0, 0), (0, 0, 0))
    assert fingerprint(one) == fingerprint(again)
    assert len({fingerprint(images) for images in (None, one, turned, processor(other))}) == 4


# The commands


def test_clear_lines(tiny, tiny_images, files, tmp_path):
    mm, text = tiny_images("31B"), tiny("31B")
    broken = tmp_path / "broken"
    shutil.copytree(mm, broken)
    tensors = load_file(broken / "model.safetensors")
    lost = next(name for name in tensors if "vision_tower" in name)
    save_file({n: t for n, t in tensors.items() if n != lost}, broken / "model.safetensors", {"format": "pt"})
    lines = [
        ((text, "--image", files[0]), "takes text only"),
        ((mm, "--tokens", f"2,{IMAGE},200"), "no image comes with it"),
        ((mm, "--tokens", f"2,{IMAGE},{IMAGE},200", "--image", files[0]), "2 image tokens"),
        ((mm, "--image", tmp_path / "no.png"), "no such file"),
        ((mm, "--image", mm / "config.json"), "not an image"),
        ((broken, "--image", files[0]), f"1 missing: {lost.removeprefix('model.')}"),
        ((mm, "--image", files[0], "--stream"), "without --stream"),
        ((mm, "--image", files[0], "--candidate", "quantized:default"), "only with our own models"),
    ]
    for args, message in lines:
        code, output = run("parity", *args, "-o", tmp_path / "out")
        assert (code, output.count("\n")) == (2, 1), output
        assert message in output
    for options in (("--impl", "hf", "--stream"), ("--tokens", f"2,{IMAGE}", "--image", files[1])):
        code, output = run("capture", mm, "--image", files[0], *options, "-o", tmp_path / "x")
        assert (code, output.count("\n")) == (2, 1), output


def test_capture_and_compare(tiny_images, files, tmp_path):
    path = tiny_images("E2B")
    shown = ("--image", files[0], "--image", files[1], "--length", 12)
    for name, options in (("t", ("hf", "--dtype", "float64")), ("r", ("hf",)), ("c", ("torch", "--path", "chunked"))):
        assert run("capture", path, *shown, "--impl", *options, "-o", tmp_path / name)[0] == 0
    code, output = run("compare", tmp_path / "c", tmp_path / "r", "--truth", tmp_path / "t")
    assert code == 0, output
    assert "vision." in run("compare", tmp_path / "c", tmp_path / "r")[1]
    # The same sizes and so the same tokens, but other pixels.
    Image.open(files[0]).rotate(180).save(tmp_path / "turned.png")
    other = ("--image", tmp_path / "turned.png", *shown[2:])
    assert run("capture", path, *other, "-o", tmp_path / "o")[0] == 0
    code, output = run("compare", tmp_path / "c", tmp_path / "o")
    assert (code, "with different images" in output) == (2, True), output


# The report


def test_pixels_are_the_images(tiny_images):
    processor = ImageProcessor.from_pretrained(tiny_images("31B"))
    images = processor(drawn())
    for i, image in enumerate(drawn()):
        resized = image.resize(processor.target_size(*image.size), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(pixels(images, i), np.asarray(resized, dtype=np.float32) / np.float32(255))
        side = processor.patch_size * processor.pooling_kernel_size
        tokens = grid(images, i, np.arange(processor.max_soft_tokens))
        assert tokens.shape == (resized.height // side, resized.width // side)
        assert tokens[1, 0] == tokens.shape[1]


def test_the_report_shows_them(tiny_images, tmp_path):
    path = tiny_images("26B-A4B")
    made = engine.run(labelled({"tiny": path}), default_tokens, ["float32"], ["full"], images=drawn())
    report.write(made, tmp_path, {"inputs": made.inputs})
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<h2>Images</h2>" in page
    assert page.count("data:image/png;base64") >= 4
    assert "tiny + images float32: errors of soft tokens" in page
    assert "http" not in page.replace("http://www.w3.org/", "").replace("https://www.w3.org/", "")
    (case,) = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["cases"]
    assert case["checkpoint"] == "tiny + images"
    assert case["taps"][0]["name"] == "vision.patch_embed"


def test_a_report_of_text_has_no_section_of_images(tiny, tmp_path):
    made = engine.run({"tiny": tiny("31B")}, lambda config, path: [2, 200, 201], ["float32"], ["full"])
    report.write(made, tmp_path, {})
    assert "<h2>Images</h2>" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_reports_add_up(tiny_images):
    path = tiny_images("31B")
    one = engine.Report(inputs={"a": {}}, images={"a": ImageProcessor.from_pretrained(path)(drawn())})
    both = one + engine.Report(inputs={"b": {}})
    assert (set(both.inputs), set(both.images), both.cases) == ({"a", "b"}, {"a"}, [])
    assert torch.is_tensor(both.images["a"].positions)
