"""Generation with an exported program: the prompt in chunks that it takes, token by token then, sampled on the host."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from gemma4_impl.export.folder import Exported, Manifest, open_folder
from gemma4_impl.export.front import load_backend
from gemma4_impl.generation import Generation, Interrupted, Prompt, Sampling, Transcript, check_prompt, prompt_ids
from gemma4_impl.model.sampler import sample
from gemma4_impl.model.soft_tokens import SoftTokens
from gemma4_impl.tokenizer import Tokenizer

if TYPE_CHECKING:
    from gemma4_impl.vision.processing import ImageSource
    from gemma4_impl.vision.tower import ImagePrompts


class Session(Protocol):
    """A program with its caches. What it is fed is checked: ValueError for a position that does not continue, a chunk
    that is too long or passes the end of the context, and an id outside the vocabulary."""

    length: int
    """Tokens fed since the start or the last reset."""
    taps: bool
    """Whether `forward(..., taps=True)` gives (logits, taps by name). The session of a program that draws its tokens
    itself (CUDA) also has `top_k`, `start` and `decode`."""

    def forward(self, tokens: Tensor, position: int) -> Tensor:
        """tokens int64 [1, T], T up to the chunk, of which the first is at `position` -> the last one's logits [1, V]
        or [V]. A program with a vision tower also takes `images`, the soft tokens in this chunk."""

    def reset(self) -> None: ...


def open_session(folder: Path, manifest: Manifest) -> Session:
    """Loads the program of a folder that `open_folder` checked. Raises ImportError or ValueError where it cannot run
    here."""
    module = load_backend(manifest.backend, ["executorch"])
    with _quiet():
        return module.open_session(folder, manifest)


def open_program(path: str | Path) -> tuple[Exported, Session, Tokenizer]:
    """An exported folder, ready to run. Raises as `open_texts` and `open_session` do."""
    exported, tokenizer = open_texts(path)
    return exported, open_session(exported.folder, exported.manifest), tokenizer


def open_texts(path: str | Path) -> tuple[Exported, Tokenizer]:
    """An exported folder and its tokenizer, without the program. Raises as `open_folder` and the tokenizer do."""
    exported = open_folder(path)
    return exported, Tokenizer.from_pretrained(exported.folder)


def open_encoder(exported: Exported, session: Session) -> "ImagePrompts":
    """The program's own vision tower. Raises ValueError if it was exported without."""
    if "vision" not in exported.manifest.methods:
        raise ValueError(f"{exported.folder}: exported without a vision tower; export it with --vision")
    from gemma4_impl.export.vision import ExportedEncoder

    return ExportedEncoder.from_folder(exported.folder, session.vision)


@torch.inference_mode()
def prefill(session: Session, tokens: Tensor, chunk: int, images: SoftTokens | None = None) -> Tensor:
    """Feeds tokens [1, T] after what the session holds, at most `chunk` at a time; returns the last one's logits
    [1, V]. Raises ValueError for an empty prompt, for an image that is longer than a chunk and must not be cut, and as
    the session does."""
    T, start = tokens.shape[1], session.length
    if not T:
        raise ValueError("the prompt is empty: it has no tokens")
    parts = [slice(i, i + chunk) for i in range(0, T, chunk)] if images is None else images.chunks(chunk)
    for part in parts:
        soft = {} if images is None else {"images": images[part]}
        logits = session.forward(tokens[:, part], start + part.start, **soft)
    return logits.reshape(1, -1)


@torch.inference_mode()
def generate(
    exported: Exported,
    session: Session,
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    chat: bool = True,
    stream: Callable[[str], None] | None = None,
    images: Sequence["ImageSource"] = (),
    encoder: "ImagePrompts | None" = None,
) -> Generation:
    """Continues `prompt` as `gemma4_impl.generate.generate` does; the context is the program's, and starts anew.

    Raises ValueError for a prompt that does not fit, a bad parameter, or logits that are NaN; Interrupted."""
    sampling, manifest = Sampling(temperature, top_k, top_p, seed), exported.manifest
    start = time.perf_counter()
    ids, processed = prompt_ids(tokenizer, prompt, chat, images, encoder)
    transcript = _transcript(exported, tokenizer, ids, max_new_tokens, stream)
    tokens, soft = torch.tensor([ids]), None
    if processed is not None:
        soft = encoder.merge(tokens, encoder.encode(processed), manifest.dtype)
    generator = sampling.generator("cpu")
    if session.length:
        session.reset()

    def draw(logits: Tensor) -> int:
        return int(sample(logits.reshape(1, -1), temperature, top_k, top_p, generator))

    new = draw(prefill(session, tokens, manifest.max_prefill_chunk, soft))
    first = time.perf_counter()
    interrupted = False
    try:
        if transcript.add([new]):
            if _draws(session, sampling):
                session.start(new, sampling)
                drawn = session.decode(transcript.left)
            else:
                drawn = _decode(session, new, draw)
            for new in drawn:
                if not transcript.add([new]):
                    break
    except KeyboardInterrupt:
        interrupted = True
    seconds = time.perf_counter() - first
    transcript.finish()
    result = transcript.generation(len(ids), first - start, seconds, 0, interrupted)
    if interrupted:
        raise Interrupted(result)
    return result


def generate_in_runner(
    exported: Exported,
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    chat: bool = True,
    stream: Callable[[str], None] | None = None,
) -> Generation:
    """`generate` in the C++ runner, which samples with random numbers of its own. Raises ValueError as that does, and
    for what the runner refuses; RuntimeError if it fails."""
    from gemma4_impl import runner

    ids, _ = prompt_ids(tokenizer, prompt, chat, (), None)
    transcript = _transcript(exported, tokenizer, ids, max_new_tokens, stream)
    done = runner.generate(
        exported.folder,
        ids,
        max_new_tokens,
        Sampling(temperature, top_k, top_p, seed),
        bos="any",
        stream=lambda token: transcript.add([token]) and None,
    )
    transcript.finish()
    return transcript.generation(len(ids), done.prefill_seconds, done.decode_seconds, 0, False)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what ExecuTorch's libraries print of the processor when they start; errors come as exceptions."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _transcript(
    exported: Exported, tokenizer: Tokenizer, ids: Sequence[int], max_new_tokens: int, stream: Callable | None
) -> Transcript:
    manifest = exported.manifest
    if len(ids) > (most := manifest.max_seq_len):
        raise ValueError(f"the prompt has {len(ids)} tokens but the program holds {most}; shorten it or export it anew")
    check_prompt(exported.config, ids, most)
    return Transcript(tokenizer, manifest.eos_ids, max_new_tokens, most - len(ids), stream)


def _draws(session: Session, sampling: Sampling) -> bool:
    """Whether the program draws its tokens itself, in this way."""
    if not hasattr(session, "start"):
        return False
    return sampling.temperature == 0 or (sampling.top_k == session.top_k and sampling.top_p in (None, 1))


def _decode(session: Session, token: int, draw: Callable[[Tensor], int]) -> Iterator[int]:
    """What follows `token`, drawn on the host."""
    while True:
        token = draw(session.forward(torch.tensor([[token]]), session.length))
        yield token
