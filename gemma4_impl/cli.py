"""The commands of `gemma4`; an error of the user's ends in one line on stderr and exit code 2."""

import contextlib
import functools
import importlib
import importlib.metadata
import os
import pkgutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

import gemma4_impl

# torch is imported inside the commands: `gemma4 --help` must not wait for it.
if TYPE_CHECKING:
    import torch

    from gemma4_impl.generation import Generation

DTYPES = ("float32", "bfloat16", "float16")


class UserError(click.ClickException):
    """Printed as `gemma4: error: <message>`."""

    exit_code = 2

    def show(self, file: IO[str] | None = None) -> None:
        click.echo(f"gemma4: error: {self.message}", file=file, err=file is None)


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turns what a user can cause (bad arguments and files, too little memory, a package that is not installed) into
    a UserError of one line; lines that start with "-" stay a list. Ctrl-C exits 130. Usable as a decorator.
    GEMMA4_DEBUG=1 lets everything through with its traceback."""
    try:
        yield
    except (click.exceptions.Exit, click.Abort):
        raise
    except click.UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError" or _debug():
            raise
        hint = f"; see `{error.ctx.command_path} --help`" if error.ctx else ""
        raise UserError(_lines(error.format_message().rstrip(".")) + hint) from None
    except KeyboardInterrupt:
        if _debug():
            raise
        raise click.exceptions.Exit(130) from None
    except Exception as error:
        if _debug() or isinstance(error, BrokenPipeError) or not _is_users(error):
            raise
        raise UserError(_lines(str(error)) or type(error).__name__) from None


class Commands(click.Group):
    """A group whose commands, and whose arguments, all run under `user_errors`."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with user_errors():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        with user_errors():
            return super().invoke(ctx)


def _print_version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        try:
            version = importlib.metadata.version("gemma4-parity")
        except importlib.metadata.PackageNotFoundError:
            version = "(not installed)"
        click.echo(f"gemma4 {version}")
        ctx.exit()


@click.group("gemma4", cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=_print_version, help="Show it.")
def cli() -> None:
    """Gemma 4: run it, convert it, and check that it is the same model."""


def prompt_options(command: Callable[..., None]) -> Callable[..., None]:
    """What to continue, as `generate` and `run` take it."""
    for option in (
        click.option(
            "--image", "images", type=click.Path(path_type=Path), multiple=True, help="Shown first.  Repeatable."
        ),
        click.option("--tokens", help="Token ids to continue instead of a prompt, such as 2,105,9259."),
        click.option("--prompt", help="What to say to the model; '-' reads stdin."),
    ):
        command = option(command)
    return command


def sampling_options(command: Callable[..., None]) -> Callable[..., None]:
    """How to continue it."""
    for option in (
        click.option("--seed", type=int, help="Same seed, same text.  [default: a new one each time]"),
        click.option("--top-p", type=float, default=0.95, help="1 turns it off."),
        click.option("--top-k", type=int, default=64),
        click.option("--temperature", type=float, default=1.0, help="0 is greedy."),
        click.option("--max-new-tokens", type=click.IntRange(min=1), default=256),
        click.option("--raw", is_flag=True, help="Continue the prompt as it is, without the chat template."),
    ):
        command = option(command)
    return command


@cli.command("generate")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@prompt_options
@click.option("--mmproj", type=click.Path(path_type=Path, dir_okay=False), help="GGUF file with its vision tower.")
@sampling_options
@click.option("--dtype", type=click.Choice(DTYPES), help="[default: the checkpoint's]")
@click.option("--device", help="cpu, cuda, cuda:1, mps.  [default: cuda if there is one, else cpu]")
@click.option("--backend", type=click.Choice(("torch", "jax")), default="torch", help="What computes it.")
@click.option("--mesh", help="With --backend jax: spread the model over all devices, such as fsdp=1,tp=4.")
@click.option("--max-seq-len", type=click.IntRange(min=1), help="Context length.  [default: as long as needed]")
@click.option("--profile", is_flag=True, help="Show at the end, on stderr, where a token's time goes.")
def generate_command(
    checkpoint: Path,
    prompt: str | None,
    tokens: str | None,
    images: tuple[Path, ...],
    mmproj: Path | None,
    raw: bool,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int | None,
    dtype: str | None,
    device: str | None,
    backend: str,
    mesh: str | None,
    max_seq_len: int | None,
    profile: bool,
) -> None:
    """Generate text with the model in the folder or GGUF file CHECKPOINT.

    The text goes to stdout as it comes, one line with the speed to stderr.
    """
    if mesh is not None and backend != "jax":
        raise click.UsageError("--mesh needs --backend jax", click.get_current_context())
    if profile and backend != "torch":
        raise click.UsageError("--profile needs --backend torch", click.get_current_context())
    what = prompt_or_tokens(prompt, tokens)

    from gemma4_impl.generation import Sampling

    # What is wrong should come to light before minutes of loading.
    Sampling(temperature, top_k, top_p, seed)
    tower, progress = (mmproj or checkpoint) if images else None, sys.stderr.isatty()
    if backend == "jax":
        from gemma4_impl.nnx.command import open_jax

        generate = open_jax(checkpoint, tower, dtype, device, mesh, progress)
    else:
        generate = open_torch(checkpoint, tower, dtype, device, progress, profile)
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
        max_seq_len=max_seq_len,
        images=images,
    )


