"""The vision tower from a llama.cpp `mmproj` file: the soft tokens that the same weights give from safetensors."""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gemma4_impl.checkpoint import CheckpointError
from gemma4_impl.cli import cli
from gemma4_impl.config import ConfigError
from gemma4_impl.gguf.mmproj import Mmproj
from gemma4_impl.gguf.reader import GGUFError
from gemma4_impl.names import CLIP_BOUNDS, tower_from_gguf, tower_to_gguf
from gemma4_impl.vision.config import VisionConfig
from gemma4_impl.vision.encoder import Vision
from gemma4_impl.vision.images import ImageEncoder
from gemma4_impl.vision.processing import ProcessedImages
from reference.tiny_gguf import make_tiny_gguf
from reference.tiny_mmproj import make_tiny_mmproj, tower_tensors, type_of

KINDS = ("E2B", "26B-A4B", "31B")


@dataclass
class Files:
    """One model as a multimodal folder, as a text GGUF file and as `mmproj` files."""

    folder: Path
    text: Path

    def mmproj(self, types: str = "F32") -> Path:
        path = self.text.with_name(f"mmproj-{types}.gguf")
        return path if path.exists() else make_tiny_mmproj(self.folder, path, types)


@pytest.fixture(scope="module")
def files(tiny_images, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Files]:
    made: dict[str, Files] = {}

    def make(variant: str) -> Files:
        if variant not in made:
            folder = tiny_images(variant)
            out = tmp_path_factory.mktemp("mmproj") / "text.gguf"
            made[variant] = Files(folder, make_tiny_gguf(folder, out))
        return made[variant]

    return make


def some_images(encoder: ImageEncoder) -> ProcessedImages:
    rng = np.random.default_rng(0)
    sizes = [(30, 40), (90, 20), (17, 17)]
    return encoder.processor([Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes])


# The same weights


