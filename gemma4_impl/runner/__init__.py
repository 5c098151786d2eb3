"""The C++ program that runs an exported program without Python, and how Python calls it: ids in, ids out."""

import contextlib
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from gemma4_impl.generation import Sampling
from gemma4_impl.runner.build import BUILD_DIR, NAME

_PREFIX = f"{NAME}: error: "


@dataclass(frozen=True)
class Run:
    """What the runner made of a prompt, and how fast."""

    tokens: tuple[int, ...]
    """The new ids; the last one is the stop token if there was one."""
    prompt_tokens: int
    stop_reason: Literal["eos", "length"]
    load_seconds: float
    prefill_seconds: float
    """Until the first new token was known."""
    decode_seconds: float
    """For all tokens after the first."""
    locked: bool
    """Whether the weights were kept in memory."""


def find_runner() -> Path:
    """The built program: GEMMA4_RUNNER, or where `make runner` leaves it. Raises ValueError if it is not there."""
    path = Path(os.environ.get("GEMMA4_RUNNER") or BUILD_DIR / NAME)
    if not path.is_file():
        raise ValueError(f"{path}: not built yet; run `make runner`, or set GEMMA4_RUNNER to where it is")
    return path


def generate(
    folder: str | Path,
    tokens: Sequence[int],
    max_new_tokens: int = 256,
    sampling: Sampling | None = None,
    *,
    bos: Literal["require", "add", "any"] = "require",
    mlock: bool = False,
    stream: Callable[[int], None] | None = None,
    runner: Path | None = None,
) -> Run:
    """Continues `tokens` with the program in `folder`, in the C++ runner; reads model.pte and *.ptd there, no manifest.

    Args:
        sampling: greedy if None. A program that draws its tokens by itself takes a temperature and its own top-k only.
        bos: what to do about a prompt without BOS: refuse it, add it, or take it as it is.
        mlock: keep the weights in memory; `Run.locked` says whether the system allowed it.
        stream: called with each new id as it comes.
        runner: the built program. Default: `find_runner()`.
    Raises ValueError for what the runner refuses, in its words, and RuntimeError if it fails."""
    sampling = sampling or Sampling(temperature=0.0)
    command = [
        *(str(runner or find_runner()), str(folder), "--tokens", "-", "--json", "--bos", bos),
        *("--max-new-tokens", str(max_new_tokens), "--temperature", repr(float(sampling.temperature))),
        # Greedily, the rest means nothing, and a program that draws by itself takes none of it.
        *(("--top-k", str(sampling.top_k or 0)) if sampling.temperature else ()),
        *(("--top-p", repr(float(sampling.top_p or 1))) if sampling.temperature else ()),
        *(("--seed", str(sampling.seed)) if sampling.temperature and sampling.seed is not None else ()),
        *(("--mlock",) if mlock else ()),
    ]
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process:
            try:
                # A runner that refuses its options does not wait for the prompt.
                with contextlib.suppress(BrokenPipeError), process.stdin:
                    process.stdin.write(",".join(map(str, tokens)))
                new, rest = _read_ids(process.stdout, stream), process.stdout.read()
            except BaseException:
                process.kill()
                raise
        errors.seek(0)
        message = errors.read()
    if process.returncode:
        raise _error(process.returncode, message)
    report = json.loads(rest)
    del report["new_tokens"]
    return Run(tokens=tuple(new), **report)


def _read_ids(output: IO[str], stream: Callable[[int], None] | None) -> list[int]:
    """The ids of the first line, each as soon as the comma after it or the end of the line is there."""
    ids, digits = [], ""
    while True:
        character = output.read(1)
        if character.isdigit():
            digits += character
            continue
        if digits and character:
            ids.append(int(digits))
            if stream is not None:
                stream(ids[-1])
        digits = ""
        if character != ",":
            return ids


def _error(code: int, errors: str) -> Exception:
    last = errors.strip().splitlines()[-1] if errors.strip() else ""
    if code == 2:
        return ValueError(last.removeprefix(_PREFIX))
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else "failed"
    return RuntimeError(f"{NAME} {how}: {last.removeprefix(_PREFIX)}" if last else f"{NAME} {how}")
