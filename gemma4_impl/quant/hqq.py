"""Scales and zeros of least error: "mse" by alternating least squares, "hqq" by half-quadratic splitting."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

NORM = {"mse": 2.0, "hqq": 0.5}
"""The exponent p of each method's objective."""
BETA = 5.0
"""Weight of the splitting's penalty, for errors counted in steps (multiples of the scale)."""

_LEVEL = torch.tensor(1 / BETA)
_STARTS = {"mse": (1.0, 0.85), "hqq": (1.0,)}
_ITERATIONS = 8
# The part of a step that is taken: going beyond the fitted scale and zero converges faster, and to lower minima.
_RELAXATION = 1.6
# A group whose scale and zero move by less than this part of a step has converged.
_TOLERANCE = 6e-3
# How far rounding can move |error| ** p of one weight: float32 finds an error in steps to about 2e-6.
_MARGIN = {"mse": 1e-5, "hqq": 4e-3}
# Below this the reciprocal of a step may overflow; such groups stay as they are.
_SMALLEST_STEP = 2.0**-100
# Up to this group size a block is transposed: sums over a group then run along vectors.
_TRANSPOSED = 256
# torch.sum's order of adding a column up depends on where the column lies, unless there are a multiple of this many.
_COLUMNS = 64


class Codes(NamedTuple):
    """The codes there are, and how a scale or zero is rounded to be stored."""

    low: int
    high: int
    store: Callable[[Tensor], Tensor]


def objective(error: Tensor, method: str) -> Tensor:
    """What `method` minimises: errors [..., G] of a group's weights -> sum of |error| ** p [...]."""
    return error.abs().pow(NORM[method]).sum(-1)


def refine(
    groups: Tensor, scale: Tensor, zero: Tensor | None, codes: Codes, method: str
) -> tuple[Tensor, Tensor | None]:
    """groups [n, G], scale and zero [n, 1], all float32 and as stored -> a stored scale and zero whose `objective` is
    not greater, with w = scale * q + zero and q the nearest code; a zero of None stays 0.

    Alternates, for each group on its own:
    1. the nearest codes q under the stored scale and zero, which leave the residual r;
    2. the scale and zero that fit them best, over-relaxed: linear regression of w - e on q.
    For "mse" e = 0, which is Lloyd's iteration for a uniform quantizer, run from the given scale and a smaller one. For
    "hqq" e = sign(r) max(|r| - |r|^(p-1) / beta, 0), which solves the half-quadratic splitting of Badri and Shaji
    (Half-Quadratic Quantization of Large Machine Learning Models, 2023): the minimum over e, scale and zero of
    sum |e|^p + beta / 2 (r - e)^2. Here p is 1/2, not 0.7, which takes a square root where they take a power; the
    scale is fitted as well as the zero; and beta stays, so that a group can converge and be left out. The best iterate
    counts, the start among them."""
    n, size = groups.shape
    dim = 1 if size > _TRANSPOSED else 0
    if dim == 0 and n % _COLUMNS:
        index = _padded(torch.arange(n, device=groups.device))
        groups, scale, zero = (None if t is None else t[index] for t in (groups, scale, zero))
    weights = groups if dim else groups.t().contiguous()
    shape = (-1, 1) if dim else (1, -1)
    descent = _Descent(weights, dim, scale.view(shape), None if zero is None else zero.view(shape), codes, method)
    for ratio in _STARTS[method]:
        descent.run(ratio)
    return descent.best_scale.view(-1, 1)[:n], None if zero is None else descent.best_zero.view(-1, 1)[:n]


def _padded(index: Tensor) -> Tensor:
    """The last entry again, until there are a multiple of `_COLUMNS`."""
    return torch.cat([index, index[-1:].expand(-len(index) % _COLUMNS)])


