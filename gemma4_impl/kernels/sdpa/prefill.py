"""Attention of many queries on Hopper's tensor cores: checks tensors and launches prefill.cu."""

import ctypes
import math
from pathlib import Path

import torch
from torch import Tensor

from gemma4_impl.kernels.cuda import TensorMap, kernel
from gemma4_impl.kernels.sdpa.naive import check

SOURCE = Path(__file__).with_suffix(".cu")
HEAD_DIMS = (64, 128, 256, 512)
# What prefill.cu fixes: keys of a tile, query rows of a product, threads of a block and bytes of its shared memory.
_KEYS, _ROWS, _THREADS, _SHARED = 64, 64, 512, 232_448
_NO_WINDOW = 2**30


class _Arguments(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("q_positions", "ends", "k_positions", "ranges")),
        *((name, ctypes.c_int64) for name in ("q_stride", "end_stride")),
        ("scale", ctypes.c_float),
        *(
            (name, ctypes.c_int32)
            for name in ("batch", "heads", "kv_heads", "queries", "keys", "tiles", "window", "head_step", "row_step")
        ),
    )


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
) -> Tensor:
    """`naive.sdpa` on a Hopper GPU. Without positions the keys are contiguous and the queries are their last T.

    Args:
        q: bfloat16 [B, N, T, H], H one of `HEAD_DIMS`. k, v: bfloat16 [B, K, S, H]. Strides are free but for the last,
            which is 1, and must be multiples of 16 bytes.
        q_positions, ends: int64 [B, T]. k_positions: int64 [B, S].
        out: where to write, like q; a view of [B, T, N, H] if absent.
    Returns out. Raises ValueError for what does not fit."""
    B, N, T, H = q.shape
    K, S = k.shape[1:3]
    check(q, k, v, q_positions, k_positions, ends)
    if q.dtype != torch.bfloat16 or H not in HEAD_DIMS:
        raise ValueError(f"head dim {H} in {q.dtype}: the kernel takes bfloat16 and {HEAD_DIMS}")
    if (q_positions is None) != (k_positions is None) or (q_positions is None and ends is not None):
        raise ValueError("q_positions and k_positions go together, and ends need both")
    if q_positions is None and S < T:
        raise ValueError(f"{T} queries at the end of {S} keys")
    if not scale > 0 or (window is not None and window < 1):
        raise ValueError(f"scale = {scale} and window = {window} must be positive")
    if out is None:
        out = q.new_empty(B, T, N, H).transpose(1, 2)
    elif out.shape != q.shape or out.dtype != q.dtype:
        raise ValueError(f"out must be {q.dtype} {tuple(q.shape)}, got {out.dtype} {tuple(out.shape)}")
    if not out.numel() or not S:
        return out.zero_()
    window = _NO_WINDOW if window is None else min(window, _NO_WINDOW)

    # A block computes `parts` times 64 rows: heads that share a kv head if they pair up, else more rows of one head.
    parts = 1 if H == 512 else 2
    together = N // K % parts == 0
    args = _Arguments(
        scale=scale * math.log2(math.e),
        batch=B,
        heads=N,
        kv_heads=K,
        queries=T,
        keys=S,
        tiles=-(-S // _KEYS),
        window=window,
        head_step=together,
        row_step=0 if together else _ROWS,
    )
    defines = {"HEAD_DIM": H, "POSITIONS": int(q_positions is not None)}
    if q_positions is not None:
        q_positions, ends = _rows(q_positions), None if ends is None else _rows(ends)
        keys, ranges = _key_ranges(_rows(k_positions), args.tiles, defines)
        args.q_positions, args.q_stride = q_positions.data_ptr(), q_positions.stride(0)
        args.k_positions, args.ranges = keys.data_ptr(), ranges.data_ptr()
        if ends is not None:
            args.ends, args.end_stride = ends.data_ptr(), ends.stride(0)
    maps = [
        TensorMap(boxes(q), (1, 1, H // 64, _ROWS, 64)),
        TensorMap(boxes(k), (1, 1, min(H, 128) // 64, _KEYS, 64)),
        TensorMap(boxes(v), (1, 1, H // 64, min(64, 8192 // H), 64)),
        TensorMap(boxes(out), (1, 1, min(H, 256) // 64, _ROWS, 64)),
    ]
    rows = _ROWS if together else _ROWS * parts
    blocks = -(-T // rows) * B * N // (parts if together else 1)
    kernel(SOURCE, "attend", defines)(blocks, _THREADS, [*maps, args], shared=_SHARED)
    return out


def _key_ranges(positions: Tensor, tiles: int, defines: dict[str, int]) -> tuple[Tensor, Tensor]:
    """Positions as int32 [B, tiles * 64] and int32 [B, tiles, 3]: the range of each tile and whether it is full."""
    B, S = positions.shape
    keys = torch.empty(B, tiles * _KEYS, dtype=torch.int32, device=positions.device)
    ranges = torch.empty(B, tiles, 3, dtype=torch.int32, device=positions.device)
    args = [positions, ctypes.c_int64(positions.stride(0)), S, tiles, keys, ranges]
    kernel(SOURCE, "key_ranges", defines)((-(-tiles // 4), B), 128, args)
    return keys, ranges


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def boxes(x: Tensor) -> Tensor:
    """[B, heads, L, H] -> [B, heads, H / 64, L, 64], the order in which the copy engine lays a box out."""
    return x.unflatten(3, (-1, 64)).transpose(2, 3)
