"""Weights -> codes and scales: `quantize`. Arithmetic is in float32, and in blocks of groups."""

import torch
from torch import Tensor

from gemma4_impl.gguf.pieces import in_pieces
from gemma4_impl.quant.hqq import Codes, refine
from gemma4_impl.quant.recipe import QuantConfig
from gemma4_impl.quant.tensor import QuantizedTensor

SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST = 2.0**127
"""Weights beyond this size are refused: their dequantized values might not be finite."""

# Weights in a block: few enough for a cache, and enough that what each operator costs to call does not matter.
_BLOCK = {"min_max": 1 << 17, "mse": 1 << 19, "hqq": 1 << 19}
_INTS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def quantize(
    weight: Tensor, config: QuantConfig, scale_dtype: torch.dtype | None = None, name: str = "weight"
) -> QuantizedTensor:
    """weight [..., N, K] of any float dtype -> codes [..., N, K], scale (and zero) [..., N, K / G] in `scale_dtype`, by
    default the weight's own (float32 for float64).

    Every method takes the code nearest to each weight under the scale and zero as they are stored. min_max:
    - symmetric: scale = max(largest / 7, -smallest / 8) (127 and 128 for 8 bits), rounded up: nothing is clipped;
    - asymmetric: scale = (largest - smallest) / 15 (255), rounded up, and a zero that puts the weights in the middle of
      the codes. Where rounding the zero moves them by more than half a step (they lie far away from 0), the scale
      grows to make up for it.
    Both keep |w - dequantized| <= scale / 2, but for float32's rounding of (w - zero) / scale (2**-22 of it) and of the
    dequantized value. Exact are groups of zeros (with a scale of 1), and asymmetric ones of equal weights that
    `scale_dtype` holds. mse and hqq start there and minimise their objective (`hqq.py`); they may clip.
    Memory: the result, the weight once more if it is not contiguous, and 20 MB a thread.
    Raises ValueError with `name` for NaN, infinity, weights above 2**127 in size, scales that `scale_dtype` cannot
    hold, and rows that the group size does not divide."""
    dtype = scale_dtype or (torch.float32 if weight.dtype == torch.float64 else weight.dtype)
    _check(weight, config, dtype, name)
    K = weight.shape[-1]
    G = config.group_size or K
    groups = weight.detach().reshape(-1, G)
    shape, device = weight.shape, weight.device
    if config.bits == 4:
        qdata = torch.empty(*shape[:-1], K // 2, dtype=torch.uint8, device=device)
    else:
        qdata = torch.empty(shape, dtype=torch.int8, device=device)
    scale = torch.empty(*shape[:-1], K // G, dtype=dtype, device=device)
    zero = None if config.symmetric else torch.empty_like(scale)
    codes, scales = qdata.view(len(groups), -1), scale.view(-1, 1)
    zeros = None if zero is None else zero.view(-1, 1)

    step = max(1, _BLOCK[config.method] // G)

    def run(piece: slice) -> None:
        for start in range(piece.start, min(piece.stop, len(groups)), step):
            part = slice(start, min(start + step, piece.stop))
            _quantize_block(groups[part], config, codes[part], scales[part], None if zeros is None else zeros[part])

    try:
        in_pieces(run, len(groups), G)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return QuantizedTensor(qdata, scale, zero, config.bits, offset=8 if config.bits == 4 else 0)


def _check(weight: Tensor, config: QuantConfig, dtype: torch.dtype, name: str) -> None:
    if not weight.is_floating_point() or weight.dim() < 2 or not weight.numel():
        raise ValueError(f"{name}: is {weight.dtype} {list(weight.shape)}; expected floats [..., N, K], not empty")
    if dtype not in SCALE_DTYPES:
        raise ValueError(f"{name}: scales cannot be {dtype}; choose float32, bfloat16 or float16")
    K = weight.shape[-1]
    if K % (config.group_size or 1) or (config.bits == 4 and K % 2):
        raise ValueError(f"{name}: has rows of {K} weights, which groups of {config.group_size or 2} do not divide")


def _quantize_block(groups: Tensor, config: QuantConfig, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> None:
    """groups [n, G] -> codes [n, G or G / 2], scales and zeros [n, 1], all of them written in place."""
    low, high = (-8, 7) if config.bits == 4 else (-128, 127)
    w = groups.to(torch.float32)
    smallest, largest = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    if not bool(((smallest >= -LARGEST) & (largest <= LARGEST)).all()):
        _refuse(w)
    if zeros is None:
        scale, zero = _round_up(_symmetric(smallest.double(), largest.double(), low, high), scales.dtype), None
    else:
        scale, zero = _asymmetric(smallest.double(), largest.double(), low, high, scales.dtype)
    scale = torch.where(scale > 0, scale, 1.0).float()
    zero = None if zero is None else zero.float()
    if not all(bool(t.isfinite().all()) for t in (scale, zero) if t is not None):
        raise ValueError(f"weights up to {float(w.abs().max()):.3g} need scales beyond {scales.dtype}; choose another")
    if config.method != "min_max":
        store = Codes(low, high, lambda x: x.to(scales.dtype).float())
        scale, zero = refine(w, scale, zero, store, config.method)
    scales.copy_(scale)
    if zero is not None:
        zeros.copy_(zero)
        w = w.sub(zero) if w is groups else w.sub_(zero)
    w = w.div(scale) if w is groups else w.div_(scale)
    w.round_().clamp_(low, high)
    if config.bits == 8:
        codes.copy_(w)
    else:
        # Two codes a byte, even k low: as int16, the pair is low + 256 high.
        pairs = w.add_(8).to(torch.uint8).view(torch.int16)
        codes.copy_(pairs | pairs >> 4)


def _symmetric(smallest: Tensor, largest: Tensor, low: int, high: int) -> Tensor:
    return torch.maximum(largest / high, smallest / low)


def _asymmetric(smallest: Tensor, largest: Tensor, low: int, high: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    scale = _round_up((largest - smallest) / (high - low), dtype).double()
    zero = (smallest - scale * low).to(dtype)
    # A code's interval reaches half a step beyond it: only a zero that is further off than that needs a larger step.
    low_side, high_side = zero.double() - smallest, largest - zero.double()
    needed = torch.maximum(low_side / (0.5 - low), high_side / (high + 0.5))
    return _round_up(torch.maximum(scale, needed), dtype), zero


def _round_up(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x [n, 1] float64, not negative -> the smallest `dtype` that is not less."""
    y = x.to(dtype)
    # The next larger float of the same sign is the next integer.
    return (y.view(_INTS[dtype]) + (y.double() < x)).view(dtype)


def _refuse(w: Tensor) -> None:
    if w.isnan().any():
        raise ValueError("holds NaN")
    largest = float(w.abs().max())
    raise ValueError(f"holds {largest:.3g}; weights must be finite, and at most 2**127 = 1.7e38")
