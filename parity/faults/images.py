"""Faults of images: pixels, the vision tower, the projector, and the merge into the text model."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemma4_impl import taps
from gemma4_impl.config import FULL, SLIDING, RopeParameters
from gemma4_impl.model.cache import Keys
from gemma4_impl.model.decoder import Gemma4, attention_mask
from gemma4_impl.model.rope import RotaryEmbedding
from gemma4_impl.model.soft_tokens import SoftTokens
from gemma4_impl.vision.encoder import MLP, Attention, ClippedLinear, EncoderLayer, Projector, Vision
from gemma4_impl.vision.images import ImageEncoder
from parity.candidate import TorchCandidate
from parity.faults.fault import Fault, Inject, Tap, first, in_full, named, override

KINDS = ("E2B", "26B-A4B", "31B")
CLIPPED = ("E2B",)
LARGE = ("26B-A4B", "31B")

_PATCHES, _POOL, _PROJ, _EMBED = named("vision.patch_embed"), named("vision.pool"), named("vision.proj"), named("embed")
_Q, _V, _OUT, _MLP = (
    named(f"vision.layers.0.{name}") for name in ("self_attn.q", "self_attn.v", "self_attn.out", "mlp")
)
_TEXT_OUT = first("self_attn.out", lambda layer: layer.layer_type == SLIDING)


def on_tower(change: Callable[[Vision], Any]) -> Inject:
    def inject(candidate: TorchCandidate) -> None:
        with torch.no_grad():
            change(candidate.encoder.model)

    return inject


def each_layer(change: Callable[[EncoderLayer], Any]) -> Inject:
    def inject(vision: Vision) -> None:
        for layer in vision.vision_tower.encoder.layers:
            change(layer)

    return on_tower(inject)


def patches(change: Callable[[Tensor], Tensor]) -> Inject:
    """Changes the pixel values [I, P, C] on their way into the patch embedding."""

    def hook(module: nn.Module, args: tuple) -> tuple:
        return (change(args[0]), *args[1:])

    return on_tower(lambda vision: vision.vision_tower.patch_embedder.register_forward_pre_hook(hook))


def xy_swapped(name: str) -> Inject:
    """Exchanges x and y of the positions that a submodule of the tower is given."""

    def hook(module: nn.Module, args: tuple) -> tuple:
        return (args[0], args[1].flip(-1), *args[2:])

    return on_tower(lambda vision: vision.vision_tower.get_submodule(name).register_forward_pre_hook(hook))


def one_position_table(vision: Vision) -> None:
    embedder = vision.vision_tower.patch_embedder
    embedder.position_embedding_table = nn.Parameter(embedder.position_embedding_table[[0, 0]], requires_grad=False)


def rope_theta(theta: Callable[[float], float]) -> Inject:
    def change(vision: Vision) -> None:
        encoder, config = vision.vision_tower.encoder, vision.config
        weight = vision.embed_vision.embedding_projection.weight
        encoder.rope = RotaryEmbedding(config.head_dim // 2, RopeParameters("default", theta(config.rope_theta)))
        encoder.rope.reset(weight.dtype, weight.device)

    return on_tower(change)


def attention_scaled(layer: EncoderLayer) -> None:
    def attend(self: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return Attention.attend(self, q * self.head_dim**-0.5, k, v, mask)

    override(layer.self_attn, "attend", attend)


def padding_attended(layer: EncoderLayer) -> None:
    layer.register_forward_pre_hook(lambda module, args: (*args[:2], torch.zeros_like(args[2])))


def value_unnormed(layer: EncoderLayer) -> None:
    layer.self_attn.v_norm = nn.Identity()


def exact_gelu(layer: EncoderLayer) -> None:
    def forward(self: MLP, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x)) * self.up_proj(x))

    override(layer.mlp, "forward", forward)


def unclipped(*sides: str) -> Inject:
    def change(vision: Vision) -> None:
        for module in vision.modules():
            if isinstance(module, ClippedLinear):
                for side in sides:
                    getattr(module, f"{side}_min").fill_(-torch.inf)
                    getattr(module, f"{side}_max").fill_(torch.inf)

    return on_tower(change)


def pooled_times(factor: Callable[[Vision], float]) -> Inject:
    """A wrong constant between the last layer and the pooled soft tokens."""

    def change(vision: Vision) -> None:
        vision.vision_tower.encoder.register_forward_hook(lambda module, args, output: output * factor(vision))

    return on_tower(change)


def standardised(bias: Callable[[Tensor, Tensor], Tensor], scale: Callable[[Tensor], Tensor]) -> Inject:
    def change(vision: Vision) -> None:
        tower = vision.vision_tower
        tower.std_bias, tower.std_scale = bias(tower.std_bias, tower.std_scale), scale(tower.std_scale)

    return on_tower(change)


def norm_after_projection(vision: Vision) -> None:
    def forward(self: Projector, x: Tensor) -> Tensor:
        x = self.embedding_projection(x)
        x = F.rms_norm(x, x.shape[-1:], None, self.embedding_pre_projection_norm.eps)
        return taps.tap(taps.VISION, "proj", x)

    override(vision.embed_vision, "forward", forward)


def norm_missing(vision: Vision) -> None:
    vision.embed_vision.embedding_pre_projection_norm = nn.Identity()


def merged(change: Callable[[list[Tensor]], list[Tensor]]) -> Inject:
    """Changes the soft tokens [n, D] of the images on their way into the sequence."""

    def inject(candidate: TorchCandidate) -> None:
        def merge(self: ImageEncoder, tokens: Tensor, features: list[Tensor], dtype: torch.dtype) -> SoftTokens:
            return ImageEncoder.merge(self, tokens, change(features), dtype)

        override(candidate.encoder, "merge", merge)

    return inject


def block_causal(candidate: TorchCandidate) -> None:
    candidate.encoder.config = replace(candidate.encoder.config, use_bidirectional_attention=None)


Mask = Callable[[Gemma4, Tensor, Tensor, SoftTokens], Tensor]


def mask_of(kind: str, function: Mask) -> Inject:
    """Replaces the mask of one type of layer: positions of queries and keys, images -> bool [B, 1, T, S]."""

    def mask(
        self: Gemma4, own: str, positions: Tensor, keys: Keys, start: int | None, images: SoftTokens | None
    ) -> Any:
        if own != kind:
            return Gemma4._mask(self, own, positions, keys, start, images)
        return function(self, positions, keys.positions, images)

    return lambda candidate: override(candidate.model, "_mask", mask)


def block_on_full_layers(self: Gemma4, queries: Tensor, keys: Tensor, images: SoftTokens) -> Tensor:
    return attention_mask(queries, keys, None, images.ends(queries))


def block_clipped_ahead(self: Gemma4, queries: Tensor, keys: Tensor, images: SoftTokens) -> Tensor:
    window = self.config.sliding_window
    visible = attention_mask(queries, keys, window, images.ends(queries))
    return visible & (keys[:, None, None, :] < queries[:, None, :, None] + window)


def block_unclipped(self: Gemma4, queries: Tensor, keys: Tensor, images: SoftTokens) -> Tensor:
    ends = images.ends(queries)
    visible = attention_mask(queries, keys, self.config.sliding_window, ends)
    return visible | (ends[:, None, :, None] == ends[:, None, None, :])


def blocks_joined(self: Gemma4, queries: Tensor, keys: Tensor, images: SoftTokens) -> Tensor:
    last = queries.masked_fill(~images.mask, -1).amax(dim=1, keepdim=True)
    return attention_mask(queries, keys, self.config.sliding_window, torch.where(images.mask, last, queries))


PerLayer = Callable[[Gemma4, Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]


def per_layer(change: PerLayer) -> Inject:
    """Changes the tokens [B, T] and embeddings [B, T, D] that the per-layer inputs are made of; `change` is also given
    the mask [B, T] of the image tokens, and their id."""

    def inject(candidate: TorchCandidate) -> None:
        image, shown = candidate.encoder.config.image_token_id, []

        def keep(model: nn.Module, args: tuple, kwargs: dict) -> None:
            shown[:] = [kwargs["images"].mask]

        def per_layer_inputs(self: Gemma4, tokens: Tensor, embed: Tensor) -> Tensor:
            return Gemma4.per_layer_inputs(self, *change(self, tokens, embed, shown[0], image))

        candidate.model.register_forward_pre_hook(keep, with_kwargs=True)
        override(candidate.model, "per_layer_inputs", per_layer_inputs)

    return inject


def image_id_looked_up(model: Gemma4, tokens: Tensor, embed: Tensor, mask: Tensor, image: int) -> tuple:
    return tokens.masked_fill(mask, image), embed


def context_unmerged(model: Gemma4, tokens: Tensor, embed: Tensor, mask: Tensor, image: int) -> tuple:
    return tokens, torch.where(mask[..., None], model.embed_tokens(tokens), embed)


def _fault(name: str, summary: str, inject: Inject, tap: Tap, variants: tuple[str, ...] = KINDS) -> Fault:
    return Fault(name, summary, inject, tap, variants, images=True)


IMAGES = [
    _fault("pixels_unscaled", "pixels stay in [0, 1]; [-1, 1] is meant", patches(lambda x: x / 2 + 0.5), _PATCHES),
    _fault("channels_reversed", "BGR", patches(lambda x: x.unflatten(-1, (-1, 3)).flip(-1).flatten(-2)), _PATCHES),
    _fault(
        "channels_first",
        "a patch is flattened channel by channel",
        patches(lambda x: x.unflatten(-1, (-1, 3)).transpose(-1, -2).flatten(-2)),
        _PATCHES,
    ),
    _fault("positions_swapped", "x is looked up in the table of y", xy_swapped("patch_embedder"), _PATCHES),
    _fault("one_position_table", "y is looked up in the table of x", on_tower(one_position_table), _PATCHES),
    _fault("rope_halves_swapped", "a head's first half turns by y", xy_swapped("encoder"), _Q),
    _fault("rope_base", "the text model's base", rope_theta(lambda theta: 10_000.0), _Q),
    _fault(
        "rope_over_whole_head",
        "frequencies are spaced over the head's size, not over half of it",
        rope_theta(lambda theta: theta**0.5),
        _Q,
    ),
    _fault("value_unnormed", "v_norm is missing: it has no weight", each_layer(value_unnormed), _V),
    _fault("vision_attention_scaled", "1/sqrt(H) in attention", each_layer(attention_scaled), _OUT),
    _fault("padding_patches_attended", "padding is seen as a patch", each_layer(padding_attended), _OUT),
    _fault("vision_gelu_exact", "gelu instead of its tanh approximation", each_layer(exact_gelu), _MLP),
    _fault("clip_missing", "linear maps are not clipped", unclipped("input", "output"), _Q, CLIPPED),
    _fault("clip_of_outputs_missing", "only inputs are clipped", unclipped("output"), _Q, CLIPPED),
    _fault("clip_of_inputs_missing", "only outputs are clipped", unclipped("input"), _Q, CLIPPED),
    _fault(
        "pooling_divisor",
        "sums over k x k patches are divided by k",
        pooled_times(lambda vision: vision.config.pooling_kernel_size),
        _POOL,
    ),
    _fault(
        "pooled_unscaled", "sqrt(D) is missing", pooled_times(lambda vision: vision.config.hidden_size**-0.5), _POOL
    ),
    _fault(
        "standardise_order",
        "x * scale - bias",
        standardised(lambda bias, scale: bias / scale, lambda scale: scale),
        named("vision.standardised"),
        LARGE,
    ),
    _fault(
        "standardise_missing",
        "pooled soft tokens go to the projector as they are",
        standardised(lambda bias, scale: 0 * bias, torch.ones_like),
        named("vision.standardised"),
        LARGE,
    ),
    _fault("projector_norm_after", "normed after the projection", on_tower(norm_after_projection), _PROJ),
    _fault("projector_norm_missing", "projected without a norm", on_tower(norm_missing), _PROJ),
    _fault(
        "soft_tokens_scaled",
        "soft tokens are scaled like embeddings",
        merged(lambda features: [feature * feature.shape[-1] ** 0.5 for feature in features]),
        _EMBED,
    ),
    _fault("images_in_reverse", "the last image stands in the first one's place", merged(lambda f: f[::-1]), _EMBED),
    _fault("image_block_causal", "image tokens do not see ahead", block_causal, _TEXT_OUT, LARGE),
    _fault(
        "block_on_full_layers",
        "image tokens see ahead in full layers too",
        mask_of(FULL, block_on_full_layers),
        in_full("self_attn.out"),
        LARGE,
    ),
    _fault(
        "block_clipped_ahead",
        "the window clips an image on both sides",
        mask_of(SLIDING, block_clipped_ahead),
        _TEXT_OUT,
        LARGE,
    ),
    _fault(
        "block_unclipped",
        "an image is seen whole, however far its beginning is",
        mask_of(SLIDING, block_unclipped),
        _TEXT_OUT,
        LARGE,
    ),
    _fault(
        "blocks_joined", "an image sees on to the end of the last", mask_of(SLIDING, blocks_joined), _TEXT_OUT, LARGE
    ),
    _fault(
        "ple_of_image_id",
        "the per-layer look-up takes the image token, not the pad token",
        per_layer(image_id_looked_up),
        named("per_layer_inputs"),
        CLIPPED,
    ),
    _fault(
        "ple_context_unmerged",
        "the context's projection is of the embeddings before the merge",
        per_layer(context_unmerged),
        named("per_layer_inputs"),
        CLIPPED,
    ),
]
"""On tiny multimodal checkpoints, with the two images that a parity run draws."""
