"""Random weights of the released sizes, made where they are needed: for benchmarks, and for checkpoints that need no
download."""

import dataclasses
import functools
import hashlib
import math
from pathlib import Path

import torch
from torch import Tensor

from gemma4_impl.config import VARIANTS, TextConfig
from gemma4_impl.engine.model import EMBEDDING, HEAD, PackedModel
from gemma4_impl.errors import short
from gemma4_impl.quant.recipe import QuantConfig, QuantRecipe, load_recipe, plan, untied_shapes
from gemma4_impl.quant.tensor import QuantizedTensor

_BLOCK = 1 << 22
"""Weights that are drawn at a time."""


def find_variant(name: str) -> str:
    """The key of `VARIANTS` that `name` spells, whatever its case. Raises ValueError."""
    known = {key.lower(): key for key in VARIANTS}
    if name.lower() not in known:
        raise ValueError(f"unknown variant {short(name)}; known: {', '.join(VARIANTS)}")
    return known[name.lower()]


def random_model(
    variant: str | TextConfig,
    device: torch.device | str = "cpu",
    recipe: str | QuantRecipe | None = "default",
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> PackedModel:
    """A model of `RandomWeights`, packed for `device` without passing through a disk or another device."""
    return PackedModel.from_weights(RandomWeights(variant, device, recipe, seed, dtype), dtype, device)


class RandomWeights:
    """Implements `Weights`. Every linear keeps the size of a normed input on average, so that activations stay finite;
    norms and scalars are near 1, and logits spread about as a trained model's.

    Args:
        variant: a name in `VARIANTS`, of any case, or a config of one's own.
        recipe: a built-in recipe's name, a recipe, or a file with one; None leaves weights dense.
        seed: decides each tensor, with its name and the type of the device.
    A quantized embedding unties the head, as `gemma4 quantize` does. Raises ValueError for an unknown name, and what
    recipes raise."""

    def __init__(
        self,
        variant: str | TextConfig,
        device: torch.device | str = "cpu",
        recipe: str | QuantRecipe | None = "default",
        seed: int = 0,
        dtype: torch.dtype = torch.bfloat16,
    ):
        config = VARIANTS[find_variant(variant)] if isinstance(variant, str) else variant
        self.path = Path(f"random {variant if isinstance(variant, str) else 'model'}")
        self.device, self.dtype, self.seed = torch.device(device), dtype, seed
        shapes = untied_shapes(config)
        if recipe is None:
            self.configs: dict[str, QuantConfig | None] = dict.fromkeys(shapes)
        else:
            self.configs = plan(recipe if isinstance(recipe, QuantRecipe) else load_recipe(recipe), config)
        tied = config.tie_word_embeddings and not (self.configs[EMBEDDING] or self.configs[HEAD])
        self.config = dataclasses.replace(config, tie_word_embeddings=tied)
        self._shapes = {name: shape for name, shape in shapes.items() if not (tied and name == HEAD)}
        self.files = dict.fromkeys(self._shapes, self.path)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def tensor(self, name: str) -> Tensor:
        weight = self.quantized(name)
        if weight is not None:
            return weight.dequantize()
        random, shape = self._generator(name), self._shapes[name]
        if name.endswith("layer_scalar"):
            return torch.rand(shape, generator=random, device=self.device).mul_(0.3).add_(0.7).to(self.dtype)
        if len(shape) == 1:
            # Attention has no 1 / sqrt(H): the norms keep its scores small.
            mean = 0.4 if name.endswith(("q_norm.weight", "k_norm.weight")) else 1.0
            drawn = torch.randn(shape, generator=random, device=self.device)
            return drawn.mul_(0.1).add_(1.0).mul_(mean).to(self.dtype)
        out = torch.empty(shape, dtype=self.dtype, device=self.device)
        for rows in _blocks(out):
            rows.normal_(0, self._deviation(name), generator=random)
        return out

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.tensor(name)[start:stop]

    def quantized(self, name: str) -> QuantizedTensor | None:
        how = self.configs[name]
        if how is None:
            return None
        random, (*lead, N, K) = self._generator(name), self._shapes[name]
        draw = functools.partial(torch.randint, generator=random, device=self.device)
        if how.bits == 4:
            low, high = 1, 16  # 8, the middle, stands for 0
            qdata = torch.empty(*lead, N, K // 2, dtype=torch.uint8, device=self.device)
            for rows in _blocks(qdata):
                rows.copy_(draw(low, high, rows.shape, dtype=torch.uint8))
                rows |= draw(low, high, rows.shape, dtype=torch.uint8) << 4
        else:
            low, high = -127, 128
            qdata = torch.empty(*lead, N, K, dtype=torch.int8, device=self.device)
            for rows in _blocks(qdata):
                rows.copy_(draw(low, high, rows.shape, dtype=torch.int8))
        spread = math.sqrt(((high - low) ** 2 - 1) / 12)  # of evenly drawn codes
        shape = (*lead, N, K // (how.group_size or K))
        scale = torch.rand(shape, generator=random, device=self.device).mul_(0.4).add_(0.8)
        scale = scale.mul_(self._deviation(name) / spread).to(self.dtype)
        zero = None
        if not how.symmetric:
            zero = torch.randn(shape, generator=random, device=self.device).to(self.dtype) * scale
        return QuantizedTensor(qdata, scale, zero, how.bits, offset=8 if how.bits == 4 else 0)

    def fingerprint(self) -> str:
        """sha256 over what decides the values."""
        what = f"{self.config} {self.configs} {self.seed} {self.device.type} {self.dtype}"
        return hashlib.sha256(what.encode()).hexdigest()

    def _deviation(self, name: str) -> float:
        gain = 3.0 if name == HEAD else 1.0
        return gain * self._shapes[name][-1] ** -0.5

    def _generator(self, name: str) -> torch.Generator:
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        return torch.Generator(self.device).manual_seed(int.from_bytes(digest[:8], "little"))


def _blocks(tensor: Tensor) -> tuple[Tensor, ...]:
    """All rows, some at a time: views."""
    flat = tensor.view(-1, tensor.shape[-1])
    return flat.split(max(1, _BLOCK // tensor.shape[-1]))
