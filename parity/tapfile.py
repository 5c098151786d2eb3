"""Tap files: one safetensors file a capture, with what is needed to know what may be compared with it."""

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gemma4_impl.files import replacing

FORMAT = "gemma4-taps-1"


@dataclass(frozen=True)
class TapMeta:
    """Where a capture comes from."""

    fingerprint: str
    """`Checkpoint.fingerprint()` of the weights."""
    tokens: tuple[int, ...]
    impl: str
    dtype: str
    weights: str
    """The dtype that the weights were rounded to before computing in `dtype`."""
    device: str
    path: str = "full"
    routing: str = "own"
    """"own", or the sha of the capture whose expert choices were forced."""
    images: str = ""
    """`images.fingerprint` of what the vision tower was given; empty without images."""
    top_k: int = 0
    """Experts a token; 0 without MoE."""
    versions: Mapping[str, str] = field(default_factory=dict)
    precision: Mapping[str, str] = field(default_factory=dict)
    """Flags that change rounding: TF32, matmul precision, threads."""


@dataclass(frozen=True)
class TapFile:
    """Taps [B, L, ...] in execution order; NaN marks positions that were not computed."""

    taps: dict[str, Tensor]
    meta: TapMeta


def versions() -> dict[str, str]:
    """Of Python and the packages that decide the numbers, as far as they are installed."""
    import importlib.metadata

    out = {"python": platform.python_version()}
    for package in ("torch", "transformers", "jax", "flax", "safetensors", "numpy"):
        try:
            out[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return out


def precision_flags() -> dict[str, str]:
    return {
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "allow_tf32": str(torch.backends.cuda.matmul.allow_tf32),
        "threads": str(torch.get_num_threads()),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


def save(path: str | Path, taps: Mapping[str, Tensor], meta: TapMeta) -> None:
    """Writes to a temporary name beside `path`, then renames."""
    fields = {key: value if isinstance(value, str) else json.dumps(value) for key, value in asdict(meta).items()}
    header = {"format": FORMAT, "order": json.dumps(list(taps)), **fields}
    with replacing(path) as temporary:
        save_file({name: value.contiguous() for name, value in taps.items()}, temporary, header)


def load(path: str | Path) -> TapFile:
    """Raises FileNotFoundError, or ValueError for what is not a whole tap file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; `gemma4 capture` writes tap files")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise ValueError(f"{path}: not a tap file (its metadata says format = {header.get('format')!r})")
            order = json.loads(header["order"])
            taps = {name: file.get_tensor(name) for name in order}
        strings = {"fingerprint", "impl", "dtype", "weights", "device", "path", "routing", "images"}
        fields = {
            key: header[key] if key in strings else json.loads(header[key])
            for key in TapMeta.__dataclass_fields__
            if key in header
        }
        meta = TapMeta(**{**fields, "tokens": tuple(fields["tokens"])})
        getattr(torch, meta.dtype)
    except (SafetensorError, OSError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a whole tap file ({type(error).__name__}: {error})") from None
    if bad := [name for name, value in taps.items() if value.dim() < 3 or not value.is_floating_point()]:
        raise ValueError(f"{path}: {bad[0]} is not a tap of shape [B, L, ...]")
    return TapFile(taps, meta)


def check_comparable(a: TapFile, b: TapFile, names: tuple[str, str]) -> None:
    """Raises ValueError if two captures are not of the same weights and tokens."""
    if a.meta.fingerprint != b.meta.fingerprint:
        raise ValueError(f"{names[0]} and {names[1]} were captured from different weights; capture both from one")
    if a.meta.tokens != b.meta.tokens:
        raise ValueError(f"{names[0]} and {names[1]} were captured with different tokens; pass the same --tokens")
    if a.meta.images != b.meta.images:
        raise ValueError(f"{names[0]} and {names[1]} were captured with different images; pass the same --image")
