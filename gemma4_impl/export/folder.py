"""An exported folder: a program, the files that go along, and the manifest that says what they are and is checked."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from gemma4_impl.config import TextConfig
from gemma4_impl.errors import one_line, plain, short
from gemma4_impl.export.program import EOS, INT_CONSTANTS, WIDE, Limits, Method, Settings, Value, constants, dtype_name
from gemma4_impl.folders import write_json

FORMAT_VERSION = 1
MANIFEST, PROGRAM, CONFIG = "manifest.json", "model.pte", "config.json"
BACKENDS = ("xnnpack", "mlx", "cuda")

_LARGEST = 1 << 24
_SHA256 = re.compile(r"[0-9a-f]{64}")


class ExportError(ValueError):
    """An exported folder that is damaged, or contradicts itself; the message names the file and what is wrong."""


@dataclass(frozen=True)
class File:
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What an exported folder holds. Checked when made: raises ExportError for what contradicts itself."""

    backend: str
    dtype: torch.dtype
    taps: bool
    methods: dict[str, Method]
    constants: dict[str, int | list[int]]
    """See `constants`; a program may have more."""
    caches: dict[str, Any]
    extra: dict[str, Any]
    source: dict[str, str]
    """`name` and `fingerprint` of what was exported."""
    versions: dict[str, str]
    files: dict[str, File]
    """Every other file of the folder that is part of it; names are relative, with "/"."""

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ExportError(f"backend {short(self.backend)} is unknown; known: {', '.join(BACKENDS)}")
        for key in (*INT_CONSTANTS, EOS):
            if key not in self.constants:
                raise ExportError(f"constants: {key} is missing")
            if isinstance(self.constants[key], int) != (key in INT_CONSTANTS):
                raise ExportError(f"constants.{key} = {short(self.constants[key])} is of the wrong type")
        chunk, vocab = self.max_prefill_chunk, self.constants["get_vocab_size"]
        try:
            Settings(self.max_seq_len, chunk, self.dtype)
        except ValueError as error:
            raise ExportError(f"constants: {error}") from None
        if wrong := [i for i in (self.bos_id, *self.eos_ids) if not 0 <= i < vocab]:
            raise ExportError(f"constants: token id {wrong[0]} is outside the vocabulary of {vocab}")
        needed = ["forward"] if self.backend == "mlx" else ["decode", *["prefill"] * (chunk > 1)]
        if absent := [name for name in needed if name not in self.methods]:
            raise ExportError(f"methods: {absent[0]} is missing, which {self.backend} programs have")
        self._check_longest(needed[-1], chunk)
        for name in (PROGRAM, CONFIG):
            if name not in self.files:
                raise ExportError(f"files: {name} is missing")

    def _check_longest(self, method: str, chunk: int) -> None:
        for value in self.methods[method].inputs:
            if value.name == "tokens" and len(value.shape) == 2:
                length = value.shape[1]
                most = length["max"] if isinstance(length, dict) else length
                if most != chunk:
                    raise ExportError(
                        f"methods.{method} takes up to {most} tokens, but constants.get_max_prefill_chunk is {chunk}"
                    )

    @property
    def max_seq_len(self) -> int:
        return self.constants["get_max_seq_len"]

    @property
    def max_prefill_chunk(self) -> int:
        return self.constants["get_max_prefill_chunk"]

    @property
    def vocab_size(self) -> int:
        return self.constants["get_vocab_size"]

    @property
    def limits(self) -> Limits:
        return Limits(self.max_seq_len, self.max_prefill_chunk, self.vocab_size)

    @property
    def bos_id(self) -> int:
        return self.constants["get_bos_id"]

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return tuple(self.constants[EOS])

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.bytes for file in self.files.values())

    def to_dict(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "backend": self.backend,
            "dtype": dtype_name(self.dtype),
            "taps": self.taps,
            "methods": {
                name: {"inputs": [_value(v) for v in m.inputs], "outputs": [_value(v) for v in m.outputs]}
                for name, m in self.methods.items()
            },
            "constants": self.constants,
            "caches": self.caches,
            "extra": self.extra,
            "source": self.source,
            "versions": self.versions,
            "files": {name: {"bytes": f.bytes, "sha256": f.sha256} for name, f in self.files.items()},
        }

    @classmethod
    def from_dict(cls, raw: object) -> "Manifest":
        """What `to_dict` gave. Raises ExportError for anything else."""
        top = _Object(raw, "")
        if (version := top.get("format_version", int)) != FORMAT_VERSION:
            raise ExportError(f"format_version {short(version)} is unknown; this program reads {FORMAT_VERSION}")
        return cls(
            backend=top.get("backend", str),
            dtype=_dtype(top.get("dtype", str), "dtype"),
            taps=top.get("taps", bool),
            methods={name: _method(part) for name, part in top.parts("methods")},
            constants={name: _constant(value, name) for name, value in top.get("constants", dict).items()},
            caches=top.get("caches", dict),
            extra=top.get("extra", dict),
            source={key: _Object(top.get("source", dict), "source").get(key, str) for key in ("name", "fingerprint")},
            versions={name: _text(value, name) for name, value in top.get("versions", dict).items()},
            files={_file_name(name): _file(part) for name, part in top.parts("files")},
        )

    def write(self, folder: Path) -> None:
        write_json(folder / MANIFEST, self.to_dict())

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """The manifest in `folder`; its files are not looked at. Raises ExportError."""
        file = folder / MANIFEST
        try:
            if not file.is_file():
                raise ExportError("no such file; this is no folder that `gemma4 export` wrote")
            if file.stat().st_size > _LARGEST:
                raise ExportError("too large for a manifest")
            return cls.from_dict(json.loads(file.read_text(encoding="utf-8")))
        except ExportError as error:
            raise ExportError(f"{file}: {error}") from None
        except (ValueError, RecursionError) as error:
            raise ExportError(f"{file}: not valid JSON ({one_line(error)})") from None


