"""Images inside a token sequence in JAX: which positions they take, and how far each of them may look ahead."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gemma4_impl.vision import blocks


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SoftTokens:
    """What stands in the place of the image tokens of a batch. A pytree of arrays, NumPy's or JAX's."""

    mask: Array
    """bool [B, T], True where an image token is replaced."""
    embeds: Array
    """[B, T, D]; only its values under `mask` count."""
    bidirectional: bool = field(metadata={"static": True})
    """Whether the tokens of an image see each other both ways (in sliding layers; full layers are always causal)."""

    def __getitem__(self, part: slice) -> "SoftTokens":
        """The same for a part of the sequence, which must not cut an image in two if they are bidirectional."""
        return replace(self, mask=self.mask[:, part], embeds=self.embeds[:, part])

    def ends(self, positions: Array) -> Array:
        """positions [B, T] -> [B, T], the last position that each token may look at: its own, and inside a block of
        image tokens the block's last one. Blocks that touch are one, as in transformers."""
        if not self.bidirectional:
            return positions
        image = self.mask & (positions >= 0)
        goes_on = image & jnp.pad(image[:, 1:], ((0, 0), (0, 1)))
        columns = jnp.arange(positions.shape[1])
        last = jax.lax.cummin(jnp.where(goes_on, columns[-1], columns), axis=1, reverse=True)
        return jnp.take_along_axis(positions, last, axis=1)

    # The rest is for the host: where it cuts a sequence decides the shapes that are compiled.

    @property
    def longest(self) -> int:
        """The most tokens that a chunk must be able to hold."""
        return blocks.longest(np.asarray(self.mask)) if self.bidirectional else 1

    def chunks(self, size: int) -> list[slice]:
        """The sequence in parts of at most `size` tokens that cut no block of any row in two, if it matters.

        Raises ValueError for a block that is longer than `size`."""
        mask = np.asarray(self.mask)
        return blocks.cut(mask if self.bidirectional else np.zeros_like(mask), size)


def image_slots(tokens: np.ndarray, image_token_id: int, counts: Sequence[int], length: int) -> np.ndarray:
    """For `merge`: which of I images' soft tokens [I * length, D] stands at each of tokens [B, T], in reading order,
    row by row and image by image, where `counts` [I] are the images' own; -1 at text. int32 [B, T], on the host.

    Raises ValueError if the numbers differ."""
    mask = np.asarray(tokens) == image_token_id
    if (wanted := int(mask.sum())) != sum(counts):
        raise ValueError(f"the prompt has room for {wanted} soft tokens, but its images have {sum(counts)}")
    slots = np.full(mask.shape, -1, np.int32)
    slots[mask] = [i * length + j for i, n in enumerate(counts) for j in range(n)]
    return slots


def merge(features: Array, slots: Array, bidirectional: bool, dtype: Any) -> SoftTokens:
    """Soft tokens [I, L, D], padding included, put where `image_slots` says, as `dtype`. May be traced and
    differentiated; the shapes alone decide what is compiled."""
    return SoftTokens(slots >= 0, features.reshape(-1, features.shape[-1])[slots].astype(dtype), bidirectional)
