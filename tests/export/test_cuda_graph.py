"""The graphs for CUDA: what they compute on a CPU, which kernels they hold, and what is refused."""

import math

import pytest
import torch
from cuda_programs import (
    CHUNK,
    CONTEXT,
    VOCAB,
    chunked,
    dense,
    eager,
    exported,
    prompt,
    session,
    settings,
    weights,
    whole,
)
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from gemma4_impl.engine import PackedModel
from gemma4_impl.engine import Session as EngineSession
from gemma4_impl.export import cuda, cuda_graph, source
from gemma4_impl.export.cuda_graph import check_whole, draw, export_programs, kernel_choices
from gemma4_impl.generation import Sampling
from gemma4_impl.kernels.steps import naive, sampling_state
from gemma4_impl.model.cache import KVCache
from gemma4_impl.quant.quantize import quantize
from gemma4_impl.quant.recipe import QuantConfig
from parity.budget import check_total

CASES = {
    "dense": ("31B", False, torch.float32),
    "PLE, KV sharing, quantized": ("E2B", True, torch.float32),
    "MoE, quantized": ("26B-A4B", True, torch.float32),
    "MoE, bfloat16": ("26B-A4B", False, torch.bfloat16),
}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """name -> its programs, exported once."""
    made = {}

    def make(name: str):
        if name not in made:
            variant, quantized, dtype = CASES[name]
            made[name] = exported(weights(variant, tmp_path_factory.mktemp("tiny") / "m", quantized), dtype, top_k=5)
        return made[name]

    return make


