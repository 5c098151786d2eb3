"""Linears of four- and eight-bit weights in Triton, on codes as they are stored: what a compiled program can hold."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

_BLOCK, _WARPS = 4096, 4
# Up to so many rows: the rows and units of a program's tile, and its warps; few rows need many warps each.
_TILES = {4096: (4, 128, 4), 16383: (8, 128, 4), None: (8, 64, 2)}


@triton.jit
def matvec_kernel(
    x_ptr, codes_ptr, scale_ptr, zero_ptr, experts_ptr, out_ptr,
    N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, X_STRIDE: tl.constexpr, BITS: tl.constexpr,
    OFFSET: tl.constexpr, ZERO: tl.constexpr, EXPERTS: tl.constexpr, LOG_CODES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    """BLOCK_N rows of out [slots, N]: x [slots or 1, K] times the matrix that `experts` chooses, or the only one.

    A unit, a byte or a word of 32 bits, is 2^LOG_CODES codes that share a scale; BLOCK_U units of a row at a time."""
    CODES: tl.constexpr = 1 << LOG_CODES
    WORDS: tl.constexpr = CODES * BITS == 32
    UNITS: tl.constexpr = K // CODES
    GROUPS: tl.constexpr = K // GROUP
    # Not within the loop, where the scales would be loaded in an order that does not suit the codes.
    ONCE: tl.constexpr = GROUPS == 1 and not ZERO
    slot = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    n = tl.arange(0, BLOCK_N)
    inside = n < N - first
    # Past its ends a matrix's last row and unit are read again, which is cheaper than masks: x is 0 there.
    row = (tl.minimum(n, (N - 1 - first).to(tl.int32)) if N % BLOCK_N else n)[None, :]
    matrix = (tl.load(experts_ptr + slot) * N if EXPERTS else 0) + first
    units_ptr = (codes_ptr.to(tl.pointer_type(tl.int32)) if WORDS else codes_ptr) + matrix * UNITS
    scale_ptr += matrix * GROUPS
    # An integer below 2^24 is, bit for bit, the float that is 2^-149 times it. So a code at bit p is not converted, but
    # multiplied with 2^(64 - p) x, and the sum with 2^85.
    j = tl.arange(0, CODES)
    above = j * BITS // 24 * 8
    p = j * BITS - above
    mask = (((1 << BITS) - 1) << p).to(tl.uint32)[None, None, :]
    power = ((127 + 64 - p) << 23).to(tl.float32, bitcast=True)[None, :]
    # A signed byte with its top bit flipped is 128 more.
    excess: tl.constexpr = OFFSET + 128 * (BITS == 8)
    # Taken off each code, not their sum, where the sum of larger numbers would be seen in the result.
    EXACT: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
    less = ((1 << p).to(tl.float32, bitcast=True) * excess)[None, None, :]
    acc = tl.zeros([BLOCK_U, BLOCK_N], tl.float32)
    # Codes and scales are loaded a turn ahead, the last ones once more than is needed.
    at = tl.minimum(tl.arange(0, BLOCK_U)[:, None], UNITS - 1)
    next_unit = tl.load(units_ptr + row * UNITS + at)
    next_scale = 1.0 if ONCE else tl.load(scale_ptr + row * GROUPS + at * CODES // GROUP)
    for start in range(0, UNITS, BLOCK_U):
        at = start + tl.arange(0, BLOCK_U)[:, None]
        x = tl.load(x_ptr + slot * X_STRIDE + at * CODES + j[None, :], at < UNITS, 0.0).to(tl.float32)
        # This also makes a lane load single units, each with the x of its codes.
        at = tl.minimum(at, UNITS - 1)
        unit = next_unit.to(tl.uint32, bitcast=WORDS)
        scale = 1.0 if ONCE else next_scale.to(tl.float32)
        later = tl.minimum(at + BLOCK_U, UNITS - 1)
        next_unit = tl.load(units_ptr + row * UNITS + later)
        next_scale = 1.0 if ONCE else tl.load(scale_ptr + row * GROUPS + later * CODES // GROUP)
        if BITS == 8:
            unit ^= 0x80808080
        # Joined, not broadcast: so the codes of a unit stay in its lane.
        for _ in tl.static_range(LOG_CODES):
            unit = tl.join(unit, unit)
        unit = tl.reshape(unit, [BLOCK_U, BLOCK_N, CODES]) >> above.to(tl.uint32)[None, None, :]
        code = (unit & mask).to(tl.float32, bitcast=True)
        if EXACT:
            code -= less
        sum_x = tl.sum(x, axis=1)[:, None]
        dot = tl.sum(code * (x * power)[:, None, :], axis=2) * 2.0**85
        acc += scale * (dot if EXACT else dot - sum_x * excess)
        if ZERO:
            zero = tl.load(zero_ptr + matrix * GROUPS + row * GROUPS + at * CODES // GROUP)
            acc += zero.to(tl.float32) * sum_x
    out = tl.sum(acc, axis=0)
    if ONCE:
        out *= tl.load(scale_ptr + n, inside, 0.0).to(tl.float32)
    tl.store(out_ptr + slot * N + first + n, out.to(out_ptr.dtype.element_ty), inside)


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
    codes = codes_of_unit(bits, group, qdata.storage_offset())
    block_n, block_u, warps = config(slots * N, K // codes)
    _launcher(x, matvec_kernel)[(triton.cdiv(N, block_n), slots)](
        x, qdata, scale, zero, experts, out,
        N=N,
        K=K,
        GROUP=group,
        X_STRIDE=0 if x.shape[0] == 1 else K,
        BITS=bits,
        OFFSET=offset,
        ZERO=zero is not None,
        EXPERTS=experts is not None,
        LOG_CODES=codes.bit_length() - 1,
        BLOCK_N=block_n,
        BLOCK_U=block_u,
        num_warps=warps,
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
        num_warps=_WARPS,
    )  # fmt: skip
    return out


def codes_of_unit(bits: int, group: int, offset: int = 0) -> int:
    """How many codes are loaded as one number: those of 32 bits if they always share a scale and the first byte, at
    `offset` in its memory, is aligned; else those of a byte."""
    word = 32 // bits
    return word if group % word == 0 and offset % 4 == 0 else 8 // bits


def config(rows: int, units: int) -> tuple[int, int, int]:
    """Rows and units of a program's tile, and its warps."""
    block_n, block_u, warps = next(tile for most, tile in _TILES.items() if most is None or rows <= most)
    return block_n, min(block_u, triton.next_power_of_2(units)), warps


def _launcher(x: Tensor, kernel: Any) -> Any:
    # A compiler hands in tensors of types of its own.
    return kernel if type(x) in (Tensor, torch.nn.Parameter) else wrap_triton(kernel)
