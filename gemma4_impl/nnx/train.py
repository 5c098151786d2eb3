"""Training hooks: attention masks, what counts as a target, and the loss whose gradients a trainer takes.

A step in plain JAX:

    loss, gradients = nnx.value_and_grad(train.next_token_loss)(model, tokens, positions)

and with images, for both models:

    loss, gradients = nnx.value_and_grad(train.multimodal_loss, argnums=(0, 1))(text, vision, tokens, *images)

`Gemma4(..., remat=True)` and `Vision(..., remat=True)` compute each layer again in the backward pass instead of keeping
its activations.
"""

import jax
import jax.numpy as jnp
from jax import Array

from gemma4_impl.config import SLIDING, TextConfig
from gemma4_impl.nnx.decoder import Gemma4, attention_mask
from gemma4_impl.nnx.layers import at_least_float32
from gemma4_impl.nnx.soft_tokens import SoftTokens, merge
from gemma4_impl.nnx.vision import Vision


def get_positions(valid: Array) -> Array:
    """bool [B, T], False in padding, on either side -> int32 [B, T]: 0, 1, ... in each row's tokens, -1 in padding."""
    return jnp.where(valid, jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1, -1)


def get_attention_mask(
    config: TextConfig, positions: Array, *, images: SoftTokens | None = None, segments: Array | None = None
) -> dict[str, Array]:
    """Layer type -> bool [B, 1, T, T], True where a query may look: `mask` of `Gemma4.__call__`, without a cache.

    Args:
        positions: int32 [B, T], -1 in padding, which nothing looks at.
        images: their tokens see each other both ways in sliding layers, if they are bidirectional.
        segments: int [B, T] that tell the sequences apart which are packed into one row; each one's positions start
            at 0, and it sees nothing of the others.
    """
    order = positions
    if segments is not None:
        order = jnp.where(positions < 0, -1, jnp.arange(positions.shape[1], dtype=positions.dtype))
    masks = {}
    for kind in dict.fromkeys(config.layer_types):
        ends = images.ends(order) if images is not None and images.bidirectional and kind == SLIDING else None
        mask = attention_mask(order, order, config.sliding_window if kind == SLIDING else None, ends)
        if segments is not None:
            # A padded query keeps its view of everything: a softmax over nothing is NaN, and so is its gradient.
            mask &= (segments[:, None, :, None] == segments[:, None, None, :]) | (positions < 0)[:, None, :, None]
        masks[kind] = mask
    return masks


def get_targets(positions: Array, images: SoftTokens | None = None) -> Array:
    """bool [B, T], the tokens that are to be predicted: all but padding, the first of a sequence, and images."""
    targets = positions > 0
    return targets if images is None else targets & ~images.mask


def loss(logits: Array, tokens: Array, targets: Array, total: Array | int | None = None) -> Array:
    """Mean cross-entropy of the next token, a scalar in nats, computed at least in float32:

        -1 / N  sum over b, t with targets[b, t]  of  log softmax(logits[b, t - 1])[tokens[b, t]]

    Args:
        logits: [B, T, V]. tokens: int [B, T].
        targets: bool [B, T], see `get_targets`; nothing predicts the first column.
        total: N, by default the number of targets, or 1 if there is none. For gradients that are summed over the parts
            of a batch it is the number in the whole batch.
    """
    logits, tokens, targets = at_least_float32(logits[:, :-1]), tokens[:, 1:], targets[:, 1:]
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    surprise = jax.nn.logsumexp(logits, axis=-1) - chosen
    if total is None:
        total = jnp.maximum(targets.sum(), 1)
    return jnp.where(targets, surprise, 0).sum() / total


def next_token_loss(
    model: Gemma4,
    tokens: Array,
    positions: Array | None = None,
    targets: Array | None = None,
    images: SoftTokens | None = None,
    mask: dict[str, Array] | None = None,
    total: Array | int | None = None,
) -> Array:
    """`loss` of a model on tokens int [B, T]; `targets` default to `get_targets`, the others are those of `Gemma4`."""
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    if targets is None:
        targets = get_targets(positions, images)
    logits, _ = model(tokens, positions, images=images, mask=mask)
    return loss(logits, tokens, targets, total)


def multimodal_loss(
    text: Gemma4,
    vision: Vision,
    tokens: Array,
    pixel_values: Array,
    patches: Array,
    slots: Array,
    positions: Array | None = None,
    targets: Array | None = None,
    mask: dict[str, Array] | None = None,
    total: Array | int | None = None,
) -> Array:
    """`next_token_loss` with images that the tower sees in the same pass, so that gradients reach it.

    pixel_values [I, P, C] and patches [I, P, 2] are what `Vision` takes; slots int [B, T] say where the soft tokens go,
    see `soft_tokens.image_slots`."""
    bidirectional = vision.config.use_bidirectional_attention == "vision"
    images = merge(vision(pixel_values, patches), slots, bidirectional, text.dtype)
    return next_token_loss(text, tokens, positions, targets, images, mask, total)
