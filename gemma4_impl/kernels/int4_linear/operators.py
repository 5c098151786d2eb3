"""Quantized linears as PyTorch operators on codes as they are stored: `gemma4::quantized_linear`, `quantized_experts`
and `dequantize`.

torch.export keeps them whole; torch.compile and AOTInductor take in their Triton kernels. On the CPU they are
`QuantizedTensor.dequantize` and a product."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op, triton_op

from gemma4_impl.quant.tensor import QuantizedTensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def refusal(weight: QuantizedTensor) -> str | None:
    """Why the operators cannot take a weight; None if they can."""
    if weight.bits == 4 and weight.group_size % 2:
        return f"four bits in groups of {weight.group_size}: two codes of a byte would have different scales"
    if not all(
        t.is_contiguous() for t in (weight.qdata, weight.scale) + ((weight.zero,) if weight.zero is not None else ())
    ):
        return "codes or scales are not in one piece"
    return None


@triton_op("gemma4::quantized_linear", mutates_args=())
def quantized_linear(x: Tensor, qdata: Tensor, scale: Tensor, zero: Tensor | None, bits: int, offset: int) -> Tensor:
    """x [..., K] -> x @ W.T [..., N] in x's dtype; qdata, scale, zero, bits and offset are a `QuantizedTensor`'s.

    One row is multiplied as the codes are read; for more the weight is dequantized first."""
    if x.device.type == "cpu":
        return _linear(x, qdata, scale, zero, bits, offset)
    from gemma4_impl.kernels.int4_linear import triton

    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] == 1:
        out = triton.matvec(rows, qdata, scale, zero, bits, offset)
    else:
        out = F.linear(rows, triton.dequantize(qdata, scale, zero, bits, offset, x.dtype))
    return out.view(*x.shape[:-1], out.shape[-1])


@triton_op("gemma4::quantized_experts", mutates_args=())
def quantized_experts(
    x: Tensor, qdata: Tensor, scale: Tensor, zero: Tensor | None, bits: int, offset: int, index: Tensor
) -> Tensor:
    """x [1, K], or [k, K] a row each, times the matrices `index` [k] int64 of a stack [E, N, K] -> [k, N]."""
    if x.device.type == "cpu":
        return _experts(x, qdata, scale, zero, bits, offset, index)
    from gemma4_impl.kernels.int4_linear import triton

    return triton.matvec(x.contiguous(), qdata, scale, zero, bits, offset, index)


@triton_op("gemma4::dequantize", mutates_args=())
def dequantize(qdata: Tensor, scale: Tensor, zero: Tensor | None, bits: int, offset: int, dtype: torch.dtype) -> Tensor:
    """The dense matrix or stack [..., N, K], rounded to `dtype` once."""
    if qdata.device.type == "cpu":
        return _dequantize(qdata, scale, zero, bits, offset, dtype)
    from gemma4_impl.kernels.int4_linear import triton

    return triton.dequantize(qdata, scale, zero, bits, offset, dtype)


@custom_op("gemma4::quantized_linear_naive", mutates_args=())
def _linear(x: Tensor, qdata: Tensor, scale: Tensor, zero: Tensor | None, bits: int, offset: int) -> Tensor:
    return F.linear(x, QuantizedTensor(qdata, scale, zero, bits, offset).dequantize(x.dtype))


@custom_op("gemma4::quantized_experts_naive", mutates_args=())
def _experts(
    x: Tensor, qdata: Tensor, scale: Tensor, zero: Tensor | None, bits: int, offset: int, index: Tensor
) -> Tensor:
    chosen = QuantizedTensor(qdata, scale, zero, bits, offset)[index].dequantize(x.dtype)
    return torch.einsum("kd,knd->kn", x.expand(len(index), -1), chosen)


@custom_op("gemma4::dequantize_naive", mutates_args=())
def _dequantize(
    qdata: Tensor, scale: Tensor, zero: Tensor | None, bits: int, offset: int, dtype: torch.dtype
) -> Tensor:
    return QuantizedTensor(qdata, scale, zero, bits, offset).dequantize(dtype)


@quantized_linear.register_fake
@_linear.register_fake
def _(x: Tensor, qdata: Tensor, scale: Tensor, zero: Tensor | None, bits: int, offset: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], qdata.shape[0]))


@quantized_experts.register_fake
@_experts.register_fake
def _(x: Tensor, qdata: Tensor, scale: Tensor, zero: Tensor | None, bits: int, offset: int, index: Tensor) -> Tensor:
    return x.new_empty((index.shape[0], qdata.shape[1]))


@dequantize.register_fake
@_dequantize.register_fake
def _(qdata: Tensor, scale: Tensor, zero: Tensor | None, bits: int, offset: int, dtype: torch.dtype) -> Tensor:
    return qdata.new_empty((*qdata.shape[:-1], qdata.shape[-1] * (8 // bits)), dtype=dtype)
