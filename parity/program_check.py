"""An exported program held against its manifest, before anything runs: methods, shapes, constants, and caches."""

import re
from collections.abc import Iterator
from typing import Any

from gemma4_impl.config import SLIDING
from gemma4_impl.export.folder import Exported
from gemma4_impl.export.inspect import inspect
from gemma4_impl.export.program import Method, Value, dtype_name

_DTYPES = {"long": "int64", "int": "int32", "float": "float32", "half": "float16", "double": "float64"}
_CACHE = re.compile(r"layers[._](\d+)\b.*?[._]?([kv])(_cache)?$|layers_(\d+)_([kv])$")


def check_program(exported: Exported) -> None:
    """Raises ValueError naming the first thing in which the program, its manifest and its config are not of one piece:
    a generation would go wrong there without a word."""
    found = inspect(exported.program)
    for problem in (*_methods(exported, found["methods"]), *_constants(exported, found), *_caches(exported)):
        raise ValueError(f"{exported.program}: {problem}")


def _methods(exported: Exported, found: dict[str, Any]) -> Iterator[str]:
    for name, method in exported.manifest.methods.items():
        if name not in found:
            yield f"has no method {name}, which the manifest lists; it has {', '.join(found) or 'none'}"
            return
        for kind in ("inputs", "outputs"):
            yield from _values(name, kind, getattr(method, kind), found[name][kind])
    yield from _logits(exported)


def _values(name: str, kind: str, told: list[Value], found: list[dict[str, Any]]) -> Iterator[str]:
    if len(told) != len(found):
        yield f"{name} has {len(found)} {kind}, but the manifest says {len(told)}"
    for value, there in zip(told, found, strict=False):
        size = [entry["max"] if isinstance(entry, dict) else entry for entry in value.shape]
        got = _DTYPES.get(there.get("dtype", ""), there.get("dtype", there.get("kind"))), there.get("shape")
        if got != (dtype_name(value.dtype), size):
            yield (
                f"{name}'s {value.name} is {got[0]} {got[1]}, but the manifest says {dtype_name(value.dtype)} {size}"
            )


def _logits(exported: Exported) -> Iterator[str]:
    """A program that samples gives no logits: nothing could be judged, and no temperature chosen."""
    for name, method in exported.manifest.methods.items():
        given = _named(method, "logits")
        if any(value.name == "tokens" for value in method.inputs) and given is None:
            yield f"{name} returns no logits but {', '.join(v.name for v in method.outputs) or 'nothing'}"
        elif given is not None and given.shape[-1] != (size := exported.config.vocab_size):
            yield f"{name}'s logits are of {given.shape[-1]} tokens, but the vocabulary has {size}"


def _named(method: Method, name: str) -> Value | None:
    return next((value for value in method.outputs if value.name == name), None)


def _constants(exported: Exported, found: dict[str, Any]) -> Iterator[str]:
    for name, told in exported.manifest.constants.items():
        if name not in found["constants"]:
            yield f"has no constant {name}, but the manifest says {told}"
            return
        there = found["constants"][name]
        if isinstance(told, list) and not isinstance(there, list):
            there = [there]
        if there != told:
            yield f"{name} is {there}, but the manifest says {told}"


def _caches(exported: Exported) -> Iterator[str]:
    """A ring that is too small overwrites keys that the queries of a chunk still need."""
    manifest, config = exported.manifest, exported.config
    chunk, most = manifest.max_prefill_chunk, manifest.max_seq_len
    seen = set()
    for name, cache in manifest.caches.items():
        match = _CACHE.search(name)
        if not match:
            continue
        index = int(match[1] or match[4])
        seen.add(index)
        layer = config.layers[index]
        needed = min(most, config.sliding_window - 1 + chunk) if layer.layer_type == SLIDING else most
        heads, *sizes = cache["shape"][1:]
        # Keys may lie transposed.
        if layer.head_dim in sizes:
            sizes.remove(layer.head_dim)
        if heads != layer.num_key_value_heads or len(sizes) != 1 or sizes[0] < needed:
            yield (
                f"{name} is {cache['shape']}, but layer {index} ({layer.layer_type}) needs "
                f"{layer.num_key_value_heads} heads, {needed} slots and heads of {layer.head_dim}"
            )
    if seen and (absent := set(range(config.first_kv_shared_layer)) - seen):
        yield f"layer {min(absent)} has no cache"
