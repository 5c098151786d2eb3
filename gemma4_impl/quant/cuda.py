"""Packing for NVIDIA GPUs: the tiles that `gemma4_impl.kernels.int4_linear` multiplies with.

A tile is 16 rows x 256 columns of nibbles, in the order of the registers of the tensor cores' m16n8k16, and behind them
the bfloat16 scales (and zeros) of its groups. Eight-bit codes are two nibbles: for each 16 of them the high ones, which
are multiplied with 16 x, and then the low ones. Rows are padded to 16 and columns to 256, with scales of 0."""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma4_impl.quant.cpu import rounded
from gemma4_impl.quant.packed import BLOCK, DequantizedWeight, PackedWeight
from gemma4_impl.quant.tensor import QuantizedTensor

if TYPE_CHECKING:
    from gemma4_impl.kernels.int4_linear import Tiles

ROWS, COLUMNS = 16, 256
GATED_ROWS = 8
"""`gated` stacks so many rows of the gate, then as many of up, and so on: both end in the same registers."""


def pack(weight: QuantizedTensor, dtype: torch.dtype) -> PackedWeight:
    """The fastest form for a weight on an NVIDIA GPU. Memory: the result and a few MB."""
    from gemma4_impl.kernels import cuda

    if dtype != torch.bfloat16 or group_of(weight) is None or not cuda.available(weight.device.index or 0):
        return DequantizedWeight(weight, dtype)
    return CudaWeight(weight, dtype)


def group_of(weight: QuantizedTensor) -> int | None:
    """Nibbles that share a scale in the packed form: the largest of 128, 64, 32 that divides the weight's groups; None
    if none does, or the kernels cannot take it: an offset outside 0..15 (0..127 for 8 bits), an odd K."""
    K, split = weight.shape[-1], weight.bits == 8
    if K % 16 or not 0 <= weight.offset < (128 if split else 16):
        return None
    nibbles = weight.group_size * (2 if split else 1)
    return next((group for group in (128, 64, 32) if nibbles % group == 0), None)


