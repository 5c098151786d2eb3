"""The Gemma 4 text decoder, all variants; read it top to bottom: model, layer, attention, MLP, norm, embedding."""

from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemma4_impl import taps
from gemma4_impl.checkpoint import Weights, load_into, open_checkpoint
from gemma4_impl.config import SLIDING, LayerConfig, TextConfig
from gemma4_impl.model.cache import Keys, KVCache
from gemma4_impl.model.moe import Experts, Router
from gemma4_impl.model.rope import RotaryEmbedding, apply_rotary
from gemma4_impl.model.soft_tokens import SoftTokens

KV = dict[int, tuple[Tensor, Tensor]]
"""Keys and values [B, K, S, H] of the layers run so far, for the KV-shared layers that read them."""


class Gemma4(nn.Module):
    """Gemma 4's text model. Parameters carry the checkpoint's names (`layers.0.self_attn.q_proj.weight`)."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        D, ple = config.hidden_size, config.hidden_size_per_layer_input
        self.embed_tokens = ScaledEmbedding(config.vocab_size, D, scale=D**0.5)
        if ple:
            packed = config.num_hidden_layers * ple
            self.embed_tokens_per_layer = ScaledEmbedding(config.vocab_size_per_layer_input, packed, scale=ple**0.5)
            self.per_layer_model_projection = nn.Linear(D, packed, bias=False)
            self.per_layer_projection_norm = RMSNorm(ple, config.rms_norm_eps)
        self.rope = nn.ModuleDict()
        for layer in config.layers:
            if layer.layer_type not in self.rope:
                rope = config.rope_parameters[layer.layer_type]
                self.rope[layer.layer_type] = RotaryEmbedding(layer.head_dim, rope)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in config.layers)
        self.norm = RMSNorm(D, config.rms_norm_eps)
        self.lm_head = nn.Linear(D, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        progress: bool = False,
    ) -> "Gemma4":
        """Loads what `open_checkpoint` opens, tensor by tensor: peak memory is the model plus its largest tensor.

        `dtype` defaults to the checkpoint's own. Raises as `open_checkpoint` and `load_into` do."""
        return cls.from_weights(open_checkpoint(path), dtype, device, progress)

    @classmethod
    def from_weights(
        cls,
        checkpoint: Weights,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        progress: bool = False,
    ) -> "Gemma4":
        """`from_pretrained` of weights that are already open."""
        device = torch.device(device)
        with torch.device("meta"):
            model = cls(checkpoint.config)
        dtype = dtype or checkpoint.dtype
        load_into(model, checkpoint, dtype, device, progress)
        for rope in model.rope.values():
            rope.reset(dtype, device)
        return model.eval()

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    def make_cache(self, batch_size: int = 1, max_seq_len: int = 4096, max_chunk: int = 512) -> KVCache:
        """An empty cache for `batch_size` rows of up to `max_seq_len` tokens, fed at most `max_chunk` at a time."""
        return KVCache(self.config, batch_size, max_seq_len, max_chunk, self.dtype, self.device)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        logits: Literal["all", "last", "none"] = "all",
        images: SoftTokens | None = None,
    ) -> Tensor | None:
        """tokens [B, T] -> logits [B, T, V], softcapped, in the model's dtype.

        Args:
            positions: [B, T] absolute positions; -1 marks padding, on either side. Default: no padding, starting
                where the cache ends, or at 0.
            cache: read and appended to. Rows of different lengths are fine.
            logits: "last" gives [B, 1, V] of each row's last token and sends only that one through the KV-shared
                layers; "none" stops after the last layer that fills the cache, and returns None.
            images: what stands in the place of tokens; a block of bidirectional ones must be fed whole.
        Raises ValueError for a token id outside the vocabulary, shapes that do not match, or what the cache refuses.
        """
        config = self.config
        self._check_inputs(tokens, positions, cache)
        unpadded = positions is None
        start = 0
        if positions is None:
            if cache is not None:
                start = max(cache.lengths)
                positions = cache.next_positions(tokens.shape[1])
            else:
                positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        taps.at(positions)

        # 1. Embeddings
        if images is not None:
            tokens = tokens.masked_fill(images.mask, config.pad_token_id)
        x = self.embed_tokens(tokens)
        if images is not None:
            x = torch.where(images.mask[..., None], images.embeds, x)
        x = taps.tap("", "embed", x)
        per_layer_inputs = self.per_layer_inputs(tokens, x)

        # 2. What each layer type attends to
        if cache is not None:
            keys = cache.reserve(positions, unpadded)
        else:
            keys = {kind: Keys(positions, None, unpadded) for kind in self.rope}
        causal_from = start if unpadded else None
        masks = {kind: self._mask(kind, positions, keys[kind], causal_from, images) for kind in self.rope}
        masks = {kind: _additive(mask, x.dtype) for kind, mask in masks.items()}
        rotary = {kind: rope(positions) for kind, rope in self.rope.items()}

        # 3. Layers
        kv: KV = {}
        for layer in self.layers:
            if layer.config.index == config.first_kv_shared_layer and logits != "all":
                if logits == "none":
                    return None
                # The cache is complete: only the last position still matters.
                last = positions.argmax(dim=1)
                x, per_layer_inputs, masks, rotary = _select(last, x, per_layer_inputs, masks, rotary)
                positions = positions.gather(1, last[:, None])
                taps.at(positions)
            kind = layer.config.layer_type
            ple = None if per_layer_inputs is None else per_layer_inputs[:, :, layer.config.index]
            x = layer(x, ple, rotary[kind], masks[kind], keys[kind], kv, cache)

        # 4. Logits
        if logits == "none":
            return None
        if logits == "last" and x.shape[1] > 1:
            last = positions.argmax(dim=1)
            x = _rows(x, last)
            taps.at(positions.gather(1, last[:, None]))
        x = taps.tap("", "norm", self.norm(x))
        scores = self.lm_head(x)
        if (cap := config.final_logit_softcapping) is not None:
            scores = torch.tanh(scores / cap) * cap
        return taps.tap("", "logits", scores)

    def per_layer_inputs(self, tokens: Tensor, embed: Tensor) -> Tensor | None:
        """Token-identity and context parts of the per-layer inputs, [B, T, L, ple]; None without PLE."""
        if not self.config.hidden_size_per_layer_input:
            return None
        shape = (*tokens.shape, self.config.num_hidden_layers, self.config.hidden_size_per_layer_input)
        context = self.per_layer_model_projection(embed) * self.config.hidden_size**-0.5
        context = self.per_layer_projection_norm(context.view(shape))
        identity = self.embed_tokens_per_layer(tokens).view(shape)
        return taps.tap("", "per_layer_inputs", (context + identity) * 2**-0.5)

    def _mask(
        self, kind: str, positions: Tensor, keys: Keys, start: int | None, images: SoftTokens | None
    ) -> Tensor | Literal["causal"] | None:
        """What to hide: nothing (None), the future of a square chunk ("causal"), or a mask [B, 1, T, S]."""
        T = positions.shape[1]
        window = self.config.sliding_window if kind == SLIDING else None
        if images is not None and images.bidirectional and kind == SLIDING:
            return attention_mask(positions, keys.positions, window, images.ends(positions))
        if keys.contiguous and start is not None and (window is None or start + T <= window):
            if T == 1:
                return None
            if start == 0:
                return "causal"
        return attention_mask(positions, keys.positions, window)

    def _check_inputs(self, tokens: Tensor, positions: Tensor | None, cache: KVCache | None) -> None:
        if tokens.dim() != 2 or 0 in tokens.shape:
            raise ValueError(f"tokens must be [B, T] with B and T >= 1, got shape {tuple(tokens.shape)}")
        if positions is not None and (positions.shape != tokens.shape or positions.dtype != torch.long):
            got = f"{tuple(positions.shape)} {positions.dtype}"
            raise ValueError(f"positions must be int64 of the tokens' shape {tuple(tokens.shape)}, got {got}")
        if cache is not None and tokens.shape[0] != cache.batch_size:
            raise ValueError(f"batch of {tokens.shape[0]} rows, but the cache was made for {cache.batch_size}")
        if torch.compiler.is_compiling() or tokens.device.type != "cpu":
            return
        low, high = (int(t) for t in tokens.aminmax())
        if low < 0 or high >= self.config.vocab_size:
            wrong = low if low < 0 else high
            raise ValueError(f"token id {wrong} is outside the vocabulary of {self.config.vocab_size}")


