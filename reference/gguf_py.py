"""A GGUF file's weights as gguf-py reads them: its parser, its table of names, its dequantization."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Tensors that gguf-py's table lacks.
_LEAVES = {"router.scale": "ffn_gate_inp.scale", "router.per_expert_scale": "ffn_down_exps.scale"}


class GGUFPyWeights:
    """A `reference.weights.Source`: all the parts of one GGUF file. They are mapped; a tensor is dequantized when asked
    for.

    Raises ImportError if gguf-py is not installed, KeyError for a tensor that the file does not hold."""

    def __init__(self, files: Sequence[str | Path]):
        try:
            import gguf
        except ImportError:
            raise ImportError(
                f"{files[0]}: gguf-py, which reads it for the reference, is not installed: "
                "pip install 'gemma4-parity[gguf]'"
            ) from None
        self._types, self._dequantize = gguf.GGMLQuantizationType, gguf.quants.dequantize
        self._tensors = {tensor.name: tensor for file in files for tensor in gguf.GGUFReader(file).tensors}
        layers = max((int(name.split(".")[1]) for name in self._tensors if name.startswith("blk.")), default=-1) + 1
        self._names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA4, layers)

    def __contains__(self, name: str) -> bool:
        return bool(self._parts(name))

    def tensor(self, name: str) -> Tensor:
        return self._dense([(part.data, part.tensor_type) for part in self._required(name)])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._dense([(part.data[start:stop], part.tensor_type) for part in self._required(name)])

    def is_quantized(self, name: str) -> bool:
        plain = {self._types.F64, self._types.F32, self._types.F16, self._types.BF16}
        return any(part.tensor_type not in plain for part in self._required(name))

    def kind(self, name: str) -> str:
        return " + ".join(dict.fromkeys(part.tensor_type.name for part in self._required(name)))

    def stored_bytes(self, name: str) -> int:
        return sum(int(part.n_bytes) for part in self._required(name))

    def _dense(self, parts: list[tuple[np.ndarray, Any]]) -> Tensor:
        # A copy: what comes from a mapped file cannot be written to, and torch warns of it.
        dense = [torch.from_numpy(np.array(self._dequantize(data, kind), dtype=np.float32)) for data, kind in parts]
        return dense[0] if len(dense) == 1 else torch.cat(dense, dim=-2)

    def _required(self, name: str) -> list[Any]:
        if not (parts := self._parts(name)):
            raise KeyError(f"the GGUF file holds no {name}")
        return parts

    def _parts(self, name: str) -> list[Any]:
        """The file's tensors that make up `name`: one, or the gates and ups of experts that are stored apart."""
        prefix, layer, leaf = (*name.split(".", 2), "", "")[:3]
        if prefix == "layers" and leaf in _LEAVES:
            found = [f"blk.{layer}.{_LEAVES[leaf]}"]
        else:
            own = self._names.get_name(name if name.startswith("lm_head") else f"model.{name}", (".weight",))
            found = [own] if own in self._tensors else [f"{own}.weight"]
        if found[0] not in self._tensors and leaf == "experts.gate_up_proj":
            found = [f"blk.{layer}.ffn_{part}_exps.weight" for part in ("gate", "up")]
        return [self._tensors[part] for part in found if part in self._tensors]
