"""The engine on an NVIDIA GPU: as accurate as the eager model in bfloat16, graphs that compute what the step computes,
and no more memory than it says."""

import dataclasses

import pytest
import torch
from engine_models import NAMES, small, tokens
from torch import Tensor

from gemma4_impl.config import VARIANTS, TextConfig
from gemma4_impl.engine import Engine, PackedModel, RandomWeights, Session, generate, random_model
from gemma4_impl.engine.profile import profile
from gemma4_impl.engine.random_checkpoint import random_checkpoint
from gemma4_impl.generation import Sampling
from gemma4_impl.model.decoder import Gemma4
from gemma4_impl.tokenizer import Tokenizer

pytestmark = pytest.mark.cuda
STEPS = 6


class Dense(RandomWeights):
    """The values of the quantized weights as dense tensors."""

    def quantized(self, name: str) -> None:
        return None

    def tensor(self, name: str) -> Tensor:
        weight = super().quantized(name)
        return super().tensor(name) if weight is None else weight.dequantize()


def middle(variant: str) -> TextConfig:
    """Real heads and widths of kernels, fewer layers and rows."""
    config = VARIANTS[variant]
    layers = {"E2B": config.layer_types[:5] * 2, "E4B": config.layer_types[:6] * 2}.get(variant, config.layer_types[:6])
    sizes = {"layer_types": layers, "num_hidden_layers": len(layers), "sliding_window": 64, "vocab_size": 2048}
    sizes |= {"vocab_size_per_layer_input": 2048, "hidden_size": 1024, "intermediate_size": 2048}
    if config.num_kv_shared_layers:
        sizes["num_kv_shared_layers"] = len(layers) // 2
    if config.enable_moe_block:
        sizes |= {"num_experts": 16, "moe_intermediate_size": 256}
    return dataclasses.replace(config, **sizes)


def as_trained(model: Gemma4, dtype: torch.dtype = torch.bfloat16) -> Gemma4:
    """Embedding scales as they are rounded in `dtype`: they belong to the weights, not to the arithmetic."""
    for module in model.modules():
        if isinstance(scales := getattr(module, "scale", None), dict):
            scales[model.dtype] = scales[dtype]
    return model


@torch.inference_mode()
def forced(model: PackedModel, ids: Tensor, prompt: int, chunk: int) -> Tensor:
    """Logits [STEPS + 1, V] after the prompt and after each of the tokens that follow it."""
    session = Session(model, 1, 256, max_chunk=chunk)
    logits = [session.prefill(ids[:prompt])]
    session.start(logits[0][None])
    for token in ids[prompt:]:
        session.step.token.copy_(token)
        next(session.decode(1))
        logits.append(session.step.logits[0].clone())
    return torch.stack(logits).double()


@pytest.mark.parametrize(
    ("variant", "size", "recipe"),
    [
        *((variant, middle, recipe) for variant in NAMES for recipe in ("default", None)),
        ("31B", middle, "compact"),
        ("31B", small, "default"),
        ("E2B", small, "default"),
    ],
)
def test_logits_are_as_accurate_as_the_eager_models(variant, size, recipe):
    """Errors from float64, over all logits: at most twice that of the dense model in bfloat16."""
    config, prompt = size(variant), 150
    ids = tokens(prompt + STEPS).cuda()
    weights, dense = RandomWeights(config, "cuda", recipe), Dense(config, "cuda", recipe)
    with torch.inference_mode():
        truth = as_trained(Gemma4.from_weights(dense, torch.float64, "cuda"))(ids[None])[0, -STEPS - 1 :]
        eager = Gemma4.from_weights(dense, torch.bfloat16, "cuda")(ids[None])[0, -STEPS - 1 :].double()
    got = forced(PackedModel.from_weights(weights, torch.bfloat16, "cuda"), ids, prompt, 64)
    error, allowed = ((x - truth).norm() / truth.norm() for x in (got, eager))
    assert error < 2 * allowed


