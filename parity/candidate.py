"""Our PyTorch model as a candidate: the same sequence through every cache path, with its taps."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma4_impl import taps
from gemma4_impl.checkpoint import Weights, open_checkpoint
from gemma4_impl.generate import prefill
from gemma4_impl.model.decoder import Gemma4, ScaledEmbedding
from gemma4_impl.model.rope import RotaryEmbedding
from gemma4_impl.model.soft_tokens import SoftTokens
from gemma4_impl.taps import Recorder
from gemma4_impl.vision.images import ImageEncoder
from gemma4_impl.vision.processing import ProcessedImages
from reference.chunks import chunks, shown_in

RAGGED = (7, 1, 12, 3, 5, 2, 9)


class TorchCandidate:
    """`Gemma4` behind the same interface as the references.

    In float64 the weights, and the constants that the model rounds to their dtype, are first rounded to `weights`.
    `dense` runs quantized weights as dense ones."""

    name = "torch"

    def __init__(
        self,
        source: str | Path | Weights,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        weights: torch.dtype | None = None,
        dense: bool = False,
    ):
        weights = weights or dtype
        source = open_checkpoint(source) if isinstance(source, str | Path) else source
        self._load = source.path, dtype, weights, device
        self.model = Gemma4.from_weights(Dense(source) if dense else source, weights, device)
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

    @cached_property
    def encoder(self) -> ImageEncoder:
        """The checkpoint's vision tower, loaded when it is first needed. Raises as `ImageEncoder` does."""
        path, dtype, weights, device = self._load
        encoder = ImageEncoder.from_pretrained(path, weights, device)
        if weights != dtype:
            encoder.model.to(dtype).reset_rope(dtype, device)
        return encoder

    @torch.no_grad()
    def capture(
        self,
        tokens: Sequence[int],
        path: str = "full",
        *,
        glob: str = "*",
        forced: Mapping[str, Tensor] | None = None,
        routing: Mapping[str, Tensor] | None = None,
        images: ProcessedImages | None = None,
    ) -> dict[str, Tensor]:
        """Taps [B, L, ...] in execution order; B is 2 for the padded paths, else 1. NaN marks positions that the path
        does not compute. `forced` [1, L, ...] and `routing` [1, L, k] are for the whole sequence.

        `images` stand at its image tokens and add the tower's taps [I, P, ...]. Chunks are extended, and the padded
        paths' shorter row is cut, so that an image whose tokens see each other both ways stays whole."""
        image = None if images is None else (self.encoder.config.image_token_id, images)
        rows, recorder = batch(tokens, path, glob, forced, routing, image)
        with taps.recording(recorder):
            features: list[Tensor] = []
            if images is not None:
                features = self.encoder.encode(images)
            self._run(rows, path, features)
        return taps.in_order(recorder.values, self.config, None if images is None else self.encoder.config)

    def _run(self, rows: list[list[int]], path: str, features: Sequence[Tensor] = ()) -> None:
        model, length = self.model, len(rows[0])
        tokens, positions = torch.tensor(rows[0], device=model.device)[None], None
        if path.endswith("_padded"):
            tokens, positions = pad(rows, left=path == "left_padded", device=model.device)
        soft = self._soft(tokens, features) if features else None
        if path == "full":
            model(tokens, images=soft)
            return
        half = 0
        if path == "generate":
            # The images belong to the prompt.
            half = max(length // 2, 1 + int(soft.mask[0].nonzero().max()) if soft is not None else 0)
        whole = soft.mask[:, half:] if soft is not None and soft.bidirectional else None
        by_token = path in ("decode", "generate")
        parts = [
            slice(half + p.start, half + p.stop)
            for p in chunks(length - half, (1,) if by_token else self.chunks, whole)
        ]
        most = max([5] if by_token else self.chunks)
        most = max([most, 1 if soft is None else soft.longest, *(part.stop - part.start for part in parts)])
        cache = model.make_cache(len(rows), length, max_chunk=most)
        if half:
            prefill(model, tokens[:, :half], cache, images=None if soft is None else soft[:half])
        for part in parts:
            at, here = None if positions is None else positions[:, part], None if soft is None else soft[part]
            model(tokens[:, part], at, cache, images=here)

    def _soft(self, tokens: Tensor, features: Sequence[Tensor]) -> SoftTokens:
        """Images of each row of tokens [B, L], which are those of the first row or the first few of them."""
        shown = shown_in(tokens, self.encoder.config.image_token_id, features)
        return self.encoder.merge(tokens, shown, self.model.dtype)


class Dense:
    """Weights with nothing quantized: dequantized tensors in the place of packed ones."""

    def __init__(self, weights: Weights):
        self._weights = weights

    def __getattr__(self, name: str) -> Any:
        return getattr(self._weights, name)

    def quantized(self, name: str) -> None:
        return None


def batch(
    tokens: Sequence[int],
    path: str,
    glob: str,
    forced: Mapping[str, Tensor] | None,
    routing: Mapping[str, Tensor] | None,
    images: tuple[int, ProcessedImages] | None = None,
) -> tuple[list[list[int]], Recorder]:
    """The rows that a path runs, the sequence and for a padded path a prefix of it, and a recorder for them: `forced`
    [1, L, ...] and `routing` [1, L, k] are every row's. `images` are the image token's id and what stands there; the
    prefix holds no part of one."""
    rows = [list(tokens)]
    if path.endswith("_padded"):
        rows.append(rows[0][: max(1, 2 * len(tokens) // 3)])
    if images is not None:
        marker, shown = images
        for row in rows[1:]:
            while row.count(marker) not in (0, *accumulate(shown.num_soft_tokens)):
                row.pop()
    every = {
        name: value if name.startswith(taps.VISION) else value.expand(len(rows), *value.shape[1:])
        for name, value in (forced or {}).items()
    }
    routes = {name: value.expand(len(rows), *value.shape[1:]) for name, value in (routing or {}).items()}
    return rows, Recorder(len(rows), len(tokens), glob, every, routes)


def pad(rows: list[list[int]], left: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens and positions [B, L] of rows padded on one side; padding is token 0 at position -1."""
    length = max(len(row) for row in rows)
    tokens, positions = [], []
    for row in rows:
        pad = length - len(row)
        at = list(range(len(row)))
        tokens.append([0] * pad + row if left else row + [0] * pad)
        positions.append([-1] * pad + at if left else at + [-1] * pad)
    return torch.tensor(tokens, device=device), torch.tensor(positions, device=device)
