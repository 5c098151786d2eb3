"""Image prompts in JAX: as accurate as transformers in every tap of tower and text, and the same function in x64."""

import jax
import numpy as np
import pytest

from gemma4_impl import taps
from gemma4_impl.config import TextConfig
from gemma4_impl.nnx.images import ImageEncoder
from parity import budget, engine
from parity.candidate_jax import JaxCandidate
from parity.images import KINDS, drawn, place
from parity.inputs import default_tokens
from reference.hf import HFReference

pytestmark = pytest.mark.parity

# Rounding in float64, 1e-16 an operation, through a few layers: 8e-16 is the most that was measured.
EXACT = 1e-13


@pytest.mark.parametrize("variant", KINDS)
def test_soft_tokens_in_float64(variant, tiny_images):
    path = tiny_images(variant)
    tokens, images = place(path, default_tokens(TextConfig.from_file(path), path), drawn())
    want = HFReference(path, truth=True).capture([tokens], glob="vision.proj", images=images)["vision.proj"]
    with jax.enable_x64(True):
        got = ImageEncoder.from_pretrained(path, "float64", "float32").encode(images)
    for ours, theirs, n in zip(got, want, images.num_soft_tokens, strict=True):
        assert ours.dtype == np.float64
        theirs = theirs[:n].numpy()
        assert np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) < EXACT


# `gemma4 parity` runs all of KINDS in both dtypes, in full and through generate, with more layers.
@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize(("variant", "dtype"), [("E2B", "float32"), ("31B", "float32"), ("26B-A4B", "bfloat16")])
def test_every_tap_is_in_budget(variant, dtype, short_images):
    path = short_images(variant)
    tokens, images = place(path, default_tokens(TextConfig.from_file(path), path), drawn())
    candidate = JaxCandidate(path, engine.DTYPES[dtype])
    # Blocks are longer than the window; chunks are extended around those that are seen both ways.
    assert max(images.num_soft_tokens) > candidate.config.sliding_window
    paths = ["full", *["chunked"] * (variant == "31B" and dtype == "float32")]
    base = engine.baseline(path, tokens, engine.DTYPES[dtype], paths=paths, images=images)
    names = [*taps.vision_tap_names(candidate.encoder.config), *taps.tap_names(candidate.config)]
    for through in paths:
        result = engine.judge(candidate, base, through)
        assert not result.red, (through, result.first_divergence, result.missing, result.partial, result.bugs)
        assert result.worst_ratio <= budget.K
        assert [tap.name for tap in result.taps] == names
        if dtype == "float32":
            assert result.logits.top1 == 1.0
