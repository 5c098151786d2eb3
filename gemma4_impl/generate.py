"""The verbs of inference: prefill, decode_one_token, and generate, which turns a prompt into text and timings."""

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gemma4_impl.config import TextConfig
from gemma4_impl.generation import Generation, Interrupted, Prompt, Sampling, Transcript, check_prompt, prompt_ids
from gemma4_impl.model.cache import KVCache
from gemma4_impl.model.decoder import Gemma4
from gemma4_impl.model.sampler import sample
from gemma4_impl.model.soft_tokens import SoftTokens
from gemma4_impl.tokenizer import Tokenizer

if TYPE_CHECKING:
    from gemma4_impl.vision.images import ImageEncoder
    from gemma4_impl.vision.processing import ImageSource


@torch.inference_mode()
def prefill(
    model: Gemma4,
    tokens: Tensor,
    cache: KVCache,
    positions: Tensor | None = None,
    images: SoftTokens | None = None,
) -> Tensor:
    """Feeds tokens [B, T] to the cache in chunks of its `max_chunk`; returns each row's last token's logits [B, V].

    `positions` [B, T] marks padding with -1, on either side. No chunk ends inside an image that is seen both ways.
    Raises ValueError for a row that is all padding, an image that is longer than a chunk, and as the model does."""
    T, C = tokens.shape[1], cache.max_chunk
    parts = [slice(i, i + C) for i in range(0, max(T, 1), C)] if images is None else images.chunks(C)
    last = [T - 1] * len(tokens) if positions is None else positions.argmax(dim=1).tolist()
    if positions is not None and bool((positions < 0).all(dim=1).any()):
        raise ValueError("prefill: a row holds nothing but padding")
    out = None
    for chunk in parts:
        ends = [row for row, column in enumerate(last) if chunk.start <= column < chunk.stop]
        at = None if positions is None else positions[:, chunk]
        soft = None if images is None else images[chunk]
        logits = model(tokens[:, chunk], at, cache=cache, logits="last" if ends else "none", images=soft)
        if ends:
            out = torch.empty_like(logits[:, -1]) if out is None else out
            out[ends] = logits[ends, -1]
    return out


@torch.inference_mode()
def decode_one_token(
    model: Gemma4,
    token: Tensor,
    cache: KVCache,
    sampling: Sampling | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Feeds token [B, 1] and draws the next one, [B, 1]; without `sampling` the likeliest. -1 as in `sample`."""
    logits = model(token, cache=cache, logits="last")
    return _draw(logits[:, -1], sampling or Sampling(temperature=0), generator)


@torch.inference_mode()
def generate(
    model: Gemma4,
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
    max_chunk: int = 512,
    images: Sequence["ImageSource"] = (),
    encoder: "ImageEncoder | None" = None,
) -> Generation:
    """Continues `prompt` until a stop token, `max_new_tokens`, or the end of the context.

    Args:
        prompt: a user's message (raw text with chat=False), a list of chat messages, or token ids taken as they are.
        images: shown with the prompt: before a user's message; elsewhere at its image tokens, one for each image.
        encoder: the checkpoint's vision tower, needed for `images` and run once.
        stream: called with each piece of text as soon as it is complete; the pieces join to `Generation.text`.
        max_seq_len: the context to make a cache for; by default as much as is needed and the model allows.
        max_chunk: the most prompt tokens in one forward.
    Raises ValueError for a prompt that does not fit, a bad parameter, or logits that are NaN; Interrupted.
    """
    sampling = Sampling(temperature, top_k, top_p, seed)
    start = time.perf_counter()
    ids, processed = prompt_ids(tokenizer, prompt, chat, images, encoder)
    limit = check_prompt(model.config, ids, max_seq_len)
    stop = tokenizer.stop_ids | set(model.config.eos_token_id)
    transcript = Transcript(tokenizer, stop, max_new_tokens, limit - len(ids), stream)
    tokens, soft = torch.tensor([ids], device=model.device), None
    if processed is not None:
        soft = encoder.merge(tokens, encoder.encode(processed), model.dtype)
        max_chunk = max(max_chunk, soft.longest)
    capacity = max_seq_len or min(len(ids) + max_new_tokens, limit)
    cache = model.make_cache(1, max_seq_len=capacity, max_chunk=max_chunk)
    generator = sampling.generator(model.device)

    token = _draw(prefill(model, tokens, cache, images=soft), sampling, generator)
    new = int(token)
    first = time.perf_counter()
    interrupted = False
    try:
        while transcript.add([new]):
            token = decode_one_token(model, token, cache, sampling, generator)
            new = int(token)
    except KeyboardInterrupt:
        interrupted = True
    seconds = time.perf_counter() - first
    transcript.finish()
    steps = max(0, len(transcript.tokens) - 1)
    contexts = range(len(ids) + 1, len(ids) + steps + 1)
    read = steps * _weight_bytes(model) + sum(cache_bytes(model.config, model.dtype, n) for n in contexts)
    result = transcript.generation(len(ids), first - start, seconds, read, interrupted)
    if interrupted:
        raise Interrupted(result)
    return result


def bytes_per_token(model: Gemma4, context: int) -> int:
    """Bytes that one decode step at batch 1 must read when its token attends to `context` positions (itself too).

    Every weight once, a quantized one as it is packed, but `top_k_experts` of the experts only, and one row of an
    embedding table (a tied one is read whole, as the output head); and in each layer the keys and values that are
    visible, in the model's dtype. A KV-shared layer reads its producer's again. Activations are not counted."""
    return _weight_bytes(model) + cache_bytes(model.config, model.dtype, context)


def _weight_bytes(model: Gemma4) -> int:
    config = model.config
    rows = {"embed_tokens.": config.vocab_size, "embed_tokens_per_layer.": config.vocab_size_per_layer_input}
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    read: dict[int, int] = {}
    for name, tensor in tensors:
        size = tensor.nbytes
        for table, count in rows.items():
            if name.startswith(table):
                size //= count
        if ".experts." in name:
            size = size * config.top_k_experts // config.num_experts
        # A tensor that a tied head shares with the embedding is read whole.
        read[id(tensor)] = max(size, read.get(id(tensor), 0))
    return sum(read.values())


def cache_bytes(config: TextConfig, dtype: torch.dtype, context: int) -> int:
    """Bytes of the keys and values that a token which attends to `context` positions reads, in all layers."""
    total = 0
    for layer in config.layers:
        visible = min(context, config.sliding_window) if layer.is_sliding else context
        total += 2 * visible * layer.num_key_value_heads * layer.head_dim * dtype.itemsize
    return total


def _draw(logits: Tensor, sampling: Sampling, generator: torch.Generator | None) -> Tensor:
    """logits [B, V] -> [B, 1]."""
    return sample(logits, sampling.temperature, sampling.top_k, sampling.top_p, generator)[:, None]
