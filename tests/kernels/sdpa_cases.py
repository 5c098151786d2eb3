"""Random calls of attention for tests: shapes, strides, windows, lengths, rings and image blocks."""

from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from kernel_checks import Guarded, assert_within_budget, normal, ring_positions
from torch import Tensor

from gemma4_impl.kernels.sdpa import naive


@dataclass(frozen=True)
class Attention:
    """What `naive.sdpa` takes."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_positions: Tensor
    k_positions: Tensor
    ends: Tensor | None = None
    window: int | None = None
    scale: float = 1.0

    def naive(self, dtype: torch.dtype) -> Tensor:
        return naive.sdpa(
            self.q.to(dtype),
            self.k.to(dtype),
            self.v.to(dtype),
            self.q_positions,
            self.k_positions,
            window=self.window,
            ends=self.ends,
            scale=self.scale,
        )

    def guarded(self, guard: Guarded) -> "Attention":
        return replace(self, q=guard.around(self.q), k=guard.around(self.k), v=guard.around(self.v))

    def check(self, out: Tensor, row_dims: int | None = 1) -> None:
        """Raises AssertionError if `out` errs by more than twice what `naive.sdpa` does in its dtype."""
        assert_within_budget(out, self.naive(torch.float64), self.naive(self.q.dtype), row_dims=row_dims)


def laid_out(
    heads: int, length: int, H: int, layout: str, *, B: int, seed: int, dtype: torch.dtype, device: str
) -> Tensor:
    """[B, heads, length, H] that lies in memory as the name of `layout` says."""
    options = {"seed": seed, "dtype": dtype, "device": device}
    if layout == "transposed":
        return normal(B, length, heads, H, **options).transpose(1, 2)
    if layout == "slice of a cache":
        return normal(B, heads, length + 3, H, **options)[:, :, :length]
    if layout == "head dim last but one":
        return normal(B, heads, H, length, **options).transpose(2, 3)
    return normal(B, heads, length, H, **options)


LAYOUTS = ("contiguous", "transposed", "slice of a cache", "head dim last but one")


@st.composite
def attentions(
    draw: st.DrawFn,
    kind: str,
    *,
    most_queries: int = 40,
    most_keys: int = 60,
    head_dims: tuple[int, ...] = (16, 24, 40, 64, 80),
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16),
    layouts: tuple[str, ...] = LAYOUTS,
    device: str = "cpu",
) -> Attention:
    """Calls of a kind: "causal", the queries are the last of the keys; "padded", rows of different lengths, padded on
    either side; "ring", keys in a ring that may have gone round; "shuffled", keys in any order; "images", with ends."""
    B, K, G = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    H, dtype = draw(st.sampled_from(head_dims)), draw(st.sampled_from(dtypes))
    S = draw(st.integers(1, most_keys))
    T = draw(st.integers(1, min(S, most_queries)))
    window = draw(st.none() | st.integers(1, most_keys))
    seed = draw(st.integers(0, 2**20))
    options = {"B": B, "dtype": dtype, "device": device}
    q = laid_out(K * G, T, H, draw(st.sampled_from(layouts)), seed=seed, **options)
    layout = draw(st.sampled_from(layouts))
    k, v = (laid_out(K, S, H, layout, seed=seed + i, **options) for i in (1, 2))
    at, keys = naive.known_positions(q, k)
    ends = None
    if kind in ("ring", "shuffled"):
        lengths = [draw(st.integers(T, 2 * S)) for _ in range(B)]
        keys = torch.stack([ring_positions(length, S, device) for length in lengths])
        at = torch.tensor(lengths, device=device)[:, None] - T + torch.arange(T, device=device)
        if kind == "shuffled":
            order = torch.randperm(S, generator=torch.Generator().manual_seed(seed)).to(device)
            keys = keys[:, order]
    if kind == "padded":
        at = at.clone()
        for row in range(B):
            left, right = draw(st.integers(0, T)), draw(st.integers(0, T))
            at[row, :left] = -1
            at[row, T - right :] = -1
    if kind == "images":
        block = draw(st.integers(1, 20))
        ends = torch.where((at // block) % 2 == 0, at // block * block + block - 1, at)
    scale = draw(st.sampled_from([1.0, 0.25, H**-0.5]))
    return Attention(q, k, v, at, keys, ends, window, scale)
