"""Decode on the CPU in bfloat16: four-bit linears and eight-bit embeddings against dense weights of the same values."""

import os
import statistics
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gemma4_impl import taps
from gemma4_impl.checkpoint import Checkpoint
from gemma4_impl.generate import bytes_per_token, prefill
from gemma4_impl.model.decoder import Gemma4
from gemma4_impl.quant.pack import can_pack
from gemma4_impl.quant.quantize import quantize
from gemma4_impl.quant.recipe import QuantConfig
from gemma4_impl.quant.tensor import QuantizedTensor
from parity.budget import check_total
from parity.compare import routing_of
from parity.metrics import measure
from reference.tiny import make_tiny

PROMPT, NEW, ROUNDS = 128, 32, 8
SMALL = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "moe_intermediate_size": 256,
    "hidden_size_per_layer_input": 64,
    "head_dim": 64,
    "global_head_dim": 128,
    "sliding_window": 64,
}


class Quantized(Checkpoint):
    """Linears and experts in four bits, groups of 32; embeddings in eight, with one scale a row."""

    def quantized(self, name: str) -> QuantizedTensor | None:
        if not can_pack(self.model, name):
            return None
        config = QuantConfig(8, None) if name.startswith("embed_tokens") else QuantConfig(4, 32)
        return quantize(super().tensor(name), config, torch.bfloat16)

    def __init__(self, path: Path):
        super().__init__(path)
        with torch.device("meta"):
            self.model = Gemma4(self.config)


class Dequantized(Quantized):
    def tensor(self, name: str) -> Tensor:
        weight = super().quantized(name)
        return super().tensor(name) if weight is None else weight.dequantize()

    def quantized(self, name: str) -> None:
        return None


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count())
    yield
    torch.set_num_threads(before)


@torch.inference_mode()
def decode(model: Gemma4, cache, tokens: Tensor) -> None:
    for token in tokens.split(1, dim=1):
        model(token, cache=cache, logits="last")


def check(models: dict[str, Gemma4], path: Path, prompt: Tensor, rest: Tensor) -> None:
    """No time is published for what is not in parity with its own dequantized weights."""
    routing, logits = {}, {}
    exact = Gemma4.from_weights(Dequantized(path), torch.float32)
    for module in exact.modules():
        if isinstance(scales := getattr(module, "scale", None), dict):
            scales[torch.float32] = scales[torch.bfloat16]
    for name, model in {"truth": exact, **models}.items():
        length = PROMPT + NEW
        with taps.recording(taps.Recorder(1, length, routing=routing)) as recorder, torch.no_grad():
            cache = model.make_cache(1, length, max_chunk=PROMPT)
            model(prompt, cache=cache)
            for token in rest.split(1, dim=1):
                model(token, cache=cache)
        logits[name] = recorder.values["logits"]
        routing = routing or routing_of(recorder.values, model.config.top_k_experts)
    errors = {name: measure(logits[name], logits["truth"]).rel_l2 for name in models}
    (result,) = check_total(errors["int4"], [errors["bfloat16"]], torch.bfloat16).values()
    if result.red:
        pytest.fail(f"not in parity: rel-L2 {result.error:.2e}, allowed {result.allowed:.2e}; no time is published")


@pytest.mark.parametrize("variant", ["E2B", "26B-A4B", "31B"])
def test_ratio(benchmark, tmp_path, variant: str) -> None:
    """Both in turn in every round, because a machine's speed changes from one second to the next."""
    sizes = dict(SMALL)
    if variant != "E2B":
        del sizes["hidden_size_per_layer_input"]
    if variant != "26B-A4B":
        del sizes["moe_intermediate_size"]
    path = make_tiny(variant, tmp_path / variant, dtype="bfloat16", overrides=sizes)
    models = {
        "bfloat16": Gemma4.from_weights(Dequantized(path), torch.bfloat16),
        "int4": Gemma4.from_weights(Quantized(path), torch.bfloat16),
    }
    tokens = torch.randint(107, 512, (1, PROMPT + NEW), generator=torch.Generator().manual_seed(0))
    prompt, rest = tokens.split([PROMPT, NEW], dim=1)
    check(models, path, prompt, rest)
    times: dict[str, list[float]] = {name: [] for name in models}

    def alternate() -> None:
        for name, model in models.items():
            cache = model.make_cache(1, PROMPT + NEW, max_chunk=PROMPT)
            prefill(model, prompt, cache)
            start = time.perf_counter()
            decode(model, cache, rest)
            times[name].append(time.perf_counter() - start)

    benchmark.group = f"decode {NEW} tokens after {PROMPT}, int4 against bfloat16"
    benchmark.pedantic(alternate, rounds=ROUNDS, warmup_rounds=1)
    speeds = {f"{name}_tokens_per_second": NEW / statistics.median(taken) for name, taken in times.items()}
    sizes = {f"{name}_mb_per_token": bytes_per_token(model, PROMPT) / 1e6 for name, model in models.items()}
    benchmark.extra_info.update(speeds | sizes | {"threads": torch.get_num_threads()})
    ratio = statistics.median(b / q for b, q in zip(times["bfloat16"], times["int4"], strict=True))
    benchmark.extra_info[f"decode {NEW} tokens, small {variant}, int4: times as fast as bfloat16"] = ratio
    print(f"\n{variant}: " + ", ".join(f"{name} {value:.1f}" for name, value in (speeds | sizes).items()))