class DecoderLayer(nn.Module):
    """Attention, then MLP (and experts), then the per-layer input; sandwich norms around each."""

    layer_scalar: Tensor

    def __init__(self, config: TextConfig, layer: LayerConfig):
        super().__init__()
        self.config, self.prefix = layer, f"layers.{layer.index}."
        D, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(D, layer.intermediate_size)
        self.input_layernorm = RMSNorm(D, eps)
        self.post_attention_layernorm = RMSNorm(D, eps)
        self.pre_feedforward_layernorm = RMSNorm(D, eps)
        self.post_feedforward_layernorm = RMSNorm(D, eps)
        self.moe = config.enable_moe_block
        if self.moe:
            self.router = Router(config, self.prefix)
            self.experts = Experts(config)
            self.post_feedforward_layernorm_1 = RMSNorm(D, eps)
            self.post_feedforward_layernorm_2 = RMSNorm(D, eps)
            self.pre_feedforward_layernorm_2 = RMSNorm(D, eps)
        if ple := config.hidden_size_per_layer_input:
            self.per_layer_input_gate = nn.Linear(D, ple, bias=False)
            self.per_layer_projection = nn.Linear(ple, D, bias=False)
            self.post_per_layer_input_norm = RMSNorm(D, eps)
        self.register_buffer("layer_scalar", torch.ones(1))

    def forward(
        self,
        x: Tensor,
        ple: Tensor | None,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | str | None,
        keys: Keys,
        kv: KV,
        cache: KVCache | None,
    ) -> Tensor:
        """x [B, T, D], ple [B, T, ple] -> [B, T, D]."""
        # 1. Attention
        h = self.self_attn(self.input_layernorm(x), rotary, mask, keys, kv, cache)
        x = taps.tap(self.prefix, "resid_mid", x + self.post_attention_layernorm(h))
        # 2. MLP and experts
        x = taps.tap(self.prefix, "resid_mlp", x + self.post_feedforward_layernorm(self.feed_forward(x)))
        # 3. Per-layer input
        if ple is not None:
            h = F.gelu(self.per_layer_input_gate(x), approximate="tanh") * ple
            x = x + self.post_per_layer_input_norm(self.per_layer_projection(h))
            x = taps.tap(self.prefix, "resid_ple", x)
        # 4. Scale
        return taps.tap(self.prefix, "out", x * self.layer_scalar)

    def feed_forward(self, x: Tensor) -> Tensor:
        """The dense branch plus, with MoE, the sparse one; the router reads the residual itself."""
        h = taps.tap(self.prefix, "mlp", self.mlp(self.pre_feedforward_layernorm(x)))
        if not self.moe:
            return h
        weights, index = self.router(x)
        sparse = self.experts(self.pre_feedforward_layernorm_2(x), weights, index)
        sparse = taps.tap(self.prefix, "experts", sparse)
        return self.post_feedforward_layernorm_1(h) + self.post_feedforward_layernorm_2(sparse)


