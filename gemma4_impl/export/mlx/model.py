"""Gemma 4 as the MLX backend takes it whole: one forward for a chunk of any length, on MLX's rope, caches and SDPA."""

import copy
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemma4_impl import taps
from gemma4_impl.config import SLIDING, LayerConfig, RopeParameters
from gemma4_impl.export.mlx.bindings import import_mlx_backend
from gemma4_impl.export.source import quantized_weights
from gemma4_impl.model.decoder import KV, Attention, Gemma4
from gemma4_impl.model.moe import Experts, Router
from gemma4_impl.model.rope import inverse_frequencies
from gemma4_impl.quant.tensor import QuantizedTensor

HEADS_FIRST = ("self_attn.q", "self_attn.k", "self_attn.v")
"""Ends the names of the taps that are [B, N, T, H] here, not [B, T, N, H]."""


class MlxGemma4(nn.Module):
    """A `Gemma4` of batch 1 with its caches, which are buffers that `forward` writes.

    It shares the model's parameters, and leaves the model itself as it is. Raises ModuleNotFoundError without the MLX
    backend of executorch."""

    def __init__(self, model: Gemma4, max_seq_len: int, max_chunk: int):
        super().__init__()
        import_mlx_backend()
        config = model.config
        self.config, self.max_seq_len, self.max_chunk = config, max_seq_len, min(max_chunk, max_seq_len)
        # Chunks of up to max_chunk never overwrite a key that one of their own queries still needs.
        self.ring = min(max_seq_len, config.sliding_window - 1 + self.max_chunk)
        self.model = _share(model)
        rope_theta = {kind: float(rope.rope.rope_theta) for kind, rope in model.rope.items()}
        periods = {kind: _periods(rope.head_dim, rope.rope) for kind, rope in model.rope.items()}
        for layer in self.model.layers:
            slots = self.ring if layer.config.layer_type == SLIDING else max_seq_len
            kind = layer.config.layer_type
            layer.self_attn = MlxAttention(layer.self_attn, rope_theta[kind], periods[kind], slots, model.dtype)
            if layer.moe:
                layer.router, layer.experts = MlxRouter(layer.router), MlxExperts(layer.experts)
        self.eval()

    def reset(self) -> None:
        """Forgets everything; the next forward starts at position 0."""
        for _, buffer in self.caches():
            buffer.zero_()

    def caches(self) -> Iterator[tuple[str, Tensor]]:
        """Name and buffer [1, K, C, H] of each cache: keys and values of the layers that compute their own."""
        return ((name, buffer) for name, buffer in self.named_buffers() if name.endswith(("k_cache", "v_cache")))

    def forward(
        self, tokens: Tensor, input_pos: Tensor, embeds: Tensor | None = None, ends: Tensor | None = None
    ) -> Tensor:
        """tokens int64 [1, T], the position of the first as int64 [1] -> softcapped logits [1, 1, V] of the last.

        Positions go on from the last call. With images, soft tokens embeds [1, T, D] stand where ends, int64 [1, T], is
        not -1 but the last position that they may look at in sliding layers."""
        model, T = self.model, tokens.shape[1]
        start = input_pos[0].item()
        torch._check(start >= 0)
        torch._check(start + T <= self.max_seq_len)
        mask = self._ring_mask(input_pos, T, ends)

        if ends is not None:
            tokens = torch.where(ends >= 0, self.config.pad_token_id, tokens)
        x = model.embed_tokens(tokens)
        if ends is not None:
            x = torch.where((ends >= 0)[..., None], embeds, x)
        x = taps.tap("", "embed", x)
        per_layer_inputs = model.per_layer_inputs(tokens, x)
        kv: KV = {}
        for layer in model.layers:
            if layer.config.index == self.config.first_kv_shared_layer:
                # The caches are complete: only the last position still matters.
                x, start = x[:, T - 1 : T], start + T - 1
                per_layer_inputs = None if per_layer_inputs is None else per_layer_inputs[:, T - 1 : T]
                mask = mask[:, :, T - 1 : T]
            ple = None if per_layer_inputs is None else per_layer_inputs[:, :, layer.config.index]
            # What a layer hands on to its attention besides x: where x begins, and what to hide in a ring.
            x = layer(x, ple, start, mask, None, kv, None)
        if not self.config.num_kv_shared_layers:
            x = x[:, T - 1 : T]
        x = taps.tap("", "norm", model.norm(x))
        scores = model.lm_head(x)
        if (cap := self.config.final_logit_softcapping) is not None:
            scores = torch.tanh(scores / cap) * cap
        return taps.tap("", "logits", scores)

    def _ring_mask(self, input_pos: Tensor, length: int, ends: Tensor | None) -> Tensor:
        """bool [1, 1, T, C], True where a query may look: the slots' positions follow from the last one written."""
        queries = input_pos + torch.arange(length, dtype=torch.long)
        last = queries[length - 1 : length]
        # Kept above 0, where all remainders agree.
        age = torch.remainder(last + self.ring - torch.arange(self.ring, dtype=torch.long), self.ring)
        keys = last - age
        ago = queries[:, None] - keys
        seen = ago >= 0 if ends is None else keys <= torch.maximum(queries, ends[0])[:, None]
        return ((keys >= 0) & seen & (ago < self.config.sliding_window))[None, None]


