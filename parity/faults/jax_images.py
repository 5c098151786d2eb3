"""JAX faults of images: pixels, the vision tower, the projector, and the merge into the text model."""

from collections.abc import Callable, Sequence
from types import MethodType
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from gemma4_impl.config import FULL
from gemma4_impl.nnx.decoder import Gemma4, attention_mask
from gemma4_impl.nnx.images import ImageEncoder
from gemma4_impl.nnx.soft_tokens import SoftTokens
from gemma4_impl.nnx.vision import Attention, ClippedLinear, Encoder, EncoderLayer, PatchEmbedder, Vision
from parity.faults.fault import Inject, on_model
from parity.faults.jax_fault import Identity, assign, of_type, ones, override, same

if TYPE_CHECKING:
    from parity.candidate_jax import JaxCandidate


def on_tower(change: Callable[[Vision], Any]) -> Inject:
    def inject(candidate: "JaxCandidate") -> None:
        change(candidate.encoder.model)

    return inject


def each_layer(change: Callable[[EncoderLayer], Any]) -> Inject:
    return on_tower(lambda vision: [change(layer) for layer in vision.vision_tower.encoder.layers])


def patch_embedder(inputs: Callable[[Array, Array], tuple[Array, Array]]) -> Inject:
    """Changes the pixel values [I, P, C] and positions [I, P, 2] on their way into the patch embedding."""

    def call(self: PatchEmbedder, pixel_values: Array, positions: Array, padding: Array) -> Array:
        return PatchEmbedder.__call__(self, *inputs(pixel_values, positions), padding)

    return on_tower(lambda vision: override(vision.vision_tower.patch_embedder, __call__=call))


def encoder(call: Callable[[Encoder, Array, Array, Array], Array]) -> Inject:
    return on_tower(lambda vision: override(vision.vision_tower.encoder, __call__=call))


def halves_swapped(self: Encoder, x: Array, positions: Array, padding: Array) -> Array:
    return Encoder.__call__(self, x, positions[..., ::-1], padding)


def pooled_times(factor: Callable[[Vision], float]) -> Inject:
    """A wrong constant between the last layer and the pooled soft tokens."""

    def change(vision: Vision) -> None:
        constant = factor(vision)
        override(vision.vision_tower.encoder, __call__=lambda self, *args: Encoder.__call__(self, *args) * constant)

    return on_tower(change)


def padding_attended(layer: EncoderLayer) -> None:
    def call(self: Attention, x: Array, rotary: tuple[Array, Array], mask: Array) -> Array:
        return Attention.__call__(self, x, rotary, jnp.ones_like(mask))

    override(layer.self_attn, __call__=call)


def unclipped(*sides: str) -> Inject:
    def change(vision: Vision) -> None:
        for linear in of_type(vision, ClippedLinear):
            for side in sides:
                assign(getattr(linear, f"{side}_min"), lambda x: jnp.full_like(x, -jnp.inf))
                assign(getattr(linear, f"{side}_max"), lambda x: jnp.full_like(x, jnp.inf))

    return on_tower(change)


def standardised_late(vision: Vision) -> None:
    tower = vision.vision_tower
    assign(tower.std_bias, lambda bias: bias / tower.std_scale[...])


def not_standardised(vision: Vision) -> None:
    assign(vision.vision_tower.std_bias, jnp.zeros_like)
    ones(vision.vision_tower.std_scale)


def norm_missing(vision: Vision) -> None:
    vision.embed_vision.embedding_pre_projection_norm = Identity()


def merged(change: Callable[[Sequence[np.ndarray]], Sequence[np.ndarray]]) -> Inject:
    """Changes the soft tokens [n, D] of the images on their way into the sequence."""

    def inject(candidate: "JaxCandidate") -> None:
        def merge(self: ImageEncoder, tokens: np.ndarray, features: Sequence[np.ndarray], dtype: Any) -> SoftTokens:
            return ImageEncoder.merge(self, tokens, change(features), dtype)

        # The encoder is no module: nothing splits and merges it.
        candidate.encoder.merge = MethodType(merge, candidate.encoder)

    return inject


def mask_of(kind: str, function: Callable[[Gemma4, Array, Array, SoftTokens], Array]) -> Inject:
    """Replaces the mask of one type of layer: positions of queries and keys, images -> bool [B, 1, T, S]."""

    def mask(self: Gemma4, own: str, positions: Array, keys: Array, images: SoftTokens) -> Array:
        healthy = Gemma4._mask(self, own, positions, keys, images)
        return function(self, positions, keys, images) if own == kind else healthy

    return on_model(lambda model: override(model, _mask=mask))


def block_on_full_layers(self: Gemma4, queries: Array, keys: Array, images: SoftTokens) -> Array:
    return attention_mask(queries, keys, None, images.ends(queries))


def image_id_looked_up(candidate: "JaxCandidate") -> None:
    image, shown = candidate.encoder.config.image_token_id, []

    def call(self: Gemma4, *args: Any) -> tuple:
        shown[:] = [args[-1].mask]
        return Gemma4.__call__(self, *args)

    def per_layer_inputs(self: Gemma4, tokens: Array, embed: Array) -> Array:
        return Gemma4.per_layer_inputs(self, jnp.where(shown[0], image, tokens), embed)

    override(candidate.model, __call__=call, per_layer_inputs=per_layer_inputs)


IMAGES = [
    same("pixels_unscaled", patch_embedder(lambda values, positions: (values / 2 + 0.5, positions))),
    same("positions_swapped", patch_embedder(lambda values, positions: (values, positions[..., ::-1]))),
    same("rope_halves_swapped", encoder(halves_swapped)),
    same("padding_patches_attended", each_layer(padding_attended)),
    same("clip_missing", unclipped("input", "output")),
    same("clip_of_outputs_missing", unclipped("output")),
    same("pooling_divisor", pooled_times(lambda vision: vision.config.pooling_kernel_size)),
    same("standardise_order", on_tower(standardised_late)),
    same("standardise_missing", on_tower(not_standardised)),
    same("projector_norm_missing", on_tower(norm_missing)),
    same("soft_tokens_scaled", merged(lambda features: [part * part.shape[-1] ** 0.5 for part in features])),
    same("images_in_reverse", merged(lambda features: features[::-1])),
    same("image_block_causal"),
    same("block_on_full_layers", mask_of(FULL, block_on_full_layers)),
    same("ple_of_image_id", image_id_looked_up),
]
"""On tiny multimodal checkpoints, with the two images that a parity run draws."""
