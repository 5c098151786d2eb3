"""Weights of a mapped file may begin at any byte, and inputs may be views: no kernel may mind."""

import pytest
import torch
from torch import Tensor

from gemma4_impl.quant.pack import pack_weight
from gemma4_impl.quant.quantize import quantize
from gemma4_impl.quant.recipe import QuantConfig
from gemma4_impl.quant.tensor import QuantizedTensor


def misplaced(tensor: Tensor, offset: int) -> Tensor:
    """The same values `offset` bytes past a multiple of 64."""
    room = torch.empty(tensor.nbytes + 128, dtype=torch.uint8)
    start = -room.data_ptr() % 64 + offset
    return room[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("config", [QuantConfig(8, None), QuantConfig(4, 32)], ids=["int8", "int4"])
@pytest.mark.parametrize("offset", [0, 2, 8, 16, 26, 32])
def test_where_it_lies_makes_no_difference(config: QuantConfig, offset: int) -> None:
    torch.manual_seed(0)
    weight = quantize(torch.randn(32, 96), config, torch.bfloat16)
    moved = QuantizedTensor(
        misplaced(weight.qdata, offset + (weight.bits == 8)),
        misplaced(weight.scale, offset),
        None if weight.zero is None else misplaced(weight.zero, offset),
        weight.bits,
        weight.offset,
    )
    packed, wanted = (pack_weight(q, torch.bfloat16) for q in (moved, weight))
    for rows in (1, 3, 20):
        x = torch.randn(rows, 96).bfloat16()
        assert torch.equal(packed.linear(misplaced(x, offset)), wanted.linear(x))
