"""The Triton kernels of attention, interpreted on the CPU, against the definition in float64."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import Guarded, normal, poisoned_memory, ring_positions
from sdpa_cases import Attention, attentions
from torch import Tensor

from gemma4_impl.kernels.sdpa import naive, triton
from gemma4_impl.kernels.sdpa.triton import DecodeConfig, PrefillConfig

PREFILL = st.sampled_from([PrefillConfig(16, 16), PrefillConfig(32, 16), PrefillConfig(16, 32, v_parts=2)])
DECODE = st.sampled_from([DecodeConfig(16), DecodeConfig(32, waves=2)])
few = settings(max_examples=4, deadline=None)


def run_guarded(case: Attention, run: Callable[[Attention, Tensor], Tensor]) -> None:
    """Between canaries, into an output full of NaN."""
    guard = Guarded()
    case = case.guarded(guard)
    out = guard.empty(*case.q.shape, dtype=case.q.dtype)
    with poisoned_memory():
        assert run(case, out) is out
    guard.assert_untouched()
    case.check(out)


@few
@given(attentions("causal"), PREFILL)
def test_prefill(case: Attention, config: PrefillConfig) -> None:
    run_guarded(
        case,
        lambda c, out: triton.prefill(c.q, c.k, c.v, window=c.window, scale=c.scale, out=out, config=config),
    )


@pytest.mark.parametrize("kind", ["padded", "ring", "shuffled", "images"])
@settings(max_examples=3, deadline=None)
@given(st.data(), PREFILL, st.booleans())
def test_prefill_with_positions(kind: str, data: st.DataObject, config: PrefillConfig, keys: bool) -> None:
    """Keys in order need no position vector."""
    case = data.draw(attentions(kind))
    keys = keys or kind in ("ring", "shuffled")
    run_guarded(
        case,
        lambda c, out: triton.prefill(
            c.q,
            c.k,
            c.v,
            q_positions=c.q_positions,
            k_positions=c.k_positions if keys else None,
            ends=c.ends,
            window=c.window,
            scale=c.scale,
            out=out,
            config=config,
        ),
    )


@pytest.mark.parametrize("positions", [False, True])
@few
@given(attentions("ring", most_queries=8), DECODE)
def test_decode(positions: bool, case: Attention, config: DecodeConfig) -> None:
    length = (case.q_positions[:, -1] + 1).to(torch.int32)
    run_guarded(
        case,
        lambda c, out: triton.decode(
            c.q,
            c.k,
            c.v,
            length,
            k_positions=c.k_positions if positions else None,
            window=c.window,
            scale=c.scale,
            out=out,
            config=config,
        ),
    )


@few
@given(attentions("padded", most_queries=8), DECODE)
def test_decode_with_query_positions(case: Attention, config: DecodeConfig) -> None:
    """A padded query is zero."""
    run_guarded(
        case,
        lambda c, out: triton.decode(
            c.q,
            c.k,
            c.v,
            q_positions=c.q_positions,
            k_positions=c.k_positions,
            window=c.window,
            scale=c.scale,
            out=out,
            config=config,
        ),
    )


@pytest.mark.parametrize("H", [320, 512])
def test_large_head_dims(H: int) -> None:
    q, k, v = (normal(1, n, 9, H, seed=n, dtype=torch.float16) for n in (4, 2, 2))
    case = Attention(q, k, v, *naive.known_positions(q, k), scale=H**-0.5)
    case.check(triton.prefill(q, k, v, scale=case.scale, config=PrefillConfig(16, 16, v_parts=2)))
    case.check(triton.decode(q, k, v, scale=case.scale))


@settings(max_examples=4, deadline=None)
@given(st.integers(0, 90), st.integers(1, 3), st.none() | st.integers(1, 20), st.booleans())
def test_decode_reads_only_what_it_sees(length: int, T: int, window: int | None, positions: bool) -> None:
    """NaN in every slot that no query sees: beyond the length, before the window, on a ring too."""
    S, q = 48, normal(1, 2, T, 16, seed=1)
    k, v = (normal(1, 1, S, 16, seed=seed) for seed in (2, 3))
    keys = ring_positions(length, S)[None]
    at = torch.arange(length - T, length).clamp_min(-1)[None]
    case = Attention(q, k, v, at, keys, window=window)
    first = 0 if window is None else max(0, length - T - window + 1)
    hidden = (keys[0] < first) | (keys[0] < 0)
    poisoned = (x.masked_fill(hidden[:, None], torch.nan) for x in (k, v))
    lengths = torch.tensor([length], dtype=torch.int32)
    out = triton.decode(
        q, *poisoned, lengths, k_positions=keys if positions else None, window=window, config=DecodeConfig(16)
    )
    case.check(out)


def test_prefill_reads_only_what_it_sees() -> None:
    """A block of queries whose window begins late, in a flat cache and in a ring."""
    S, T, window = 80, 16, 10
    q, k, v = normal(1, 2, T, 16, seed=1), normal(1, 1, S, 16, seed=2), normal(1, 1, S, 16, seed=3)
    config = PrefillConfig(16, 16)
    for length, given_positions in ((80, False), (80, True), (100, True)):
        keys, at = ring_positions(length, S)[None], torch.arange(length - T, length)[None]
        case = Attention(q, k, v, at, keys, window=window)
        hidden = keys[0] <= length - T - window
        poisoned = [x.masked_fill(hidden[:, None], torch.nan) for x in (k, v)]
        vectors = {"q_positions": at, "k_positions": keys} if given_positions else {}
        case.check(triton.prefill(q, *poisoned, window=window, config=config, **vectors))


def test_no_key_at_all() -> None:
    q, k = normal(1, 2, 3, 16, seed=1), normal(1, 1, 8, 16, seed=2)
    at, none = torch.arange(3)[None], torch.full((1, 8), -1)
    assert not triton.prefill(q, k, k, q_positions=at, k_positions=none).any()
    assert not triton.decode(q, k, k, q_positions=at, k_positions=none).any()
    assert not triton.decode(q, k, k, torch.zeros(1, dtype=torch.int32)).any()


def test_refused() -> None:
    q, k = normal(1, 2, 3, 16, seed=1), normal(1, 1, 8, 16, seed=2)
    for wrong in ({"window": 0}, {"scale": 0.0}, {"q_positions": torch.zeros(1, 2, dtype=torch.long)}):
        with pytest.raises(ValueError, match=r"window|scale|q_positions"):
            triton.prefill(q, k, k, **wrong)
    with pytest.raises(ValueError, match="do not fit"):
        triton.prefill(q, k, k[:, :, :4])
    with pytest.raises(ValueError, match="float64"):
        triton.prefill(q.double(), k.double(), k.double())
    with pytest.raises(ValueError, match="last of 2 keys"):
        triton.prefill(q, k[:, :, :2], k[:, :, :2])
    with pytest.raises(ValueError, match="int32"):
        triton.decode(q, k, k, torch.zeros(1))
    with pytest.raises(ValueError, match="in the place of length"):
        triton.decode(q, k, k, q_positions=torch.zeros(1, 3, dtype=torch.long))
