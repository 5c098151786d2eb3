"""Checkpoint folders whose weights torchao quantized (`gemma4 quantize`, or transformers' TorchAoConfig): reading them
needs no torchao."""

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor

from gemma4_impl import names
from gemma4_impl.checkpoint import FLOATS, Checkpoint, CheckpointError, quantization_config, update_hash
from gemma4_impl.errors import one_line, short
from gemma4_impl.quant.stored import INT4, PARTS, Stored, check_parts, join, part_name, read_metadata
from gemma4_impl.quant.tensor import QuantizedTensor

_MOST_TENSORS = 100_000


class QuantizedCheckpoint(Checkpoint):
    """Implements `Weights`: quantized tensors under their canonical names, as if they were one tensor each.

    Raises what `Checkpoint` raises; CheckpointError for other tools' quantizations, for torchao classes other than
    Int4Tensor and IntxUnpackedToInt8Tensor, and for metadata that is malformed or contradicts the tensors."""

    def __init__(self, path: str | Path):
        super().__init__(path)
        self._stored: dict[str, Stored] = {}
        self._scales: dict[str, torch.dtype] = {}
        # From here on, `files` has logical tensors; their parts keep an entry in `_parts` and in `hf_names`.
        self._parts = dict(self.files)
        metadata = self._metadata()
        for hf_name, text in metadata.items():
            name = names.from_hf(hf_name)
            if name is None:
                continue
            try:
                self._add(name, hf_name, json.loads(text))
            except (ValueError, TypeError, RecursionError) as error:
                raise CheckpointError(f"{self.path}: {short(hf_name)}: {one_line(error)}") from None
        if not self._stored:
            raise CheckpointError(
                f"{self.path}: config.json says that torchao quantized it, but no safetensors file names a quantized "
                "tensor in its metadata; save it again with safetensors"
            )

    def _check_kind(self) -> None:
        config = quantization_config(self.path)
        method = config.get("quant_method") if isinstance(config, dict) else None
        if method != "torchao":
            raise CheckpointError(
                f"{self.path}: quantized by {short(method)} (config.json, quant_method), which is not supported; use "
                "the original checkpoint, `gemma4 quantize` makes an int4 one of it"
            )

    def _metadata(self) -> dict[str, str]:
        """What the files say of each tensor, merged."""
        merged: dict[str, str] = {}
        for file in sorted({*self.files.values(), *self.towers.values()}):
            metadata = self._handle(file).metadata() or {}
            try:
                listed = json.loads(metadata.get("tensor_names", "[]"))
                if len(listed) > _MOST_TENSORS:
                    raise ValueError(f"{len(listed)} tensors are more than any model has")
                entries = {name: metadata[name] for name in listed}
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise CheckpointError(f"{file}: its metadata is not torchao's ({one_line(error)})") from None
            for name, text in entries.items():
                if merged.setdefault(name, text) != text:
                    raise CheckpointError(f"{file}: {short(name)}: its metadata differs from another file's")
        return merged

    def _add(self, name: str, hf_name: str, entry: object) -> None:
        if isinstance(entry, dict) and entry.get("_type") == "Tensor":
            return
        parts = {part: part_name(name, part) for part in PARTS}
        qdata = parts["qdata"]
        stored = read_metadata(entry, tuple(self._slice(qdata).get_shape()) if qdata in self._parts else None)
        if missing := [part for part in PARTS if parts[part] not in self._parts]:
            raise ValueError(f"its {missing[0]} is in no file")
        if name in self.files:
            raise ValueError("it is there twice, quantized and not")
        slices = {part: self._slice(parts[part]) for part in PARTS}
        found = {part: (s.get_dtype(), tuple(s.get_shape())) for part, s in slices.items()}
        self._scales[name] = check_parts(stored, found)
        self._stored[name] = stored
        self.files[name], self.hf_names[name] = self._parts[qdata], hf_name
        for part in parts.values():
            del self.files[part]

    def _slice(self, name: str):
        return self._handle(self._parts[name]).get_slice(self.hf_names[name])

    @property
    def dtype(self) -> torch.dtype:
        """That of the embedding, or of its scales."""
        name = "embed_tokens.weight"
        if name in self._scales or name not in self.files:
            return self._scales.get(name, next(iter(self._scales.values())))
        return FLOATS.get(self.stored_dtype(name), torch.bfloat16)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored[name].shape if name in self._stored else super().shape(name)

    def stored_dtype(self, name: str) -> str:
        """As safetensors spells it; that of the codes of a quantized tensor."""
        return super().stored_dtype(part_name(name, "qdata") if name in self._stored else name)

    def tensor(self, name: str) -> Tensor:
        """Reads one tensor, a quantized one dequantized in float32. Raises CheckpointError."""
        q = self.quantized(name)
        return super().tensor(name) if q is None else q.dequantize()

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Reads these rows, or experts, only. Raises as `tensor` does."""
        if name not in self._stored:
            return super().rows(name, start, stop)
        return self._read(name, slice(start, stop)).dequantize()

    def quantized(self, name: str) -> QuantizedTensor | None:
        return self._read(name, slice(None)) if name in self._stored else None

    def _read(self, name: str, rows: slice) -> QuantizedTensor:
        stored = self._stored[name]
        start, stop, _ = rows.indices(stored.shape[0])
        parts = {}
        for part in PARTS:
            view = self._slice(part_name(name, part))
            # The scales of an Int4Tensor [N, K] are transposed: a row's are a column.
            columns = stored.kind == INT4 and len(stored.shape) == 2 and part != "qdata"
            parts[part] = view[:, start:stop] if columns else view[start:stop]
        try:
            return join(stored, parts)
        except ValueError as error:
            raise CheckpointError(f"{self.files[name]}: {short(self.hf_names[name])}: {error}") from None

    def fingerprint(self) -> str:
        """sha256 over the names, dtypes, shapes and edges of everything stored, and of how it is to be read."""
        digest = hashlib.sha256()
        for name in sorted(self._parts):
            update_hash(digest, name, self._slice(name))
        for name in sorted(self._stored):
            digest.update(f"{name} {self._stored[name]}\n".encode())
        return digest.hexdigest()
