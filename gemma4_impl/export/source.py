"""What a backend lowers: a model whose quantized weights stay integers, read from whatever holds a Gemma 4."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from gemma4_impl.checkpoint import Weights, check_fits, open_checkpoint, set_tensor, tracked
from gemma4_impl.config import TextConfig
from gemma4_impl.model.decoder import Gemma4
from gemma4_impl.quant.pack import can_pack
from gemma4_impl.quant.tensor import QuantizedTensor

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Source:
    """A model that is ready to be lowered, and where it came from."""

    weights: Weights
    model: Gemma4
    """In eval mode on the CPU, all its dense tensors in `dtype`. A quantized tensor is on meta, and its module, which
    is as without quantization (`nn.Linear`, `ScaledEmbedding`, `Experts`), holds it: `quantized_weights(model)`."""
    dtype: torch.dtype
    fingerprint: str
    """`Weights.fingerprint`."""

    @property
    def path(self) -> Path:
        return self.weights.path

    @property
    def config(self) -> TextConfig:
        return self.model.config

    @property
    def quantized(self) -> dict[str, QuantizedTensor]:
        """`quantized_weights(self.model)`."""
        return quantized_weights(self.model)


def open_source(path: str | Path | Weights, dtype: torch.dtype | None = None, progress: bool = False) -> Source:
    """Loads what `open_checkpoint` opens (or weights that it opened), tensor by tensor: peak memory is the model, its
    quantized weights as they are stored, plus its largest tensor.

    `dtype` is what the model computes in, and defaults to the weights' own. Raises as `open_checkpoint` and
    `check_fits` do."""
    weights = open_checkpoint(path) if isinstance(path, str | Path) else path
    with torch.device("meta"):
        model = Gemma4(weights.config)
    dtype = dtype or weights.dtype
    names = check_fits(model, weights)
    for name in tracked(sorted(names, key=lambda name: (str(weights.files[name]), name)), "loading", progress):
        q = weights.quantized(name) if can_pack(model, name) else None
        if q is None:
            set_tensor(model, name, weights.tensor(name).to(dtype))
        else:
            hold(model, name, q, dtype)
    if model.config.tie_word_embeddings:
        if (q := quantized_weights(model).get(EMBEDDING)) is not None:
            hold(model, HEAD, q, dtype)
        model.lm_head.weight = model.embed_tokens.weight
    for rope in model.rope.values():
        rope.reset(dtype, torch.device("cpu"))
    return Source(weights, model.eval(), dtype, weights.fingerprint())


def hold(model: nn.Module, name: str, weight: QuantizedTensor, dtype: torch.dtype) -> None:
    """Makes `weight` the quantized tensor `name` of the model. What stands for it is on meta, in the `dtype` that the
    model computes in. Raises ValueError for another shape."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    shape = getattr(module, leaf).shape
    if weight.shape != shape:
        raise ValueError(f"{name} is {list(weight.shape)}, expected {list(shape)}")
    set_tensor(model, name, torch.empty(shape, dtype=dtype, device="meta"))
    module.quantized = {**getattr(module, "quantized", {}), leaf: weight}


def quantized_weights(model: nn.Module) -> dict[str, QuantizedTensor]:
    """Name -> weight of each quantized tensor of a model from `open_source`, in the model's order. A tied head has an
    entry of its own, which is the embedding's object."""
    return {
        f"{path}.{leaf}": weight
        for path, module in model.named_modules()
        for leaf, weight in getattr(module, "quantized", {}).items()
    }


def dequantize(model: Gemma4, dtype: torch.dtype | None = None, names: set[str] | None = None) -> None:
    """Replaces the quantized tensors of a model, or those of `names`, by dense ones in `dtype` (default: the model's),
    rounded once; one at a time. A tied head shares the embedding's again."""
    dtype = dtype or model.dtype
    tied = model.config.tie_word_embeddings
    for name, weight in quantized_weights(model).items():
        if names is not None and name not in names:
            continue
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        del module.quantized[leaf]
        embedding = model.embed_tokens.weight.data
        if tied and name == HEAD and type(embedding) is torch.Tensor and not embedding.is_meta:
            model.lm_head.weight = model.embed_tokens.weight
        else:
            set_tensor(model, name, weight.dequantize(dtype))
