"""Tokens one by one through the whole model: in float32 as given, with four-bit weights, and greedily in JAX."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import models
from bench.engine_models import NAMES, Given, decode_case
from bench.exported_models import decode_backend
from bench.harness import Backend, Case, close_to, equal_to, grid, publish, ratio, timed
from bench.models import NEW, PROMPT, SIZES, VARIANTS, Text
from bench.timing import CORES, Call
from gemma4_impl import taps
from gemma4_impl.checkpoint import Checkpoint
from gemma4_impl.generate import prefill
from gemma4_impl.model.decoder import Gemma4
from gemma4_impl.quant.pack import can_pack
from gemma4_impl.quant.quantize import quantize
from gemma4_impl.quant.recipe import QuantConfig
from gemma4_impl.quant.tensor import QuantizedTensor
from parity.compare import routing_of

GREEDY = 64
JAX_FLOOR = 5.0
"""Times as fast as a module jitted step by step that decode in one dispatch must be."""


def _on_cpu() -> str:
    return models.TRANSFORMERS() or "compiling a model takes minutes on a CPU"


def _backend(name: str, kind: str, **options: Any) -> Backend:
    def prepare(given: Text) -> Call:
        runner = models.runner(kind, given.path)
        return Call(lambda: runner.decode(given.rest), before=lambda: runner.prefill(given.prompt))

    return Backend(name, prepare, **options)


def _judge(given: Text) -> Callable[[Any], Any]:
    exact, eager = models.truth(given.path)
    return close_to([exact[:, 1:]], [eager[:, 1:]], torch.float32)


DENSE = [
    _backend("gemma4", "ours", ours=True),
    _backend("Hugging Face eager", "eager", absent=models.TRANSFORMERS),
    _backend("Hugging Face sdpa", "sdpa", absent=models.TRANSFORMERS),
    _backend("Hugging Face static cache, compiled", "", absent=_on_cpu),
]


def _dense(size: str, variant: str) -> Case:
    def cost() -> tuple[float, float]:
        model = models.runner("ours", models.checkpoint(variant, size)).model
        return models.decode_bytes(model, PROMPT, NEW), models.flops(model.config, PROMPT, NEW, NEW)

    return Case(
        suite="decode",
        operation=f"decode of {NEW} tokens after {PROMPT}",
        shape=f"{size} {variant} float32",
        backends=DENSE,
        make=lambda i: models.text(models.checkpoint(variant, size)),
        judge=_judge,
        cost=cost,
        tokens=NEW,
        rotate=False,
        threads=1 if size == "tiny" else CORES,
    )


class Quantized(Checkpoint):
    """Linears and experts in four bits, groups of 32; embeddings in eight, with one scale a row."""

    def __init__(self, path: Path):
        super().__init__(path)
        with torch.device("meta"):
            self.model = Gemma4(self.config)

    def quantized(self, name: str) -> QuantizedTensor | None:
        if not can_pack(self.model, name):
            return None
        config = QuantConfig(8, None) if name.startswith("embed_tokens") else QuantConfig(4, 32)
        return quantize(super().tensor(name), config, torch.bfloat16)


class Dequantized(Quantized):
    """Dense weights with the same values."""

    def tensor(self, name: str) -> Tensor:
        weight = super().quantized(name)
        return super().tensor(name) if weight is None else weight.dequantize()

    def quantized(self, name: str) -> None:
        return None


@functools.cache
def _bfloat16(path: Path, weights: type[Quantized]) -> Gemma4:
    return Gemma4.from_weights(weights(path), torch.bfloat16)


@functools.cache
def _exact(path: Path) -> tuple[Tensor, Any]:
    """Logits of the dequantized weights in float32, and which experts they took."""
    model = Gemma4.from_weights(Dequantized(path), torch.float32)
    for module in model.modules():
        if isinstance(scales := getattr(module, "scale", None), dict):
            scales[torch.float32] = scales[torch.bfloat16]
    values = _recorded(model, models.text(path), {})
    return values["logits"], routing_of(values, model.config.top_k_experts)


def _recorded(model: Gemma4, given: Text, routing: Any) -> dict[str, Tensor]:
    with taps.recording(taps.Recorder(1, PROMPT + NEW, routing=routing)) as recorder, torch.no_grad():
        cache = model.make_cache(1, PROMPT + NEW, max_chunk=PROMPT)
        model(given.prompt, cache=cache)
        for token in given.rest.split(1, dim=1):
            model(token, cache=cache)
    return recorder.values


@functools.cache
def _routed(path: Path, weights: type[Quantized]) -> Tensor:
    """The logits that are judged: with the experts that the exact run took, because a tie is no error."""
    return _recorded(_bfloat16(path, weights), models.text(path), _exact(path)[1])["logits"]


def _quantized(variant: str) -> Case:
    small = {"hidden_size_per_layer_input": 64} if variant == "E2B" else {}
    small |= {"moe_intermediate_size": 256} if variant == "26B-A4B" else {}

    def path() -> Path:
        return models.checkpoint(variant, "small", "bfloat16", **small)

    def backend(name: str, weights: type[Quantized], ours: bool) -> Backend:
        def prepare(given: Text) -> Call:
            model = _bfloat16(given.path, weights)

            def before() -> None:
                prepare.cache = model.make_cache(1, PROMPT + NEW, max_chunk=PROMPT)
                prefill(model, given.prompt, prepare.cache)

            @torch.inference_mode()
            def run() -> None:
                for token in given.rest.split(1, dim=1):
                    model(token, cache=prepare.cache, logits="last")

            return Call(run, before)

        return Backend(name, prepare, ours=ours, read=lambda _: _routed(path(), weights))

    def judge(given: Text) -> Callable[[Any], Any]:
        return close_to([_exact(given.path)[0].double()], [_routed(given.path, Dequantized)], torch.bfloat16)

    return Case(
        suite="decode",
        operation=f"decode of {NEW} tokens after {PROMPT}",
        shape=f"small {variant} bfloat16 and int4",
        backends=[backend("gemma4 int4", Quantized, True), backend("gemma4 bfloat16", Dequantized, False)],
        make=lambda i: models.text(path()),
        judge=judge,
        cost=lambda: (models.decode_bytes(_bfloat16(path(), Quantized), PROMPT, NEW), 0),
        dtype=torch.bfloat16,
        tokens=NEW,
        rotate=False,
        threads=CORES,
    )


class StepByStep:
    """What one writes first: the module is an argument, taken apart and put together again in every step."""

    def __init__(self, path: Path):
        from flax import nnx

        from gemma4_impl.nnx.load import from_pretrained

        def step(model: Any, token: Any, cache: Any) -> tuple:
            logits, cache = model(token, cache=cache, logits="last")
            return logits[:, -1:].argmax(axis=-1), cache

        self.model, self.step = from_pretrained(path, "float32"), nnx.jit(step)

    def ready(self, prompt: Tensor) -> None:
        import jax.numpy as jnp

        from gemma4_impl.nnx.cache import make_cache

        cache = make_cache(self.model.config, 1, PROMPT + GREEDY)
        self.token, self.cache = self.step(self.model, jnp.asarray(prompt.numpy()), cache)
        self.token.block_until_ready()

    def decode(self) -> list[int]:
        tokens = []
        for _ in range(GREEDY):
            self.token, self.cache = self.step(self.model, self.token, self.cache)
            tokens.append(self.token)
        return [int(token[0, 0]) for token in tokens]


class OneDispatch:
    """All steps in one call of a compiled program."""

    def __init__(self, path: Path):
        from gemma4_impl.nnx.engine import Generator
        from gemma4_impl.nnx.load import from_pretrained

        self.engine = Generator(from_pretrained(path, "float32"), segment=GREEDY)

    def ready(self, prompt: Tensor) -> None:
        cache = self.engine.make_cache(1, PROMPT + GREEDY)
        self.decoding = self.engine.start(*self.engine.prefill(prompt.tolist(), cache), stop=())
        self.decoding.token.block_until_ready()

    def decode(self) -> list[int]:
        tokens, self.decoding = self.engine.decode(self.decoding)
        return [int(token) for token in tokens[0]]


class InTorch:
    def __init__(self, path: Path):
        self.model = Gemma4.from_pretrained(path, torch.float32)

    @torch.inference_mode()
    def ready(self, prompt: Tensor) -> None:
        self.cache = self.model.make_cache(1, PROMPT + GREEDY)
        self.token = prefill(self.model, prompt, self.cache).argmax(dim=-1, keepdim=True)

    @torch.inference_mode()
    def decode(self) -> list[int]:
        tokens = []
        for _ in range(GREEDY):
            self.token = self.model(self.token, cache=self.cache, logits="last")[:, -1].argmax(dim=-1, keepdim=True)
            tokens.append(int(self.token))
        return tokens


def _greedy(variant: str) -> Case:
    def backend(name: str, kind: type, **options: Any) -> Backend:
        def prepare(given: Text) -> Call:
            runner = kind(given.path)
            return Call(runner.decode, before=lambda: runner.ready(given.prompt))

        return Backend(name, prepare, **options)

    def judge(given: Text) -> Callable[[Any], Any]:
        runner = InTorch(given.path)
        runner.ready(given.prompt)
        return equal_to(runner.decode())

    return Case(
        suite="decode",
        operation=f"greedy decode of {GREEDY} tokens after {PROMPT}",
        shape=f"tiny {variant} float32",
        backends=[
            backend("JAX, our model in one dispatch", OneDispatch, ours=True, absent=models.JAX, wall=True),
            backend("JAX, our model step by step", StepByStep, absent=models.JAX, wall=True),
            backend("gemma4", InTorch),
        ],
        make=lambda i: models.text(models.checkpoint(variant, "tiny")),
        judge=judge,
        tokens=GREEDY,
        rotate=False,
        threads=1,
    )


CONTEXTS = {"31B, whole": (2048, 32768), "31B, 6 layers": (2048,)}
GIVEN = [Given(name, context) for name in NAMES for context in CONTEXTS.get(name, (40,))]
CASES = [
    *(_dense(size, variant) for size in SIZES for variant in VARIANTS),
    *(_quantized(variant) for variant in VARIANTS),
    *(decode_case(given, decode_backend(given)) for given in GIVEN),
]


@timed
@grid(CASES)
def test_decode(benchmark: Any, rows: Any, case: Case, backend: str) -> None:
    publish(benchmark, rows(case)[backend])


@timed
@grid([_greedy("E2B")])
def test_greedy(benchmark: Any, rows: Any, case: Case, backend: str) -> None:
    found = rows(case)
    publish(benchmark, found[backend])
    fast, slow = (found.get(f"JAX, our model {how}") for how in ("in one dispatch", "step by step"))
    if found[backend] is fast and fast.times and slow and slow.times and ratio(fast, slow) < JAX_FLOOR:
        pytest.fail(f"only {ratio(fast, slow):.1f} times as fast as step by step")
