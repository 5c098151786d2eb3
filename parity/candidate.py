"""Our PyTorch model as a candidate: the same sequence through every cache path, with its taps."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from gemma4_impl import taps
from gemma4_impl.generate import prefill
from gemma4_impl.model.decoder import Gemma4, ScaledEmbedding
from gemma4_impl.model.rope import RotaryEmbedding
from gemma4_impl.taps import Recorder

RAGGED = (7, 1, 12, 3, 5, 2, 9)


class TorchCandidate:
    """`Gemma4` behind the same interface as the references.

    In float64 the weights, and the constants that the model rounds to their dtype, are first rounded to `weights`."""

    name = "torch"

    def __init__(
        self,
        path: str | Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        weights: torch.dtype | None = None,
    ):
        weights = weights or dtype
        self.model = Gemma4.from_pretrained(path, weights, device)
        self.config = self.model.config
        self.chunks: Sequence[int] = RAGGED
        """Sizes of the chunks that the chunked and padded paths feed, in turn."""
        if weights != dtype:
            self.model.to(dtype)
            for module in self.model.modules():
                if isinstance(module, RotaryEmbedding):
                    module.reset(dtype, self.model.device)
                elif isinstance(module, ScaledEmbedding):
                    module.scale[dtype] = module.scale[weights]

    @torch.no_grad()
    def capture(
        self,
        tokens: Sequence[int],
        path: str = "full",
        *,
        glob: str = "*",
        forced: Mapping[str, Tensor] | None = None,
        routing: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Taps [B, L, ...] in execution order; B is 2 for the padded paths, else 1. NaN marks positions that the path
        does not compute. `forced` [1, L, ...] and `routing` [1, L, k] are for the whole sequence."""
        rows = [list(tokens)]
        if path.endswith("_padded"):
            rows.append(rows[0][: max(1, 2 * len(tokens) // 3)])
        expand = {name: value.expand(len(rows), *value.shape[1:]) for name, value in (forced or {}).items()}
        routes = {name: value.expand(len(rows), *value.shape[1:]) for name, value in (routing or {}).items()}
        recorder = Recorder(len(rows), len(tokens), glob, expand, routes)
        with taps.recording(recorder):
            self._run(rows, path)
        values = recorder.values
        return {name: values[name] for name in taps.tap_names(self.config) if name in values}

    def _run(self, rows: list[list[int]], path: str) -> None:
        model, length = self.model, len(rows[0])
        tokens = torch.tensor(rows[0], device=model.device)[None]
        if path == "full":
            model(tokens)
            return
        if path in ("decode", "generate"):
            half = length // 2 if path == "generate" else 0
            cache = model.make_cache(1, length, max_chunk=5)
            if half:
                prefill(model, tokens[:, :half], cache)
            for i in range(half, length):
                model(tokens[:, i : i + 1], cache=cache)
            return
        positions = None
        if path.endswith("_padded"):
            tokens, positions = _pad(rows, left=path == "left_padded", device=model.device)
        cache = model.make_cache(len(rows), length, max_chunk=max(self.chunks))
        start, sizes = 0, itertools.cycle(self.chunks)
        while start < length:
            part = slice(start, start + next(sizes))
            model(tokens[:, part], None if positions is None else positions[:, part], cache)
            start = part.stop


def _pad(rows: list[list[int]], left: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens and positions [B, L] of rows padded on one side; padding is token 0 at position -1."""
    length = max(len(row) for row in rows)
    tokens, positions = [], []
    for row in rows:
        pad = length - len(row)
        at = list(range(len(row)))
        tokens.append([0] * pad + row if left else row + [0] * pad)
        positions.append([-1] * pad + at if left else at + [-1] * pad)
    return torch.tensor(tokens, device=device), torch.tensor(positions, device=device)
