"""The Gemma 4 vision tower and its projector in Flax NNX; read it top to bottom: model, tower, encoder layer,
attention, pooling.

I images of P patches (some of them padding) of C = 3 * patch_size**2 pixel values become L = P / k**2 soft tokens; k is
the size of the pooling kernel. D is the tower's model dim, N its heads, K its kv heads, H its head dim."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from gemma4_impl import taps
from gemma4_impl.config import RopeParameters
from gemma4_impl.nnx import elementary
from gemma4_impl.nnx.layers import Linear, Make, RMSNorm, at_least_float32, attend, gated, param
from gemma4_impl.nnx.rope import apply_rotary, inverse_frequencies, rotary_angles
from gemma4_impl.nnx.sharding import FSDP, TP, constrain, spread_rows
from gemma4_impl.vision.config import VisionConfig


class Constant(nnx.Variable):
    """What a checkpoint holds and training leaves alone: bounds of clipped linears, the standardisation."""


class Vision(nnx.Module):
    """Patches to soft tokens in the text model's space. Parameters carry the checkpoint's names, less
    `model.`, and its shapes.

    Args:
        dtype: computed in, pooling at least in float32.
        param_dtype: of the parameters, which are cast where they are used.
        remat: compute each layer's activations again in the backward pass instead of keeping them.
    """

    def __init__(
        self,
        config: VisionConfig,
        *,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        make = Make(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.config, self.dtype = config, jnp.dtype(dtype)
        self.vision_tower = VisionTower(make, config, remat)
        self.embed_vision = Projector(make, config)

    def __call__(self, pixel_values: Array, positions: Array) -> Array:
        """pixel_values [I, P, C] in [0, 1] and positions [I, P, 2] (x, y; -1 in padding, at the end) -> soft tokens
        [I, L, text hidden size]; an image's own come first, then what is to be ignored (see `num_soft_tokens`)."""
        return self.embed_vision(self.vision_tower(pixel_values, positions))


def num_soft_tokens(positions: Array, pooling_kernel_size: int) -> Array:
    """positions [I, P, 2] -> [I]: how many soft tokens each image becomes."""
    return (~_padding(positions)).sum(axis=1) // pooling_kernel_size**2


class Projector(nnx.Module):
    """Normed without a weight, then projected to the text model's dim."""

    def __init__(self, make: Make, config: VisionConfig):
        self.embedding_pre_projection_norm = RMSNorm(make, config.hidden_size, config.rms_norm_eps, with_scale=False)
        self.embedding_projection = Linear(make, config.hidden_size, config.text_hidden_size, (TP, FSDP))

    def __call__(self, x: Array) -> Array:
        """[I, L, D] -> [I, L, text hidden size]."""
        return taps.tap(taps.VISION, "proj", self.embedding_projection(self.embedding_pre_projection_norm(x)))


class VisionTower(nnx.Module):
    """Patch embedding, encoder, pooling and, where the config says so, standardisation."""

    def __init__(self, make: Make, config: VisionConfig, remat: bool):
        self.config = config
        self.patch_embedder = PatchEmbedder(make, config)
        self.encoder = Encoder(make, config, remat)
        if config.standardize:
            self.std_bias = _constant(make, jnp.zeros(config.hidden_size))
            self.std_scale = _constant(make, jnp.ones(config.hidden_size))

    def __call__(self, pixel_values: Array, positions: Array) -> Array:
        """pixel_values [I, P, C], positions [I, P, 2] -> [I, L, D].

        Raises ValueError for shapes that do not fit the config; P must be a multiple of k**2."""
        self._check_inputs(pixel_values, positions)
        padding = _padding(positions)
        taps.at(_where(~padding))

        # 1. Patches
        x = spread_rows(self.patch_embedder(pixel_values, positions, padding))
        x = taps.tap(taps.VISION, "patch_embed", x)
        # 2. Layers
        x = self.encoder(x, positions, padding)
        # 3. Pooling
        k = self.config.pooling_kernel_size
        pooled = pool(jnp.where(padding[..., None], 0, x), positions, k)
        taps.at(_where(jnp.arange(pooled.shape[1]) < num_soft_tokens(positions, k)[:, None]))
        pooled = taps.tap(taps.VISION, "pool", pooled * self.config.hidden_size**0.5)
        # 4. Standardisation
        if self.config.standardize:
            bias, scale = (c[...].astype(pooled.dtype) for c in (self.std_bias, self.std_scale))
            pooled = taps.tap(taps.VISION, "standardised", (pooled - bias) * scale)
        return pooled.astype(x.dtype)

    def _check_inputs(self, pixel_values: Array, positions: Array) -> None:
        channels, k = 3 * self.config.patch_size**2, self.config.pooling_kernel_size
        shape = pixel_values.shape
        if len(shape) != 3 or shape[2] != channels:
            raise ValueError(f"pixel_values must be [I, P, {channels}], got shape {shape}")
        if shape[1] % k**2:
            raise ValueError(f"{shape[1]} patches are no multiple of {k} x {k}, which are pooled to one")
        if positions.shape != (*shape[:2], 2) or not jnp.issubdtype(positions.dtype, jnp.integer):
            got = f"{positions.shape} {positions.dtype}"
            raise ValueError(f"positions must be integers of shape {(*shape[:2], 2)}, got {got}")