@pytest.mark.parametrize("beside", ["text", "folder"])
@pytest.mark.parametrize("variant", KINDS)
def test_soft_tokens_are_those_from_safetensors(variant: str, beside: str, files) -> None:
    made = files(variant)
    want = ImageEncoder.from_pretrained(made.folder)
    got = ImageEncoder.from_pretrained(made.mmproj(), text=getattr(made, beside))
    assert got.config == want.config
    assert got.bidirectional == (variant != "E2B")
    assert got.model.embed_vision.embedding_projection.weight.dtype == torch.float32
    images = some_images(want)
    for ours, theirs in zip(got.encode(images), want.encode(images), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("variant", KINDS)
def test_every_tensor_is_the_checkpoints(variant: str, files) -> None:
    made = files(variant)
    source = Mmproj(made.mmproj())
    stored = {name.removeprefix("model."): values for name, values in tower_tensors(made.folder).items()}
    assert set(source.towers) == set(stored)
    for name, values in stored.items():
        got = source.tower(name)
        assert got.shape == values.shape
        assert np.array_equal(got.numpy(), values), name


@pytest.mark.parametrize("types", ["F16", "BF16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("variant", KINDS)
def test_other_types_give_the_soft_tokens_of_the_weights_rounded(variant: str, types: str, files) -> None:
    made = files(variant)
    source = Mmproj(made.mmproj(types))
    assert source.dtype == torch.bfloat16
    got = ImageEncoder.from_pretrained(source.path, torch.float32, text=made.text)
    exact = ImageEncoder.from_pretrained(made.folder)
    state, changed = {}, 0
    for name, values in tower_tensors(made.folder).items():
        ours = name.removeprefix("model.")
        # The patch embedding has four dimensions in the file, and no type with blocks.
        shape = (0, 0, 0, 0) if "input_proj" in ours else values.shape
        kind = gguf.GGMLQuantizationType[type_of(tower_to_gguf(ours), shape, types)]
        rounded = values if kind.name == "F32" else dequantize(quantize(values, kind), kind)
        changed += not np.array_equal(rounded, values)
        state[ours] = torch.from_numpy(np.array(rounded).reshape(values.shape))
    assert changed > 5 * exact.config.num_hidden_layers
    want = Vision(exact.config)
    want.load_state_dict(state)
    images = some_images(exact)
    want = ImageEncoder(want.eval(), exact.processor).encode(images)
    for ours, theirs, float32 in zip(got.encode(images), want, exact.encode(images), strict=True):
        assert torch.equal(ours, theirs)
        assert not torch.equal(ours, float32)


def test_the_folder_says_how_long_an_image_is(files) -> None:
    made = files("31B")
    assert ImageEncoder.from_pretrained(made.mmproj(), text=made.folder).processor.max_soft_tokens == 70
    assert ImageEncoder.from_pretrained(made.mmproj(), text=made.text).processor.max_soft_tokens == 280


def test_a_text_only_folder_takes_the_ids_from_its_vocabulary(tiny, files, tmp_path: Path) -> None:
    made = files("31B")
    got = ImageEncoder.from_pretrained(made.mmproj(), text=tiny("31B"))
    want = VisionConfig.from_file(made.folder)
    assert got.config == want
    shutil.copytree(tiny("31B"), tmp_path / "x")
    file = tmp_path / "x" / "tokenizer.json"
    file.write_text(file.read_text(encoding="utf-8").replace("<image|>", "<picture|>"), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"neither config.json nor the vocabulary knows <image\|>"):
        ImageEncoder.from_pretrained(made.mmproj(), text=tmp_path / "x")


def test_an_audio_tower_is_left_alone(files, tmp_path: Path) -> None:
    made = files("E2B")
    extra = {"a.blk.0.attn_q.weight": np.ones((8, 8), np.float32), "mm.a.input_projection.weight": np.ones((8, 8))}
    keys = {"clip.has_audio_encoder": True, "clip.audio.block_count": 1}
    path = rewrite(made.mmproj(), tmp_path / "x.gguf", keys, extra)
    assert set(Mmproj(path).towers) == set(Mmproj(made.mmproj()).towers)
    ImageEncoder.from_pretrained(path, text=made.text)


# Names


LEAVES = [
    *("input_layernorm.weight", "post_attention_layernorm.weight", "pre_feedforward_layernorm.weight"),
    *("post_feedforward_layernorm.weight", "self_attn.q_norm.weight", "self_attn.k_norm.weight"),
    *(
        f"{linear}.{part}"
        for linear in [*(f"self_attn.{p}_proj" for p in "qkvo"), *(f"mlp.{p}_proj" for p in ("gate", "up", "down"))]
        for part in ("linear.weight", *CLIP_BOUNDS)
    ),
]


@given(index=st.integers(0, 10**6), leaf=st.sampled_from(LEAVES))
def test_names_go_both_ways(index: int, leaf: str) -> None:
    name = f"vision_tower.encoder.layers.{index}.{leaf}"
    theirs = tower_to_gguf(name)
    assert theirs.startswith(f"v.blk.{index}.")
    assert tower_from_gguf(theirs) == name
    for spelt in (theirs.replace(f".{index}.", f".0{index}."), theirs.upper(), theirs[2:], f"{theirs}.1"):
        assert tower_from_gguf(spelt) is None


@given(st.one_of(st.text(max_size=30), st.from_regex(r"(v|mm|a)\.(blk\.\d+\.)?[a-z_0-9.]+", fullmatch=True)))
@settings(max_examples=200)
def test_any_name_is_one_of_ours_or_none(text: str) -> None:
    name = tower_from_gguf(text)
    assert name is None or tower_to_gguf(name) == text
    if not text.startswith("vision_tower."):
        with pytest.raises(ValueError, match="is no tensor of Gemma 4's vision tower"):
            tower_to_gguf(text)


@given(index=st.integers(0, 10**6), leaf=st.text(max_size=20))
def test_what_is_no_tensor_has_no_name(index: int, leaf: str) -> None:
    leaf = leaf if leaf not in LEAVES else ""
    for name in (f"vision_tower.encoder.layers.{index}.{leaf}", f"vision_tower.encoder.layers.0{index}.{LEAVES[0]}"):
        with pytest.raises(ValueError, match="is no tensor of Gemma 4's vision tower"):
            tower_to_gguf(name)


@pytest.mark.parametrize("variant", KINDS)
def test_every_tensor_of_a_tower_has_a_name_of_its_own(variant: str, files) -> None:
    config = VisionConfig.from_file(files(variant).folder)
    with torch.device("meta"):
        ours = list(Vision(config).state_dict())
    theirs = [tower_to_gguf(name) for name in ours]
    assert [tower_from_gguf(name) for name in theirs] == ours
    known = {t.name for t in gguf.GGUFReader(files(variant).mmproj()).tensors}
    assert set(theirs) == known


# The commands


def generate(*args: Any, image: Path | None = None):
    shown = [] if image is None else ["--image", str(image)]
    rest = ["--prompt", "What is this?", "--temperature", "0", "--max-new-tokens", "6"]
    return CliRunner().invoke(cli, ["generate", *map(str, args), *shown, *rest])


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "a.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (31, 47, 3), dtype=np.uint8)).save(path)
    return path


@pytest.mark.parametrize("variant", KINDS)
def test_generate_says_the_same_from_gguf_files_and_from_the_folder(variant, files, picture, tmp_path) -> None:
    made = files(variant)
    # GGUF files do not say how many soft tokens an image may have.
    folder = shutil.copytree(made.folder, tmp_path / "folder")
    processor = json.loads((folder / "processor_config.json").read_text())
    processor["image_processor"]["max_soft_tokens"] = 280
    (folder / "processor_config.json").write_text(json.dumps(processor))
    runs = {
        "folder": generate(folder, image=picture),
        "gguf": generate(made.text, "--mmproj", made.mmproj(), image=picture),
        "both": generate(folder, "--mmproj", made.mmproj(), image=picture),
        "text": generate(made.text),
    }
    assert {name: run.exit_code for name, run in runs.items()} == dict.fromkeys(runs, 0), runs["gguf"].output
    count = re.compile(r"prompt (\d+) tokens")
    found = {name: (run.stdout, int(count.search(run.stderr)[1])) for name, run in runs.items()}
    assert found["gguf"] == found["both"] == found["folder"]
    assert found["text"][1] < found["gguf"][1] - 100


def test_images_with_a_gguf_file_need_an_mmproj_file(files, picture) -> None:
    made = files("E2B")
    assert_one_line(
        generate(made.text, image=picture),
        f"{made.text}: holds no vision tower; to use images, give the model's mmproj file (--mmproj)",
    )


def test_mmproj_files_that_are_none(files, picture, tmp_path) -> None:
    made = files("E2B")
    run = generate(made.text, "--mmproj", made.text, image=picture)
    assert_one_line(run, f"{made.text}: holds no vision tower; to use images, give the model's mmproj file (--mmproj)")
    run = generate(made.text, "--mmproj", tmp_path / "absent.gguf", image=picture)
    assert_one_line(run, f"{tmp_path / 'absent.gguf'}: no such file")
    assert_one_line(generate(made.text, "--mmproj", tmp_path, image=picture), "is a directory")
    run = generate(made.text, "--mmproj", picture, image=picture)
    assert_one_line(run, f"{picture}: not a GGUF file")
    run = generate(made.mmproj(), image=picture)
    assert_one_line(run, f"{made.mmproj()}: ")


def assert_one_line(run, message: str) -> None:
    lines = run.stderr.splitlines()
    assert (run.exit_code, len(lines)) == (2, 1), run.output
    assert lines[0].startswith("gemma4: error: ")
    assert message in lines[0]


def test_inspect_shows_what_each_tensor_is(files) -> None:
    path = files("E2B").mmproj("Q8_0")
    run = CliRunner().invoke(cli, ["gguf", "inspect", str(path), "--json"])
    assert run.exit_code == 0
    found = json.loads(run.stdout)
    assert found["holds"] == "vision tower of 'E2B'"
    assert {t["name"]: t["is"] for t in found["tensors"]} == {
        tower_to_gguf(name): [name] for name in Mmproj(path).towers
    }


# Files that are wrong


def rewrite(
    source: Path,
    out: Path,
    keys: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray | None] | None = None,
) -> Path:
    """A copy of the F32 file `source` with other keys and tensors; None leaves one out."""
    read = gguf.GGUFReader(source)
    values = {k: f.contents() for k, f in read.fields.items() if not k.startswith("GGUF.") and f.contents() is not None}
    values |= keys or {}
    writer = gguf.GGUFWriter(out, values.pop("general.architecture"))
    for key, value in values.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
            kinds[type(value)](key, value)
    data = {t.name: np.array(t.data) for t in read.tensors} | dict(tensors or {})
    for name, array in data.items():
        if array is not None:
            writer.add_tensor(name, np.ascontiguousarray(array, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.mark.parametrize(
    ("variant", "keys", "error", "message"),
    [
        ("E2B", {"clip.has_vision_encoder": None}, GGUFError, "but no vision tower"),
        (
            "E2B",
            {"clip.has_vision_encoder": False, "clip.has_audio_encoder": True},
            GGUFError,
            "holds the audio tower of 'E2B', but no vision tower",
        ),
        (
            "E2B",
            {"clip.vision.projector_type": "gemma3"},
            GGUFError,
            "clip.vision.projector_type = 'gemma3'; expected 'gemma4v'",
        ),
        ("E2B", {"clip.projector_type": "gemma4uv"}, GGUFError, "clip.projector_type = 'gemma4uv'; expected"),
        ("E2B", {"clip.vision.projector_type": None}, GGUFError, "clip.vision.projector_type = None"),
        ("E2B", {"clip.use_silu": True}, GGUFError, "clip.use_silu is true"),
        ("E2B", {"clip.vision.projection_dim": 48}, ConfigError, "= 48, but the text model's hidden_size is 40"),
        ("E2B", {"clip.vision.embedding_length": None}, ConfigError, "clip.vision.embedding_length is missing"),
        ("E2B", {"clip.vision.patch_size": "4"}, ConfigError, "clip.vision.patch_size = '4': must be an integer"),
        ("E2B", {"clip.vision.block_count": 0}, ConfigError, "clip.vision.block_count = 0: must be an integer >= 1"),
        ("E2B", {"clip.vision.block_count": 1 << 30}, ConfigError, "needs more than the"),
        ("E2B", {"clip.vision.block_count": 3}, CheckpointError, "does not fit the metadata; 41 missing: "),
        ("E2B", {"clip.vision.block_count": 1}, CheckpointError, "does not fit the metadata; 41 unexpected: "),
        ("31B", {"clip.vision.attention.head_count": 4}, CheckpointError, r"q_proj.linear.weight is [40, 36], exp"),
        ("31B", {"clip.vision.attention.head_count_kv": 3}, ConfigError, "head_count_kv gives num_key_value_heads"),
        ("E2B", {"clip.vision.attention.head_dim": 12}, ConfigError, "= 12, but v.blk.0.attn_q_norm.weight has 8"),
        ("E2B", {"clip.vision.attention.layer_norm_epsilon": -1.0}, ConfigError, "must be a positive number"),
        ("E2B", {"clip.vision.image_mean": [0.5, 0.5, 0.5]}, ConfigError, "does not normalise images; expected 0.0"),
        ("E2B", {"clip.vision.image_std": 1.0}, ConfigError, "clip.vision.image_std"),
        ("E2B", {"clip.vision.feature_layer": 3}, ConfigError, "feature_layer' = 3 is unknown; it would be ignored"),
        ("31B", {"clip.vision.projector.scale_factor": 1}, ConfigError, "scale_factor gives pooling_kernel_size = 1"),
        ("E2B", {"clip.vision.patch_size": 6}, CheckpointError, "input_proj.weight is [32, 48], expected [32, 108]"),
        ("E2B", {"clip.vision.embedding_length": 1 << 20}, ConfigError, "embedding_length gives hidden_size = 1048576"),
    ],
)
def test_wrong_metadata(variant, keys, error, message, files, tmp_path) -> None:
    path = rewrite(files(variant).mmproj(), tmp_path / "x.gguf", keys)
    with pytest.raises(error, match=re.escape(message)) as caught:
        ImageEncoder.from_pretrained(path, text=files(variant).text)
    assert type(caught.value) is error
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("variant", "tensors", "error", "message"),
    [
        ("E2B", {"v.pre_ln.weight": np.ones(8)}, CheckpointError, "tensor 'v.pre_ln.weight' is unknown in Gemma 4's"),
        ("E2B", {"v.patch_embd.weight": None}, CheckpointError, "1 missing: vision_tower.patch_embedder.input_proj"),
        ("E2B", {"v.patch_embd.weight": np.ones((32, 48))}, CheckpointError, "is [32, 48], expected [D, 3, patch, pat"),
        ("E2B", {"v.patch_embd.weight": np.ones((32, 4, 4, 3))}, CheckpointError, "v.patch_embd.weight is [32, 4, 4, "),
        ("E2B", {"v.position_embd.weight": None}, ConfigError, "tensor v.position_embd.weight is missing"),
        ("E2B", {"v.position_embd.weight": np.ones((216, 32))}, ConfigError, "v.position_embd.weight has the shape"),
        ("E2B", {"v.position_embd.weight": np.ones((3, 8, 32))}, CheckpointError, "is [3, 8, 32], expected [2, 8, 32]"),
        ("E2B", {"v.blk.0.attn_q_norm.weight": None}, ConfigError, "tensor v.blk.0.attn_q_norm.weight is missing"),
        ("E2B", {"v.blk.0.attn_q_norm.weight": np.ones(6)}, ConfigError, "attn_q_norm.weight gives head_dim = 6"),
        ("E2B", {"v.blk.1.attn_q.input_max": None}, CheckpointError, "1 missing: vision_tower.encoder.layers.1.self_a"),
        ("E2B", {"v.blk.1.attn_q.input_max": np.ones(2)}, CheckpointError, "q_proj.input_max is [2], expected []"),
        ("31B", {"v.std_scale": None}, CheckpointError, "1 missing: vision_tower.std_scale"),
        ("31B", {"mm.input_projection.weight": np.ones((7, 36))}, CheckpointError, "is [7, 36], expected ["),
    ],
)
def test_wrong_tensors(variant, tensors, error, message, files, tmp_path) -> None:
    path = rewrite(files(variant).mmproj(), tmp_path / "x.gguf", tensors=tensors)
    with pytest.raises(error, match=re.escape(message)) as caught:
        ImageEncoder.from_pretrained(path, text=files(variant).text)
    assert type(caught.value) is error
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_the_tower_of_another_model(files) -> None:
    with pytest.raises(ConfigError, match="it is another model's vision tower"):
        ImageEncoder.from_pretrained(files("E2B").mmproj(), text=files("31B").text)
    with pytest.raises(ConfigError, match="it is another model's vision tower"):
        ImageEncoder.from_pretrained(files("E2B").mmproj(), text=files("31B").folder)
    with pytest.raises(CheckpointError, match="give its text model too"):
        ImageEncoder.from_pretrained(files("E2B").mmproj())


def test_a_vocabulary_without_image_tokens(files, tmp_path) -> None:
    made = files("31B")
    raw = made.text.read_bytes()
    assert raw.count(b"<|image|>") >= 1
    path = tmp_path / "x.gguf"
    path.write_bytes(raw.replace(b"<|image|>", b"<|chart|>"))
    with pytest.raises(ConfigError, match=r"tokenizer.ggml.tokens has no <\|image\|>; this model takes text only"):
        ImageEncoder.from_pretrained(made.mmproj(), text=path)


@given(cut=st.floats(0, 1))
@settings(max_examples=25, deadline=None)
def test_a_truncated_file_is_refused(cut: float, files, tmp_path_factory) -> None:
    made = files("31B")
    # What comes after the last tensor fills up the last 32 bytes.
    end = max(t.data_offset + t.n_bytes for t in gguf.GGUFReader(made.mmproj()).tensors)
    path = tmp_path_factory.mktemp("damaged") / "x.gguf"
    path.write_bytes(made.mmproj().read_bytes()[: int(cut * (end - 1))])
    with pytest.raises(GGUFError, match=re.escape(str(path))):
        ImageEncoder.from_pretrained(path, text=made.text)


@given(where=st.integers(0, 2**32), bit=st.integers(0, 7))
@settings(max_examples=60, deadline=None)
def test_a_flipped_bit_in_the_header_is_one_clear_line_or_a_tower(
    where: int, bit: int, files, tmp_path_factory
) -> None:
    made = files("31B")
    start = min(t.data_offset for t in gguf.GGUFReader(made.mmproj()).tensors)
    raw = bytearray(made.mmproj().read_bytes())
    raw[where % start] ^= 1 << bit
    path = tmp_path_factory.mktemp("damaged") / "x.gguf"
    path.write_bytes(raw)
    problem = str(path)
    try:
        ImageEncoder.from_pretrained(path, text=made.text)
    except ValueError as error:
        problem = str(error)
    assert str(path) in problem
    assert "\n" not in problem
