"""Images in exported programs: the vision tower as the method `vision`, and `prefill_images`, which takes its soft
tokens in; and what the host does around them.

Both take one image or one row. P patches (always the most that the image processor makes, the rest padding), C values a
patch, L soft tokens, of which an image's own come first; T tokens, D model dim, V vocabulary."""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from gemma4_impl.config import TextConfig
from gemma4_impl.export.program import Method, Settings, Value
from gemma4_impl.model.cache import KVCache
from gemma4_impl.model.decoder import Gemma4, RMSNorm
from gemma4_impl.model.soft_tokens import SoftTokens, merge
from gemma4_impl.vision import encoder
from gemma4_impl.vision.config import VisionConfig
from gemma4_impl.vision.encoder import Vision
from gemma4_impl.vision.images import ImageEncoder
from gemma4_impl.vision.processing import ImageProcessor, ImageSource, ProcessedImages
from gemma4_impl.vision.tower import ImagePrompts

VISION, PREFILL_IMAGES = "vision", "prefill_images"


def check_images(config: TextConfig, tower: ImagePrompts, settings: Settings) -> None:
    """Raises ValueError if a program of these settings could not take the tower's images."""
    chunk, most = settings.max_prefill_chunk, tower.processor.max_soft_tokens
    if tower.config.text_hidden_size != config.hidden_size:
        raise ValueError(
            f"the vision tower makes soft tokens of {tower.config.text_hidden_size} values, but the text model's "
            f"hidden_size is {config.hidden_size}"
        )
    if tower.bidirectional and chunk < most:
        raise ValueError(
            f"max_prefill_chunk = {chunk}: an image takes up to {most} tokens, which see each other both ways and must "
            f"be fed together; raise it to {most} at least, or export without vision"
        )
    if chunk < 2:
        raise ValueError(f"max_prefill_chunk = {chunk}: images are fed in chunks of at least 2 tokens")


def vision_constants(tower: ImagePrompts) -> dict[str, int]:
    """The metadata that a program with images carries besides `folder.constants`."""
    config, processor = tower.config, tower.processor
    return {
        "get_image_token_id": config.image_token_id,
        "get_boi_token_id": config.boi_token_id,
        "get_eoi_token_id": config.eoi_token_id,
        "get_max_soft_tokens": processor.max_soft_tokens,
        "get_pooling_kernel_size": config.pooling_kernel_size,
        "get_patch_size": config.patch_size,
        "get_bidirectional_images": int(tower.bidirectional),
    }


class VisionStep(nn.Module):
    """The tower under the names that the method has."""

    def __init__(self, model: Vision):
        super().__init__()
        self.model = model

    def forward(self, patches: Tensor, positions: Tensor) -> Tensor:
        """patches [1, P, C] in [0, 1], positions [1, P, 2] (x, y; -1 in padding, at the end) -> [1, L, D]."""
        return self.model(patches, positions)


@torch.no_grad()
def vision_method(
    tower: ImageEncoder, settings: Settings, prepare: Callable[[Vision], Vision] = lambda model: model
) -> tuple[ExportedProgram, Method]:
    """The method `vision`: patches float32 [1, P, C], positions int64 [1, P, 2] -> soft tokens [1, L, D].

    The tower is in the program's dtype; `prepare` puts what a backend can lower in the place of its modules. P is
    fixed: images are resized to nearly as many patches as there may be, so that there is little to save."""
    config, P = tower.config, tower.processor.max_patches
    patches = Value("patches", torch.float32, (1, P, 3 * config.patch_size**2))
    positions = Value("positions", torch.long, (1, P, 2))
    soft = Value("soft_tokens", settings.dtype, (1, tower.processor.max_soft_tokens, config.text_hidden_size))
    example = torch.zeros(patches.shape), torch.zeros(positions.shape, dtype=torch.long)
    program = torch.export.export(VisionStep(prepare(tower.model).eval()), example, strict=True)
    return program, Method([patches, positions], [soft])