@pytest.mark.parametrize(("variant", "recipe"), [*((variant, "default") for variant in NAMES), ("31B", None)])
def test_a_replay_is_the_step_bit_for_bit(variant, recipe):
    model = random_model(middle(variant), "cuda", recipe)
    how = Sampling(temperature=1.0, top_k=40, top_p=0.9, seed=1)
    drawn, logits = [], []
    for eager in (False, True):
        session = Session(model, 1, 256)
        first = session.start(session.prefill(tokens(100).cuda())[None], how)
        if eager:
            session.graph = None
        drawn.append([first, *session.decode(20)])
        torch.cuda.synchronize()
        logits.append(session.step.logits.clone())
    assert drawn[0] == drawn[1]
    assert torch.equal(*logits)


@pytest.mark.parametrize("variant", ["E4B", "26B-A4B"])
def test_rows_of_a_batch_are_what_they_are_alone(variant):
    """Greedily, in float32, where no rounding decides."""
    model = random_model(small(variant), "cuda", None, dtype=torch.float32)
    prompts = [tokens(n, seed=n).cuda() for n in (3, 40, 17)]
    together = Session(model, 3, 128, max_chunk=16)
    logits = torch.stack([together.prefill(ids, row=row) for row, ids in enumerate(prompts)])
    out = [together.start(logits), *together.decode(20)]
    for row, ids in enumerate(prompts):
        alone = Session(model, 1, 128, max_chunk=16)
        expected = [alone.start(alone.prefill(ids)[None]), *alone.decode(20)]
        assert [step[row] for step in out] == [step[0] for step in expected]


def test_a_session_changes_how_it_samples():
    session = Session(random_model(small("31B"), "cuda"), 1, 128)
    out = []
    for how in (Sampling(seed=1), Sampling(seed=1), Sampling(seed=2), Sampling(temperature=0), Sampling(seed=1)):
        session.reset()
        out.append([session.start(session.prefill(tokens(20).cuda())[None], how), *session.decode(20)])
    assert out[0] == out[1] == out[4]
    assert out[0] != out[2]


def test_memory_is_weights_and_caches_and_five_percent():
    """Prefill of chunks of 2048 and decoding, on a model of 3.6 GB with caches of 0.9 GB."""
    layers = VARIANTS["31B"].layer_types[:12]
    config = dataclasses.replace(VARIANTS["31B"], num_hidden_layers=len(layers), layer_types=layers)
    model = random_model(config, "cuda")
    session = Session(model, 1, 16_384)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    logits = session.prefill(torch.randint(0, 200_000, (8192,), device="cuda"))
    session.start(logits[None], Sampling())
    assert len(list(session.decode(20))) == 20
    whole = VARIANTS["31B"].num_hidden_layers / len(layers)
    allowed = 0.05 * (model.nbytes + session.cache.nbytes) * whole  # activations do not grow with layers
    assert torch.cuda.max_memory_allocated() - model.nbytes - session.cache.nbytes < allowed


def test_the_profile_of_a_graph():
    session = Session(random_model(middle("31B"), "cuda"), 1, 256)
    session.start(session.prefill(tokens(100).cuda())[None])
    result = profile(session)
    assert result.context == 101
    assert sum(part.seconds for part in result.parts) > 0
    assert result.copy > 1e11
    assert len(list(session.decode(4))) == 4


def test_generates_and_stops_while_a_step_runs_ahead(tmp_path, monkeypatch):
    random_checkpoint(small("E4B"), tmp_path / "m", device="cuda")
    fast, tokenizer = Engine.from_pretrained(tmp_path / "m", device="cuda"), Tokenizer.from_pretrained(tmp_path / "m")
    fast.model = dataclasses.replace(fast.model, config=dataclasses.replace(fast.model.config, eos_token_id=()))
    monkeypatch.setattr(tokenizer, "stop_ids", frozenset())  # random weights may draw any token
    options = {"max_new_tokens": 40, "temperature": 1.0, "top_k": 64, "seed": 3}
    whole = generate(fast, tokenizer, "naïve", **options)
    assert (len(whole.tokens), whole.stop_reason) == (40, "length")
    at = next(i for i in range(5, 40) if whole.tokens[i] not in whole.tokens[:i])
    monkeypatch.setattr(tokenizer, "stop_ids", frozenset([whole.tokens[at]]))
    stopped = generate(fast, tokenizer, "naïve", **options)
    assert (stopped.stop_reason, stopped.tokens) == ("eos", whole.tokens[: at + 1])
    monkeypatch.setattr(tokenizer, "stop_ids", frozenset())
    assert generate(fast, tokenizer, "naïve", **options).tokens == whole.tokens
