"""A prompt into the caches, in chunks, one row after the other; what follows is the last token's logits alone."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma4_impl.engine import attention
from gemma4_impl.engine.model import Layer, MoE, PackedModel
from gemma4_impl.engine.step import add_experts, per_layer_inputs, route
from gemma4_impl.kernels import steps
from gemma4_impl.model.cache import KVCache
from gemma4_impl.model.soft_tokens import SoftTokens
from gemma4_impl.quant.packed import PackedWeight


@torch.inference_mode()
def prefill(
    model: PackedModel, tokens: Tensor, cache: KVCache, row: int, start: int = 0, images: SoftTokens | None = None
) -> Tensor:
    """tokens [T] at positions start, start + 1, ... of row `row` of the cache -> logits [V] of the last one, float32.

    No chunk ends inside an image that is seen both ways. Raises ValueError for what does not fit, and for an image that
    is longer than a chunk."""
    T, C = len(tokens), cache.max_chunk
    if start + T > cache.max_seq_len:
        raise ValueError(f"position {start + T - 1} is past the end of the cache (max_seq_len = {cache.max_seq_len})")
    parts = [slice(i, min(i + C, T)) for i in range(0, T, C)] if images is None else images.chunks(C)
    logits = None
    for part in parts:
        soft = None if images is None else images[part]
        logits = _chunk(model, tokens[part], cache, row, start + part.start, soft, last=part is parts[-1])
    return logits


def _chunk(
    model: PackedModel, tokens: Tensor, cache: KVCache, row: int, start: int, images: SoftTokens | None, last: bool
) -> Tensor | None:
    config, eps = model.config, model.config.rms_norm_eps
    chunk = _Chunk(model, cache, row, start, len(tokens), images)
    shown = tokens if images is None else tokens.masked_fill(images.mask[0], config.pad_token_id)
    x, ple = model.embed(shown), None
    if images is not None:
        x = torch.where(images.mask[0, :, None], images.embeds[0], x)
    if config.hidden_size_per_layer_input:
        ple = per_layer_inputs(model, model.per_layer_model_projection.product(x), shown)
    normed = steps.norm(x, model.layers[0].input_layernorm, eps)
    for layer, following in itertools.zip_longest(model.layers, model.layers[1:]):
        if layer.config.index == config.first_kv_shared_layer:
            # The cache is complete: only the last position still matters.
            if not last:
                return None
            x, normed, ple = (None if t is None else t[-1:] for t in (x, normed, ple))
        queries = len(x) if following is not None else int(last)
        h = chunk.attention(layer, normed, queries)
        if h is None:
            return None
        x, ple = x[-queries:], None if ple is None else ple[-queries:]
        x, normed = steps.add_norm(h, x, layer.post_attention_layernorm, None, layer.pre_feedforward_layernorm, eps)
        h = _feed_forward(model, layer, x, normed)
        then = model.norm if following is None else following.input_layernorm
        if ple is None:
            x, normed = steps.add_norm(h, x, layer.post_feedforward_layernorm, layer.layer_scalar, then, eps)
        else:
            x, _ = steps.add_norm(h, x, layer.post_feedforward_layernorm, None, None, eps)
            h = F.gelu(layer.ple.gate.product(x), approximate="tanh") * ple[:, layer.config.index]
            h = layer.ple.projection.product(h)
            x, normed = steps.add_norm(h, x, layer.ple.norm, layer.layer_scalar, then, eps)
    logits = torch.empty(1, config.vocab_size, dtype=torch.float32, device=model.device)
    model.lm_head(normed, logits, softcap=config.final_logit_softcapping)
    return logits[0]


class _Chunk:
    """T positions of one row from `start` on: where they are in the caches, how they turn, how far they look."""

    def __init__(
        self, model: PackedModel, cache: KVCache, row: int, start: int, length: int, images: SoftTokens | None
    ):
        self.model, self.cache, self.row, self.start, self.stop = model, cache, row, start, start + length
        positions = torch.arange(start, self.stop, device=model.device)[None]
        self.rotary = {kind: rope(positions) for kind, rope in model.rope.items()}
        self.slots = {kind: positions % capacity for kind, capacity in cache.capacity.items()}
        self.ends = images.ends(positions)[0] if images is not None and images.bidirectional else None

    def attention(self, layer: Layer, x: Tensor, queries: int) -> Tensor | None:
        """x [T, D], normed, or the last of them in a KV-shared layer -> [queries, D] of the last of them; None for no
        queries. Keys and values of all go into the caches."""
        config, T, row = layer.config, len(x), self.row
        qkv = layer.qkv.product(x)[None]
        caches = [getattr(self.cache, f"layers_{config.kv_source}_{name}")[row : row + 1] for name in "kv"]
        cos, sin = (t[:, -T:] for t in self.rotary[config.layer_type])
        slots = self.slots[config.layer_type]
        eps = self.model.config.rms_norm_eps
        q = attention.prepare(qkv, layer.q_norm, layer.k_norm, *caches, cos, sin, slots, config.k_eq_v, eps)
        if not queries:
            return None
        window = self.model.config.sliding_window if config.is_sliding else None
        first = 0 if window is None else max(0, self.stop - T - window + 1)
        k, v = (attention.read(cache[0], first, self.stop) for cache in caches)
        ends = self.ends[-queries:] - first if config.is_sliding and self.ends is not None else None
        out = attention.prefill(q[0, -queries:], k, v, window, ends)
        return layer.o_proj.product(out.flatten(1))


def _feed_forward(model: PackedModel, layer: Layer, x: Tensor, normed: Tensor) -> Tensor:
    """x [T, D], the residual, and normed -> [T, D]."""
    eps, moe = model.config.rms_norm_eps, layer.moe
    h = layer.down_proj.product(layer.gate_up.product(normed))
    if moe is not None:
        weights, index = route(moe, x, model.config.top_k_experts, eps)
        add_experts(moe, h, _experts(moe, steps.norm(x, moe.pre_norm, eps), weights, index), eps)
    return h


def _experts(moe: MoE, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
    """x [T, D], weights and index [T, k] -> [T, D]; tokens are sorted by expert, so that each is one product."""
    k, flat = index.shape[1], index.flatten()
    order = flat.argsort(stable=True)
    token = order // k
    counts = flat.bincount(minlength=len(moe.router)).tolist()
    out = torch.zeros(x.shape, dtype=weights.dtype, device=x.device)
    for e, (rows, at) in enumerate(zip(token.split(counts), order.split(counts), strict=True)):
        if len(rows):
            y = _matrix(moe.down, steps.gelu_mul(_matrix(moe.gate_up, x[rows], e)), e)
            out.index_add_(0, rows, y * weights.flatten()[at, None])
    return out.type_as(x)


def _matrix(weight: Tensor | PackedWeight, x: Tensor, expert: int) -> Tensor:
    return weight.linear(x, expert) if isinstance(weight, PackedWeight) else F.linear(x, weight[expert])
