"""Images in prompts: a checkpoint's vision tower with its image processor, and the tokens that images take up."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from gemma4_impl import names
from gemma4_impl.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from gemma4_impl.model.soft_tokens import SoftTokens, merge
from gemma4_impl.vision.config import VisionConfig
from gemma4_impl.vision.encoder import Vision
from gemma4_impl.vision.processing import ImageProcessor, ImageSource, ProcessedImages


class ImageEncoder:
    """Turns images into soft tokens: `processor` makes patches of them, `model` runs the tower."""

    def __init__(self, model: Vision, processor: ImageProcessor):
        self.model, self.processor = model, processor
        self.config: VisionConfig = model.config

    @classmethod
    def from_pretrained(
        cls, path: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> "ImageEncoder":
        """Loads the tower of the multimodal checkpoint folder `path`; `dtype` defaults to the checkpoint's own.

        Raises FileNotFoundError, CheckpointError, and ConfigError for a checkpoint that takes text only."""
        if Path(path).is_file():
            raise CheckpointError(f"{path}: holds no vision tower; give the checkpoint's folder to use images")
        processor, config = ImageProcessor.from_pretrained(path), VisionConfig.from_file(path)
        with torch.device("meta"):
            model = Vision(config)
        checkpoint = open_checkpoint(path)
        dtype = dtype or checkpoint.dtype
        load_tower(model, checkpoint, dtype, torch.device(device))
        model.reset_rope(dtype, device)
        return cls(model.eval(), processor)

    @property
    def bidirectional(self) -> bool:
        """Whether an image's tokens see each other both ways in the text model's sliding layers."""
        return self.config.use_bidirectional_attention == "vision"

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

    def expand(self, ids: Sequence[int], counts: Sequence[int]) -> list[int]:
        """Replaces each image token of a prompt by the begin of an image, one image token for each of its soft tokens,
        and its end. Raises ValueError if the prompt has more or fewer image tokens than there are images."""
        config, out = self.config, []
        if (found := list(ids).count(config.image_token_id)) != len(counts):
            raise ValueError(f"the prompt has {found} image tokens (<|image|>) for {len(counts)} images")
        left = iter(counts)
        for i in ids:
            if i == config.image_token_id:
                out += [config.boi_token_id, *[i] * next(left), config.eoi_token_id]
            else:
                out.append(i)
        return out


def load_tower(model: Vision, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
    """Replaces every meta tensor of `model` by the checkpoint's. Raises CheckpointError listing what does not fit."""
    stored = {names.tower_from_hf(name): name for name in checkpoint.towers}
    stored = {name: hf for name, hf in stored.items() if name.startswith(("vision_tower.", "embed_vision."))}
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    problems = {
        "missing": sorted(set(expected) - set(stored)),
        "unexpected": sorted(set(stored) - set(expected)),
    }
    if any(problems.values()):
        parts = [f"{len(found)} {what}: {', '.join(found[:4])}" for what, found in problems.items() if found]
        raise CheckpointError(f"{checkpoint.path}: the vision tower does not fit config.json; {'; '.join(parts)}")
    for name, shape in expected.items():
        tensor = checkpoint.tower(stored[name])
        if tuple(tensor.shape) != shape:
            found, wanted = list(tensor.shape), list(shape)
            raise CheckpointError(f"{checkpoint.path}: {stored[name]} is {found}, expected {wanted}")
        parent, _, leaf = name.rpartition(".")
        module, tensor = model.get_submodule(parent), tensor.to(device=device, dtype=dtype)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        else:
            module._buffers[leaf] = tensor
