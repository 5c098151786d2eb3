"""What every backend needs of images but the maths: where a tower's tensors come from, and the tokens of its images."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from gemma4_impl import names
from gemma4_impl.checkpoint import CheckpointError, open_checkpoint
from gemma4_impl.config import ConfigError, TextConfig
from gemma4_impl.tokenizer import Tokenizer
from gemma4_impl.vision.config import VisionConfig
from gemma4_impl.vision.processing import ImageProcessor


class TowerWeights(Protocol):
    """Where a tower's tensors come from: a checkpoint folder or an `mmproj` file."""

    path: Path
    towers: dict[str, Path]
    """Each tensor's name, canonical or Hugging Face's, and the file that holds it."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype to compute in unless told otherwise."""

    def tower(self, name: str) -> Tensor: ...


class ImagePrompts:
    """What an image encoder knows of prompts: where images go in them, and how many tokens they take up."""

    def __init__(self, config: VisionConfig, processor: ImageProcessor):
        self.config, self.processor = config, processor

    @property
    def bidirectional(self) -> bool:
        """Whether an image's tokens see each other both ways in the text model's sliding layers."""
        return self.config.use_bidirectional_attention == "vision"

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


def open_tower(path: str | Path, text: str | Path | None = None) -> tuple[TowerWeights, VisionConfig, ImageProcessor]:
    """The tower of the multimodal checkpoint folder `path`, or of the `mmproj` GGUF file `path`, which goes with the
    text model at `text` (a folder or a GGUF file). No weight is read yet.

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
    return source, config, ImageProcessor.from_pretrained(folder, config)


def stored_names(source: TowerWeights, expected: Iterable[str]) -> dict[str, str]:
    """Canonical name of everything that a tower consists of -> its name in `source`. Raises CheckpointError listing
    what is missing or unexpected."""
    expected = list(expected)
    stored = {names.tower_from_hf(name): name for name in source.towers}
    stored = {name: hf for name, hf in stored.items() if name.startswith(("vision_tower.", "embed_vision."))}
    problems = {
        "missing": sorted(set(expected) - set(stored)),
        "unexpected": sorted(set(stored) - set(expected)),
    }
    if any(problems.values()):
        config = "config.json" if source.path.is_dir() else "the metadata"
        parts = [f"{len(found)} {what}: {', '.join(found[:4])}" for what, found in problems.items() if found]
        raise CheckpointError(f"{source.path}: the vision tower does not fit {config}; {'; '.join(parts)}")
    return {name: stored[name] for name in expected}


def read_tensor(source: TowerWeights, name: str, shape: tuple[int, ...]) -> Tensor:
    """The tensor that `source` has under this name of its own. Raises CheckpointError for another shape."""
    tensor = source.tower(name)
    if tuple(tensor.shape) != shape:
        raise CheckpointError(f"{source.path}: {name} is {list(tensor.shape)}, expected {list(shape)}")
    return tensor


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
