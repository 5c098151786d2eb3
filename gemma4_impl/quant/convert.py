"""`QuantizedTensor` <-> torchao's `Int4Tensor` and `IntxUnpackedToInt8Tensor`, in torchao's own conventions."""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gemma4_impl.quant.quantize import quantize
from gemma4_impl.quant.recipe import QuantConfig
from gemma4_impl.quant.stored import INT4, INTX, Stored, join
from gemma4_impl.quant.tensor import QuantizedTensor

if TYPE_CHECKING:
    from torchao.quantization import Int4Tensor, IntxUnpackedToInt8Tensor

_FLIP = 0x88
"""Turns two unsigned nibbles, of which 8 is 0, into two's-complement ones, and back."""


def quantize_to_torchao(
    weight: Tensor, config: QuantConfig, scale_dtype: torch.dtype | None = None, name: str = "weight"
) -> "Int4Tensor | IntxUnpackedToInt8Tensor":
    """`to_torchao(quantize(...))`; arguments and errors are those of both."""
    return to_torchao(quantize(weight, config, scale_dtype, name))


def to_torchao(q: QuantizedTensor, dtype: torch.dtype | None = None) -> "Int4Tensor | IntxUnpackedToInt8Tensor":
    """4 bits -> Int4Tensor, 8 bits -> IntxUnpackedToInt8Tensor, with scales in `dtype` (default: as they are).

    Exact, but for three things, each of which rounds once more: a `dtype` narrower than the scales; a 4-bit offset
    other than 8, which Int4Tensor's signed codes move into the zero; and a zero at 8 bits, which becomes a float32 zero
    point, -zero / scale. Raises ValueError where that zero point is not finite, ImportError without torchao."""
    dtype = dtype or q.scale.dtype
    if q.bits == 8:
        return _intx(q.qdata, q.scale, q.zero, q.offset, q.group_size, dtype, torch.int8)
    zero = None if q.zero is None else q.zero.to(dtype)
    if q.offset != 8:
        shift = q.scale.float() * (8 - q.offset)
        zero = (shift if q.zero is None else shift + q.zero.float()).to(dtype)
    scale = q.scale.to(dtype).mT.contiguous()
    return _torchao().Int4Tensor(
        qdata=(q.qdata ^ _FLIP).view(torch.int8),
        scale=scale,
        zero_point=torch.zeros_like(scale) if zero is None else zero.mT.contiguous(),
        block_size=[1] * (len(q.shape) - 1) + [q.group_size],
        shape=q.shape,
    )


def from_torchao(t: Tensor) -> QuantizedTensor:
    """An Int4Tensor, or an IntxUnpackedToInt8Tensor of int4 or int8 codes.

    Exact for the first, and for the second if its zero points are integers and all the same, or its scales have 16
    bits. Other zero points become a float32 zero, -zero_point * scale, rounded once. Raises ValueError for another
    class, for scaled or quantized activations and for groups that are no part of a row; ImportError without torchao."""
    torchao = _torchao()
    if isinstance(t, torchao.Int4Tensor):
        kind, bits = INT4, 4
        plain = t.act_pre_scale is None and t.activation_dtype == torch.bfloat16
    elif isinstance(t, torchao.IntxUnpackedToInt8Tensor):
        kind, bits = INTX, {torch.int4: 4, torch.int8: 8}.get(t.target_dtype)
        plain = t.activation_quantization is None
    else:
        raise ValueError(f"is a {type(t).__name__}; expected an {INT4} or an {INTX}")
    if bits is None:
        raise ValueError(f"holds {t.target_dtype} codes; expected int4 or int8")
    if not plain:
        raise ValueError("scales or quantizes activations, which is not supported")
    if any(size != 1 for size in t.block_size[:-1]):
        raise ValueError(f"block_size {list(t.block_size)}: only groups along a row are supported")
    parts = {"qdata": t.qdata, "scale": t.scale, "zero_point": t.zero_point}
    return join(Stored(kind, tuple(t.shape), t.block_size[-1], bits), parts)


def int4_to_intx(t: "Int4Tensor") -> "IntxUnpackedToInt8Tensor":
    """The same codes, one a byte, and the same scales.

    Where the zero points are 0 (symmetric) nothing changes: dequantized values are equal bit for bit. A zero, which
    Int4Tensor adds, becomes the float32 zero point -zero / scale, which IntxUnpackedToInt8Tensor subtracts from the
    code: in float32 (`.to(torch.float32)`) the value then differs by at most 2**-22 of the larger of zero and value, in
    bfloat16 by more, as torchao rounds the zero point to it. Raises as `from_torchao`, and ValueError where a zero
    point is not finite."""
    if not isinstance(t, _torchao().Int4Tensor):
        raise ValueError(f"is a {type(t).__name__}; expected an Int4Tensor")
    q = from_torchao(t)
    return _intx(q.codes().to(torch.int8) - 8, q.scale, q.zero, 0, q.group_size, q.scale.dtype, torch.int4)


def _intx(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    offset: int,
    group_size: int,
    dtype: torch.dtype,
    target_dtype: torch.dtype,
) -> "IntxUnpackedToInt8Tensor":
    if zero is None and -128 <= offset <= 127:
        points = torch.full(scale.shape, offset, dtype=torch.int8)
    else:
        points = offset - (torch.zeros_like(scale) if zero is None else zero).float() / scale.float()
        if not bool(points.isfinite().all()):
            raise ValueError("a group's zero divided by its scale is not finite; torchao's zero points cannot hold it")
    return _torchao().IntxUnpackedToInt8Tensor(
        qdata=codes,
        scale=scale.to(dtype),
        zero_point=points,
        target_dtype=target_dtype,
        block_size=(*[1] * (codes.dim() - 1), group_size),
        dtype=dtype,
        activation_quantization=None,
    )


def _torchao() -> ModuleType:
    try:
        return importlib.import_module("torchao.quantization")
    except ImportError as error:
        raise ImportError(f"torchao is needed for this: pip install 'gemma4-parity[quant]' ({error})") from None
