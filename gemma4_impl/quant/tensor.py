"""One quantized weight, whatever file it came from: integer codes, and a scale and a zero for each group of a row."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

_BLOCK = 1 << 20


@dataclass(frozen=True)
class QuantizedTensor:
    """w[..., n, k] = scale[..., n, k // G] * (q[..., n, k] - offset) + zero[..., n, k // G], in float32.

    Checked when made: raises ValueError for shapes or dtypes that contradict each other."""

    qdata: Tensor
    """bits 4: uint8 [..., N, K / 2], codes 0..15, even k in the low nibble; bits 8: int8 [..., N, K]."""
    scale: Tensor
    """[..., N, K / G], any float dtype."""
    zero: Tensor | None
    """Like `scale`; None is 0."""
    bits: int
    offset: int = 0
    """Subtracted from a code, exactly: 8 makes 4-bit codes signed."""

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"bits = {self.bits}: must be 4 or 8")
        if self.qdata.dtype != (torch.uint8 if self.bits == 4 else torch.int8) or self.qdata.dim() < 2:
            raise ValueError(f"qdata is {self.qdata.dtype} {list(self.qdata.shape)}; wrong for {self.bits} bits")
        groups = self.scale.shape[-1] if self.scale.dim() else 0
        if self.scale.shape[:-1] != self.qdata.shape[:-1] or not groups or self.shape[-1] % groups:
            raise ValueError(f"scale {list(self.scale.shape)} does not divide the rows of {list(self.shape)}")
        if not self.scale.is_floating_point():
            raise ValueError(f"scale is {self.scale.dtype}; must be floating point")
        if self.zero is not None and (self.zero.shape, self.zero.dtype) != (self.scale.shape, self.scale.dtype):
            raise ValueError(f"zero is {self.zero.dtype} {list(self.zero.shape)}; must be like scale")

    @property
    def shape(self) -> torch.Size:
        """[..., N, K]."""
        return torch.Size((*self.qdata.shape[:-1], self.qdata.shape[-1] * (8 // self.bits)))

    @property
    def group_size(self) -> int:
        return self.shape[-1] // self.scale.shape[-1]

    @property
    def device(self) -> torch.device:
        return self.qdata.device

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.qdata, self.scale, self.zero) if t is not None)

    def __getitem__(self, index: int | slice | Tensor) -> "QuantizedTensor":
        """Entries of the first dim: rows of a matrix, experts of a stack. At least a matrix must remain."""
        zero = None if self.zero is None else self.zero[index]
        return replace(self, qdata=self.qdata[index], scale=self.scale[index], zero=zero)

    def to(self, device: torch.device | str) -> "QuantizedTensor":
        zero = None if self.zero is None else self.zero.to(device)
        return replace(self, qdata=self.qdata.to(device), scale=self.scale.to(device), zero=zero)

    def codes(self) -> Tensor:
        """The codes one by one, before `offset`: uint8 (4 bits) or int8 (8 bits) [..., N, K]."""
        if self.bits == 8:
            return self.qdata
        pairs = self.qdata.to(torch.int16, memory_format=torch.contiguous_format)
        pairs |= pairs << 4
        pairs &= 0x0F0F
        return pairs.view(torch.uint8)

    def dequantize(self, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
        """[..., N, K], computed in float32 (float64 for that) and rounded to `dtype` once; block by block, so that
        nothing but the result is large. `out`, if given, is contiguous, and its dtype is the one that counts."""
        if out is None:
            out = torch.empty(self.shape, dtype=dtype, device=self.device)
        flat, rows = out.view(-1, self.shape[-1]), self._flat()
        step = max(1, _BLOCK // self.shape[-1])
        for start in range(0, len(flat), step):
            rows[start : start + step]._dequantize_into(flat[start : start + step])
        return out

    def _flat(self) -> "QuantizedTensor":
        """All rows as one matrix."""
        zero = None if self.zero is None else self.zero.flatten(0, -2)
        return replace(self, qdata=self.qdata.flatten(0, -2), scale=self.scale.flatten(0, -2), zero=zero)

    def _dequantize_into(self, out: Tensor) -> None:
        # The product of a code and a scale of at most 16 bits is exact, so that adding the zero rounds once.
        compute = torch.float64 if out.dtype == torch.float64 else torch.float32
        w = out if out.dtype == compute else torch.empty_like(out, dtype=compute)
        w.copy_(self.codes())
        if self.offset:
            w -= self.offset
        groups = w.unflatten(-1, (-1, self.group_size))
        groups *= self.scale.to(compute)[..., None]
        if self.zero is not None:
            groups += self.zero.to(compute)[..., None]
        if w is not out:
            out.copy_(w)
