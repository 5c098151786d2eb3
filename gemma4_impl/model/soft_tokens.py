"""Images inside a token sequence: which positions they take, and how far each of them may look ahead."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gemma4_impl.vision import blocks


@dataclass(frozen=True)
class SoftTokens:
    """What stands in the place of the image tokens of a batch."""

    mask: Tensor
    """bool [B, T], True where an image token is replaced."""
    embeds: Tensor
    """[B, T, D] in the text model's dtype; only its values under `mask` count."""
    bidirectional: bool
    """Whether the tokens of an image see each other both ways (in sliding layers; full layers are always causal)."""

    def __getitem__(self, part: slice) -> "SoftTokens":
        """The same for a part of the sequence, which must not cut an image in two if they are bidirectional."""
        return replace(self, mask=self.mask[:, part], embeds=self.embeds[:, part])

    @property
    def longest(self) -> int:
        """The most tokens that a chunk must be able to hold."""
        return blocks.longest(self.mask.cpu().numpy()) if self.bidirectional else 1

    def ends(self, positions: Tensor) -> Tensor:
        """positions [B, T] -> [B, T], the last position that each token may look at: its own, and inside a block of
        image tokens the block's last one. Blocks that touch are one, as in transformers."""
        if not self.bidirectional:
            return positions
        goes_on = self.mask & torch.nn.functional.pad(self.mask[:, 1:], (0, 1))
        padding = positions < 0
        ahead = positions.masked_fill(goes_on | padding, torch.iinfo(positions.dtype).max)
        return torch.where(padding, positions, ahead.flip(1).cummin(dim=1).values.flip(1))

    def chunks(self, size: int) -> list[slice]:
        """The sequence in parts of at most `size` tokens that cut no block of any row in two, if it matters.

        Raises ValueError for a block that is longer than `size`."""
        whole = self.mask if self.bidirectional else torch.zeros_like(self.mask)
        return blocks.cut(whole.cpu().numpy(), size)


def merge(
    tokens: Tensor, image_token_id: int, features: Sequence[Tensor], bidirectional: bool, dtype: torch.dtype
) -> SoftTokens:
    """Puts the soft tokens of images, each [n, D], in the place of the image tokens of tokens [B, T], in reading order:
    row by row, image by image. Raises ValueError if the numbers differ."""
    mask = tokens == image_token_id
    flat = torch.cat(list(features)) if features else torch.zeros(0, 1, device=tokens.device)
    if (wanted := int(mask.sum())) != len(flat):
        raise ValueError(f"the prompt has room for {wanted} soft tokens, but its images have {len(flat)}")
    embeds = torch.zeros(*tokens.shape, flat.shape[1], dtype=dtype, device=tokens.device)
    embeds[mask] = flat.to(embeds)
    return SoftTokens(mask, embeds, bidirectional)
