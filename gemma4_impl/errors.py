"""How error messages quote what a file says, which may be anything, of any length."""

from reprlib import Repr

_LENGTH = 120

_cut = Repr()
_cut.maxstring = _cut.maxother = _cut.maxlong = _LENGTH


def short(value: object) -> str:
    """repr(value), on one line, and cut in the middle when long."""
    return _cut.repr(value)


def plain(name: str) -> str:
    """A name as it is, without quotes, unless it is long or would not show."""
    return name if name.isprintable() and len(name) <= _LENGTH else short(name)


def one_line(error: Exception) -> str:
    """A library's message on one line of at most 300 characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:200]} ... {text[-80:]}"
