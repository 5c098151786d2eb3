"""The Gemma 4 text decoder in Flax NNX, all variants; read it top to bottom: model, layer, attention, MLP, mask."""

import operator
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from gemma4_impl import taps
from gemma4_impl.config import SLIDING, LayerConfig, TextConfig
from gemma4_impl.nnx import elementary
from gemma4_impl.nnx.cache import KVCache, write
from gemma4_impl.nnx.layers import Linear, Make, RMSNorm, at_least_float32, attend, gated, gelu, param, scaled
from gemma4_impl.nnx.moe import Experts, Router
from gemma4_impl.nnx.rope import apply_rotary, inverse_frequencies, rotary_angles
from gemma4_impl.nnx.sharding import FSDP, TP, constrain, spread_rows

if TYPE_CHECKING:
    from gemma4_impl.nnx.soft_tokens import SoftTokens

KV = tuple[Array, Array]
"""Keys and values [B, S, K, H] that a layer attends to."""


class Gemma4(nnx.Module):
    """Gemma 4's text model. Parameters carry the checkpoint's names and shapes (`layers.0.self_attn.q_proj.weight`).

    Args:
        dtype: computed in. The embedding's scale is rounded to it, as the model was trained.
        param_dtype: of the parameters, which are cast where they are used.
        remat: compute each layer's activations again in the backward pass instead of keeping them.
    """

    def __init__(
        self,
        config: TextConfig,
        *,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        make = Make(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.config, self.dtype, self.remat = config, jnp.dtype(dtype), remat
        D, ple = config.hidden_size, config.hidden_size_per_layer_input
        self.embed_tokens = ScaledEmbedding(make, config.vocab_size, D)
        if ple:
            packed = config.num_hidden_layers * ple
            self.embed_tokens_per_layer = ScaledEmbedding(make, config.vocab_size_per_layer_input, packed, ple)
            self.per_layer_model_projection = Linear(make, D, packed, (TP, FSDP))
            self.per_layer_projection_norm = RMSNorm(make, ple, config.rms_norm_eps)
        self.layers = nnx.List([DecoderLayer(make, config, layer) for layer in config.layers])
        self.norm = RMSNorm(make, D, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(make, D, config.vocab_size, (TP, FSDP))

    def __call__(
        self,
        tokens: Array,
        positions: Array | None = None,
        cache: KVCache | None = None,
        logits: Literal["all", "last", "none"] = "all",
        images: "SoftTokens | None" = None,
        mask: dict[str, Array] | None = None,
    ) -> tuple[Array | None, KVCache | None]:
        """tokens int32 [B, T] -> logits [B, T, V], softcapped, at least float32; and the cache, if one was given.

        Args:
            positions: int32 [B, T]; -1 marks padding, on either side. Default: no padding, from where the cache ends.
            cache: read and appended to, in the returned copy. What it cannot hold is the caller's to check.
            logits: "last" gives [B, 1, V] of each row's last token and sends only that one through the KV-shared
                layers; "none" stops after the last layer that fills the cache, and returns None.
            images: what stands in the place of tokens; a block of bidirectional ones must be fed whole.
            mask: layer type -> bool [B, 1, T, S] in the place of the model's own.
        """
        config = self.config
        if positions is None:
            T = tokens.shape[1]
            positions = jnp.broadcast_to(jnp.arange(T), tokens.shape) if cache is None else cache.next_positions(T)
        taps.at(positions)

        # 1. Embeddings
        if images is not None:
            tokens = jnp.where(images.mask, config.pad_token_id, tokens)
        x = self.embed_tokens(tokens)
        if images is not None:
            x = jnp.where(images.mask[..., None], images.embeds.astype(x.dtype), x)
        x = taps.tap("", "embed", spread_rows(x))
        ple = self.per_layer_inputs(tokens, x)

        # 2. What each layer type attends to
        kinds = dict.fromkeys(config.layer_types)
        slots: dict[str, Array] = {}
        if cache is not None:
            cache, slots = cache.reserve(positions)
        keys = dict.fromkeys(kinds, positions) if cache is None else cache.positions
        mask = mask or {kind: self._mask(kind, positions, keys[kind], images) for kind in kinds}
        rotary = {kind: self._rotary(kind, positions) for kind in kinds}

        # 3. Layers
        kv: dict[int, KV] = {}
        run = nnx.remat(operator.call) if self.remat else operator.call
        for layer in self.layers:
            index, kind = layer.config.index, layer.config.layer_type
            if index == config.first_kv_shared_layer and logits != "all":
                if logits == "none":
                    break
                if x.shape[1] > 1:
                    # The cache is complete: only the last position still matters.
                    x, ple, positions, mask, rotary = _last_only(positions, x, ple, mask, rotary)
                    taps.at(positions)
            held = kv[layer.config.kv_source] if layer.config.kv_shared else cache and cache.layers[index]
            own = None if ple is None else ple[:, :, index]
            x, kv[index] = run(layer, x, own, rotary[kind], mask[kind], held, slots.get(kind))
            x = spread_rows(x)
        if cache is not None:
            cache = KVCache(cache.lengths, cache.positions, {index: kv[index] for index in cache.layers})

        # 4. Logits
        if logits == "none":
            return None, cache
        if logits == "last" and x.shape[1] > 1:
            last = positions.argmax(axis=1)
            x, positions = _rows(x, last), _rows(positions, last)
            taps.at(positions)
        x = taps.tap("", "norm", self.norm(x))
        scores = self.embed_tokens.attend(x) if config.tie_word_embeddings else self.lm_head(x)
        scores = at_least_float32(scores)
        if (cap := config.final_logit_softcapping) is not None:
            scores = elementary.tanh(elementary.divide(scores, cap)) * cap
        return taps.tap("", "logits", scores), cache

    def per_layer_inputs(self, tokens: Array, embed: Array) -> Array | None:
        """Token-identity and context parts of the per-layer inputs, [B, T, L, ple]; None without PLE."""
        if not self.config.hidden_size_per_layer_input:
            return None
        shape = (*tokens.shape, self.config.num_hidden_layers, self.config.hidden_size_per_layer_input)
        context = self.per_layer_model_projection(embed) * self.config.hidden_size**-0.5
        # Spread by rows first: no device could keep its part of the columns, which layers are then cut out of.
        context = self.per_layer_projection_norm(spread_rows(context).reshape(shape))
        identity = spread_rows(self.embed_tokens_per_layer(tokens)).reshape(shape)
        return taps.tap("", "per_layer_inputs", (context + identity) * 2**-0.5)

    def _mask(self, kind: str, positions: Array, keys: Array, images: "SoftTokens | None") -> Array:
        if kind != SLIDING:
            return attention_mask(positions, keys, None)
        ends = None if images is None or not images.bidirectional else images.ends(positions)
        return attention_mask(positions, keys, self.config.sliding_window, ends)

    def _rotary(self, kind: str, positions: Array) -> tuple[Array, Array]:
        head_dim = self.config.head_dim if kind == SLIDING else self.config.global_head_dim
        frequencies = inverse_frequencies(head_dim, self.config.rope_parameters[kind])
        return rotary_angles(positions, frequencies, self.dtype)


class DecoderLayer(nnx.Module):
    """Attention, then MLP (and experts), then the per-layer input; sandwich norms around each."""

    def __init__(self, make: Make, config: TextConfig, layer: LayerConfig):
        self.config, self.prefix, self.moe = layer, f"layers.{layer.index}.", config.enable_moe_block
        D, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(make, config, layer)
        self.mlp = MLP(make, D, layer.intermediate_size)
        self.input_layernorm = RMSNorm(make, D, eps)
        self.post_attention_layernorm = RMSNorm(make, D, eps)
        self.pre_feedforward_layernorm = RMSNorm(make, D, eps)
        self.post_feedforward_layernorm = RMSNorm(make, D, eps)
        if self.moe:
            self.router = Router(make, config, self.prefix)
            self.experts = Experts(make, config)
            self.post_feedforward_layernorm_1 = RMSNorm(make, D, eps)
            self.post_feedforward_layernorm_2 = RMSNorm(make, D, eps)
            self.pre_feedforward_layernorm_2 = RMSNorm(make, D, eps)
        if ple := config.hidden_size_per_layer_input:
            self.per_layer_input_gate = Linear(make, D, ple, (None, FSDP))
            self.per_layer_projection = Linear(make, ple, D, (FSDP, None))
            self.post_per_layer_input_norm = RMSNorm(make, D, eps)
        self.layer_scalar = param(make, (1,), (None,))

    def __call__(
        self,
        x: Array,
        ple: Array | None,
        rotary: tuple[Array, Array],
        mask: Array,
        held: KV | None,
        slots: Array | None,
    ) -> tuple[Array, KV]:
        """x [B, T, D], ple [B, T, ple] -> [B, T, D], and what was attended to: `held` as a KV-shared layer is given
        it, or the cache with the new keys and values written to its `slots`."""
        # 1. Attention
        h, kv = self.self_attn(self.input_layernorm(x), rotary, mask, held, slots)
        x = taps.tap(self.prefix, "resid_mid", x + self.post_attention_layernorm(h))
        # 2. MLP and experts
        x = taps.tap(self.prefix, "resid_mlp", x + self.post_feedforward_layernorm(self.feed_forward(x)))
        # 3. Per-layer input
        if ple is not None:
            h = self.per_layer_projection((gelu(self.per_layer_input_gate(x)) * ple).astype(x.dtype))
            x = taps.tap(self.prefix, "resid_ple", x + self.post_per_layer_input_norm(h))
        # 4. Scale
        return taps.tap(self.prefix, "out", scaled(x, self.layer_scalar[...])), kv

    def feed_forward(self, x: Array) -> Array:
        """The dense branch plus, with MoE, the sparse one; the router reads the residual itself."""
        h = taps.tap(self.prefix, "mlp", self.mlp(self.pre_feedforward_layernorm(x)))
        if not self.moe:
            return h
        weights, index = self.router(x)
        sparse = self.experts(self.pre_feedforward_layernorm_2(x), weights, index)
        sparse = taps.tap(self.prefix, "experts", sparse)
        return self.post_feedforward_layernorm_1(h) + self.post_feedforward_layernorm_2(sparse)


class Attention(nnx.Module):
    """Grouped-query attention with normed queries, keys and values."""

    def __init__(self, make: Make, config: TextConfig, layer: LayerConfig):
        self.config, self.prefix = layer, f"layers.{layer.index}.self_attn."
        D, H, eps = config.hidden_size, layer.head_dim, config.rms_norm_eps
        N, K = config.num_attention_heads, layer.num_key_value_heads
        self.q_proj = Linear(make, D, N * H, (TP, FSDP), (N, D))
        self.q_norm = RMSNorm(make, H, eps)
        if not layer.kv_shared:
            self.k_proj = Linear(make, D, K * H, (TP, FSDP), (K, D))
            self.k_norm = RMSNorm(make, H, eps)
            if not layer.k_eq_v:
                self.v_proj = Linear(make, D, K * H, (TP, FSDP), (K, D))
            self.v_norm = RMSNorm(make, H, eps, with_scale=False)
        self.o_proj = Linear(make, N * H, D, (FSDP, TP), (D, N))

    def __call__(
        self, x: Array, rotary: tuple[Array, Array], mask: Array, held: KV | None, slots: Array | None
    ) -> tuple[Array, KV]:
        """x [B, T, D] -> [B, T, D] and the keys and values attended to, see `DecoderLayer`."""
        q = apply_rotary(self.q_norm(self._heads(self.q_proj(x))), *rotary)
        q = taps.tap(self.prefix, "q", q)
        if self.config.kv_shared:
            kv = held
        else:
            new = self.project_kv(x, rotary)
            kv = new if held is None else write(held, slots, *new)
        out = attend(q, *kv, mask)
        return taps.tap(self.prefix, "out", self.o_proj(out.reshape(*x.shape[:2], -1))), kv

    def project_kv(self, x: Array, rotary: tuple[Array, Array]) -> KV:
        """x [B, T, D] -> normed and rotated k, normed v [B, T, K, H]; with k_eq_v, v starts from the un-normed k."""
        k = self._heads(self.k_proj(x))
        v = k if self.config.k_eq_v else self._heads(self.v_proj(x))
        k = taps.tap(self.prefix, "k", apply_rotary(self.k_norm(k), *rotary))
        return k, taps.tap(self.prefix, "v", self.v_norm(v))

    def _heads(self, x: Array) -> Array:
        return constrain(x.reshape(*x.shape[:2], -1, self.config.head_dim), FSDP, None, TP, None)


class MLP(nnx.Module):
    """down(gelu_tanh(gate(x)) * up(x))."""

    def __init__(self, make: Make, hidden_size: int, intermediate_size: int):
        self.gate_proj = Linear(make, hidden_size, intermediate_size, (TP, FSDP))
        self.up_proj = Linear(make, hidden_size, intermediate_size, (TP, FSDP))
        self.down_proj = Linear(make, intermediate_size, hidden_size, (FSDP, TP))

    def __call__(self, x: Array) -> Array:
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))


class ScaledEmbedding(nnx.Module):
    """Rows times sqrt(width), where that scale is first rounded to the dtype computed in."""

    def __init__(self, make: Make, num_embeddings: int, features: int, width: int | None = None):
        self.dtype = make["dtype"]
        self.scale = float(np.asarray((width or features) ** 0.5).astype(self.dtype))
        init = nnx.initializers.normal(features**-0.5)
        self.weight = param(make, (num_embeddings, features), (TP, FSDP), init)

    def __call__(self, tokens: Array) -> Array:
        return self.weight[...][tokens].astype(self.dtype) * self.scale

    def attend(self, x: Array) -> Array:
        """x [..., D] -> logits [..., V] of a head tied to this table, at least float32."""
        wide = jnp.promote_types(self.dtype, jnp.float32)
        return jnp.einsum("...d,vd->...v", x, self.weight[...].astype(self.dtype), preferred_element_type=wide)


def attention_mask(queries: Array, keys: Array, window: int | None, ends: Array | None = None) -> Array:
    """Positions of queries [B, T] and keys [B, S] -> bool [B, 1, T, S], True where a query may look.

    A query sees keys at its own position and before, or up to `ends` [B, T]; of those before it the last `window`,
    itself included, if given. A padded query sees everything, for a softmax over nothing is NaN."""
    q, k = queries[:, None, :, None], keys[:, None, None, :]
    visible = (k <= (q if ends is None else ends[:, None, :, None])) & (k >= 0)
    if window is not None:
        visible &= k > q - window
    return visible | (q < 0)


def _rows(x: Array, index: Array) -> Array:
    """x [B, T, ...], index [B] -> [B, 1, ...]; row by row, so that no device needs another's rows."""
    return jax.vmap(lambda row, i: row[i])(x, index)[:, None]


def _last_only(positions: Array, x: Array, ple: Array | None, mask: dict, rotary: dict) -> tuple:
    """Everything that the remaining layers take, at each row's last position only."""
    last = positions.argmax(axis=1)
    masks = {kind: jnp.swapaxes(_rows(jnp.swapaxes(m, 1, 2), last), 1, 2) for kind, m in mask.items()}
    turned = {kind: (_rows(cos, last), _rows(sin, last)) for kind, (cos, sin) in rotary.items()}
    return _rows(x, last), None if ple is None else _rows(ple, last), _rows(positions, last), masks, turned
