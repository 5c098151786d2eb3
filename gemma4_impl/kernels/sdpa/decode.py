"""Launches decode.cu: attention of a few new tokens to a cache on Hopper, alone or with what comes before it."""

import ctypes
import functools
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from gemma4_impl.kernels import cuda
from gemma4_impl.kernels.cuda import TensorMap
from gemma4_impl.kernels.sdpa.naive import check
from gemma4_impl.kernels.sdpa.prefill import boxes

SOURCE = Path(__file__).with_name("decode.cu")
HEAD_DIMS = (64, 128, 256, 512)
MOST_TOKENS, MOST_ROWS = 8, 64
_LOG2E = math.log2(math.e)
_TILE = 16
_SHORT, _FEW, _PARTS = 4096, 4, 12
"""Slots of caches, and kv heads, up to which heads of 512 take clusters of eight, so many a head at most."""
_SHARED, _RESERVED = 228 * 1024, 1024
"""Bytes of shared memory of a multiprocessor, and what each block takes of it beside its own."""


class _Arguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint64) for name in ("q", "k", "v", "out", "length", "q_positions", "k_positions")),
        *((name, ctypes.c_uint64) for name in ("q_norm", "k_norm", "inv_freq", "partial", "tickets")),
        *((name, ctypes.c_int64) for name in ("q_row", "q_head", "q_token", "kv_row", "kv_head", "k_position_row")),
        ("capacity_inverse", ctypes.c_uint64),
        *((name, ctypes.c_int32) for name in ("batch", "heads", "kv_heads", "group", "tokens", "capacity", "window")),
        *((name, ctypes.c_int32) for name in ("wide_length", "k_eq_v", "early")),
        *((name, ctypes.c_uint32) for name in ("tokens_inverse", "per_head", "per_head_inverse")),
        *((name, ctypes.c_float) for name in ("scale", "eps")),
    ]


@dataclass(frozen=True)
class Split:
    """How a launch is divided: `groups` warps a team, for 8 query rows each; teams a block, each with `slots` tiles of
    K or V in flight; blocks a cluster, clusters a launch."""

    groups: int
    teams: int
    slots: int
    cluster: int
    clusters: int

    def shared_bytes(self, head_dim: int, positions: bool) -> int:
        rows, pitch = 8 * self.groups, 2 * head_dim + 16
        slots = self.teams * self.slots
        sums = (8 * self.teams + 8 + 8 * self.cluster) * rows
        tiles = slots * (_TILE * 2 * head_dim + 16 + 4 * positions * self.groups * _TILE)
        return tiles + rows * pitch + sums + 16


