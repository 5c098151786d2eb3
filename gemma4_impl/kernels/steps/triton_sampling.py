"""Drawing a token as Triton kernels: the best of V, or one of the k largest that top-p leaves; two launches each.

The k largest logits lie in the k groups with the largest maxima. So one kernel takes the maximum of each group, and one
block a row then chooses k groups or a few more, k of their logits, and one of these."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_TOP_K = 256
_BLOCK = 2048


@triton.jit
def _key(x, BITS: tl.constexpr):
    """Integers in the order of floats: -inf is above the lowest, NaN on top, both zeros the same."""
    x = x.to(tl.float32)
    bits = tl.where(x == 0, 0, x.to(tl.int32, bitcast=True))
    key = tl.where(x != x, 0x7F900000, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    # A bfloat16 is the upper half of a float32.
    return key >> (32 - BITS)


@triton.jit
def _has_distribution(top, BITS: tl.constexpr):
    """Whether the key of a row's maximum is neither that of NaN nor that of -inf."""
    return (top != 0x7F900000 >> (32 - BITS)) & (top != -2139095041 >> (32 - BITS))


@triton.jit
def _gumbel(state_ptr, draw, row, ids):
    """A Gumbel variate for each id, from the seed, the number of the draw, and the row."""
    zero = ids * 0
    low, high = (draw & 0xFFFFFFFF).to(tl.uint32).to(tl.int32, bitcast=True), (draw >> 32).to(tl.int32)
    random, _, _, _ = tl.philox(tl.load(state_ptr), ids, zero + row, zero + low, zero + high)
    u = tl.minimum((random.to(tl.float32) + 1.0) * 2.3283064365386963e-10, 0.99999994)
    # -log(1 - u): what decides are the smallest of them, which the series keeps exact.
    exponential = tl.where(u < 0.01, u * (1.0 + u * (0.5 + u * 0.33333334)), -tl.log(1.0 - u))
    return -tl.log(exponential)


@triton.jit
def _block_best_kernel(
    logits_ptr, best_ptr, state_ptr, stride, V, temperature, GUMBEL: tl.constexpr, BLOCK: tl.constexpr
):
    block, row = tl.program_id(0), tl.program_id(1)
    ids = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + row.to(tl.int64) * stride + ids, mask=ids < V, other=float("-inf")).to(tl.float32)
    if GUMBEL:
        x += temperature * _gumbel(state_ptr, tl.load(state_ptr + 1), row, ids)
    # Among equals the lowest id is best; what is past the end is below everything.
    key = tl.where(ids < V, _key(x, 32).to(tl.int64) << 32 | (0x7FFFFFFF - ids).to(tl.int64), -(1 << 63))
    tl.store(best_ptr + row * tl.num_programs(0) + block, tl.max(key, axis=0))


@triton.jit
def _best_kernel(best_ptr, out_ptr, state_ptr, blocks, GUMBEL: tl.constexpr, BLOCKS: tl.constexpr):
    row = tl.program_id(0)
    at = tl.arange(0, BLOCKS)
    best = tl.max(tl.load(best_ptr + row * blocks + at, mask=at < blocks, other=-(1 << 63)), axis=0)
    token = 0x7FFFFFFF - (best & 0x7FFFFFFF)
    tl.store(out_ptr + row, tl.where(_has_distribution((best >> 32).to(tl.int32), 32), token, -1))
    if GUMBEL and row == 0:
        tl.store(state_ptr + 1, tl.load(state_ptr + 1) + 1)


@triton.jit
def _group_max_kernel(
    logits_ptr,
    max_ptr,
    state_ptr,
    stride,
    V,
    groups,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
):
    block, row = tl.program_id(0), tl.program_id(1)
    group = block * GROUPS + tl.arange(0, GROUPS)
    ids = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(logits_ptr + row.to(tl.int64) * stride + ids, mask=ids < V, other=float("-inf"))
    key = tl.where(ids < V, _key(x, BITS), -(1 << (BITS - 1)))
    tl.store(max_ptr + row * groups + group, tl.max(key, axis=1), mask=group < groups)
    # The next kernel reads the number of the draw, this one does not: here it can move on.
    if (block == 0) & (row == 0):
        tl.store(state_ptr + 1, tl.load(state_ptr + 1) + 1)


