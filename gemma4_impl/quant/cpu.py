"""Packing for the CPU: torch's int4 and int8 weight-only kernels in bfloat16, which are vectorized for AVX2 and AVX512.

The int4 kernel multiplies with scale * (code - 8) + zero, computed in float32 from a bfloat16 scale and zero for each
group of 32, 64, 128 or 256 weights of a row. Eight-bit codes with a scale for each group run on it too: a group of G
codes becomes one of 2 G nibbles, the high ones and then the low ones, which are multiplied with 16 x and with x. That
is exact, and a code still takes a byte. In other dtypes both kernels are slower than dequantizing."""

import functools
import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from gemma4_impl.quant.packed import BLOCK, DequantizedWeight, PackedWeight
from gemma4_impl.quant.tensor import QuantizedTensor

_GROUPS = (256, 128, 64, 32)
_HALVES = 136
"""16 h + l - 136 = 16 (h - 8) + (l - 8): what the nibbles h and l of a code are to the kernel."""


def pack(weight: QuantizedTensor, dtype: torch.dtype) -> PackedWeight:
    """The fastest form for a weight that is on the CPU. Memory: the result and a few MB."""
    N, K = weight.shape[-2:]
    # The kernels read past the end of rows that are not a multiple of 16, and check nothing.
    if dtype != torch.bfloat16 or K % 16 or _block_rows() is None:
        return DequantizedWeight(weight, dtype)
    if weight.bits == 8 and weight.group_size == K and weight.zero is None and weight.offset == 0:
        return Int8Weight(weight, dtype)
    if N % 16 == 0 and _units(weight):
        return Int4Weight(weight, dtype)
    return DequantizedWeight(weight, dtype)


class _KernelWeight(PackedWeight):
    """Runs on its kernel. In another dtype, on another device, or for so many rows that a dense product wins back what
    it costs, the weight is dequantized block by block instead."""

    most_rows: int
    """Between where this is measured with AMX (two thirds of it) and with AVX512 alone (four thirds)."""

    def linear(self, x: Tensor, expert: int | None = None) -> Tensor:
        K = self.shape[-1]
        if x.dtype != torch.bfloat16 or not x.is_cpu or x.numel() > self.most_rows * K:
            return super().linear(x, expert)
        return self._multiply(x.reshape(-1, K).contiguous(), expert).view(*x.shape[:-1], self.shape[-2])

    def _multiply(self, x: Tensor, expert: int | None) -> Tensor:
        """bfloat16 [M, K] -> [M, N]."""
        raise NotImplementedError


