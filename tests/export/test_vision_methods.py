"""What a program with images is made of, before a backend has it: the tower rewritten for XNNPACK, the input `ends`."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from image_programs import CHUNK, CONTEXT, Multimodal, make_small

from gemma4_impl.config import ConfigError
from gemma4_impl.export import front
from gemma4_impl.export.program import Settings
from gemma4_impl.export.vision import _Fed, check_images, ends_of, for_xnnpack
from gemma4_impl.model.soft_tokens import SoftTokens
from gemma4_impl.vision.images import ImageEncoder
from reference.tiny import TINY


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make_small(tmp_path_factory.mktemp("images") / "small")


@pytest.mark.parametrize("variant", TINY)
@torch.no_grad()
def test_the_rewritten_tower_is_the_tower(variant, tiny_images):
    """In float64 nothing is lost but rounding."""
    encoder = ImageEncoder.from_pretrained(tiny_images(variant), torch.float64)
    rewritten = for_xnnpack(encoder.model)
    for a, b in zip(rewritten.parameters(), encoder.model.parameters(), strict=True):
        assert a.data_ptr() == b.data_ptr()
    mm = Multimodal(None, encoder)
    for batch in (mm.images(), mm.one_square()):
        rows = zip(batch.pixel_values.split(1), batch.positions.split(1), batch.num_soft_tokens, strict=True)
        for patches, positions, n in rows:
            got, want = (model(patches, positions)[:, :n] for model in (rewritten, encoder.model))
            assert float((got - want).norm() / want.norm()) < 1e-12


ROWS = st.lists(st.booleans(), min_size=1, max_size=24)


@given(ROWS, st.booleans(), st.integers(0, 100))
def test_ends_say_what_soft_tokens_do(row, bidirectional, start):
    soft = SoftTokens(torch.tensor([row]), torch.zeros(1, len(row), 2), bidirectional)
    positions = torch.arange(start, start + len(row))[None]
    ends = ends_of(soft, positions)
    assert torch.equal(ends >= 0, soft.mask)
    assert torch.equal(_Fed(ends >= 0, soft.embeds, bidirectional, ends).ends(positions), soft.ends(positions))


def test_what_a_program_could_not_take_is_refused(small, tiny, tmp_path):
    mm = Multimodal.load(small)
    settings, config = Settings(CONTEXT, CHUNK, torch.float32), mm.model.config
    check_images(config, mm.encoder, settings)
    check_images(config, mm.encoder, replace(settings, max_prefill_chunk=70))
    with pytest.raises(ValueError, match="max_prefill_chunk = 69: an image takes up to 70 tokens"):
        check_images(config, mm.encoder, replace(settings, max_prefill_chunk=69))
    causal = ImageEncoder(mm.encoder.model, mm.encoder.processor)
    causal.config = replace(mm.encoder.config, use_bidirectional_attention=None)
    check_images(config, causal, replace(settings, max_prefill_chunk=2))
    with pytest.raises(ValueError, match="max_prefill_chunk = 1: images are fed in chunks of at least 2"):
        check_images(config, causal, replace(settings, max_prefill_chunk=1))
    causal.config = replace(mm.encoder.config, text_hidden_size=41)
    with pytest.raises(ValueError, match="soft tokens of 41 values"):
        check_images(config, causal, settings)
    with pytest.raises(ValueError, match="max_prefill_chunk = 8: an image takes up to 70"):
        front.export(small, tmp_path / "out", "xnnpack", max_prefill_chunk=8, vision=True)
    with pytest.raises(ConfigError, match="takes text only"):
        front.export(tiny("E2B"), tmp_path / "out", "xnnpack", vision=True)
    assert not (tmp_path / "out").exists()
