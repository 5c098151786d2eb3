"""The commands that compare: capture, compare, parity, and tiny, beside those of `gemma4_impl.cli`."""

import functools
import logging
import shlex
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gemma4_impl.cli import cli, parse_tokens, read_prompt, resolve_device
from gemma4_impl.config import VARIANTS
from parity import PATHS

if TYPE_CHECKING:
    import torch

    from gemma4_impl.config import TextConfig
    from parity.engine import Report

DTYPES = ("float32", "bfloat16", "float64")

_device = click.option("--device", help="cpu, cuda, cuda:1, mps.  [default: cuda if there is one, else cpu]")
_tokens = click.option("--tokens", help="Token ids, such as 2,9259,236888.")
_prompt = click.option(
    "--prompt",
    callback=lambda context, option, value: None if value is None else read_prompt(value),
    help="A text instead of --tokens; '-' reads stdin.",
)
_images = click.option(
    "--image",
    "images",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Put into the sequence: the first after its first token, or each at an image token.  Repeatable.",
)
_length = click.option("--length", type=click.IntRange(min=1), help="Tokens of the built-in text.  [default: W + 48]")


@cli.command("tiny")
@click.argument("variant", metavar="VARIANT", type=click.Choice(tuple(VARIANTS)))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to make.")
@click.option("--multimodal", is_flag=True, help="As the text part of a multimodal checkpoint.")
@click.option("--hub-form", is_flag=True, help="config.json in the flat form of hub checkpoints.")
@click.option("--shards", type=click.IntRange(min=1), default=1)
def tiny_command(variant: str, output: Path, multimodal: bool, hub_form: bool, shards: int) -> None:
    """Make a tiny random checkpoint of VARIANT (E2B, E4B, 26B-A4B, 31B) in Hugging Face format."""
    _need_transformers()
    from reference.tiny import make_tiny

    make_tiny(variant, output, multimodal=multimodal, hub_form=hub_form, shards=shards)
    click.echo(str(output))


@cli.command("capture")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--impl", type=click.Choice(("torch", "jax", "hf")), default="torch")
@click.option("--dtype", type=click.Choice(DTYPES), default="float32", help="float64 with hf is the truth.")
@click.option("--weights", type=click.Choice(DTYPES), help="With float64: round weights to this first.  [float32]")
@click.option("--attention", type=click.Choice(("eager", "sdpa")), default="eager", help="With hf.")
@click.option("--path", "cache_path", type=click.Choice(PATHS), default="full", help="Not with hf: the cache path.")
@click.option("--stream", is_flag=True, help="With hf: leave the weights on disk, a layer in memory at a time.")
@click.option("--routing", type=click.Path(path_type=Path), help="Tap file whose expert choices to follow.")
@click.option("--taps", "glob", default="*", help="Only taps whose names match, such as 'layers.3.*'.")
@_device
@_tokens
@_prompt
@_length
@_images
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Tap file to write.")
def capture_command(
    checkpoint: Path,
    impl: str,
    dtype: str,
    weights: str | None,
    attention: str,
    cache_path: str,
    stream: bool,
    routing: Path | None,
    glob: str,
    device: str | None,
    tokens: str | None,
    prompt: str | None,
    length: int | None,
    images: tuple[Path, ...],
    output: Path,
) -> None:
    """Run the model in CHECKPOINT on a token sequence and write its taps to a file."""
    import torch

    from gemma4_impl.checkpoint import open_checkpoint
    from gemma4_impl.config import TextConfig
    from gemma4_impl.taps import tap_names
    from parity import tapfile
    from parity.compare import routing_of
    from parity.images import fingerprint as fingerprint_of
    from parity.images import place

    if weights and dtype != "float64":
        raise ValueError(f"--weights {weights}: only with --dtype float64; in {dtype} the weights are rounded to it")
    if impl == "hf" and cache_path != "full":
        raise ValueError(f"--path {cache_path}: the reference is always run as one full forward")
    config = TextConfig.from_file(checkpoint)
    fingerprint = open_checkpoint(checkpoint).fingerprint()
    if images and stream:
        raise ValueError("--image: not with --stream, which loads the text model only")
    sequence, shown = place(checkpoint, _sequence(config, checkpoint, tokens, prompt, length), images)
    where = resolve_device(device)
    top_k = config.top_k_experts if config.enable_moe_block else 0
    routes, source = {}, "own"
    if routing is not None:
        truth = tapfile.load(routing)
        seen = truth.meta.fingerprint, truth.meta.tokens, truth.meta.images
        if seen != (fingerprint, tuple(sequence), fingerprint_of(shown)):
            raise ValueError(f"{routing}: was captured from other weights, tokens or images than these")
        routes, source = routing_of(truth.taps, top_k), f"{truth.meta.impl} {truth.meta.dtype}"
    compute = getattr(torch, dtype)
    rounded = getattr(torch, weights or ("float32" if dtype == "float64" else dtype))
    if impl == "hf":
        _need_transformers()
        from parity.quantized import quantized_at
        from reference.hf import HFReference

        quantized, truth = quantized_at(checkpoint), dtype == "float64"
        weights = quantized and quantized.source()
        if images and quantized:
            raise ValueError("--image: not with --impl hf and quantized weights, which it runs as text models")
        reference = HFReference(
            checkpoint, rounded, truth=truth, attention=attention, device=where, stream=stream, weights=weights
        )
        taps = reference.capture([sequence], glob=glob, routing=routes, images=shown)
    else:
        if impl == "torch":
            from parity.candidate import TorchCandidate as Candidate
        else:
            from parity.candidate_jax import JaxCandidate as Candidate
        candidate = Candidate(checkpoint, compute, where, rounded)
        taps = candidate.capture(sequence, cache_path, glob=glob, routing=routes, images=shown)
    if not taps:
        known = ", ".join(tap_names(config)[:4])
        raise ValueError(f"--taps {glob!r} matches none of the model's taps ({known}, ...)")
    meta = tapfile.TapMeta(
        fingerprint=fingerprint,
        tokens=tuple(sequence),
        impl=impl,
        dtype=dtype,
        weights=str(rounded).removeprefix("torch."),
        device=_device_name(where),
        path=cache_path,
        routing=source,
        images=fingerprint_of(shown),
        top_k=top_k,
        versions=tapfile.versions(),
        precision=tapfile.precision_flags(),
    )
    tapfile.save(output, taps, meta)
    click.echo(f"{output}: {len(taps)} taps of {len(sequence)} tokens, {impl} in {dtype}")