class Attention(nn.Module):
    """Grouped-query attention with normed queries, keys and values, and no 1/sqrt(H) (the norms set the scale)."""

    def __init__(self, config: TextConfig, layer: LayerConfig):
        super().__init__()
        self.config, self.prefix = layer, f"layers.{layer.index}.self_attn."
        D, H, eps = config.hidden_size, layer.head_dim, config.rms_norm_eps
        N, K = config.num_attention_heads, layer.num_key_value_heads
        self.q_proj = nn.Linear(D, N * H, bias=False)
        self.q_norm = RMSNorm(H, eps)
        if not layer.kv_shared:
            self.k_proj = nn.Linear(D, K * H, bias=False)
            self.k_norm = RMSNorm(H, eps)
            if not layer.k_eq_v:
                self.v_proj = nn.Linear(D, K * H, bias=False)
            self.v_norm = RMSNorm(H, eps, with_scale=False)
        self.o_proj = nn.Linear(N * H, D, bias=False)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | str | None,
        keys: Keys,
        kv: KV,
        cache: KVCache | None,
    ) -> Tensor:
        """x [B, T, D] -> [B, T, D]. Fills kv[own index] unless KV-shared, and reads kv[kv_source]."""
        q = apply_rotary(self.q_norm(self._heads(self.q_proj(x))), *rotary)
        q = taps.tap(self.prefix, "q", q)
        if not self.config.kv_shared:
            k, v = self.project_kv(x, rotary)
            if cache is not None:
                kv[self.config.index] = cache.update(self.config, keys, k, v)
            else:
                kv[self.config.index] = k.transpose(1, 2), v.transpose(1, 2)
        k, v = kv[self.config.kv_source]
        out = self.attend(q.transpose(1, 2), k, v, mask)
        return taps.tap(self.prefix, "out", self.o_proj(out.transpose(1, 2).flatten(2)))

    def project_kv(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """x [B, T, D] -> normed and rotated k, normed v [B, T, K, H]; with k_eq_v, v starts from the un-normed k."""
        k = self._heads(self.k_proj(x))
        v = k if self.config.k_eq_v else self._heads(self.v_proj(x))
        k = taps.tap(self.prefix, "k", apply_rotary(self.k_norm(k), *rotary))
        return k, taps.tap(self.prefix, "v", self.v_norm(v))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | str | None) -> Tensor:
        """q [B, N, T, H], k and v [B, K, S, H], an additive mask [B, 1, T, S], "causal" or None -> [B, N, T, H]."""
        causal = isinstance(mask, str)
        gqa = k.shape[1] != q.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=None if causal else mask, is_causal=causal, scale=1.0, enable_gqa=gqa
        )

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.config.head_dim))


