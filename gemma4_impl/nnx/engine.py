"""The engine of generation: prefill compiled once for each bucket of lengths, decode of many steps in one dispatch."""

import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.experimental import multihost_utils

from gemma4_impl.config import FULL, SLIDING, TextConfig
from gemma4_impl.generation import Sampling, check_prompt
from gemma4_impl.nnx.cache import KVCache, make_cache
from gemma4_impl.nnx.decoder import Gemma4
from gemma4_impl.nnx.sampler import sample
from gemma4_impl.nnx.sharding import constrain

if TYPE_CHECKING:
    from gemma4_impl.nnx.soft_tokens import SoftTokens

SMALLEST_BUCKET = 16
Filters = tuple[bool, int | None, bool]
"""What of a `Sampling` is compiled in: whether it is greedy, its top_k, whether it has a top_p."""


@dataclass(frozen=True)
class Decoding:
    """Where a batch stands between two calls of `Generator.decode`, which takes the cache for itself."""

    cache: KVCache
    token: Array
    """int32 [B], drawn last and not yet fed to the model; -1 where the logits had no largest value."""
    done: Array
    """bool [B], True where `token` is a stop token or -1."""
    drawn: Array
    """int32, how many times a token of every row was drawn so far."""
    key: Array
    stop: np.ndarray
    """int32 [n], padded with what no token is."""
    sampling: Sampling