@triton.jit
def _at_least(key, k, most, low, high):
    """A threshold that k .. `most` of `key` reach; if there is none, the k-th largest, which is also returned then as
    what more than `most` reach. k or more reach `low`, none is above `high`; four parts of what lies between are tried
    at a time, with four counts in one sum."""
    low, width, count = low.to(tl.int64), high.to(tl.int64) - low, most + 1
    while (count > most) & (width >= 0):
        step = width // 4 + 1
        counted = (key >= low.to(tl.int32)).to(tl.int64)
        counted += (key >= (low + step).to(tl.int32)).to(tl.int64) << 16
        counted += (key >= (low + 2 * step).to(tl.int32)).to(tl.int64) << 32
        counted += (key >= (low + 3 * step).to(tl.int32)).to(tl.int64) << 48
        counts = tl.sum(counted, axis=0)
        part = ((counts >> 16 & 0xFFFF) >= k).to(tl.int32)
        part += ((counts >> 32 & 0xFFFF) >= k).to(tl.int32) + ((counts >> 48) >= k).to(tl.int32)
        low += part * step
        count = (counts >> (16 * part) & 0xFFFF).to(tl.int32)
        width = tl.where(width > 0, step - 1, -1)
    return low.to(tl.int32), count


@triton.jit
def _places(key, k, most, low, high):
    """Which of `key` are the k largest, or up to `most` if that is as easy, earlier ones first among equals; their
    places in order, how many they are, and the threshold."""
    threshold, count = _at_least(key, k, most, low, high)
    above, equal = (key > threshold).to(tl.int32), (key == threshold).to(tl.int32)
    room = count
    if count > most:
        room = k - tl.sum(above, axis=0)
        count = k
    before = tl.cumsum(above | equal << 16, axis=0)
    chosen = (above > 0) | ((equal > 0) & ((before >> 16) <= room))
    return chosen, (before & 0xFFFF) + tl.minimum(before >> 16, room) - 1, count, threshold