def show_generation(
    generate: Callable[..., "Generation"], what: str | list[int], stats: Callable[["Generation"], str], **options: Any
) -> None:
    """Runs `generate(what, **options)`, its text to stdout as it comes, `stats` of it to stderr. Ctrl-C exits 130."""
    from gemma4_impl.generation import Interrupted

    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character is no reason to stop
    try:
        result = generate(what, stream=lambda text: click.echo(text, nl=False), **options)
    except Interrupted as interrupted:
        click.echo()
        click.echo(stats(interrupted.generation), err=True)
        click.get_current_context().exit(130)
    click.echo()
    click.echo(stats(result), err=True)


def open_torch(
    checkpoint: Path, tower: Path | None, dtype: str | None, device: str | None, progress: bool, profile: bool = False
) -> Callable[..., "Generation"]:
    """Loads the model at `checkpoint`, with the vision tower at `tower` if there is one. Returns `generate` for it,
    which takes a prompt and options: the engine's on an NVIDIA GPU, and wherever its step is to be profiled. Raises
    ValueError for a device that is not there, and as loading does."""
    from gemma4_impl.tokenizer import Tokenizer

    target, wanted = resolve_device(device), resolve_dtype(dtype)
    tokenizer = Tokenizer.from_pretrained(checkpoint)
    encoder = None
    if tower is not None:
        from gemma4_impl.vision.images import ImageEncoder

        encoder = ImageEncoder.from_pretrained(tower, wanted, target, text=checkpoint)
    if target.type == "cuda" or profile:
        import torch

        from gemma4_impl import engine

        if target.index is not None and target.type == "cuda":
            torch.cuda.set_device(target)  # kernels run on the current one
        opened = engine.Engine.from_pretrained(checkpoint, wanted, target, progress)
        report = functools.partial(click.echo, err=True) if profile else None
        return functools.partial(engine.generate, opened, tokenizer, encoder=encoder, report=report)
    from gemma4_impl.generate import generate
    from gemma4_impl.model.decoder import Gemma4

    model = Gemma4.from_pretrained(checkpoint, wanted, target, progress=progress)
    return functools.partial(generate, model, tokenizer, encoder=encoder)


def stats_line(g: "Generation") -> str:
    """Counts, tokens/s and GB/s of a generation in one line."""
    line = f"gemma4: prompt {g.prompt_tokens} tokens, {g.prefill_tokens_per_second:.1f} tokens/s; new {len(g.tokens)}"
    if g.decode_seconds and g.decode_bytes:
        line += f" tokens, {g.decode_tokens_per_second:.1f} tokens/s, {g.gb_per_second:.1f} GB/s"
    return f"{line}; stop: {g.stop_reason}"


def read_prompt(prompt: str, option: str = "--prompt") -> str:
    """The prompt itself, or stdin (UTF-8, less its last line break) for "-"; `option` is named in an error."""
    if prompt != "-":
        return prompt
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{option} -: stdin is not UTF-8 text (byte {error.start})") from None
    return text.removesuffix("\n").removesuffix("\r")


def prompt_or_tokens(prompt: str | None, tokens: str | None) -> str | list[int]:
    """What was given of the two. Raises UsageError unless it is one of them, and as they do."""
    if (prompt is None) == (tokens is None):
        raise click.UsageError("Give either --prompt or --tokens", click.get_current_context())
    return read_prompt(prompt) if tokens is None else parse_tokens(tokens)


def parse_tokens(text: str) -> list[int]:
    """The ids in a text such as "2,105,9259". Raises ValueError."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--tokens {text!r}: expected token ids separated by commas, such as 2,105,9259") from None


def resolve_dtype(name: str | None) -> "torch.dtype | None":
    import torch

    return None if name is None else getattr(torch, name)


def resolve_device(name: str | None) -> "torch.device":
    """The device called `name`, tried out; by default cuda if there is one. Raises ValueError."""
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name!r}: no such kind of device; use cpu, cuda, cuda:1 or mps") from None
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError):  # the latter where torch was built without CUDA
        raise ValueError(f"--device {name!r}: torch cannot use it on this machine; try --device cpu") from None
    return device


def _debug() -> bool:
    return os.environ.get("GEMMA4_DEBUG", "") not in ("", "0")


def _is_users(error: Exception) -> bool:
    if isinstance(error, ValueError | OSError | ImportError | MemoryError):
        return True
    from safetensors import SafetensorError

    if isinstance(error, SafetensorError):
        return True
    # torch raises a RuntimeError when memory runs out, on the GPU one with a name.
    return isinstance(error, RuntimeError) and (
        type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    )


def _lines(message: str) -> str:
    """One line, except that lines of a list ("- ...") stay lines."""
    out: list[str] = []
    for line in message.splitlines():
        if line.lstrip().startswith("- ") or not out:
            out.append(line.rstrip())
        else:
            out[-1] = f"{out[-1]} {line.strip()}".rstrip()
    return "\n".join(out)


def _add_commands() -> None:
    """Imports `gemma4_impl.cli_*`, whose commands register themselves here; none imports torch before it runs."""
    for module in pkgutil.iter_modules(gemma4_impl.__path__):
        if module.name.startswith("cli_"):
            importlib.import_module(f"gemma4_impl.{module.name}")


_add_commands()