class ImageStep(nn.Module):
    """`export.Step` for a chunk in which soft tokens stand in the place of tokens."""

    def __init__(self, model: Gemma4, cache: KVCache, bidirectional: bool):
        super().__init__()
        self.model, self.cache, self.bidirectional = model, cache, bidirectional

    def forward(self, tokens: Tensor, positions: Tensor, embeds: Tensor, ends: Tensor) -> Tensor:
        """tokens, positions, ends [1, T], embeds [1, T, D] -> logits [1, 1, V] of the last token.

        ends: -1 at a token; at a soft token, the last position that it may look at in sliding layers. Only the values
        of embeds at soft tokens count, and only the ids of tokens elsewhere."""
        return self.model(tokens, positions, self.cache, "last", _Fed(ends >= 0, embeds, self.bidirectional, ends))


class _Fed(SoftTokens):
    """Soft tokens whose ends the host worked out: what it takes to find them is in no runtime's list of operators."""

    def __init__(self, mask: Tensor, embeds: Tensor, bidirectional: bool, last: Tensor):
        super().__init__(mask, embeds, bidirectional)
        object.__setattr__(self, "last", last)

    def ends(self, positions: Tensor) -> Tensor:
        return torch.where(self.mask, self.last, positions)


@torch.no_grad()
def images_method(
    model: Gemma4, cache: KVCache, tower: ImagePrompts, settings: Settings
) -> tuple[ExportedProgram, Method]:
    """The method `prefill_images`, see `ImageStep`: 2 <= T <= max_prefill_chunk, on the cache that the other methods
    share."""
    C, D = settings.max_prefill_chunk, model.config.hidden_size
    length = {"min": 2, "max": C} if C > 2 else 2
    row = [Value(name, torch.long, (1, length)) for name in ("tokens", "positions")]
    inputs = [*row, Value("embeds", settings.dtype, (1, length, D)), Value("ends", torch.long, (1, length))]
    T = 3 if C > 2 else 2
    # No two the same tensor, or the program would take them for one input.
    tokens, at, ends = (torch.arange(T)[None] for _ in range(3))
    example = tokens, at, torch.zeros(1, T, D, dtype=settings.dtype), ends
    dim = Dim("length", min=2, max=C) if C > 2 else None
    dynamic = {value.name: {1: dim} for value in inputs} if dim else None
    step = ImageStep(model, cache, tower.bidirectional)
    program = torch.export.export(step, example, dynamic_shapes=dynamic, strict=True)
    return program, Method(inputs, [Value("logits", settings.dtype, (1, 1, model.config.vocab_size))])


def ends_of(soft: SoftTokens, positions: Tensor) -> Tensor:
    """The input `ends` of a chunk: positions [1, T] -> [1, T]."""
    return torch.where(soft.mask, soft.ends(positions), -1)


class ExportedEncoder(ImagePrompts):
    """Images in prompts for an exported program: as `ImageEncoder`, with the program's own tower, which `run` calls:
    patches [1, P, C], positions [1, P, 2] -> [1, L, D]."""

    def __init__(self, config: VisionConfig, processor: ImageProcessor, run: Callable[[Tensor, Tensor], Tensor]):
        super().__init__(config, processor)
        self.run = run

    @classmethod
    def from_folder(cls, folder: str | Path, run: Callable[[Tensor, Tensor], Tensor]) -> "ExportedEncoder":
        """For an exported folder, whose config.json and image processor's file are the checkpoint's. Raises
        ConfigError, FileNotFoundError."""
        config = VisionConfig.from_file(folder)
        return cls(config, ImageProcessor.from_pretrained(folder, config), run)

    def encode(self, images: Iterable[ImageSource] | ProcessedImages) -> list[Tensor]:
        """Images -> the soft tokens [n, D] of each. Raises ImageError, FileNotFoundError, and ValueError for patches
        that are not padded to the most that there may be."""
        if not isinstance(images, ProcessedImages):
            images = self.processor(images)
        if (found := images.positions.shape[1]) != (P := self.processor.max_patches):
            raise ValueError(f"images of {found} patches, but the program takes {P}, padded with position -1")
        rows = zip(images.pixel_values.split(1), images.positions.split(1), images.num_soft_tokens, strict=True)
        return [self.run(patches, positions)[0, :n].clone() for patches, positions, n in rows]

    def merge(self, tokens: Tensor, features: Sequence[Tensor], dtype: torch.dtype) -> SoftTokens:
        """As `ImageEncoder.merge`."""
        return merge(tokens, self.config.image_token_id, features, self.bidirectional, dtype)


