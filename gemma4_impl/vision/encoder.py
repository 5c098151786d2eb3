"""The Gemma 4 vision tower and its projector; read it top to bottom: model, tower, encoder layer, attention, pooling.

I images of P patches (some of them padding) of C = 3 * patch_size**2 pixel values become L = P / k**2 soft tokens; k is
the size of the pooling kernel. D is the tower's model dim, N its heads, K its kv heads, H its head dim."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemma4_impl import taps
from gemma4_impl.config import RopeParameters
from gemma4_impl.model.decoder import RMSNorm
from gemma4_impl.model.rope import RotaryEmbedding, apply_rotary
from gemma4_impl.vision.config import VisionConfig


class Vision(nn.Module):
    """Patches to soft tokens in the text model's space. Parameters carry the checkpoint's names, less `model.`
    (`vision_tower.encoder.layers.0.self_attn.q_proj.linear.weight`, `embed_vision.embedding_projection.weight`)."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.vision_tower = VisionTower(config)
        self.embed_vision = Projector(config)

    def forward(self, pixel_values: Tensor, positions: Tensor) -> Tensor:
        """pixel_values [I, P, C] in [0, 1] and positions [I, P, 2] (x, y; -1 in padding, at the end) -> soft tokens
        [I, L, text hidden size]; an image's own come first, then what is to be ignored (see `num_soft_tokens`)."""
        return self.embed_vision(self.vision_tower(pixel_values, positions))

    def reset_rope(self, dtype: torch.dtype, device: torch.device | str) -> None:
        """Recomputes what no checkpoint holds, for a model built on meta."""
        self.vision_tower.encoder.rope.reset(dtype, torch.device(device))


def num_soft_tokens(positions: Tensor, pooling_kernel_size: int) -> Tensor:
    """positions [I, P, 2] -> int64 [I]: how many soft tokens each image becomes."""
    return (~_padding(positions)).sum(dim=1) // pooling_kernel_size**2


class Projector(nn.Module):
    """Normed without a weight, then projected to the text model's dim."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.embedding_pre_projection_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, with_scale=False)
        self.embedding_projection = nn.Linear(config.hidden_size, config.text_hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[I, L, D] -> [I, L, text hidden size]."""
        return taps.tap("vision.", "proj", self.embedding_projection(self.embedding_pre_projection_norm(x)))


class VisionTower(nn.Module):
    """Patch embedding, encoder, pooling and, where the config says so, standardisation."""

    std_bias: Tensor
    std_scale: Tensor

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.patch_embedder = PatchEmbedder(config)
        self.encoder = Encoder(config)
        if config.standardize:
            self.register_buffer("std_bias", torch.zeros(config.hidden_size))
            self.register_buffer("std_scale", torch.ones(config.hidden_size))

    def forward(self, pixel_values: Tensor, positions: Tensor) -> Tensor:
        """pixel_values [I, P, C], positions [I, P, 2] -> [I, L, D] in the weights' dtype.

        Raises ValueError for shapes that do not fit the config; P must be a multiple of k**2."""
        self._check_inputs(pixel_values, positions)
        padding = _padding(positions)
        taps.at(_where(~padding))

        # 1. Patches
        x = taps.tap("vision.", "patch_embed", self.patch_embedder(pixel_values, positions, padding))
        # 2. Layers
        x = self.encoder(x, positions, padding)
        # 3. Pooling
        k = self.config.pooling_kernel_size
        pooled = pool(x.masked_fill(padding[..., None], 0), positions, k)
        taps.at(_where(torch.arange(pooled.shape[1], device=x.device) < num_soft_tokens(positions, k)[:, None]))
        pooled = taps.tap("vision.", "pool", pooled * self.config.hidden_size**0.5)
        # 4. Standardisation
        if self.config.standardize:
            pooled = taps.tap("vision.", "standardised", (pooled - self.std_bias) * self.std_scale)
        return pooled.to(x.dtype)

    def _check_inputs(self, pixel_values: Tensor, positions: Tensor) -> None:
        channels, k = 3 * self.config.patch_size**2, self.config.pooling_kernel_size
        shape = tuple(pixel_values.shape)
        if len(shape) != 3 or shape[2] != channels:
            raise ValueError(f"pixel_values must be [I, P, {channels}], got shape {shape}")
        if shape[1] % k**2:
            raise ValueError(f"{shape[1]} patches are no multiple of {k} x {k}, which are pooled to one")
        if tuple(positions.shape) != (*shape[:2], 2) or positions.dtype != torch.long:
            got = f"{tuple(positions.shape)} {positions.dtype}"
            raise ValueError(f"positions must be int64 of shape {(*shape[:2], 2)}, got {got}")