class MLP(nn.Module):
    """down(gelu_tanh(gate(x)) * up(x))."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in float32 and rounded once; the weight multiplies as it is, not 1 + w."""

    def __init__(self, dim: int, eps: float, with_scale: bool = True):
        super().__init__()
        self.dim, self.eps = (dim,), eps
        self.weight = nn.Parameter(torch.ones(dim)) if with_scale else None

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.dim, self.weight, self.eps)


class ScaledEmbedding(nn.Embedding):
    """Rows times `scale`, where the scale is first rounded to the weight's dtype, as the model was trained."""

    def __init__(self, num_embeddings: int, embedding_dim: int, scale: float):
        super().__init__(num_embeddings, embedding_dim)
        floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        self.scale = {d: float(torch.tensor(scale, dtype=torch.float64, device="cpu").to(d)) for d in floats}

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) * self.scale[self.weight.dtype]


def attention_mask(queries: Tensor, keys: Tensor, window: int | None, ends: Tensor | None = None) -> Tensor:
    """Positions of queries [B, T] and keys [B, S] -> bool [B, 1, T, S], True where a query may look.

    A query sees keys at its own position and before, or up to `ends` [B, T]; of those before it the last `window`,
    itself included, if given. A padded query sees everything: its output is never used, but a row without any key
    would turn it into NaN and spread."""
    q, k = queries[:, None, :, None], keys[:, None, None, :]
    visible = (k <= (q if ends is None else ends[:, None, :, None])) & (k >= 0)
    if window is not None:
        visible &= k > q - window
    return visible | (q < 0)


def _additive(mask: Tensor | str | None, dtype: torch.dtype) -> Tensor | str | None:
    """0 where a bool mask is True, -inf elsewhere: made once, or every layer's attention makes its own."""
    return torch.where(mask, 0.0, -torch.inf).to(dtype) if isinstance(mask, Tensor) else mask


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x [B, T, ...], index [B] -> [B, 1, ...]."""
    return x[torch.arange(x.shape[0], device=x.device), index][:, None]


def _select(last: Tensor, x: Tensor, ple: Tensor | None, masks: dict, rotary: dict) -> tuple:
    """Keeps only position last[b] of row b in everything that the remaining layers take."""
    one = {
        kind: _rows(mask.transpose(1, 2), last).transpose(1, 2) if isinstance(mask, Tensor) else None
        for kind, mask in masks.items()
    }
    turned = {kind: (_rows(cos, last), _rows(sin, last)) for kind, (cos, sin) in rotary.items()}
    return _rows(x, last), None if ple is None else _rows(ple, last), one, turned
