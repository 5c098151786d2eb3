"""The definition of attention against the decoder's own, which is in parity with transformers."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import normal, rel_l2, ring_positions
from sdpa_cases import Attention, attentions

from gemma4_impl.kernels.sdpa import naive
from gemma4_impl.model.decoder import Attention as DecoderAttention
from gemma4_impl.model.decoder import _additive, attention_mask


@pytest.mark.parametrize("kind", ["causal", "ring", "shuffled", "images"])
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_agrees_with_the_decoder(kind: str, data: st.DataObject) -> None:
    case: Attention = data.draw(attentions(kind, dtypes=(torch.float64,), most_queries=20))
    mask = attention_mask(case.q_positions, case.k_positions, case.window, case.ends)
    # The decoder's scale is 1.
    q = case.q * case.scale
    theirs = DecoderAttention.attend(SimpleNamespace(), q, case.k, case.v, _additive(mask, q.dtype))
    sees_some = mask.any(-1)[..., None].expand_as(theirs)
    ours = case.naive(torch.float64)
    assert rel_l2(ours[sees_some], theirs[sees_some]) < 1e-13
    assert not ours[~sees_some].any()


@settings(max_examples=25, deadline=None)
@given(attentions("padded", dtypes=(torch.float32,)))
def test_padding_is_zero_and_changes_nothing(case: Attention) -> None:
    out, padded = case.naive(torch.float32), case.q_positions < 0
    assert not out.transpose(1, 2)[padded].any()
    whole = naive.sdpa(
        case.q, case.k, case.v, *naive.known_positions(case.q, case.k), window=case.window, scale=case.scale
    )
    assert torch.equal(out.transpose(1, 2)[~padded], whole.transpose(1, 2)[~padded])


@settings(max_examples=25, deadline=None)
@given(attentions("ring"))
def test_any_number_of_queries_at_a_time(case: Attention) -> None:
    whole = case.naive(torch.float64)
    before, naive._SCORES = naive._SCORES, 1
    try:
        assert rel_l2(case.naive(torch.float64), whole) < 1e-13
    finally:
        naive._SCORES = before


@given(st.integers(0, 100), st.integers(1, 40), st.integers(1, 5))
def test_known_positions(length: int, slots: int, T: int) -> None:
    q, k = torch.empty(1, 1, T, 8), torch.empty(1, 1, slots, 8)
    at, keys = naive.known_positions(q, k, torch.tensor([length]))
    assert keys.tolist() == [ring_positions(length, slots).tolist()]
    assert at.tolist() == [[max(-1, p) for p in range(length - T, length)]]


def test_half_precision_is_computed_in_float32() -> None:
    q, k, v = (normal(1, 2, 40, 16, seed=seed, dtype=torch.bfloat16) for seed in range(3))
    case = Attention(q, k, v, *naive.known_positions(q, k))
    assert torch.equal(case.naive(torch.bfloat16), case.naive(torch.float32).bfloat16())
    assert case.naive(torch.float64).dtype == torch.float64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(1, 2, 4, 8)}, "do not fit together"),
        ({"q": torch.zeros(1, 3, 3, 8)}, "do not fit together"),
        ({"v": torch.zeros(1, 2, 5, 8, dtype=torch.float64)}, "differ in dtype"),
        ({"q_positions": torch.zeros(1, 4, dtype=torch.long)}, "q_positions must be int64"),
        ({"k_positions": torch.zeros(1, 5, dtype=torch.int32)}, "k_positions must be int64"),
        ({"ends": torch.zeros(1, 4, dtype=torch.long)}, "ends must be int64"),
    ],
)
def test_refused(change: dict, message: str) -> None:
    right = {
        "q": torch.zeros(1, 4, 3, 8),
        "k": torch.zeros(1, 2, 5, 8),
        "v": torch.zeros(1, 2, 5, 8),
        "q_positions": torch.arange(3)[None],
        "k_positions": torch.arange(5)[None],
    }
    naive.sdpa(**right)
    with pytest.raises(ValueError, match=message):
        naive.sdpa(**(right | change))
