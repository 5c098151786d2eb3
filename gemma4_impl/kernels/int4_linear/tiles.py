"""What the kernels need to know of a packed weight."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Tiles:
    """A matrix [N, K] of four- or eight-bit codes in tiles, or a stack of them; `gemma4_impl.quant.cuda` makes them."""

    tiles: Tensor
    """uint8 [..., ceil(N / 16), ceil(columns / 256), bytes of a tile], where eight-bit codes take two columns."""
    scratch: Tensor
    """int32 [1024, 17]: a flag for each block of threads, which are 0 between launches, and then 16 sums for each."""
    N: int
    K: int
    group: int
    """Columns that share a scale: 32, 64 or 128."""
    offset: int
    has_zero: bool
    split: bool
    """Whether codes have eight bits."""

    @property
    def tile_bytes(self) -> int:
        return self.tiles.shape[-1]

    @property
    def excess(self) -> float:
        """What the kernels, which multiply with 128 + nibble, have too much, as a factor of the sum of x."""
        # Of eight bits: 16 (128 + high) + 128 + low, where 128 was added to the code.
        return 16.0 * 128 + 128 + 128 + self.offset if self.split else 128.0 + self.offset

    @property
    def defines(self) -> dict[str, int]:
        """The macros of the CUDA sources."""
        return {"GROUP": self.group, "ZERO": int(self.has_zero), "SPLIT": int(self.split)}
