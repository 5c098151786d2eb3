"""`gemma4 tokenize`: text to token ids and back."""

import json
import re
import sys
from pathlib import Path
from reprlib import repr as short
from typing import TYPE_CHECKING

import click

from gemma4_impl.cli import cli, read_prompt

if TYPE_CHECKING:
    from gemma4_impl.tokenizer import Tokenizer


@cli.command("tokenize")
@click.argument("source", metavar="SRC", type=click.Path(path_type=Path))
@click.option("--text", help="The text; '-' reads stdin.")
@click.option("--file", type=click.Path(path_type=Path), help="A file with the text, every byte of which counts.")
@click.option("--decode", is_flag=True, help="The text holds token ids, such as 2,105,9259; print what they say.")
@click.option("--no-bos", is_flag=True, help="Put no BOS first; with --decode, leave out one that comes first.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object instead.")
def tokenize_command(
    source: Path, text: str | None, file: Path | None, decode: bool, no_bos: bool, as_json: bool
) -> None:
    """Show the tokens of a text as the tokenizer of SRC, a checkpoint folder or a GGUF file, has them.

    Each line is a token id, a tab, and the vocabulary's entry: a space is ▁, a byte <0xF0>, and what would not show
    is escaped as in Python. How many there are goes to stderr.
    """
    if (text is None) == (file is None):
        raise click.UsageError("Give either --text or --file", click.get_current_context())
    given = read_prompt(text, "--text") if file is None else read_text(file)
    ids = parse_ids(given) if decode else None

    from gemma4_impl.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_pretrained(source)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that cannot show a character still shows ids
    if ids is None:
        ids = tokenizer.encode(given, bos=not no_bos)
        pieces = pieces_of(tokenizer, ids)
        lines = [f"{token}\t{printable(piece)}" for token, piece in zip(ids, pieces, strict=True)]
        out = json.dumps({"ids": ids, "pieces": pieces}) if as_json else "\n".join(lines)
    else:
        pieces_of(tokenizer, ids)
        start = 1 if no_bos and ids[:1] == [tokenizer.bos_id] else 0
        decoded = tokenizer.decode(ids[start:], skip_special=False)
        out = json.dumps({"text": decoded}) if as_json else decoded
    if out or decode:
        click.echo(out)
    click.echo(f"gemma4: {len(ids)} token{'' if len(ids) == 1 else 's'}", err=True)


def pieces_of(tokenizer: "Tokenizer", ids: list[int]) -> list[str]:
    """The vocabulary's entry for each id. Raises ValueError for an id that has none."""
    pieces = [tokenizer.token(token) for token in ids]
    if None in pieces:
        i = pieces.index(None)
        raise ValueError(f"{tokenizer.source}: token {i + 1} of {len(ids)}, {short(ids[i])}, is not in its vocabulary")
    return pieces


def printable(piece: str) -> str:
    """`piece` in one line: backslashes, and characters that would not show as themselves, as Python's escapes."""
    return "".join(
        char if char.isprintable() and char != "\\" else char.encode("unicode_escape").decode() for char in piece
    )


def parse_ids(text: str) -> list[int]:
    """The ids in a text such as "2,105,9259"; spaces and line breaks separate too, and what follows a tab is ignored,
    as in this command's own output. Raises ValueError."""
    parts = [part for line in text.splitlines() for part in re.split(r"[, ]+", line.partition("\t")[0]) if part]
    for i, part in enumerate(parts):
        if not re.fullmatch(r"[0-9]{1,19}", part):
            raise ValueError(f"--decode: number {i + 1} is {short(part)}; expected token ids, such as 2,105,9259")
    return [int(part) for part in parts]


def read_text(file: Path) -> str:
    """The whole file, line breaks as they are. Raises FileNotFoundError, and ValueError for text that is not UTF-8."""
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file")
    try:
        return file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text (byte {error.start})") from None
