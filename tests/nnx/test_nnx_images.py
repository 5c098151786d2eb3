"""Images in prompts for JAX: loading a tower, encoding without recompiling, merging, and gradients through it all."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from PIL import Image
from safetensors.torch import load_file, save_file

from gemma4_impl.checkpoint import CheckpointError
from gemma4_impl.config import ConfigError
from gemma4_impl.nnx.decoder import Gemma4
from gemma4_impl.nnx.images import ImageEncoder, load_tower
from gemma4_impl.nnx.load import from_pretrained, to_torch
from gemma4_impl.nnx.sharding import make_mesh
from gemma4_impl.nnx.soft_tokens import image_slots, merge
from gemma4_impl.nnx.vision import Vision
from gemma4_impl.vision import images as in_torch
from gemma4_impl.vision.processing import ImageProcessor, ProcessedImages
from gemma4_impl.vision.tower import open_tower
from parity.candidate import TorchCandidate
from parity.images import drawn
from reference.tiny_gguf import make_tiny_gguf
from reference.tiny_mmproj import make_tiny_mmproj

# Rounding in float64, 1e-16 an operation; 6e-15 is the most that was measured, of the gradients.
EXACT = 1e-13


def error(got: object, want: object) -> float:
    """Relative L2 error."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.fixture(scope="module")
def exact(tiny_images) -> Callable[[str], ImageEncoder]:
    """variant -> its encoder in float64, to be used inside `jax.enable_x64`."""
    made: dict[str, ImageEncoder] = {}

    def make(variant: str) -> ImageEncoder:
        if variant not in made:
            made[variant] = ImageEncoder.from_pretrained(tiny_images(variant), "float64", "float32")
        return made[variant]

    return make


# Encoding


@pytest.mark.parametrize("variant", ["E4B", "31B"])
def test_soft_tokens_are_those_of_the_pytorch_model(variant, tiny_images, exact):
    path = tiny_images(variant)
    want = TorchCandidate(path, torch.float64, weights=torch.float32).encoder.encode(drawn())
    with jax.enable_x64(True):
        got = exact(variant).encode(drawn())
    assert [tokens.shape for tokens in got] == [tuple(tokens.shape) for tokens in want]
    assert all(error(ours, theirs) < EXACT for ours, theirs in zip(got, want, strict=True))


def test_how_images_are_batched_and_padded_changes_nothing(exact):
    """Alone or together, with the processor's padding, with less, and with a row that is padding alone."""
    with jax.enable_x64(True):
        encoder = exact("31B")
        images = encoder.processor(drawn())
        want = encoder.encode(images)
        trimmed = images.trimmed()
        assert trimmed.positions.shape[1] < images.positions.shape[1]
        for got in (encoder.encode(trimmed), [encoder.encode([image])[0] for image in drawn()]):
            assert all(np.array_equal(ours, theirs) for ours, theirs in zip(got, want, strict=True))
        pixels = np.pad(trimmed.pixel_values.numpy(), ((0, 1), (0, 0), (0, 0)))
        positions = np.pad(trimmed.positions.numpy(), ((0, 1), (0, 0), (0, 0)), constant_values=-1)
        rows = nnx.jit(encoder.model)(pixels, positions)
        assert np.isfinite(rows).all()
        counts = images.num_soft_tokens
        assert all(error(row[:n], soft) < EXACT for row, n, soft in zip(rows, counts, want, strict=False))
    assert encoder.encode([]) == []


def test_nothing_is_compiled_after_the_first_image(tiny_images):
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration, **_: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    encoder = ImageEncoder.from_pretrained(tiny_images("E2B"), "bfloat16")
    encoder.encode(drawn()[:1])
    assert compiled
    compiled.clear()
    again = ImageEncoder.from_pretrained(tiny_images("E2B"), "bfloat16")
    features = again.encode([*drawn(), Image.new("RGB", (300, 4))])
    tokens = np.full((1, 3 + sum(map(len, features))), again.config.image_token_id)
    tokens[0, :3] = 1
    soft = again.merge(tokens, features, "bfloat16")
    assert compiled == []
    assert soft.embeds.dtype == features[0].dtype == "bfloat16"
    assert soft.mask[0].tolist() == [False] * 3 + [True] * (tokens.shape[1] - 3)
    assert np.array_equal(soft.embeds[0, 3:], np.concatenate(features))
    assert not soft.bidirectional