class PatchEmbedder(nn.Module):
    """A linear map of the pixels, plus a learned embedding of x and one of y."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        D = config.hidden_size
        self.input_proj = nn.Linear(3 * config.patch_size**2, D, bias=False)
        self.position_embedding_table = nn.Parameter(torch.ones(2, config.position_embedding_size, D))

    def forward(self, pixel_values: Tensor, positions: Tensor, padding: Tensor) -> Tensor:
        """pixel_values [I, P, C], positions [I, P, 2], padding bool [I, P] -> [I, P, D]."""
        dtype = self.input_proj.weight.dtype
        # From [0, 1] to [-1, 1], at least in float32: bfloat16 would not tell all 256 levels apart.
        pixels = 2 * (pixel_values.to(torch.promote_types(dtype, torch.float32)) - 0.5)
        x, y = positions.clamp(min=0).unbind(dim=-1)
        columns, rows = self.position_embedding_table
        place = F.embedding(x, columns) + F.embedding(y, rows)
        return self.input_proj(pixels.to(dtype)) + place.masked_fill(padding[..., None], 0)


class Encoder(nn.Module):
    """Layers in which every patch attends to every other one of its image."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config, i) for i in range(config.num_hidden_layers))
        # The first half of a head's dims turns by x, the second by y, each as a head of that size would.
        self.rope = RotaryEmbedding(config.head_dim // 2, RopeParameters("default", config.rope_theta))

    def forward(self, x: Tensor, positions: Tensor, padding: Tensor) -> Tensor:
        """x [I, P, D], positions [I, P, 2], padding bool [I, P] -> [I, P, D]."""
        by_x, by_y = (self.rope(place) for place in positions.unbind(dim=-1))
        cos, sin = (torch.stack(parts, dim=-2) for parts in zip(by_x, by_y, strict=True))
        mask = torch.where(padding, -torch.inf, 0.0).to(x.dtype)[:, None, None]
        for layer in self.layers:
            x = layer(x, (cos, sin), mask)
        return x


class EncoderLayer(nn.Module):
    """Attention, then MLP, each between two norms."""

    def __init__(self, config: VisionConfig, index: int):
        super().__init__()
        self.prefix = f"vision.layers.{index}."
        D, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config, self.prefix + "self_attn.")
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(D, eps)
        self.post_attention_layernorm = RMSNorm(D, eps)
        self.pre_feedforward_layernorm = RMSNorm(D, eps)
        self.post_feedforward_layernorm = RMSNorm(D, eps)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        """x [I, P, D], rotary [I, P, 1, 2, H / 2] each, additive mask [I, 1, 1, P] -> [I, P, D]."""
        h = self.self_attn(self.input_layernorm(x), rotary, mask)
        x = taps.tap(self.prefix, "resid_mid", x + self.post_attention_layernorm(h))
        h = taps.tap(self.prefix, "mlp", self.mlp(self.pre_feedforward_layernorm(x)))
        return taps.tap(self.prefix, "out", x + self.post_feedforward_layernorm(h))


