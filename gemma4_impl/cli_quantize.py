"""`gemma4 quantize`: a checkpoint folder in, an int4/int8 one in torchao's format out."""

import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gemma4_impl.cli import cli

if TYPE_CHECKING:
    from gemma4_impl.quant.sqnr import QuantizationReport

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
_LOWEST = 3


@cli.command("quantize")
@click.argument("source", metavar="SRC", type=click.Path(path_type=Path))
@click.option("-o", "--output", "out", required=True, type=click.Path(path_type=Path), help="Folder to write; new.")
@click.option("--recipe", default="default", help="A built-in recipe's name, or a .toml or .json file.")
@click.option("--shard-size", default="5GB", help="Largest weight file, such as 500MB or 2GiB.")
def quantize_command(source: Path, out: Path, recipe: str, shard_size: str) -> None:
    """Quantize the checkpoint in the folder SRC.

    OUT gets weights in torchao's safetensors format, which `gemma4` and transformers load, with config.json, the
    tokenizer, and what was lost in each tensor: quantization.json and quantization.html.
    """
    shard_bytes = parse_size(shard_size)

    from gemma4_impl.quant.recipe import load_recipe
    from gemma4_impl.quant.save import quantize_checkpoint

    with terminable(), bar("quantizing") as progress:
        report = quantize_checkpoint(source, out, load_recipe(recipe), shard_bytes, progress)
    for line in summary(report, out):
        click.echo(line)


def parse_size(text: str) -> int:
    """Bytes in a text such as "5GB". Raises ValueError."""
    match = re.fullmatch(r"([0-9]{1,15})([KMG]I?)?B?", text.strip().upper())
    if not match or not int(match[1]):
        raise ValueError(f"--shard-size {text!r}: expected a size such as 500MB, 5GB or 2GiB")
    return int(match[1]) * _UNITS[match[2] or ""]


def summary(report: "QuantizationReport", out: Path) -> list[str]:
    """Sizes, the ratio of signal to noise, and whatever happened to tensors that the recipe does not speak of."""
    lines = [
        f"{out}: {size_text(report.bytes_before)} -> {size_text(report.bytes_after)}; {len(report.quantized)} tensors "
        f"quantized, {report.bits_per_weight:.2f} bits a weight, SQNR {report.sqnr_db:.1f} dB"
    ]
    lowest = sorted(report.quantized, key=lambda t: t.sqnr_db)[:_LOWEST]
    lines.append("- lowest SQNR: " + ", ".join(f"{t.name} {t.sqnr_db:.1f} dB" for t in lowest))
    if report.untied:
        lines.append("- lm_head.weight, which was the embedding, is a tensor of its own now")
    if report.towers:
        kinds = sorted({name.removeprefix("model.").partition(".")[0] for name in report.towers})
        lines.append(
            f"- copied as they are: {len(report.towers)} tensors of {', '.join(kinds)} "
            f"({size_text(report.tower_bytes)})"
        )
    if report.dropped:
        more = f" and {len(report.dropped) - _LOWEST} more" if len(report.dropped) > _LOWEST else ""
        lines.append(f"- left out, the model does not read them: {', '.join(report.dropped[:_LOWEST])}{more}")
    return [*lines, f"- every tensor: {out / 'quantization.html'}"]


def size_text(count: int) -> str:
    """Bytes as people write them: "18.7 GB"."""
    unit, scale = next(((u, s) for u, s in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if count >= s), ("bytes", 1))
    return f"{count / scale:.{1 if scale > 1 else 0}f} {unit}"


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, so that what was written so far is removed."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar with Mweights/s and the time left, on stderr, if that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed / 1e6:.0f} Mweights/s" if task.speed else "", style="progress.data.speed")

    columns = (TextColumn("{task.description}"), BarColumn(), Rate(), TimeRemainingColumn())
    terminal = sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not terminal) as shown:
        task = shown.add_task(what, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)
