"""Quantized weights for tests: any codes and scales, and a checkpoint whose tensors are quantized when read."""

from collections.abc import Callable
from pathlib import Path

import torch
from hypothesis import strategies as st
from torch import Tensor

from gemma4_impl.checkpoint import Checkpoint
from gemma4_impl.quant.tensor import QuantizedTensor


def nearest(weight: Tensor, bits: int, group_size: int | None, zero: bool) -> QuantizedTensor:
    """The nearest codes, with float32 scales; with `zero`, codes start at the smallest weight of a group."""
    groups = weight.float().unflatten(-1, (-1, group_size or weight.shape[-1]))
    if zero:
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scale = (high - low).clamp(min=1e-20) / (2**bits - 1)
        codes = ((groups - low) / scale).round()
        offset, start = (0, low) if bits == 4 else (-128, low)
    else:
        scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-20) / (2 ** (bits - 1) - 1)
        codes, offset, start = (groups / scale).round() + 8 * (bits == 4), 8 * (bits == 4), None
    codes = codes.flatten(-2).to(torch.int32)
    if bits == 4:
        qdata = (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)
    else:
        qdata = (codes + (offset if zero else 0)).to(torch.int8)
    return QuantizedTensor(qdata, scale[..., 0], None if start is None else start[..., 0], bits, offset)


class OnTheFly(Checkpoint):
    """A dense checkpoint as a quantized one: `choose` gives the arguments of `nearest` for a tensor's name, or None."""

    def __init__(self, path: Path, choose: Callable[[str], tuple | None]):
        super().__init__(path)
        self.choose = choose

    def quantized(self, name: str) -> QuantizedTensor | None:
        how = self.choose(name)
        return None if how is None else nearest(super().tensor(name), *how)

    def tensor(self, name: str) -> Tensor:
        weight = self.quantized(name)
        return super().tensor(name) if weight is None else weight.dequantize()


@st.composite
def weights(draw: st.DrawFn, stacks: bool = True) -> QuantizedTensor:
    """Any codes, scales of either sign over six decades, zeros around them; rows and groups of many sizes."""
    bits = draw(st.sampled_from([4, 8]))
    group = draw(st.sampled_from([2, 8, 16, 32, 48, 64, 96, 128, 256, 512]))
    K = group * draw(st.integers(1, max(1, 256 // group)))
    N = draw(st.sampled_from([1, 3, 16, 32, 48, 64, 80, 112, 128, 144]))
    lead = draw(st.sampled_from([(), (1,), (3,)])) if stacks else ()
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    if bits == 4:
        qdata = torch.randint(0, 256, (*lead, N, K // 2), dtype=torch.uint8, generator=generator)
    else:
        low, high = draw(st.sampled_from([(-128, 128), (-127, 128), (0, 64), (-32, 32), (127, 128), (-128, -127)]))
        qdata = torch.randint(low, high, (*lead, N, K), dtype=torch.int8, generator=generator)
    shape = (*lead, N, K // group)
    scale = torch.randn(shape, generator=generator) * 10 ** draw(st.floats(-4, 2))
    scale[torch.rand(shape, generator=generator) < 0.05] = 0
    zero = torch.randn(shape, generator=generator) * scale.abs() * draw(st.sampled_from([1, 40]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    offset = draw(st.sampled_from([0, 4, 8] if bits == 4 else [0, 0, 32, -128]))
    return QuantizedTensor(qdata, scale.to(dtype), zero.to(dtype) if draw(st.booleans()) else None, bits, offset)
