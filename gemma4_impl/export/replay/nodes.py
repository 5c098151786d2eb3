"""What each node of an MLX program does, in `mlx.core`: shapes, indexing, caches and integers. Arithmetic is in
`arithmetic.py`."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from gemma4_impl.errors import short

DTYPES = {
    0: mx.uint8,
    1: mx.int8,
    2: mx.int16,
    3: mx.int32,
    4: mx.int64,
    5: mx.float16,
    6: mx.float32,
    11: mx.bool_,
    15: mx.bfloat16,
    27: mx.uint16,
    28: mx.uint32,
    29: mx.uint64,
}
"""ExecuTorch's ScalarType -> dtype. There is no float64: MLX has none on Metal."""
INT64 = range(-(1 << 63), 1 << 63)
INT32_MAX = (1 << 31) - 1


@dataclass
class Guard:
    """What a run must not do, and what is known of it only once its arrays are computed."""

    limit: int
    """Bytes that one intermediate array may take."""
    where: str = ""
    """The instruction that runs."""
    conditions: list[tuple[str, mx.array]] = field(default_factory=list)
    """Boolean scalars that must turn out true, each with what is wrong otherwise."""

    def require(self, condition: mx.array, wrong: str) -> None:
        self.conditions.append((f"{self.where}: {wrong}", mx.all(condition)))

    def fits(self, nbytes: int) -> None:
        if nbytes > self.limit:
            raise ValueError(f"an array of {nbytes} bytes, more than the {self.limit} allowed")

    def index(self, indices: mx.array, size: int) -> mx.array:
        """`indices` as they are if they are all within -size .. size - 1, as `require` will tell: MLX reads and writes
        out of bounds otherwise. So the array is clipped."""
        if not mx.issubdtype(indices.dtype, mx.integer):
            raise ValueError(f"indices of {indices.dtype}")
        if indices.size and not size:
            raise ValueError("indices into an empty dimension")
        unsigned = mx.issubdtype(indices.dtype, mx.unsignedinteger)
        if unsigned:
            indices = indices.astype(mx.uint64)
        low = 0 if unsigned else -size
        inside = indices < size if unsigned else mx.logical_and(indices >= low, indices < size)
        self.require(inside, f"an index outside {low} .. {size - 1}")
        return mx.clip(indices, low, max(size - 1, 0))


@dataclass(frozen=True)
class Op:
    """A node type: the function, and which of the schema's fields it takes, in order."""

    run: Callable
    fields: tuple[str, ...]
    optional: frozenset[str]
    """Tensors and values that may be absent; `run` is given None for them."""
    guarded: bool
    """`run` takes the Guard first."""


OPS: dict[str, Op] = {}


def define(kind: str, run: Callable, fields: str, guarded: bool = False) -> None:
    """`fields` are separated by spaces; one that ends in `?` may be absent."""
    names = fields.split()
    optional = frozenset(name.rstrip("?") for name in names if name.endswith("?"))
    OPS[kind] = Op(run, tuple(name.rstrip("?") for name in names), optional, guarded)


def op(kind: str, fields: str, guarded: bool = False) -> Callable[[Callable], Callable]:
    def decorate(run: Callable) -> Callable:
        define(kind, run, fields, guarded)
        return run

    return decorate


def axis_of(x: mx.array, axis: int) -> int:
    """`axis`, which may count from the end, as an index into x.shape."""
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis {axis} of an array with {x.ndim} dimensions")
    return axis % x.ndim


def at_least(low: int, **values: int | Sequence[int]) -> None:
    """Raises ValueError for sizes below `low`, or above what MLX counts with, of which it ends the process."""
    for name, value in values.items():
        if any(not low <= v <= INT32_MAX for v in (value if isinstance(value, Sequence) else [value])):
            raise ValueError(f"{name} = {short(value)}: must be from {low} to {INT32_MAX}")


# Integers, which the program computes shapes and positions from. They are int64 there.


@op("ItemIntNode", "x")
def item_int(x: mx.array) -> int:
    if x.size != 1:
        raise ValueError(f"an array of shape {x.shape} is not one number")
    return int(x.item())


