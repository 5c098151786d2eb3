"""How weights, activations and caches are spread over a mesh of devices with the axes `fsdp` and `tp`."""

from collections.abc import Sequence

import jax
from jax import Array
from jax.sharding import AxisType, Mesh, PartitionSpec

from gemma4_impl.errors import short

FSDP, TP = AXES = "fsdp", "tp"


class MeshError(ValueError):
    """A mesh that cannot be made of the devices there are."""


def partition(units: Sequence[int], axes: Sequence[str | None]) -> tuple[str | None, ...]:
    """The mesh axis of each dim; None where the mesh of `jax.set_mesh` lacks it or does not divide its `units` (heads,
    say, that must not be cut) and the dim stays whole on every device. Without a mesh, the axes as they are."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tuple(axes)
    sizes = dict(mesh.shape)
    return tuple(
        axis if axis in sizes and count % sizes[axis] == 0 else None for count, axis in zip(units, axes, strict=True)
    )


def constrain(x: Array, *axes: str | None) -> Array:
    """`x` spread over the mesh of `jax.set_mesh` so, each dim as `partition` has it; without a mesh, `x` itself."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*partition(x.shape, axes)))


def spread_rows(x: Array) -> Array:
    """Activations x [B, T, ...] with their rows over `fsdp`, whose weights are then gathered where they are used. One
    token a row is left to XLA: moving it to the weights moves fewer bytes."""
    return constrain(x, FSDP, *[None] * (x.ndim - 1)) if x.shape[1] > 1 else x


def make_mesh(text: str, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh that `text`, "fsdp=1,tp=4" say, makes of all `devices` (default: all there are, on every host), for
    `jax.set_mesh`. An axis that is left out has size 1. Raises MeshError."""
    devices = jax.devices() if devices is None else devices
    sizes = parse_mesh(text)
    if (wanted := sizes[FSDP] * sizes[TP]) != (count := len(devices)):
        fitting = ", ".join(f"fsdp={count // n},tp={n}" for n in range(1, count + 1) if count % n == 0)
        raise MeshError(f"mesh {short(text)} is for {wanted} devices, but there are {count}; it could be {fitting}")
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def parse_mesh(text: str) -> dict[str, int]:
    """Axis -> its size, both axes in order. Raises MeshError."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, equals, size = (piece.strip() for piece in part.partition("="))
        if not equals or not (size.isascii() and size.isdigit()):
            raise MeshError(f"mesh {short(text)}: {short(part)} is not of the form axis=size, as in fsdp=1,tp=4")
        if axis not in AXES:
            raise MeshError(f"mesh {short(text)}: unknown axis {short(axis)}; the axes are {' and '.join(AXES)}")
        if axis in sizes:
            raise MeshError(f"mesh {short(text)}: {axis} is given twice")
        # Numbers of thousands of digits are refused before Python does it in words of its own.
        if not 1 <= len(size.lstrip("0")) <= 9:
            raise MeshError(f"mesh {short(text)}: the size of {axis} must be from 1 to 999999999")
        sizes[axis] = int(size)
    return {axis: sizes.get(axis, 1) for axis in AXES}
