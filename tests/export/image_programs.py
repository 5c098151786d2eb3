"""A small multimodal checkpoint, and prompts with images for the programs exported from it."""

from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gemma4_impl.config import FULL, SLIDING
from gemma4_impl.model.decoder import Gemma4
from gemma4_impl.model.soft_tokens import SoftTokens
from gemma4_impl.vision.images import ImageEncoder
from gemma4_impl.vision.processing import ProcessedImages
from reference import tiny_vision
from reference.tiny import make_tiny

CHUNK, CONTEXT = 72, 256

# Images that are seen both ways in the sliding layer, and per-layer inputs, for which an image is padding; the tower
# clips its linears.
SMALL = {
    "num_hidden_layers": 2,
    "layer_types": [SLIDING, FULL],
    "num_kv_shared_layers": 0,
    "use_bidirectional_attention": "vision",
}


def make_small(folder: Path) -> Path:
    """An E2B of two layers, with one layer in its tower."""
    with mock.patch.dict(tiny_vision.VISION["E2B"], num_hidden_layers=1):
        return make_tiny("E2B", folder, multimodal=True, overrides=SMALL)


def noise(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * 1000 + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@dataclass(frozen=True)
class Multimodal:
    """A checkpoint in one dtype."""

    model: Gemma4
    encoder: ImageEncoder

    @classmethod
    def load(cls, path: Path, dtype: torch.dtype = torch.float32) -> "Multimodal":
        return cls(Gemma4.from_pretrained(path, dtype), ImageEncoder.from_pretrained(path, dtype))

    def images(self) -> ProcessedImages:
        """Of the fewest and the most soft tokens that an image becomes, and some between."""
        processor = self.encoder.processor
        sizes = [(width, 10) for width in range(10, 900, 5)]
        area = {size: np.prod(processor.target_size(*size)) for size in sizes}
        return processor([noise(*min(sizes, key=area.get)), noise(*max(sizes, key=area.get)), noise(20, 300)])

    def one_square(self) -> ProcessedImages:
        """An image of the smallest grid there is, one soft token, which the processor would have made larger."""
        images, k = self.encoder.processor([noise(30, 30)]), self.encoder.processor.pooling_kernel_size
        positions = torch.full_like(images.positions, -1)
        grid = torch.arange(k)
        positions[0, : k * k] = torch.stack((grid.repeat(k), grid.repeat_interleave(k)), dim=-1)
        return replace(images, positions=positions, num_soft_tokens=(1,))

    def prompt(self, sizes: list[tuple[int, int]], text: list[int]) -> tuple[Tensor, list[Image.Image]]:
        """Ids [1, T]: text[0] tokens, an image, text[1] tokens, another one, ..."""
        rng, ids = np.random.default_rng(0), [2]
        images = [noise(*size) for size in sizes]
        for i, n in enumerate(text):
            ids += rng.integers(107, 512, n).tolist() + [self.encoder.config.image_token_id] * (i < len(images))
        counts = self.encoder.processor(images).num_soft_tokens
        return torch.tensor([self.encoder.expand(ids, counts)]), images

    @torch.no_grad()
    def logits(self, tokens: Tensor, images: list[Image.Image]) -> Tensor:
        """All logits [T, V] of a prompt in one forward."""
        soft = self.encoder.merge(tokens, self.encoder.encode(images), self.model.dtype) if images else None
        return self.model(tokens, images=soft)[0]


def error(got: Tensor, truth: Tensor) -> float:
    assert got.shape == truth.shape
    return float((got.double() - truth.double()).norm() / truth.double().norm())


def assert_within_budget(got: Tensor, own: Tensor, truth: Tensor) -> None:
    """At most twice the error that our own float32 model makes, against float64."""
    floor = torch.finfo(torch.float32).eps / 4
    assert error(got, truth) <= 2 * error(own, truth) + floor, (error(got, truth), error(own, truth))


def causal(soft: SoftTokens) -> SoftTokens:
    return replace(soft, bidirectional=False)