class Int8Weight(_KernelWeight):
    """Eight-bit codes as they are, and one scale a row, rounded to bfloat16."""

    kernel, most_rows = "int8pack", 40

    def __init__(self, weight: QuantizedTensor, dtype: torch.dtype):
        super().__init__(weight.shape, dtype, weight.device)
        self.register_buffer("qdata", _aligned(weight.qdata))
        self.register_buffer("scale", weight.scale[..., 0].to(torch.bfloat16))

    def _multiply(self, x: Tensor, expert: int | None) -> Tensor:
        return torch._weight_int8pack_mm(_aligned(x), *self._matrix(expert))

    def blocks(self, dtype: torch.dtype, expert: int | None = None) -> Iterator[Tensor]:
        qdata, scale = self._matrix(expert)
        step = max(1, BLOCK // self.shape[-1])
        for start in range(0, len(qdata), step):
            rows = slice(start, start + step)
            yield qdata[rows].to(_wide(dtype)).mul_(scale[rows, None]).to(dtype)

    def _matrix(self, expert: int | None) -> tuple[Tensor, Tensor]:
        return (self.qdata, self.scale) if expert is None else (self.qdata[expert], self.scale[expert])


def _aligned(tensor: Tensor) -> Tensor:
    """Contiguous, at a multiple of 64 bytes: the int8 kernel faults on others, and a mapped file has them anywhere."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 64 else tensor


class Int4Weight(_KernelWeight):
    """Nibbles in the kernel's own order, and a scale and a zero for each group of them, rounded to bfloat16.

    A group that is too long for the kernel is cut up. The offset is folded into the zero, in float32."""

    kernel = "int4pack"

    def __init__(self, weight: QuantizedTensor, dtype: torch.dtype):
        super().__init__(weight.shape, dtype, weight.device)
        *lead, N, K = weight.shape
        self.unit, self.split = _units(weight)
        self.most_rows = 48 if self.split else 80
        self.block_rows = _block_rows()
        E, nibbles = math.prod(lead), K * (1 + self.split)
        qdata = torch.empty(E, N, nibbles // 2, dtype=torch.uint8)
        folded = torch.empty(E, K // self.unit, N, 2, dtype=torch.bfloat16)
        rest = torch.empty_like(folded)
        for e, rows in itertools.product(range(E), self._slices()):
            part = weight[e][rows] if lead else weight[rows]
            codes, exact = (_split if self.split else _fold)(part, self.unit)
            folded[e, :, rows] = rounded(exact) if weight.zero is None else exact
            rest[e, :, rows] = exact - folded[e, :, rows]
            _interleave(codes, self.block_rows, qdata[e, rows])
        self.register_buffer("qdata", qdata.view(*lead, *qdata.shape[1:]))
        self.register_buffer("scale_and_zero", folded.view(*lead, *folded.shape[1:]))
        # What bfloat16 leaves of a file's scales and zeros. Where there are zeros, which are large beside the weights,
        # it goes through the kernel too; and dequantizing is exact to 16 bits.
        self.register_buffer("rest", rest.view(*lead, *rest.shape[1:]) if rest.any() else None)
        self.twice = self.rest is not None and weight.zero is not None

    def _slices(self) -> Iterator[slice]:
        """All rows, some at a time: full blocks of the kernel's, then what is left."""
        N, K = self.shape[-2:]
        full = N - N % self.block_rows
        step = max(1, BLOCK // 4 // K // self.block_rows) * self.block_rows
        for start, stop in itertools.pairwise([*range(0, full, step), full, N]):
            if start < stop:
                yield slice(start, stop)

    def _multiply(self, x: Tensor, expert: int | None) -> Tensor:
        group = self.unit
        if self.split:
            group *= 2
            x = x.view(len(x), self.shape[-1] // self.unit, 1, self.unit)
            x = torch.cat((x * 16, x), dim=2).flatten(1)
        qdata, scale_and_zero, rest = self._matrix(expert)
        y = torch._weight_int4pack_mm_for_cpu(x, qdata, group, scale_and_zero)
        return y if not self.twice else y.add_(torch._weight_int4pack_mm_for_cpu(x, qdata, group, rest))

    def blocks(self, dtype: torch.dtype, expert: int | None = None) -> Iterator[Tensor]:
        return self._blocks(dtype, expert, exact=True)

    def represented(self, expert: int | None = None) -> Iterator[Tensor]:
        return self._blocks(torch.float32, expert, exact=self.twice)

    def _blocks(self, dtype: torch.dtype, expert: int | None, exact: bool) -> Iterator[Tensor]:
        qdata, scale_and_zero, rest = self._matrix(expert)
        scale_and_zero = scale_and_zero.to(_wide(dtype))
        if exact and rest is not None:
            scale_and_zero += rest
        for rows in self._slices():
            for block in self._dequantized(qdata[rows], scale_and_zero[:, rows], dtype):
                yield block.T

    def _dequantized(self, qdata: Tensor, scale_and_zero: Tensor, dtype: torch.dtype) -> Tensor:
        """Full blocks of rows, or the rows after them -> [blocks, K, rows of a block]."""
        codes = _nibbles(qdata, self.block_rows)
        blocks, columns = codes.shape[0], codes.shape[-1]
        if self.split:
            high, low = codes.view(blocks, -1, 2, self.unit, columns).unbind(2)
            codes = high << 4 | low
        scale, zero = scale_and_zero.view(-1, 1, blocks, columns, 2).permute(4, 2, 0, 1, 3).contiguous()
        weight = codes.to(_wide(dtype)).view(blocks, -1, self.unit, columns)
        weight.sub_(_HALVES if self.split else 8).mul_(scale).add_(zero, alpha=17 if self.split else 1)
        return weight.to(dtype).view(blocks, -1, columns)

    def _matrix(self, expert: int | None) -> tuple[Tensor, Tensor, Tensor | None]:
        parts = self.qdata, self.scale_and_zero, self.rest
        return parts if expert is None else tuple(part if part is None else part[expert] for part in parts)


def _units(weight: QuantizedTensor) -> tuple[int, bool] | None:
    """How many weights shall share a scale, and whether codes are split into two nibbles; None if nothing fits."""
    whole = [group for group in _GROUPS if weight.group_size % group == 0]
    if weight.bits == 4 and whole:
        return whole[0], False
    halves = [group // 2 for group in _GROUPS if weight.group_size % (group // 2) == 0]
    return (halves[0], True) if halves else None


def _fold(weight: QuantizedTensor, unit: int) -> tuple[Tensor, Tensor]:
    """A matrix -> codes [N, K], and scales and zeros [K / unit, N, 2] that make them scale * (code - 8) + zero."""
    return weight.codes(), _scale_and_zero(weight, unit, 8 - weight.offset, 1)


def _split(weight: QuantizedTensor, unit: int) -> tuple[Tensor, Tensor]:
    """The same for eight bits, each `unit` of codes replaced by its high nibbles, then its low ones: [N, 2 K]."""
    codes = weight.codes().to(torch.int16)
    low, high = (int(code) for code in codes.aminmax())
    # Of the shifts that make codes bytes, the one that leaves the least to the zero, which is rounded.
    shift = min(max(_HALVES - weight.offset, -low), 255 - high)
    codes = (codes + shift).unflatten(-1, (-1, 1, unit))
    codes = torch.cat((codes >> 4, codes & 15), dim=-2).flatten(1)
    # A zero counts 17 times: with 16 x and with x.
    return codes.to(torch.uint8), _scale_and_zero(weight, unit, _HALVES - shift - weight.offset, 17)


def _scale_and_zero(weight: QuantizedTensor, unit: int, shift: int, times: int) -> Tensor:
    scale = weight.scale.to(torch.float32)
    zero = scale * shift if weight.zero is None else weight.zero.to(torch.float32) + scale * shift
    both = torch.stack((scale, zero / times), dim=-1)
    return both.repeat_interleave(weight.group_size // unit, dim=1).transpose(0, 1)


def rounded(x: Tensor) -> Tensor:
    """float32 [groups, N, 2] -> bfloat16, where what rounding a group takes or adds is made good in the row's next one.

    The scales of a file are no random numbers: a maximum that was bfloat16, divided by 127, rounds down more often than
    up, and a whole tensor would come out smaller by 3e-4."""
    out = x.to(torch.bfloat16)
    if torch.equal(out.float(), x):
        return out
    left = torch.zeros_like(x[0])
    for group, wanted in enumerate(x):
        left = left + wanted
        out[group] = left
        left = left - out[group]
    return out


def _interleave(codes: Tensor, block_rows: int, out: Tensor) -> None:
    """Nibbles [N, K] as bytes, full blocks of rows or fewer than one, in the kernel's order to uint8 [N, K / 2]."""
    N, K = codes.shape
    if N % block_rows == 0:
        low, high = codes.view(-1, 2, block_rows // 2, K).unbind(1)
    else:
        low, high = codes.view(-1, N // 2, 2, K).unbind(2)
    out.view(len(low), K, -1).copy_((low | high << 4).transpose(1, 2))


def _nibbles(qdata: Tensor, block_rows: int) -> Tensor:
    """The inverse of `_interleave`, but for the order of the dims: [blocks, K, rows of a block]."""
    N, half = qdata.shape
    if N % block_rows == 0:
        both = qdata.view(-1, 2 * half, block_rows // 2)
        return torch.cat((both & 15, both >> 4), dim=-1)
    both = qdata.view(1, 2 * half, N // 2)
    return torch.stack((both & 15, both >> 4), dim=-1).flatten(-2)


@functools.cache
def _block_rows() -> int | None:
    """How many rows the int4 kernel keeps together; None where the kernels are not vectorized, or want an order that
    is not `_interleave`'s, which packs ten times as fast as torch."""
    rows = {"AVX2": 32, "AVX512": 64}.get(torch.backends.cpu.get_cpu_capability())
    if rows is None:
        return None
    codes = (torch.arange(2 * rows * 32, dtype=torch.int32) * 37 >> 4 & 15).view(-1, 32)
    for part in (codes, codes[: rows - 16]):
        ours = torch.empty(len(part), 16, dtype=torch.uint8)
        _interleave(part.to(torch.uint8), rows, ours)
        if not torch.equal(ours, torch._convert_weight_to_int4pack_for_cpu(part, 1)):
            return None
    return rows


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
