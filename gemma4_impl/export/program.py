"""What a backend is asked for, and what it makes of a model: settings, methods, the constants that programs carry."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gemma4_impl.config import TextConfig
from gemma4_impl.errors import short

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDE = 1 << 48
"""No size or constant reaches this."""
INT_CONSTANTS = (
    "get_max_seq_len",
    "get_max_prefill_chunk",
    "get_vocab_size",
    "get_bos_id",
    "use_kv_cache",
    "get_n_layers",
    "get_sliding_window",
)
EOS = "get_eos_ids"


@dataclass(frozen=True)
class Settings:
    """What a program is made for. Raises ValueError naming the field."""

    max_seq_len: int
    """Tokens of context that the caches hold."""
    max_prefill_chunk: int
    """The most tokens in one call."""
    dtype: torch.dtype
    taps: bool = False
    """Whether the program also returns the model's taps, as further outputs."""
    eos_ids: tuple[int, ...] = ()
    """Ids that end a reply beside those of config.json: what the tokenizer's files say."""

    def __post_init__(self) -> None:
        for name in ("max_seq_len", "max_prefill_chunk"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value < WIDE:
                raise ValueError(f"{name} = {short(value)}: must be an integer >= 1")
        if self.max_prefill_chunk > self.max_seq_len:
            raise ValueError(f"max_prefill_chunk = {self.max_prefill_chunk} exceeds max_seq_len = {self.max_seq_len}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype = {short(self.dtype)}: must be float32, bfloat16 or float16")


@dataclass(frozen=True)
class Limits:
    """What every call of a program keeps to."""

    max_seq_len: int
    max_prefill_chunk: int
    vocab_size: int

    def check_chunk(self, tokens: Tensor, position: int, length: int) -> int:
        """T of tokens int64 [1, T], the first at `position`, that go on with a sequence of `length` tokens.

        Raises ValueError for other tensors, for tokens that do not continue the sequence or are too many, and for ids
        outside the vocabulary."""
        if tokens.dtype != torch.long or tokens.dim() != 2 or tokens.shape[0] != 1 or not tokens.shape[1]:
            raise ValueError(
                f"tokens are {dtype_name(tokens.dtype)} {list(tokens.shape)}; expected int64 [1, T], T >= 1"
            )
        T = tokens.shape[1]
        if self.max_prefill_chunk < T:
            raise ValueError(f"{T} tokens at once; the program takes {self.max_prefill_chunk}")
        if position != length:
            raise ValueError(f"position {short(position)} does not continue the sequence, which ends at {length}")
        if position + T > self.max_seq_len:
            raise ValueError(f"position {position + T - 1} is past the end (max_seq_len = {self.max_seq_len})")
        low, high = (int(t) for t in tokens.aminmax())
        if low < 0 or high >= self.vocab_size:
            raise ValueError(f"token id {low if low < 0 else high} is outside the vocabulary of {self.vocab_size}")
        return T


def constants(config: TextConfig, settings: Settings) -> dict[str, int | list[int]]:
    """The metadata that every program carries as constant methods, and its manifest too."""
    return {
        "get_max_seq_len": settings.max_seq_len,
        "get_max_prefill_chunk": settings.max_prefill_chunk,
        "get_vocab_size": config.vocab_size,
        "get_bos_id": config.bos_token_id,
        EOS: sorted({*config.eos_token_id, *settings.eos_ids}),
        "use_kv_cache": 1,
        "get_n_layers": config.num_hidden_layers,
        "get_sliding_window": config.sliding_window,
    }


def cache_sizes(cache: nn.Module) -> dict[str, dict[str, Any]]:
    """dtype, shape and bytes of every buffer of a cache, for the manifest."""
    return {
        name: {"dtype": dtype_name(b.dtype), "shape": list(b.shape), "bytes": b.nbytes}
        for name, b in cache.named_buffers()
    }


@dataclass(frozen=True)
class Value:
    """An input or output of a method. An entry of its shape is a size, or the bounds of one: {"min":, "max":}."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | dict[str, int], ...]


@dataclass(frozen=True)
class Method:
    inputs: list[Value]
    outputs: list[Value]


@dataclass(frozen=True)
class Lowered:
    """What a backend made of a model."""

    write: Callable[[Path], None]
    """Writes model.pte, and .ptd files if there are any, into a folder."""
    methods: dict[str, Method]
    constants: dict[str, int | list[int]]
    caches: dict[str, Any]
    """What the program keeps between calls; JSON."""
    extra: dict[str, Any] = field(default_factory=dict)
    """What else the backend wants to find again; JSON."""


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