def split_of(head_dim: int, rows: int, items: int, capacity: int, multiprocessors: int) -> Split:
    """The division for `rows` = G * T query rows of each of `items` = B * K kv heads and caches of `capacity` slots, on
    a GPU of so many multiprocessors."""
    groups = next(g for g in (1, 2, 4, 8) if rows <= 8 * g)
    teams = min(8 // groups, 8 if head_dim < 256 else 4)
    slots = {(512, 1): 3, (512, 2): 3, (512, 4): 5, (256, 1): 3}.get((head_dim, groups), max(4, groups))
    # The multiprocessors come in groups of 16 or 18, one perhaps of fewer: what is left over fills no large cluster.
    clustered = multiprocessors * 10 // 11
    if (head_dim, groups) == (256, 1) and items > clustered // 8:
        # Some multiprocessors get two blocks of clusters of eight: of this size the next launch's find room as well.
        teams, slots = 2, 4
    # Large clusters leave more multiprocessors without one, but fewer sums for global memory, which short caches feel.
    alike = head_dim < 512 or groups > 1
    short = not alike and capacity <= _SHORT and items <= _FEW
    for cluster in (8, 4, 2, 1) if alike or short else (4, 2, 1):
        split = Split(groups, teams, slots, cluster, 1)
        blocks = min(2, _SHARED // (split.shared_bytes(head_dim, True) + _RESERVED))
        clusters = (multiprocessors if cluster <= 2 else clustered) * blocks // cluster
        if items <= clusters:
            parts = min(clusters // items, _PARTS) if short else clusters // items
            return replace(split, clusters=parts * items)
    return replace(split, clusters=clusters)


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    length: Tensor | None,
    *,
    q_positions: Tensor | None = None,
    k_positions: Tensor | None = None,
    window: int | None = None,
    scale: float = 1.0,
    out: Tensor | None = None,
    overlap: bool = False,
    split: Split | None = None,
) -> Tensor:
    """`naive.sdpa` for T <= 8 queries of a cache, on a Hopper GPU; the time follows what `length` says, not C.

    Args:
        q: [B, N, T, H] bfloat16, H of 64, 128, 256 or 512, N / K * T <= 64.
        k, v: [B, K, C, H]; position p is in slot p % C, unless `k_positions` says otherwise.
        length: int32 or int64 [B], on the device: tokens that each row holds, the queries included. May be None if both
            positions are given.
        q_positions: int64 [B, T], -1 for padding; by default the last T of the row.
        k_positions: int64 [B, C], -1 where there is no key.
        out: [B, N, T, H], a transposed view of a contiguous [B, T, N, H].
        overlap: read positions, `length` and the cache while the kernel before this one still runs: as `decode_fused`,
            and the new tokens must be in the cache by then, too.
    Returns `out`. Its workspace is shared by all calls on a device, which must therefore be on one stream at a time.
    Raises ValueError for what it does not compute, RuntimeError if the first call of its size is captured."""
    B, N, T, H = q.shape
    K, C = k.shape[1], k.shape[2]
    check(q, k, v, q_positions, k_positions, None)
    _check(q, k, v, N // K * T)
    if T > MOST_TOKENS:
        raise ValueError(f"{T} queries a row: at most {MOST_TOKENS}")
    if length is not None or q_positions is None or k_positions is None:
        _check_lengths(length, "length", B)
    if window is not None and window < 1:
        raise ValueError(f"window = {window}: must be at least 1")
    if any(s % 8 for s in q.stride()[:3]) or q.stride(3) != 1 or q.data_ptr() % 16:
        raise ValueError(f"q's strides {q.stride()} must be multiples of 16 bytes, the last 1")
    if out is None:
        out = torch.empty(B, T, N, H, dtype=q.dtype, device=q.device).transpose(1, 2)
    elif out.shape != q.shape or out.dtype != q.dtype or not out.transpose(1, 2).is_contiguous():
        raise ValueError(f"out must be {q.dtype} {tuple(q.shape)}, a transposed view of a contiguous [B, T, N, H]")
    split = split or split_of(H, N // K * T, B * K, C, cuda.multiprocessors(q.device))
    arguments = _Arguments(
        q=q.data_ptr(),
        k=k.data_ptr(),
        v=v.data_ptr(),
        out=out.data_ptr(),
        length=_pointer(length),
        q_positions=_pointer(None if q_positions is None else q_positions.contiguous()),
        k_positions=_pointer(k_positions),
        q_row=q.stride(0),
        q_head=q.stride(1),
        q_token=q.stride(2),
        kv_row=k.stride(0),
        kv_head=k.stride(1),
        k_position_row=0 if k_positions is None else k_positions.stride(0),
        batch=B,
        heads=N,
        kv_heads=K,
        tokens=T,
        capacity=C,
        window=window or 0,
        wide_length=length is not None and length.dtype == torch.long,
        early=overlap,
        scale=scale * _LOG2E,
    )
    positions = q_positions is not None or k_positions is not None
    _launch(arguments, split, k, v, positions, False, True)
    return out


def decode_fused(
    qkv: Tensor,
    q_norm: Tensor,
    k_norm: Tensor | None,
    inv_freq: Tensor,
    position: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    ring: int,
    window: int | None,
    k_eq_v: bool,
    eps: float,
    out: Tensor,
    overlap: bool = True,
    split: Split | None = None,
) -> Tensor:
    """One new token a row, from the projections to what o_proj takes: norms, rotation, cache write, attention.

    Args:
        qkv: bfloat16 [B, (N + 2K) H], the heads of q, k and v; with `k_eq_v` [B, (N + K) H], v being the un-normed k;
            without `k_norm` [B, N H].
        q_norm, k_norm: [H]; k_norm None for a KV-shared layer, which reads its producer's cache and writes nothing.
        inv_freq: float32 [H], `RotaryEmbedding.inv_freq`.
        position: int32 or int64 [B], the new token's.
        k_cache, v_cache: [B, K, C, H] with C >= ring; position p is in slot p % ring.
        out: [B, N H].
        overlap: start while the kernel before this one still runs. `position`, and in the caches all that earlier
            tokens (and, for a KV-shared layer, its producer) wrote, are read before that one has ended: they must have
            been written earlier, and every kernel in between must have called `grid_wait` before `grid_trigger`.
    Returns `out`. Shares `decode`'s workspace. Raises as `decode` does."""
    B, H = qkv.shape[0], q_norm.shape[0]
    K = k_cache.shape[1]
    extra = 0 if k_norm is None else K if k_eq_v else 2 * K
    N = qkv.shape[1] // H - extra
    if qkv.dim() != 2 or qkv.shape[1] % H or N < 1 or N % K or not qkv.is_contiguous() or qkv.dtype != torch.bfloat16:
        raise ValueError(f"qkv {qkv.dtype} {tuple(qkv.shape)} does not hold heads of {H} for {K} kv heads")
    for name, norm in {"q_norm": q_norm, "k_norm": k_norm}.items():
        if norm is not None and (norm.shape != (H,) or norm.dtype != torch.bfloat16 or not norm.is_contiguous()):
            raise ValueError(f"{name} must be bfloat16 [{H}]")
    if inv_freq.shape != (H,) or inv_freq.dtype != torch.float32 or not inv_freq.is_contiguous():
        raise ValueError(f"inv_freq must be float32 [{H}]")
    if k_cache.shape != v_cache.shape or k_cache.shape[::3] != (B, H) or not 1 <= ring <= k_cache.shape[2]:
        got = f"{tuple(k_cache.shape)} and {tuple(v_cache.shape)}"
        raise ValueError(f"caches {got} must be [{B}, K, C, {H}] with C >= ring = {ring}")
    if out.shape != (B, N * H) or out.dtype != torch.bfloat16 or not out.is_contiguous():
        raise ValueError(f"out must be bfloat16 [{B}, {N * H}]")
    _check_lengths(position, "position", B)
    _check(qkv.view(B, -1, 1, H), k_cache, v_cache, N // K)
    split = split or split_of(H, N // K, B * K, ring, cuda.multiprocessors(qkv.device))
    arguments = _Arguments(
        q=qkv.data_ptr(),
        k=k_cache.data_ptr(),
        v=v_cache.data_ptr(),
        out=out.data_ptr(),
        length=position.data_ptr(),
        q_norm=q_norm.data_ptr(),
        k_norm=_pointer(k_norm),
        inv_freq=inv_freq.data_ptr(),
        q_row=qkv.stride(0),
        kv_row=k_cache.stride(0),
        kv_head=k_cache.stride(1),
        batch=B,
        heads=N,
        kv_heads=K,
        tokens=1,
        capacity=ring,
        window=window or 0,
        wide_length=position.dtype == torch.long,
        k_eq_v=k_eq_v,
        early=True,
        scale=_LOG2E,
        eps=eps,
    )
    _launch(arguments, split, k_cache, v_cache, False, True, overlap)
    return out


def defines(split: Split, head_dim: int, positions: bool, fused: bool) -> dict[str, int]:
    """The macros of the instantiation."""
    return {
        "HEAD_DIM": head_dim,
        "GROUPS": split.groups,
        "TEAMS": split.teams,
        "SLOTS": split.slots,
        "CLUSTER": split.cluster,
        "POSITIONS": int(positions),
        "FUSED": int(fused),
    }


def inverses(tokens: int, capacity: int) -> tuple[int, int]:
    """What decode.cu divides by: row // tokens is row times the first, over 2^16, for rows below 2^16 / tokens; the low
    64 bits of x times the second, times `capacity`, over 2^64, are x % capacity for any x below 2^32."""
    return 2**16 // tokens + 1, (2**64 - 1) // capacity + 1 & 2**64 - 1


def _launch(
    arguments: _Arguments,
    split: Split,
    k: Tensor,
    v: Tensor,
    positions: bool,
    fused: bool,
    overlap: bool,
) -> None:
    head_dim = k.shape[3]
    arguments.group = arguments.heads // arguments.kv_heads
    arguments.tokens_inverse, arguments.capacity_inverse = inverses(arguments.tokens, arguments.capacity)
    if arguments.batch == 1:
        arguments.per_head = split.clusters // arguments.kv_heads
        arguments.per_head_inverse = -(-(2**32) // max(2, arguments.per_head))
    rows = arguments.group * arguments.tokens
    sums = 2 * split.clusters * rows * (head_dim + 2 * split.cluster)
    heads = arguments.batch * arguments.kv_heads
    partial, tickets = _workspace(k.device, _power_of_two(sums), _power_of_two(heads * 16))
    arguments.partial, arguments.tickets = partial.data_ptr(), tickets.data_ptr()
    box = (1, 1, head_dim // 64, _TILE, 64)
    cuda.kernel(SOURCE, "decode", defines(split, head_dim, positions, fused))(
        split.cluster * split.clusters,
        32 * split.groups * split.teams,
        [TensorMap(boxes(k), box), TensorMap(boxes(v), box), arguments],
        shared=split.shared_bytes(head_dim, positions),
        cluster=split.cluster,
        overlap=overlap,
    )


def _check(q: Tensor, k: Tensor, v: Tensor, rows: int) -> None:
    H = q.shape[3]
    if not q.is_cuda or q.dtype != torch.bfloat16 or k.dtype != torch.bfloat16 or v.dtype != torch.bfloat16:
        raise ValueError(f"needs bfloat16 on a GPU, got {q.dtype}, {k.dtype}, {v.dtype} on {q.device}")
    if H not in HEAD_DIMS or rows > MOST_ROWS:
        raise ValueError(
            f"head_dim {H} with {rows} query rows a kv head: needs one of {HEAD_DIMS}, at most {MOST_ROWS}"
        )
    if k.stride() != v.stride() or k.stride()[2:] != (H, 1) or (k.data_ptr() | v.data_ptr()) % 16:
        raise ValueError(f"a kv head's keys must lie one after another, got strides {k.stride()} and {v.stride()}")


def _check_lengths(length: Tensor | None, name: str, batch: int) -> None:
    if length is None or length.shape != (batch,) or length.dtype not in (torch.int32, torch.long):
        got = None if length is None else f"{length.dtype} {tuple(length.shape)}"
        raise ValueError(f"{name} must be int32 or int64 of shape {(batch,)}, got {got}")
    if not length.is_cuda or not length.is_contiguous():
        raise ValueError(f"{name} must be contiguous, on the GPU")


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


@functools.cache
def _workspace(device: torch.device, sums: int, tickets: int) -> tuple[Tensor, Tensor]:
    """Partial sums, and tickets that every launch leaves at 0; kept, since graphs hold their addresses."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("decode attention shares a workspace: call it once before a graph is captured")
    return (
        torch.empty(sums, dtype=torch.float32, device=device),
        torch.zeros(tickets, dtype=torch.int32, device=device),
    )
