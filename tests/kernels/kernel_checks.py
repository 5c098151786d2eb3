"""What every kernel test needs: errors against float64 and their budget, canaries, rings, repeated runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

FLOOR = 1e-6
"""Relative error that float32 arithmetic makes in another order of summation."""


def rel_l2(out: Tensor, truth: Tensor) -> float:
    """||out - truth|| / ||truth|| in float64; infinite if `out` has a NaN or an infinity that `truth` does not have."""
    out, truth = out.double(), truth.double()
    if not bool(torch.isfinite(out).all()):
        return float("inf")
    norm = float(truth.norm())
    return float((out - truth).norm()) / norm if norm else float(out.norm())


def assert_within_budget(
    out: Tensor, truth: Tensor, naive: Tensor, factor: float = 2.0, row_dims: int | None = 1
) -> None:
    """The error of `out` against float64 `truth` is at most `factor` times that of `naive`, the plain computation in
    the kernel's dtype on the same inputs. Because a single wrong row (the last `row_dims` dimensions) disappears in a
    sum, the worst row is held to the same, or to `factor` roundings of one number to that dtype, which a row that
    hangs on one number may suffer. `row_dims=None` leaves the rows out."""
    assert out.shape == truth.shape == naive.shape
    rounding = torch.finfo(out.dtype).eps / 2
    out, truth, naive = out.double().cpu(), truth.double().cpu(), naive.double().cpu()
    error, allowed = rel_l2(out, truth), factor * rel_l2(naive, truth) + FLOOR
    assert error <= allowed, f"error {error:.3e} against float64, allowed {allowed:.3e}"
    if row_dims is None:
        return
    worst, bound = _worst_row(out, truth, row_dims), factor * max(rounding, _worst_row(naive, truth, row_dims)) + FLOOR
    assert worst <= bound, f"worst row: error {worst:.3e} against float64, allowed {bound:.3e}"


def _worst_row(out: Tensor, truth: Tensor, dims: int) -> float:
    """Error of the worst row, relative to its own norm, but at least to a thousandth of a typical one."""
    start = truth.dim() - dims
    error, norm = (out - truth).flatten(start).norm(dim=-1), truth.flatten(start).norm(dim=-1)
    return float((error / norm.clamp_min(1e-3 * float(norm.mean()) or 1.0)).max())


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, `torch.empty` gives NaN (integers: their largest value): what a kernel fails to write is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled


class Guarded:
    """Tensors inside larger buffers of canaries: NaN around floats, a pattern around integers.

    A kernel that reads past a tensor from `around` gets NaN into its result; one that writes past it is found by
    `assert_untouched`."""

    def __init__(self, margin: int = 64):
        self.margin = margin
        self._kept: list[tuple[Tensor, Tensor]] = []

    def around(self, tensor: Tensor) -> Tensor:
        """A copy of `tensor` with its strides' order kept, `margin` canaries before, after, and after each innermost
        row. Its rows stay 16-byte aligned."""
        order = sorted(range(tensor.dim()), key=lambda d: -tensor.stride(d))
        shape = [tensor.shape[d] for d in order]
        padded = [*shape[:-1], shape[-1] + self.margin]
        buffer = torch.empty(torch.Size(padded).numel() + 2 * self.margin, dtype=tensor.dtype, device=tensor.device)
        buffer.fill_(torch.nan if tensor.is_floating_point() else 77)
        inside = buffer[self.margin : -self.margin].view(padded)[..., : shape[-1]]
        inside = inside.permute([order.index(d) for d in range(tensor.dim())])
        inside.copy_(tensor)
        # True where a canary is: everywhere but inside.
        outside = torch.ones_like(buffer, dtype=torch.bool)
        within = outside[self.margin : -self.margin].view(padded)[..., : shape[-1]]
        within.fill_(False)
        self._kept.append((buffer, outside))
        return inside

    def empty(self, *shape: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """An output filled with NaN, guarded likewise."""
        return self.around(torch.full(shape, torch.nan, dtype=dtype, device=device))

    def assert_untouched(self) -> None:
        """Raises AssertionError if any canary was overwritten."""
        for buffer, outside in self._kept:
            canaries = buffer[outside]
            intact = canaries.isnan() if buffer.is_floating_point() else canaries == 77
            assert bool(intact.all()), f"{int((~intact).sum())} canaries were overwritten"


def assert_repeatable(run: Callable[[], Tensor], times: int = 20) -> Tensor:
    """`run` gives the same bits each time; a race would not. Returns its result."""
    first = run().clone()
    for i in range(1, times):
        again = run()
        assert torch.equal(again, first), f"run {i} differs from the first by {rel_l2(again, first):.1e}"
    return first


def ring_positions(length: int, slots: int, device: torch.device | str = "cpu") -> Tensor:
    """int64 [slots]: the position that each slot of a ring holds after `length` tokens, position p being in slot
    p % slots; -1 where there is none yet."""
    slot = torch.arange(slots, device=device)
    last = length - 1 - (length - 1 - slot) % slots
    return torch.where(last >= 0, last, -1)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    """Standard normal values that depend on `seed` alone, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)
