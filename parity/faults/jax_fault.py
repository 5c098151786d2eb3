"""What the parts of the JAX catalogue share: PyTorch's faults by name, and changes of one NNX instance."""

from collections.abc import Callable
from dataclasses import replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from parity.faults import FAULTS, IMAGE_FAULTS
from parity.faults.fault import Fault, each_layer

if TYPE_CHECKING:
    from parity.candidate_jax import JaxCandidate

Inject = Callable[["JaxCandidate"], None]


def same(name: str, inject: Inject | None = None, **changes: Any) -> Fault:
    """PyTorch's fault `name` in JAX; without `inject` its own, which changes nothing but the model's config."""
    fault = (FAULTS | IMAGE_FAULTS)[name]
    return replace(fault, inject=inject or fault.inject, **changes)


def override(module: nnx.Module, **methods: Any) -> None:
    """Gives this one module methods of its own.

    It gets a class of its own for that: a jitted call merges new instances of the module's class, which have none of
    the functions that were put on the old instance."""
    own = type(module)
    module.__class__ = type(own)(f"Broken{own.__name__}", (own,), methods)


def assign(parameter: nnx.Variable, change: Callable[[Array], Array]) -> None:
    """Changes a parameter's values, and its shape if need be."""
    parameter.set_value(change(parameter[...]))


class Identity(nnx.Module):
    def __call__(self, x: Array) -> Array:
        return x


def drop(name: str) -> Inject:
    """Replaces this submodule by the identity, in every layer that has it."""
    parent, leaf = _parent(name)

    def change(layer: nnx.Module) -> None:
        if hasattr(parent(layer), leaf):
            setattr(parent(layer), leaf, Identity())

    return each_layer(change)


def swap(first: str, second: str) -> Inject:
    """Exchanges two submodules of every layer, such as `mlp.gate_proj` and `mlp.up_proj`."""
    parent, a = _parent(first)
    b = second.rpartition(".")[2]

    def change(layer: nnx.Module) -> None:
        module = parent(layer)
        one, other = getattr(module, a), getattr(module, b)
        setattr(module, a, other)
        setattr(module, b, one)

    return each_layer(change)


def ones(parameter: nnx.Variable) -> None:
    assign(parameter, jnp.ones_like)


def rounded(x: Array) -> Array:
    """float32 values as bfloat16 holds them. XLA may leave a cast there and back out."""
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def of_type(root: nnx.Module, kind: type[nnx.Module]) -> list[Any]:
    """All modules of this kind in a model."""
    return [module for _, module in nnx.iter_modules(root) if isinstance(module, kind)]


def _parent(name: str) -> tuple[Callable[[nnx.Module], nnx.Module], str]:
    parent, _, leaf = name.rpartition(".")
    return (attrgetter(parent) if parent else lambda layer: layer), leaf
