"""Small models of every kind and their programs for CUDA, which on a CPU run with our operators' definitions."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from gemma4_impl.checkpoint import Checkpoint
from gemma4_impl.export import source
from gemma4_impl.export.cuda_aoti import Session, new_state, state_sizes
from gemma4_impl.export.cuda_graph import export_programs
from gemma4_impl.export.program import Limits, Settings
from gemma4_impl.model.cache import KVCache
from gemma4_impl.model.decoder import Gemma4
from gemma4_impl.quant.quantize import quantize
from gemma4_impl.quant.recipe import QuantConfig
from gemma4_impl.quant.tensor import QuantizedTensor
from reference.tiny import SHORT, aligned, make_tiny

CHUNK, CONTEXT, VOCAB = 6, 90, 512
LIMITS = Limits(CONTEXT, CHUNK, VOCAB)
LENGTHS = (5, 6, 2, 1, 1, 6, 1, 3, 6, 1, 1, 4, 1)
"""Chunks, four windows in all and more, so that rings of W - 1 + 6 slots wrap; single tokens are decoded."""


class Quantized(Checkpoint):
    """A dense checkpoint whose matrices are quantized as they are read: four bits, some with a zero, and eight."""

    def quantized(self, name: str) -> QuantizedTensor | None:
        how = None
        if name.startswith("embed_tokens") or name.endswith("k_proj.weight"):
            how = QuantConfig(8, None)
        elif name.endswith(("gate_proj.weight", "o_proj.weight")):
            how = QuantConfig(4, 32, symmetric=False)
        elif ".router." not in name and name.endswith(("_proj.weight", "_proj", "gate.weight", "projection.weight")):
            how = QuantConfig(4, 32)
        return None if how is None else quantize(super().tensor(name), how, torch.float32)

    def tensor(self, name: str) -> Tensor:
        weight = self.quantized(name)
        return super().tensor(name) if weight is None else weight.dequantize()


def weights(
    variant: str, folder: Path, quantized: bool = False, layers: list[str] | None = None, **changes: int
) -> Checkpoint:
    overrides = aligned(variant, 32) | SHORT[variant] | {"vocab_size": VOCAB} | changes
    if layers:
        overrides |= {"num_hidden_layers": len(layers), "layer_types": layers}
    return (Quantized if quantized else Checkpoint)(make_tiny(variant, folder, overrides=overrides))


def dense(checkpoint: Checkpoint, dtype: torch.dtype) -> Gemma4:
    """The eager model, its weights dequantized."""
    model = source.open_source(checkpoint, dtype).model
    source.dequantize(model)
    return model


@dataclass(frozen=True)
class Case:
    checkpoint: Checkpoint
    dtype: torch.dtype
    model: Gemma4
    cache: KVCache
    programs: dict[str, ExportedProgram]

    @property
    def functions(self) -> dict[str, Callable[..., Tensor]]:
        return {name: program.module(check_guards=False) for name, program in self.programs.items()}


def exported(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, top_k: int | None = None) -> Case:
    model = source.open_source(checkpoint, dtype).model
    cache = KVCache(model.config, 1, CONTEXT, CHUNK, dtype)
    return Case(checkpoint, dtype, model, cache, export_programs(model, cache, top_k))


def settings(dtype: torch.dtype = torch.float32, **changes) -> Settings:
    return Settings(**({"max_seq_len": CONTEXT, "max_prefill_chunk": CHUNK, "dtype": dtype} | changes))


def session(case: Case, top_k: int | None = None) -> Session:
    """Over the programs as they are, on the state that they hold."""
    functions = case.functions
    buffers = dict(functions["decode"].named_buffers())
    state = {name: buffers[name] for name in state_sizes(case.cache, VOCAB)}
    for name, value in new_state(state_sizes(case.cache, VOCAB), "cpu").items():
        state[name].copy_(value)
    return Session(functions, state, LIMITS, top_k)


def prompt(length: int = sum(LENGTHS), seed: int = 1) -> Tensor:
    return torch.randint(107, VOCAB, (1, length), generator=torch.Generator().manual_seed(seed))


def chunked(run: Callable[[Tensor, int], Tensor], tokens: Tensor, lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    """Logits [n, V] after each chunk."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return torch.cat([run(tokens[:, s : s + n], s).view(1, -1) for s, n in zip(starts, lengths, strict=True)])


@torch.no_grad()
def eager(model: Gemma4, tokens: Tensor, lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    """The same by the eager model and its cache."""
    cache = model.make_cache(1, CONTEXT, CHUNK)
    return chunked(lambda part, _: model(part, cache=cache, logits="last"), tokens, lengths)


@torch.no_grad()
def whole(model: Gemma4, tokens: Tensor, lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    """The same from one forward."""
    ends = torch.tensor(lengths).cumsum(0) - 1
    return model(tokens)[0, ends]
