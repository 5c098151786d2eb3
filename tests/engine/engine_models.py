"""What the engine's tests share: prompts, small configs with every feature, tiny checkpoints that come quantized."""

import dataclasses

import torch

from gemma4_impl.checkpoint import Checkpoint
from gemma4_impl.config import VARIANTS, TextConfig
from gemma4_impl.quant.quantize import quantize
from gemma4_impl.quant.recipe import QuantConfig
from gemma4_impl.quant.tensor import QuantizedTensor

NAMES = ("E2B", "E4B", "26B-A4B", "31B")
PROMPT = "The river starts as a thin line of water under the stones"
"""Longer than every tiny sliding window."""


def choose(name: str) -> QuantConfig | None:
    """Codes of four bits, some with a zero, and of eight; gate and up differ."""
    if name.startswith("embed_tokens") or name.endswith("k_proj.weight"):
        return QuantConfig(8, None)
    if name.endswith(("gate_proj.weight", "o_proj.weight")):
        return QuantConfig(4, 32, symmetric=False)
    if ".router." not in name and name.endswith(("_proj.weight", "_proj", "gate.weight", "projection.weight")):
        return QuantConfig(4, 32)
    return None


class Quantized(Checkpoint):
    """A dense checkpoint whose tensors are quantized when they are read."""

    def quantized(self, name: str) -> QuantizedTensor | None:
        how = choose(name)
        return None if how is None else quantize(super().tensor(name), how, torch.float32)

    def tensor(self, name: str) -> torch.Tensor:
        weight = self.quantized(name)
        return super().tensor(name) if weight is None else weight.dequantize()


def small(variant: str) -> TextConfig:
    """The released config with its pattern of layers, and everything else small."""
    config = VARIANTS[variant]
    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "global_head_dim": 32}
    sizes |= {"vocab_size_per_layer_input": 512, "sliding_window": 8, "max_position_embeddings": 512}
    if config.hidden_size_per_layer_input:
        sizes["hidden_size_per_layer_input"] = 64
    if config.enable_moe_block:
        sizes |= {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 64}
    return dataclasses.replace(config, **sizes)


def tokens(length: int, seed: int = 0, vocab: int = 512) -> torch.Tensor:
    """[length]; none of them is special."""
    return torch.randint(107, vocab, (length,), generator=torch.Generator().manual_seed(seed))
