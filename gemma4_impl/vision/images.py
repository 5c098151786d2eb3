"""Images in prompts: a checkpoint's vision tower with its image processor, and the tokens that images take up."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gemma4_impl import names
from gemma4_impl.checkpoint import CheckpointError, open_checkpoint
from gemma4_impl.config import ConfigError, TextConfig
from gemma4_impl.model.soft_tokens import SoftTokens, merge
from gemma4_impl.tokenizer import Tokenizer
from gemma4_impl.vision.config import VisionConfig
from gemma4_impl.vision.encoder import Vision
from gemma4_impl.vision.processing import ImageProcessor, ImageSource, ProcessedImages


class TowerWeights(Protocol):
    """Where a tower's tensors come from: a checkpoint folder or an `mmproj` file."""

    path: Path
    towers: dict[str, Path]
    """Each tensor's name, canonical or Hugging Face's, and the file that holds it."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype to compute in unless told otherwise."""

    def tower(self, name: str) -> Tensor: ...


class ImageEncoder:
    """Turns images into soft tokens: `processor` makes patches of them, `model` runs the tower."""

    def __init__(self, model: Vision, processor: ImageProcessor):
        self.model, self.processor = model, processor
        self.config: VisionConfig = model.config

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        text: str | Path | None = None,
    ) -> "ImageEncoder":
        """Loads the tower of the multimodal checkpoint folder `path`, or of the `mmproj` GGUF file `path`, which goes
        with the text model at `text` (a folder or a GGUF file); `dtype` defaults to the weights' own.

        A folder says how many soft tokens an image may have; with GGUF files only it is the released processors' 280.
        Raises FileNotFoundError, CheckpointError, GGUFError, and ConfigError for a checkpoint that takes text only, or
        a tower that is another model's."""
        path = Path(path)
        source: TowerWeights
        if path.is_file() or path.suffix == ".gguf":
            from gemma4_impl.gguf.mmproj import Mmproj

            source = Mmproj(path)
            if text is None:
                raise CheckpointError(f"{path}: a vision tower alone takes no prompts; give its text model too (text)")
            config, folder = source.config(_text_fields(Path(text))), Path(text)
        else:
            config, folder = VisionConfig.from_file(path), path
            source = open_checkpoint(path)
        processor = ImageProcessor.from_pretrained(folder, config)
        with torch.device("meta"):
            model = Vision(config)
        dtype = dtype or source.dtype
        load_tower(model, source, dtype, torch.device(device))
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


def load_tower(model: Vision, source: TowerWeights, dtype: torch.dtype, device: torch.device) -> None:
    """Replaces every meta tensor of `model` by the source's. Raises CheckpointError listing what does not fit."""
    stored = {names.tower_from_hf(name): name for name in source.towers}
    stored = {name: hf for name, hf in stored.items() if name.startswith(("vision_tower.", "embed_vision."))}
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    problems = {
        "missing": sorted(set(expected) - set(stored)),
        "unexpected": sorted(set(stored) - set(expected)),
    }
    if any(problems.values()):
        config = "config.json" if source.path.is_dir() else "the metadata"
        parts = [f"{len(found)} {what}: {', '.join(found[:4])}" for what, found in problems.items() if found]
        raise CheckpointError(f"{source.path}: the vision tower does not fit {config}; {'; '.join(parts)}")
    for name, shape in expected.items():
        tensor = source.tower(stored[name])
        if tuple(tensor.shape) != shape:
            found, wanted = list(tensor.shape), list(shape)
            raise CheckpointError(f"{source.path}: {stored[name]} is {found}, expected {wanted}")
        parent, _, leaf = name.rpartition(".")
        module, tensor = model.get_submodule(parent), tensor.to(device=device, dtype=dtype)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        else:
            module._buffers[leaf] = tensor


def _text_fields(path: Path) -> dict[str, Any]:
    """What the text model at `path`, a folder or a GGUF file, decides of `VisionConfig`."""
    from gemma4_impl.gguf.mmproj import IMAGE_TOKENS, text_fields
    from gemma4_impl.gguf.reader import GGUFFile

    if path.is_file() or path.suffix == ".gguf":
        with GGUFFile(path) as file:
            return text_fields(file)
    fields: dict[str, Any] = {"text_hidden_size": TextConfig.from_file(path).hidden_size}
    raw = json.loads((path / "config.json").read_text(encoding="utf-8"))
    fields["use_bidirectional_attention"] = (raw.get("text_config") or raw).get("use_bidirectional_attention") or None
    ids = {field: raw[field] for field in IMAGE_TOKENS if raw.get(field) is not None}
    if len(ids) < len(IMAGE_TOKENS):
        tokenizer = Tokenizer.from_pretrained(path)
        ids = {field: tokenizer.id(token) for field, token in IMAGE_TOKENS.items()} | ids
    for field, token in IMAGE_TOKENS.items():
        if ids[field] is None:
            raise ConfigError(
                f"{path}: neither config.json nor the vocabulary knows {token}; this model takes text only"
            )
    return fields | ids
