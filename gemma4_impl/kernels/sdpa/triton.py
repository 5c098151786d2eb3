"""Attention in Triton, for any GPU that it knows: prefill with an online softmax, decode split over the keys."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.library import wrap_triton

from gemma4_impl.kernels import cuda
from gemma4_impl.kernels.sdpa.naive import check, empty_out
from gemma4_impl.kernels.sdpa.triton_kernels import combine_kernel, decode_kernel, prefill_kernel

LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class PrefillConfig:
    """Tile sizes: queries and keys at a time; v_parts programs share the columns of V, each computing all scores."""

    block_m: int
    block_n: int
    v_parts: int = 1
    num_warps: int = 4
    num_stages: int = 2


@dataclass(frozen=True)
class DecodeConfig:
    """Keys at a time, and programs that share the keys of all rows and kv heads, for each multiprocessor."""

    block_n: int
    waves: float = 1
    num_warps: int = 4
    num_stages: int = 2


def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    q_positions: Tensor | None = None,
    k_positions: Tensor | None = None,
    ends: Tensor | None = None,
    window: int | None = None,
    scale: float = 1.0,
    out: Tensor | None = None,
    config: PrefillConfig | None = None,
) -> Tensor:
    """`naive.sdpa` for many queries. q [B, N, T, H], k and v [B, K, S, H] of any strides -> [B, N, T, H].

    float16, bfloat16 or float32; H from 16. Without `q_positions` the queries are the last T of the S positions, and
    without `k_positions` key s is at position s, and no positions are read. Raises ValueError as `naive.sdpa` does."""
    B, N, T, H = q.shape
    _, K, S, _ = k.shape
    check(q, k, v, q_positions, k_positions, ends)
    _check_numbers(q, window, scale)
    if q_positions is None and T > S:
        raise ValueError(f"{T} queries cannot be the last of {S} keys; give q_positions")
    if out is None:
        out = empty_out(q)
    if 0 in (B, T, S):
        return out.zero_()
    c = config or prefill_config(H, q.dtype, q.device, k_positions is not None)
    blocks = triton.cdiv(T, c.block_m)
    _launcher(q, prefill_kernel)[(blocks * B * N * c.v_parts,)](
        q,
        k,
        v,
        out,
        q_positions,
        k_positions,
        ends,
        *q.stride(),
        *k.stride(),
        *v.stride(),
        *out.stride(),
        *_strides(q_positions),
        *_strides(k_positions),
        *_strides(ends),
        N // K,
        B,
        N,
        T,
        S,
        window or 0,
        scale * LOG2E,
        H=H,
        BLOCK_H=triton.next_power_of_2(H),
        BLOCK_M=c.block_m,
        BLOCK_N=c.block_n,
        V_PARTS=c.v_parts,
        HAS_Q_POSITIONS=q_positions is not None,
        HAS_K_POSITIONS=k_positions is not None,
        HAS_ENDS=ends is not None,
        WIDE=_wide(k, c.block_n) or _wide(v, c.block_n),
        PRECISION=_precision(q),
        num_warps=c.num_warps,
        num_stages=c.num_stages,
    )
    return out


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    length: Tensor | None = None,
    *,
    q_positions: Tensor | None = None,
    k_positions: Tensor | None = None,
    window: int | None = None,
    scale: float = 1.0,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
    config: DecodeConfig | None = None,
) -> Tensor:
    """`naive.sdpa` for a few queries, split over the keys. q [B, N, T, H], k and v [B, K, S, H] -> [B, N, T, H].

    A CUDA graph can capture it, and its time follows `length` rather than S.

    Args:
        length: int32 [B], on the device: tokens so far, of which the queries are the last; S by default. Position p
            is in slot p % S, unless `k_positions` says otherwise.
        q_positions: int64 [B, T], -1 for padding, instead of `length`; needs `k_positions`.
        k_positions: int64 [B, S], in any order, -1 where there is no key. All are read, but only the keys that some
            query sees.
        workspace: for partial results, float32; by default one that is kept for the device, stream and shape.
    Raises ValueError as `prefill` does."""
    B, N, T, H = q.shape
    _, K, S, _ = k.shape
    check(q, k, v, q_positions, k_positions, None)
    _check_numbers(q, window, scale)
    if length is not None and (length.shape != (B,) or length.dtype != torch.int32):
        raise ValueError(f"length must be int32 of shape {(B,)}, got {tuple(length.shape)} {length.dtype}")
    if q_positions is not None and (length is not None or k_positions is None):
        raise ValueError("q_positions stand in the place of length, and need k_positions")
    if out is None:
        out = empty_out(q)
    if 0 in (B, T, S):
        return out.zero_()
    rows = N // K * T
    c = config or decode_config(rows, H, q.dtype, q.device)
    splits = _splits(q, B * K, S, window, k_positions is not None, c)
    if workspace is None:
        workspace = _workspace(q, B * K * splits * rows * (H + 2))
    shared = {
        "T": T,
        "S": S,
        "window": window or 0,
        "splits": splits,
        "GROUP": N // K,
        "H": H,
        "BLOCK_N": c.block_n,
        "HAS_LENGTH": length is not None,
        "HAS_K_POSITIONS": k_positions is not None,
        "EARLY": _dependent_launch(q),
    }
    length_stride = 0 if length is None else length.stride(0)
    _launcher(q, decode_kernel)[(splits, K, B)](
        q,
        k,
        v,
        workspace,
        length,
        q_positions,
        k_positions,
        *q.stride(),
        *k.stride(),
        *v.stride(),
        length_stride,
        *_strides(q_positions),
        *_strides(k_positions),
        scale * LOG2E,
        **shared,
        HAS_Q_POSITIONS=q_positions is not None,
        BLOCK_H=triton.next_power_of_2(H),
        BLOCK_R=max(16, triton.next_power_of_2(rows)),
        WIDE=_wide(k, c.block_n) or _wide(v, c.block_n),
        PRECISION=_precision(q),
        num_warps=c.num_warps,
        num_stages=c.num_stages,
    )
    block_h = min(128, triton.next_power_of_2(H))
    _launcher(q, combine_kernel)[(rows, K * triton.cdiv(H, block_h), B)](
        workspace,
        out,
        length,
        *out.stride(),
        length_stride,
        **shared,
        BLOCK_H=block_h,
        BLOCK_S=min(64, triton.next_power_of_2(splits)),
        num_warps=4,
        **({"launch_pdl": True} if shared["EARLY"] else {}),
    )
    return out


def prefill_config(H: int, dtype: torch.dtype, device: torch.device, k_positions: bool) -> PrefillConfig:
    """The first of the tiles that were fastest on an H200 whose Q, K and V fit the device's shared memory."""
    width = triton.next_power_of_2(H) * dtype.itemsize
    for c in _PREFILL[min(512, max(128, width // 2)) if dtype.itemsize == 2 else None]:
        # With positions the compiler keeps one more tile of keys.
        keys = c.block_n * (c.num_stages * (1 + 1 / c.v_parts) + k_positions)
        if width * (c.block_m + keys) <= _shared_memory(device):
            return c
    return PrefillConfig(16, 16, num_warps=4, num_stages=1)


def decode_config(rows: int, H: int, dtype: torch.dtype, device: torch.device) -> DecodeConfig:
    """The same for decode, with `rows` query rows a kv head."""
    width = triton.next_power_of_2(H) * dtype.itemsize
    for c in _DECODE:
        # From 64 rows on, the queries lie in shared memory too, and all stages are filled.
        many = rows > 32
        keys = 2 * c.block_n * (c.num_stages if many else c.num_stages - 1)
        if width * (keys + (triton.next_power_of_2(rows) if many else 16)) <= _shared_memory(device):
            return c
    return DecodeConfig(16, num_warps=4, num_stages=1)


_PREFILL = {
    128: (PrefillConfig(128, 64, 1, 8, 3), PrefillConfig(64, 32, 1, 4, 2)),
    256: (PrefillConfig(128, 64, 1, 8, 2), PrefillConfig(64, 32, 1, 4, 3), PrefillConfig(64, 32, 1, 4, 2)),
    512: (
        PrefillConfig(128, 32, 2, 8, 2),
        PrefillConfig(64, 32, 1, 8, 2),
        PrefillConfig(64, 16, 1, 8, 2),
        PrefillConfig(32, 16, 1, 4, 2),
    ),
    # float32, without tensor cores.
    None: (PrefillConfig(32, 32, 1, 4, 1), PrefillConfig(32, 16, 1, 4, 1)),
}
_DECODE = (
    DecodeConfig(32, num_warps=4, num_stages=3),
    DecodeConfig(32, num_warps=4, num_stages=2),
    DecodeConfig(16, num_warps=4, num_stages=2),
)


def _splits(q: Tensor, heads: int, S: int, window: int | None, positions: bool, config: DecodeConfig) -> int:
    """Parts into which the keys of each of `heads` kv heads are cut: enough to fill the device."""
    wanted = max(1, int((cuda.multiprocessors(q.device) if q.is_cuda else 4) * config.waves) // heads)
    if _traced(q):
        # S may be a symbol; parts that have nothing to do end at once.
        return wanted
    keys = S if window is None or positions else min(S, window + 7)
    return min(wanted, triton.cdiv(keys, config.block_n) + 1)


def _check_numbers(q: Tensor, window: int | None, scale: float) -> None:
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"{q.dtype} is not computed here; use float16, bfloat16 or float32")
    if window is not None and window < 1:
        raise ValueError(f"window = {window}: must be at least 1")
    if not scale > 0:
        raise ValueError(f"scale = {scale}: must be positive")


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that a block may have; of a small GPU where there is none."""
    if device.type != "cuda":
        return 99 * 1024
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def _dependent_launch(q: Tensor) -> bool:
    """Whether the second kernel may be launched before the first has ended: Hopper and later, not while traced."""
    return not _traced(q) and q.is_cuda and torch.version.hip is None and _capability(q.device) >= (9, 0)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _traced(q: Tensor) -> bool:
    """Whether a compiler looks on: it hands in tensors of types of its own."""
    return type(q) not in (Tensor, torch.nn.Parameter)


def _launcher(q: Tensor, kernel: Any) -> Any:
    return wrap_triton(kernel) if _traced(q) else kernel


def _workspace(q: Tensor, size: int) -> Tensor:
    if _traced(q):
        return torch.empty(size, dtype=torch.float32, device=q.device)
    return _kept(size, q.device, torch.cuda.current_stream(q.device).cuda_stream if q.is_cuda else 0)


@functools.cache
def _kept(size: int, device: torch.device, stream: int) -> Tensor:
    return torch.empty(size, dtype=torch.float32, device=device)


def _strides(positions: Tensor | None) -> tuple[int, int]:
    return (0, 0) if positions is None else positions.stride()


def _wide(x: Tensor, rows: int) -> bool:
    """Whether offsets inside a tile of `rows` keys need 64 bits."""
    return rows * x.stride(2) + x.shape[3] * x.stride(3) >= 2**31


def _precision(q: Tensor) -> str:
    # tf32, the default for float32, is 1000 times less exact than float32.
    return "ieee" if q.dtype == torch.float32 else "tf32"
