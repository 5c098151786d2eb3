"""What a fault is, and what the catalogue's parts share: taps by name, changes of one instance."""

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import nn

from gemma4_impl.config import FULL, LayerConfig, TextConfig
from gemma4_impl.model.decoder import DecoderLayer, Gemma4
from parity.candidate import TorchCandidate

Inject = Callable[[TorchCandidate], None]
"""In the JAX catalogue it takes a `JaxCandidate`."""
Tap = Callable[[TextConfig], str]

ALL = ("E2B", "E4B", "26B-A4B", "31B")
PLE = ("E2B", "E4B")
MOE = ("26B-A4B",)
K_EQ_V = ("26B-A4B", "31B")


@dataclass(frozen=True)
class Fault:
    """A mistake that can be put into a loaded model."""

    name: str
    summary: str
    """What a porter gets wrong, in one line."""
    inject: Inject
    """Changes this candidate's instances in place: a class or module changed would change every other model."""
    tap: Tap
    """Where it must be found as created: the first divergence."""
    variants: tuple[str, ...] = ALL
    """The tiny checkpoints that it applies to."""
    dtype: str = "float32"
    path: str = "full"
    """The cheapest of `parity.candidate.PATHS` that shows it."""
    length: int | None = None
    """Tokens that it takes to show; None for what a parity run takes."""
    images: bool = False
    """Whether it takes images, and so a multimodal checkpoint."""


def named(name: str) -> Tap:
    return lambda config: name


def first(suffix: str, where: Callable[[LayerConfig], bool] = lambda layer: True) -> Tap:
    """The tap `suffix` of the first layer that `where` accepts."""
    return lambda config: f"layers.{next(layer.index for layer in config.layers if where(layer))}.{suffix}"


def in_full(suffix: str) -> Tap:
    return first(suffix, lambda layer: layer.layer_type == FULL)


def in_shared(suffix: str) -> Tap:
    return first(suffix, lambda layer: layer.kv_shared)


def override(module: nn.Module, name: str, function: Callable[..., Any]) -> None:
    """Makes `function` the method `name` of this one module."""
    setattr(module, name, MethodType(function, module))


def each_layer(change: Callable[[DecoderLayer], None]) -> Inject:
    def inject(candidate: TorchCandidate) -> None:
        with torch.no_grad():
            for layer in candidate.model.layers:
                change(layer)

    return inject


def on_model(change: Callable[[Gemma4], Any]) -> Inject:
    def inject(candidate: TorchCandidate) -> None:
        with torch.no_grad():
            change(candidate.model)

    return inject


def drop(name: str) -> Inject:
    """Replaces this submodule by the identity, in every layer that has it."""
    parent, _, leaf = name.rpartition(".")

    def change(layer: DecoderLayer) -> None:
        if hasattr(layer.get_submodule(parent), leaf):
            setattr(layer.get_submodule(parent), leaf, nn.Identity())

    return each_layer(change)


def swap(first: str, second: str) -> Inject:
    """Exchanges two submodules of every layer, such as `mlp.gate_proj` and `mlp.up_proj`."""
    parent, _, a = first.rpartition(".")
    b = second.rpartition(".")[2]

    def change(layer: DecoderLayer) -> None:
        module = layer.get_submodule(parent)
        one, other = getattr(module, a), getattr(module, b)
        setattr(module, a, other)
        setattr(module, b, one)

    return each_layer(change)