@dataclass(frozen=True)
class Exported:
    """An exported folder that was checked."""

    folder: Path
    manifest: Manifest
    config: TextConfig

    @property
    def program(self) -> Path:
        return self.folder / PROGRAM


def open_folder(path: str | Path) -> Exported:
    """Opens an exported folder, of which every byte is read and compared with the manifest's hashes.

    Raises FileNotFoundError if there is no such folder, and ExportError for everything in it that is missing, altered,
    or contradicts the rest."""
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder; `gemma4 export` makes one")
    manifest = Manifest.read(path)
    for name, file in manifest.files.items():
        _check_file(path, name, file)
    listed = set(manifest.files)
    for file in sorted(path.iterdir()):
        if file.suffix in (".pte", ".ptd") and file.name not in listed:
            raise ExportError(f"{path / MANIFEST}: {plain(file.name)} is in the folder but not listed")
    try:
        config = TextConfig.from_file(path)
    except (ValueError, OSError) as error:
        raise ExportError(one_line(error)) from None
    found = constants(config, Settings(manifest.max_seq_len, manifest.max_prefill_chunk, manifest.dtype))
    for key in ("get_vocab_size", "get_bos_id", "get_n_layers", "get_sliding_window"):
        if manifest.constants[key] != found[key]:
            raise ExportError(
                f"{path / MANIFEST}: constants.{key} is {manifest.constants[key]}, but config.json says {found[key]}"
            )
    return Exported(path, manifest, config)


