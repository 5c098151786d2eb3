"""The engine on models of real size with random weights, transformers on the same values, and the float64 truth.

Decode starts from a cache full of random keys and values, which all of them are given."""

import dataclasses
import functools
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.harness import Backend, Case, close_to, needs, scratch
from bench.models import TRANSFORMERS, flops
from bench.timing import Call
from gemma4_impl.config import FULL, SLIDING, VARIANTS, TextConfig
from gemma4_impl.engine import PackedModel, RandomWeights, Session
from gemma4_impl.generate import cache_bytes
from gemma4_impl.quant.tensor import QuantizedTensor
from parity.budget import Check

NEW = 8
"""Tokens that a call decodes."""
DTYPE = torch.bfloat16
_TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 1,
    "head_dim": 32,
    "global_head_dim": 64,
    "sliding_window": 16,
}


def _layers(config: TextConfig, count: int) -> TextConfig:
    return dataclasses.replace(config, num_hidden_layers=count, layer_types=config.layer_types[:count])


CONFIGS: dict[str, TextConfig] = {
    "tiny 31B, engine": _layers(dataclasses.replace(VARIANTS["31B"], **_TINY), 6),
    "31B, 6 layers": _layers(VARIANTS["31B"], 6),
    "31B, whole": VARIANTS["31B"],
}
"""Six layers are five sliding ones and a full one."""
NAMES = [name for name in CONFIGS if name.startswith("tiny") or torch.cuda.is_available()]


@dataclass(frozen=True)
class Given:
    """What a row is given: a model's name, and how many tokens come first."""

    name: str
    context: int

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.name.startswith("tiny") else "cuda")

    @property
    def config(self) -> TextConfig:
        return CONFIGS[self.name]

    @property
    def tokens(self) -> Tensor:
        """[context + 1]."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(107, self.config.vocab_size, (self.context + 1,), generator=generator).to(self.device)

    def cache(self, layer: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of the last positions that a layer sees, [1, K, S, H]."""
        kind = self.config.layers[layer]
        S = min(self.context, self.config.sliding_window) if kind.is_sliding else self.context
        generator = torch.Generator(self.device).manual_seed(layer)
        shape = (2, 1, kind.num_key_value_heads, S, kind.head_dim)
        k, v = torch.randn(shape, generator=generator, device=self.device).to(DTYPE)
        # Norms keep keys smaller than values: attention has no 1 / sqrt(H).
        return (k * 0.4).to(dtype), v.to(dtype)


class Kept(RandomWeights):
    """Quantized tensors are drawn once, for all that read them."""

    @functools.cached_property
    def _drawn(self) -> dict[str, QuantizedTensor | None]:
        return {}

    def quantized(self, name: str) -> QuantizedTensor | None:
        if name not in self._drawn:
            self._drawn[name] = super().quantized(name)
        return self._drawn[name]


@functools.lru_cache(maxsize=1)
def weights(name: str) -> Kept:
    return Kept(CONFIGS[name], Given(name, 1).device)


