"""Rotary position embedding: frequencies of both layer types, and their application."""

import torch
from torch import Tensor, nn

from gemma4_impl.config import RopeParameters


def inverse_frequencies(head_dim: int, rope: RopeParameters) -> Tensor:
    """[head_dim / 2] float64, radians a position: theta ** (-2i / head_dim).

    `proportional` keeps that spacing (the divisor is head_dim, not the number of rotated dims) and zeroes the
    frequencies past the first `partial_rotary_factor` of the pairs, which then do not rotate."""
    pairs = head_dim // 2
    rotated = int(rope.partial_rotary_factor * head_dim // 2)
    exponents = torch.arange(pairs, dtype=torch.float64, device="cpu") * 2 / head_dim
    frequencies = float(rope.rope_theta) ** -exponents
    frequencies[rotated:] = 0
    return frequencies


class RotaryEmbedding(nn.Module):
    """cos and sin of every (position, dim); dim i is paired with dim i + head_dim / 2."""

    inv_freq: Tensor

    def __init__(self, head_dim: int, rope: RopeParameters):
        super().__init__()
        self.head_dim, self.rope = head_dim, rope
        self.reset(torch.float32, torch.device("cpu"))

    def reset(self, dtype: torch.dtype, device: torch.device) -> None:
        """Recomputes the frequencies: no checkpoint holds them. Angles need float32 even in a bfloat16 model."""
        self.turn(inverse_frequencies(self.head_dim, self.rope).to(device, torch.promote_types(dtype, torch.float32)))

    def turn(self, frequencies: Tensor) -> None:
        """Sets the frequencies [H / 2]. The first half of the dims turns the other way: that is where the rotation's
        minus sign is kept, so that applying it is one roll and two products."""
        self.register_buffer("inv_freq", torch.cat([-frequencies, frequencies]), persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions [B, T] -> cos, sin [B, T, 1, H], at least float32; sin is negated in the first half of the dims.
        Padding (-1) is rotated as position 0."""
        angles = positions.clamp(min=0)[:, :, None, None] * self.inv_freq
        return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, T, N, H] rotated by what `RotaryEmbedding` gives, in that dtype, then rounded once to its own."""
    return (x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin).type_as(x)
