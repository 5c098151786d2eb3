"""Every variant, in both dtypes, through every cache path: no tap is more than twice as wrong as the reference."""

import pytest
import torch

from gemma4_impl import taps
from parity import PATHS, budget, engine
from parity.candidate import TorchCandidate
from parity.inputs import default_tokens
from reference.tiny import make_tiny

pytestmark = pytest.mark.parity
VARIANTS = ("E2B", "E4B", "26B-A4B", "31B")


@pytest.mark.parametrize("dtype", engine.DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_tap_of_every_path_is_in_budget(tiny, short, variant: str, dtype: str) -> None:
    """Errors add up over the nine layers of E2B; the others show each kind of layer. `gemma4 parity` runs all of them
    deep."""
    path = (tiny if variant == "E2B" else short)(variant)
    report = engine.run({variant: path}, default_tokens, [dtype])
    assert [case.path for case in report.cases] == list(PATHS)
    for case in report.cases:
        result = case.comparison
        assert not result.red, (case.path, result.first_divergence, result.missing, result.partial, result.bugs)
        assert result.worst_ratio <= budget.K
        assert [t.name for t in result.taps] == taps.tap_names(TorchCandidate(path).config)
        if dtype == "float32":
            assert result.logits.top1 == 1.0


def test_the_sequence_leaves_the_window_and_wraps_the_ring(tiny) -> None:
    for variant in VARIANTS:
        candidate = TorchCandidate(tiny(variant))
        length = len(default_tokens(candidate.config, tiny(variant)))
        ring = candidate.config.sliding_window - 1 + max(candidate.chunks)
        assert length > 2 * ring


@pytest.mark.parametrize("variant", ["E4B", "26B-A4B"])
def test_a_sharded_multimodal_hub_checkpoint_is_the_same_model(tmp_path, variant: str) -> None:
    path = make_tiny(variant, tmp_path / variant, multimodal=True, hub_form=True, shards=3)
    report = engine.run({variant: path}, default_tokens, ["float32"], ["full", "generate"])
    assert not report.red


@pytest.mark.parametrize("variant", ["E2B", "26B-A4B"])
def test_a_streamed_reference_is_the_same_to_the_last_bit(tiny, variant: str) -> None:
    tokens = default_tokens(TorchCandidate(tiny(variant)).config, tiny(variant))
    held, streamed = (engine.baseline(tiny(variant), tokens, torch.bfloat16, stream=s) for s in (False, True))
    pairs = [(held.truth, streamed.truth), *zip(held.references[:2], streamed.references, strict=True)]
    pairs += zip(held.local_references[:2], streamed.local_references, strict=True)
    for a, b in pairs:
        assert list(a) == list(b)
        assert all(torch.equal(a[name], b[name]) for name in a)
