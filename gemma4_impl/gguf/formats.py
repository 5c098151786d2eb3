"""How each quantized GGUF block holds its codes and scales: integer shuffles on int64 words, eight bytes at a time.

Nibbles, bits and scales are stored in runs: one byte holds weight j of several runs of 16, 32 or 64 weights. Everything
here assumes a little-endian machine, as the format itself does."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from gemma4_impl.quant.tensor import QuantizedTensor


def empty(*shape: int, dtype: type = numpy.float32) -> Tensor:
    """Uninitialised, from numpy, which asks for huge pages: far fewer page faults than torch's own."""
    return torch.from_numpy(numpy.empty(shape, dtype))


def aligned(data: Tensor, nbytes: int) -> Tensor:
    """`data` if it can be viewed as integers of `nbytes` bytes, else a copy that can."""
    fits = data.is_contiguous() and not (data.storage_offset() | data.data_ptr()) % nbytes
    return data if fits else data.clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class Format:
    """The QuantizedTensor that a type's blocks are, exactly."""

    unpack: Callable[[Tensor, Tensor, Tensor, Tensor | None], None]
    """(blocks uint8 [B, nbytes], qdata [B, ...], scale [B, block / group], zero likewise or None): fills the last
    three. `blocks` are `aligned` to 8."""
    bits: int
    group: int
    offset: int = 0
    zero: bool = False

    def empty(self, *shape: int) -> QuantizedTensor:
        """Of weights [..., N, K]; uninitialised."""
        *lead, K = shape
        qdata = empty(*lead, K * self.bits // 8, dtype=numpy.uint8 if self.bits == 4 else numpy.int8)
        groups = (*lead, K // self.group)
        return QuantizedTensor(qdata, empty(*groups), empty(*groups) if self.zero else None, self.bits, self.offset)


def _word(*pattern: int) -> int:
    """The bytes, repeated to eight, as an int64."""
    return int.from_bytes(bytes(pattern) * (8 // len(pattern)), "little", signed=True)


_LOW4 = _word(0x0F)
_LOW6 = _word(0x3F)
_FIELDS = _word(0x33)
_FIRST, _SECOND = _word(0xFF, 0xFF, 0xFF, 0xFF, 0, 0, 0, 0), _word(0, 0, 0, 0, 0xFF, 0xFF, 0xFF, 0xFF)


def _field(blocks: Tensor, start: int, stop: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """Bytes start..stop of each block as `dtype` [B, n], a copy: read as the widest integers that the block allows."""
    sizes = blocks.shape[1] | start | stop
    wide = next(t for t in (torch.int64, torch.int32, torch.int16, torch.uint8) if not sizes % t.itemsize)
    part = blocks.view(wide)[:, start // wide.itemsize : stop // wide.itemsize]
    return part.clone(memory_format=torch.contiguous_format).view(dtype)


def _halves(blocks: Tensor, start: int, stop: int) -> Tensor:
    """float16 at bytes start..stop of each block, as float32 [B, n]."""
    return _field(blocks, start, stop, torch.float16).float()


def _runs(low: Tensor, high: Tensor, nbytes: int, out: Tensor | None = None) -> Tensor:
    """Runs of `nbytes` bytes of two equal int64 tensors, in turn."""
    out = torch.empty(2 * low.numel(), dtype=torch.int64) if out is None else out
    # complex128 is the widest item that can be moved.
    item = torch.int64 if nbytes % 16 else torch.complex128
    pairs = out.view(item).view(-1, 2, nbytes // item.itemsize)
    pairs[:, 0] = low.view(item).view(-1, nbytes // item.itemsize)
    pairs[:, 1] = high.view(item).view(-1, nbytes // item.itemsize)
    return out


def _nibbles(x: Tensor, run: int) -> Tensor:
    """Each byte's low nibble is a weight of a run of `run`, its high nibble one of the next run. In order, a byte each;
    changes x."""
    low = x & _LOW4
    x >>= 4
    x &= _LOW4
    return _runs(low, x, run)


def _pairs(x: Tensor, run: int, qdata: Tensor) -> None:
    """Like `_nibbles`, but two consecutive weights to a byte."""
    even = x.view(torch.int16).to(torch.uint8).view(torch.int64)
    x >>= 8
    odd = x.view(torch.int16).to(torch.uint8).view(torch.int64)
    # The high nibbles of the even bytes and the low ones of the odd bytes change places.
    swap = even >> 4
    swap ^= odd
    swap &= _LOW4
    odd ^= swap
    swap <<= 4
    even ^= swap
    _runs(even, odd, run // 2, qdata)


@functools.cache
def _quads(codebook: tuple[int, ...]) -> Tensor:
    """Four nibbles -> their four values, int8, in an int32 [65536]."""
    values = torch.tensor(codebook, dtype=torch.int8)
    nibbles = torch.arange(1 << 16)[:, None] >> torch.arange(0, 16, 4)
    return values[nibbles & 15].view(torch.int32).flatten()


def _look_up(x: Tensor, run: int, codebook: tuple[int, ...], qdata: Tensor) -> None:
    """Like `_nibbles`, but the values that they number."""
    pairs = torch.empty_like(x)
    _pairs(x, run, pairs)
    index = pairs.view(torch.uint16).flatten().to(torch.int32)
    torch.index_select(_quads(codebook), 0, index, out=qdata.view(torch.int32).flatten())


@functools.cache
def _spread(zero: int, one: int) -> Tensor:
    """A byte -> eight bytes, one for each of its bits: int64 [256]."""
    bits = (torch.arange(256)[:, None] >> torch.arange(8)) & 1
    return torch.where(bits == 1, one, zero).to(torch.uint8).view(torch.int64).flatten()


def _q4_0(blocks: Tensor, qdata: Tensor, scale: Tensor, zero: Tensor | None) -> None:
    scale.copy_(_halves(blocks, 0, 2))
    _pairs(_field(blocks, 2, 18), 16, qdata)


def _q4_1(blocks: Tensor, qdata: Tensor, scale: Tensor, zero: Tensor) -> None:
    scale[:, 0], zero[:, 0] = _halves(blocks, 0, 4).unbind(1)
    _pairs(_field(blocks, 4, 20), 16, qdata)


def _fifth_bits(blocks: Tensor, start: int, spread: Tensor, qdata: Tensor) -> None:
    bits = _field(blocks, start, start + 4, torch.uint8).flatten().to(torch.int32)
    codes = torch.index_select(spread, 0, bits, out=qdata.view(torch.int64).flatten())
    codes |= _nibbles(_field(blocks, start + 4, start + 20), 16).flatten()


def _q5_0(blocks: Tensor, qdata: Tensor, scale: Tensor, zero: Tensor | None) -> None:
    scale.copy_(_halves(blocks, 0, 2))
    # The fifth bit weighs 16, and 16 is subtracted: sign extension where it is absent.
    _fifth_bits(blocks, 2, _spread(0xF0, 0x00), qdata)


def _q5_1(blocks: Tensor, qdata: Tensor, scale: Tensor, zero: Tensor) -> None:
    scale[:, 0], zero[:, 0] = _halves(blocks, 0, 4).unbind(1)
    _fifth_bits(blocks, 4, _spread(0x00, 0x10), qdata)


def _q8_0(blocks: Tensor, qdata: Tensor, scale: Tensor, zero: Tensor | None) -> None:
    scale.copy_(_halves(blocks, 0, 2))
    qdata.view(torch.int16).copy_(blocks.view(torch.int16)[:, 1:])


def _two_bits(x: Tensor) -> Tensor:
    """Byte j of 32 holds weight j of four runs of 32, as K-quants have it; to nibbles, for `_pairs` by runs of 64."""
    x = x.view(-1, 2, 1, 4)
    out = torch.cat((x, x >> 2), 2)
    out &= _FIELDS
    return out


def _q2_k(blocks: Tensor, qdata: Tensor, scale: Tensor, zero: Tensor) -> None:
    d, dmin = _halves(blocks, 80, 84).split(1, dim=1)
    scales = _field(blocks, 0, 16)
    torch.mul((scales & _LOW4).view(torch.uint8).float(), d, out=scale)
    scales >>= 4
    scales &= _LOW4
    torch.mul(scales.view(torch.uint8).float(), dmin.neg_(), out=zero)
    _pairs(_two_bits(_field(blocks, 16, 80)), 64, qdata)


def _q3_k(blocks: Tensor, qdata: Tensor, scale: Tensor, zero: Tensor | None) -> None:
    low, high = _field(blocks, 96, 104)[:, 0], _field(blocks, 104, 108, torch.int32)[:, 0].to(torch.int64)
    # Scale 4i + j: nibble i // 2 of byte 4 (i % 2) + j of `low`, and bits 2i, 2i + 1 of byte j of `high`.
    high = torch.stack(((high << 4 & _FIRST) | (high << 34 & _SECOND), (high & _FIRST) | (high << 30 & _SECOND)), 1)
    scales = torch.stack((low & _LOW4, low >> 4 & _LOW4), 1)
    scales |= high & _word(0x30)
    torch.mul(scales.view(torch.uint8).float().sub_(32), _halves(blocks, 108, 110), out=scale)
    # Bit i of byte j of the mask is the third bit of weight j of run i; to bits 2 (runs 0, 1) and 6 (runs 2, 3).
    mask = _field(blocks, 0, 32)
    mask = torch.stack((mask, mask >> 4), 1)
    low, high = _word(0x04), _word(0x40)
    codes = _two_bits(_field(blocks, 32, 96))
    codes[:, :, 0] |= (mask << 2 & low) | (mask << 4 & high)
    codes[:, :, 1] |= (mask << 1 & low) | (mask << 3 & high)
    _pairs(codes, 64, qdata)


def _k_scales(blocks: Tensor, scale: Tensor, zero: Tensor) -> None:
    """The header that Q4_K and Q5_K share: d and dmin in float16, and 6 bits each of eight scales and eight minima."""
    d, dmin = _halves(blocks, 0, 4).split(1, dim=1)
    first, second = _field(blocks, 0, 16).unbind(1)
    # Bytes 4-7: scales 0-3, and above them two bits of scales 4-7; bytes 8-11: so for minima; bytes 12-15: the rest.
    scales = (first >> 32 & _FIRST & _LOW6) | (second & _SECOND & _LOW4) | (first >> 2 & _SECOND & _word(0x30))
    torch.mul(scales.view(torch.uint8).view(-1, 8).float(), d, out=scale)
    minima = (second & _FIRST & _LOW6) | (second >> 4 & _SECOND & _LOW4) | (second << 30 & _SECOND & _word(0x30))
    torch.mul(minima.view(torch.uint8).view(-1, 8).float(), dmin.neg(), out=zero)


def _q4_k(blocks: Tensor, qdata: Tensor, scale: Tensor, zero: Tensor) -> None:
    _k_scales(blocks, scale, zero)
    _pairs(_field(blocks, 16, 144), 32, qdata)


def _q5_k(blocks: Tensor, qdata: Tensor, scale: Tensor, zero: Tensor) -> None:
    _k_scales(blocks, scale, zero)
    # Bit i of byte j is the fifth bit of weight j of run i.
    bits = _field(blocks, 16, 48)
    codes = qdata.view(torch.int64).view(-1, 8, 4)
    torch.stack([bits << 4 - i if i < 4 else bits >> i - 4 for i in range(8)], 1, out=codes)
    codes &= _word(0x10)
    codes |= _nibbles(_field(blocks, 48, 176), 32).view_as(codes)


def _q6_k(blocks: Tensor, qdata: Tensor, scale: Tensor, zero: Tensor | None) -> None:
    torch.mul(_field(blocks, 192, 208, torch.int8).float(), _halves(blocks, 208, 210), out=scale)
    # Bits 2i, 2i + 1 of byte j are the upper bits of weight j of run i.
    bits = _field(blocks, 128, 192).view(-1, 2, 4)
    codes = qdata.view(torch.int64).view(-1, 2, 4, 4)
    torch.stack((bits << 4, bits << 2, bits, bits >> 2), 2, out=codes)
    codes &= _word(0x30)
    codes |= _nibbles(_field(blocks, 0, 128), 64).view_as(codes)
    # Subtracts 32 from each byte without a borrow from its neighbour.
    codes += _word(0x60)
    codes ^= _word(0x80)


IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""What the 16 codes of IQ4_NL and IQ4_XS stand for."""
FP4_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""Twice what the 16 codes of MXFP4 stand for; -0 is 0, as ggml has it."""


def _iq4_nl(blocks: Tensor, qdata: Tensor, scale: Tensor, zero: Tensor | None) -> None:
    scale.copy_(_halves(blocks, 0, 2))
    _look_up(_field(blocks, 2, 18), 16, IQ4_VALUES, qdata)


def _iq4_xs(blocks: Tensor, qdata: Tensor, scale: Tensor, zero: Tensor | None) -> None:
    header = _field(blocks, 0, 8)
    # Scale i: nibble i from byte 4 on, and above it bits 2i, 2i + 1 from byte 2 on.
    low = (header >> 32) >> torch.arange(0, 32, 4) & 15
    high = (header >> 16) >> torch.arange(0, 16, 2) & 3
    torch.mul((low | high << 4).sub_(32).float(), _halves(blocks, 0, 2), out=scale)
    _look_up(_field(blocks, 8, 136), 16, IQ4_VALUES, qdata)


@functools.cache
def _powers() -> Tensor:
    """2 ** (e - 128), float32 [256]: the scale of doubled values for each E8M0 byte. The first two are subnormal."""
    e = torch.arange(256, dtype=torch.int32)
    return torch.where(e < 2, 0x200000 << e.clamp(max=1), (e - 1) << 23).view(torch.float32)


def _mxfp4(blocks: Tensor, qdata: Tensor, scale: Tensor, zero: Tensor | None) -> None:
    torch.index_select(_powers(), 0, blocks[:, 0].to(torch.int32), out=scale.flatten())
    _look_up(_field(blocks, 1, 17), 16, FP4_VALUES, qdata)


FORMATS = {
    "Q4_0": Format(_q4_0, bits=4, group=32, offset=8),
    "Q4_1": Format(_q4_1, bits=4, group=32, zero=True),
    "Q5_0": Format(_q5_0, bits=8, group=32),
    "Q5_1": Format(_q5_1, bits=8, group=32, zero=True),
    "Q8_0": Format(_q8_0, bits=8, group=32),
    "Q2_K": Format(_q2_k, bits=4, group=16, zero=True),
    "Q3_K": Format(_q3_k, bits=4, group=16, offset=4),
    "Q4_K": Format(_q4_k, bits=4, group=32, zero=True),
    "Q5_K": Format(_q5_k, bits=8, group=32, zero=True),
    "Q6_K": Format(_q6_k, bits=8, group=16),
    "IQ4_NL": Format(_iq4_nl, bits=8, group=32),
    "IQ4_XS": Format(_iq4_xs, bits=8, group=32),
    "MXFP4": Format(_mxfp4, bits=8, group=32),
}