def test_weights_that_changed_are_used(tiny_images):
    encoder = ImageEncoder.from_pretrained(tiny_images("E2B"), "bfloat16")
    before = encoder.encode(drawn()[:1])[0]
    weight = encoder.model.embed_vision.embedding_projection.weight
    weight[...] = 2 * weight[...]
    assert np.array_equal(encoder.encode(drawn()[:1])[0], 2 * before)


def test_prompts(tiny_images):
    """The same ids as for PyTorch; room and soft tokens must agree."""
    ours, theirs = (kind.from_pretrained(tiny_images("31B")) for kind in (ImageEncoder, in_torch.ImageEncoder))
    marker = ours.config.image_token_id
    assert ours.bidirectional
    assert ours.expand([2, marker, 5, marker], [2, 3]) == theirs.expand([2, marker, 5, marker], [2, 3])
    with pytest.raises(ValueError, match=r"the prompt has 1 image tokens \(<\|image\|>\) for 2 images"):
        ours.expand([marker], [2, 3])
    features = [np.ones((2, ours.config.text_hidden_size), np.float32)]
    with pytest.raises(ValueError, match="room for 3 soft tokens, but its images have 2"):
        ours.merge(np.full((1, 3), marker), features, "float32")
    assert not ours.merge(np.ones((1, 3), np.int32), [], "float32").mask.any()


# Loading


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", ["E2B", "26B-A4B"])
def test_every_tensor_is_the_checkpoints_from_both_kinds_of_file(variant, param_dtype, tiny_images, tmp_path):
    folder = tiny_images(variant)
    text = make_tiny_gguf(folder, tmp_path / "text.gguf")
    mmproj = make_tiny_mmproj(folder, tmp_path / "mmproj.gguf")
    stored = load_file(folder / "model.safetensors")
    want = {name.removeprefix("model."): t for name, t in stored.items() if "vision" in name}
    for encoder in (
        ImageEncoder.from_pretrained(folder, "float32", param_dtype),
        ImageEncoder.from_pretrained(mmproj, "float32", param_dtype, text=text),
        ImageEncoder.from_pretrained(mmproj, "float32", param_dtype, text=folder),
    ):
        state = dict(nnx.to_flat_state(nnx.state(encoder.model)))
        got = {".".join(map(str, path)): to_torch(leaf[...]) for path, leaf in state.items()}
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], t.to(getattr(torch, param_dtype))) for name, t in want.items())
        assert encoder.config == ImageEncoder.from_pretrained(folder).config
    assert encoder.processor.max_soft_tokens == 70


def test_a_checkpoint_that_does_not_fit(tiny, tiny_images, tmp_path):
    with pytest.raises(ConfigError, match="takes text only"):
        ImageEncoder.from_pretrained(tiny("E2B"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        ImageEncoder.from_pretrained(tmp_path / "nowhere")
    mmproj = make_tiny_mmproj(tiny_images("31B"), tmp_path / "mmproj.gguf")
    with pytest.raises(CheckpointError, match=r"mmproj\.gguf: a vision tower alone takes no prompts; .*\(text\)"):
        ImageEncoder.from_pretrained(mmproj)
    with pytest.raises(ConfigError, match="another model's vision tower"):
        ImageEncoder.from_pretrained(mmproj, text=tiny_images("26B-A4B"))
    folder = tmp_path / "damaged"
    folder.mkdir()
    for file in tiny_images("E2B").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    stored = load_file(folder / "model.safetensors")
    layer = "model.vision_tower.encoder.layers.1."
    stored[layer + "extra"] = stored.pop(layer + "mlp.up_proj.input_max")
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"config.json; 1 missing: .*up_proj.input_max; 1 unexpected: .*1.extra"):
        ImageEncoder.from_pretrained(folder)
    stored[layer + "mlp.up_proj.input_max"] = torch.zeros(2)
    del stored[layer + "extra"]
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"damaged: .*up_proj.input_max is \[2\], expected \[\]"):
        ImageEncoder.from_pretrained(folder)


