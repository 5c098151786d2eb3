"""Our JAX model with its taps: as a reference for others, in float32, bfloat16 and float64, and for whoever runs it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import torch
from flax import nnx
from torch import Tensor

from gemma4_impl import taps
from gemma4_impl.checkpoint import Weights, open_checkpoint
from gemma4_impl.nnx.cache import make_cache
from gemma4_impl.nnx.command import find_devices
from gemma4_impl.nnx.decoder import Gemma4, ScaledEmbedding
from gemma4_impl.nnx.images import ImageEncoder
from gemma4_impl.nnx.load import from_weights
from gemma4_impl.nnx.soft_tokens import SoftTokens
from gemma4_impl.nnx.tapped import Tapped
from gemma4_impl.taps import Recorder
from gemma4_impl.vision.processing import ProcessedImages
from reference.chunks import chunks as cut
from reference.chunks import shown_in


@dataclass(frozen=True)
class Feed:
    """One call of the model."""

    part: slice
    """Of the sequence."""
    size: int
    """Tokens that it is padded to on the right, so that parts of several lengths share one compiled function."""
    logits: Literal["all", "last", "none"] = "all"


class TappedModel:
    """`gemma4_impl.nnx` on a device, in one dtype, fed as a caller wants while a `taps.Recorder` listens.

    In float64 the weights, and the constants that the model rounds to their dtype, are first rounded to `weights`.
    Matrix products are as precise as the device can make them: by default a GPU rounds float32 ones to TF32.
    `model` may be changed before it first runs. Raises as `open_checkpoint` and `find_devices` do."""

    def __init__(
        self,
        source: str | Path | Weights,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        weights: torch.dtype | None = None,
    ):
        self.dtype, self.weights, self.device = dtype, weights or dtype, find_devices(str(device))[0]
        source = open_checkpoint(source) if isinstance(source, str | Path) else source
        self._path, self._dtypes = source.path, {"dtype": _name(dtype), "param_dtype": _name(self.weights)}
        with self.settings():
            self.model: Gemma4 = from_weights(source, **self._dtypes)
        self.config = self.model.config
        for _, module in nnx.iter_modules(self.model):
            if isinstance(module, ScaledEmbedding):
                module.scale = float(np.asarray(module.scale).astype(self._dtypes["param_dtype"]))

    @contextmanager
    def settings(self) -> Iterator[None]:
        """What must hold while anything of the model is made or run."""
        with ExitStack() as stack:
            stack.enter_context(jax.enable_x64(self.dtype == torch.float64))
            stack.enter_context(jax.default_matmul_precision("highest"))
            stack.enter_context(jax.default_device(self.device))
            yield

    @cached_property
    def encoder(self) -> ImageEncoder:
        """The checkpoint's vision tower, loaded when it is first needed. Raises as `ImageEncoder` does."""
        with self.settings():
            return ImageEncoder.from_pretrained(self._path, **self._dtypes)

    def encode(self, recorder: Recorder, images: ProcessedImages) -> list[np.ndarray]:
        """The soft tokens [n, D] of each image, with the tower's taps."""
        images = images.trimmed()
        with self.settings():
            positions = images.positions.numpy().astype(np.int32)
            tokens = self._tower(recorder, images.pixel_values.numpy(), positions)
            return [np.asarray(row)[:n] for row, n in zip(tokens, images.num_soft_tokens, strict=True)]

    def merge(self, tokens: Tensor, features: Sequence[np.ndarray]) -> SoftTokens:
        """Images of each row of tokens [B, L], which are those of the first row or the first few of them."""
        shown = shown_in(tokens, self.encoder.config.image_token_id, features)
        return self.encoder.merge(tokens.numpy(), shown, self.model.dtype)

    def feed(
        self,
        recorder: Recorder,
        tokens: Tensor,
        feeds: Sequence[Feed],
        *,
        positions: Tensor | None = None,
        soft: SoftTokens | None = None,
        max_chunk: int | None = None,
    ) -> None:
        """Feeds parts of tokens [B, L] one after another, through a cache for chunks of `max_chunk` tokens unless that
        is None. `positions` [B, L] marks padding with -1; without it the model counts single tokens and the whole
        sequence itself."""
        ids, counted = tokens.numpy().astype(np.int32), positions is None
        at = np.broadcast_to(np.arange(ids.shape[1]), ids.shape) if counted else positions.numpy()
        with self.settings():
            cache = None
            if max_chunk is not None:
                cache = make_cache(self.config, *ids.shape, max_chunk, self.model.dtype)
            for feed in feeds:
                missing = ((0, 0), (0, feed.size - (feed.part.stop - feed.part.start)))
                chunk, places = np.pad(ids[:, feed.part], missing), None
                if not counted or (cache is not None and feed.size > 1):
                    places = np.pad(at[:, feed.part].astype(np.int32), missing, constant_values=-1)
                here = None if soft is None else soft[feed.part]
                # As in generation: what follows the images runs without them.
                if here is not None and here.mask.any():
                    embeds = np.pad(here.embeds, (*missing, (0, 0)))
                    here = replace(here, mask=np.pad(here.mask, missing), embeds=embeds)
                else:
                    here = None
                _, cache = self._text(recorder, chunk, places, cache, here, logits=feed.logits)

    @cached_property
    def _text(self) -> Tapped:
        return Tapped(_Text(self.model))

    @cached_property
    def _tower(self) -> Tapped:
        return Tapped(self.encoder.model)


