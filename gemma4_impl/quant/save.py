"""A plain checkpoint in, a quantized one in torchao's format out: tensor by tensor, block by block, all or nothing."""

import collections
import contextlib
import itertools
import json
import math
import os
import platform
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from gemma4_impl.checkpoint import FLOATS, Checkpoint, CheckpointError, check_fits, is_quantized
from gemma4_impl.folders import SHARD_BYTES, check_out, copy_files, new_folder, shards, write_index, write_json
from gemma4_impl.quant import stored as torchao
from gemma4_impl.quant.container import Spec, StreamWriter, nbytes
from gemma4_impl.quant.hf_config import torchao_config
from gemma4_impl.quant.quantize import quantize
from gemma4_impl.quant.recipe import QuantConfig, QuantRecipe, RecipeError, plan
from gemma4_impl.quant.sqnr import QuantizationReport, Sqnr, TensorReport
from gemma4_impl.quant.stored import Stored, part_name

_T, _R = TypeVar("_T"), TypeVar("_R")

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
_BLOCK = 1 << 22
_RELEASE = 1 << 26


def quantize_checkpoint(
    source: str | Path,
    out: str | Path,
    recipe: QuantRecipe,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> QuantizationReport:
    """Quantizes the checkpoint folder `source` into the new folder `out`, which appears when it is complete.

    `out` gets sharded safetensors under the source's names, config.json with a `quantization_config`, the tokenizer's
    files, quantization.json and quantization.html. A tied head becomes a tensor of its own. Peak memory is a few
    blocks of 4M weights and one tensor's scales. `progress` is called with the weights done so far, and all there are.
    Raises FileNotFoundError, FileExistsError, ConfigError, CheckpointError, RecipeError, OSError; then `out` is not
    there."""
    source, out = Path(source), Path(os.path.abspath(out))
    _check_paths(source, out)
    checkpoint = Checkpoint(source)
    jobs, dropped = _jobs(checkpoint, recipe)
    untied = checkpoint.config.tie_word_embeddings and any(job.name == HEAD for job in jobs)
    towers = [job for job in jobs if job.is_tower]
    with new_folder(out, sum(job.nbytes for job in jobs)) as folder:
        rows = _write_weights(checkpoint, jobs, folder, shard_bytes, progress)
        _write_config(source, jobs, untied, folder)
        copy_files(source, folder)
        report = QuantizationReport(
            source=source.resolve().name,
            fingerprint=checkpoint.fingerprint(),
            recipe=recipe.to_dict(),
            versions=_versions(),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            tensors=tuple(rows),
            untied=untied,
            towers=tuple(job.hf_name for job in towers),
            tower_bytes=sum(job.nbytes for job in towers),
            dropped=tuple(dropped),
        )
        report.write(folder)
    return report


@dataclass(frozen=True)
class _Job:
    """One tensor of the output."""

    name: str
    hf_name: str
    origin: str
    """The tensor it is read from: the embedding for a head that was tied to it."""
    source_dtype: torch.dtype
    dtype: torch.dtype
    """Of the tensor, or of its scales."""
    shape: tuple[int, ...]
    config: QuantConfig | None = None
    stored: Stored | None = None
    is_tower: bool = False

    @property
    def specs(self) -> dict[str, Spec]:
        if self.stored is None:
            return {self.hf_name: (self.dtype, self.shape)}
        return {part_name(self.hf_name, part): spec for part, spec in self.stored.parts(self.dtype).items()}

    @property
    def nbytes(self) -> int:
        return sum(map(nbytes, self.specs.values()))

    @property
    def metadata(self) -> str:
        return json.dumps({"_type": "Tensor"}) if self.stored is None else self.stored.metadata(self.dtype)


def _check_paths(source: Path, out: Path) -> None:
    if source.is_file() or source.suffix == ".gguf":
        raise CheckpointError(
            f"{source}: only a checkpoint folder can be quantized; a GGUF file is quantized already, use the original"
        )
    if source.is_dir() and is_quantized(source):
        raise CheckpointError(f"{source}: is quantized already (config.json); quantize the original checkpoint")
    check_out(source, out)


def _jobs(checkpoint: Checkpoint, recipe: QuantRecipe) -> tuple[list[_Job], list[str]]:
    """What is to be written, in the model's order, and the names of tensors that the model does not read."""
    from gemma4_impl.model.decoder import Gemma4

    config = checkpoint.config
    with torch.device("meta"):
        model = Gemma4(config)
    fitting = set(check_fits(model, checkpoint))
    configs = plan(recipe, config)
    # A head that is tied to an embedding which stays as it is need not be stored.
    untie = config.tie_word_embeddings and (configs[EMBEDDING] or configs[HEAD])
    scale_dtype = checkpoint.dtype
    jobs = []
    for name in model.state_dict():
        origin = EMBEDDING if name == HEAD and untie else name
        if name not in fitting and origin == name:
            continue
        dtype = FLOATS.get(checkpoint.stored_dtype(origin))
        if dtype not in torchao.SCALE_DTYPES:
            raise CheckpointError(
                f"{checkpoint.files[origin]}: {checkpoint.hf_names[origin]!r} is stored as "
                f"{checkpoint.stored_dtype(origin)}; save the checkpoint as bfloat16, float16 or float32 first"
            )
        prefix = checkpoint.hf_names[origin].removesuffix(origin)
        hf_name = prefix + name if name != HEAD or origin == HEAD else _head_name(prefix)
        shape, how = checkpoint.shape(origin), configs[name]
        if how is None:
            jobs.append(_Job(name, hf_name, origin, dtype, dtype, shape))
        else:
            stored = Stored(torchao.KINDS[how.bits], shape, how.group_size or shape[-1], how.bits)
            jobs.append(_Job(name, hf_name, origin, dtype, scale_dtype, shape, how, stored))
    if all(job.config is None for job in jobs):
        raise RecipeError(f"recipe {recipe.name!r} keeps every tensor as it is: there is nothing to quantize")
    for hf_name in sorted(checkpoint.towers):
        tensor = checkpoint.tower(hf_name)
        jobs.append(_Job(hf_name, hf_name, hf_name, tensor.dtype, tensor.dtype, tuple(tensor.shape), is_tower=True))
    read = {job.origin for job in jobs} | ({HEAD} if config.tie_word_embeddings else set())
    return jobs, [checkpoint.hf_names[name] for name in sorted(set(checkpoint.files) - read)]


def _head_name(prefix: str) -> str:
    return "language_model." + HEAD if prefix == "language_model.model." else HEAD


def _write_weights(
    checkpoint: Checkpoint, jobs: list[_Job], folder: Path, shard_bytes: int, progress: Callable[[int, int], None]
) -> list[TensorReport]:
    # Every file describes all tensors: transformers keeps one description for all files, and torchao's own reader
    # passes over tensors that the file at hand does not hold.
    metadata = {job.hf_name: job.metadata for job in jobs}
    metadata |= {"tensor_names": json.dumps(list(metadata)), "format": "pt"}
    weight_map: dict[str, str] = {}
    rows = []
    done, total = 0, sum(math.prod(job.shape) for job in jobs)

    def converted(shard: list[_Job]) -> Iterator[_Converted]:
        nonlocal done
        blocks = ((checkpoint, job, block) for job in shard for block in _blocks(checkpoint, job))
        for result in _ahead(_convert, blocks):
            yield result
            done += result.block.numel()
            progress(done, total)

    for file, shard in shards(jobs, lambda job: job.nbytes, shard_bytes).items():
        specs = {name: spec for job in shard for name, spec in job.specs.items()}
        weight_map |= dict.fromkeys(specs, file)
        with StreamWriter(folder / file, specs, metadata) as writer:
            for job, results in itertools.groupby(converted(shard), key=lambda result: result.job):
                sqnr = _write(job, results, writer)
                if not job.is_tower:
                    rows.append(_report(job, sqnr))
    write_index(folder, weight_map, sum(job.nbytes for job in jobs))
    return rows


def _blocks(checkpoint: Checkpoint, job: _Job) -> Iterator[Tensor]:
    """The tensor in consecutive blocks of rows, or of whole experts; what was read is unmapped now and then."""
    if job.is_tower:
        yield checkpoint.tower(job.origin)
    elif not job.shape:
        yield checkpoint.tensor(job.origin)
    else:
        step = max(1, _BLOCK // max(1, math.prod(job.shape[1:])))
        since = 0
        for start in range(0, job.shape[0], step):
            block = checkpoint.rows(job.origin, start, min(start + step, job.shape[0]))
            since += block.nbytes
            yield block
            if since >= _RELEASE:
                checkpoint.release()
                since = 0
    checkpoint.release()


@dataclass(frozen=True)
class _Converted:
    """A block of a tensor: itself, or the parts that it was quantized to."""

    job: _Job
    block: Tensor
    parts: dict[str, Tensor] | None
    sqnr: Sqnr


def _convert(item: tuple[Checkpoint, _Job, Tensor]) -> _Converted:
    checkpoint, job, block = item
    sqnr = Sqnr()
    if job.config is None:
        return _Converted(job, block, None, sqnr)
    where = f"{checkpoint.files[job.origin]}: {checkpoint.hf_names[job.origin]!r}"
    q = quantize(block, job.config, scale_dtype=job.dtype, name=where)
    sqnr.add(block, q)
    return _Converted(job, block, torchao.split(q), sqnr)


def _ahead(run: Callable[[_T], _R], items: Iterable[_T]) -> Iterator[_R]:
    """`map(run, items)`, by as many threads as torch may use, no further ahead than there are threads. Within them
    torch uses one each: its own threads meet after every operator, which costs most where others use the cores too."""
    threads = torch.get_num_threads()
    waiting: collections.deque[Future[_R]] = collections.deque()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for item in items:
                waiting.append(pool.submit(run, item))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    finally:
        torch.set_num_threads(threads)


def _write(job: _Job, results: Iterable[_Converted], writer: StreamWriter) -> Sqnr:
    """Writes what became of one tensor's blocks; its scales at the end, as they may have to be transposed."""
    sqnr = Sqnr()
    held: dict[str, list[Tensor]] = {"scale": [], "zero_point": []}
    for result in results:
        if result.parts is None:
            writer.write(job.hf_name, result.block)
            continue
        sqnr.merge(result.sqnr)
        writer.write(part_name(job.hf_name, "qdata"), result.parts["qdata"])
        for part, blocks in held.items():
            blocks.append(result.parts[part])
    if job.stored is not None:
        for part, blocks in held.items():
            whole = torch.cat(blocks)
            writer.write(part_name(job.hf_name, part), whole.mT if job.stored.kind == torchao.INT4 else whole)
    return sqnr


def _report(job: _Job, sqnr: Sqnr) -> TensorReport:
    # The tied head had no bytes of its own.
    before = 0 if job.name != job.origin else math.prod(job.shape) * job.source_dtype.itemsize
    facts: dict[str, Any] = {"name": job.name, "shape": job.shape, "bytes_before": before, "bytes_after": job.nbytes}
    if job.config is None or job.stored is None:
        return TensorReport(stored=str(job.dtype).removeprefix("torch."), **facts)
    return TensorReport(
        stored=job.stored.kind,
        bits=job.config.bits,
        group_size=job.config.group_size,
        symmetric=job.config.symmetric,
        method=job.config.method,
        signal=sqnr.signal,
        noise=sqnr.noise,
        **facts,
    )


def _write_config(source: Path, jobs: list[_Job], untied: bool, folder: Path) -> None:
    raw = json.loads((source / "config.json").read_text(encoding="utf-8"))
    tensors = {job.hf_name: job.config for job in jobs if not job.is_tower}
    if untied:
        raw["tie_word_embeddings"] = False
        if isinstance(raw.get("text_config"), dict):
            raw["text_config"]["tie_word_embeddings"] = False
    write_json(folder / "config.json", raw | {"quantization_config": torchao_config(tensors)})


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("gemma4-parity", "torch", "safetensors"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
