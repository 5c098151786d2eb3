"""Quantized weights into what MLX's quantized operators are fused from: the same codes, w = scale * (q - zero).

MLX holds w = scale * q + bias in groups of 32, 64 or 128, scale and bias in the dtype that the program computes in."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from gemma4_impl.export.mlx.model import MlxExperts, MlxGemma4
from gemma4_impl.export.source import EMBEDDING, HEAD, dequantize
from gemma4_impl.quant.tensor import QuantizedTensor

GROUPS = (128, 64, 32)


def install(
    program: MlxGemma4, weights: Mapping[str, QuantizedTensor], dtype: torch.dtype, report: Callable[[str], None]
) -> set[str]:
    """Puts each of `weights` into the program; returns the names of those that stay quantized, a tied head's too.

    The others become dense, and `report` is told which and why; it is also told what rounding scales or biases to
    `dtype` costs. A coarse group becomes several with its scale, which changes no value."""
    kept, rounded = set(), {}
    for name, weight in weights.items():
        path, _, leaf = name.rpartition(".")
        module = program.model.get_submodule(path)
        reason = refusal(weight, isinstance(module, MlxExperts))
        if reason is not None:
            report(f"{name} becomes dense: {reason}")
            dequantize(program.model, dtype, {name})
            continue
        kept.add(name)
        if name == HEAD and EMBEDDING in kept and weights[EMBEDDING] is weight:
            module.weight = program.model.embed_tokens.weight
            continue
        scale, zero = affine(weight, dtype)
        if loss := _loss(weight, scale, zero):
            rounded[name] = loss
        if isinstance(module, MlxExperts):
            module.hold(leaf, weight, scale, zero)
        else:
            module.weight = nn.Parameter(_intx(weight, scale, zero, dtype), requires_grad=False)
    if rounded:
        worst = max(rounded, key=rounded.get)
        report(
            f"scales or biases of {len(rounded)} weights are rounded to {str(dtype).removeprefix('torch.')}: "
            f"at most {rounded[worst]:.1e} of a weight ({worst})"
        )
    return kept


def refusal(weight: QuantizedTensor, expert: bool) -> str | None:
    """Why MLX cannot multiply with a weight as it is; None if it can."""
    if weight.group_size % GROUPS[-1]:
        return f"MLX has groups of {', '.join(map(str, reversed(GROUPS)))}; {weight.group_size} is no multiple of one"
    if weight.zero is not None and bool(((weight.scale == 0) & (weight.zero != 0)).any()):
        return "a group has scale 0 and a value that is not 0"
    if expert and (weight.zero is not None or weight.offset != _middle(weight)):
        return "the executorch operator for experts has symmetric weights only"
    return None


def affine(weight: QuantizedTensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """scale and zero [..., N, K / G] of w = scale * (q - zero), with signed codes q (-8..7, -128..127) and G of 32, 64
    or 128. The zero is int8 where that is exact, else float32."""
    scale = weight.scale.to(dtype)
    shift = weight.offset - _middle(weight)
    constant = torch.zeros_like(weight.scale) if weight.zero is None else weight.zero
    zero = shift - torch.where(constant == 0, 0.0, constant.double() / weight.scale.double())
    small = zero.round().clamp(-128, 127)
    exact = torch.equal(weight.scale.double() * (shift - small), constant.double())
    zero = small.to(torch.int8) if exact else zero.float()
    group = weight.group_size
    repeat = group // next(size for size in GROUPS if group % size == 0)
    return scale.repeat_interleave(repeat, dim=-1), zero.repeat_interleave(repeat, dim=-1)


def signed_codes(weight: QuantizedTensor) -> Tensor:
    """int8 [..., N, K]."""
    codes = weight.codes()
    return codes if weight.bits == 8 else (codes.to(torch.int8) - 8)


def _middle(weight: QuantizedTensor) -> int:
    """What lies between a code and its signed form."""
    return 8 if weight.bits == 4 else 0


def _loss(weight: QuantizedTensor, scale: Tensor, zero: Tensor) -> float:
    """The largest change of scale * q + bias that its two constants cause, relative to the largest of the tensor."""
    half = 1 << (weight.bits - 1)
    bias = -scale * (zero.to(scale.dtype) + half)
    repeat = scale.shape[-1] // weight.scale.shape[-1]
    true = weight.scale.double().repeat_interleave(repeat, dim=-1)
    shift = weight.offset - _middle(weight)
    wanted = -true * (shift + half)
    if weight.zero is not None:
        wanted += weight.zero.double().repeat_interleave(repeat, dim=-1)
    # A weight is linear in its code: the largest change is at the first or the last one.
    slope, base = scale.double() - true, bias.double() - wanted
    change = torch.maximum(base.abs(), (base + slope * (2 * half - 1)).abs()).max()
    largest = torch.maximum(wanted.abs(), (wanted + true * (2 * half - 1)).abs()).max()
    return float(change / largest) if largest else float(change)


def _intx(weight: QuantizedTensor, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> Tensor:
    from torchao.quantization import IntxUnpackedToInt8Tensor

    target = torch.int4 if weight.bits == 4 else torch.int8
    block = (1, weight.shape[-1] // scale.shape[-1])
    return IntxUnpackedToInt8Tensor(signed_codes(weight), scale, zero, target, block, dtype, None)
