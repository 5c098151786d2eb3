"""Exported folders for tests: of what a backend lowered, and one with a program that is no program."""

import dataclasses
from pathlib import Path

import torch

from gemma4_impl.config import TextConfig
from gemma4_impl.export.folder import PROGRAM, File, Manifest, hash_files
from gemma4_impl.export.program import Lowered, Method, Settings, Value, constants
from gemma4_impl.folders import write_json

_NO_FILE = File(0, "0" * 64)


def manifest_for(config: TextConfig, files: dict[str, File], backend: str = "xnnpack") -> Manifest:
    """A context of 64 tokens, 8 at a time."""
    settings = Settings(64, 8, torch.float32, eos_ids=(5,))
    vocab = config.vocab_size

    def method(length: int | dict[str, int]) -> Method:
        inputs = [Value(name, torch.int64, (1, length)) for name in ("tokens", "positions")]
        return Method(inputs, [Value("logits", torch.float32, (1, 1, vocab))])

    methods = {"prefill": method({"min": 2, "max": 8}), "decode": method(1)}
    return Manifest(
        backend=backend,
        dtype=torch.float32,
        taps=False,
        methods=methods if backend != "mlx" else {"forward": method({"min": 1, "max": 8})},
        constants=constants(config, settings),
        caches={"layers_0_k": {"dtype": "float32", "shape": [1, 1, 9, 4], "bytes": 144}},
        extra={},
        source={"name": "tiny", "fingerprint": "0" * 64},
        versions={"torch": torch.__version__},
        files={"model.pte": _NO_FILE, "config.json": _NO_FILE} | files,
    )


def write_lowered(lowered: Lowered, folder: Path, backend: str, dtype: torch.dtype, taps: bool = False) -> Manifest:
    """The program and its manifest as they are read back, beside a config.json that nobody reads."""
    lowered.write(folder)
    (folder / "config.json").write_text("{}")
    manifest = Manifest(
        backend=backend,
        dtype=dtype,
        taps=taps,
        methods=lowered.methods,
        constants=lowered.constants,
        caches=lowered.caches,
        extra=lowered.extra,
        source={"name": "small", "fingerprint": "0" * 64},
        versions={},
        files=hash_files(folder),
    )
    manifest.write(folder)
    return Manifest.read(folder)


def write_exported(folder: Path, config: TextConfig, backend: str = "xnnpack") -> Path:
    """`config` with a program of twelve bytes."""
    folder.mkdir(parents=True)
    (folder / PROGRAM).write_bytes(b"no program!\n")
    write_json(folder / "config.json", {"model_type": "gemma4_text", **dataclasses.asdict(config)})
    (folder / "sub").mkdir()
    (folder / "sub" / "a.txt").write_text("a")
    manifest_for(config, hash_files(folder), backend).write(folder)
    return folder