@op("SymSizeNode", "a dim")
def sym_size(a: mx.array, dim: int) -> int:
    return a.shape[axis_of(a, dim)]


define("AddIntNode", lambda a, b: a + b, "a b")
define("SubtractIntNode", lambda a, b: a - b, "a b")
define("MultiplyIntNode", lambda a, b: a * b, "a b")
define("FloorDivideIntNode", lambda a, b: a // b, "a b")
define("ModIntNode", lambda a, b: a % b, "a b")

# New arrays


@op("ARangeNode", "start stop step scalar_type?", guarded=True)
def arange(guard: Guard, start: int, stop: int, step: int, dtype: mx.Dtype | None) -> mx.array:
    dtype = dtype or mx.int32
    if step == 0:
        raise ValueError("step = 0")
    guard.fits(len(range(start, stop, step)) * dtype.size)
    return mx.arange(start, stop, step, dtype=dtype)


@op("FullNode", "shape v scalar_type", guarded=True)
def full(guard: Guard, shape: list[int], v: float, dtype: mx.Dtype) -> mx.array:
    at_least(0, shape=shape)
    guard.fits(math.prod(shape) * dtype.size)
    # A Python float given as it is decides the dtype of a scalar.
    return mx.full(shape, mx.array(int(v) if mx.issubdtype(dtype, mx.integer) else v, dtype))


@op("FullLikeNode", "x v scalar_type?", guarded=True)
def full_like(guard: Guard, x: mx.array, v: float, dtype: mx.Dtype | None) -> mx.array:
    return full(guard, list(x.shape), v, dtype or x.dtype)


@op("TriNode", "n m k scalar_type", guarded=True)
def tri(guard: Guard, n: int, m: int, k: int, dtype: mx.Dtype) -> mx.array:
    at_least(0, n=n, m=m)
    guard.fits(n * m * max(dtype.size, 4))
    return mx.tri(n, m, k, dtype=dtype)


# Shapes

define("IdCopyNode", lambda x: x, "x")
define("ContiguousNode", mx.contiguous, "x")
define("ExpandDimsNode", mx.expand_dims, "x axis")
define("TransposeNode", mx.transpose, "x perm")
define("AsTypeNode", lambda x, dtype: x.astype(dtype), "x scalar_type")
define("ConcatenateNode", mx.concatenate, "tensors axis")
define("StackNode", mx.stack, "tensors axis")
define("TrilNode", mx.tril, "x k")
define("TriuNode", mx.triu, "x k")
define("FlipNode", mx.flip, "x axes")


@op("ReshapeNode", "x shape")
def reshape(x: mx.array, shape: list[int]) -> mx.array:
    """One size may be -1: what is left."""
    at_least(-1, shape=shape)
    return mx.reshape(x, shape)


@op("RollNode", "x shift axes")
def roll(x: mx.array, shift: list[int], axes: list[int]) -> mx.array:
    axes = [axis_of(x, axis) for axis in axes]
    return mx.roll(x, [by % max(x.shape[axis], 1) for by, axis in zip(shift, axes, strict=True)], axes)


@op("SqueezeNode", "x dims")
def squeeze(x: mx.array, dims: list[int]) -> mx.array:
    return mx.squeeze(x, dims) if dims else mx.squeeze(x)


@op("BroadcastToNode", "x shape", guarded=True)
def broadcast_to(guard: Guard, x: mx.array, shape: list[int]) -> mx.array:
    """A size of -1 is that of x there."""
    at_least(-1, shape=shape)
    lead = len(shape) - x.ndim
    shape = [x.shape[i - lead] if size == -1 and i >= lead else size for i, size in enumerate(shape)]
    guard.fits(math.prod(shape) * x.dtype.size)
    return mx.broadcast_to(x, shape)


@op("TileNode", "x reps", guarded=True)
def tile(guard: Guard, x: mx.array, reps: list[int]) -> mx.array:
    at_least(0, reps=reps)
    guard.fits(math.prod(reps) * x.nbytes)
    return mx.tile(x, reps)


@op("RepeatNode", "x repeats axis", guarded=True)
def repeat(guard: Guard, x: mx.array, repeats: int, axis: int) -> mx.array:
    at_least(0, repeats=repeats)
    guard.fits(repeats * x.nbytes)
    return mx.repeat(x, repeats, axis_of(x, axis))


@op("PadNode", "x pad_width mode constant_value", guarded=True)
def pad(guard: Guard, x: mx.array, pad_width: list[int], mode: str, constant_value: float) -> mx.array:
    at_least(0, pad_width=pad_width)
    if len(pad_width) != 2 * x.ndim or mode not in ("constant", "edge"):
        raise ValueError(f"pad_width {short(pad_width)}, mode {short(mode)} of an array with {x.ndim} dimensions")
    pairs = list(zip(pad_width[::2], pad_width[1::2], strict=True))
    guard.fits(math.prod(s + a + b for s, (a, b) in zip(x.shape, pairs, strict=True)) * x.dtype.size)
    return mx.pad(x, pairs, mode, constant_value)


@op("AsStridedNode", "x shape strides offset", guarded=True)
def as_strided(guard: Guard, x: mx.array, shape: list[int], strides: list[int], offset: int) -> mx.array:
    at_least(0, shape=shape, strides=strides, offset=offset)
    guard.fits(math.prod(shape) * x.dtype.size)
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if 0 not in shape and last >= x.size:
        raise ValueError(f"a view up to element {last} of {x.size}")
    return mx.as_strided(x, shape, strides, offset)


@op("SplitNode", "x sizes axis")
def split(x: mx.array, sizes: list[int], axis: int) -> list[mx.array]:
    """One size is that of every part but the last, as in torch.split."""
    axis = axis_of(x, axis)
    at_least(0, sizes=sizes)
    if len(sizes) == 1:
        at_least(1, sizes=sizes)
        ends = list(range(sizes[0], x.shape[axis], sizes[0]))
    else:
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        if ends.pop() != x.shape[axis]:
            raise ValueError(f"parts of {short(sizes)} from a dimension of {x.shape[axis]}")
    return mx.split(x, ends, axis)


# Indexing


def _span(x: mx.array, axis: int, start: int, stop: int, step: int) -> tuple[int, range]:
    """The dimension, and the places in it, of x[start:stop:step]: bounds count from the end and are cut as usual."""
    axis = axis_of(x, axis)
    if step == 0:
        raise ValueError("step = 0")
    return axis, range(*slice(start, stop, step).indices(x.shape[axis]))


@op("SliceNode", "x axis start stop step")
def slice_(x: mx.array, axis: int, start: int, stop: int, step: int) -> mx.array:
    axis, places = _span(x, axis, start, stop, step)
    if not places:
        return x[(*[slice(None)] * axis, slice(0, 0))]
    # Backwards to the first place is up to None: -1 would be the last.
    end = places.stop if places.stop >= 0 else None
    return x[(*[slice(None)] * axis, slice(places.start, end, step))]


@op("SliceUpdateNode", "dst update axis start stop step")
def slice_update(dst: mx.array, update: mx.array, axis: int, start: int, stop: int, step: int) -> mx.array:
    """dst with `update` in dst[start:stop:step]. Nothing is copied if nobody else holds `dst`."""
    axis, places = _span(dst, axis, start, stop, step)
    want = (*dst.shape[:axis], len(places), *dst.shape[axis + 1 :])
    if update.shape != want:
        raise ValueError(f"an update of shape {update.shape} for places of shape {want}")
    if not update.size:
        return dst
    if step == 1:
        return mx.slice_update(dst, update.astype(dst.dtype), mx.array([places.start]), [axis])
    return _put(dst, update, mx.array(list(places)), axis)


@op("IndexCopyNode", "dst update indices axis", guarded=True)
def index_copy(guard: Guard, dst: mx.array, update: mx.array, indices: mx.array, axis: int) -> mx.array:
    axis = axis_of(dst, axis)
    want = (*dst.shape[:axis], indices.size, *dst.shape[axis + 1 :])
    if indices.ndim != 1 or update.shape != want:
        raise ValueError(f"{indices.shape} indices and an update of shape {update.shape}, not {want}")
    return _put(dst, update, guard.index(indices, dst.shape[axis]), axis)


def _put(dst: mx.array, update: mx.array, indices: mx.array, axis: int) -> mx.array:
    indices = indices.reshape([-1 if d == axis else 1 for d in range(dst.ndim)])
    return mx.put_along_axis(dst, mx.broadcast_to(indices, update.shape), update.astype(dst.dtype), axis)


@op("ScatterAddNode", "x indices updates axis", guarded=True)
def scatter_add(guard: Guard, x: mx.array, indices: mx.array, updates: mx.array, axis: int) -> mx.array:
    """As torch.scatter_add: indices of updates' shape, at most x's in every other dimension."""
    axis = axis_of(x, axis)
    if indices.shape != updates.shape or indices.ndim != x.ndim:
        raise ValueError(f"indices {indices.shape}, updates {updates.shape}, array {x.shape}")
    if any(i > s for d, (i, s) in enumerate(zip(indices.shape, x.shape, strict=True)) if d != axis):
        raise ValueError(f"indices {indices.shape} are larger than the array {x.shape}")
    indices = guard.index(indices, x.shape[axis])
    grid = [
        indices if d == axis else mx.arange(size).reshape([-1 if i == d else 1 for i in range(x.ndim)])
        for d, size in enumerate(indices.shape)
    ]
    return x.at[tuple(grid)].add(updates.astype(x.dtype))


@op("TakeNode", "x index axis", guarded=True)
def take(guard: Guard, x: mx.array, index: mx.array | int, axis: int) -> mx.array:
    axis = axis_of(x, axis)
    size = x.shape[axis]
    if isinstance(index, mx.array):
        guard.fits(math.prod((*x.shape[:axis], index.size, *x.shape[axis + 1 :])) * x.dtype.size)
        return mx.take(x, guard.index(index, size), axis)
    if not -size <= index < size:
        raise ValueError(f"index {index} of {size}")
    # mx.take itself fails on indices from the end.
    return mx.take(x, index % size, axis)


@op("TakeAlongAxisNode", "x indices axis", guarded=True)
def take_along_axis(guard: Guard, x: mx.array, indices: mx.array, axis: int) -> mx.array:
    axis = axis_of(x, axis)
    return mx.take_along_axis(x, guard.index(indices, x.shape[axis]), axis)


@op("GatherNode", "x indices axes slice_sizes", guarded=True)
def gather(guard: Guard, x: mx.array, indices: list[mx.array], axes: list[int], slice_sizes: list[int]) -> mx.array:
    """[*broadcast indices, *slice_sizes], where `slice_sizes` are 1 along `axes` and whole elsewhere."""
    axes = [axis_of(x, axis) for axis in axes]
    whole = [1 if d in axes else size for d, size in enumerate(x.shape)]
    if len(indices) != len(axes) or len(set(axes)) != len(axes) or slice_sizes != whole:
        raise ValueError(f"{len(indices)} indices along {axes}, slices {short(slice_sizes)} of {x.shape}")
    shape = mx.broadcast_shapes(*(i.shape for i in indices))
    guard.fits(math.prod((*shape, *whole)) * x.dtype.size)
    checked = [guard.index(i, x.shape[axis]) for i, axis in zip(indices, axes, strict=True)]
    first = x.transpose(*axes, *(d for d in range(x.ndim) if d not in axes))
    return first[tuple(checked)].reshape([*shape, *whole])


# Order

define("SortNode", lambda x, axis: mx.sort(x, axis_of(x, axis)), "x axis")
define("ArgsortNode", lambda x, axis: mx.argsort(x, axis_of(x, axis)), "x axis")


def _kth(run: Callable) -> Callable:
    def partition(x: mx.array, kth: int, axis: int) -> mx.array:
        axis = axis_of(x, axis)
        if not -x.shape[axis] <= kth < x.shape[axis]:
            raise ValueError(f"kth = {kth} of {x.shape[axis]}")
        return run(x, kth, axis)

    return partition


define("PartitionNode", _kth(mx.partition), "x kth axis")
define("ArgPartitionNode", _kth(mx.argpartition), "x kth axis")
