"""Drawing the next token from logits with a key."""

import jax
import jax.numpy as jnp
from jax import Array


def sample(
    logits: Array,
    key: Array,
    temperature: float | Array = 1.0,
    top_k: int | None = None,
    top_p: float | Array | None = None,
) -> Array:
    """Draws one id a row: logits [B, V] -> [B] int32. Temperature first, then top-k, then top-p.

    - temperature 0: the largest logit; a Python 0 leaves out the draw.
    - top_k: the k largest logits stay; among equal ones the lower ids.
    - top_p: the fewest ids whose probability (after temperature and top-k) reaches p, at least one; ties as above.
    - -inf is never drawn; +inf always is (the first, if several).
    - A row with a NaN, or with -inf only, has no distribution: its id is -1.

    Under jit `top_k` and whether there is a `top_p` are compiled in, `temperature` and the value of `top_p` may be
    traced. Parameters out of their range are the caller's to refuse (`gemma4_impl.generation.Sampling`)."""
    logits = logits.astype(jnp.float32)
    greedy = isinstance(temperature, int | float) and temperature == 0
    valid = jnp.max(logits, axis=-1) > -jnp.inf
    if greedy:
        return jnp.where(valid, _argmax(logits), -1)
    scores, ids = _kept(logits, temperature, top_k, top_p)
    # Gumbel-max: argmax(logits / temperature + g) is a draw from the softmax. Both sides are multiplied by the
    # temperature, so that a small one cannot overflow.
    drawn = _argmax(scores + temperature * jax.random.gumbel(key, scores.shape, mode="high"))
    if ids is not None:
        drawn = jnp.take_along_axis(ids, drawn[:, None], axis=-1)[:, 0]
    return jnp.where(valid, drawn, -1)


def _kept(
    logits: Array, temperature: float | Array, top_k: int | None, top_p: float | Array | None
) -> tuple[Array, Array | None]:
    """What the filters keep of logits [B, V]: scores [B, k], largest first, -inf what is left out, and their ids; or
    without filters the logits and None."""
    if top_k is None and top_p is None:
        return logits, None
    # Minus zero would come after zero in the order.
    logits = jnp.where(logits == 0, 0.0, logits)
    scores, ids = jax.lax.top_k(logits, min(top_k or logits.shape[-1], logits.shape[-1]))
    if top_p is not None:
        scores = jnp.where(_nucleus(scores, temperature, top_p), scores, -jnp.inf)
    return scores, ids


def _nucleus(scores: Array, temperature: float | Array, top_p: float | Array) -> Array:
    """True for the first of the descending scores [B, k] that together reach the probability top_p."""
    # A temperature that float32 rounds to 0 is greedy, not 0 / 0.
    smallest = jnp.finfo(jnp.float32).tiny
    probs = jax.nn.softmax((scores - scores[:, :1]) / jnp.maximum(temperature, smallest), axis=-1)
    # What float32 sums may stop short of 1, which keeps everything. NaN, of infinite scores, keeps the first.
    below = (jnp.cumsum(probs, axis=-1) < top_p) | (jnp.asarray(top_p) >= 1)
    return jnp.arange(scores.shape[-1]) < 1 + below.sum(axis=-1, keepdims=True)


def _argmax(x: Array) -> Array:
    return jnp.argmax(x, axis=-1).astype(jnp.int32)