def for_xnnpack(model: Vision) -> Vision:
    """The tower, on the same weights, in operators that XNNPACK takes: it has no GELU by tanh, averages tensors of four
    dimensions only, and clips to numbers, not to tensors."""
    with torch.device("meta"):
        out = Vision(model.config)
    out.load_state_dict(model.state_dict(), assign=True)
    weight = model.embed_vision.embedding_projection.weight
    out.reset_rope(weight.dtype, weight.device)
    for module in list(out.modules()):
        if (kind := _FOR_XNNPACK.get(type(module))) is not None:
            module.__class__ = kind
            module.prepare()
    return out


class _Norm(RMSNorm):
    """The sum of squares as a matrix product."""

    ones: Tensor

    def prepare(self) -> None:
        self.register_buffer("ones", torch.ones(1, *self.dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(F.linear(x * x, self.ones.type_as(x)) / self.dim[0] + self.eps)
        return x if self.weight is None else x * self.weight


class _Encoder(encoder.Encoder):
    """Of one image, whose layers take [P, D]."""

    def prepare(self) -> None:
        pass

    def forward(self, x: Tensor, positions: Tensor, padding: Tensor) -> Tensor:
        place = positions.squeeze(0).clamp(min=0).to(self.rope.inv_freq.dtype)
        angles = torch.cat((place[:, :1] * self.rope.inv_freq, place[:, 1:] * self.rope.inv_freq), dim=-1)[:, None]
        mask = torch.where(padding, -torch.inf, 0.0).to(x.dtype)[None]
        x = x.squeeze(0)
        for layer in self.layers:
            x = layer(x, (angles.cos(), angles.sin()), mask)
        return x.unsqueeze(0)


class _Attention(encoder.Attention):
    """Written out as products of [N, P, H]."""

    def prepare(self) -> None:
        pass

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        """x [P, D], rotary [P, 1, H] each, additive mask [1, 1, P] -> [P, D]."""
        q, k, v = (self._heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = _turn(self.q_norm(q), *rotary), _turn(self.k_norm(k), *rotary)
        q, k, v = (part.transpose(0, 1) for part in (q, k, self.v_norm(v)))
        if (group := q.shape[0] // k.shape[0]) > 1:
            k, v = (part.repeat_interleave(group, dim=0) for part in (k, v))
        weights = torch.softmax(torch.bmm(q, k.transpose(1, 2)) + mask, dim=-1)
        return self.o_proj(torch.bmm(weights, v).transpose(0, 1).flatten(1))


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [P, N, H] turned as `encoder.turn` does: a roll within each half of the dims, in slices."""
    h = x.shape[-1] // 4
    a, b, c, d = (x[..., i * h : (i + 1) * h] for i in range(4))
    return (x * cos + torch.cat((b, a, d, c), dim=-1) * sin).type_as(x)


class _MLP(encoder.MLP):
    """GELU written out."""

    def prepare(self) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)
        inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * (gate * gate * gate))
        return self.down_proj(0.5 * gate * (1 + torch.tanh(inner)) * self.up_proj(x))


class _ClippedLinear(encoder.ClippedLinear):
    """Bounds as numbers."""

    def prepare(self) -> None:
        if self.clipped:
            ends = (self.input_min, self.input_max, self.output_min, self.output_max)
            self.bounds = tuple(float(end) for end in ends)

    def forward(self, x: Tensor) -> Tensor:
        if not self.clipped:
            return self.linear(x)
        low, high, least, most = self.bounds
        return self.linear(x.clamp(low, high)).clamp(least, most)


_FOR_XNNPACK: dict[type, type] = {
    RMSNorm: _Norm,
    encoder.Encoder: _Encoder,
    encoder.Attention: _Attention,
    encoder.MLP: _MLP,
    encoder.ClippedLinear: _ClippedLinear,
}
