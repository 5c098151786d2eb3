"""`export`: a checkpoint in, a folder with a program for one backend out, all or nothing."""

import dataclasses
import importlib
import importlib.util
import logging
import os
import platform
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from gemma4_impl.checkpoint import check_fits, open_checkpoint
from gemma4_impl.config import TextConfig
from gemma4_impl.export.folder import BACKENDS, CONFIG, Manifest, hash_files
from gemma4_impl.export.program import Lowered, Settings, dtype_name
from gemma4_impl.export.source import Source, open_source
from gemma4_impl.folders import check_out, copy_files, new_folder, write_json
from gemma4_impl.model.decoder import Gemma4
from gemma4_impl.tokenizer import Tokenizer

if TYPE_CHECKING:
    from gemma4_impl.vision.images import ImageEncoder

MODULES = {name: f"gemma4_impl.export.{name}" for name in BACKENDS}
"""The module of each backend: `lower` makes a program of a model, `open_session` runs one, and `check`, if there is
one, refuses what it does not support before a weight is read."""
DEFAULT_SEQ_LEN, DEFAULT_CHUNK = 4096, 512
DEFAULT_DTYPES = {"xnnpack": torch.float32, "cuda": torch.bfloat16}
"""What a backend's programs compute in; those of others in the weights' own."""

_PACKAGES = ("executorch", "torchao")
_VERSIONS = ("gemma4-parity", "torch", "executorch", "torchao", "mlx")


def export(
    source: str | Path,
    out: str | Path,
    backend: str,
    *,
    max_seq_len: int | None = None,
    max_prefill_chunk: int | None = None,
    dtype: torch.dtype | None = None,
    vision: bool = False,
    taps: bool = False,
    progress: bool = False,
    report: Callable[[str], None] = lambda stage: None,
) -> Manifest:
    """Exports the checkpoint, the quantized checkpoint or the GGUF file `source` into the new folder `out`, which
    appears when it is complete: model.pte and what `Manifest` describes.

    Args:
        max_seq_len: tokens of context; by default 4096, or what the model allows if that is less.
        max_prefill_chunk: the most tokens in one call; by default 512, or max_seq_len if that is less.
        dtype: what the program computes in; by default as `DEFAULT_DTYPES` says.
        vision: also the vision tower, as methods of their own.
        taps: the program also returns the model's taps, where the backend can.
        progress: whether loading shows a bar on a terminal.
        report: told what is being done.
    What the arguments and the files' headers tell is checked before a weight is read. Peak memory is the model with its
    quantized weights as they are stored, its largest tensor, and what the backend makes of them: as much again for the
    program, which is serialized in memory.
    Raises FileNotFoundError, FileExistsError, ConfigError, CheckpointError, GGUFError, TokenizerError, OSError;
    ImportError for a package that is missing, and ValueError for what a backend does not support. Then `out` is not
    there."""
    source, out = Path(source), Path(os.path.abspath(out))
    module = load_backend(backend, _PACKAGES)
    check_out(source, out)
    weights = open_checkpoint(source)
    with torch.device("meta"):
        check_fits(Gemma4(weights.config), weights)
    tokenizer = Tokenizer.from_pretrained(source)
    check_tokenizer(tokenizer, weights.config)
    dtype = dtype or DEFAULT_DTYPES.get(backend, weights.dtype)
    settings = make_settings(weights.config, tokenizer, max_seq_len, max_prefill_chunk, dtype, taps)
    if vision:
        _check_vision(source, weights.config, settings)
    if hasattr(module, "check"):
        module.check(weights.config, settings, vision)
    opened = open_source(weights, settings.dtype, progress)
    tower = _load_tower(source, settings.dtype) if vision else None
    report("lowering")
    with warnings.catch_warnings():
        # About every program that ExecuTorch copies, and about every cache.
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        warnings.filterwarnings("ignore", message="Mutation on a buffer", category=UserWarning)
        lowered: Lowered = module.lower(opened.model, settings, tower, report)
    with new_folder(out, _nbytes(opened)) as folder:
        report("writing")
        lowered.write(folder)
        _write_config(source, opened.config, settings.dtype, folder)
        if source.is_dir():
            copy_files(source, folder)
        else:
            tokenizer.save(folder)
        report("hashing")
        manifest = Manifest(
            backend=backend,
            dtype=settings.dtype,
            taps=taps,
            methods=lowered.methods,
            constants=lowered.constants,
            caches=lowered.caches,
            extra=lowered.extra,
            source={"name": source.resolve().name, "fingerprint": opened.fingerprint},
            versions=_versions(),
            files=hash_files(folder),
        )
        manifest.write(folder)
    return manifest


