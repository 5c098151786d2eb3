"""What goes wrong between the weights that were read and the product that a kernel makes with them."""

from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from gemma4_impl.quant.modules import QuantizedLinear
from gemma4_impl.quant.packed import DequantizedWeight
from parity.candidate import TorchCandidate


def packed(change: Callable[[DequantizedWeight], None]) -> Any:
    """Changes every packed weight of the model."""

    def inject(candidate: TorchCandidate) -> None:
        for module in candidate.model.modules():
            if isinstance(module, DequantizedWeight):
                change(module)

    return inject


def linears(change: Callable[[Tensor], Tensor]) -> Any:
    """Changes what goes into every packed linear."""

    def inject(candidate: TorchCandidate) -> None:
        for module in candidate.model.modules():
            if isinstance(module, QuantizedLinear):
                module.register_forward_pre_hook(lambda module, args: (change(args[0]),))

    return inject


def scales_in_bfloat16(weight: DequantizedWeight) -> None:
    weight.scale = weight.scale.bfloat16().float()


def zero_dropped(weight: DequantizedWeight) -> None:
    weight.zero = None


def offset_dropped(weight: DequantizedWeight) -> None:
    weight.offset = 0


def scales_of_first_expert(weight: DequantizedWeight) -> None:
    if weight.scale.dim() == 3:
        weight.scale = weight.scale[:1].expand_as(weight.scale).contiguous()


def next_expert(weight: DequantizedWeight) -> None:
    if weight.qdata.dim() == 3:
        weight.qdata, weight.scale = weight.qdata.roll(1, dims=0), weight.scale.roll(1, dims=0)


def weights_in_bfloat16(weight: DequantizedWeight) -> None:
    def blocks(self: DequantizedWeight, dtype: torch.dtype, expert: int | None = None) -> Iterator[Tensor]:
        yield from (block.bfloat16().to(dtype) for block in DequantizedWeight.blocks(self, dtype, expert))

    weight.blocks = MethodType(blocks, weight)


def quantized_to_int8(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round() * scale


def head_of_embedding(candidate: TorchCandidate) -> None:
    candidate.model.lm_head.weight = candidate.model.embed_tokens.weight
