"""The small steps' Triton kernels, interpreted on the CPU, against their definition in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import normal
from steps_cases import SMALL, STEPS

from gemma4_impl.kernels.steps import naive, sampling_state, triton, triton_sampling

# What numpy says of overflow and of inf - inf, which the kernels expect.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


@pytest.mark.parametrize("step", STEPS)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_step(step: str, data: st.DataObject) -> None:
    data.draw(STEPS[step](SMALL)).check(triton)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_draw_is_the_definition(dtype: torch.dtype, temperature: float) -> None:
    logits = 3 * normal(3, 5000, seed=0, dtype=dtype)
    ours, theirs = sampling_state(2**64 - 5, "cpu"), sampling_state(2**64 - 5, "cpu")
    for _ in range(4):
        expected = naive.sample(logits, temperature, None, None, theirs)
        assert torch.equal(triton_sampling.draw(logits, temperature, ours), expected)
    assert torch.equal(ours, theirs)


@settings(max_examples=6, deadline=None)
@given(
    V=st.sampled_from([1, 3, 200, 1000]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    levels=st.sampled_from([1, 3, 40, None]),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    top_k=st.sampled_from([1, 2, 7, 64, 256]),
    top_p=st.sampled_from([None, 1.0, 0.93, 0.31]),
    seed=st.integers(0, 2**64 - 1),
)
def test_draw_top_k_is_the_definition(V, dtype, levels, temperature, top_k, top_p, seed) -> None:
    """`levels` distinct values make ties."""
    logits = 2 * normal(2, V, seed=seed % 1000, dtype=dtype)
    if levels is not None:
        logits = (logits * levels / 4).round() * 4 / levels
    ours, theirs = sampling_state(seed, "cpu"), sampling_state(seed, "cpu")
    ours[1] = theirs[1] = 2**32 + 7
    expected = naive.sample(logits, temperature, top_k, top_p, theirs)
    assert torch.equal(triton_sampling.draw_top_k(logits, temperature, top_k, top_p, ours), expected)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("top_k", "top_p"), [(1, None), (2, None), (7, 0.5), (20, 0.93)])
def test_candidates_are_the_definition(top_k: int, top_p: float | None) -> None:
    """So hot that all candidates are equally likely: one too many or too few shows, and the wrong one of equals."""
    logits = (2 * normal(1, 150, seed=1)).round().expand(16, -1)
    ours, theirs = sampling_state(4, "cpu"), sampling_state(4, "cpu")
    expected = naive.sample(logits, 1e3, top_k, top_p, theirs)
    assert torch.equal(triton_sampling.draw_top_k(logits, 1e3, top_k, top_p, ours), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_infinities_and_nan(dtype: torch.dtype) -> None:
    inf, nan = math.inf, math.nan
    rows = [[0.0, inf, 1.0], [inf, 0.0, inf], [-inf, -inf, -5.0], [0.0, nan, 1.0], [nan, inf, 0.0], [-inf] * 3]
    logits, state = torch.tensor([*rows, [-nan, 0.0, 1.0]], dtype=dtype), sampling_state(0, "cpu")
    expected = [1, 0, 2, -1, -1, -1, -1]
    assert triton_sampling.draw(logits, 0.0, state).tolist() == expected
    assert triton_sampling.draw(logits, 1.0, state).tolist() == expected
    for temperature in (1.0, 5e-324):
        assert triton_sampling.draw_top_k(logits, temperature, 2, 0.9, state).tolist() == expected
    zeros = torch.tensor([[-0.0, 0.0]], dtype=dtype)
    assert triton_sampling.draw_top_k(zeros, 1.0, 1, None, state).tolist() == [0]