@cli.command("compare")
@click.argument("candidate", type=click.Path(path_type=Path))
@click.argument("reference", type=click.Path(path_type=Path))
@click.option("--truth", type=click.Path(path_type=Path), help="Float64 capture: with it there is a verdict.")
def compare_command(candidate: Path, reference: Path, truth: Path | None) -> None:
    """Compare the tap file CANDIDATE with REFERENCE.

    With --truth, each tap's error may be at most twice the reference's own (plus a stated floor): exit 0 if all are,
    1 if not. Without, the differences are listed and there is no verdict.
    """
    import torch
    from rich.console import Console

    from parity import tapfile
    from parity.compare import compare
    from parity.report import print_differences, print_verdict

    files = {str(path): tapfile.load(path) for path in (candidate, reference, *([truth] if truth else []))}
    names = list(files)
    for other in names[1:]:
        tapfile.check_comparable(files[names[0]], files[other], (names[0], other))
    mine, theirs = files[str(candidate)], files[str(reference)]
    console = Console()
    if truth is None:
        dtype = getattr(torch, mine.meta.dtype)
        result = compare(mine.taps, theirs.taps, [theirs.taps], dtype, top_k=mine.meta.top_k)
        print_differences(result, console)
        return
    right = files[str(truth)]
    if right.meta.dtype != "float64":
        raise ValueError(f"--truth {truth}: is a {right.meta.dtype} capture; the truth is one in float64")
    if mine.meta.dtype != theirs.meta.dtype:
        raise ValueError(
            f"{candidate} is in {mine.meta.dtype} and {reference} in {theirs.meta.dtype}: the budget is the "
            f"reference's own error in the candidate's dtype; capture the reference in {mine.meta.dtype}"
        )
    if right.meta.weights != mine.meta.weights:
        raise ValueError(
            f"--truth {truth}: was captured with weights rounded to {right.meta.weights}, the candidate's are "
            f"{mine.meta.weights}; capture the truth with --weights {mine.meta.weights}"
        )
    result = compare(mine.taps, right.taps, [theirs.taps], getattr(torch, mine.meta.dtype), top_k=mine.meta.top_k)
    print_verdict(result, console)
    sys.exit(1 if result.red else 0)


