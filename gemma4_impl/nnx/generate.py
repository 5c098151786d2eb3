"""A prompt turned into text and timings, in JAX."""

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from gemma4_impl.generation import Generation, Interrupted, Prompt, Sampling, Transcript, check_prompt, prompt_ids
from gemma4_impl.nnx.engine import Generator
from gemma4_impl.tokenizer import Tokenizer

if TYPE_CHECKING:
    from gemma4_impl.nnx.images import ImageEncoder
    from gemma4_impl.vision.processing import ImageSource

SMALLEST_CONTEXT = 128
SHOWN_EVERY = 0.2
"""Seconds between looks at what was decoded, unless one token takes longer."""


def generate(
    engine: Generator,
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    chat: bool = True,
    stream: Callable[[str], None] | None = None,
    max_seq_len: int | None = None,
    images: Sequence["ImageSource"] = (),
    encoder: "ImageEncoder | None" = None,
) -> Generation:
    """Continues `prompt` until a stop token, `max_new_tokens`, or the end of the context. Compiling is not timed.

    Args:
        prompt: a user's message (raw text with chat=False), a list of chat messages, or token ids taken as they are.
        images: shown with the prompt: before a user's message; elsewhere at its image tokens, one for each image.
        encoder: the checkpoint's vision tower, needed for `images` and run once.
        stream: called with each piece of text soon after it is complete; the pieces join to `Generation.text`.
        max_seq_len: the context to make a cache for; by default a power of two that is enough, if the model allows.
    Raises ValueError for a prompt that does not fit, a bad parameter, or logits that are NaN; Interrupted.
    """
    sampling = Sampling(temperature, top_k, top_p, seed)
    config, begin = engine.config, time.perf_counter()
    ids, processed = prompt_ids(tokenizer, prompt, chat, images, encoder)
    limit = check_prompt(config, ids, max_seq_len)
    stop = tokenizer.stop_ids | set(config.eos_token_id)
    transcript = Transcript(tokenizer, stop, max_new_tokens, limit - len(ids), stream)
    needed = max(SMALLEST_CONTEXT, len(ids) + transcript.left - 1)
    room = max_seq_len or min(1 << (needed - 1).bit_length(), config.max_position_embeddings)
    soft = None
    if processed is not None:
        soft = encoder.merge(np.array([ids]), encoder.encode(processed), engine.dtype)
    encoded = time.perf_counter() - begin
    engine.warm_up(len(ids), room, sampling, stop, soft)

    begin = time.perf_counter()
    decoding = engine.start(*engine.prefill([ids], engine.make_cache(1, room), soft), sampling, stop=stop)
    fresh = np.asarray(decoding.token).tolist()
    # Several processes must run the same steps, and their clocks differ.
    alone = jax.process_count() == 1
    count = 1 if alone else engine.segment
    first = time.perf_counter()
    interrupted = False
    try:
        while transcript.add(fresh):
            count, before = min(count, transcript.left), time.perf_counter()
            out, decoding = engine.decode(decoding, count)
            fresh = np.asarray(out)[0, :count].tolist()
            possible = 1 + int(SHOWN_EVERY * count / (time.perf_counter() - before))
            count = min(engine.segment, possible) if alone else engine.segment
    except KeyboardInterrupt:
        interrupted = True
    seconds = time.perf_counter() - first
    transcript.finish()
    read = sum(engine.bytes_per_token(len(ids) + i) for i in range(1, len(transcript.tokens)))
    result = transcript.generation(len(ids), encoded + first - begin, seconds, read, interrupted)
    if interrupted:
        raise Interrupted(result)
    return result
