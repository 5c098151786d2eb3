"""A jitted module with taps: forced values are inputs of its one compiled function, all else is the model's own."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma4_impl import taps
from gemma4_impl.nnx.tapped import Tapped

L, D, E = 5, 3, 4


class Model(nnx.Module):
    """Doubles, chooses two of E experts, adds their numbers."""

    def __init__(self):
        self.factor = nnx.Param(jnp.float32(2))

    def __call__(self, x, positions, logits="all"):
        taps.at(positions)
        doubled = taps.tap("", "doubled", x * self.factor[...])
        chosen = jnp.broadcast_to(jnp.arange(2), (*positions.shape, 2))
        chosen = taps.route("layers.0.", chosen)
        summed = taps.tap("", "summed", doubled + chosen.sum(-1, keepdims=True))
        return summed if logits == "all" else None


@pytest.fixture(scope="module")
def model() -> Tapped:
    return Tapped(Model())


def run(model: Tapped, x: np.ndarray, forced=None, routing=None) -> dict[str, torch.Tensor]:
    recorder = taps.Recorder(1, L, "*", forced, routing)
    model(recorder, x, np.arange(L, dtype=np.int32)[None])
    return recorder.values


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.booleans(), min_size=L, max_size=L),
    st.lists(st.booleans(), min_size=L, max_size=L),
    st.integers(0, 2**32 - 1),
)
def test_only_what_is_forced_is_replaced(model, values, routes, seed):
    generator = np.random.default_rng(seed)
    x, other = generator.normal(size=(2, 1, L, D)).astype(np.float32)
    forced = torch.from_numpy(np.where(np.array(values)[:, None], other, np.nan))
    routing = torch.tensor([[[3, 2] if taken else [-1, -1] for taken in routes]])
    seen = run(model, x, {"doubled": forced}, {"layers.0.": routing})
    assert np.array_equal(seen["doubled"], 2 * x), "a tap is recorded before it is replaced"
    here = np.where(np.array(values)[:, None], other, 2 * x)
    assert np.array_equal(seen["summed"], here + np.where(routes, 5, 1).astype(np.float32)[:, None])


def test_free_and_forced_runs_share_one_compiled_function():
    model, x = Tapped(Model()), np.ones((1, L, D), np.float32)
    free = run(model, x)
    run(model, x, {"doubled": torch.zeros(1, L, D)})
    run(model, x, {"summed": torch.zeros(1, L, D)}, {"layers.0.": torch.zeros(1, L, 2, dtype=torch.long)})
    assert model._jitted._cache_size() == 1
    model(taps.Recorder(1, L), x, np.arange(L, dtype=np.int32)[None], logits="none")
    assert model._jitted._cache_size() == 2, "what is static is compiled in"
    assert torch.equal(run(model, x)["summed"], free["summed"])


def test_padding_is_neither_recorded_nor_forced(model):
    x, at = np.ones((1, 3, D), np.float32), np.array([[-1, 2, -1]], np.int32)
    recorder = taps.Recorder(1, L, "*", {"doubled": torch.full((1, L, D), 7.0)})
    out = model(recorder, x, at)
    assert np.array_equal(out[0, :, 0], [3, 8, 3])
    assert recorder.values["summed"][0].isnan().all(-1).tolist() == [True, True, False, True, True]
