"""What a wrong reader makes of quantized weights: the same file, other values."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gemma4_impl.checkpoint import Weights
from gemma4_impl.config import TextConfig
from gemma4_impl.quant.tensor import QuantizedTensor

Change = Callable[[str, QuantizedTensor], QuantizedTensor]


class Misread:
    """Weights as a faulty reader finds them: quantized tensors changed by `quantized`, the others by `plain`."""

    def __init__(
        self,
        weights: Weights,
        quantized: Change = lambda name, tensor: tensor,
        plain: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor,
        config: TextConfig | None = None,
    ):
        self._weights, self._quantized, self._plain = weights, quantized, plain
        self.config = config or weights.config
        self.files = dict(weights.files)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._weights, name)

    def quantized(self, name: str) -> QuantizedTensor | None:
        tensor = self._weights.quantized(name)
        return None if tensor is None else self._quantized(name, tensor)

    def tensor(self, name: str) -> Tensor:
        tensor = self.quantized(name)
        return self._plain(name, self._weights.tensor(name)) if tensor is None else tensor.dequantize()

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.tensor(name)[start:stop]


def of_quantized(change: Callable[[QuantizedTensor], QuantizedTensor], bits: int | None = None) -> Any:
    """Every quantized tensor, or those of so many bits, is misread."""
    return lambda weights: Misread(
        weights, lambda name, tensor: change(tensor) if bits in (None, tensor.bits) else tensor
    )


def of_named(suffix: str, change: Callable[[Any], Any]) -> Any:
    """Tensors whose name ends so are misread."""

    def at(name: str, tensor: Any) -> Any:
        return change(tensor) if name.endswith(suffix) else tensor

    return lambda weights: Misread(weights, at, at)


def no_zero(tensor: QuantizedTensor) -> QuantizedTensor:
    return replace(tensor, zero=None)


def negative_zero(tensor: QuantizedTensor) -> QuantizedTensor:
    return replace(tensor, zero=None if tensor.zero is None else -tensor.zero)


def no_offset(tensor: QuantizedTensor) -> QuantizedTensor:
    return replace(tensor, offset=0)


def scales_in_bfloat16(tensor: QuantizedTensor) -> QuantizedTensor:
    return replace(tensor, scale=tensor.scale.bfloat16().float())


def nibbles_swapped(tensor: QuantizedTensor) -> QuantizedTensor:
    return replace(tensor, qdata=tensor.qdata << 4 | tensor.qdata >> 4)


def with_codes(tensor: QuantizedTensor, codes: Tensor) -> QuantizedTensor:
    """4-bit codes [..., N, K] in place of its own."""
    low, high = codes.unflatten(-1, (-1, 2)).unbind(-1)
    return replace(tensor, qdata=low | high << 4)


def halves_as_pairs(tensor: QuantizedTensor) -> QuantizedTensor:
    """A GGUF block keeps its first half in the low nibbles, its second in the high ones."""
    first, second = tensor.codes().unflatten(-1, (-1, 2, 16)).unbind(-2)
    return with_codes(tensor, torch.stack((first, second), dim=-1).flatten(-3))


def unsigned_nibbles(tensor: QuantizedTensor) -> QuantizedTensor:
    """torchao's nibbles are two's complement: read as 0..15, less 8."""
    return replace(tensor, qdata=tensor.qdata ^ 0x88)


def scale_transposed(tensor: QuantizedTensor) -> QuantizedTensor:
    """torchao's scales [K / G, N] are reshaped where they should be transposed."""

    def wrong(scale: Tensor) -> Tensor:
        return scale.transpose(-1, -2).reshape(scale.shape)

    return replace(tensor, scale=wrong(tensor.scale), zero=None if tensor.zero is None else wrong(tensor.zero))


def neighbours_scale(tensor: QuantizedTensor) -> QuantizedTensor:
    """The group that follows lends its scale, as where groups are counted from 1."""
    zero = None if tensor.zero is None else tensor.zero.roll(-1, dims=-1)
    return replace(tensor, scale=tensor.scale.roll(-1, dims=-1), zero=zero)


def padded_rows(tensor: QuantizedTensor) -> QuantizedTensor:
    """Rows are taken to be padded by 16 bytes, which the file does not do."""
    shape = tensor.qdata.shape
    at = torch.arange(shape[-2])[:, None] * (shape[-1] + 16) + torch.arange(shape[-1])
    flat = tensor.qdata.flatten(-2)
    return replace(tensor, qdata=flat[..., at.flatten() % flat.shape[-1]].view(shape))


def gate_and_up_swapped(tensor: QuantizedTensor) -> QuantizedTensor:
    def wrong(part: Tensor) -> Tensor:
        return torch.cat(part.chunk(2, dim=-2)[::-1], dim=-2)

    zero = None if tensor.zero is None else wrong(tensor.zero)
    return replace(tensor, qdata=wrong(tensor.qdata), scale=wrong(tensor.scale), zero=zero)


def llama_rows(rows: int, heads: int) -> Tensor:
    """The order in which llama.cpp's converter puts the rows of Llama's q and k: pairs instead of halves."""
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).flatten()


def permuted_as_llama(weights: Weights) -> Weights:
    config = weights.config

    def at(name: str, tensor: QuantizedTensor) -> QuantizedTensor:
        heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
        part = name.rpartition("self_attn.")[2].removesuffix("_proj.weight")
        if part not in heads:
            return tensor
        heads = heads[part] if part == "q" else config.layers[int(name.split(".")[1])].num_key_value_heads
        return tensor[llama_rows(tensor.shape[0], heads)]

    return Misread(weights, at)


def head_still_tied(weights: Weights) -> Weights:
    """The head's own tensor is overlooked, and the embedding used in its place."""
    wrong = Misread(weights, config=replace(weights.config, tie_word_embeddings=True))
    del wrong.files["lm_head.weight"]
    return wrong


def single_width(weights: Weights) -> Weights:
    """Of the feed-forward lengths by layer only the first is read."""
    return Misread(weights, config=replace(weights.config, use_double_wide_mlp=False))


def high_scale_bits_lost(weights: Weights) -> Weights:
    """Of the eight 6-bit scales and minimums in a Q4_K block the last four keep their two high bits elsewhere."""

    def at(name: str, tensor: QuantizedTensor) -> QuantizedTensor:
        (info,) = weights.stored(name)
        if info.type.name != "Q4_K":
            return tensor
        blocks = weights.gguf.bytes(info.name).unflatten(-1, (-1, 144))
        d, dmin = blocks[..., :4].contiguous().view(torch.float16).float().unbind(-1)
        packed = blocks[..., 4:16].to(torch.int64)
        scale = torch.cat((packed[..., :4] & 63, packed[..., 8:] & 15), dim=-1) * d[..., None]
        minimum = torch.cat((packed[..., 4:8] & 63, packed[..., 8:] >> 4), dim=-1) * dmin[..., None]
        return replace(tensor, scale=scale.flatten(-2), zero=-minimum.flatten(-2))

    return Misread(weights, at)
