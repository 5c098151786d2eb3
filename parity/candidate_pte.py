"""An exported program as a candidate: the same sequence through its own caches, with the taps that it has."""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from gemma4_impl import taps
from gemma4_impl.config import TextConfig
from gemma4_impl.export.program import dtype_name
from gemma4_impl.export.run import Session
from parity.candidate import RAGGED
from reference.chunks import chunks

PATHS = ("chunked", "decode", "generate")
"""The cache paths of a program: it has caches always, and one row."""


class ProgramCandidate:
    """A `Session` behind the interface of `TorchCandidate`, as far as a program has it: nothing can be forced upon it,
    so that its errors are those accumulated from the input, and its router chooses for itself.

    Args:
        max_chunk: the most tokens that one call takes.
        tapped: whether the session gives taps; otherwise there are only the logits.
    """

    name = "pte"

    def __init__(self, session: Session, config: TextConfig, max_chunk: int, tapped: bool = False):
        self.session, self.config, self.max_chunk, self.tapped = session, config, max_chunk, tapped
        self.chunks: Sequence[int] = RAGGED
        """Sizes of the chunks that the chunked path feeds, in turn, cut to what the program takes."""

    def capture(self, tokens: Sequence[int], path: str = "decode", *, glob: str = "*") -> dict[str, Tensor]:
        """Taps [1, L, ...] in execution order. NaN marks positions that the path does not compute: a chunk's logits are
        those of its last token. Raises ValueError for a path that needs no cache or several rows, and what the
        session does."""
        if path not in PATHS:
            why = "several rows" if path.endswith("_padded") else "a forward without a cache"
            raise ValueError(f"--path {path}: an exported program has no {why}; it has {', '.join(PATHS)}")
        self.session.reset()
        rows = torch.tensor(list(tokens))[None]
        out: dict[str, Tensor] = {}
        for part in self._parts(path, rows.shape[1]):
            for name, value in self._run(rows[:, part], part.start).items():
                if fnmatchcase(name, glob):
                    _put(out, name, value, part, rows.shape[1])
        return taps.in_order(out, self.config)

    def _run(self, tokens: Tensor, position: int) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        if self.tapped:
            logits, found = self.session.forward(tokens, position, taps=True)
        else:
            logits = self.session.forward(tokens, position)
        if not logits.is_floating_point() or logits.numel() != self.config.vocab_size:
            raise ValueError(
                f"the program returns {dtype_name(logits.dtype)} {list(logits.shape)}, not the logits of "
                f"{self.config.vocab_size} tokens: is a sampler left in it?"
            )
        # What the host samples from is judged, not a tap of the same name.
        return {**found, "logits": logits.reshape(1, 1, -1)}

    def _parts(self, path: str, length: int) -> Iterator[slice]:
        """What each call feeds."""
        half = length // 2 if path == "generate" else 0
        for start in range(0, half, self.max_chunk):
            yield slice(start, min(start + self.max_chunk, half))
        sizes = [min(size, self.max_chunk) for size in self.chunks] if path == "chunked" else (1,)
        for part in chunks(length - half, sizes, None):
            yield slice(half + part.start, half + part.stop)


def _put(out: dict[str, Tensor], name: str, value: Tensor, part: slice, length: int) -> None:
    """Writes a call's tap [1, T or 1, ...] at its positions; a NaN that was computed is an error and no gap."""
    value = value.detach().cpu()
    # Experts are numbered; NaN marks where there are none.
    value = value if value.is_floating_point() else value.float()
    at = part if value.shape[1] == part.stop - part.start else slice(part.stop - 1, part.stop)
    if value.shape[1] != at.stop - at.start:
        raise ValueError(f"{name}: the program gives {value.shape[1]} positions of a chunk of {part.stop - part.start}")
    if name not in out:
        out[name] = value.new_full((1, length, *value.shape[2:]), torch.nan)
    out[name][:, at] = value.nan_to_num(torch.inf, torch.inf, -torch.inf)
