"""The vision tower and its projector: transformers' in float64, as accurate as it in float32 and bfloat16."""

import pytest
import torch
from drawn_images import noise
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import Gemma4Config
from vision_reference import Theirs, error, flat, load, ours, record, vision_weights

from gemma4_impl import taps
from gemma4_impl.vision.config import VisionConfig
from gemma4_impl.vision.encoder import ClippedLinear, Vision, num_soft_tokens
from gemma4_impl.vision.processing import ImageProcessor, ProcessedImages
from parity.budget import K, floor
from reference.tiny import TINY

# Square, wide, tall, and as long as an image can be, in one batch: three of them with padding.
SIZES = ((40, 40), (90, 20), (16, 50), (300, 2))

# Rounding in float64, 1e-16 an operation; 2e-15 is the most that was measured.
EXACT = 1e-13


@pytest.fixture(params=TINY)
def variant(request) -> str:
    return request.param


def batch(path, sizes=SIZES) -> ProcessedImages:
    """Smooth noise, as pictures are."""
    small = [noise("RGB", max(1, w // 4), max(1, h // 4), seed) for seed, (w, h) in enumerate(sizes)]
    images = [s.resize(size, Image.Resampling.BICUBIC) for s, size in zip(small, sizes, strict=True)]
    return ImageProcessor.from_pretrained(path)(images).trimmed()


@torch.no_grad()
def run(model: Vision, images: ProcessedImages) -> torch.Tensor:
    return flat(model(images.pixel_values, images.positions), images.num_soft_tokens)


def tap_names(config: VisionConfig) -> list[str]:
    parts = ["self_attn.q", "self_attn.k", "self_attn.v", "self_attn.out", "resid_mid", "mlp", "out"]
    layers = [f"vision.layers.{i}.{part}" for i in range(config.num_hidden_layers) for part in parts]
    return ["vision.patch_embed", *layers, "vision.pool", *["vision.standardised"] * config.standardize, "vision.proj"]


def test_names_are_the_checkpoints(variant, tiny_images):
    config = VisionConfig.from_file(tiny_images(variant))
    with torch.device("meta"):
        model = Vision(config)
    want = {name: t.shape for name, t in vision_weights(tiny_images(variant)).items()}
    assert {name: t.shape for name, t in model.state_dict().items()} == want
    assert all(t.is_meta for t in model.state_dict().values())


# The same function


def test_every_tap_in_float64(variant, tiny_images):
    path = tiny_images(variant)
    images = batch(path)
    want = Theirs.from_checkpoint(path, torch.float64, torch.float32).capture(images)
    model = ours(path, torch.float64, torch.float32)
    got = record(model, images)
    assert list(got) == tap_names(model.config)
    assert got.keys() == want.keys()
    for name, value in got.items():
        assert value.dtype == torch.float64
        assert error(value, want[name]) < EXACT, name


@pytest.mark.parametrize("sizes", [SIZES, SIZES[:1], SIZES[1:2], SIZES[3:]], ids=["batch", "square", "wide", "longest"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_tap_as_accurate_as_transformers(variant, dtype, sizes, tiny_images):
    """At most twice the error that transformers makes in the same dtype, eager or sdpa, against float64."""
    path = tiny_images(variant)
    images = batch(path, sizes)
    truth = Theirs.from_checkpoint(path, torch.float64, dtype).capture(images)
    references = [Theirs.from_checkpoint(path, dtype, attention=a).capture(images) for a in ("eager", "sdpa")]
    got = record(ours(path, dtype), images)
    for name, want in truth.items():
        pooled = name in ("vision.pool", "vision.standardised")
        assert got[name].dtype == references[0][name].dtype == (torch.float32 if pooled else dtype)
        allowed = K * max(error(reference[name], want) for reference in references) + floor(dtype)
        assert error(got[name], want) <= allowed, name
    assert error(got["vision.proj"], truth["vision.proj"]) > 0


def vision_configs() -> st.SearchStrategy[dict]:
    heads = st.sampled_from([(1, 1), (2, 2), (3, 3), (4, 2), (6, 2), (3, 1)])
    return st.builds(
        lambda heads, **keys: {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], **keys},
        heads,
        hidden_size=st.integers(3, 40),
        intermediate_size=st.integers(1, 40),
        num_hidden_layers=st.integers(1, 3),
        head_dim=st.sampled_from([4, 8, 12, 36]),
        patch_size=st.integers(1, 5),
        pooling_kernel_size=st.integers(2, 4),
        rms_norm_eps=st.sampled_from([1e-6, 1e-2]),
        rope_parameters=st.sampled_from([{"rope_type": "default", "rope_theta": t} for t in (2.0, 100.0, 1e4)]),
        position_embedding_size=st.just(48),
        use_clipped_linears=st.booleans(),
        standardize=st.booleans(),
    )


@settings(max_examples=25, deadline=None)
@given(
    vision_configs(),
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=3),
    st.integers(0, 99),
)
def test_any_sizes_in_float64(keys, grids, seed):
    """Towers of any shape, with random weights, on images of any grids of soft tokens."""
    raw = {"model_type": "gemma4", "vision_config": keys, "text_config": {"hidden_size": 7, "num_hidden_layers": 1}}
    generator = torch.Generator().manual_seed(seed)
    config = VisionConfig.from_dict(raw)
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in Vision(config).state_dict().items()}
    state = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    state = {
        name: -t.abs() if name.endswith("_min") else t.abs() if name.endswith("_max") else t
        for name, t in state.items()
    }
    k, values = config.pooling_kernel_size, 3 * config.patch_size**2
    length = k**2 * max(w * h for w, h in grids)
    positions = torch.full((len(grids), length, 2), -1)
    for row, (w, h) in zip(positions, grids, strict=True):
        row[: k * k * w * h] = torch.cartesian_prod(torch.arange(h * k), torch.arange(w * k)).flip(-1)
    pixels = torch.rand(len(grids), length, values, generator=generator)
    want = Theirs.load(Gemma4Config.from_dict(raw), state, torch.float64)(pixels, positions)
    with torch.no_grad():
        got = load(config, state, torch.float64, None)(pixels, positions)
    counts = tuple(w * h for w, h in grids)
    assert num_soft_tokens(positions, k).tolist() == list(counts)
    assert error(flat(got, counts), want) < EXACT


# Batches


def test_padding_changes_nothing(variant, tiny_images):
    """An image alone, in a batch of larger ones, and with all the padding that the processor adds."""
    path = tiny_images(variant)
    model, images = ours(path, torch.float64), batch(path)
    together = run(model, images).split(images.num_soft_tokens)
    padded = ImageProcessor.from_pretrained(path).max_patches - images.positions.shape[1]
    for i, n in enumerate(images.num_soft_tokens):
        one = ProcessedImages(images.pixel_values[i : i + 1], images.positions[i : i + 1], (n,))
        assert error(run(model, one.trimmed()), together[i]) < EXACT
        pixels = torch.nn.functional.pad(one.pixel_values, (0, 0, 0, padded), value=0.3)
        positions = torch.nn.functional.pad(one.positions, (0, 0, 0, padded), value=-1)
        assert error(run(model, ProcessedImages(pixels, positions, (n,))), together[i]) < EXACT


def test_num_soft_tokens(variant, tiny_images):
    images = batch(tiny_images(variant))
    k = VisionConfig.from_file(tiny_images(variant)).pooling_kernel_size
    assert tuple(num_soft_tokens(images.positions, k).tolist()) == images.num_soft_tokens


def test_forced_values(tiny_images):
    """A value forced at a tap is what the rest of the tower computes with."""
    path = tiny_images("31B")
    model, images = ours(path, torch.float64), batch(path)
    with torch.no_grad(), taps.recording(taps.Recorder(*images.positions.shape[:2])) as recorder:
        model(images.pixel_values, images.positions)
    name = "vision.layers.1.mlp"
    clean, changed = record(model, images), record(model, images, forced={name: recorder.values[name] + 0.1})
    upstream = tap_names(model.config)[: tap_names(model.config).index(name) + 1]
    for tap, value in changed.items():
        assert torch.equal(value, clean[tap]) is (tap in upstream), tap


@pytest.mark.parametrize(
    ("pixels", "positions", "message"),
    [
        ((2, 9, 48), (2, 9, 3), r"positions must be int64 of shape \(2, 9, 2\)"),
        ((2, 9, 47), (2, 9, 2), r"pixel_values must be \[I, P, 48\], got shape \(2, 9, 47\)"),
        ((9, 48), (9, 2), r"pixel_values must be \[I, P, 48\]"),
        ((2, 10, 48), (2, 10, 2), "10 patches are no multiple of 3 x 3"),
    ],
)
def test_shapes_are_checked(pixels, positions, message, tiny_images):
    with pytest.raises(ValueError, match=message):
        ours(tiny_images("E2B"))(torch.zeros(pixels), torch.zeros(positions, dtype=torch.long))


# What the tiny towers can show


@pytest.mark.parametrize("variant", ["E2B", "E4B"])
def test_every_kind_of_bound_bites(variant, tiny_images):
    """Each bound of each projection, in at least one layer: a tower that leaves it out must be seen."""
    path = tiny_images(variant)
    model, images = ours(path, torch.float64), batch(path, SIZES[:1])
    want = run(model, images)
    largest: dict[str, float] = {}
    for name, module in model.named_modules():
        if not isinstance(module, ClippedLinear):
            continue
        for bound in ("input_min", "input_max", "output_min", "output_max"):
            kept = getattr(module, bound)
            setattr(module, bound, kept * torch.inf)
            kind = f"{name.split('.')[-1]}.{bound}"
            largest[kind] = max(largest.get(kind, 0), error(run(model, images), want))
            setattr(module, bound, kept)
    assert len(largest) == 7 * 4
    assert min(largest.values()) > 1e-4, largest