def load_backend(backend: str, packages: Sequence[str]) -> ModuleType:
    """The backend's module, which needs these packages. Raises ValueError for an unknown backend, ImportError if a
    package is missing."""
    if backend not in MODULES:
        raise ValueError(f"unknown backend {backend!r}; known: {', '.join(MODULES)}")
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"{package} is needed for this: pip install 'gemma4-parity[export]'")
    # They report at every start what they have no binary for.
    logging.getLogger("torchao").setLevel(logging.ERROR)
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    return importlib.import_module(MODULES[backend])


def make_settings(
    config: TextConfig,
    tokenizer: Tokenizer,
    max_seq_len: int | None,
    max_prefill_chunk: int | None,
    dtype: torch.dtype,
    taps: bool,
) -> Settings:
    """The settings with what is left open filled in. Raises ValueError for more context than the model has."""
    most = config.max_position_embeddings
    if max_seq_len is None:
        max_seq_len = min(DEFAULT_SEQ_LEN, most)
    elif max_seq_len > most:
        raise ValueError(f"max_seq_len = {max_seq_len} exceeds the model's max_position_embeddings = {most}")
    chunk = min(DEFAULT_CHUNK, max_seq_len) if max_prefill_chunk is None else max_prefill_chunk
    return Settings(max_seq_len, chunk, dtype, taps, tuple(sorted(tokenizer.stop_ids)))


def check_tokenizer(tokenizer: Tokenizer, config: TextConfig) -> None:
    """Raises ValueError if the program would be told other special tokens than its prompts are made of."""
    if tokenizer.bos_id != config.bos_token_id:
        raise ValueError(
            f"{tokenizer.source}: the tokenizer's BOS is {tokenizer.bos_id}, but config.json says {config.bos_token_id}"
        )
    if wrong := [i for i in sorted(tokenizer.stop_ids) if not 0 <= i < config.vocab_size]:
        raise ValueError(
            f"{tokenizer.source}: stop token {wrong[0]} is outside the model's vocabulary of {config.vocab_size}"
        )


def _check_vision(source: Path, config: TextConfig, settings: Settings) -> None:
    from gemma4_impl.export.vision import check_images
    from gemma4_impl.vision.tower import ImagePrompts, open_tower

    if not source.is_dir():
        raise ValueError(f"{source}: --vision needs a multimodal checkpoint folder; a GGUF file has no image processor")
    _, tower, processor = open_tower(source)
    check_images(config, ImagePrompts(tower, processor), settings)


def _load_tower(source: Path, dtype: torch.dtype) -> "ImageEncoder":
    from gemma4_impl.vision.images import ImageEncoder

    return ImageEncoder.from_pretrained(source, dtype)


def _nbytes(opened: Source) -> int:
    """About what the program will hold."""
    dense = {id(t): t.nbytes for t in opened.model.parameters() if not t.is_meta}
    integers = {id(q): q.nbytes for q in opened.quantized.values()}
    return sum(dense.values()) + sum(integers.values())


def _write_config(source: Path, config: TextConfig, dtype: torch.dtype, folder: Path) -> None:
    if source.is_dir():
        (folder / CONFIG).write_bytes((source / CONFIG).read_bytes())
    else:
        raw = {"model_type": "gemma4_text", **dataclasses.asdict(config), "dtype": dtype_name(dtype)}
        write_json(folder / CONFIG, raw)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _VERSIONS:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