def hash_files(folder: Path) -> dict[str, File]:
    """Size and sha256 of every file in the folder and below, but for its manifest."""
    out = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != MANIFEST:
            out[name] = File(path.stat().st_size, _sha256(path))
    return out


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_file(folder: Path, name: str, file: File) -> None:
    path = folder / name
    try:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ExportError(f"{folder}: {plain(name)} leads out of the folder")
        if not path.is_file():
            raise ExportError(f"{path}: no such file, but {MANIFEST} lists it")
        if (size := path.stat().st_size) != file.bytes:
            raise ExportError(f"{path}: has {size} bytes, but {MANIFEST} says {file.bytes}; export or copy it again")
        if _sha256(path) != file.sha256:
            raise ExportError(f"{path}: its sha256 is not the one in {MANIFEST}; export or copy it again")
    except (OSError, RuntimeError, UnicodeError) as error:  # a link that leads to itself, a name that is no name
        raise ExportError(f"{folder}: {short(name)} cannot be read ({one_line(error)})") from None


class _Object:
    """A JSON object of the manifest, whose values are asked for by type."""

    def __init__(self, raw: object, where: str):
        if not isinstance(raw, dict):
            raise ExportError(f"{where or 'the manifest'} must be a JSON object, not {short(raw)}")
        self.raw, self.where = raw, where

    def get(self, key: str, kind: type) -> Any:
        where = f"{self.where}.{key}" if self.where else key
        if key not in self.raw:
            raise ExportError(f"{where} is missing")
        # bool is a subclass of int: exactly this type, then.
        if type(self.raw[key]) is not kind:
            raise ExportError(f"{where} = {short(self.raw[key])}: must be of type {kind.__name__}")
        return self.raw[key]

    def parts(self, key: str) -> list[tuple[str, "_Object"]]:
        """The objects in the object `key`, by name."""
        return [(name, _Object(part, f"{key}.{plain(name)}")) for name, part in self.get(key, dict).items()]


def _value(v: Value) -> dict[str, Any]:
    return {"name": v.name, "dtype": dtype_name(v.dtype), "shape": list(v.shape)}


def _method(part: _Object) -> Method:
    def values(key: str) -> list[Value]:
        out = []
        for i, raw in enumerate(part.get(key, list)):
            v = _Object(raw, f"{part.where}.{key}[{i}]")
            shape = tuple(_size(size, f"{v.where}.shape") for size in v.get("shape", list))
            out.append(Value(v.get("name", str), _dtype(v.get("dtype", str), f"{v.where}.dtype"), shape))
        return out

    return Method(values("inputs"), values("outputs"))


def _size(raw: object, where: str) -> int | dict[str, int]:
    if type(raw) is int and 0 <= raw < WIDE:
        return raw
    if isinstance(raw, dict):
        bounds = _Object(raw, where)
        low, high = bounds.get("min", int), bounds.get("max", int)
        if set(raw) == {"min", "max"} and 0 <= low <= high < WIDE:
            return {"min": low, "max": high}
    raise ExportError(f'{where}: {short(raw)} is neither a size nor {{"min":, "max":}}')


def _dtype(name: str, where: str) -> torch.dtype:
    dtype = getattr(torch, name, None) if name.isidentifier() else None
    if not isinstance(dtype, torch.dtype):
        raise ExportError(f"{where} = {short(name)}: no such dtype")
    return dtype


def _constant(value: object, name: str) -> int | list[int]:
    values = value if isinstance(value, list) else [value]
    if not all(type(v) is int and abs(v) < WIDE for v in values):
        raise ExportError(f"constants.{plain(name)} = {short(value)}: must be an integer or a list of them")
    return value


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise ExportError(f"versions.{plain(name)} = {short(value)}: must be a text")
    return value


def _file_name(name: str) -> str:
    parts = PurePosixPath(name).parts
    if not parts or name != "/".join(parts) or ".." in parts or name[0] == "/" or set(name) & set("\\:\0"):
        raise ExportError(f"files: {short(name)} is not the name of a file in the folder")
    return name


def _file(part: _Object) -> File:
    size, digest = part.get("bytes", int), part.get("sha256", str)
    if size < 0 or not _SHA256.fullmatch(digest):
        raise ExportError(f"{part.where}: bytes and sha256 are not those of a file")
    return File(size, digest)
