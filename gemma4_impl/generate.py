"""The verbs of inference: prefill, decode_one_token, and generate, which turns a prompt into text and timings."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from gemma4_impl.config import TextConfig
from gemma4_impl.model.cache import KVCache
from gemma4_impl.model.decoder import Gemma4
from gemma4_impl.model.sampler import Sampling, sample
from gemma4_impl.model.soft_tokens import SoftTokens
from gemma4_impl.tokenizer import StreamDecoder, Tokenizer

if TYPE_CHECKING:
    from gemma4_impl.vision.images import ImageEncoder
    from gemma4_impl.vision.processing import ImageSource

Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int]


@dataclass(frozen=True)
class Generation:
    """What `generate` made, and how fast."""

    text: str
    tokens: tuple[int, ...]
    """The new ids; the last one is the stop token if there was one, which `text` leaves out."""
    prompt_tokens: int
    prefill_seconds: float
    """Until the first new token was known."""
    decode_seconds: float
    """For all tokens after the first."""
    decode_bytes: int
    """What the decode steps had to read, see `bytes_per_token`."""
    stop_reason: Literal["eos", "length", "interrupted"]

    @property
    def prefill_tokens_per_second(self) -> float:
        return _rate(self.prompt_tokens, self.prefill_seconds)

    @property
    def decode_tokens_per_second(self) -> float:
        """0 if there was no second token to time."""
        return _rate(max(0, len(self.tokens) - 1), self.decode_seconds)

    @property
    def gb_per_second(self) -> float:
        return _rate(self.decode_bytes, self.decode_seconds) / 1e9


class Interrupted(KeyboardInterrupt):
    """Ctrl-C while decoding; `generation` holds what was there by then."""

    def __init__(self, generation: Generation):
        super().__init__()
        self.generation = generation


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
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens = {max_new_tokens}: must be at least 1")
    start = time.perf_counter()
    ids, soft = _with_images(model, tokenizer, prompt, chat, images, encoder)
    limit = check_prompt(model.config, ids, max_seq_len)
    if soft is not None:
        max_chunk = max(max_chunk, soft.longest)
    capacity = max_seq_len or min(len(ids) + max_new_tokens, limit)
    cache = model.make_cache(1, max_seq_len=capacity, max_chunk=max_chunk)
    stop = tokenizer.stop_ids | set(model.config.eos_token_id)
    generator = sampling.generator(model.device)
    decoder = StreamDecoder(tokenizer)
    pieces: list[str] = []

    def emit(text: str) -> None:
        pieces.append(text)
        if stream is not None and text:
            stream(text)

    tokens: list[int] = []
    logits = prefill(model, torch.tensor([ids], device=model.device), cache, images=soft)
    token = _draw(logits, sampling, generator)
    new = int(token)
    first = time.perf_counter()

    reason: Literal["eos", "length", "interrupted"] = "length"
    try:
        while True:
            if new < 0:
                raise ValueError(f"no next token after {len(tokens)} new ones: the logits are NaN; try another dtype")
            tokens.append(new)
            if new in stop:
                reason = "eos"
                break
            emit(decoder.push(new))
            # The last token is not fed back, so it needs no room in the cache.
            if len(tokens) == max_new_tokens or len(ids) + len(tokens) > capacity:
                break
            token = decode_one_token(model, token, cache, sampling, generator)
            new = int(token)
    except KeyboardInterrupt:
        reason = "interrupted"
    seconds = time.perf_counter() - first
    emit(decoder.finish())
    steps = max(0, len(tokens) - 1)
    read = steps * _weight_bytes(model) + sum(_cache_bytes(model, len(ids) + i) for i in range(1, steps + 1))
    result = Generation("".join(pieces), tuple(tokens), len(ids), first - start, seconds, read, reason)
    if reason == "interrupted":
        raise Interrupted(result)
    return result


def _with_images(
    model: Gemma4,
    tokenizer: Tokenizer,
    prompt: Prompt,
    chat: bool,
    images: Sequence["ImageSource"],
    encoder: "ImageEncoder | None",
) -> tuple[list[int], SoftTokens | None]:
    """The prompt's ids with room for its images, and what goes there. Raises ValueError if there are more images than
    places or the other way round, and as the encoder does."""
    ids = encode_prompt(tokenizer, prompt, chat, len(images))
    if not images:
        if tokenizer.image_id in ids:
            raise ValueError("the prompt has an image token (<|image|>) but no image comes with it; give one (--image)")
        return ids, None
    if encoder is None:
        raise ValueError("images need the vision tower of a multimodal checkpoint")
    processed = encoder.processor(images)
    ids = encoder.expand(ids, processed.num_soft_tokens)
    tokens = torch.tensor([ids], device=model.device)
    return ids, encoder.merge(tokens, encoder.encode(processed), model.dtype)


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt, chat: bool = True, images: int = 0) -> list[int]:
    """Token ids of what `generate` accepts; text and messages begin with one BOS, a user's message with one image token
    for each of `images`. Raises ValueError for an empty list, and what the tokenizer raises."""
    if isinstance(prompt, str):
        if not chat:
            return tokenizer.encode(prompt)
        content = [*[{"type": "image"}] * images, {"type": "text", "text": prompt}] if images else prompt
        prompt = [{"role": "user", "content": content}]
    if not prompt:
        raise ValueError("the prompt is empty: it has neither messages nor tokens")
    if isinstance(prompt[0], int):
        return list(prompt)
    return tokenizer.encode(tokenizer.apply_chat_template(prompt))


def bytes_per_token(model: Gemma4, context: int) -> int:
    """Bytes that one decode step at batch 1 must read when its token attends to `context` positions (itself too).

    Every weight once, a quantized one as it is packed, but `top_k_experts` of the experts only, and one row of an
    embedding table (a tied one is read whole, as the output head); and in each layer the keys and values that are
    visible, in the model's dtype. A KV-shared layer reads its producer's again. Activations are not counted."""
    return _weight_bytes(model) + _cache_bytes(model, context)


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


def _cache_bytes(model: Gemma4, context: int) -> int:
    total = 0
    for layer in model.config.layers:
        visible = min(context, model.config.sliding_window) if layer.is_sliding else context
        total += 2 * visible * layer.num_key_value_heads * layer.head_dim * model.dtype.itemsize
    return total


def _draw(logits: Tensor, sampling: Sampling, generator: torch.Generator | None) -> Tensor:
    """logits [B, V] -> [B, 1]."""
    return sample(logits, sampling.temperature, sampling.top_k, sampling.top_p, generator)[:, None]


def check_prompt(config: TextConfig, ids: Sequence[int], max_seq_len: int | None = None) -> int:
    """The most tokens the context may hold. Raises ValueError if the prompt has more, or an unknown one."""
    most, size = config.max_position_embeddings, config.vocab_size
    limit = most if max_seq_len is None else max_seq_len
    if len(ids) > limit:
        fix = "shorten it" if limit >= most else f"shorten it or raise max_seq_len (the model allows {most})"
        raise ValueError(f"the prompt has {len(ids)} tokens but the context holds {limit}; {fix}")
    # The model checks too, but not on a GPU, where a wrong id ends the process's CUDA context.
    if wrong := [i for i in ids if not 0 <= i < size]:
        raise ValueError(f"token id {wrong[0]} is outside the model's vocabulary of {size}")
    return limit


def _rate(amount: float, seconds: float) -> float:
    return amount / seconds if amount and seconds > 0 else 0.0
