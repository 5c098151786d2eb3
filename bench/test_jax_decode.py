"""Decode in JAX on the CPU: many steps in one dispatch, against a module jitted step by step and our PyTorch."""

import functools
import statistics
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from gemma4_impl.generate import decode_one_token, prefill
from gemma4_impl.model.decoder import Gemma4 as TorchGemma4
from gemma4_impl.nnx.cache import KVCache, make_cache
from gemma4_impl.nnx.decoder import Gemma4
from gemma4_impl.nnx.engine import Generator
from gemma4_impl.nnx.load import from_pretrained
from reference.tiny import make_tiny

PROMPT, NEW = 64, 64
VARIANTS = ("E2B", "26B-A4B", "31B")


@nnx.jit
def step(model: Gemma4, token, cache: KVCache) -> tuple:
    """What one writes first: the module is an argument, taken apart and put together again in every step."""
    logits, cache = model(token, cache=cache, logits="last")
    return logits[:, -1:].argmax(axis=-1), cache


class StepByStep:
    """Each of these decodes greedily: `ready` makes a cache with the prompt in it, `decode` gives NEW more tokens."""

    def __init__(self, path: Path):
        self.model = from_pretrained(path, "float32")
        self._prefill = nnx.jit(lambda model, tokens, cache: model(tokens, cache=cache, logits="last"))

    def ready(self, prompt: list[int]) -> None:
        cache = make_cache(self.model.config, 1, PROMPT + NEW)
        logits, self.cache = self._prefill(self.model, jnp.array([prompt]), cache)
        self.token = logits[:, -1:].argmax(axis=-1)

    def decode(self) -> list[int]:
        tokens = []
        for _ in range(NEW):
            self.token, self.cache = step(self.model, self.token, self.cache)
            tokens.append(self.token)
        return np.concatenate(tokens, axis=1)[0].tolist()


class OneDispatch:
    def __init__(self, path: Path):
        self.engine = Generator(from_pretrained(path, "float32"), segment=NEW)

    def ready(self, prompt: list[int]) -> None:
        cache = self.engine.make_cache(1, PROMPT + NEW)
        self.decoding = self.engine.start(*self.engine.prefill([prompt], cache), stop=())
        self.decoding.token.block_until_ready()

    def decode(self) -> list[int]:
        tokens, self.decoding = self.engine.decode(self.decoding)
        return np.asarray(tokens)[0].tolist()


class Torch:
    def __init__(self, path: Path):
        self.model = TorchGemma4.from_pretrained(path, torch.float32)

    def ready(self, prompt: list[int]) -> None:
        self.cache = self.model.make_cache(1, PROMPT + NEW)
        self.token = prefill(self.model, torch.tensor([prompt]), self.cache).argmax(dim=-1, keepdim=True)

    def decode(self) -> list[int]:
        tokens = []
        for _ in range(NEW):
            self.token = decode_one_token(self.model, self.token, self.cache)
            tokens.append(int(self.token))
        return tokens


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory):
    """variant -> prompt and runners; nothing is timed unless all of them decode the same tokens."""

    @functools.cache
    def make(variant: str):
        path = make_tiny(variant, tmp_path_factory.mktemp("bench") / variant)
        prompt = np.random.default_rng(0).integers(107, 512, PROMPT).tolist()
        runners = {"one dispatch": OneDispatch(path), "step by step": StepByStep(path), "torch": Torch(path)}
        tokens = {}
        for name, runner in runners.items():
            runner.ready(prompt)
            tokens[name] = runner.decode()
        if any(other != tokens["torch"] for other in tokens.values()):
            pytest.fail(f"not in parity: {tokens}; no time is published")
        return prompt, runners

    return make


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("variant", VARIANTS)
def test_ratio_tiny(benchmark, runs, variant: str) -> None:
    """In turn in every round, because a machine's speed changes from one second to the next."""
    prompt, runners = runs(variant)
    times: dict[str, list[float]] = {name: [] for name in runners}

    def alternate() -> None:
        for name, runner in runners.items():
            runner.ready(prompt)
            start = time.perf_counter()
            runner.decode()
            times[name].append(time.perf_counter() - start)

    benchmark.group = f"decode {NEW} tokens after {PROMPT} in JAX"
    benchmark.pedantic(alternate, rounds=7, warmup_rounds=1)
    benchmark.extra_info.update({f"{name} us/token": statistics.median(t) / NEW * 1e6 for name, t in times.items()})
    ours, ratios = times.pop("one dispatch"), {}
    for name, peer in times.items():
        ratios[name] = statistics.median(p / o for p, o in zip(peer, ours, strict=True))
        benchmark.extra_info[f"decode {NEW} tokens in one dispatch, tiny {variant}: times as fast as {name}"] = ratios[
            name
        ]
    assert ratios["step by step"] >= 5, ratios
