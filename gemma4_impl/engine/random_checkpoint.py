"""Checkpoint folders of the released sizes with random weights, quantized or not: tensor by tensor, all or nothing."""

import dataclasses
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import AddedToken, decoders, models

from gemma4_impl import names
from gemma4_impl.config import TextConfig
from gemma4_impl.engine.random import RandomWeights
from gemma4_impl.folders import SHARD_BYTES, new_folder, shards, write_index, write_json
from gemma4_impl.quant import stored as torchao
from gemma4_impl.quant.container import Spec, StreamWriter, nbytes
from gemma4_impl.quant.hf_config import torchao_config
from gemma4_impl.quant.recipe import QuantRecipe
from gemma4_impl.quant.stored import Stored, part_name

_SPECIAL = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<|turn>": 105, "<turn|>": 106}
_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {{- '<|turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' -}}
    {{- message['content'] + '<turn|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|turn>model\\n' -}}{%- endif -%}
"""


@dataclass(frozen=True)
class _Job:
    """One tensor of the output."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    """Of the tensor, or of its scales."""
    stored: Stored | None

    @property
    def hf_name(self) -> str:
        return names.to_hf(self.name)

    @property
    def specs(self) -> dict[str, Spec]:
        if self.stored is None:
            return {self.hf_name: (self.dtype, self.shape)}
        return {part_name(self.hf_name, part): spec for part, spec in self.stored.parts(self.dtype).items()}

    @property
    def nbytes(self) -> int:
        return sum(map(nbytes, self.specs.values()))


def random_checkpoint(
    variant: str | TextConfig,
    out: str | Path,
    recipe: str | QuantRecipe | None = "default",
    device: torch.device | str = "cpu",
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Writes `RandomWeights` of these arguments to the new folder `out`, which appears when it is complete, with
    config.json and a tokenizer of bytes. Returns the bytes of the weights.

    Peak memory is one tensor, on the device and beside it, and its scales. `progress` is called with the weights done
    so far and all there are. Raises ValueError as `RandomWeights` does, FileExistsError, OSError; then `out` is not
    there."""
    out = Path(os.path.abspath(out))
    if os.path.lexists(out):
        raise FileExistsError(f"{out}: already exists; remove it, or choose another name")
    weights = RandomWeights(variant, device, recipe, seed)
    jobs = [_job(weights, name) for name in weights.files]
    total = sum(job.nbytes for job in jobs)
    with new_folder(out, total) as folder:
        _write_weights(weights, jobs, folder, shard_bytes, progress)
        write_json(folder / "config.json", _config(weights, jobs))
        _write_tokenizer(folder)
    return total


def _job(weights: RandomWeights, name: str) -> _Job:
    how, shape = weights.configs[name], weights.shape(name)
    stored = None if how is None else Stored(torchao.KINDS[how.bits], shape, how.group_size or shape[-1], how.bits)
    return _Job(name, shape, weights.dtype, stored)


def _write_weights(
    weights: RandomWeights, jobs: list[_Job], folder: Path, shard_bytes: int, progress: Callable[[int, int], None]
) -> None:
    metadata = {"format": "pt"}
    if any(job.stored for job in jobs):
        plain = json.dumps({"_type": "Tensor"})
        described = {job.hf_name: job.stored.metadata(job.dtype) if job.stored else plain for job in jobs}
        metadata |= described | {"tensor_names": json.dumps(list(described))}
    weight_map: dict[str, str] = {}
    done, total = 0, sum(math.prod(job.shape) for job in jobs)
    for file, shard in shards(jobs, lambda job: job.nbytes, shard_bytes).items():
        specs = {name: spec for job in shard for name, spec in job.specs.items()}
        weight_map |= dict.fromkeys(specs, file)
        with StreamWriter(folder / file, specs, metadata) as writer:
            for job in shard:
                _write(weights, job, writer)
                done += math.prod(job.shape)
                progress(done, total)
    write_index(folder, weight_map, sum(job.nbytes for job in jobs))


def _write(weights: RandomWeights, job: _Job, writer: StreamWriter) -> None:
    if job.stored is None:
        writer.write(job.hf_name, weights.tensor(job.name).cpu())
        return
    for part, tensor in torchao.split(weights.quantized(job.name)).items():
        turned = job.stored.kind == torchao.INT4 and part != "qdata"
        writer.write(part_name(job.hf_name, part), (tensor.mT if turned else tensor).cpu())


def _config(weights: RandomWeights, jobs: list[_Job]) -> dict[str, Any]:
    config = {"model_type": "gemma4_text", **dataclasses.asdict(weights.config)}
    config["dtype"] = str(weights.dtype).removeprefix("torch.")
    if any(job.stored for job in jobs):
        config["quantization_config"] = torchao_config({job.hf_name: weights.configs[job.name] for job in jobs})
    return config


def _write_tokenizer(folder: Path) -> None:
    """Bytes as tokens, at the ids that follow the special ones: any text can be a prompt. Other ids mean nothing."""
    vocab = _SPECIAL | {f"<unused{i}>": i for i in range(4, 105)} | {f"<0x{b:02X}>": 107 + b for b in range(256)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in _SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    tokens = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | tokens)
    (folder / "chat_template.jinja").write_text(_TEMPLATE, encoding="utf-8")
