"""Prefill and decode on the CPU: ours and Hugging Face with its own cache, on the same weights and threads."""

import functools
import os
import statistics
import time
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from gemma4_impl.generate import prefill
from gemma4_impl.model.decoder import Gemma4
from parity.budget import check_total
from parity.metrics import measure
from reference.hf import HFReference
from reference.tiny import make_tiny

PROMPT, NEW = 128, 32
SIZES = {
    "tiny": {},
    "small": {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "head_dim": 64,
        "global_head_dim": 128,
        "sliding_window": 64,
    },
}
BACKENDS = ("ours", "hf_eager", "hf_sdpa")
VARIANTS = ("E2B", "26B-A4B", "31B")
OPERATIONS = {"prefill": f"prefill {PROMPT} tokens", "decode": f"decode {NEW} tokens after {PROMPT}"}


class Ours:
    def __init__(self, path: Path):
        self.model = Gemma4.from_pretrained(path, torch.float32)

    def prefill(self, tokens: torch.Tensor) -> torch.Tensor:
        self.cache = self.model.make_cache(1, PROMPT + NEW, max_chunk=PROMPT)
        return prefill(self.model, tokens, self.cache)

    # As `decode_one_token` runs it; transformers' own generate runs under no_grad.
    @torch.inference_mode()
    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Feeds tokens [1, n] one by one; logits [1, n, V]."""
        return torch.cat([self.model(t, cache=self.cache, logits="last") for t in tokens.split(1, dim=1)], dim=1)


class HuggingFace:
    def __init__(self, path: Path, attention: str):
        self.model = HFReference(path, torch.float32).model
        self.model.set_attn_implementation(attention)

    def prefill(self, tokens: torch.Tensor) -> torch.Tensor:
        self.cache = DynamicCache(config=self.model.config)
        return self._step(tokens)[:, -1]

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.cat([self._step(t) for t in tokens.split(1, dim=1)], dim=1)

    @torch.no_grad()
    def _step(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory):
    @functools.cache
    def make(variant: str, size: str) -> Path:
        return make_tiny(variant, tmp_path_factory.mktemp("bench") / f"{variant}-{size}", overrides=SIZES[size])

    return make


@pytest.fixture(scope="module")
def runs(checkpoint):
    """(variant, size) -> prompt [1, PROMPT], continuation [1, NEW], truth's logits [1, NEW + 1, V], and runners."""

    @functools.cache
    def make(variant: str, size: str):
        path = checkpoint(variant, size)
        tokens = torch.randint(107, 512, (1, PROMPT + NEW), generator=torch.Generator().manual_seed(0))
        truth = HFReference(path, torch.float32, truth=True).capture([tokens[0].tolist()], glob="logits")["logits"]
        runners = {"ours": Ours(path)} | {f"hf_{a}": HuggingFace(path, a) for a in ("eager", "sdpa")}
        return tokens[:, :PROMPT], tokens[:, PROMPT:], truth[:, PROMPT - 1 :], runners

    return make


@pytest.fixture(autouse=True)
def _threads(size: str):
    """On the tiny size a second thread only waits for the first; both sides get the same number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if size == "tiny" else os.cpu_count())
    yield
    torch.set_num_threads(before)


def _in_parity(runs, variant: str, size: str, backend: str) -> None:
    """A row publishes nothing unless its logits, prefill and decode, are in budget."""
    prompt, rest, truth, runners = runs(variant, size)
    errors = {}
    for name in {backend, "hf_eager"}:
        logits = torch.cat([runners[name].prefill(prompt)[:, None], runners[name].decode(rest)], dim=1)
        errors[name] = measure(logits, truth)
    (check,) = check_total(errors[backend].rel_l2, [errors["hf_eager"].rel_l2], torch.float32).values()
    if check.red:
        pytest.fail(f"not in parity: rel-L2 {check.error:.2e}, allowed {check.allowed:.2e}; no time is published")


def _timed(runs, size: str, variant: str, operation: str, backend: str):
    """What to time, and what to call before each time."""
    prompt, rest, _, runners = runs(variant, size)
    runner = runners[backend]

    def before() -> None:
        runner.prefill(prompt)

    if operation == "prefill":
        return before, lambda: None
    return lambda: runner.decode(rest), before


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_each(benchmark, runs, operation: str, size: str, variant: str, backend: str) -> None:
    _in_parity(runs, variant, size, backend)
    step, before = _timed(runs, size, variant, operation, backend)
    benchmark.group = f"{OPERATIONS[operation]}, {size} {variant}"
    benchmark.pedantic(step, setup=before, rounds=6, warmup_rounds=1)
    benchmark.extra_info.update(backend=backend, threads=torch.get_num_threads())
    if benchmark.enabled:
        tokens = PROMPT if operation == "prefill" else NEW
        benchmark.extra_info["tokens_per_second"] = tokens / benchmark.stats.stats.median


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_ratio(benchmark, runs, operation: str, size: str, variant: str) -> None:
    """One after the other in every round, because a machine's speed changes from one second to the next."""
    steps = {}
    for backend in BACKENDS:
        _in_parity(runs, variant, size, backend)
        steps[backend] = _timed(runs, size, variant, operation, backend)
    times: dict[str, list[float]] = {backend: [] for backend in BACKENDS}

    def alternate() -> None:
        for backend, (step, before) in steps.items():
            before()
            start = time.perf_counter()
            step()
            times[backend].append(time.perf_counter() - start)

    benchmark.group = f"{OPERATIONS[operation]}, ratios"
    benchmark.pedantic(alternate, rounds=15 if operation == "prefill" or size == "tiny" else 8, warmup_rounds=1)
    ours = times.pop("ours")
    for backend, peer in times.items():
        ratio = statistics.median(p / o for p, o in zip(peer, ours, strict=True))
        benchmark.extra_info[f"{OPERATIONS[operation]}, {size} {variant}: times as fast as {backend}"] = ratio
