"""Where each tap is found in an MLX program, which stays as it is without them.

While a model is traced, an operator marks each tap's value. The marks are taken out of the graph before it is lowered;
the node that computed the value keeps the tap's name in its metadata, which passes hand on. What the program builder
emits for that node is where the tap can be read: after one instruction, in one tensor."""

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from gemma4_impl import taps
from gemma4_impl.export.mlx.bindings import import_mlx_backend

_KEY = "gemma4_tap"
_ORIGINS = ("from_node", "nn_module_stack", "source_fn_stack", "stack_trace", "torch_fn")


@torch.library.custom_op("gemma4_export::tap", mutates_args=())
def _mark(x: Tensor, name: str) -> Tensor:
    """x itself, in a graph that is traced; `name` is the tap's."""
    return x.clone()


@_mark.register_fake
def _(x: Tensor, name: str) -> Tensor:
    return torch.empty_like(x)


class _Marker:
    """Takes the place of a recorder while a model is traced."""

    def at(self, positions: Tensor) -> None:
        pass

    def record(self, name: str, value: Tensor) -> Tensor:
        return _mark(value, name)

    def route(self, prefix: str, index: Tensor) -> Tensor:
        return _mark(index, prefix + taps.CHOICE[1:])


def marking() -> AbstractContextManager[Any]:
    """Inside, a model that is traced has its taps marked."""
    return taps.recording(_Marker())


def unmark(program: ExportedProgram) -> list[str]:
    """Takes the marks out of a program, and what passes copy at length; returns the names of the taps."""
    graph, names = program.graph_module.graph, []
    for node in list(graph.nodes):
        for key in _ORIGINS:
            node.meta.pop(key, None)
        if node.target == torch.ops.gemma4_export.tap.default:
            value, name = node.args
            value.meta["custom"] = {**value.meta.get("custom", {}), _KEY: name}
            names.append(name)
            node.replace_all_uses_with(value)
            graph.erase_node(node)
    program.graph_module.recompile()
    return names


def passes() -> list[Any]:
    """The backend's default passes, of which one makes new nodes without the old ones' metadata."""
    from executorch.backends.mlx.passes import MLXReinplacePass, get_default_passes

    class Reinplace(MLXReinplacePass):
        def call(self, exported_program: ExportedProgram) -> Any:
            nodes = exported_program.graph.nodes
            named = {id(node.meta["val"]): node.meta["custom"] for node in nodes if _name(node) is not None}
            result = super().call(exported_program)
            for node in nodes:
                if (custom := named.get(id(node.meta.get("val")))) is not None:
                    node.meta["custom"] = custom
            return result

    return [Reinplace() if isinstance(one, MLXReinplacePass) else one for one in get_default_passes()]


def _name(node: Any) -> str | None:
    return node.meta.get("custom", {}).get(_KEY)


@dataclass
class Found:
    """What a program was built of."""

    taps: dict[str, dict[str, int]] = field(default_factory=dict)
    """Each tap's chain, instruction and tensor."""
    nodes: Counter[str] = field(default_factory=Counter)
    """How many instructions there are of each kind."""


@contextmanager
def finding() -> Iterator[Found]:
    """Inside, one program is lowered; afterwards the result knows it."""
    import_mlx_backend()
    from executorch.backends.mlx import preprocess

    found = Found()

    class Builder(preprocess.MLXProgramBuilder):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            self.taps: dict[str, tuple[int, int, Any]] = {}

        def _mark_node_supported(self, node: Any, *, handler: Any = None) -> None:
            slot = self.slot_manager.get_slot(node)
            if (name := _name(node)) is not None and slot is not None:
                # One node may have become several, of which the last one computes the value.
                self.taps[name] = self._current_chain, len(self._chains[self._current_chain]) - 1, slot
            super()._mark_node_supported(node, handler=handler)

        def build(self) -> Any:
            graph = super().build()
            for name, (chain, at, slot) in self.taps.items():
                found.taps[name] = {"chain": chain, "instruction": at, "tensor": self._slot_to_final_tid[slot]}
            found.nodes.update(type(one.op).__name__ for chain in self._chains for one in chain)
            return graph

    usual, preprocess.MLXProgramBuilder = preprocess.MLXProgramBuilder, Builder
    try:
        yield found
    finally:
        preprocess.MLXProgramBuilder = usual
