"""What the kernels need to know of a packed weight."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Tiles:
    """A matrix [N, K] of four- or eight-bit codes in tiles, or a stack of them; `gemma4_impl.quant.cuda` makes them."""

    tiles: Tensor
    """uint8 [..., ceil(N / 16), ceil(columns / 256), bytes of a tile], where eight-bit codes take two columns."""
    scratch: Tensor
    """int32 [1024, 33], 0 between launches: flags of few.cu's blocks of threads, 1023 at most; a count of matvec.cu's
    blocks; and 16 words of 64 bits for each of those, sums that others add up."""
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
    def stored_offset(self) -> int:
        """What is taken from the codes as tiles have them: eight-bit ones are stored as code + 128."""
        return 128 + self.offset if self.split else self.offset

    @property
    def defines(self) -> dict[str, int]:
        """The macros of the CUDA sources."""
        return {"GROUP": self.group, "ZERO": int(self.has_zero), "SPLIT": int(self.split)}