@cli.command("parity")
@click.argument("checkpoints", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--candidate",
    "candidates",
    metavar="torch|jax|quantized:DIR|gguf:FILE|pte:DIR",
    multiple=True,
    help="Repeatable. DIR or FILE was made from the CHECKPOINT, which may be left out. Instead of DIR a recipe, such "
    "as quantized:default, makes one; without a CHECKPOINT, gguf:Q4_K_M makes a tiny FILE. pte:DIR is an exported "
    "program, whose CHECKPOINT may also be quantized or a GGUF file; pte:xnnpack and pte:mlx export one.  [default: "
    "torch; without a CHECKPOINT one of each but pte]",
)
@click.option("--reference", type=click.Choice(("hf", "jax")), default="hf", help="jax: ours, for --candidate torch.")
@click.option("--dtype", "dtypes", type=click.Choice(DTYPES[:2]), multiple=True, help="Repeatable.  [default: both]")
@click.option("--path", "paths", type=click.Choice(PATHS), multiple=True, help="Repeatable.  [default: all]")
@_device
@_tokens
@_prompt
@_length
@_images
@click.option("--stream", is_flag=True, help="Leave the reference's weights on disk, a layer in memory at a time.")
@click.option("--grad", is_flag=True, help="Check the gradient of a loss for every parameter, not the taps.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("build/parity"))
def parity_command(
    checkpoints: tuple[Path, ...],
    candidates: tuple[str, ...],
    reference: str,
    dtypes: tuple[str, ...],
    paths: tuple[str, ...],
    device: str | None,
    tokens: str | None,
    prompt: str | None,
    length: int | None,
    images: tuple[Path, ...],
    stream: bool,
    grad: bool,
    output: Path,
) -> None:
    """Prove the model in each of CHECKPOINTS, tap by tap; without any, tiny ones of every variant.

    Our models, torch and jax, if both are candidates, and the reference are also shown beside each other. A quantized
    candidate's error is split in three: what quantizing costs, what our reading of the file adds, and what packing,
    or exporting, adds; the last two are judged. A program is judged in its own dtype, through its own caches.
    Exit code 0: everything is in budget; 1: something is not; 2: bad input. Writes report.html and report.json.
    """
    _need_transformers()
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from parity import engine, exported, report
    from parity import images as with_images
    from parity.targets import Targets, default_paths, implementations, targets
    from parity.tasks import gradient_tasks, plain_tasks, processes_for, program_tasks, quantized_tasks, run_tasks

    if images and (stream or set(candidates) - set(engine.CANDIDATES)):
        raise ValueError("--image: only with our own models, torch and jax, and without --stream")
    if reference == "jax" and (stream or set(candidates) - set(engine.CANDIDATES)):
        raise ValueError(
            "--reference jax: only for --candidate torch, without --stream; it runs plain checkpoints whole"
        )
    if grad and (stream or paths or reference == "jax" or set(candidates) - set(engine.CANDIDATES)):
        raise ValueError("--grad: only for our own models, torch and jax, without --stream, --path and --reference jax")
    programs = bool(candidates) and all(value.startswith("pte:") for value in candidates)
    where, default = resolve_device(device), not (checkpoints or candidates or images) and reference == "hf"
    ours, without_jax = implementations(candidates, reference, where, default or grad)
    for path in checkpoints:
        # What is wrong with the second checkpoint should not come to light after an hour on the first.
        _check_checkpoint(path, tokens, prompt, length, images, programs)
    with tempfile.TemporaryDirectory(prefix="gemma4-parity-") as folder:
        named = dict(zip(_labels(checkpoints), checkpoints, strict=True))
        if images:
            wanted, shown = Targets({}, []), with_images.labelled(named or with_images.tiny_checkpoints(Path(folder)))
        else:
            wanted, shown = targets(ours if grad or reference == "jax" else candidates, named, Path(folder)), {}
        program_paths = exported.check(wanted.programs, dtypes, paths)
        if not checkpoints:
            # On models this small two threads mostly wait for each other.
            torch.set_num_threads(1)
        dtypes, through = dtypes or DTYPES[:2], dict.fromkeys(ours, paths or PATHS)
        shown_through = through
        if default:
            through, shown_through = default_paths(ours, paths)
            if shown_through:
                shown = with_images.labelled(with_images.tiny_checkpoints(Path(folder)))
        paths = paths or PATHS
        sequences = functools.partial(_sequence, tokens=tokens, prompt=prompt, length=length)
        drawn = images or with_images.drawn()
        if grad:
            tasks = gradient_tasks(wanted.plain, sequences, dtypes, ours, where)
            tasks += gradient_tasks(shown, sequences, dtypes, ours, where, drawn)
        else:
            tasks = plain_tasks(wanted.plain, sequences, dtypes, through, where, stream, (), reference)
            tasks += plain_tasks(shown, sequences, dtypes, shown_through, where, stream, drawn, reference)
            tasks += quantized_tasks(wanted.quantized, sequences, dtypes, paths, where, stream)
            tasks += program_tasks(wanted.programs, sequences, program_paths, where, stream)
        many = 1 if checkpoints else processes_for(where)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("", total=sum(piece.steps for piece in tasks) + 1, completed=-1)
            result = run_tasks(tasks, many, lambda what: progress.update(task, advance=1, description=what))
    report.write(result, output, _meta(result, where))
    report.print_table(result, Console())
    if without_jax:
        click.echo(f"without JAX: {without_jax}")
    click.echo(f"{output / 'report.html'}")
    sys.exit(1 if result.failed else 0)


def main() -> None:
    """The `gemma4` command."""
    cli()


def _sequence(
    config: "TextConfig", path: Path, tokens: str | None, prompt: str | None, length: int | None
) -> list[int]:
    from gemma4_impl.tokenizer import Tokenizer
    from parity.inputs import check_tokens, default_tokens

    if sum(given is not None for given in (tokens, prompt, length)) > 1:
        raise ValueError("give one of --tokens, --prompt and --length")
    if tokens is not None:
        return check_tokens(config, parse_tokens(tokens))
    if prompt is not None:
        return check_tokens(config, Tokenizer.from_pretrained(path).encode(prompt))
    return default_tokens(config, path, length)


def _check_checkpoint(
    path: Path,
    tokens: str | None,
    prompt: str | None,
    length: int | None,
    images: tuple[Path, ...],
    programs: bool,
) -> None:
    import torch

    from gemma4_impl.checkpoint import check_fits, open_checkpoint
    from gemma4_impl.config import TextConfig
    from gemma4_impl.model.decoder import Gemma4
    from parity.images import place
    from parity.quantized import quantized_at

    if not programs and (quantized := quantized_at(path)):
        raise ValueError(
            f"{path}: is quantized; give it as --candidate {quantized.kind}:{path}, and as CHECKPOINT the one that it "
            "was made from, if you have it"
        )
    checkpoint, config = open_checkpoint(path), TextConfig.from_file(path)
    with torch.device("meta"):
        check_fits(Gemma4(config), checkpoint)
    place(path, _sequence(config, path, tokens, prompt, length), images)


def _labels(paths: tuple[Path, ...]) -> list[str]:
    """Folder names, or whole paths where those collide."""
    names = [path.resolve().name for path in paths]
    labels = [name if names.count(name) == 1 else str(path) for name, path in zip(names, paths, strict=True)]
    if len(set(labels)) < len(labels):
        raise ValueError("the same checkpoint is given twice")
    return labels


def _meta(result: "Report", device: "torch.device") -> dict:
    from parity import tapfile

    return {
        "command": "gemma4 " + " ".join(shlex.quote(arg) for arg in sys.argv[1:]),
        "versions": tapfile.versions(),
        "precision": tapfile.precision_flags(),
        "device": _device_name(device),
        "inputs": result.inputs,
    }


def _device_name(device: "torch.device") -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _need_transformers() -> None:
    # What torchao lacks, which transformers imports where it is installed, is of no interest here.
    logging.disable(logging.WARNING)
    try:
        from transformers.models.gemma4 import modeling_gemma4  # noqa: F401
    except ImportError:
        raise ValueError(
            "this command compares with transformers, which is not installed: pip install 'gemma4-parity[hf]'"
        ) from None
    finally:
        logging.disable(logging.NOTSET)


if __name__ == "__main__":
    main()
