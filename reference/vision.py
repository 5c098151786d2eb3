"""The taps of transformers' vision tower and projector, read off their own modules, and forced values written back."""

from typing import Any

import torch
from torch import Tensor, nn

from gemma4_impl import taps


def tap_vision(tower: nn.Module, projector: nn.Module) -> None:
    """Hooks on a `Gemma4VisionModel` and a `Gemma4MultimodalEmbedder`. Its attention function must be a tapped one
    (`reference.hf`). Every tap can be forced: a module's output is replaced by returning another, a residual in place
    on its way into a norm, and the standardised soft tokens on their way into the projector."""
    layers = tower.encoder.layers
    tower.register_forward_pre_hook(_tell_patches, with_kwargs=True)
    tower.patch_embedder.register_forward_hook(_output("patch_embed"))
    for i, layer in enumerate(layers):
        prefix = f"layers.{i}."
        layer.self_attn.register_forward_hook(_output(prefix + "self_attn.out"))
        layer.pre_feedforward_layernorm.register_forward_pre_hook(_residual(prefix + "resid_mid"))
        layer.mlp.register_forward_hook(_output(prefix + "mlp"))
        layer.register_forward_hook(_output(prefix + "out"))
    tower.pooler.register_forward_pre_hook(lambda module, args, kwargs: taps.at(tower.tapped_soft), with_kwargs=True)
    tower.pooler.register_forward_hook(_pooled(tower))
    if tower.config.standardize:
        projector.register_forward_pre_hook(_standardised(tower), with_kwargs=True)
    projector.register_forward_hook(_projected(tower))


def tapped_qkv(module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [I, heads, P, H] on their way into attention, tapped in [I, P, heads, H]."""
    prefix = f"{taps.VISION}layers.{module.layer_idx}.self_attn."
    named = (("q", query), ("k", key), ("v", value))
    return tuple(taps.tap(prefix, name, x.transpose(1, 2)).transpose(1, 2) for name, x in named)


def reset_frequencies(tower: nn.Module) -> None:
    """Computes the axial RoPE's frequencies again: in float64 where float32 is promoted."""
    rope = tower.encoder.rotary_emb
    rope.inv_freq = rope.compute_axial_rope_parameters(tower.config, rope.inv_freq.device)[0]


def _tell_patches(tower: nn.Module, args: tuple, kwargs: dict) -> None:
    positions = kwargs.get("pixel_position_ids", args[1] if len(args) > 1 else None)
    valid = (positions >= 0).all(dim=-1)
    k = tower.config.pooling_kernel_size
    columns = torch.arange(valid.shape[1], device=valid.device)
    soft = columns[: valid.shape[1] // k**2]
    tower.tapped_soft = torch.where(soft < valid.sum(dim=1, keepdim=True) // k**2, soft, -1)
    taps.at(torch.where(valid, columns, -1))


def _output(name: str) -> Any:
    def hook(module: nn.Module, args: tuple, output: Any) -> Any:
        if isinstance(output, tuple):
            return (taps.tap(taps.VISION, name, output[0]), *output[1:])
        return taps.tap(taps.VISION, name, output)

    return hook


def _residual(name: str) -> Any:
    def hook(module: nn.Module, args: tuple) -> None:
        value = taps.tap(taps.VISION, name, args[0])
        if value is not args[0]:
            args[0].copy_(value)

    return hook


def _pooled(tower: nn.Module) -> Any:
    def hook(module: nn.Module, args: tuple, output: tuple) -> tuple:
        tower.tapped_pool = taps.tap(taps.VISION, "pool", output[0])
        return (tower.tapped_pool, *output[1:])

    return hook


def _standardised(tower: nn.Module) -> Any:
    """The tower standardises between two casts of its own, and drops the padding: computed here as there."""

    def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        pooled = tower.tapped_pool
        value = (pooled - tower.std_bias.float()) * tower.std_scale.float()
        forced = taps.tap(taps.VISION, "standardised", value)
        if forced is value:
            return None
        given = kwargs["inputs_embeds"] if kwargs else args[0]
        return (), {"inputs_embeds": forced[tower.tapped_soft >= 0].to(given.dtype)}

    return hook


def _projected(tower: nn.Module) -> Any:
    def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        own = tower.tapped_soft >= 0
        padded = output.new_zeros(*own.shape, output.shape[-1])
        padded[own] = output
        return taps.tap(taps.VISION, "proj", padded)[own]

    return hook
