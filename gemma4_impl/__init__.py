"""Gemma 4 in PyTorch: `from gemma4_impl import Gemma4, Tokenizer`, and `generate` from `gemma4_impl.generate`."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemma4_impl.config import VARIANTS as VARIANTS
    from gemma4_impl.config import TextConfig as TextConfig
    from gemma4_impl.model.decoder import Gemma4 as Gemma4
    from gemma4_impl.tokenizer import Tokenizer as Tokenizer

_WHERE = {
    "Gemma4": "model.decoder",
    "TextConfig": "config",
    "Tokenizer": "tokenizer",
    "VARIANTS": "config",
}
__all__ = list(_WHERE)


def __getattr__(name: str) -> Any:
    # torch takes seconds to import, which `gemma4 --help` must not wait for.
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