class CudaWeight(PackedWeight):
    """[N, K] or a stack [E, N, K] as tiles, uint8 [..., N / 16, columns / 256, bytes]."""

    kernel = "int4tile"

    def __init__(self, weight: QuantizedTensor, dtype: torch.dtype, gated: QuantizedTensor | None = None):
        """With `gated`, `weight` is the gate and `gated` the up projection; the rows are those of both, 8 in turn.

        Raises ValueError for a weight that `group_of` refuses, or two that differ."""
        group = group_of(weight)
        if group is None:
            raise ValueError(
                f"{list(weight.shape)}, {weight.bits} bits in groups of {weight.group_size}: not for tiles"
            )
        parts = [weight] if gated is None else [weight, gated]
        if gated is not None and (_kind(gated) != _kind(weight) or weight.shape[-2] % GATED_ROWS):
            raise ValueError("gate and up must be quantized alike, with a multiple of 8 rows")
        *lead, N, K = weight.shape
        N *= len(parts)
        super().__init__(torch.Size((*lead, N, K)), dtype, weight.device)
        self.bits, self.offset, self.group, self.gated = weight.bits, weight.offset, group, gated is not None
        self.has_zero = weight.zero is not None
        self.register_buffer("tiles", self._empty(math.prod(lead)))
        for e in range(len(self.tiles)):
            self._fill(self.tiles[e], [part[e] if lead else part for part in parts])
        self.tiles = self.tiles if lead else self.tiles[0]
        self._scratch()

    @classmethod
    def stacked(cls, weights: Sequence[QuantizedTensor], dtype: torch.dtype) -> "CudaWeight":
        """Matrices with the same K as one, their rows one after the other. Raises ValueError for ones that differ, or
        have rows that are no multiple of 16 (but for the last)."""
        first = weights[0]
        if any(_kind(w) != _kind(first) for w in weights) or any(w.shape[-2] % ROWS for w in weights[:-1]):
            raise ValueError("stacked weights must be quantized alike, with a multiple of 16 rows")
        out = cls.__new__(cls)
        rows = sum(w.shape[-2] for w in weights)
        PackedWeight.__init__(out, torch.Size((rows, first.shape[-1])), dtype, first.device)
        out.bits, out.offset, out.group, out.gated = first.bits, first.offset, group_of(first), False
        if out.group is None:
            raise ValueError(f"{first.bits} bits in groups of {first.group_size}: not for tiles")
        out.has_zero = first.zero is not None
        out.register_buffer("tiles", out._empty(1)[0])
        start = 0
        for weight in weights:
            blocks = -(-weight.shape[-2] // ROWS)
            out._fill(out.tiles[start : start + blocks], [weight])
            start += blocks
        out._scratch()
        return out

    @property
    def split(self) -> bool:
        """Whether codes have eight bits and are kept as two nibbles."""
        return self.bits == 8

    @property
    def tile_bytes(self) -> int:
        scales = ROWS * (COLUMNS // self.group) * 2
        return ROWS * COLUMNS // 2 + scales * (1 + self.has_zero)

    def matrix(self, expert: int | None = None) -> "Tiles":
        """What the kernels take: the matrix, or number `expert` of a stack."""
        return self._tiles(self.tiles if expert is None else self.tiles[expert])

    def stack(self) -> "Tiles":
        """All matrices of a stack."""
        return self._tiles(self.tiles)

    def _tiles(self, tiles: Tensor) -> "Tiles":
        from gemma4_impl.kernels.int4_linear import Tiles

        N, K = self.shape[-2:]
        return Tiles(tiles, self.scratch, N, K, self.group, self.offset, self.has_zero, self.split)

    def linear(self, x: Tensor, expert: int | None = None) -> Tensor:
        from gemma4_impl.kernels.int4_linear import int4_linear

        if x.dtype != torch.bfloat16 or not x.is_cuda or self.dtype != torch.bfloat16:
            return super().linear(x, expert)
        return int4_linear(x, self, expert)

    def linear_experts(self, x: Tensor, index: Tensor) -> Tensor:
        """x [1, K], or [k, K], a row for each of index [k] -> [k, N]: times those matrices of a stack."""
        from gemma4_impl.kernels.int4_linear import experts_linear

        out = x.new_empty(len(index), self.shape[-2])
        experts_linear(self, x, index, out)
        return out

    def blocks(self, dtype: torch.dtype, expert: int | None = None) -> Iterator[Tensor]:
        tiles = self.tiles if expert is None else self.tiles[expert]
        step = max(1, BLOCK // (ROWS * self.shape[-1]))
        for start in range(0, len(tiles), step):
            rows = self._unpack(tiles[start : start + step], dtype)
            yield rows[: self.shape[-2] - start * ROWS]

    def _empty(self, matrices: int) -> Tensor:
        N, K = self.shape[-2:]
        columns = -(-K * (1 + self.split) // COLUMNS)
        return torch.empty(matrices, -(-N // ROWS), columns, self.tile_bytes, dtype=torch.uint8, device=self.device)

    def _scratch(self) -> None:
        # What blocks of threads tell each other: a count, and sums of row blocks that they share; all left 0.
        self.register_buffer(
            "scratch", torch.zeros(1024, 2 * ROWS + 1, dtype=torch.int32, device=self.device), persistent=False
        )

    def _fill(self, tiles: Tensor, parts: Sequence[QuantizedTensor]) -> None:
        """Packs a matrix, or gate and up, into tiles [row blocks, columns / 256, bytes], some rows at a time."""
        step = max(1, BLOCK // (ROWS * parts[0].shape[-1])) * ROWS // len(parts)
        for start in range(0, parts[0].shape[-2], step):
            block = [part[start : start + step] for part in parts]
            rows = len(block[0].qdata) * len(parts)
            first = start * len(parts) // ROWS
            codes, scales = zip(*(self._codes_and_scales(part) for part in block), strict=True)
            self._pack(tiles[first : first - (-rows // ROWS)], _interleaved(codes), _interleaved(scales))

    def _codes_and_scales(self, weight: QuantizedTensor) -> tuple[Tensor, Tensor]:
        """Bytes of two nibbles each [n, columns / 2], the even column's the low one; scales (and zeros) in bfloat16
        [n, 1 or 2, columns / group]."""
        columns = weight.shape[-1] * (1 + self.split)
        codes = weight.qdata
        if self.split:
            units = (codes ^ -128).view(torch.uint8).unflatten(-1, (-1, 16))
            nibbles = torch.cat((units >> 4, units & 15), dim=-1).flatten(1)
            codes = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
        both = [weight.scale] if weight.zero is None else [weight.scale, weight.zero]
        repeat = columns // self.group // weight.scale.shape[-1]
        scales = torch.stack([rounded(s.float().T[..., None])[..., 0].T for s in both], dim=1)
        return codes, scales.repeat_interleave(repeat, dim=-1)

    def _pack(self, tiles: Tensor, codes: Tensor, scales: Tensor) -> None:
        blocks, columns = tiles.shape[:2]
        codes = F.pad(codes, (0, columns * COLUMNS // 2 - codes.shape[1], 0, blocks * ROWS - len(codes)))
        scales = F.pad(
            scales, (0, columns * COLUMNS // self.group - scales.shape[2], 0, 0, 0, blocks * ROWS - len(scales))
        )
        # rows: h g (16 = 2 x 8); bytes of a tile's row: chunk half t i p (4 x 2 x 4 x 2 x 2), two nibbles q each
        low, high = codes.view(blocks, 2, 8, columns, 4, 2, 4, 2, 2).unbind(1)
        out = torch.stack((low & 15 | high << 4, low >> 4 | high & 0xF0))  # q block g column chunk half t i p
        size = ROWS * COLUMNS // 2
        order = out.permute(1, 3, 4, 2, 6, 5, 7, 0, 8)  # block column chunk g t half i q p
        tiles[..., :size] = order.reshape(blocks, columns, size)
        n = 2 if self.group == 32 else 1
        # rows h g, then scale or zero, then column, lane's part, pair -> block column which g part h pair
        order = scales.view(blocks, 2, 8, scales.shape[1], columns, -1, n).permute(0, 4, 3, 2, 5, 1, 6)
        tiles[..., size:] = order.reshape(blocks, columns, -1).view(torch.uint8)

    def _unpack(self, tiles: Tensor, dtype: torch.dtype) -> Tensor:
        """Tiles [row blocks, columns / 256, bytes] -> [rows, K]."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        blocks, columns = tiles.shape[:2]
        size = ROWS * COLUMNS // 2
        out = tiles[..., :size].view(blocks, columns, 4, 8, 4, 2, 2, 2, 2).permute(7, 0, 3, 1, 2, 5, 4, 6, 8)
        rows = torch.stack((out & 15, out >> 4))  # h q block g column chunk half t i p
        codes = rows.permute(2, 0, 3, 4, 5, 6, 7, 8, 9, 1).reshape(blocks * ROWS, columns * COLUMNS).to(wide)
        n = 2 if self.group == 32 else 1
        scales = tiles[..., size:].contiguous().view(torch.bfloat16)
        scales = scales.view(blocks, columns, 1 + self.has_zero, 8, -1, 2, n).permute(2, 0, 5, 3, 1, 4, 6)
        scales = scales.reshape(1 + self.has_zero, blocks * ROWS, -1).to(wide)
        if self.split:
            high, low = codes.unflatten(-1, (-1, 2, 16)).unbind(-2)
            codes = (high * 16 + low - 128).flatten(1)
        group = self.group // (1 + self.split)
        weight = (codes - self.offset).view(len(codes), -1, group) * scales[0, ..., None]
        if self.has_zero:
            weight += scales[1, ..., None]
        return weight.flatten(1)[:, : self.shape[-1]].to(dtype)


def _interleaved(parts: Sequence[Tensor]) -> Tensor:
    """One matrix as it is; of two, 8 rows of each in turn."""
    if len(parts) == 1:
        return parts[0]
    return torch.stack([part.unflatten(0, (-1, GATED_ROWS)) for part in parts], dim=1).flatten(0, 2)


def _kind(weight: QuantizedTensor) -> tuple:
    return weight.bits, weight.offset, weight.group_size, weight.zero is None, weight.shape[-1]