def error(got: Tensor, truth: Tensor) -> float:
    return float((got.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("name", CASES)
def test_ragged_chunks_and_decode_equal_the_full_forward(name, case):
    """Within twice what the eager model is wrong by; then again after a reset."""
    found, tokens = case(name), prompt()
    truth = whole(dense(found.checkpoint, torch.float64), tokens)
    model = dense(found.checkpoint, found.dtype)
    references = [error(out, truth) for out in (eager(model, tokens), whole(model, tokens))]
    program = session(found, 5)
    first = chunked(program.forward, tokens)
    assert not check_total(error(first, truth), references, found.dtype)["total"].red
    program.reset()
    chunked(program.forward, prompt(seed=2))
    program.reset()
    assert torch.equal(chunked(program.forward, tokens), first)


@pytest.mark.parametrize(
    ("name", "sampling"),
    [
        ("PLE, KV sharing, quantized", Sampling(temperature=0)),
        ("MoE, quantized", Sampling(20.0, top_k=5, seed=7)),
    ],
)
def test_decode_is_the_engines(name, sampling, case):
    """The engine's step and ours draw the same tokens, and both are as near to the truth."""
    found, tokens = case(name), prompt(20)
    engine = EngineSession(PackedModel.from_weights(found.checkpoint), 1, CONTEXT, CHUNK)
    first = engine.start(engine.prefill(tokens[0])[None], sampling)[0]
    expected = [token for (token,) in engine.decode(20)]
    program = session(found, 5)
    for part in tokens.split(CHUNK, dim=1):
        program.forward(part, program.length)
    program.start(first, sampling)
    # The engine has drawn its first token already.
    program.state["state"][1] = int(sampling.temperature > 0)
    assert list(program.decode(20)) == expected
    assert len(set(expected)) > 3
    fed = torch.cat([tokens, torch.tensor([[first, *expected[:-1]]])], dim=1)
    with torch.no_grad():
        truth = dense(found.checkpoint, torch.float64)(fed)[:, -1]
    reference = error(engine.step.logits, truth)
    assert not check_total(error(program.state["logits"], truth), [reference], torch.float32)["total"].red
    with pytest.raises(ValueError, match="draws with top_k = 5 and without top_p"):
        program.start(first, Sampling(1.0, top_k=64))


@hypothesis_settings(max_examples=25, deadline=None)
@given(
    temperature=st.sampled_from([0.0, 0.3, 1.0, 5.0]),
    top_k=st.sampled_from([None, 1, 3, 40]),
    seed=st.integers(0, 2**64 - 1),
    ties=st.booleans(),
)
def test_draw_is_the_definition(temperature, top_k, seed, ties) -> None:
    logits = 3 * torch.randn(1, 40, generator=torch.Generator().manual_seed(seed % 1000))
    logits = logits.round() if ties else logits
    ours, theirs = sampling_state(seed, "cpu"), sampling_state(seed, "cpu")
    for _ in range(3):
        expected = naive.sample(logits, temperature, top_k if temperature else None, None, theirs)
        assert torch.equal(draw(logits, torch.tensor([temperature]), top_k, ours), expected)
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("bad", [[math.nan, 0.0], [-math.inf, -math.inf]])
def test_no_distribution(bad) -> None:
    assert draw(torch.tensor([bad]), torch.ones(1), None, sampling_state(0, "cpu")).tolist() == [-1]


def test_no_mask_is_left(case):
    """Nothing in prefill is as large as the chunk times the context."""
    found = case("PLE, KV sharing, quantized")
    for name, program in found.programs.items():
        for node in program.graph.nodes:
            shape = getattr(node.meta.get("val"), "shape", ())
            long = [n for n in shape if n in (*found.cache.capacity.values(),)]
            symbols = [n for n in shape if isinstance(n, torch.SymInt)]
            assert not (long and symbols), f"{name}: {node.name} is {shape}"
        assert not any("iand" in str(node.target) for node in program.graph.nodes)


def test_choice_of_kernels(case):
    found = case("PLE, KV sharing, quantized")
    prefill, decode = ({c.node: c for c in kernel_choices(found.programs[name])} for name in ("prefill", "decode"))
    attention = [(c.module[-11:], c.kernel) for c in prefill.values() if "sdpa" in c.kernel]
    # The last two layers share keys and values: only the last position goes through them.
    assert attention == [
        ("0.self_attn", "sdpa_prefill, positions read"),
        ("1.self_attn", "sdpa_prefill"),
        ("2.self_attn", "sdpa_decode"),
        ("3.self_attn", "sdpa_decode"),
    ]
    assert [c.kernel for c in decode.values() if "sdpa" in c.kernel] == ["sdpa_decode"] * 4
    ring = min(CONTEXT, found.model.config.sliding_window - 1 + CHUNK)
    assert next(c.shape for c in decode.values() if "sdpa" in c.kernel) == (
        f"N=4 K=1 H=16 T=1 S={ring} window={found.model.config.sliding_window}"
    )
    by_layer = {c.module: c for c in prefill.values()}
    assert by_layer["model.layers.0.mlp.gate_proj"].kernel == "dequantize + GEMM"
    assert by_layer["model.layers.0.mlp.gate_proj"].shape == "M=2..C N=64 K=96 int4 group=32"
    assert by_layer["model.layers.3.mlp.gate_proj"].kernel == "matvec"
    assert by_layer["model.lm_head"].kernel == "matvec"
    assert {c.kernel for c in decode.values() if "int" in c.shape} == {"matvec"}
    assert by_layer["model.lm_head"].shape == f"M=1 N={VOCAB} K=96 int8 group=96"


def test_experts_are_read_as_they_are_stored(case):
    found = case("MoE, quantized")
    rows = {name: [c.kernel for c in kernel_choices(found.programs[name])] for name in ("prefill", "decode")}
    assert rows["decode"].count("matvec of chosen experts") == 2 * 2
    assert rows["prefill"].count("dequantize") == 2 * 2
    dense = {name: [c.kernel for c in kernel_choices(p)] for name, p in case("MoE, bfloat16").programs.items()}
    assert dense["decode"].count("GEMV of chosen experts") == 2 * 2
    assert dense["prefill"].count("GEMM of all experts") == rows["prefill"].count("GEMM of all experts") == 2 * 2


def test_tied_weights_are_one(case):
    state = case("PLE, KV sharing, quantized").programs["decode"].state_dict
    assert state["model.lm_head.qdata"].data_ptr() == state["model.embed_tokens.qdata"].data_ptr()


def test_an_attention_that_was_not_replaced_is_an_error(tmp_path, monkeypatch):
    model = source.open_source(weights("31B", tmp_path / "m", layers=["full_attention"])).model
    monkeypatch.setattr(cuda_graph, "place_attention", lambda *args: None)
    with pytest.raises(ValueError, match=r"decode: the graph has \{'attention': 0.*but the model \{'attention': 1"):
        export_programs(model, KVCache(model.config, 1, 16, 1, torch.float32))


def test_a_linear_taken_apart_is_an_error(case):
    found = case("dense")
    with pytest.raises(ValueError, match="'quantized linear': 0"):
        check_whole(found.programs["decode"], case("MoE, quantized").model, "decode")


def test_refused(case, tmp_path):
    model = case("dense").model
    for changes, message in [
        ({"model": model, "settings": settings(), "tower": object()}, "has no vision tower"),
        ({"model": model, "settings": settings(taps=True)}, "returns no taps"),
        ({"model": model, "settings": settings(torch.bfloat16)}, "computes in torch.float32, the program in"),
        ({"model": model, "settings": settings(), "top_k": 0}, "top_k = 0: must be from 1"),
    ]:
        with pytest.raises(ValueError, match=f"^backend cuda: .*{message}"):
            cuda.lower(**changes)
    odd = source.open_source(weights("31B", tmp_path / "m", layers=["full_attention"])).model
    weight = odd.layers[0].mlp.gate_proj.weight
    odd_groups = quantize(weight.detach().repeat(1, 1)[:, :6].contiguous(), QuantConfig(4, 6), torch.float32)
    odd_groups = type(odd_groups)(odd_groups.qdata, odd_groups.scale.repeat(1, 2), None, 4, odd_groups.offset)
    assert odd_groups.group_size == 3
    odd.layers[0].mlp.gate_proj.quantized = {"weight": odd_groups}
    with pytest.raises(ValueError, match=r"gate_proj\.weight: four bits in groups of 3"):
        cuda.lower(odd, settings())
    with pytest.raises(ValueError, match="decodes one row, but the cache has 2"):
        export_programs(model, KVCache(model.config, 2, 16, 4, torch.float32))


def test_session_checks_what_it_is_fed(case):
    program = session(case("dense"), 5)
    one = torch.tensor([[5]])
    for tokens, position, message in [
        (one, 1, "position 1 does not continue the sequence, which ends at 0"),
        (torch.tensor([[VOCAB]]), 0, f"token id {VOCAB} is outside"),
    ]:
        with pytest.raises(ValueError, match=message):
            program.forward(tokens, position)
    with pytest.raises(ValueError, match="decodes from the token that"):
        list(program.decode(1))
    program.length = CONTEXT
    with pytest.raises(ValueError, match="past the end"):
        program.forward(one, CONTEXT)
    program.start(5)
    with pytest.raises(ValueError, match="1 more tokens do not fit"):
        list(program.decode(1))
    with pytest.raises(ValueError, match="token id 512 is outside"):
        program.start(VOCAB)
