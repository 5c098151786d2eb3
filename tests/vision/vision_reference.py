"""transformers' vision tower and projector with a tiny checkpoint's weights, and ours; every tap of both."""

from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Gemma4Config
from transformers.models.gemma4 import modeling_gemma4 as hf

import reference.hf  # noqa: F401  registers the tapped attention functions
from gemma4_impl import taps
from gemma4_impl.taps import Recorder
from gemma4_impl.vision.config import VisionConfig
from gemma4_impl.vision.encoder import Vision
from gemma4_impl.vision.processing import ProcessedImages
from reference.float64 import PromoteFloat32
from reference.vision import reset_frequencies, tap_vision


def vision_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of the tower and the projector, under their names without `model.`."""
    state = {name.removeprefix("model."): t for name, t in load_file(path / "model.safetensors").items()}
    return {name: t for name, t in state.items() if name.startswith(("vision_tower.", "embed_vision."))}


def ours(path: Path, dtype: torch.dtype = torch.float32, weights: torch.dtype | None = None) -> Vision:
    """Our model in `dtype`, its weights first rounded to `weights`."""
    return load(VisionConfig.from_file(path), vision_weights(path), dtype, weights)


def load(config: VisionConfig, state: dict[str, Tensor], dtype: torch.dtype, weights: torch.dtype | None) -> Vision:
    with torch.device("meta"):
        model = Vision(config)
    model.load_state_dict({name: t.to(weights or dtype).to(dtype) for name, t in state.items()}, assign=True)
    model.reset_rope(dtype, "cpu")
    return model.eval()


class Theirs(nn.Module):
    """transformers' modules, in the tree that our `Vision` has too."""

    def __init__(self, config: Gemma4Config):
        super().__init__()
        self.vision_tower = hf.Gemma4VisionModel(config.vision_config)
        self.embed_vision = hf.Gemma4MultimodalEmbedder(config.vision_config, config.text_config)

    @classmethod
    def load(
        cls,
        config: Gemma4Config,
        state: dict[str, Tensor],
        dtype: torch.dtype = torch.float32,
        weights: torch.dtype | None = None,
        attention: str = "eager",
    ) -> "Theirs":
        """In float64 it is the truth: the casts to float32 within are promoted, on weights rounded to `weights`."""
        config.vision_config._attn_implementation = f"tapped_{attention}"
        model = cls(config).to(dtype)
        tap_vision(model.vision_tower, model.embed_vision)
        model.load_state_dict({name: t.to(weights or dtype).to(dtype) for name, t in state.items()})
        model.dtype = dtype
        with model.precision():
            reset_frequencies(model.vision_tower)
        return model.eval()

    @classmethod
    def from_checkpoint(cls, path: Path, *args, **kwargs) -> "Theirs":
        return cls.load(Gemma4Config.from_pretrained(path), vision_weights(path), *args, **kwargs)

    def precision(self):
        return PromoteFloat32() if self.dtype == torch.float64 else nullcontext()

    def forward(self, pixel_values: Tensor, positions: Tensor) -> Tensor:
        """The soft tokens of all images, one after the other [n, text hidden size]."""
        with torch.no_grad(), self.precision():
            pixel_values = pixel_values.to(torch.promote_types(self.dtype, torch.float32))
            features = self.vision_tower(pixel_values, positions).last_hidden_state
            return self.embed_vision(features)

    def capture(self, images: ProcessedImages) -> dict[str, Tensor]:
        """Every tap [n, ...], of the patches or soft tokens of all images, one after the other."""
        return record(self, images)


def record(model: nn.Module, images: ProcessedImages, **options: object) -> dict[str, Tensor]:
    """Every tap of a model, ours or theirs, in that form; `options` are the recorder's."""
    with torch.no_grad(), taps.recording(Recorder(*images.positions.shape[:2], **options)) as recorder:
        model(images.pixel_values, images.positions)
    return _own(recorder.values, images)


def _own(values: dict[str, Tensor], images: ProcessedImages) -> dict[str, Tensor]:
    """Without padding; taps from pooling on are of soft tokens, the others of patches."""
    patches = tuple((images.positions[..., 0] >= 0).sum(dim=1).tolist())
    pooled = ("vision.pool", "vision.standardised", "vision.proj")
    return {name: flat(v, images.num_soft_tokens if name in pooled else patches) for name, v in values.items()}


def flat(soft: Tensor, counts: tuple[int, ...]) -> Tensor:
    """[I, L, ...] -> the images' own soft tokens, one after the other [n, ...]."""
    return torch.cat([row[:n] for row, n in zip(soft, counts, strict=True)])


def error(got: Tensor, want: Tensor) -> float:
    """Relative L2 error."""
    assert got.shape == want.shape
    return float((got.double() - want.double()).norm() / want.double().norm())
