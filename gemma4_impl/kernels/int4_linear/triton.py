"""Linears of four- and eight-bit weights in Triton, on codes as they are stored: what a compiled program can hold."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

BLOCK_N, BLOCK_K, WARPS = 4, 1024, 4
_BLOCK = 4096
_MOST_SPAN = 256


@triton.jit
def matvec_kernel(
    x_ptr, codes_ptr, scale_ptr, zero_ptr, experts_ptr, out_ptr,
    N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, X_STRIDE: tl.constexpr, BITS: tl.constexpr,
    OFFSET: tl.constexpr, ZERO: tl.constexpr, EXPERTS: tl.constexpr, SPAN: tl.constexpr, SPANS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Rows of out [slots, N]: x [slots or 1, K] times the matrix that `experts` chooses, or the only one."""
    slot = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = n.to(tl.int64)
    if EXPERTS:
        row += tl.load(experts_ptr + slot) * N
    row = row[:, None, None]
    rows = (n < N)[:, None, None]
    dtype = out_ptr.dtype.element_ty
    # A span is a run of columns that share a scale: the largest power of two that divides a group.
    span = tl.arange(0, SPANS)[None, :, None]
    x_ptr += slot * X_STRIDE
    acc = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, K // SPAN, SPANS):
        at = start + span
        inside = rows & (at < K // SPAN)
        group = row * (K // GROUP) + at * SPAN // GROUP
        scale = tl.load(scale_ptr + group, inside, 0.0).to(tl.float32)
        zero = tl.load(zero_ptr + group, inside, 0.0).to(tl.float32) if ZERO else 0.0
        if BITS == 4:
            i = tl.arange(0, SPAN // 2)[None, None, :]
            pair = tl.load(codes_ptr + row * (K // 2) + at * (SPAN // 2) + i, inside, 0).to(tl.int32)
            low = (((pair & 15) - OFFSET).to(tl.float32) * scale + zero).to(dtype).to(tl.float32)
            high = (((pair >> 4) - OFFSET).to(tl.float32) * scale + zero).to(dtype).to(tl.float32)
            x = x_ptr + at * SPAN + 2 * i
            even = tl.load(x, at < K // SPAN, 0.0).to(tl.float32)
            odd = tl.load(x + 1, at < K // SPAN, 0.0).to(tl.float32)
            products = low * even + high * odd
        else:
            i = tl.arange(0, SPAN)[None, None, :]
            code = tl.load(codes_ptr + row * K + at * SPAN + i, inside, 0).to(tl.int32)
            weight = ((code - OFFSET).to(tl.float32) * scale + zero).to(dtype).to(tl.float32)
            products = weight * tl.load(x_ptr + at * SPAN + i, at < K // SPAN, 0.0).to(tl.float32)
        acc += tl.sum(tl.sum(products, axis=2), axis=1)
    tl.store(out_ptr + slot * N + n, acc.to(dtype), n < N)


@triton.jit
def dequantize_kernel(
    codes_ptr, scale_ptr, zero_ptr, out_ptr,
    SIZE: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, OFFSET: tl.constexpr, ZERO: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK weights in the order in which they lie."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < SIZE
    if BITS == 4:
        code = (tl.load(codes_ptr + at // 2, inside, 0).to(tl.int32) >> (at % 2 * 4).to(tl.int32)) & 15
    else:
        code = tl.load(codes_ptr + at, inside, 0).to(tl.int32)
    weight = (code - OFFSET).to(tl.float32) * tl.load(scale_ptr + at // GROUP, inside, 0.0).to(tl.float32)
    if ZERO:
        weight += tl.load(zero_ptr + at // GROUP, inside, 0.0).to(tl.float32)
    tl.store(out_ptr + at, weight.to(out_ptr.dtype.element_ty), inside)


def matvec(
    x: Tensor, qdata: Tensor, scale: Tensor, zero: Tensor | None, bits: int, offset: int, experts: Tensor | None = None
) -> Tensor:
    """x [1, K] -> x @ W.T [1, N]; or x [1 or k, K] times the matrices `experts` [k] int64 of a stack -> [k, N]."""
    N, K = qdata.shape[-2], qdata.shape[-1] * (8 // bits)
    slots = 1 if experts is None else experts.shape[0]
    out = torch.empty((slots, N), dtype=x.dtype, device=x.device)
    group = K // scale.shape[-1]
    span = span_of(group)
    _launcher(x, matvec_kernel)[(triton.cdiv(N, BLOCK_N), slots)](
        x, qdata, scale, zero, experts, out,
        N=N,
        K=K,
        GROUP=group,
        X_STRIDE=0 if x.shape[0] == 1 else K,
        BITS=bits,
        OFFSET=offset,
        ZERO=zero is not None,
        EXPERTS=experts is not None,
        SPAN=span,
        SPANS=min(max(1, BLOCK_K // span), triton.next_power_of_2(K // span)),
        BLOCK_N=BLOCK_N,
        num_warps=WARPS,
    )  # fmt: skip
    return out


def dequantize(qdata: Tensor, scale: Tensor, zero: Tensor | None, bits: int, offset: int, dtype: torch.dtype) -> Tensor:
    """[..., N, K] in `dtype`, rounded once."""
    K = qdata.shape[-1] * (8 // bits)
    out = torch.empty((*qdata.shape[:-1], K), dtype=dtype, device=qdata.device)
    _launcher(qdata, dequantize_kernel)[(triton.cdiv(out.numel(), _BLOCK),)](
        qdata, scale, zero, out,
        SIZE=out.numel(),
        GROUP=K // scale.shape[-1],
        BITS=bits,
        OFFSET=offset,
        ZERO=zero is not None,
        BLOCK=_BLOCK,
        num_warps=WARPS,
    )  # fmt: skip
    return out


def span_of(group: int) -> int:
    """The largest power of two that divides a group, at most 256."""
    return min(group & -group, _MOST_SPAN)


def _launcher(x: Tensor, kernel: Any) -> Any:
    # A compiler hands in tensors of types of its own.
    return kernel if type(x) in (Tensor, torch.nn.Parameter) else wrap_triton(kernel)
