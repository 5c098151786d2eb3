"""Attention over the engine's caches: one token a row while decoding, a chunk of one row while prefilling."""

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma4_impl.kernels import cuda, steps
from gemma4_impl.kernels.sdpa import decode as decode_kernel
from gemma4_impl.kernels.sdpa.dispatch import sdpa
from gemma4_impl.model.rope import RotaryEmbedding


def decode(
    qkv: Tensor,
    q_norm: Tensor,
    k_norm: Tensor | None,
    position: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    out: Tensor,
    *,
    rope: RotaryEmbedding,
    window: int | None,
    k_eq_v: bool,
    eps: float,
) -> None:
    """qkv [B, *], one token a row at position [B] -> out [B, N H]; k and v are written into the caches [B, K, C + 1, H]
    first, a ring of C slots, unless the layer is KV-shared (k_norm is None).

    One kernel on Hopper in bfloat16, which reads what is visible; elsewhere all slots are looked at."""
    H, K, C = q_norm.shape[0], k_cache.shape[1], k_cache.shape[2] - 1
    N = out.shape[1] // H
    if on_hopper(qkv) and H in decode_kernel.HEAD_DIMS and N // K <= decode_kernel.MOST_ROWS:
        decode_kernel.decode_fused(
            qkv, q_norm, k_norm, rope.inv_freq, position, k_cache, v_cache,
            ring=C, window=window, k_eq_v=k_eq_v, eps=eps, out=out,
        )  # fmt: skip
        return
    cos, sin = rope(position[:, None])
    q = prepare(qkv[:, None], q_norm, k_norm, k_cache, v_cache, cos, sin, position[:, None] % C, k_eq_v, eps)
    # How many positions ago each slot was written; in one that never was, this reaches back before position 0.
    age = (position[:, None] - torch.arange(C, device=qkv.device)) % C
    seen = age <= position[:, None]
    if window is not None:
        seen &= age < window
    mask = torch.where(seen, 0.0, -torch.inf).to(q.dtype)[:, None, None]
    keys, values = k_cache[:, :, :C], v_cache[:, :, :C]
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2), keys, values, attn_mask=mask, scale=1.0, enable_gqa=q.shape[2] != K
    )
    out.copy_(y.view_as(out))


def prepare(
    qkv: Tensor,
    q_norm: Tensor,
    k_norm: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    k_eq_v: bool,
    eps: float,
) -> Tensor:
    """qkv [B, T, *] -> q [B, T, N, H], normed and rotated; k and v go into `slots` [B, T] of caches [B, K, C + 1, H],
    unless there are none (k_norm is None). cos and sin are [B, T, 1, H]."""
    heads = qkv.unflatten(-1, (-1, q_norm.shape[0]))
    if k_norm is None:
        return steps.qkv_norm_rope(heads, None, None, q_norm, None, cos, sin, None, None, None, eps)
    K = k_cache.shape[1]
    v = heads[:, :, -K:]
    k = v if k_eq_v else heads[:, :, -2 * K : -K]
    q = heads[:, :, : heads.shape[2] - (K if k_eq_v else 2 * K)]
    return steps.qkv_norm_rope(q, k, v, q_norm, k_norm, cos, sin, k_cache, v_cache, slots, eps)


def read(cache: Tensor, start: int, stop: int) -> Tensor:
    """Positions start .. stop - 1 of one row's cache [K, C + 1, H], in order: [K, stop - start, H], a copy if they
    wrap."""
    C = cache.shape[1] - 1
    first, last = start % C, (stop - 1) % C + 1
    if first < last:
        return cache[:, first:last]
    return torch.cat([cache[:, first:C], cache[:, :last]], dim=1)


def prefill(q: Tensor, k: Tensor, v: Tensor, window: int | None = None, ends: Tensor | None = None) -> Tensor:
    """q [T, N, H], the last T of S positions, k and v [K, S, H] -> [T, N, H]: causal, the last `window` keys only if
    given, and up to ends [T] (0 .. S - 1) where a query may look ahead."""
    T, S = len(q), k.shape[1]
    look = {}
    if ends is not None:
        at = torch.arange(S, device=q.device)[None]
        look = {"q_positions": at[:, S - T :], "k_positions": at, "ends": ends[None]}
    return sdpa(q.transpose(0, 1)[None], k[None], v[None], window=window, **look)[0].transpose(0, 1)


def on_hopper(x: Tensor) -> bool:
    """Whether the kernels in CUDA C++ take x."""
    return x.is_cuda and x.dtype == torch.bfloat16 and cuda.available(x.device.index)