class Generator:
    """Runs one model, whose parameters are taken out of its modules once: no step traverses them. A model that is
    spread over a mesh runs under `jax.set_mesh`, its generator too.

    Args:
        max_chunk: the most prompt tokens in one forward, also the largest bucket.
        segment: the most tokens that `decode` makes in one dispatch.
    """

    def __init__(self, model: Gemma4, max_chunk: int = 512, segment: int = 64):
        for name, value in {"max_chunk": max_chunk, "segment": segment}.items():
            if value < 1:
                raise ValueError(f"{name} = {value}: must be at least 1")
        self.config, self.dtype = model.config, model.dtype
        self.max_chunk, self.segment = max_chunk, segment
        self._graphdef, state = nnx.split(model)
        self._weights, self._treedef = jax.tree.flatten(state)
        self._weight_bytes = _weight_bytes(self.config, state)
        self._feed = jax.jit(self._feed_chunk, static_argnames="last", donate_argnames=("cache", "out"))
        self._draw = jax.jit(self._draw_ids, static_argnames="filters")
        self._decode = jax.jit(self._decode_steps, static_argnames="filters", donate_argnames="cache")
        self._warm: set[tuple] = set()

    def make_cache(self, batch_size: int = 1, max_seq_len: int = 4096) -> KVCache:
        """An empty cache for `batch_size` rows of up to `max_seq_len` tokens. Raises as `cache.make_cache` does."""
        return make_cache(self.config, batch_size, max_seq_len, self.max_chunk, self.dtype)

    def prefill(
        self, prompts: Sequence[Sequence[int]], cache: KVCache, images: "SoftTokens | None" = None
    ) -> tuple[Array, KVCache]:
        """Appends a prompt, not empty, to each row of `cache`, which is donated: logits [B, V] of the last tokens, and
        the new cache. `images` are [B, T] like the prompts padded on the right.

        Raises ValueError, before anything is written, for an empty prompt, a token outside the vocabulary, a position
        past the end of the cache, a cache made for another batch or smaller chunks, an image longer than a chunk."""
        lengths = np.array([len(prompt) for prompt in prompts])
        start = _host(cache.lengths)
        self._check_prompts(prompts, cache, start)
        columns = np.arange(lengths.max())
        positions = np.where(columns < lengths[:, None], start[:, None] + columns, -1).astype(np.int32)
        tokens = np.zeros_like(positions)
        tokens[positions >= 0] = np.concatenate(prompts)
        out = self._no_logits(len(prompts))
        for part, size in self._parts(len(columns), images):
            ends = (part.start < lengths) & (lengths <= part.stop)
            soft = None if images is None or not images.mask[:, part].any() else _pad_images(images[part], size)
            chunk = _pad(tokens[:, part], size, 0), _pad(positions[:, part], size, -1)
            out, cache = self._feed(self._weights, cache, out, *chunk, ends, soft, last=bool(ends.any()))
        return out, cache

    def _parts(self, length: int, images: "SoftTokens | None") -> list[tuple[slice, int]]:
        """The chunks of a prompt, none of which cuts an image, and the bucket of each."""
        C = self.max_chunk
        cuts = [slice(i, min(i + C, length)) for i in range(0, length, C)]
        parts = cuts if images is None else images.chunks(C)
        return [(part, self.bucket(part.stop - part.start)) for part in parts]

    def _no_logits(self, batch_size: int) -> Array:
        return jnp.zeros((batch_size, self.config.vocab_size), jnp.promote_types(self.dtype, jnp.float32))

    def bucket(self, length: int) -> int:
        """The number of tokens, a power of two or `max_chunk`, that a chunk of `length` is padded to."""
        return min(self.max_chunk, max(SMALLEST_BUCKET, 1 << (length - 1).bit_length()))

    def start(
        self,
        logits: Array,
        cache: KVCache,
        sampling: Sampling | None = None,
        key: Array | None = None,
        stop: Collection[int] | None = None,
    ) -> Decoding:
        """Draws the first token of each row from logits [B, V]; without `sampling` the likeliest one.

        `stop` are the ids that end a row, by default the config's; `key` is by default made of `sampling.seed`."""
        sampling = sampling or Sampling(temperature=0)
        key = _key(sampling.seed) if key is None else key
        stop = _padded_stop(self.config.eos_token_id if stop is None else stop)
        token, done = self._draw(logits, key, stop, *_traced(sampling), filters=_filters(sampling))
        return Decoding(cache, token, done, jnp.int32(1), key, stop, sampling)

    def decode(self, decoding: Decoding, count: int | None = None) -> tuple[Array, Decoding]:
        """Draws up to `count` more tokens of each row, by default `segment`, which is the most, in one dispatch that
        ends early when every row is done: int32 [B, segment], padding behind a stop token and from column `count` on,
        and where that leads.

        `decoding.cache` is donated. Raises ValueError, before anything is written, if a row would outgrow it."""
        count = self.segment if count is None else count
        if not 0 <= count <= self.segment:
            raise ValueError(f"count = {count}: one dispatch decodes at most {self.segment} tokens (segment)")
        lengths, done = _host(decoding.cache.lengths), _host(decoding.done)
        self._check_room(np.where(done, 0, lengths + count), decoding.cache)
        out, cache, token, done, drawn = self._decode(
            self._weights,
            decoding.cache,
            decoding.token,
            decoding.done,
            decoding.key,
            decoding.stop,
            decoding.drawn,
            np.int32(count),
            *_traced(decoding.sampling),
            filters=_filters(decoding.sampling),
        )
        return out, replace(decoding, cache=cache, token=token, done=done, drawn=drawn)

    def warm_up(
        self,
        length: int,
        max_seq_len: int,
        sampling: Sampling | None = None,
        stop: Collection[int] | None = None,
        images: "SoftTokens | None" = None,
    ) -> None:
        """Compiles, once, what one prompt of `length` tokens needs with a cache of `max_seq_len`, by running it on
        padding."""
        parts = self._parts(length, images)
        shown = [images is not None and bool(images.mask[:, part].any()) for part, _ in parts]
        chunks = {(size, part.stop == length, soft) for (part, size), soft in zip(parts, shown, strict=True)}
        filters = _filters(sampling or Sampling(temperature=0))
        stops = len(_padded_stop(self.config.eos_token_id if stop is None else stop))
        wanted = {("decode", max_seq_len, filters, stops), *((max_seq_len, *chunk) for chunk in chunks)}
        if wanted <= self._warm:
            return
        cache, out = self.make_cache(1, max_seq_len), self._no_logits(1)
        for size, last, soft in sorted(chunks):
            nothing = np.zeros((1, size), np.int32), np.full((1, size), -1, np.int32), np.zeros(1, bool)
            padding = _pad_images(images[:0], size) if soft else None
            out, cache = self._feed(self._weights, cache, out, *nothing, padding, last=last)
        self.decode(self.start(out, cache, sampling, _key(0), stop), 0)
        self._warm |= wanted

    def bytes_per_token(self, context: int) -> int:
        """Bytes that one decode step at batch 1 must read when its token attends to `context` positions (itself too).

        Every weight once, but `top_k_experts` of the experts only, and one row of an embedding table (a tied one is
        read whole, as the output head); and in each layer the keys and values that are visible. A KV-shared layer reads
        its producer's again. Activations are not counted."""
        total, config = self._weight_bytes, self.config
        for layer in config.layers:
            visible = min(context, config.sliding_window) if layer.is_sliding else context
            total += 2 * visible * layer.num_key_value_heads * layer.head_dim * self.dtype.itemsize
        return total

    def _feed_chunk(
        self,
        weights: list[Array],
        cache: KVCache,
        out: Array,
        tokens: Array,
        positions: Array,
        ends: Array,
        images: "SoftTokens | None",
        last: bool,
    ) -> tuple[Array, KVCache]:
        """`out` [B, V] with the logits of the rows whose prompt `ends` in this chunk, and the cache with the chunk."""
        model = self._model(weights)
        logits, cache = model(tokens, positions, cache, "last" if last else "none", images)
        return constrain(jnp.where(ends[:, None], logits[:, -1], out) if last else out, None, None), cache

    def _draw_ids(
        self, logits: Array, key: Array, stop: Array, temperature: Array, top_p: Array, filters: Filters
    ) -> tuple[Array, Array]:
        token = _sample(logits, key, jnp.int32(0), temperature, top_p, filters)
        return constrain(token, None), constrain(_ends(token, stop), None)

    def _decode_steps(
        self,
        weights: list[Array],
        cache: KVCache,
        token: Array,
        done: Array,
        key: Array,
        stop: Array,
        drawn: Array,
        count: Array,
        temperature: Array,
        top_p: Array,
        filters: Filters,
    ) -> tuple[Array, KVCache, Array, Array, Array]:
        model, pad = self._model(weights), self.config.pad_token_id

        def step(carry: tuple) -> tuple:
            i, cache, token, done, out = carry
            # A finished row feeds padding, which leaves its cache alone.
            positions = jnp.where(done, -1, cache.lengths)[:, None]
            logits, cache = model(jnp.where(done, pad, token)[:, None], positions, cache, "last")
            new = _sample(logits[:, -1], key, drawn + i, temperature, top_p, filters)
            out = jax.lax.dynamic_update_slice(out, jnp.where(done, pad, new)[:, None], (0, i))
            token = jnp.where(done, token, new)
            return i + 1, cache, token, _ends(token, stop), out

        def goes_on(carry: tuple) -> Array:
            return (carry[0] < count) & ~carry[3].all()

        out = jnp.full((token.shape[0], self.segment), pad, jnp.int32)
        start = jnp.int32(0), cache, token, done, out
        i, cache, token, done, out = jax.lax.while_loop(goes_on, step, start)
        return constrain(out, None, None), cache, constrain(token, None), constrain(done, None), drawn + i

    def _model(self, weights: list[Array]) -> Gemma4:
        return nnx.merge(self._graphdef, jax.tree.unflatten(self._treedef, weights))

    def _check_prompts(self, prompts: Sequence[Sequence[int]], cache: KVCache, start: np.ndarray) -> None:
        if len(prompts) != cache.batch_size:
            raise ValueError(f"batch of {len(prompts)} rows, but the cache was made for {cache.batch_size}")
        for row, prompt in enumerate(prompts):
            if not len(prompt):
                raise ValueError(f"prefill: the prompt of row {row} is empty")
            check_prompt(self.config, prompt)
        room = cache.positions[FULL].shape[1]
        if SLIDING in cache.positions and (ring := cache.positions[SLIDING].shape[1]) < room:
            longest, most = min(self.max_chunk, max(map(len, prompts))), ring - self.config.sliding_window + 1
            if longest > most:
                raise ValueError(f"chunk of {longest} tokens exceeds the cache's max_chunk = {most}")
        self._check_room(start + [len(prompt) for prompt in prompts], cache)

    def _check_room(self, ends: np.ndarray, cache: KVCache) -> None:
        room = cache.positions[FULL].shape[1]
        if ends.max() > room:
            raise ValueError(f"position {ends.max() - 1} is past the end of the cache (max_seq_len = {room})")


