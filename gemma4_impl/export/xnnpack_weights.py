"""Quantized weights as XNNPACK and ExecuTorch's quantized kernels take them: the same integers, float32 scales.

XNNPACK drops the scale of a linear whose weight alone is quantized, so that its inputs are quantized too: int8, with a
scale and a zero point for each token (8da4w, 8da8w)."""

from collections.abc import Callable

import torch
from torch import nn

from gemma4_impl.export.source import dequantize, quantized_weights
from gemma4_impl.model.decoder import Gemma4
from gemma4_impl.quant.tensor import QuantizedTensor


def install(model: Gemma4, report: Callable[[str], None]) -> set[str]:
    """Gives every quantized tensor of the model, in place, the form that is lowered; returns the names of those that
    stay integers. The others become dense float32, and `report` is told which and why."""
    kept, rounded = set(), 0
    for name, weight in quantized_weights(model).items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if (reason := refusal(weight, module)) is not None:
            report(f"{name} becomes dense: {reason}")
            dequantize(model, torch.float32, {name})
        else:
            del module.quantized[leaf]
            setattr(module, leaf, nn.Parameter(_intx(weight, isinstance(module, nn.Linear)), requires_grad=False))
            kept.add(name)
            groups = isinstance(module, nn.Linear) and weight.group_size < weight.shape[-1]
            rounded += groups and not torch.equal(weight.scale.float(), weight.scale.bfloat16().float())
    if rounded:
        report(f"XNNPACK holds the scales of groups in bfloat16: those of {rounded} weights are rounded to it")
    return kept


def check_linears(model: nn.Module) -> None:
    """Raises ValueError for a linear that XNNPACK would compute wrongly: it drops the scale of a weight that is
    quantized without its inputs."""
    for name, module in model.named_modules():
        plain = not isinstance(module, nn.Linear) or type(module.weight.data) is torch.Tensor
        if not plain and getattr(module.weight, "activation_quantization", None) is None:
            raise ValueError(f"xnnpack: {name}.weight is quantized, but not what it is multiplied with")


def refusal(weight: QuantizedTensor, module: nn.Module) -> str | None:
    """Why a weight of this module is not computed with as it is; None if it is."""
    if not isinstance(module, nn.Linear | nn.Embedding):
        return "XNNPACK has no product with a stack of experts"
    if weight.zero is not None or weight.offset != (8 if weight.bits == 4 else 0):
        return "XNNPACK and the embedding kernels take symmetric weights only"
    if isinstance(module, nn.Embedding):
        return None
    per_row = weight.group_size == weight.shape[-1]
    if weight.bits == 8 and not per_row:
        return f"XNNPACK takes int8 with one scale for each row, not for {weight.group_size} values"
    if weight.bits == 4 and weight.group_size % 32 and not per_row:
        return f"XNNPACK takes groups of a multiple of 32, not of {weight.group_size}"
    # Programs with another would not load. Groups of zeros are given a scale.
    held = weight.scale.bfloat16().float()
    if not bool(((held >= torch.finfo(held.dtype).tiny) & held.isfinite() | (weight.scale == 0)).all()):
        return "XNNPACK takes positive scales only"
    return None


def _intx(weight: QuantizedTensor, linear: bool) -> torch.Tensor:
    from torchao.quantization import IntxUnpackedToInt8Tensor
    from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import (
        IntxUnpackedToInt8TensorActivationQuantization as Activations,
    )

    codes, scale = weight.codes(), weight.scale.float()
    codes = codes if weight.bits == 8 else codes.to(torch.int8) - 8
    empty = scale == 0
    return IntxUnpackedToInt8Tensor(
        qdata=codes.masked_fill(empty.repeat_interleave(weight.group_size, dim=-1), 0),
        scale=scale.masked_fill(empty, 1),
        zero_point=torch.zeros(weight.scale.shape, dtype=torch.int8),
        target_dtype=torch.int8 if weight.bits == 8 else torch.int4,
        block_size=(1, weight.group_size),
        dtype=torch.float32,
        activation_quantization=Activations.INT8_ASYM_PER_TOKEN if linear else None,
    )
