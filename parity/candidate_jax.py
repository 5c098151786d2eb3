"""Our JAX model as a candidate: the same sequence through every cache path, with its taps."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from gemma4_impl import taps
from gemma4_impl.checkpoint import Weights
from gemma4_impl.nnx.decoder import Gemma4
from gemma4_impl.nnx.images import ImageEncoder
from gemma4_impl.nnx.soft_tokens import SoftTokens
from gemma4_impl.vision.processing import ProcessedImages
from parity.candidate import RAGGED, batch, pad
from reference.chunks import chunks
from reference.jax import Feed, TappedModel, padded


class JaxCandidate:
    """`gemma4_impl.nnx` behind the same interface as `TorchCandidate`. Chunks are padded on the right as `generate`
    pads them, so that each path compiles one or two functions, which free and forced runs share.

    In float64 the weights, and the constants that the model rounds to their dtype, are first rounded to `weights`.
    `model` may be changed before the first capture. Raises as `reference.jax.TappedModel` does."""

    name = "jax"

    def __init__(
        self,
        source: str | Path | Weights,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        weights: torch.dtype | None = None,
    ):
        self._runs = TappedModel(source, dtype, device, weights)
        self.config = self._runs.config
        self.chunks: Sequence[int] = RAGGED
        """Sizes of the chunks that the chunked and padded paths feed, in turn, each padded to the longest."""

    @property
    def model(self) -> Gemma4:
        return self._runs.model

    @property
    def encoder(self) -> ImageEncoder:
        """The checkpoint's vision tower, loaded when it is first needed. Raises as `ImageEncoder` does."""
        return self._runs.encoder

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
        """As `TorchCandidate.capture`."""
        image = None if images is None else (self.encoder.config.image_token_id, images)
        rows, recorder = batch(tokens, path, glob, forced, routing, image)
        features = [] if images is None else self._runs.encode(recorder, images)
        ids, positions = torch.tensor(rows[:1]), None
        if path.endswith("_padded"):
            ids, positions = pad(rows, left=path == "left_padded", device="cpu")
        soft = self._runs.merge(ids, features) if features else None
        feeds, most = self._feeds(path, len(tokens), soft)
        self._runs.feed(recorder, ids, feeds, positions=positions, soft=soft, max_chunk=most)
        return taps.in_order(recorder.values, self.config, None if images is None else self.encoder.config)

    def _feeds(self, path: str, length: int, soft: SoftTokens | None) -> tuple[list[Feed], int | None]:
        """The calls of the model, and what its cache is made for; None for no cache."""
        if path == "full":
            return [Feed(slice(0, length), length)], None
        most, start, prompt = max(self.chunks), 0, []
        if soft is not None:
            most = max(most, soft.longest)
        if path == "generate":
            # The images belong to the prompt.
            start = max(length // 2, 0 if soft is None else 1 + int(soft.mask[0].nonzero()[0].max()))
            parts = [slice(i, min(i + most, start)) for i in range(0, start, most)]
            parts = parts if soft is None else soft[:start].chunks(most)
            prompt = [Feed(part, most, "last" if part.stop == start else "none") for part in parts]
        whole = torch.from_numpy(soft.mask[:, start:]) if soft is not None and soft.bidirectional else None
        sizes = (1,) if path in ("decode", "generate") else self.chunks
        rest = chunks(length - start, sizes, whole)
        feeds, longest = padded([slice(start + part.start, start + part.stop) for part in rest], sizes)
        # One cache for all paths, so that they share the functions compiled for it.
        return prompt + feeds, max(most, longest)
