"""Quantized weights as a product and a sum make them: another order of the same arithmetic, with errors of its own."""

from typing import Any

import torch
from torch import Tensor

from gemma4_impl.checkpoint import Weights
from reference.weights import Source


class AffineWeights:
    """A `Source` whose quantized tensors are scale * q + bias with codes q >= 0, the product and the sum each rounded
    to `dtype`, in which scale and bias are. MLX does so: a reference on these weights shows what it costs."""

    def __init__(self, source: Source, weights: Weights, dtype: torch.dtype):
        self._source, self._weights, self._dtype = source, weights, dtype

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def __contains__(self, name: str) -> bool:
        return name in self._source

    def tensor(self, name: str) -> Tensor:
        packed = self._weights.quantized(name) if name in self._weights.files else None
        return self._source.tensor(name) if packed is None else self._affine(packed)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        packed = self._weights.quantized(name) if name in self._weights.files else None
        return self._source.rows(name, start, stop) if packed is None else self._affine(packed[start:stop])

    def _affine(self, packed: Any) -> Tensor:
        low = -128 if packed.bits == 8 else 0
        q = (packed.codes().int() - low).to(self._dtype).unflatten(-1, (-1, packed.group_size))
        scale = packed.scale.to(self._dtype)[..., None]
        bias = (low - packed.offset) * scale
        if packed.zero is not None:
            bias = bias + packed.zero.to(self._dtype)[..., None]
        return (q * scale + bias).flatten(-2).float()