@triton.jit(do_not_specialize=["stride", "V", "groups", "k"])
def _draw_kernel(
    logits_ptr,
    max_ptr,
    scratch_ptr,
    out_ptr,
    state_ptr,
    stride,
    V,
    groups,
    k,
    temperature,
    top_p,
    TOP_P: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    K: tl.constexpr,
    PART: tl.constexpr,
):
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * stride
    scratch_ptr += row * 3 * K
    lowest: tl.constexpr = -(1 << (BITS - 1))

    # 1. The groups with the largest maxima, k or a few more, in order
    group = tl.arange(0, GROUPS)
    key = tl.load(max_ptr + row * groups + group, mask=group < groups, other=lowest)
    top = tl.max(key, axis=0)
    bottom = tl.min(tl.where(group < groups, key, top), axis=0)
    chosen, place, count, threshold = _places(key, tl.minimum(k, groups), K, bottom, top)
    tl.store(scratch_ptr + place, group, mask=chosen)
    tl.debug_barrier()

    # 2. Their largest logits, likewise: if k groups have one at the threshold or above, so have k logits
    at = tl.arange(0, K * GROUP)
    inside = at < count * GROUP
    ids = tl.load(scratch_ptr + at // GROUP, mask=inside, other=0) * GROUP + at % GROUP
    inside = inside & (ids < V)
    x = tl.load(logits_ptr + ids, mask=inside, other=float("-inf")).to(tl.float32)
    key = tl.where(inside, _key(x, BITS), lowest)
    low = tl.where(k <= groups, threshold, tl.min(tl.where(inside, key, top), axis=0))
    chosen, place, count, threshold = _places(key, k, K, low, top)
    tl.store(scratch_ptr + K + place, ids, mask=chosen)
    tl.store(scratch_ptr + 2 * K + place, x.to(tl.int32, bitcast=True), mask=chosen)
    tl.debug_barrier()

    # 3. The k largest of them, and of these what top-p leaves: what is ahead has less than p of the probability
    at = tl.arange(0, K)
    ids = tl.load(scratch_ptr + K + at, mask=at < count, other=0)
    x = tl.load(scratch_ptr + 2 * K + at, mask=at < count, other=-0x800000).to(tl.float32, bitcast=True)
    largest = tl.max(x, axis=0)
    rank = tl.zeros([K], tl.int32)
    mass = tl.zeros([K], tl.float32)
    for start in range(0, K, PART):
        other_at = start + tl.arange(0, PART)
        other = tl.load(scratch_ptr + 2 * K + other_at, mask=other_at < count, other=-0x800000)
        other = other.to(tl.float32, bitcast=True)
        ahead = (other[None, :] > x[:, None]) | ((other[None, :] == x[:, None]) & (other_at[None, :] < at[:, None]))
        rank += tl.sum(ahead.to(tl.int32), axis=1)
        if TOP_P:
            weight = _weight(other, largest, temperature)
            mass += tl.sum(tl.where(ahead, weight[None, :], 0.0), axis=1)
    allowed = (at < count) & (rank < k)
    if TOP_P:
        total = tl.sum(tl.where(allowed, _weight(x, largest, temperature), 0.0), axis=0)
        allowed = allowed & ((mass < top_p * total) | (rank == 0))

    # 4. Gumbel-max: the largest of x / temperature + g is a draw from the softmax
    score = x + temperature * _gumbel(state_ptr, tl.load(state_ptr + 1) - 1, row, ids)
    best = tl.argmax(tl.where(allowed, score, float("-inf")), axis=0, tie_break_left=True)
    token = tl.sum(tl.where(at == best, ids, 0), axis=0).to(tl.int64)
    tl.store(out_ptr + row, tl.where(_has_distribution(top, BITS), token, -1))


@triton.jit
def _weight(x, largest, temperature):
    return tl.where(x == largest, 1.0, tl.exp((x - largest) / temperature))


def draw(logits: Tensor, temperature: float, state: Tensor) -> Tensor:
    """Any id, or the best one at temperature 0, which leaves the state alone."""
    B, V = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    out = torch.empty(B, dtype=torch.int64, device=logits.device)
    blocks, gumbel = triton.cdiv(V, _BLOCK), temperature > 0
    best = torch.empty(B, blocks, dtype=torch.int64, device=logits.device)
    _block_best_kernel[(blocks, B)](logits, best, state, logits.stride(0), V, temperature, gumbel, _BLOCK, num_warps=4)
    _best_kernel[(B,)](best, out, state, blocks, gumbel, triton.next_power_of_2(blocks), num_warps=4)
    return out


def draw_top_k(logits: Tensor, temperature: float, top_k: int, top_p: float | None, state: Tensor) -> Tensor:
    """One of the `top_k` <= MAX_TOP_K largest."""
    B, V = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    k = min(top_k, V)
    # With room for a few more than k, a threshold is soon found.
    K = min(triton.next_power_of_2(k + k // 4), MAX_TOP_K)
    # As many logits in the chosen groups as there are groups, or twice as many: the groups take more rounds to choose.
    group = max(8, 1 << math.ceil(math.log2(max(1, V / K)) / 2))
    groups, in_block = triton.cdiv(V, group), max(1, _BLOCK // group)
    maxima = torch.empty(B, groups, dtype=torch.int32, device=logits.device)
    scratch = torch.empty(B, 3, K, dtype=torch.int32, device=logits.device)
    out = torch.empty(B, dtype=torch.int64, device=logits.device)
    bits, stride = 16 if logits.dtype == torch.bfloat16 else 32, logits.stride(0)
    _group_max_kernel[(triton.cdiv(groups, in_block), B)](
        logits, maxima, state, stride, V, groups, bits, group, in_block, num_warps=4
    )
    _draw_kernel[(B,)](
        logits, maxima, scratch, out, state, stride, V, groups, k, temperature, top_p or 1.0,
        top_p is not None and top_p < 1, bits, group, triton.next_power_of_2(groups), K, min(K, 32), num_warps=16,
    )  # fmt: skip
    return out
