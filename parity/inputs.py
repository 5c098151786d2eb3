"""The token sequence that a check runs on: the user's, or one long enough to leave the sliding window."""

from pathlib import Path

import torch

from gemma4_impl.config import TextConfig
from gemma4_impl.generate import check_prompt
from gemma4_impl.tokenizer import Tokenizer

_LEAST = 40
_PAST_WINDOW = 48
_TEXT = """A bridge is tested by driving lorries over it, one after another, each a little heavier than the last. Nobody
writes "the bridge looked fine from the bank" in the report. You measure how far the deck sags: 3.2 mm, 3.4 mm, 3.9 mm,
and you compare that with what the drawing says. If it sags twice as much, you look for the bolt that is missing.
def sag(load, length): return load * length**3 / (48 * E * I)  # E in pascals, I in m^4
Die Messung ist nicht das Ziel; sie ist der Weg. Qui mesure deux fois ne coupe qu'une fois. 測定は二度、切断は一度。
And then, when the last lorry has gone and the deck is level again, you sign: it is the bridge that was drawn. """


def default_tokens(config: TextConfig, path: Path, length: int | None = None) -> list[int]:
    """BOS and `length` - 1 tokens: of a built-in text in the checkpoint's own tokenizer where it has a full one, else
    drawn at random with a fixed seed. By default the sequence ends 48 tokens past the sliding window.

    Raises ValueError for a length that the context does not hold."""
    length = (
        min(max(_LEAST, config.sliding_window + _PAST_WINDOW), config.max_position_embeddings)
        if length is None
        else length
    )
    check_tokens(config, [0] * length)
    if (path.is_file() or (path / "tokenizer.json").is_file()) and config.vocab_size > 10_000:
        ids = Tokenizer.from_pretrained(path).encode(_TEXT, bos=False)
        ids = ids * (length // len(ids) + 1)
    else:
        generator = torch.Generator().manual_seed(4)
        # The first ids are special: an image marker, say, means something else to a multimodal model.
        low = min(107, config.vocab_size // 2)
        ids = torch.randint(low, config.vocab_size, (length,), generator=generator).tolist()
    return [config.bos_token_id, *ids[: length - 1]]


def check_tokens(config: TextConfig, tokens: list[int]) -> list[int]:
    """Returns `tokens`. Raises ValueError if there is none, one is unknown, or they exceed the context."""
    if not tokens:
        raise ValueError("no tokens: give at least one")
    check_prompt(config, tokens)
    return tokens