class JaxReference:
    """A checkpoint in `gemma4_impl.nnx`, with the interface of `reference.hf.HFReference`.

    Args:
        dtype: the dtype that weights are loaded in and, unless `truth`, computed in.
        truth: compute in float64 (JAX's x64) on the weights, and the embedding scale, as `dtype` rounds them.
    """

    attentions = ("xla",)
    """What `use` switches between."""

    def __init__(
        self,
        path: str | Path,
        dtype: torch.dtype = torch.float32,
        *,
        truth: bool = False,
        device: torch.device | str = "cpu",
    ):
        self.dtype, self.truth = dtype, truth
        self.runs = TappedModel(path, torch.float64 if truth else dtype, device, dtype)
        self.config = self.runs.config

    def use(self, attention: str) -> None:
        """There is one attention only: does nothing."""

    def capture(
        self,
        rows: Sequence[Sequence[int]],
        *,
        glob: str = "*",
        forced: Mapping[str, Tensor] | None = None,
        routing: Mapping[str, Tensor] | None = None,
        chunks: Sequence[int] = (),
        images: ProcessedImages | None = None,
    ) -> dict[str, Tensor]:
        """Taps [B, L, ...] of every row, NaN past the row's end, in execution order.

        `forced` [B, L, ...] and `routing` [B, L, k] as in `taps.Recorder`. The rows are one batch, padded on the right:
        one forward, or through the cache in chunks of these sizes, over and over, extended where they would cut an
        image. `images` stand at the image tokens of a single row, and add the vision tower's taps [I, P, ...].
        Raises ValueError for images with more than one row, and as the encoder does."""
        if images is not None and len(rows) != 1:
            raise ValueError("images need one sequence")
        length = max(len(row) for row in rows)
        tokens = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows])
        ends = torch.tensor([len(row) for row in rows])[:, None]
        at = torch.arange(length).expand(len(rows), length)
        positions = None if bool((ends == length).all()) else torch.where(at < ends, at, -1)
        recorder = Recorder(len(rows), length, glob, forced, routing)
        soft = None
        if images is not None:
            soft = self.runs.merge(tokens, self.runs.encode(recorder, images))
        whole = torch.from_numpy(soft.mask) if soft is not None and soft.bidirectional else None
        feeds, most = padded(cut(length, chunks or [length], whole), chunks)
        self.runs.feed(recorder, tokens, feeds, positions=positions, soft=soft, max_chunk=most if chunks else None)
        return taps.in_order(recorder.values, self.config, None if images is None else self.runs.encoder.config)

    def forceable(self, name: str) -> bool:
        """Whether `forced` reaches this tap: all but what routers chose, which `routing` is for."""
        return not name.endswith(taps.CHOICE)


def padded(parts: Sequence[slice], sizes: Sequence[int]) -> tuple[list[Feed], int]:
    """Parts of a sequence that was cut into chunks of these sizes, all padded to the longest, but for single tokens if
    nothing else was wanted; and the cache's `max_chunk`."""
    longest = max([*sizes, *(part.stop - part.start for part in parts)])
    alone = set(sizes) == {1}
    return [Feed(part, 1 if alone and part.stop - part.start == 1 else longest) for part in parts], longest


class _Text(nnx.Module):
    """`Gemma4` with what is compiled in at the end, by name."""

    def __init__(self, model: Gemma4):
        self.model = model

    def __call__(
        self, tokens: Any, positions: Any, cache: Any, images: Any, logits: Literal["all", "last", "none"] = "all"
    ) -> Any:
        return self.model(tokens, positions, cache, logits, images)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
