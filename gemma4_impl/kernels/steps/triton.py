"""The small steps as Triton kernels: one pass over their inputs, float32 inside, the model's roundings in between."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _norm_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    x_stride,
    D,
    eps,
    WEIGHT: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    dtype = out_ptr.dtype.element_ty
    squares = tl.zeros([CHUNK], tl.float32)
    xs = ()
    for i in tl.static_range(CHUNKS):
        at = i * CHUNK + tl.arange(0, CHUNK)
        x = tl.load(x_ptr + row * x_stride + at, mask=at < D, other=0.0)
        squares += x.to(tl.float32) * x.to(tl.float32)
        xs += (x,)
    scale = tl.rsqrt(tl.sum(squares) / D + eps)
    for i in tl.static_range(CHUNKS):
        at = i * CHUNK + tl.arange(0, CHUNK)
        y = xs[i].to(tl.float32) * scale
        if WEIGHT:
            y *= tl.load(weight_ptr + at, mask=at < D, other=0.0).to(tl.float32)
        tl.store(out_ptr + row * D + at, y.to(dtype), mask=at < D)


@triton.jit
def _add_norm_kernel(
    h_ptr,
    residual_ptr,
    post_norm_ptr,
    scalar_ptr,
    weight_ptr,
    r_ptr,
    x_ptr,
    h_stride,
    residual_stride,
    D,
    eps,
    SCALAR: tl.constexpr,
    WEIGHT: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    dtype = r_ptr.dtype.element_ty
    squares = tl.zeros([CHUNK], tl.float32)
    hs, residuals = (), ()
    for i in tl.static_range(CHUNKS):
        at = i * CHUNK + tl.arange(0, CHUNK)
        h = tl.load(h_ptr + row * h_stride + at, mask=at < D, other=0.0)
        squares += h.to(tl.float32) * h.to(tl.float32)
        hs += (h,)
        residuals += (tl.load(residual_ptr + row * residual_stride + at, mask=at < D, other=0.0),)
    scale = tl.rsqrt(tl.sum(squares) / D + eps)
    if SCALAR:
        scalar = tl.load(scalar_ptr).to(tl.float32)
    squares = tl.zeros([CHUNK], tl.float32)
    rs = ()
    for i in tl.static_range(CHUNKS):
        at = i * CHUNK + tl.arange(0, CHUNK)
        weight = tl.load(post_norm_ptr + at, mask=at < D, other=0.0).to(tl.float32)
        normed = (hs[i].to(tl.float32) * scale * weight).to(dtype)
        r = (residuals[i].to(tl.float32) + normed.to(tl.float32)).to(dtype)
        if SCALAR:
            r = (r.to(tl.float32) * scalar).to(dtype)
        tl.store(r_ptr + row * D + at, r, mask=at < D)
        squares += r.to(tl.float32) * r.to(tl.float32)
        rs += (r,)
    if WEIGHT:
        scale = tl.rsqrt(tl.sum(squares) / D + eps)
        for i in tl.static_range(CHUNKS):
            at = i * CHUNK + tl.arange(0, CHUNK)
            weight = tl.load(weight_ptr + at, mask=at < D, other=0.0).to(tl.float32)
            tl.store(x_ptr + row * D + at, (rs[i].to(tl.float32) * scale * weight).to(dtype), mask=at < D)


@triton.jit
def _normed_halves(
    x_ptr, heads_HB1, weight_ptr, head_stride, mask, eps, H: tl.constexpr, HALF: tl.constexpr, WEIGHT: tl.constexpr
):
    """Both halves [HEADS, HALF] of normed heads, rounded as the module rounds them, in float32."""
    at_1H = tl.arange(0, HALF)[None, :]
    low = tl.load(x_ptr + heads_HB1 * head_stride + at_1H, mask=mask, other=0.0)
    high = tl.load(x_ptr + heads_HB1 * head_stride + H // 2 + at_1H, mask=mask, other=0.0)
    dtype = low.dtype
    low, high = low.to(tl.float32), high.to(tl.float32)
    scale = tl.rsqrt(tl.sum(low * low + high * high, axis=1, keep_dims=True) / H + eps)
    low, high = low * scale, high * scale
    if WEIGHT:
        low *= tl.load(weight_ptr + at_1H, mask=at_1H < H // 2, other=0.0).to(tl.float32)
        high *= tl.load(weight_ptr + H // 2 + at_1H, mask=at_1H < H // 2, other=0.0).to(tl.float32)
    return low.to(dtype).to(tl.float32), high.to(dtype).to(tl.float32)


@triton.jit
def _qkv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    q_norm_ptr,
    k_norm_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slots_ptr,
    T,
    q_stride_b, q_stride_t, q_stride_n,
    k_stride_b, k_stride_t, k_stride_n,
    v_stride_b, v_stride_t, v_stride_n,
    cos_stride_b, cos_stride_t,
    sin_stride_b, sin_stride_t,
    slots_stride_b, slots_stride_t,
    kc_stride_b, kc_stride_k, kc_stride_c,
    vc_stride_b, vc_stride_k, vc_stride_c,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, t = row // T, row % T
    block = tl.program_id(1)
    at_1H = tl.arange(0, HALF)[None, :]
    half: tl.constexpr = H // 2
    # The table holds every angle twice, and the sine's minus sign in its first half.
    cos = tl.load(cos_ptr + b * cos_stride_b + t * cos_stride_t + at_1H, mask=at_1H < half, other=0.0)
    sin = tl.load(sin_ptr + b * sin_stride_b + t * sin_stride_t + half + at_1H, mask=at_1H < half, other=0.0)
    dtype = out_ptr.dtype.element_ty
    if block < tl.cdiv(N, HEADS):
        heads = block * HEADS + tl.arange(0, HEADS)[:, None]
        mask = (heads < N) & (at_1H < half)
        x_ptr = q_ptr + b * q_stride_b + t * q_stride_t
        low, high = _normed_halves(x_ptr, heads, q_norm_ptr, q_stride_n, mask, eps, H, HALF, True)
        to = out_ptr + row * N * H + heads * H + at_1H
        tl.store(to, (low * cos - high * sin).to(dtype), mask=mask)
        tl.store(to + half, (high * cos + low * sin).to(dtype), mask=mask)
    elif K > 0:
        heads = (block - tl.cdiv(N, HEADS)) * HEADS + tl.arange(0, HEADS)[:, None]
        mask = (heads < K) & (at_1H < half)
        slot = tl.load(slots_ptr + b * slots_stride_b + t * slots_stride_t).to(tl.int64)
        x_ptr = k_ptr + b * k_stride_b + t * k_stride_t
        low, high = _normed_halves(x_ptr, heads, k_norm_ptr, k_stride_n, mask, eps, H, HALF, True)
        to = k_cache_ptr + b * kc_stride_b + heads * kc_stride_k + slot * kc_stride_c + at_1H
        tl.store(to, (low * cos - high * sin).to(dtype), mask=mask)
        tl.store(to + half, (high * cos + low * sin).to(dtype), mask=mask)
        x_ptr = v_ptr + b * v_stride_b + t * v_stride_t
        low, high = _normed_halves(x_ptr, heads, v_ptr, v_stride_n, mask, eps, H, HALF, False)
        to = v_cache_ptr + b * vc_stride_b + heads * vc_stride_k + slot * vc_stride_c + at_1H
        tl.store(to, low.to(dtype), mask=mask)
        tl.store(to + half, high.to(dtype), mask=mask)


@triton.jit
def _gelu_mul_kernel(x_ptr, out_ptr, x_stride, F, INTERLEAVE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if INTERLEAVE:
        gate_at = at // INTERLEAVE * (2 * INTERLEAVE) + at % INTERLEAVE
        up_at = gate_at + INTERLEAVE
    else:
        gate_at, up_at = at, at + F
    gate = tl.load(x_ptr + row * x_stride + gate_at, mask=at < F, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * x_stride + up_at, mask=at < F, other=0.0).to(tl.float32)
    # (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3).
    twice_u = 1.5957691216057308 * gate * (1.0 + 0.044715 * gate * gate)
    out = gate / (1.0 + tl.exp(-twice_u)) * up
    tl.store(out_ptr + row * F + at, out.to(out_ptr.dtype.element_ty), mask=at < F)


@triton.jit
def _embed_kernel(
    tokens_ptr,
    table_ptr,
    scale_ptr,
    zero_ptr,
    out_ptr,
    rows,
    D,
    group,
    offset,
    factor,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.load(tokens_ptr + tl.program_id(0)).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    known = (token >= 0) & (token < rows)
    token = tl.where(known, token, 0)
    mask = at < D
    dtype = out_ptr.dtype.element_ty
    if BITS == 4:
        pair = tl.load(table_ptr + token * (D // 2) + at // 2, mask=mask, other=0).to(tl.int32)
        x = ((pair >> (at % 2 * 4)) & 15).to(tl.float32)
    else:
        x = tl.load(table_ptr + token * D + at, mask=mask, other=0).to(tl.float32)
    if BITS < 16:
        where = token * (D // group) + at // group
        x = (x - offset) * tl.load(scale_ptr + where, mask=mask, other=0.0).to(tl.float32)
        if ZERO:
            x += tl.load(zero_ptr + where, mask=mask, other=0.0).to(tl.float32)
    x = x.to(dtype).to(tl.float32) * factor
    x = tl.where(known, x, float("nan"))
    tl.store(out_ptr + tl.program_id(0).to(tl.int64) * D + at, x.to(dtype), mask=mask)


def norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    x_MD = _matrix(x)
    M, D = x_MD.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    chunk, warps = _chunk(M, D)
    _norm_kernel[(M,)](
        x_MD, weight, out, x_MD.stride(0), D, eps, weight is not None, chunk, triton.cdiv(D, chunk), num_warps=warps
    )
    return out


def add_norm(
    h: Tensor, residual: Tensor, post_norm: Tensor, scalar: Tensor | None, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    h_MD, residual_MD = _matrix(h), _matrix(residual)
    M, D = h_MD.shape
    r = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    x = torch.empty_like(r) if weight is not None else r.new_empty(0)
    chunk, warps = _chunk(M, D)
    _add_norm_kernel[(M,)](
        h_MD, residual_MD, post_norm, scalar, weight, r, x,
        h_MD.stride(0), residual_MD.stride(0), D, eps,
        scalar is not None, weight is not None, chunk, triton.cdiv(D, chunk), num_warps=warps,
    )  # fmt: skip
    return r, x


def qkv_norm_rope(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    q_norm: Tensor,
    k_norm: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor | None,
    v_cache: Tensor | None,
    slots: Tensor | None,
    eps: float,
) -> Tensor:
    B, T, N, H = q.shape
    q, k, v = (x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    K = 0 if k is None else k.shape[2]
    out = torch.empty((B, T, N, H), dtype=q.dtype, device=q.device)
    # Few rows need many programs; with many, a program should have 1024 numbers to handle.
    heads = triton.next_power_of_2(min(max(1, 1024 // H), N)) if B * T > 64 else 1
    none = (0, 0, 0)
    _qkv_kernel[(B * T, triton.cdiv(N, heads) + triton.cdiv(K, heads))](
        q, k, v, q_norm, k_norm, cos, sin, out, k_cache, v_cache, slots, T,
        *q.stride()[:3],
        *(k.stride()[:3] if K else none),
        *(v.stride()[:3] if K else none),
        *cos.stride()[:2],
        *sin.stride()[:2],
        *(slots.stride() if K else none[:2]),
        *(k_cache.stride()[:3] if K else none),
        *(v_cache.stride()[:3] if K else none),
        eps, N, K, H, triton.next_power_of_2(H // 2), heads, num_warps=1,
    )  # fmt: skip
    return out


def gelu_mul(gate_up: Tensor, interleave: int) -> Tensor:
    x = _matrix(gate_up)
    M, F = x.shape[0], x.shape[1] // 2
    out = torch.empty((*gate_up.shape[:-1], F), dtype=x.dtype, device=x.device)
    block = min(1024, triton.next_power_of_2(F))
    _gelu_mul_kernel[(M, triton.cdiv(F, block))](x, out, x.stride(0), F, interleave, block, num_warps=4)
    return out


def embed(
    tokens: Tensor,
    table: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    bits: int,
    offset: int,
    factor: float,
    dtype: torch.dtype,
) -> Tensor:
    tokens = tokens.contiguous()
    rows, D = table.shape[0], table.shape[1] * (2 if bits == 4 else 1)
    out = torch.empty((*tokens.shape, D), dtype=dtype, device=table.device)
    group = 1 if scale is None else D // scale.shape[1]
    block = min(1024, triton.next_power_of_2(D))
    _embed_kernel[(tokens.numel(), triton.cdiv(D, block))](
        tokens, table, scale, zero, out, rows, D, group, offset, factor, bits, zero is not None, block, num_warps=4
    )
    return out


def _matrix(x: Tensor) -> Tensor:
    """x [..., D] as [M, D] whose rows are contiguous; a copy only if strides leave no other way."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _chunk(M: int, D: int) -> tuple[int, int]:
    """How many numbers of a row are handled at once, and by how many warps: all of them if rows are few."""
    whole = triton.next_power_of_2(D)
    return (whole if M <= 64 else min(2048, whole)), 8
