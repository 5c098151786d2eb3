"""transformers' vision tower and projector with a tiny checkpoint's weights, and ours; every tap of both."""

from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Gemma4Config
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma4 import modeling_gemma4 as hf

from gemma4_impl import taps
from gemma4_impl.taps import Recorder
from gemma4_impl.vision.config import VisionConfig
from gemma4_impl.vision.encoder import Vision
from gemma4_impl.vision.processing import ProcessedImages
from reference.float64 import PromoteFloat32


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
        config.vision_config._attn_implementation = attention
        model = cls(config).to(dtype)
        model.load_state_dict({name: t.to(weights or dtype).to(dtype) for name, t in state.items()})
        model.dtype = dtype
        with model.precision():
            rope = model.vision_tower.encoder.rotary_emb
            rope.inv_freq = rope.compute_axial_rope_parameters(config.vision_config)[0]
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
        values: dict[str, Tensor] = {}
        handles = []

        def keep(name: str, index: int | None = None):
            def hook(module, args, output=None):
                value = output if index is None else args[0]
                values[name] = (value[0] if isinstance(value, tuple) else value).detach().clone()

            return hook

        tower = self.vision_tower
        handles.append(tower.patch_embedder.register_forward_hook(keep("vision.patch_embed")))
        for i, layer in enumerate(tower.encoder.layers):
            prefix = f"vision.layers.{i}."
            handles += [
                layer.self_attn.register_forward_hook(keep(prefix + "self_attn.out")),
                layer.pre_feedforward_layernorm.register_forward_pre_hook(keep(prefix + "resid_mid", 0)),
                layer.mlp.register_forward_hook(keep(prefix + "mlp")),
                layer.register_forward_hook(keep(prefix + "out")),
            ]
        handles.append(tower.pooler.register_forward_hook(keep("vision.pool")))
        implementation = tower.config._attn_implementation
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, hf.eager_attention_forward)

        def tapped(module, query, key, value, mask, **kwargs):
            for name, states in (("q", query), ("k", key), ("v", value)):
                values[f"vision.layers.{module.layer_idx}.self_attn.{name}"] = states.transpose(1, 2).detach().clone()
            return attend(module, query, key, value, mask, **kwargs)

        AttentionInterface.register("tapped_vision", tapped)
        # Without it transformers makes no mask at all, and padding is attended to.
        AttentionMaskInterface.register("tapped_vision", ALL_MASK_ATTENTION_FUNCTIONS[implementation])
        try:
            tower.config._attn_implementation = "tapped_vision"
            soft = self(images.pixel_values, images.positions)
        finally:
            tower.config._attn_implementation = implementation
            for handle in handles:
                handle.remove()
        if tower.config.standardize:
            # Between two casts of the tower's own; computed here as there, at least in float32.
            pooled = values["vision.pool"]
            values["vision.standardised"] = (pooled - tower.std_bias.to(pooled)) * tower.std_scale.to(pooled)
        return _own(values, images) | {"vision.proj": soft}


def record(model: Vision, images: ProcessedImages, **options: object) -> dict[str, Tensor]:
    """Our taps in the same form; `options` are the recorder's."""
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