def _weight_bytes(config: TextConfig, state: nnx.State) -> int:
    """See `Generator.bytes_per_token`."""
    total = 0
    for path, leaf in nnx.to_flat_state(state):
        size = leaf.nbytes
        if path[0] == "embed_tokens" and not config.tie_word_embeddings:
            size //= config.vocab_size
        if path[0] == "embed_tokens_per_layer":
            size //= config.vocab_size_per_layer_input
        if "experts" in path:
            size = size * config.top_k_experts // config.num_experts
        total += size
    return total


def _ends(token: Array, stop: Array) -> Array:
    return (token[:, None] == stop).any(axis=1) | (token < 0)


def _host(x: Array) -> np.ndarray:
    """`x` on this host, whatever devices it is spread over."""
    return np.asarray(multihost_utils.process_allgather(x, tiled=True) if jax.process_count() > 1 else x)


def _key(seed: int | None) -> Array:
    """A key made of 64 bits, by default random ones that all hosts share."""
    seed = secrets.randbits(64) if seed is None else seed
    bits = np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32)
    if jax.process_count() > 1:
        bits = multihost_utils.broadcast_one_to_all(bits)
    return jax.random.wrap_key_data(bits, impl="threefry2x32")


def _sample(logits: Array, key: Array, index: Array, temperature: Array, top_p: Array, filters: Filters) -> Array:
    """Draws token number `index` of each row, logits [B, V] -> [B]; how many are drawn at a time changes nothing."""
    greedy, top_k, with_top_p = filters
    key = jax.random.fold_in(key, index)
    return sample(logits, key, 0 if greedy else temperature, top_k, top_p if with_top_p else None)


def _padded_stop(stop: Collection[int]) -> np.ndarray:
    """int32, its length a multiple of 8: sets of other sizes are no reason to compile again."""
    return np.array([*stop, *[-2] * (-len(stop) % 8)], np.int32)


def _filters(sampling: Sampling) -> Filters:
    if sampling.temperature == 0:
        return True, None, False
    return False, sampling.top_k, sampling.top_p is not None


def _traced(sampling: Sampling) -> tuple[np.float32, np.float32]:
    return np.float32(sampling.temperature), np.float32(1 if sampling.top_p is None else sampling.top_p)


def _pad(x: np.ndarray, size: int, fill: int) -> np.ndarray:
    return np.pad(x, ((0, 0), (0, size - x.shape[1])), constant_values=fill)


def _pad_images(images: "SoftTokens", size: int) -> "SoftTokens":
    width = (0, 0), (0, size - images.mask.shape[1])
    return replace(images, mask=np.pad(images.mask, width), embeds=np.pad(images.embeds, (*width, (0, 0))))
