"""How the reports write figures and lines, on the page and in the terminal."""

import math
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text


def sci(value: float | str | None) -> str:
    """3.1e-3; JSON's strings for infinities and NaN are welcome too."""
    if value is None:
        return "-"
    value = float(value)
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}" if int(exponent) else mantissa


def ratio(value: float | str) -> str:
    value = float(value)
    if not math.isfinite(value):
        return f"{value:g}"
    return f"{value:.2f}" if value < 10 else f"{value:.0f}" if value < 1000 else sci(value)


def cosine(value: float | str) -> str:
    return f"{float(value):.6f}".rstrip("0").rstrip(".")


def count(value: float) -> str:
    """21.3, 1,234: three digits or more, and no exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def plain(value: Any) -> str:
    """A value of `meta` for a reader: long lists by their length."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(item)}" for key, item in value.items())
    if isinstance(value, list):
        more = f", ... ({len(value)} in all)" if len(value) > 5 else ""
        return ", ".join(map(plain, value[:5])) + more
    return str(value)


def simple_table(first: str, *columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(first, overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", overflow="fold")
    return table


def write_line(console: Console, text: str, style: str = "") -> None:
    """One line, however narrow the terminal: it can be searched for and copied."""
    console.print(Text(text, style=style), soft_wrap=True)