class Dense:
    """Implements `reference.weights.Source`: the dequantized values."""

    def __init__(self, name: str):
        self.weights = weights(name)

    def __contains__(self, name: str) -> bool:
        return name in self.weights.files

    def tensor(self, name: str) -> Tensor:
        return self.weights.tensor(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        weight = self.weights.quantized(name)
        return self.weights.rows(name, start, stop) if weight is None else weight[start:stop].dequantize()

    def is_quantized(self, name: str) -> bool:
        return self.weights.configs[name] is not None


@functools.cache
def folder(name: str) -> Path:
    """With the config that transformers reads."""
    path = scratch() / name.replace(" ", "-")
    path.mkdir()
    text = {"model_type": "gemma4_text", **dataclasses.asdict(weights(name).config), "dtype": "bfloat16"}
    (path / "config.json").write_text(json.dumps(text))
    return path


class Engine:
    """Ours. `logits` is what the step that `decode` repeats makes of the first token."""

    def __init__(self, name: str, context: int):
        model = packed(name)
        self.session = Session(model, 1, context + NEW, max_chunk=min(context, 2048))

    def prefill(self, given: Given) -> Tensor:
        self.session.reset()
        return self.session.prefill(given.tokens[:-1])

    def fill(self, given: Given) -> None:
        """Puts the cache's contents in their slots: position p in slot p % capacity."""
        cache = self.session.cache
        for i, layer in enumerate(given.config.layers):
            capacity = cache.capacity[SLIDING if layer.is_sliding else FULL]
            k, v = given.cache(i, DTYPE)
            slots = torch.arange(given.context - k.shape[2], given.context, device=given.device) % capacity
            getattr(cache, f"layers_{i}_k")[:, :, slots] = k
            getattr(cache, f"layers_{i}_v")[:, :, slots] = v

    def begin(self, given: Given) -> None:
        """Ready to decode: the next token is the one after the context."""
        self.session.lengths = [given.context]
        chosen = torch.zeros(1, given.config.vocab_size, device=given.device)
        chosen[0, given.tokens[-1]] = 1
        self.session.start(chosen)

    def decode(self) -> list[list[int]]:
        return list(self.session.decode(NEW))

    def logits(self, given: Given) -> Tensor:
        """[V]."""
        self.begin(given)
        next(self.session.decode(1))
        return self.session.step.logits[0].clone()


@functools.lru_cache(maxsize=1)
def packed(name: str) -> PackedModel:
    return PackedModel.from_weights(weights(name), DTYPE, Given(name, 1).device)


class Transformers:
    """Dense bfloat16 weights of the same values in transformers: eagerly with sdpa, or compiled with a static cache."""

    def __init__(self, name: str, compiled: bool = False):
        from reference.hf import text_config
        from reference.stream import filled

        device = Given(name, 1).device
        self.model = filled(text_config(folder(name)), Dense(name), DTYPE, DTYPE, device)
        self.model.set_attn_implementation("sdpa")
        self.step = torch.compile(self.model.forward, mode="reduce-overhead") if compiled else self.model.forward
        self.static, self.cache = compiled, None

    @torch.no_grad()
    def prefill(self, given: Given) -> Tensor:
        out = self.model(input_ids=given.tokens[None, :-1], use_cache=True, logits_to_keep=1)
        return out.logits[0, -1].float()

    def fill(self, given: Given) -> None:
        """A static cache stays where it is: the graph of the compiled step holds its addresses."""
        if not self.static:
            self.cache = filled_cache(self.model.config, given, DTYPE)
        elif self.cache is None:
            self.cache = filled_cache(self.model.config, given, DTYPE, given.context + NEW)
            self._states = [{k: _copied(v) for k, v in vars(layer).items()} for layer in self.cache.layers]
        else:
            for layer, state in zip(self.cache.layers, self._states, strict=True):
                for key, value in state.items():
                    if isinstance(value, Tensor):
                        getattr(layer, key).copy_(value)
                    else:
                        setattr(layer, key, value)

    @torch.no_grad()
    def decode(self, given: Given) -> Tensor:
        """The logits of the first step [V]."""
        token, first = given.tokens[None, -1:], None
        for i in range(NEW):
            torch.compiler.cudagraph_mark_step_begin()
            at = torch.tensor([[given.context + i]], device=given.device)
            logits = self.step(input_ids=token, past_key_values=self.cache, position_ids=at, use_cache=True).logits
            first = logits[0, -1].float() if first is None else first
            token = logits[:, -1].argmax(-1, keepdim=True)
        return first


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def filled_cache(config: Any, given: Given, dtype: torch.dtype, room: int | None = None) -> Any:
    """transformers' cache with the contents of `given`: growing, or static with `room`."""
    from transformers import DynamicCache, StaticCache

    cache = DynamicCache(config=config) if room is None else StaticCache(config=config, max_cache_len=room)
    for i in range(given.config.num_hidden_layers):
        k, v = given.cache(i, dtype)
        if (missing := given.context - k.shape[2]) > 0:
            # Long gone from a sliding layer's sight, but counted.
            k, v = (torch.nn.functional.pad(t, (0, 0, missing, 0)) for t in (k, v))
        cache.update(k, v, i)
        layer = cache.layers[i]
        layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
    return cache


@functools.cache
def reference(given: Given, decode: bool, truth: bool) -> Tensor:
    """Logits [V] of transformers, eager, layer by layer: float64 or bfloat16."""
    from reference.float64 import PromoteFloat32
    from reference.hf import HFReference

    model = HFReference(
        folder(given.name), DTYPE, truth=truth, device=given.device, stream=True, weights=Dense(given.name)
    ).model
    with torch.no_grad(), PromoteFloat32() if truth else nullcontext():
        if not decode:
            return model(input_ids=given.tokens[None, :-1], use_cache=False, logits_to_keep=1).logits[0, -1]
        cache = filled_cache(model.config, given, torch.float64 if truth else DTYPE)
        at = torch.tensor([[given.context]], device=given.device)
        return model(input_ids=given.tokens[None, -1:], past_key_values=cache, position_ids=at).logits[0, -1]


@functools.lru_cache(maxsize=1)
def engine(name: str, context: int) -> Engine:
    return Engine(name, context)


@functools.lru_cache(maxsize=1)
def transformers(name: str, compiled: bool = False) -> Transformers:
    return Transformers(name, compiled)


def _close(given: Given, decode: bool) -> Callable[[Any], Check]:
    return close_to([reference(given, decode, True)], [reference(given, decode, False)], DTYPE)


def prefill_case(given: Given, *more: Backend) -> Case:
    """Each backend's `prefill` of the context."""

    def cost() -> tuple[float, float]:
        model = packed(given.name)
        moved = model.nbytes_read + cache_bytes(given.config, DTYPE, given.context)
        return moved, flops(given.config, 0, given.context, 1)

    return Case(
        suite="prefill",
        operation=f"prefill of {given.context:,} tokens",
        shape=f"{given.name} int4",
        backends=[
            Backend("gemma4", lambda g: lambda: engine(g.name, g.context).prefill(g), ours=True, wall=True),
            Backend(
                "Hugging Face sdpa, bfloat16",
                lambda g: lambda: transformers(g.name).prefill(g),
                absent=TRANSFORMERS,
                wall=True,
            ),
            *more,
        ],
        make=lambda i: given,
        judge=lambda g: _close(g, False),
        cost=cost,
        dtype=DTYPE,
        device=given.device,
        tokens=given.context,
        rotate=False,
    )


def decode_case(given: Given, *more: Backend) -> Case:
    """NEW tokens, greedily; what is judged are the logits of the first step."""

    def cost() -> tuple[float, float]:
        model, steps = packed(given.name), range(given.context, given.context + NEW)
        moved = sum(model.nbytes_read + cache_bytes(given.config, DTYPE, at + 1) for at in steps)
        return moved, sum(flops(given.config, at, 1, 1) for at in steps)

    def ours(g: Given) -> Call:
        found = engine(g.name, g.context)
        found.fill(g)
        return Call(found.decode, before=lambda: found.begin(g))

    def theirs(g: Given, compiled: bool) -> Call:
        found = transformers(g.name, compiled)
        return Call(lambda: found.decode(g), before=lambda: found.fill(g))

    def forced(g: Given) -> Tensor:
        return engine(g.name, g.context).logits(g)

    compiles = [
        Backend(
            "Hugging Face static cache, compiled, bfloat16",
            lambda g: theirs(g, True),
            absent=needs("transformers", cuda=True),
            wall=True,
        )
    ]
    return Case(
        suite="decode",
        operation=f"decode of {NEW} tokens",
        shape=f"{given.name} int4, context {given.context:,}",
        backends=[
            Backend(
                "gemma4", ours, ours=True, wall=True, read=lambda _: engine(given.name, given.context).logits(given)
            ),
            Backend(
                "Hugging Face sdpa, bfloat16",
                lambda g: theirs(g, False),
                absent=TRANSFORMERS,
                wall=True,
            ),
            # Compiling sixty layers takes minutes.
            *(compiles if given.name == "31B, 6 layers" else []),
            *more,
        ],
        make=lambda i: given,
        judge=lambda g: _close(g, True),
        cost=cost,
        dtype=DTYPE,
        device=given.device,
        tokens=NEW,
        context=given.context,
        series=given.name,
        rotate=False,
    )
