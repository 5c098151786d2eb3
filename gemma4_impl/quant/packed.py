"""Weights in the form that a matrix product takes them in: what each form offers, and the one that runs anywhere."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemma4_impl.quant.tensor import QuantizedTensor

BLOCK = 1 << 20
"""Weights that are dequantized at a time."""


class PackedWeight(nn.Module):
    """A matrix [N, K], or a stack of them [E, N, K], to multiply inputs with; its tensors are buffers.

    `model.to(dtype)` changes what the model computes in, and leaves codes and scales as they are."""

    kernel: str
    """Names the way of computing that was chosen."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.shape = shape
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=device), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return self.like.dtype

    @property
    def device(self) -> torch.device:
        return self.like.device

    def linear(self, x: Tensor, expert: int | None = None) -> Tensor:
        """x [..., K] -> x @ W.T [..., N] in x's dtype; of a stack, W is the matrix number `expert`.

        Here one block of rows after the other, so that there never is a dense copy of the weight."""
        return torch.cat([F.linear(x, block) for block in self.blocks(x.dtype, expert)], dim=-1)

    def blocks(self, dtype: torch.dtype, expert: int | None = None) -> Iterator[Tensor]:
        """The rows of the matrix in order, some at a time: scales times codes, computed in float32 (float64 for that)
        and rounded to `dtype` once."""
        raise NotImplementedError

    def represented(self, expert: int | None = None) -> Iterator[Tensor]:
        """The rows of the matrix in order, some at a time, in float32: what the kernel multiplies with."""
        return self.blocks(torch.float32, expert)

    def dequantize(self) -> Tensor:
        """float32 [N, K] or [E, N, K]: what `linear` multiplies with."""
        out, start = torch.empty(self.shape, device=self.device).view(-1, self.shape[-1]), 0
        for expert in [None] if len(self.shape) == 2 else range(self.shape[0]):
            for block in self.represented(expert):
                out[start : start + len(block)] = block
                start += len(block)
        return out.view(self.shape)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedWeight":
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype or tensor is self.like else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    def extra_repr(self) -> str:
        return f"{list(self.shape)}, kernel={self.kernel}"


class DequantizedWeight(PackedWeight):
    """Codes and scales as they came, dequantized block by block in every call: any device and any dtype.

    Rounds nothing but the dequantized values, to the dtype computed in. Embeddings look up its rows."""

    kernel = "dequantize"

    def __init__(self, weight: QuantizedTensor, dtype: torch.dtype):
        super().__init__(weight.shape, dtype, weight.device)
        self.bits, self.offset = weight.bits, weight.offset
        self.register_buffer("qdata", weight.qdata)
        self.register_buffer("scale", weight.scale)
        self.register_buffer("zero", weight.zero)

    @property
    def quantized(self) -> QuantizedTensor:
        return QuantizedTensor(self.qdata, self.scale, self.zero, self.bits, self.offset)

    def blocks(self, dtype: torch.dtype, expert: int | None = None) -> Iterator[Tensor]:
        weight = self.quantized if expert is None else self.quantized[expert]
        step = max(1, BLOCK // self.shape[-1])
        for start in range(0, self.shape[-2], step):
            yield weight[start : start + step].dequantize(dtype)

    def represented(self, expert: int | None = None) -> Iterator[Tensor]:
        return (block.float() for block in self.blocks(self.dtype, expert))

    def rows(self, index: Tensor) -> Tensor:
        """index, integers of any shape -> those rows of a matrix [..., K], in `dtype`."""
        return self.quantized[index.flatten()].dequantize(self.dtype).view(*index.shape, self.shape[-1])
