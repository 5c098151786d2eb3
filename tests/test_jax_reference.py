"""Our JAX model behind the interface of the references: its truth is float64, and forced values and chunks reach it."""

import pytest
import torch
from torch import Tensor

from gemma4_impl.config import FULL, SLIDING
from gemma4_impl.taps import tap_names
from parity.candidate import TorchCandidate
from reference.jax import JaxReference, TappedModel, padded
from reference.tiny import make_tiny

TOKENS = torch.randint(107, 512, (21,), generator=torch.Generator().manual_seed(2)).tolist()
# Rounding in float64 through a few layers: 5e-15 is the most that was measured.
EXACT = 1e-13


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Few layers, because each shape is compiled: one that shares keys and values, so that chunks read the cache."""
    layers = {"num_hidden_layers": 3, "layer_types": [SLIDING, FULL, FULL], "num_kv_shared_layers": 1}
    return make_tiny("E2B", tmp_path_factory.mktemp("jax") / "E2B", overrides=layers)


@pytest.fixture(scope="module")
def reference(checkpoint) -> JaxReference:
    return JaxReference(checkpoint, torch.bfloat16, truth=True)


@pytest.fixture(scope="module")
def truth(reference) -> dict[str, Tensor]:
    return reference.capture([TOKENS])


def errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    assert list(got) == list(want)
    return {name: float((got[name] - want[name]).norm() / want[name].norm()) for name in want}


def test_the_truth_is_that_of_the_pytorch_model_in_float64(reference, truth, checkpoint):
    """On weights, and an embedding scale, that are rounded to bfloat16."""
    assert list(truth) == tap_names(reference.config)
    assert all(value.dtype == torch.float64 for value in truth.values())
    ours = TorchCandidate(checkpoint, torch.float64, weights=torch.bfloat16).capture(TOKENS)
    assert 0 < max(errors(truth, ours).values()) < EXACT


def test_chunks_give_the_same(reference, truth):
    for sizes in ((7, 1, 4), (1,)):
        assert max(errors(reference.capture([TOKENS], chunks=sizes), truth).values()) < EXACT


def test_every_tap_can_be_forced(reference, truth):
    names = list(truth)
    for at, name in enumerate(names[:-2]):
        assert reference.forceable(name)
        changed = errors(reference.capture([TOKENS], forced={name: truth[name] * 1.1 + 0.1}), truth)
        # `out` of a shared layer's producers and the per-layer inputs reach further than the next tap.
        assert max(changed[n] for n in names[: at + 1]) == 0, name
        assert changed["logits"] > 1e-4, name


def test_rows_are_what_each_is_alone(reference, truth):
    rows = [TOKENS, TOKENS[:8]]
    together = reference.capture(rows)
    for b, row in enumerate(rows):
        for name, value in truth.items():
            got, want = together[name][b, : len(row)], value[0, : len(row)]
            assert float((got - want).norm() / want.norm()) < EXACT, name
            assert bool(together[name][b, len(row) :].isnan().all()), name


def test_x64_is_left_behind_nowhere(reference, truth):
    import jax.numpy as jnp

    assert jnp.ones(1, float).dtype == jnp.float32


def test_a_device_that_is_not_there_is_one_line(checkpoint):
    with pytest.raises(ValueError, match=r"--device .*cuda:7"):
        TappedModel(checkpoint, device="cuda:7")


def test_images_take_one_sequence(reference):
    with pytest.raises(ValueError, match="one sequence"):
        reference.capture([TOKENS, TOKENS], images=object())


@pytest.mark.parametrize(
    ("parts", "sizes", "fed", "most"),
    [
        ([(0, 7), (7, 8), (8, 20)], (7, 1, 12), [12, 12, 12], 12),
        ([(0, 1), (1, 2)], (1,), [1, 1], 1),
        ([(0, 1), (1, 6), (6, 7)], (1,), [1, 5, 1], 5),
        ([(0, 3)], (4,), [4], 4),
        ([], (5, 2), [], 5),
    ],
)
def test_parts_share_few_sizes(parts, sizes, fed, most):
    feeds, longest = padded([slice(*part) for part in parts], sizes)
    assert ([feed.size for feed in feeds], longest) == (fed, most)
