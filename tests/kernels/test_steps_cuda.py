"""The small steps on a GPU: against float64 at real sizes, repeated runs, and sampling in a graph."""

import math

import pytest
import scipy.stats
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_checks import assert_repeatable, normal
from steps_cases import EPS, LARGE, STEPS

from gemma4_impl.kernels import steps
from gemma4_impl.kernels.steps import naive
from gemma4_impl.model.sampler import allowed, sample

pytestmark = pytest.mark.cuda
V = 262_144


@pytest.mark.parametrize("step", STEPS)
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(data=st.data())
def test_step(step: str, data: st.DataObject) -> None:
    data.draw(STEPS[step](LARGE)).to("cuda").check(steps)


@pytest.mark.parametrize("rows", [1, 2048])
def test_repeated_runs_agree(rows: int) -> None:
    h, residual = (normal(rows, 5376, seed=i, dtype=torch.bfloat16, device="cuda") for i in range(2))
    weight = normal(5376, seed=2, dtype=torch.bfloat16, device="cuda")
    assert_repeatable(lambda: torch.cat(steps.add_norm(h, residual, weight, None, weight, EPS)))
    logits = 3 * normal(2, V, seed=3, dtype=torch.bfloat16, device="cuda")
    for how in [(0.0, None, None), (1.0, None, None), (1.0, 64, 0.95), (1.0, 256, None)]:
        assert_repeatable(lambda: steps.sample(logits, *how, steps.sampling_state(1, "cuda")))  # noqa: B023


@pytest.mark.parametrize(("size", "dtype"), [(V, torch.bfloat16), (1000, torch.float32)])
@pytest.mark.parametrize("filters", [(None, None), (1, None), (64, 0.95), (256, 1.0), (300, 0.9), (None, 0.9)])
def test_draws_are_the_definition(size: int, filters: tuple, dtype: torch.dtype) -> None:
    """The same random numbers, hence the same tokens: filters and ties agree in every row."""
    logits = 2.5 * normal(8, size, seed=size, dtype=dtype, device="cuda")
    ours, theirs = (steps.sampling_state(2**64 - 5, "cuda") for _ in range(2))
    for temperature in (0.5, 1.0, 3.0):
        expected = naive.sample(logits, temperature, *filters, theirs)
        assert torch.equal(steps.sample(logits, temperature, *filters, ours), expected)
    assert torch.equal(ours, theirs)
    assert torch.equal(steps.sample(logits, 0.0, *filters, ours), sample(logits, 0.0))


@pytest.mark.parametrize(
    ("dtype", "how"),
    [(torch.bfloat16, (1.0, 64, 0.95)), (torch.float32, (1.0, 64, 0.95)), (torch.bfloat16, (2.0, 256, 0.7))],
)
def test_candidates_are_those_of_the_sampler(dtype: torch.dtype, how: tuple) -> None:
    """Every id that the sampler allows is drawn, and no other: with logits that differ little, and with ties."""
    logits = 0.2 * normal(1, V, seed=5, dtype=dtype, device="cuda").clamp(max=3.5)
    kept = allowed(logits.float(), *how)[0].nonzero().flatten()
    rows, state = logits.expand(512, -1), steps.sampling_state(11, "cuda")
    drawn = torch.cat([steps.sample(rows, *how, state) for _ in range(20)]).unique()
    assert torch.equal(drawn, kept)


@pytest.mark.parametrize("how", [(1.0, None, None), (1.0, 64, 0.95), (1.5, 256, 0.9)])
def test_frequencies(how: tuple) -> None:
    logits = 2 * normal(1, V, seed=6, dtype=torch.bfloat16, device="cuda")
    scores = logits[0].double() / how[0]
    if how[1]:
        scores = scores.masked_fill(~allowed(logits.float(), *how)[0], -math.inf)
    p = torch.softmax(scores, dim=0)
    state, rows = steps.sampling_state(12, "cuda"), logits.expand(500, -1)
    ids = torch.cat([steps.sample(rows, *how, state) for _ in range(40)])
    # Bins of about equal probability, over ids in order.
    bins = (p.cumsum(0) * 50).long().clamp(max=49)
    expected = torch.zeros(50, dtype=torch.double, device="cuda").index_add_(0, bins, p) * len(ids)
    counts = bins[ids].bincount(minlength=50)
    few = expected < 5
    assert counts[few].sum() <= 5 + 4 * expected[few].sum()
    expected, counts = expected[~few].cpu(), counts[~few].cpu()
    assert scipy.stats.chisquare(counts, expected * counts.sum() / expected.sum()).pvalue > 1e-3


@pytest.mark.parametrize("how", [(1.0, None, None), (1.0, 64, 0.95), (1.0, None, 0.9)])
def test_replays_draw_anew(how: tuple) -> None:
    logits, state = torch.zeros(1, V, device="cuda", dtype=torch.bfloat16), steps.sampling_state(9, "cuda")
    logits[:, :40] = 5
    steps.sample(logits, *how, state)
    state[1] = 0
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = steps.sample(logits, *how, state)
    replayed = []
    for _ in range(8):
        graph.replay()
        replayed.append(int(out))
    assert state.tolist() == [9, 8]
    assert len(set(replayed)) > 3
    eager = steps.sampling_state(9, "cuda")
    assert replayed == [int(steps.sample(logits, *how, eager)) for _ in range(8)]


@pytest.mark.parametrize("how", [(0.0, None, None), (1.0, None, None), (1.0, 2, 0.9), (1.0, None, 0.9)])
def test_infinities_and_nan(how: tuple) -> None:
    inf, nan = math.inf, math.nan
    rows = [[0.0, inf, 1.0], [inf, 0.0, inf], [-inf, -inf, -5.0], [0.0, nan, 1.0], [nan, inf, 0.0], [-inf] * 3]
    logits = torch.tensor([*rows, [-nan, 0.0, 1.0]], device="cuda")
    assert steps.sample(logits, *how, steps.sampling_state(0, "cuda")).tolist() == [1, 0, 2, -1, -1, -1, -1]


def test_strided_logits() -> None:
    wide = normal(4, 2 * V, seed=8, dtype=torch.bfloat16, device="cuda")
    for logits in (wide[:, V:], wide[:, ::2]):
        for how in [(0.0, None, None), (1.0, None, None), (1.0, 64, 0.95)]:
            a, b = (steps.sample(x, *how, steps.sampling_state(0, "cuda")) for x in (logits, logits.contiguous()))
            assert torch.equal(a, b)
