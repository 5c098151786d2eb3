"""Images in prompts: a checkpoint's vision tower with its image processor."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from gemma4_impl.model.soft_tokens import SoftTokens, merge
from gemma4_impl.vision.encoder import Vision
from gemma4_impl.vision.processing import ImageProcessor, ImageSource, ProcessedImages
from gemma4_impl.vision.tower import ImagePrompts, TowerWeights, open_tower, read_tensor, stored_names


class ImageEncoder(ImagePrompts):
    """Turns images into soft tokens: `processor` makes patches of them, `model` runs the tower."""

    def __init__(self, model: Vision, processor: ImageProcessor):
        super().__init__(model.config, processor)
        self.model = model

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        text: str | Path | None = None,
    ) -> "ImageEncoder":
        """Loads what `open_tower` opens, with the image processor that goes with it; `dtype` defaults to the weights'
        own. Raises as `open_tower` does, and CheckpointError for tensors that do not fit."""
        source, config, processor = open_tower(path, text)
        with torch.device("meta"):
            model = Vision(config)
        dtype = dtype or source.dtype
        load_tower(model, source, dtype, torch.device(device))
        model.reset_rope(dtype, device)
        return cls(model.eval(), processor)

    @torch.no_grad()
    def encode(self, images: Iterable[ImageSource] | ProcessedImages) -> list[Tensor]:
        """Images -> the soft tokens [n, D] of each. Raises ImageError, FileNotFoundError."""
        if not isinstance(images, ProcessedImages):
            images = self.processor(images)
        if not images.num_soft_tokens:
            return []
        images = images.trimmed()
        device = self.model.embed_vision.embedding_projection.weight.device
        tokens = self.model(images.pixel_values.to(device), images.positions.to(device))
        return [row[:n] for row, n in zip(tokens, images.num_soft_tokens, strict=True)]

    def merge(self, tokens: Tensor, features: Sequence[Tensor], dtype: torch.dtype) -> SoftTokens:
        """Puts encoded images in the place of the image tokens of tokens [B, T], row by row, in the text model's
        `dtype`. Raises ValueError if there is more or less room than they need."""
        return merge(tokens, self.config.image_token_id, features, self.bidirectional, dtype)


def load_tower(model: Vision, source: TowerWeights, dtype: torch.dtype, device: torch.device) -> None:
    """Replaces every meta tensor of `model` by the source's. Raises CheckpointError listing what does not fit."""
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    for name, stored in stored_names(source, shapes).items():
        tensor = read_tensor(source, stored, shapes[name]).to(device=device, dtype=dtype)
        parent, _, leaf = name.rpartition(".")
        module = model.get_submodule(parent)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        else:
            module._buffers[leaf] = tensor
