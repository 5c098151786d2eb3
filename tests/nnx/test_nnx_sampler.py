"""Sampling with a key against its definition: what the filters keep, as in PyTorch; frequencies, by chi-square."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from gemma4_impl.model import sampler as torch_sampler
from gemma4_impl.nnx import sampler
from gemma4_impl.nnx.sampler import sample

INF, NAN = math.inf, math.nan
LOGITS = [2.0, 1.5, 1.5, 0.3, 0.0, -1.0, -2.5, -INF]
V, DRAWS = len(LOGITS), 40_000
EPS = float(np.finfo(np.float32).eps)

draw = jax.jit(sample, static_argnames="top_k")
kept = jax.jit(sampler._kept, static_argnames="top_k")


def probabilities(logits: list[float], temperature: float, top_k: int | None) -> tuple[np.ndarray, np.ndarray]:
    """What top-k keeps: ids, largest logit first, lower ids first among equals; and their probabilities in float64."""
    x = np.array(logits, np.float64)
    order = np.lexsort((np.arange(len(x)), -x))[:top_k]
    p = np.exp((x[order] - x[order[0]]) / temperature)
    return order, p / p.sum()


@settings(max_examples=300, deadline=None)  # some compile
@given(
    logits=st.lists(st.sampled_from([-INF, -3.0, -0.0, 0.0, 0.5, 1.0, 1.25, 30.0]), min_size=V, max_size=V),
    temperature=st.sampled_from([0.1, 0.7, 1.0, 10.0]),
    top_k=st.sampled_from([None, 1, 3, V, 15]),
    top_p=st.none() | st.floats(1e-6, 1.0),
)
@example(logits=[0.0] * V, temperature=1.0, top_k=None, top_p=0.3)
@example(logits=[-0.0, 0.0] * (V // 2), temperature=1.0, top_k=3, top_p=None)
def test_filters_keep_what_the_torch_sampler_keeps(logits, temperature, top_k, top_p):
    assume(max(logits) > -INF)
    if top_p is not None and top_p < 1:
        # Two orders of V float32 sums may differ where p is that close to one of them.
        _, p = probabilities(logits, temperature, top_k)
        assume(np.abs(p.cumsum() - top_p).min() > V * EPS)
    scores, ids = kept(jnp.array([logits]), temperature, top_k, top_p)
    ids = np.arange(V) if ids is None else np.asarray(ids)[0]
    expected = torch_sampler.allowed(torch.tensor([logits]), temperature, top_k, top_p)[0].numpy()
    assert set(ids[np.asarray(scores)[0] > -INF]) == set(np.flatnonzero(expected & (np.array(logits) > -INF)))


@pytest.mark.parametrize("top_p", [None, 0.5, 0.9])
@pytest.mark.parametrize("top_k", [None, 2, 5])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_frequencies_follow_the_definition(temperature, top_k, top_p):
    ids = draw(jnp.broadcast_to(jnp.array(LOGITS), (DRAWS, V)), jax.random.key(0), temperature, top_k, top_p)
    order, p = probabilities(LOGITS, temperature, top_k)
    if top_p is not None:
        n = 1 + int((p.cumsum() < top_p).sum())
        order, p = order[:n], p[:n] / p[:n].sum()
    order, p = order[p > 0], p[p > 0]
    counts = np.bincount(np.asarray(ids), minlength=V)
    assert counts[order].sum() == DRAWS
    if len(order) > 1:
        assert scipy.stats.chisquare(counts[order], p * DRAWS).pvalue > 1e-3


def test_rows_are_independent():
    ids = np.asarray(draw(jnp.broadcast_to(jnp.array(LOGITS), (DRAWS, V)), jax.random.key(1))).reshape(-1, 2)
    table = np.bincount(ids[:, 0] * V + ids[:, 1], minlength=V * V).reshape(V, V)[:-1, :-1]
    assert scipy.stats.chi2_contingency(table).pvalue > 1e-3


@pytest.mark.parametrize("how", [{}, {"temperature": 0}, {"top_k": 2}, {"top_p": 0.9}, {"top_k": 2, "top_p": 0.9}])
def test_infinities_and_nan(how):
    rows = [[0.0, INF, 1.0], [INF, 0.0, INF], [-INF, -INF, -5.0], [0.0, NAN, 1.0], [NAN, INF, 0.0], [-INF, -INF, -INF]]
    # A temperature that is not traced leaves out the draw.
    run = sample if "temperature" in how else draw
    for seed in range(20):
        assert run(jnp.array(rows), jax.random.key(seed), **how).tolist() == [1, 0, 2, -1, -1, -1]


@pytest.mark.parametrize("temperature", [0, 1e-30, 1.0])
@pytest.mark.parametrize("how", [{}, {"top_k": 1}, {"top_p": 1e-9}])
def test_limits_are_greedy(how, temperature):
    logits = jax.random.normal(jax.random.key(0), (64, 500)).astype(jnp.bfloat16)
    ids = draw(logits, jax.random.key(1), temperature, **how)
    assert ids.dtype == jnp.int32
    values = np.asarray(logits, np.float32)
    if how:
        assert (ids == values.argmax(axis=1)).all()
    # Equal logits are common in bfloat16; without a filter, and above temperature 0, either may be drawn.
    likeliest = values[np.arange(64), ids] == values.max(axis=1)
    assert likeliest.all() == bool(how or temperature < 1)


def test_the_largest_draw_cannot_reach_an_impossible_id():
    """Draws are finite, so that -inf stays below every other score."""
    gumbel = jax.random.gumbel(jax.random.key(0), (1 << 22,), mode="high")
    assert jnp.isfinite(gumbel).all()
    # Of 2^22 draws the largest is near ln 2^22 = 15.2; coarse ones would stop there.
    assert 13 < gumbel.max() < 40


def test_a_key_decides():
    logits = jnp.zeros((200, V))
    first, again, other = (draw(logits, jax.random.key(seed)) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


def test_another_temperature_or_top_p_compiles_nothing():
    def traced(*args):
        return sample(*args)

    jitted = jax.jit(traced, static_argnums=3)
    for temperature, top_p in ((1.0, 0.9), (0.5, 0.3), (0.0, 1.0)):
        jitted(jnp.array([LOGITS]), jax.random.key(0), temperature, 4, top_p)
    assert jitted._cache_size() == 1