class PatchEmbedder(nnx.Module):
    """A linear map of the pixels, plus a learned embedding of x and one of y."""

    def __init__(self, make: Make, config: VisionConfig):
        D, self.dtype = config.hidden_size, make["dtype"]
        self.input_proj = Linear(make, 3 * config.patch_size**2, D, (FSDP, None))
        shape = (2, config.position_embedding_size, D)
        self.position_embedding_table = param(make, shape, (None, TP, FSDP), nnx.initializers.normal(D**-0.5))

    def __call__(self, pixel_values: Array, positions: Array, padding: Array) -> Array:
        """pixel_values [I, P, C], positions [I, P, 2], padding bool [I, P] -> [I, P, D]."""
        # From [0, 1] to [-1, 1], at least in float32: bfloat16 would not tell all 256 levels apart.
        pixels = 2 * (pixel_values.astype(jnp.promote_types(self.dtype, jnp.float32)) - 0.5)
        column, row = _columns_and_rows(positions)
        table = self.position_embedding_table[...]
        place = table[0, column].astype(self.dtype) + table[1, row].astype(self.dtype)
        return self.input_proj(pixels.astype(self.dtype)) + jnp.where(padding[..., None], 0, place)


class Encoder(nnx.Module):
    """Layers in which every patch attends to every other one of its image."""

    def __init__(self, make: Make, config: VisionConfig, remat: bool):
        self.dtype, self.remat = make["dtype"], remat
        self.layers = nnx.List([EncoderLayer(make, config, i) for i in range(config.num_hidden_layers)])
        # The first half of a head's dims turns by x, the second by y, each as a head of that size would.
        self.head_dim, self.rope = config.head_dim // 2, RopeParameters("default", config.rope_theta)

    def __call__(self, x: Array, positions: Array, padding: Array) -> Array:
        """x [I, P, D], positions [I, P, 2], padding bool [I, P] -> [I, P, D]."""
        frequencies = inverse_frequencies(self.head_dim, self.rope)
        by_x, by_y = (rotary_angles(positions[..., axis], frequencies, self.dtype) for axis in (0, 1))
        rotary = tuple(jnp.stack(parts, axis=-2) for parts in zip(by_x, by_y, strict=True))
        # Nothing but padding sees itself: a softmax over nothing is NaN, and so would every gradient be.
        mask = (~padding | padding.all(axis=1, keepdims=True))[:, None, None]
        run = nnx.remat(EncoderLayer.__call__) if self.remat else EncoderLayer.__call__
        for layer in self.layers:
            x = spread_rows(run(layer, x, rotary, mask))
        return x


class EncoderLayer(nnx.Module):
    """Attention, then MLP, each between two norms."""

    def __init__(self, make: Make, config: VisionConfig, index: int):
        self.prefix = f"{taps.VISION}layers.{index}."
        D, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(make, config, self.prefix + "self_attn.")
        self.mlp = MLP(make, config)
        self.input_layernorm = RMSNorm(make, D, eps)
        self.post_attention_layernorm = RMSNorm(make, D, eps)
        self.pre_feedforward_layernorm = RMSNorm(make, D, eps)
        self.post_feedforward_layernorm = RMSNorm(make, D, eps)

    def __call__(self, x: Array, rotary: tuple[Array, Array], mask: Array) -> Array:
        """x [I, P, D], cos and sin [I, P, 1, 2, H / 4], bool mask [I, 1, 1, P] -> [I, P, D]."""
        h = self.self_attn(self.input_layernorm(x), rotary, mask)
        x = taps.tap(self.prefix, "resid_mid", x + self.post_attention_layernorm(h))
        h = taps.tap(self.prefix, "mlp", self.mlp(self.pre_feedforward_layernorm(x)))
        return taps.tap(self.prefix, "out", x + self.post_feedforward_layernorm(h))


