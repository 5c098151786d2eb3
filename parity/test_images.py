"""Image prompts: transformers behind our taps, and our model as accurate as it in every tap of every cache path."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma4_impl import taps
from gemma4_impl.vision.processing import ProcessedImages
from parity import PATHS, budget, engine
from parity.candidate import TorchCandidate
from parity.images import KINDS, drawn, place
from parity.inputs import default_tokens
from reference.chunks import chunks
from reference.hf import HFReference

pytestmark = pytest.mark.parity

# Rounding in float64: 3e-15 is the most that was measured.
EXACT = 1e-13


@pytest.fixture(params=KINDS)
def variant(request) -> str:
    return request.param


def prompt(reference: HFReference, path: Path) -> tuple[list[int], ProcessedImages]:
    return place(path, default_tokens(reference.config, path), drawn())


def errors(got: dict, want: dict) -> dict[str, float]:
    assert list(got) == list(want)
    out = {}
    for name, value in want.items():
        assert torch.equal(got[name].isnan(), value.isnan()), name
        out[name] = float((got[name] - value).nan_to_num().norm() / value.nan_to_num().norm())
    return out


# The reference


def test_truth_is_float64_and_the_same_in_chunks(variant, short_images):
    path = short_images(variant)
    reference = HFReference(path, truth=True)
    tokens, images = prompt(reference, path)
    truth = reference.capture([tokens], images=images)
    names = taps.vision_tap_names(reference.vision) + taps.tap_names(reference.config)
    assert list(truth) == names + taps.choice_names(reference.config)
    assert all(value.dtype == torch.float64 for value in truth.values())
    assert truth["vision.patch_embed"].shape[:2] == images.positions.shape[:2]
    assert truth["vision.proj"].shape[:2] == (len(images.positions), max(images.num_soft_tokens))
    soft = torch.cat([row[:n] for row, n in zip(truth["vision.proj"], images.num_soft_tokens, strict=True)])
    mask = torch.tensor(tokens) == reference.vision.image_token_id
    assert torch.equal(truth["embed"][0, mask], soft)
    for sizes in ((1,), (7, 1, 12)):
        found = errors(reference.capture([tokens], images=images, chunks=sizes), truth)
        assert max(found.values()) < EXACT, sizes
    reference.use("sdpa")
    assert 0 < max(errors(reference.capture([tokens], images=images), truth).values()) < EXACT
    ours = TorchCandidate(path, torch.float64, weights=torch.float32).capture(tokens, images=images)
    assert max(errors(ours, truth).values()) < EXACT


def test_forced_values_reach(variant, short_images):
    """Each forced vision tap changes what comes after it and nothing before."""
    path = short_images(variant)
    reference = HFReference(path, truth=True)
    tokens, images = prompt(reference, path)
    truth = reference.capture([tokens], images=images)
    names = list(truth)
    for name in [*taps.vision_tap_names(reference.vision), "embed"]:
        assert reference.forceable(name)
        changed = errors(reference.capture([tokens], images=images, forced={name: truth[name] * 1.1 + 0.1}), truth)
        at = names.index(name)
        assert max(changed[n] for n in names[: at + 1]) == 0, name
        assert changed["logits"] > 1e-3, name


def test_images_need_a_whole_model(tiny, tiny_images):
    reference = HFReference(tiny_images("E2B"))
    tokens, images = prompt(reference, tiny_images("E2B"))
    with pytest.raises(ValueError, match="need the vision tower"):
        HFReference(tiny("E2B")).capture([tokens], images=images)
    with pytest.raises(ValueError, match="one sequence"):
        reference.capture([tokens, tokens], images=images)


# Our model


@pytest.mark.parametrize(("variant", "dtype"), [*((kind, "float32") for kind in KINDS), ("E2B", "bfloat16")])
def test_every_tap_of_every_path_is_in_budget(variant, dtype, tiny_images, short_images):
    """Errors add up over the nine layers of E2B; the others show each kind of layer."""
    path = (tiny_images if variant == "E2B" else short_images)(variant)
    report = engine.run({variant: path}, default_tokens, [dtype], images=drawn())
    assert [case.path for case in report.cases] == list(PATHS)
    assert max(report.images[variant].num_soft_tokens) > TorchCandidate(path).config.sliding_window
    names = [*taps.vision_tap_names(HFReference(path).vision), *taps.tap_names(TorchCandidate(path).config)]
    for case in report.cases:
        result = case.comparison
        assert not result.red, (case.path, result.first_divergence, result.missing, result.partial, result.bugs)
        assert result.worst_ratio <= budget.K
        assert [tap.name for tap in result.taps] == names
        if dtype == "float32":
            assert result.logits.top1 == 1.0


def test_a_tap_of_the_tower_that_stops_early_is_partial(tiny_images):
    path = tiny_images("31B")
    tokens, images = place(path, default_tokens(TorchCandidate(path).config, path), drawn())
    base = engine.baseline(path, tokens, torch.float32, paths=["full"], images=images)

    class Short:
        def capture(self, *args: object, **options: object) -> dict:
            out = TorchCandidate(path).capture(*args, **options)
            out["vision.pool"][1, images.num_soft_tokens[1] - 1] = torch.nan
            del out["vision.layers.0.mlp"]
            return out

    result = engine.judge(Short(), base, "full")
    assert result.red
    assert result.partial == ["vision.pool"]
    assert result.missing == ["vision.layers.0.mlp"]


# Chunks


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.booleans(), min_size=30, max_size=30), min_size=1, max_size=3),
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.integers(1, 30),
)
def test_chunks_cover_the_sequence_and_cut_no_image(rows, sizes, length):
    whole = torch.tensor(rows)[:, :length]
    parts = chunks(length, sizes, whole)
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(length))
    for i, part in enumerate(parts):
        inside = bool((whole[:, part.stop - 1] & whole[:, part.stop]).any()) if part.stop < length else False
        assert not inside
        size = sizes[i % len(sizes)]
        longer = range(part.start + size, part.stop)
        assert all(bool((whole[:, at - 1] & whole[:, at]).any()) for at in longer)
        assert part.stop - part.start >= min(size, length - part.start)
