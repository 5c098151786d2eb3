"""Activations rounded to 8-bit integers, as programs with dynamically quantized activations round them."""

from collections.abc import Collection

from torch import Tensor, nn

from gemma4_impl.names import from_hf

_LOW, _HIGH = -128, 127


def quantize_inputs(model: nn.Module, names: Collection[str]) -> None:
    """Makes a transformers model round the inputs of the linears whose weights have these canonical names. Raises
    ValueError for a name that is no linear's."""
    known = {from_hf(f"{path}.weight"): m for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    for name in names:
        if name not in known:
            raise ValueError(f"{name}: is not the weight of a linear, whose inputs could be quantized")
        known[name].register_forward_pre_hook(lambda module, args: (rounded(args[0]), *args[1:]))


def rounded(x: Tensor) -> Tensor:
    """x [..., K] through int8 and back, with a scale and a zero for each row, from its smallest and largest value and
    0. In float32 it is torchao's `INT8_ASYM_PER_TOKEN`, which takes no float64."""
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / (_HIGH - _LOW)).clamp(min=2.0**-126)
    zero = (_LOW - (low / scale).round()).clamp(_LOW, _HIGH)
    codes = ((x * (1 / scale)).round() + zero).clamp(_LOW, _HIGH)
    return (codes - zero) * scale
