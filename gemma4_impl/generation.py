"""What generation takes and gives, whatever computes it: prompts, how to sample, what came of it."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from gemma4_impl.config import TextConfig
from gemma4_impl.tokenizer import StreamDecoder, Tokenizer

if TYPE_CHECKING:
    import torch

    from gemma4_impl.vision.processing import ImageSource, ProcessedImages
    from gemma4_impl.vision.tower import ImagePrompts

Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int]


@dataclass(frozen=True)
class Sampling:
    """How to sample. Temperature 0 is greedy; None turns a filter off; seed None draws a new seed every time.
    Raises ValueError naming the field."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        check_sampling(self.temperature, self.top_k, self.top_p)
        if self.seed is not None and not (_is_int(self.seed) and 0 <= self.seed < 2**64):
            raise ValueError(f"seed = {self.seed!r}: must be an integer from 0 to 2**64 - 1")

    def generator(self, device: "torch.device | str") -> "torch.Generator":
        """A generator on `device` that starts at the seed."""
        import torch

        generator = torch.Generator(device)
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


def check_sampling(temperature: object, top_k: object, top_p: object) -> None:
    """Raises ValueError for a parameter out of its range."""
    if not _is_number(temperature) or temperature < 0:
        raise ValueError(f"temperature = {temperature!r}: must be a number >= 0 (0 is greedy)")
    if top_k is not None and not (_is_int(top_k) and top_k >= 1):
        raise ValueError(f"top_k = {top_k!r}: must be an integer >= 1 (None turns it off)")
    if top_p is not None and not (_is_number(top_p) and 0 < top_p <= 1):
        raise ValueError(f"top_p = {top_p!r}: must be in (0, 1] (1 turns it off)")


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


class Transcript:
    """Takes down what is drawn for one prompt.

    Args:
        stop: ids that end it.
        max_new_tokens: after so many it ends too.
        room: how many new tokens the context can take in; one more may be drawn, for the last is not fed back.
        stream: called with each piece of text that is complete; the pieces join to `text`.
    Raises ValueError if max_new_tokens < 1."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Collection[int],
        max_new_tokens: int,
        room: int,
        stream: Callable[[str], None] | None = None,
    ):
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens = {max_new_tokens}: must be at least 1")
        self.tokens: list[int] = []
        self._most = min(max_new_tokens, room + 1)
        self._stop, self._stream, self._stopped = stop, stream, False
        self._decoder = StreamDecoder(tokenizer)
        self._pieces: list[str] = []

    @property
    def left(self) -> int:
        """How many more tokens may follow."""
        return 0 if self._stopped else self._most - len(self.tokens)

    def add(self, tokens: Sequence[int]) -> bool:
        """Takes down `tokens` up to the end, and says whether more may follow. Raises ValueError for -1, a token that
        could not be drawn."""
        for token in tokens:
            if token < 0:
                drawn = len(self.tokens)
                raise ValueError(f"no next token after {drawn} new ones: the logits are NaN; try another dtype")
            self.tokens.append(token)
            self._stopped = token in self._stop
            if not self._stopped:
                self._emit(self._decoder.push(token))
            if not self.left:
                break
        return bool(self.left)

    def finish(self) -> None:
        """Adds the text that waited for a next token."""
        self._emit(self._decoder.finish())

    def generation(
        self, prompt_tokens: int, prefill_seconds: float, decode_seconds: float, decode_bytes: int, interrupted: bool
    ) -> Generation:
        reason = "interrupted" if interrupted else "eos" if self._stopped else "length"
        text, tokens = "".join(self._pieces), tuple(self.tokens)
        return Generation(text, tokens, prompt_tokens, prefill_seconds, decode_seconds, decode_bytes, reason)

    def _emit(self, text: str) -> None:
        self._pieces.append(text)
        if self._stream is not None and text:
            self._stream(text)


def prompt_ids(
    tokenizer: Tokenizer,
    prompt: Prompt,
    chat: bool,
    images: Sequence["ImageSource"],
    encoder: "ImagePrompts | None",
) -> tuple[list[int], "ProcessedImages | None"]:
    """The prompt's ids with room for its images, and what goes there. Raises ValueError if there are more images than
    places or the other way round, and as the image processor does."""
    ids = encode_prompt(tokenizer, prompt, chat, len(images))
    if not images:
        if tokenizer.image_id in ids:
            raise ValueError("the prompt has an image token (<|image|>) but no image comes with it; give one (--image)")
        return ids, None
    if encoder is None:
        raise ValueError("images need the vision tower of a multimodal checkpoint")
    processed = encoder.processor(images)
    return encoder.expand(ids, processed.num_soft_tokens), processed


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


def check_prompt(config: TextConfig, ids: Sequence[int], max_seq_len: int | None = None) -> int:
    """The most tokens the context may hold. Raises ValueError if the prompt has more, or an unknown one."""
    most, size = config.max_position_embeddings, config.vocab_size
    limit = most if max_seq_len is None else max_seq_len
    if len(ids) > limit:
        fix = "shorten it" if limit >= most else f"shorten it or raise max_seq_len (the model allows {most})"
        raise ValueError(f"the prompt has {len(ids)} tokens but the context holds {limit}; {fix}")
    # Most devices cannot refuse a wrong id: on a GPU it ends torch's CUDA context, and JAX takes another row instead.
    if wrong := [i for i in ids if not 0 <= i < size]:
        raise ValueError(f"token id {wrong[0]} is outside the model's vocabulary of {size}")
    return limit


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _rate(amount: float, seconds: float) -> float:
    return amount / seconds if amount and seconds > 0 else 0.0