class MlxAttention(nn.Module):
    """`Attention` on MLX's operators; keys and values are written to the caches [1, K, C, H] and read from there."""

    def __init__(self, attention: Attention, rope_theta: float, periods: Tensor | None, slots: int, dtype: torch.dtype):
        super().__init__()
        layer: LayerConfig = attention.config
        self.config, self.prefix, self.slots = layer, attention.prefix, slots
        for name, child in attention.named_children():
            self.add_module(name, child)
        self.sliding = layer.layer_type == SLIDING
        # MLX takes one or the other.
        self.rope_base = rope_theta if periods is None else 0.0
        self.register_buffer("periods", periods)
        if not layer.kv_shared:
            for name in ("k_cache", "v_cache"):
                self.register_buffer(
                    name, torch.zeros(1, layer.num_key_value_heads, slots, layer.head_dim, dtype=dtype)
                )

    def forward(self, x: Tensor, start: int, mask: Tensor, keys: None, kv: KV, cache: None) -> Tensor:
        """x [1, T, D] from position `start` on, mask [1, 1, T, C] of the ring -> [1, T, D]."""
        q = taps.tap(self.prefix, "q", self._rope(self._heads(self.q_norm, self.q_proj(x)), start))
        if not self.config.kv_shared:
            kv[self.config.index] = self._update(x, start)
        k, v = kv[self.config.kv_source]
        if self.sliding:
            # The operator reads the slots up to start + T: here all of them, which are in no order.
            out = torch.ops.mlx.custom_sdpa(q, k, v, self.slots - q.shape[2], mask, 0.0, False, 1.0)
        else:
            out = torch.ops.mlx.custom_sdpa(q, k, v, start, None, 0.0, True, 1.0)
        out = out.transpose(1, 2).flatten(2)
        return taps.tap(self.prefix, "out", self.o_proj(out))

    def _update(self, x: Tensor, start: int) -> tuple[Tensor, Tensor]:
        k = self.k_proj(x)
        v = k if self.config.k_eq_v else self.v_proj(x)
        k = taps.tap(self.prefix, "k", self._rope(self._heads(self.k_norm, k), start))
        v = taps.tap(self.prefix, "v", self._heads(self.v_norm, v))
        ring = self.slots if self.sliding else 0
        torch.ops.mlx.kv_cache_update(self.k_cache, k, start, ring)
        torch.ops.mlx.kv_cache_update(self.v_cache, v, start, ring)
        return self.k_cache, self.v_cache

    def _heads(self, norm: nn.Module, x: Tensor) -> Tensor:
        """x [1, T, N * H] -> [1, N, T, H], each head normed."""
        return norm(x.unflatten(-1, (-1, self.config.head_dim))).transpose(1, 2)

    def _rope(self, x: Tensor, start: int) -> Tensor:
        return torch.ops.mlx.rope(x, self.config.head_dim, start, False, self.rope_base, 1.0, self.periods)


class MlxRouter(nn.Module):
    """`Router` without a gather, which MLX's backend has no operator for: the largest values are the chosen ones."""

    def __init__(self, router: Router):
        super().__init__()
        self.inner = router

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As `Router.forward`, the experts as int32."""
        probs, index = self.inner.probabilities(x).topk(self.inner.top_k)
        # A node of its own also for the tap: the outputs of topk are parts of one.
        index = taps.route(self.inner.prefix, index.to(torch.int32))
        return self.inner.weigh(probs, index), index


class MlxExperts(nn.Module):
    """`Experts` on MLX's matrix products with gathered weights: each token meets its own k experts only."""

    def __init__(self, experts: Experts):
        super().__init__()
        self.gate_up_proj, self.down_proj = experts.gate_up_proj, experts.down_proj
        self.quantized = dict(getattr(experts, "quantized", {}))
        self.held: dict[str, tuple[int, int]] = {}

    def hold(self, leaf: str, weight: QuantizedTensor, scale: Tensor, zero: Tensor) -> None:
        """Makes `weight` [E, N, K] the experts' `leaf`; scale and zero are [E, N, K / G] of its signed codes."""
        delattr(self, leaf)
        for name, tensor in {"codes": weight.qdata, "scale": scale, "zero": zero}.items():
            self.register_buffer(f"{leaf}_{name}", tensor)
        self.held[leaf] = weight.bits, weight.shape[-1] // scale.shape[-1]

    def forward(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        """x [1, T, D], weights and int32 index [1, T, k] -> [1, T, D]."""
        index = index[0]
        gate_up = self._product(x[0][:, None, None], "gate_up_proj", index)
        gate, up = gate_up.chunk(2, dim=-1)
        y = self._product(F.gelu(gate, approximate="tanh") * up, "down_proj", index)
        y = (y[:, :, 0] * weights[0][..., None]).sum(dim=1)
        return y.type_as(x)[None]

    def _product(self, x: Tensor, leaf: str, index: Tensor) -> Tensor:
        """x [T, 1 or k, 1, K], index [T, k] -> [T, k, 1, N], by the weight [E, N, K]."""
        if leaf not in self.held:
            return torch.ops.mlx.gather_mm(x, getattr(self, leaf).transpose(1, 2), index)
        bits, group = self.held[leaf]
        codes, scale, zero = (self.get_buffer(f"{leaf}_{name}") for name in ("codes", "scale", "zero"))
        return torch.ops.mlx.gather_qmm(x, codes, scale, zero, index, None, True, group, bits)


def _periods(head_dim: int, rope: RopeParameters) -> Tensor | None:
    """[H / 2] float32, what MLX divides a position by; None if it can compute them. A pair that does not rotate has an
    infinite one."""
    frequencies = inverse_frequencies(head_dim, rope)
    return (1 / frequencies).float() if bool((frequencies == 0).any()) else None


def _share(model: Gemma4) -> Gemma4:
    """The same modules anew, on the same parameters, buffers and quantized weights."""
    tensors = [*model.parameters(), *model.buffers(), *quantized_weights(model).values()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
