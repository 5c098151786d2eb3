"""Launches few.cu: 2 to 16 tokens times packed weights; and many tokens, by way of dequantized slices and cuBLAS."""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from gemma4_impl.kernels import cuda
from gemma4_impl.kernels.int4_linear.tiles import Tiles
from gemma4_impl.quant.cuda import ROWS

SOURCE = Path(__file__).with_name("few.cu")
MOST = 16
BLOCKS, STAGES, X_STAGES, COPIERS, SETS = 12, 2, 4, 4, 2
"""Row blocks at a time, stages of the rings, and warps that fetch x, in sets that take turns."""
SIZES = {"BLOCKS": BLOCKS, "STAGES": STAGES, "X_STAGES": X_STAGES, "COPIERS": COPIERS, "SETS": SETS}
"""The same as macros of few.cu."""
_SLICE_BYTES = 48 << 20
"""Of dequantized weights at a time."""


class _Arguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint64) for name in ("weight", "x", "out", "partials")),
        *((name, ctypes.c_int32) for name in ("m", "n", "k", "columns", "row_blocks", "share", "longer")),
        ("zero", ctypes.c_uint32),
        ("aligned", ctypes.c_int32),
    ]


def few(weight: Tiles, x: Tensor, out: Tensor, overlap: bool = True) -> None:
    """x [M, K] times a matrix -> out [M, N], for M up to 16; all bfloat16 and contiguous. Calls on a device share a
    workspace: they must be on one stream at a time. Raises RuntimeError if the first of them is captured in a graph."""
    M = len(x)
    row_blocks, columns = weight.tiles.shape[-3:-1]
    units = -(-row_blocks // BLOCKS) * columns
    blocks = min(cuda.multiprocessors(x.device), units)
    wide = 1 if M <= 8 else 2
    stage = BLOCKS * (weight.tile_bytes + 8)
    x_stage = 8 * wide * 512 + 16
    arguments = _Arguments(
        weight=weight.tiles.data_ptr(),
        x=x.data_ptr(),
        out=out.data_ptr(),
        partials=workspace(x.device).data_ptr(),
        m=M,
        n=weight.N,
        k=weight.K,
        columns=columns,
        row_blocks=row_blocks,
        share=units // blocks,
        longer=units % blocks,
        aligned=weight.N % 4 == 0 and out.data_ptr() % 8 == 0,
    )
    function = cuda.kernel(SOURCE, "few", {**weight.defines, **SIZES, "WIDE": wide, "OFFSET": weight.offset})
    shared = STAGES * stage + X_STAGES * x_stage
    function(blocks, (BLOCKS + COPIERS) * 32, [arguments], shared=shared, overlap=overlap)


@functools.cache
def workspace(device: torch.device) -> Tensor:
    """Where blocks of threads leave sums for each other, int32; all -1 between calls. Kept, since graphs hold its
    address: 3 MB."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("products with 2 to 16 tokens share a workspace: multiply once before a graph is captured")
    return torch.full((cuda.multiprocessors(device), 2 * 2 * BLOCKS * 32 * 4), -1, dtype=torch.int32, device=device)


def dequantize(weight: Tiles, start: int, out: Tensor, stream: torch.cuda.Stream | None = None) -> None:
    """Rows from `start`, a multiple of 16, as many as `out` [rows, K] bfloat16 takes: scale * (code - offset) + zero in
    float32, rounded once. On the current stream, unless another is named."""
    columns = weight.tiles.shape[-2]
    function = cuda.kernel(SOURCE, "dequantize_rows", {**weight.defines, **SIZES, "WIDE": 1, "OFFSET": weight.offset})
    tiles = weight.tiles[start // ROWS :]
    args = [tiles, out, columns, len(out), weight.K]
    warps = 8
    function((-(-columns // warps), -(-len(out) // ROWS)), 32 * warps, args, stream=stream)


def many(weight: Tiles, x: Tensor, out: Tensor) -> None:
    """x [M, K] times a matrix -> out [M, N], by slices of rows: one is dequantized while cuBLAS takes another. Calls on
    a device share events, so that they must come from one thread."""
    step = _slice_rows(len(x), weight, cuda.multiprocessors(x.device))
    if step >= weight.N:
        dense = torch.empty(weight.N, weight.K, dtype=x.dtype, device=x.device)
        dequantize(weight, 0, dense)
        torch.mm(x, dense.T, out=out)
        return
    main, side = torch.cuda.current_stream(), _side_stream(x.device.index or 0)
    buffers = [torch.empty(step, weight.K, dtype=x.dtype, device=x.device) for _ in range(2)]
    made, read = _events(x.device.index or 0)
    main.record_event(read[0])
    side.wait_event(read[0])
    for number, start in enumerate(range(0, weight.N, step)):
        dense = buffers[number % 2][: min(step, weight.N - start)]
        if number > 1:
            side.wait_event(read[number % 2])
        dequantize(weight, start, dense, side)
        side.record_event(made[number % 2])
        main.wait_event(made[number % 2])
        torch.mm(x, dense.T, out=out[:, start : start + len(dense)])
        main.record_event(read[number % 2])


def _slice_rows(M: int, weight: Tiles, wave: int) -> int:
    """Rows of a slice: cuBLAS' tiles of 128 x 256 fill the GPU as often as fits the buffer; or once, if twice the
    buffer is enough for that: half of a GPU costs more than what the L2 does not hold."""
    rows_of_tiles = -(-M // 128)
    most, twice = (size // (weight.K * 2 * 256) for size in (_SLICE_BYTES, 2 * _SLICE_BYTES))
    filled = [n * wave // rows_of_tiles for n in range(1, 9)]
    fitting = [n for n in filled if 0 < n <= most] or [n for n in filled[:1] if 0 < n <= twice]
    return 256 * max(fitting, default=max(1, most))


@functools.cache
def _side_stream(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@functools.cache
def _events(device: int) -> tuple[list[torch.cuda.Event], list[torch.cuda.Event]]:
    """Of two buffers: it was written, and it was read."""
    return [torch.cuda.Event() for _ in range(2)], [torch.cuda.Event() for _ in range(2)]
