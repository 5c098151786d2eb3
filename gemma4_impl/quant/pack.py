"""Quantized weights into a model, each in the form that its backend multiplies with: one at a time, or all of them.

A backend is a function that packs one weight; `register_packer` adds it under a name. A device whose name has none runs
on codes as they are, dequantized block by block."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from gemma4_impl.model.moe import Experts
from gemma4_impl.quant import cpu, cuda
from gemma4_impl.quant.modules import QuantizedEmbedding, QuantizedExperts, QuantizedLinear
from gemma4_impl.quant.packed import DequantizedWeight, PackedWeight
from gemma4_impl.quant.tensor import QuantizedTensor

if TYPE_CHECKING:
    from gemma4_impl.checkpoint import Weights

Packer = Callable[[QuantizedTensor, torch.dtype], PackedWeight]
"""(weight [N, K] or [E, N, K] on its device, dtype to compute in) -> packed form. May keep the weight's tensors."""

_PACKERS: dict[str, Packer] = {"cpu": cpu.pack, "cuda": cuda.pack}
_MATRICES = (nn.Linear, nn.Embedding, QuantizedLinear, QuantizedEmbedding)


def register_packer(backend: str, packer: Packer) -> None:
    """Makes `packer` the one for `backend`: a type of device ("cuda"), which then uses it by default, or a name."""
    _PACKERS[backend] = packer


def pack_weight(
    weight: QuantizedTensor, dtype: torch.dtype, device: torch.device | str = "cpu", backend: str | None = None
) -> PackedWeight:
    """`weight` in the form of `backend`, which defaults to that of the device.

    Peak memory is the weight, the result and a few MB. Raises ValueError for an unknown backend."""
    device = torch.device(device)
    if backend is not None and backend not in _PACKERS:
        raise ValueError(f"no packer for backend {backend!r}; known: {', '.join(sorted(_PACKERS))}")
    return _PACKERS.get(backend or device.type, DequantizedWeight)(weight.to(device), dtype)


def pack_error(weight: QuantizedTensor, packed: PackedWeight) -> float:
    """What packing rounded: the relative L2 distance of what `packed` multiplies with from `weight.dequantize()`. 0 if
    nothing is rounded; scales in bfloat16 give 1e-3 to 2e-3. Holds a block of rows at a time."""
    experts = [None] if len(weight.shape) == 2 else range(weight.shape[0])
    wrong = total = 0.0
    for expert in experts:
        matrix, start = weight if expert is None else weight[expert], 0
        for block in packed.represented(expert):
            exact = matrix[start : start + len(block)].dequantize().to(block.device)
            start += len(block)
            wrong += float((block - exact).double().square().sum())
            total += float(exact.double().square().sum())
    return math.sqrt(wrong / total) if total else math.inf if wrong else 0.0


def pack_model(model: nn.Module, weights: "Weights", backend: str | None = None) -> dict[str, str]:
    """Packs each tensor that `weights` has quantized in the place of the one that a loaded `model` has, module by
    module, in the model's dtype and on its device.

    Returns the kernel chosen for each tensor. Peak memory is the larger of the model before and after, plus the largest
    tensor twice, as it comes and packed. Raises ValueError for a tensor of another shape, and as `pack_weight` does."""
    kernels = {}
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    for name in sorted(set(weights.files) - tied):
        if can_pack(model, name) and (weight := weights.quantized(name)) is not None:
            kernels[name] = install(model, name, weight, model.dtype, model.device, backend).kernel
            del weight
    tie_head(model, backend)
    return kernels


def can_pack(model: nn.Module, name: str) -> bool:
    """Whether the model's tensor `name` may be quantized: that of a linear or an embedding, a stack of experts. Norms,
    scalars and routers are dense."""
    path, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return False
    if isinstance(module, Experts):
        return leaf in ("gate_up_proj", "down_proj")
    return leaf == "weight" and isinstance(module, _MATRICES) and not path.endswith(".router.proj")


def install(
    model: nn.Module,
    name: str,
    weight: QuantizedTensor,
    dtype: torch.dtype,
    device: torch.device,
    backend: str | None = None,
) -> PackedWeight:
    """Packs `weight` in the place of the tensor `name`, for which `can_pack` holds: its module becomes a quantized one.

    An embedding keeps its codes, as rows are looked up in them. Raises ValueError for a weight of another shape, and as
    `pack_weight` does."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if weight.shape != (expected := getattr(module, leaf).shape):
        raise ValueError(f"{name} is {list(weight.shape)}, expected {list(expected)}")
    if isinstance(module, nn.Embedding | QuantizedEmbedding):
        packed = DequantizedWeight(weight.to(device), dtype)
        model.set_submodule(path, QuantizedEmbedding(packed, module.scale))
        return packed
    packed = pack_weight(weight, dtype, device, backend)
    if not isinstance(module, Experts):
        model.set_submodule(path, QuantizedLinear(packed))
        return packed
    if not isinstance(module, QuantizedExperts):
        module = QuantizedExperts(module)
        model.set_submodule(path, module)
    delattr(module, leaf)
    setattr(module, leaf, packed)
    return packed


def tie_head(model: nn.Module, backend: str | None = None) -> None:
    """Gives a tied head the embedding's weight. Quantized codes are shared if the head's kernel takes them as they are;
    else the head has its own."""
    if not model.config.tie_word_embeddings:
        return
    weight = model.embed_tokens.weight
    if not isinstance(weight, DequantizedWeight):
        model.lm_head.weight = weight
        return
    packed = pack_weight(weight.quantized, weight.dtype, weight.device, backend)
    if isinstance(packed, cpu.Int8Weight):
        weight.qdata = packed.qdata  # which may be an aligned copy
    model.lm_head = QuantizedLinear(weight if packed.kernel == weight.kernel else packed)
