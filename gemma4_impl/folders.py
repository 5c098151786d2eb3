"""Checkpoint folders as they are written: shards and their index, the files that go along, all of it or nothing."""

import contextlib
import errno
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

_T = TypeVar("_T")

SHARD_BYTES = 5 * 10**9
_COPIED = re.compile(
    r"(tokenizer.*|special_tokens_map|added_tokens|vocab|generation_config|processor_config|.*preprocessor_config"
    r"|chat_template.*)\.(json|model|jinja)|merges\.txt"
)
_TEMPLATES = "additional_chat_templates"


def check_out(source: Path, out: Path) -> None:
    """Raises FileExistsError if `out` is there, and ValueError if it would be inside of `source`."""
    if os.path.lexists(out):
        raise FileExistsError(f"{out}: already exists; remove it, or choose another name")
    if out.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"{out}: lies inside the checkpoint that is read; choose a place outside of {source}")


@contextmanager
def new_folder(out: Path, needed: int) -> Iterator[Path]:
    """A temporary folder beside `out`, an absolute path, renamed to it at the end; removed on any error, with parents
    made for it. Raises OSError if fewer than `needed` bytes are free, FileExistsError if `out` exists by the end."""
    made = [parent for parent in out.parents if not parent.exists()]
    folder = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        folder.mkdir(parents=True)
        if (free := shutil.disk_usage(folder).free) < needed:
            raise OSError(f"{out}: needs {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free there")
        yield folder
        if os.path.lexists(out):
            raise FileExistsError(f"{out}: exists by now; nothing was written")
        os.rename(folder, out)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            for parent in made:
                parent.rmdir()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(f"{out}: {error.strerror}; nothing was written") from None
        raise


def shards(items: Sequence[_T], nbytes: Callable[[_T], int], limit: int) -> dict[str, list[_T]]:
    """File name -> consecutive items of at most `limit` bytes together, or one that is larger."""
    parts: list[list[_T]] = []
    size = math.inf
    for item in items:
        if size + nbytes(item) > limit:
            parts.append([])
            size = 0
        parts[-1].append(item)
        size += nbytes(item)
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors": part for i, part in enumerate(parts)}


def write_index(folder: Path, weight_map: Mapping[str, str], total: int) -> None:
    """The index of tensor -> file, if there is more than one file; `total` are the tensors' bytes."""
    if len(set(weight_map.values())) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(weight_map)}
        write_json(folder / "model.safetensors.index.json", index)


def copy_files(source: Path, folder: Path) -> None:
    """The tokenizer's, the chat template's, the processors' and the generation config."""
    for file in sorted(source.iterdir()):
        if file.is_file() and _COPIED.fullmatch(file.name):
            shutil.copyfile(file, folder / file.name)
        elif file.is_dir() and file.name == _TEMPLATES:
            shutil.copytree(file, folder / file.name)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
