"""How weights, activations and caches are spread over a mesh of devices with the axes `fsdp` and `tp`."""

from collections.abc import Sequence

import jax

FSDP, TP = "fsdp", "tp"


def partition(units: Sequence[int], axes: Sequence[str | None]) -> tuple[str | None, ...]:
    """The mesh axis of each dim; None where the mesh of `jax.set_mesh` does not divide its `units` (heads, say, that
    must not be cut) and the dim stays whole on every device."""
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    return tuple(
        axis if axis and count % sizes.get(axis, 1) == 0 else None for count, axis in zip(units, axes, strict=True)
    )
