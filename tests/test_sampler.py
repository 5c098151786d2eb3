"""Sampling against its definition: chi-square tests with fixed seeds, and the allowed set written out in numpy."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from gemma4_impl.generation import Sampling
from gemma4_impl.model.sampler import sample

LOGITS = [2.0, 1.5, 1.5, 0.3, 0.0, -1.0, -2.5, -math.inf]
DRAWS = 40_000


def definition(logits: list[float], temperature: float, top_k: int | None, top_p: float | None) -> np.ndarray:
    """Probability of each id, in float64."""
    x = np.array(logits, dtype=np.float64)
    order = np.lexsort((np.arange(len(x)), -x))  # largest first, lower ids first among equals
    order = order[: top_k or len(x)]
    with np.errstate(over="ignore"):
        p = np.exp((x[order] - x[order[0]]) / temperature)
    p /= p.sum()
    if top_p is not None and top_p < 1:
        n = 1 + int((p.cumsum() < top_p).sum())
        order, p = order[:n], p[:n] / p[:n].sum()
    out = np.zeros(len(x))
    out[order] = p
    return out


def draws(logits: list[float], n: int = DRAWS, seed: int = 0, **how) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return sample(torch.tensor(logits).expand(n, -1), generator=generator, **how)


@pytest.mark.parametrize("top_p", [None, 0.5, 0.9])
@pytest.mark.parametrize("top_k", [None, 2, 5])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_frequencies_follow_the_definition(temperature, top_k, top_p):
    how = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    expected = definition(LOGITS, **how) * DRAWS
    counts = torch.bincount(draws(LOGITS, **how), minlength=len(LOGITS)).numpy()
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    if kept.sum() > 1:
        assert scipy.stats.chisquare(counts[kept], expected[kept]).pvalue > 1e-3


def test_large_vocabulary():
    V, n = 2000, 10_000
    logits = torch.randn(V, generator=torch.Generator().manual_seed(1)).tolist()
    counts = torch.bincount(draws(logits, n), minlength=V).numpy()
    expected = definition(logits, 1.0, None, None) * n
    bins = np.arange(V) % 50
    assert scipy.stats.chisquare(np.bincount(bins, counts), np.bincount(bins, expected)).pvalue > 1e-3


def test_rows_are_independent():
    ids = draws(LOGITS[:4], 2 * DRAWS).view(DRAWS, 2)
    table = torch.bincount(ids[:, 0] * 4 + ids[:, 1], minlength=16).view(4, 4).numpy()
    assert scipy.stats.chi2_contingency(table).pvalue > 1e-3


def test_each_row_has_its_own_distribution():
    logits = torch.full((3, 5), -math.inf)
    logits[0, 4], logits[1, 2], logits[2, 0] = 1.0, -50.0, 30.0
    for how in ({}, {"top_k": 2}, {"top_p": 0.5}, {"temperature": 0}):
        assert sample(logits, **how).tolist() == [4, 2, 0]


def test_temperature_zero_is_argmax():
    logits = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample(logits, temperature=0), logits.argmax(dim=-1))


@pytest.mark.parametrize("how", [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-30}, {"temperature": 5e-324}])
def test_limits_are_greedy(how):
    logits = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample(logits, **how), logits.argmax(dim=-1))


@given(
    logits=st.lists(st.sampled_from([-math.inf, -3.0, 0.0, 0.5, 1.0, 1.25, 30.0]), min_size=1, max_size=12),
    temperature=st.sampled_from([0.1, 0.7, 1.0, 10.0]),
    top_k=st.one_of(st.none(), st.integers(1, 15)),
    top_p=st.one_of(st.none(), st.floats(1e-6, 1.0)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@example(logits=[0.0] * 10, temperature=1.0, top_k=None, top_p=0.3, dtype=torch.float32)
def test_ids_come_from_the_allowed_set(logits, temperature, top_k, top_p, dtype):
    rows = torch.tensor(logits, dtype=dtype).expand(50, -1)
    ids = sample(rows, temperature, top_k, top_p, torch.Generator().manual_seed(0))
    if max(logits) == -math.inf:
        assert set(ids.tolist()) == {-1}
        return
    # The cut is made in float32: a set that reaches p to within rounding is as good.
    slack = None if top_p is None else min(1.0, top_p + 1e-5)
    allowed = np.flatnonzero(definition(logits, temperature, top_k, slack))
    assert set(ids.tolist()) <= set(allowed.tolist())


def test_top_k_keeps_lower_ids_among_equals():
    assert set(draws([1.0, 3.0, 1.0, 1.0], 500, top_k=2).tolist()) == {0, 1}
    assert set(draws([0.0] * 6, 500, top_k=3).tolist()) == {0, 1, 2}
    assert set(draws([0.0] * 8, 500, top_p=0.5).tolist()) == {0, 1, 2, 3}


def test_top_p_counts_what_top_k_left():
    # 0.5, 0.25, 0.25: alone 0.6 needs two ids; of the two that top-k leaves, 2/3 is enough.
    logits = [math.log(0.5), math.log(0.25), math.log(0.25)]
    assert set(draws(logits, 500, top_p=0.6).tolist()) == {0, 1}
    assert set(draws(logits, 500, top_p=0.6, top_k=2).tolist()) == {0}


@pytest.mark.parametrize("how", [{}, {"temperature": 0}, {"top_k": 2}, {"top_p": 0.9}, {"top_k": 2, "top_p": 0.9}])
def test_infinities_and_nan(how):
    inf, nan = math.inf, math.nan
    rows = [[0.0, inf, 1.0], [inf, 0.0, inf], [-inf, -inf, -5.0], [0.0, nan, 1.0], [nan, inf, 0.0], [-inf, -inf, -inf]]
    for seed in range(20):
        ids = sample(torch.tensor(rows), **how, generator=torch.Generator().manual_seed(seed))
        assert ids.tolist() == [1, 0, 2, -1, -1, -1]


def test_a_draw_of_zero_does_not_win(monkeypatch):
    # -log(0) is infinite: the impossible id would turn into NaN, which argmax prefers.
    def exponential(self, generator=None):
        return self.copy_(torch.tensor([[0.0, 1.0]]))

    monkeypatch.setattr(torch.Tensor, "exponential_", exponential)
    assert sample(torch.tensor([[-math.inf, 0.0]])).item() == 1


def test_seed_decides():
    assert torch.equal(draws(LOGITS, 100, seed=5), draws(LOGITS, 100, seed=5))
    assert not torch.equal(draws(LOGITS, 100, seed=5), draws(LOGITS, 100, seed=6))
    first, second = Sampling(seed=3).generator("cpu"), Sampling(seed=3).generator("cpu")
    assert torch.equal(torch.rand(4, generator=first), torch.rand(4, generator=second))
    assert Sampling().generator("cpu").initial_seed() != Sampling().generator("cpu").initial_seed()


def test_input_is_left_alone_and_compiles_whole():
    logits = torch.randn(2, 50)
    before = logits.clone()
    whole = torch.compile(sample, fullgraph=True, backend="eager")
    ids = whole(logits, 0.8, 10, 0.9)
    assert ids.shape == (2,)
    assert ids.dtype == torch.int64
    assert torch.equal(logits, before)


@pytest.mark.cuda
@pytest.mark.parametrize("how", [{}, {"temperature": 0}, {"top_k": 64, "top_p": 0.95}])
def test_no_synchronisation_on_the_gpu(how):
    logits = torch.randn(4, 262_144, device="cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    sample(logits, **how, generator=generator)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ids = sample(logits, **how, generator=generator)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert ids.is_cuda


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", True),
        ("temperature", "1"),
        ("top_k", 0),
        ("top_k", 1.5),
        ("top_k", True),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("seed", -1),
        ("seed", 2**64),
        ("seed", 1.0),
    ],
)
def test_bad_parameters_are_named(field, value):
    with pytest.raises(ValueError, match=f"^{field} = "):
        Sampling(**{field: value})
    if field != "seed":
        with pytest.raises(ValueError, match=f"^{field} = "):
            sample(torch.zeros(1, 3), **{field: value})