class _Descent:
    """The best scale and zero of each group so far; groups lie along `dim`."""

    def __init__(self, weights: Tensor, dim: int, scale: Tensor, zero: Tensor | None, codes: Codes, method: str):
        self.weights, self.dim, self.size = weights, dim, weights.shape[dim]
        self.scale, self.zero, self.codes, self.method = scale, zero, codes, method
        self.best_scale, self.best_zero = scale.clone(), None if zero is None else zero.clone()
        self.best_loss: Tensor | None = None
        self.buffers = [torch.empty(weights.numel(), device=weights.device) for _ in range(4)]

    def run(self, ratio: float) -> None:
        """Descends from `ratio` times the first scale, with the range about the same middle."""
        low, high, store = self.codes
        weights, scale, zero, unit, live = self.weights, self.scale, self.zero, self.scale, None
        if ratio != 1:
            scale = self._stored(scale * ratio, scale)
            if zero is not None:
                zero = store(zero + (self.scale - scale) * ((low + high) / 2))
        for _ in range(_ITERATIONS):
            error, q, spare, root = (buffer[: weights.numel()].view_as(weights) for buffer in self.buffers)
            # In steps. The zero is subtracted first: that is exact where it matters, far away from 0.
            if zero is None:
                torch.mul(weights, scale.reciprocal(), out=error)
            else:
                torch.sub(weights, zero, out=error).mul_(scale.reciprocal())
            torch.round(error, out=q).clamp_(low, high)
            error.sub_(q)
            if self.method == "mse":
                loss = self._sum(torch.mul(error, error, out=spare)) * (scale / unit).square_()
            else:
                torch.sqrt(torch.abs(error, out=spare), out=root)
                loss = self._sum(root) * (scale / unit).sqrt_()
                # What is left to fit: r - e = sign(r) min(|r|, |r|^(-1/2) / beta)
                torch.minimum(spare, torch.div(_LEVEL, root, out=root), out=spare)
                torch.copysign(spare, error, out=error)
            self._keep(live, loss, scale, zero)
            new_scale, new_zero = self._fit(q, error, spare, scale, zero)
            move = (new_scale - scale).abs_()
            if zero is not None:
                torch.maximum(move, (new_zero - zero).abs_(), out=move)
            moving = move > _TOLERANCE * scale
            left = int(moving.count_nonzero())
            if not left:
                return
            scale = torch.where(moving, new_scale, scale)
            zero = None if zero is None else torch.where(moving, new_zero, zero)
            if left < 0.7 * moving.numel():
                index = moving.flatten().nonzero().flatten()
                index = index if self.dim else _padded(index)
                live = index if live is None else live[index]
                weights, scale, unit = (t.index_select(1 - self.dim, index) for t in (weights, scale, unit))
                zero = None if zero is None else zero.index_select(1 - self.dim, index)

    def _sum(self, values: Tensor) -> Tensor:
        return values.sum(self.dim, keepdim=True)

    def _fit(
        self, q: Tensor, error: Tensor, spare: Tensor, scale: Tensor, zero: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The scale and zero of the regression of q + error on q, and beyond."""
        covariance, variance = (self._sum(torch.mul(q, other, out=spare)) / self.size for other in (error, q))
        if zero is not None:
            mean_q, mean_error = self._sum(q) / self.size, self._sum(error) / self.size
            covariance -= mean_q * mean_error
            variance -= mean_q * mean_q
        growth = torch.where(variance > 0, _RELAXATION * (covariance / variance), 0.0)
        new_scale = self._stored(scale + scale * growth, scale)
        if zero is None:
            return new_scale, None
        new_zero = self.codes.store(zero + scale * (_RELAXATION * mean_error - growth * mean_q))
        return new_scale, torch.where(new_zero.abs() < torch.inf, new_zero, zero)

    def _stored(self, scale: Tensor, fallback: Tensor) -> Tensor:
        stored = self.codes.store(scale)
        return torch.where((stored > _SMALLEST_STEP) & (stored < torch.inf), stored, fallback)

    def _keep(self, live: Tensor | None, loss: Tensor, scale: Tensor, zero: Tensor | None) -> None:
        """Takes the iterates that are better than all before; the start must be beaten by more than rounding."""
        loss = loss.flatten()
        if self.best_loss is None:
            self.best_loss = loss - self.size * _MARGIN[self.method]
            return
        better = (loss < (self.best_loss if live is None else self.best_loss[live])).nonzero().flatten()
        where = better if live is None else live[better]
        for best, new in ((self.best_loss, loss), (self.best_scale, scale), (self.best_zero, zero)):
            if new is not None:
                best.view(-1)[where] = new.flatten()[better]