def test_one_tensor_is_held_at_a_time(tiny_images):
    source, config, _ = open_tower(tiny_images("E2B"))

    @dataclass
    class Watched:
        path: Path
        towers: dict[str, Path]
        alive: list[weakref.ref]
        dtype = torch.float32

        def tower(self, name: str) -> torch.Tensor:
            assert not any(ref() is not None for ref in self.alive), name
            tensor = source.tower(name)
            self.alive.append(weakref.ref(tensor))
            return tensor

    watched = Watched(source.path, source.towers, [])
    load_tower(config, watched)
    assert len(watched.alive) == len(source.towers) > 70


def test_a_tower_spread_over_devices(tiny_images, exact):
    """The same soft tokens, on the host whole; the weights in pieces, four heads in two halves."""
    mesh = make_mesh("fsdp=4,tp=2")
    with jax.enable_x64(True):
        want = exact("26B-A4B").encode(drawn())
        spread = ImageEncoder.from_pretrained(tiny_images("26B-A4B"), "float64", "float32", mesh=mesh)
        with jax.set_mesh(mesh):
            got = spread.encode(drawn())
    assert all(error(ours, theirs) < EXACT for ours, theirs in zip(got, want, strict=True))
    weight = spread.model.vision_tower.encoder.layers[0].self_attn.q_proj.linear.weight
    assert weight.shape == (48, 44)
    assert {shard.data.shape for shard in weight.addressable_shards} == {(24, 11)}
    assert len(weight.sharding.device_set) == 8


# Gradients


def test_gradients_reach_the_pixels_through_text_and_merge(tiny_images, exact):
    """Of every logit, through a bidirectional block, in float64 as in PyTorch."""
    path = tiny_images("31B")
    theirs = TorchCandidate(path, torch.float64, weights=torch.float32)
    processor = ImageProcessor.from_config(theirs.encoder.config, 16)
    images: ProcessedImages = processor(drawn()).trimmed()
    counts, marker = images.num_soft_tokens, theirs.encoder.config.image_token_id
    ids = theirs.encoder.expand([2, 300, marker, 7, marker, 400], counts)
    weight = torch.randn(len(ids), theirs.config.vocab_size, generator=torch.Generator().manual_seed(0)).double()

    pixels = images.pixel_values.double().requires_grad_()
    soft = theirs.encoder.model(pixels, images.positions)
    shown = theirs.encoder.merge(torch.tensor([ids]), [r[:n] for r, n in zip(soft, counts, strict=True)], soft.dtype)
    (theirs.model(torch.tensor([ids]), images=shown)[0] * weight).sum().backward()

    with jax.enable_x64(True):
        text, vision = from_pretrained(path, "float64", "float32"), exact("31B").model
        # The embedding's scale is rounded to the weights' dtype.
        text.embed_tokens.scale = float(np.float32(text.embed_tokens.scale))
        slots = image_slots(np.array([ids]), marker, counts, soft.shape[1])

        @nnx.jit
        @nnx.grad(argnums=2)
        def gradient(text: Gemma4, vision: Vision, pixels: jax.Array) -> jax.Array:
            shown = merge(vision(pixels, images.positions.numpy()), slots, True, text.dtype)
            logits, _ = text(np.array([ids]), images=shown)
            return (logits[0] * weight.numpy()).sum()

        got = gradient(text, vision, pixels.detach().numpy())
    padding = (images.positions < 0).all(dim=-1)
    assert padding.any()
    assert not np.asarray(got)[padding.numpy()].any()
    assert error(got, pixels.grad) < EXACT
