"""`gemma4 export` makes a program of a checkpoint, or shows what is in one; `gemma4 run` generates text with it."""

import functools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gemma4_impl.cli import (
    DTYPES,
    cli,
    prompt_options,
    prompt_or_tokens,
    resolve_dtype,
    sampling_options,
    show_generation,
)
from gemma4_impl.cli_quantize import size_text, terminable

if TYPE_CHECKING:
    from gemma4_impl.export.folder import Manifest
    from gemma4_impl.generation import Generation

BACKENDS = ("xnnpack", "mlx", "cuda")


@cli.command("export")
@click.argument("source", metavar="[SRC]", required=False, type=click.Path(path_type=Path))
@click.option("--backend", type=click.Choice(BACKENDS), help="What runs the program.")
@click.option("--max-seq-len", type=click.IntRange(min=1), help="Context length.  [default: 4096, or the model's]")
@click.option("--max-prefill-chunk", type=click.IntRange(min=1), help="Most tokens in one call.  [default: 512]")
@click.option("--dtype", type=click.Choice(DTYPES), help="[default: the backend's]")
@click.option("--vision", is_flag=True, help="With the vision tower, as methods of their own.")
@click.option("--taps", is_flag=True, help="The program also returns its taps (xnnpack), for `gemma4 parity`.")
@click.option("-o", "--output", "out", type=click.Path(path_type=Path), help="Folder to write; new.")
@click.option("--inspect", "inspected", type=click.Path(path_type=Path), help="Show what is in this .pte file instead.")
@click.option("--json", "as_json", is_flag=True, help="With --inspect: print a JSON object.")
def export_command(
    source: Path | None,
    backend: str | None,
    max_seq_len: int | None,
    max_prefill_chunk: int | None,
    dtype: str | None,
    vision: bool,
    taps: bool,
    out: Path | None,
    inspected: Path | None,
    as_json: bool,
) -> None:
    """Export the checkpoint, quantized checkpoint or GGUF file SRC to an ExecuTorch program.

    OUT gets model.pte (and .ptd files), config.json, the tokenizer, and manifest.json, which says what they are.
    """
    context = click.get_current_context()
    if inspected is not None:
        if source is not None or out is not None or backend is not None:
            raise click.UsageError("--inspect takes neither SRC nor --backend nor --output", context)
        _inspect(inspected, as_json)
        return
    if source is None or backend is None or out is None:
        raise click.UsageError("Give SRC, --backend and --output, or --inspect FILE.pte", context)
    if as_json:
        raise click.UsageError("--json needs --inspect", context)

    from gemma4_impl.export.front import export

    with terminable(), stages() as report:
        manifest = export(
            source,
            out,
            backend,
            max_seq_len=max_seq_len,
            max_prefill_chunk=max_prefill_chunk,
            dtype=resolve_dtype(dtype),
            vision=vision,
            taps=taps,
            progress=True,
            report=report,
        )
    for line in summary(manifest, out):
        click.echo(line)


@cli.command("run")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@prompt_options
@sampling_options
@click.option("--runner", is_flag=True, help="Run it in the C++ runner that `make runner` builds.")
def run_command(
    folder: Path,
    prompt: str | None,
    tokens: str | None,
    images: tuple[Path, ...],
    raw: bool,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int | None,
    runner: bool,
) -> None:
    """Generate text with the program that `gemma4 export` wrote to the folder DIR.

    XNNPACK programs run on ExecuTorch, MLX ones node by node on MLX, CUDA ones on the GPU. The text goes to stdout as
    it comes, one line with the speed to stderr.
    """
    what = prompt_or_tokens(prompt, tokens)
    if runner and images:
        raise click.UsageError("--runner takes no --image", click.get_current_context())

    from gemma4_impl.generation import Sampling

    Sampling(temperature, top_k, top_p, seed)

    from gemma4_impl.export import run

    if runner:
        generate = functools.partial(run.generate_in_runner, *run.open_texts(folder))
    else:
        exported, session, tokenizer = run.open_program(folder)
        encoder = run.open_encoder(exported, session) if images else None
        generate = functools.partial(run.generate, exported, session, tokenizer, images=images, encoder=encoder)
    show_generation(
        generate,
        what,
        stats_line,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        chat=not raw,
    )


def stats_line(g: "Generation") -> str:
    """Counts, and the speed of both parts, in one line."""
    line = f"gemma4: prompt {g.prompt_tokens} tokens, first token after {g.prefill_seconds:.3f} s"
    line += f" ({g.prefill_tokens_per_second:.1f} tokens/s); new {len(g.tokens)} tokens"
    if g.decode_tokens_per_second:
        line += f", {g.decode_tokens_per_second:.1f} tokens/s"
    return f"{line}; stop: {g.stop_reason}"


def summary(manifest: "Manifest", out: Path) -> list[str]:
    """What was written."""
    from gemma4_impl.export.folder import PROGRAM
    from gemma4_impl.export.program import dtype_name

    caches = sum(c.get("bytes", 0) for c in manifest.caches.values() if isinstance(c, dict))
    return [
        f"{out}: {manifest.backend}, {dtype_name(manifest.dtype)}, {size_text(manifest.nbytes)}; "
        f"methods {', '.join(manifest.methods)}",
        f"- context {manifest.max_seq_len} tokens, up to {manifest.max_prefill_chunk} in one call; "
        f"caches {size_text(caches)}",
        f"- what runs where: gemma4 export --inspect {out / PROGRAM}",
    ]


@contextmanager
def stages() -> Iterator[Callable[[str], None]]:
    """A line on stderr, if that is a terminal, with what is being done and for how long."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as shown:
        task = shown.add_task("reading", total=None)
        yield lambda stage: shown.update(task, description=stage)


def _inspect(file: Path, as_json: bool) -> None:
    from gemma4_impl.export.inspect import inspect

    found = inspect(file)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    _print(found)


def _print(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    sizes = ", ".join(f"{name} {size_text(size)}" for name, size in found["bytes"].items())
    click.echo(f"{found['file']}: {sizes}")
    table = Table("method", "delegate", "calls", "nodes", "payload", "outside", "delegated", box=None)
    for name, method in found["methods"].items():
        share = method["share_delegated"]
        for row, (delegate, part) in enumerate(method["delegates"].items() or [("none", None)]):
            first = row == 0
            table.add_row(
                name if first else "",
                delegate,
                str(part["calls"]) if part else "",
                str(part["nodes"] if part["nodes"] is not None else "?") if part else "",
                size_text(part["bytes"]) if part else "",
                str(method["nodes_outside"]) if first else "",
                ("?" if share is None else f"{100 * share:.1f} %") if first else "",
            )
    Console(width=120, highlight=False).print(table)
    for name, method in found["methods"].items():
        if operators := method["operators"]:
            most = sorted(operators.items(), key=lambda item: (-item[1], item[0]))
            click.echo(f"- {name} outside delegates: {', '.join(f'{op} x{n}' for op, n in most)}")
    for name, value in found["constants"].items():
        click.echo(f"- {name} = {value}")