class Attention(nnx.Module):
    """Attention over all patches, with normed queries, keys and values, and no 1/sqrt(H) (the norms set the scale)."""

    def __init__(self, make: Make, config: VisionConfig, prefix: str):
        self.prefix, self.head_dim = prefix, config.head_dim
        D, H, eps = config.hidden_size, config.head_dim, config.rms_norm_eps
        N, K, clipped = config.num_attention_heads, config.num_key_value_heads, config.use_clipped_linears
        self.q_proj = ClippedLinear(make, D, N * H, (TP, FSDP), clipped, (N, D))
        self.k_proj = ClippedLinear(make, D, K * H, (TP, FSDP), clipped, (K, D))
        self.v_proj = ClippedLinear(make, D, K * H, (TP, FSDP), clipped, (K, D))
        self.o_proj = ClippedLinear(make, N * H, D, (FSDP, TP), clipped, (D, N))
        self.q_norm = RMSNorm(make, H, eps)
        self.k_norm = RMSNorm(make, H, eps)
        self.v_norm = RMSNorm(make, H, eps, with_scale=False)

    def __call__(self, x: Array, rotary: tuple[Array, Array], mask: Array) -> Array:
        """As `EncoderLayer.__call__`."""
        q = taps.tap(self.prefix, "q", turn(self.q_norm(self._heads(self.q_proj(x))), rotary))
        k = taps.tap(self.prefix, "k", turn(self.k_norm(self._heads(self.k_proj(x))), rotary))
        v = taps.tap(self.prefix, "v", self.v_norm(self._heads(self.v_proj(x))))
        out = attend(q, k, v, mask)
        return taps.tap(self.prefix, "out", self.o_proj(out.reshape(*x.shape[:2], -1)))

    def _heads(self, x: Array) -> Array:
        return constrain(x.reshape(*x.shape[:2], -1, self.head_dim), FSDP, None, TP, None)


class MLP(nnx.Module):
    """down(gelu_tanh(gate(x)) * up(x))."""

    def __init__(self, make: Make, config: VisionConfig):
        D, inner, clipped = config.hidden_size, config.intermediate_size, config.use_clipped_linears
        self.gate_proj = ClippedLinear(make, D, inner, (TP, FSDP), clipped)
        self.up_proj = ClippedLinear(make, D, inner, (TP, FSDP), clipped)
        self.down_proj = ClippedLinear(make, inner, D, (FSDP, TP), clipped)

    def __call__(self, x: Array) -> Array:
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))


class ClippedLinear(nnx.Module):
    """A linear map whose input and output are clipped to bounds that the checkpoint holds; a plain one if not
    `clipped`. `axes` and `units` are as in `Linear`."""

    def __init__(
        self,
        make: Make,
        in_features: int,
        out_features: int,
        axes: tuple[str | None, str | None],
        clipped: bool,
        units: tuple[int, int] | None = None,
    ):
        self.linear = Linear(make, in_features, out_features, axes, units)
        self.clipped = clipped
        if clipped:
            self.input_min, self.output_min = (_constant(make, jnp.array(-jnp.inf)) for _ in range(2))
            self.input_max, self.output_max = (_constant(make, jnp.array(jnp.inf)) for _ in range(2))

    def __call__(self, x: Array) -> Array:
        if not self.clipped:
            return self.linear(x)
        return clip(self.linear(clip(x, self.input_min, self.input_max)), self.output_min, self.output_max)


def clip(x: Array, low: Constant, high: Constant) -> Array:
    """x within its bounds. A value on a bound passes its gradient on, as in PyTorch; jnp.clip would halve it."""
    low, high = low[...].astype(x.dtype), high[...].astype(x.dtype)
    x = jnp.where(x < low, low, x)
    return jnp.where(x > high, high, x)


def turn(x: Array, rotary: tuple[Array, Array]) -> Array:
    """x [I, P, N, H] with the halves of each head turned by the angles of x and of y."""
    return apply_rotary(x.reshape(*x.shape[:-1], 2, -1), *rotary).reshape(x.shape)


def pool(x: Array, positions: Array, k: int) -> Array:
    """x [I, P, D] (0 in padding), positions [I, P, 2] -> the means over squares of k x k patches [I, P / k**2, D], row
    by row, at least in float32: scaled by sqrt(D) they would leave the range of float16."""
    x = at_least_float32(x)
    column, row = _columns_and_rows(positions)
    squares_in_a_row = (column.max(axis=1, keepdims=True) + 1) // k
    square = column // k + squares_in_a_row * (row // k)
    chosen = (square[:, None] == jnp.arange(x.shape[1] // k**2)[:, None]).astype(x.dtype)
    # A sum of k**2 values, not a product to be made faster.
    total = jnp.einsum("ilp,ipd->ild", chosen, x, precision=jax.lax.Precision.HIGHEST)
    return elementary.divide(total, k**2)


def _constant(make: Make, value: Array) -> Constant:
    """Whole on every device."""
    return Constant(value.astype(make["param_dtype"]), out_sharding=(None,) * value.ndim, eager_sharding=False)


def _columns_and_rows(positions: Array) -> tuple[Array, Array]:
    """positions [I, P, 2] -> x and y [I, P], padding being at 0."""
    return jnp.maximum(positions[..., 0], 0), jnp.maximum(positions[..., 1], 0)


def _padding(positions: Array) -> Array:
    """positions [I, P, 2] -> bool [I, P], True where there is no patch."""
    return (positions == -1).all(axis=-1)


def _where(valid: Array) -> Array:
    """bool [I, T] -> [I, T] the index of each valid column, -1 elsewhere: what `taps.at` takes."""
    return jnp.where(valid, jnp.arange(valid.shape[1]), -1)