class Attention(nn.Module):
    """Attention over all patches, with normed queries, keys and values, and no 1/sqrt(H) (the norms set the scale)."""

    def __init__(self, config: VisionConfig, prefix: str):
        super().__init__()
        self.prefix, self.head_dim = prefix, config.head_dim
        D, H, eps = config.hidden_size, config.head_dim, config.rms_norm_eps
        N, K, clipped = config.num_attention_heads, config.num_key_value_heads, config.use_clipped_linears
        self.q_proj = ClippedLinear(D, N * H, clipped)
        self.k_proj = ClippedLinear(D, K * H, clipped)
        self.v_proj = ClippedLinear(D, K * H, clipped)
        self.o_proj = ClippedLinear(N * H, D, clipped)
        self.q_norm = RMSNorm(H, eps)
        self.k_norm = RMSNorm(H, eps)
        self.v_norm = RMSNorm(H, eps, with_scale=False)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        """As `EncoderLayer.forward`."""
        q = taps.tap(self.prefix, "q", turn(self.q_norm(self._heads(self.q_proj(x))), rotary))
        k = taps.tap(self.prefix, "k", turn(self.k_norm(self._heads(self.k_proj(x))), rotary))
        v = taps.tap(self.prefix, "v", self.v_norm(self._heads(self.v_proj(x))))
        out = self.attend(*(part.transpose(1, 2) for part in (q, k, v)), mask)
        return taps.tap(self.prefix, "out", self.o_proj(out.transpose(1, 2).flatten(2)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """q [I, N, P, H], k and v [I, K, P, H], an additive mask [I, 1, 1, P] -> [I, N, P, H]."""
        gqa = k.shape[1] != q.shape[1]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0, enable_gqa=gqa)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))


class MLP(nn.Module):
    """down(gelu_tanh(gate(x)) * up(x))."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        D, inner, clipped = config.hidden_size, config.intermediate_size, config.use_clipped_linears
        self.gate_proj = ClippedLinear(D, inner, clipped)
        self.up_proj = ClippedLinear(D, inner, clipped)
        self.down_proj = ClippedLinear(inner, D, clipped)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class ClippedLinear(nn.Module):
    """A linear map whose input and output are clipped to bounds that the checkpoint holds; a plain one if not
    `clipped`."""

    input_min: Tensor
    input_max: Tensor
    output_min: Tensor
    output_max: Tensor

    def __init__(self, in_features: int, out_features: int, clipped: bool):
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=False)
        self.clipped = clipped
        if clipped:
            for side in ("input", "output"):
                self.register_buffer(f"{side}_min", torch.tensor(-torch.inf))
                self.register_buffer(f"{side}_max", torch.tensor(torch.inf))

    def forward(self, x: Tensor) -> Tensor:
        if not self.clipped:
            return self.linear(x)
        return self.linear(x.clamp(self.input_min, self.input_max)).clamp(self.output_min, self.output_max)


def turn(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """x [I, P, N, H] with the halves of each head turned by the angles of x and of y."""
    return apply_rotary(x.unflatten(-1, (2, -1)), *rotary).flatten(-2)


def pool(x: Tensor, positions: Tensor, k: int) -> Tensor:
    """x [I, P, D] (0 in padding), positions [I, P, 2] -> the means over squares of k x k patches [I, P / k**2, D], row
    by row, at least in float32: scaled by sqrt(D) they would leave the range of float16."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    column, row = positions.clamp(min=0).unbind(dim=-1)
    squares_in_a_row = (column.amax(dim=1, keepdim=True) + 1) // k
    square = column // k + squares_in_a_row * (row // k)
    slots = torch.arange(x.shape[1] // k**2, device=x.device)
    return (square[:, None] == slots[:, None]).to(x.dtype) @ x / k**2


def _padding(positions: Tensor) -> Tensor:
    """positions [I, P, 2] -> bool [I, P], True where there is no patch."""
    return (positions == -1).all(dim=-1)


def _where(valid: Tensor) -> Tensor:
    """bool [I, T] -> [I, T] the index of each valid column, -1 elsewhere: what `taps.at` takes."""
    return torch.where(valid, torch.arange(valid.shape[1], device=valid.device), -1)
