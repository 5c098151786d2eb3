"""Launches matvec.cu: one token times packed weights, with what comes before and after."""

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gemma4_impl.kernels import cuda
from gemma4_impl.kernels.int4_linear.tiles import Tiles

SOURCE = Path(__file__).with_name("matvec.cu")
WARPS, SPAN = 10, 2
"""Warps that multiply, and tiles that one takes at a time."""
LEAD = 32
"""Stages that a block of threads has not yet asked for when the next kernel may start."""
_SHARED, _SHARED_LONG, _ALONE = 108 << 10, 113 << 10, 116 << 10
"""Bytes of shared memory that leave room for the next kernel's block of threads, which loads its first tiles; where x
takes much of them, `_LONG` bytes or more; and that no two blocks of one kernel find."""
_LONG = 32 << 10
_MOST_TILES = 512
_ACTS = {None: 0, "gelu_mul": 1, "gelu": 2}
_MOST_NORMED = 8192


class _Arguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint64) for name in ("weight", "x", "out", "norm", "residual", "post_norm", "scalar")),
        *((name, ctypes.c_uint64) for name in ("residual_out", "times", "experts", "partials")),
        *((name, ctypes.c_float) for name in ("eps", "softcap", "less")),
        *((name, ctypes.c_int32) for name in ("n", "k", "tiles_per_block", "row_blocks", "slots", "x_per_slot")),
        *((name, ctypes.c_int32) for name in ("most_blocks", "most_parts", "stages")),
        *((name, ctypes.c_uint32) for name in ("per_tiles_per_block", "per_stages")),
        ("lead", ctypes.c_int32),
        ("so_far", ctypes.c_uint64),
        ("zero", ctypes.c_uint32),
    ]


@dataclass(frozen=True)
class AddNorm:
    """What is done to a branch's output h [1, K] first: r = (residual + rmsnorm(h) * post_norm) * scalar."""

    residual: Tensor
    """[1, K]."""
    post_norm: Tensor
    """[K]."""
    scalar: Tensor | None
    """[1], or None for 1."""
    out: Tensor
    """[1, K], takes r; not `residual` itself, which is still read."""


def matvec(
    weight: Tiles,
    x: Tensor,
    out: Tensor,
    *,
    norm: Tensor | None = None,
    eps: float = 1e-6,
    add: AddNorm | None = None,
    act: str | None = None,
    times: Tensor | None = None,
    softcap: float | None = None,
    experts: Tensor | None = None,
    alone: bool = False,
    overlap: bool = True,
) -> None:
    """See `fused_linear`, which checks; here `experts` [slots] int64 chooses matrices of a stack, and x is [1, K] or
    [slots, K]."""
    K = weight.K
    row_blocks, columns = weight.tiles.shape[-3:-1]
    slots = 1 if experts is None else len(experts)
    x_rows = x.numel() // K
    tiles = slots * row_blocks * columns
    wave, threads = cuda.multiprocessors(x.device), 32 * (WARPS + 2)
    blocks = min(wave * -(-tiles // (wave * _MOST_TILES)), slots * row_blocks)
    most_tiles = -(-tiles // blocks)
    most_blocks = most_tiles // columns + 2
    x_bytes = x_rows * columns * (256 * 2 + 8 * 4)
    most_parts = -(-most_tiles // SPAN) + most_blocks
    shared = x_bytes + (most_parts + 1) * 16 * 4 + (WARPS + 2) * 4 + most_blocks * 8 + 8
    stage = SPAN * weight.tile_bytes + 12
    room = _SHARED_LONG if x_bytes >= _LONG else _SHARED
    stages = max(2, min((room - shared) // stage, -(-most_tiles // SPAN)))
    defines = {
        **weight.defines,
        "NORM": int(norm is not None),
        "ADD": int(add is not None),
        "ACT": 3 if softcap is not None else _ACTS[act],
        "OUT_FLOAT": int(out.dtype == torch.float32),
        "EXPERTS": int(experts is not None),
        "WARPS": WARPS,
        "SPAN": SPAN,
        "HELD": -(-K // (8 * threads)) if norm is not None or add is not None else 1,
    }
    arguments = _Arguments(
        weight=weight.tiles.data_ptr(),
        x=x.data_ptr(),
        out=out.data_ptr(),
        norm=_pointer(norm),
        residual=0 if add is None else add.residual.data_ptr(),
        post_norm=0 if add is None else add.post_norm.data_ptr(),
        scalar=0 if add is None else _pointer(add.scalar),
        residual_out=0 if add is None else add.out.data_ptr(),
        times=_pointer(times),
        experts=_pointer(experts),
        partials=weight.scratch.data_ptr() + 4 * len(weight.scratch),
        eps=eps,
        softcap=softcap or 0.0,
        n=weight.N,
        k=K,
        tiles_per_block=columns,
        row_blocks=row_blocks,
        slots=slots,
        x_per_slot=int(x_rows > 1),
        most_blocks=most_blocks,
        most_parts=most_parts,
        stages=stages,
        per_tiles_per_block=-(-(1 << 32) // columns),
        per_stages=-(-(1 << 32) // stages),
        less=-weight.stored_offset,
        lead=LEAD,
        so_far=weight.scratch.data_ptr() + 4 * (len(weight.scratch) - 1) if blocks <= wave else 0,
    )
    function = cuda.kernel(SOURCE, "matvec", defines)
    function(blocks, threads, [arguments], shared=max(shared + stages * stage, _ALONE * alone), overlap=overlap)


def can_norm(K: int) -> bool:
    """Whether a row of K fits the registers in which it is normed."""
    return K % 8 == 0 and K <= _MOST_NORMED


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
