"""The small steps' definitions against the model's modules, and their operators: fakes, whole graphs, refusals."""

import dataclasses
import math
import re

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_checks import normal
from steps_cases import EPS, SMALL, STEPS

from gemma4_impl.config import VARIANTS
from gemma4_impl.kernels import steps
from gemma4_impl.kernels.steps import naive
from gemma4_impl.model.cache import KVCache
from gemma4_impl.model.decoder import MLP, Attention, RMSNorm, ScaledEmbedding
from gemma4_impl.model.rope import RotaryEmbedding, apply_rotary
from gemma4_impl.model.sampler import allowed
from gemma4_impl.quant.modules import QuantizedEmbedding
from gemma4_impl.quant.packed import DequantizedWeight
from gemma4_impl.quant.tensor import QuantizedTensor

DTYPES = [torch.float32, torch.bfloat16]


def random_(module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    for i, parameter in enumerate(module.parameters()):
        parameter.data = normal(*parameter.shape, seed=i)
    return module.to(dtype).requires_grad_(False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_norm_is_what_the_layer_does(dtype: torch.dtype) -> None:
    post, pre = (random_(RMSNorm(96, EPS), dtype) for _ in range(2))
    h, x, scalar = (
        normal(2, 5, 96, seed=1, dtype=dtype),
        normal(2, 5, 96, seed=2, dtype=dtype),
        normal(1, seed=3, dtype=dtype),
    )
    r, normed = steps.add_norm(h, x, post.weight, scalar, pre.weight, EPS)
    assert torch.equal(r, (x + post(h)) * scalar)
    assert torch.equal(normed, pre(r))
    r, normed = steps.add_norm(h, x, post.weight, None, None, EPS)
    assert torch.equal(r, x + post(h))
    assert normed.numel() == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index", [0, 5])
def test_qkv_norm_rope_is_what_attention_does(index: int, dtype: torch.dtype) -> None:
    """A sliding and a full layer of the 31B, the full one with k_eq_v, made narrow."""
    config = dataclasses.replace(
        VARIANTS["31B"],
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_global_key_value_heads=1,
        head_dim=32,
        global_head_dim=48,
        sliding_window=8,
    )
    layer = config.layers[index]
    attention = random_(Attention(config, layer), dtype)
    rope = RotaryEmbedding(layer.head_dim, config.rope_parameters[layer.layer_type])
    x = normal(2, 5, 64, seed=9, dtype=dtype)
    positions = torch.tensor([[0, 1, 2, 3, 4], [-1, -1, 0, 1, 2]])
    rotary = rope(positions)
    ours, theirs = (KVCache(config, 2, 20, 5, dtype) for _ in range(2))
    keys = theirs.reserve(positions)[layer.layer_type]
    theirs.update(layer, keys, *attention.project_kv(x, rotary))
    q, k = (p(x).unflatten(-1, (-1, layer.head_dim)) for p in (attention.q_proj, attention.k_proj))
    v = k if layer.k_eq_v else attention.v_proj(x).unflatten(-1, (-1, layer.head_dim))
    caches = [getattr(ours, f"layers_{index}_{name}") for name in "kv"]
    out = steps.qkv_norm_rope(
        q, k, v, attention.q_norm.weight, attention.k_norm.weight, *rotary, *caches, keys.write, EPS
    )
    assert torch.equal(out, apply_rotary(attention.q_norm(q), *rotary))
    for name, cache in zip("kv", caches, strict=True):
        assert torch.equal(cache[:, :, :-1], getattr(theirs, f"layers_{index}_{name}")[:, :, :-1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_mul_is_what_the_mlp_does(dtype: torch.dtype) -> None:
    mlp, x = random_(MLP(32, 64), dtype), normal(3, 32, seed=9, dtype=dtype)
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    interleaved = torch.stack([gate.unflatten(-1, (-1, 8)), up.unflatten(-1, (-1, 8))], dim=-2).flatten(-3)
    for h in (steps.gelu_mul(torch.cat([gate, up], dim=-1)), steps.gelu_mul(interleaved, 8)):
        assert torch.equal(mlp.down_proj(h), mlp(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_embed_is_what_the_embedding_does(bits: int, dtype: torch.dtype) -> None:
    tokens = torch.tensor([[0, 3, 9], [1, 1, 2]])
    dense = random_(ScaledEmbedding(10, 64, scale=64**0.3), dtype)
    if bits == 16:
        out = steps.embed(tokens, dense.weight, None, None, 16, 0, dense.scale[dtype], dtype)
        assert torch.equal(out, dense(tokens))
        return
    code = torch.uint8 if bits == 4 else torch.int8
    weight = QuantizedTensor(
        torch.arange(10 * 64 * bits // 8).view(10, -1).to(code), normal(10, 2, seed=0), None, bits, 3
    )
    module = QuantizedEmbedding(DequantizedWeight(weight, dtype), dense.scale)
    out = steps.embed(tokens, weight.qdata, weight.scale, weight.zero, bits, 3, dense.scale[dtype], dtype)
    assert torch.equal(out, module(tokens))


def test_embed_of_no_token_is_nan() -> None:
    out = steps.embed(torch.tensor([-1, 2, 5]), torch.ones(5, 4), None, None, 16, 0, 2.0, torch.float32)
    assert out.isnan().all(dim=-1).tolist() == [True, False, True]


@pytest.mark.parametrize("step", STEPS)
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.data_too_large])
@given(data=st.data())
def test_operator(step: str, data: st.DataObject) -> None:
    """Schema, mutation and fake agree with what the operator does."""
    args = data.draw(STEPS[step](SMALL)).args
    if step == "embed":
        # The check takes NaN for unequal to itself.
        args = (args[0].clamp(0, len(args[1]) - 1), *args[1:])
    torch.library.opcheck(getattr(torch.ops.gemma4, step).default, args)


def test_sample_operator() -> None:
    for how in [(0.0, None, None), (1.0, 5, 0.9)]:
        args = (normal(2, 50, seed=0), *how, steps.sampling_state(1, "cpu"))
        torch.library.opcheck(torch.ops.gemma4.sample.default, args)


class Decoding(torch.nn.Module):
    """A norm, a head, a draw and an embedding, with the state of the draws in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(normal(40, 16, seed=3), requires_grad=False)
        self.norm = torch.nn.Parameter(normal(16, seed=2), requires_grad=False)
        self.register_buffer("state", steps.sampling_state(5, "cpu"))

    def forward(self, h: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        r, x = steps.add_norm(h, residual, self.norm, None, self.norm, EPS)
        token = steps.sample(x @ self.table.T, 1.0, 4, 0.9, self.state)
        return r, steps.embed(token, self.table, None, None, 16, 0, 2.0, torch.float32)


@pytest.mark.parametrize("how", ["compiled", "exported"])
def test_a_step_of_decoding_is_one_graph(how: str) -> None:
    eager, other, args = Decoding(), Decoding(), (normal(2, 16, seed=0), normal(2, 16, seed=1))
    if how == "compiled":
        run = torch.compile(other, fullgraph=True, backend="aot_eager")
    else:
        program = torch.export.export(other, args)
        assert {"gemma4.add_norm.default", "gemma4.sample.default", "gemma4.embed.default"} <= {
            str(node.target) for node in program.graph.nodes
        }
        run = program.module()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(eager(*args), run(*args), strict=True))
    assert eager.state.tolist() == [5, 3]


@pytest.mark.parametrize(
    ("counter", "key", "word"),
    [
        ([0, 0, 0, 0], [0, 0], 0x6627E8D5),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, 0x408F276D),
        ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0], 0xD16CFE09),
    ],
)
def test_philox_known_answers(counter: list[int], key: list[int], word: int) -> None:
    """The vectors that come with Random123."""
    assert int(naive._philox([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key])) == word


def test_gumbel_variates_follow_their_distribution() -> None:
    sample = naive.gumbel(4, 5000, steps.sampling_state(3, "cpu")).flatten().numpy()
    assert scipy.stats.kstest(sample, "gumbel_r").pvalue > 1e-3
    assert np.unique(sample).size > 19_900


@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (3, None), (5, 0.8), (None, 0.8)])
def test_draws_follow_the_sampler(top_k: int | None, top_p: float | None) -> None:
    logits, draws, state = (
        torch.tensor([2.0, 1.5, 1.5, 0.3, 0.0, -1.0, -math.inf]),
        20_000,
        steps.sampling_state(7, "cpu"),
    )
    kept = allowed(logits[None], 0.8, top_k, top_p)[0] if top_k or top_p else logits > -math.inf
    p = torch.softmax((logits / 0.8).masked_fill(~kept, -math.inf), dim=0).double().numpy()
    ids = steps.sample(logits.expand(draws, -1), 0.8, top_k, top_p, state)
    counts = torch.bincount(ids, minlength=len(p)).numpy()
    assert counts[p == 0].sum() == 0
    assert scipy.stats.chisquare(counts[p > 0], p[p > 0] / p.sum() * draws).pvalue > 1e-3


def test_state_decides_and_moves_on() -> None:
    logits = torch.zeros(8, 1000)
    a, b, other = (steps.sampling_state(seed, "cpu") for seed in (2**64 - 1, 2**64 - 1, 2**63))
    first = steps.sample(logits, 1.0, None, None, a)
    assert torch.equal(first, steps.sample(logits, 1.0, None, None, b))
    assert not torch.equal(first, steps.sample(logits, 1.0, None, None, a))
    assert not torch.equal(first, steps.sample(logits, 1.0, None, None, other))
    assert first.unique().numel() > 1
    assert a.tolist() == [-1, 2]
    steps.sample(logits, 0.0, None, None, a)
    assert a.tolist() == [-1, 2]


x = torch.zeros(2, 3, 8)
state = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: steps.norm(x, torch.ones(7), EPS), "weight is float32 [7]; must be [8]"),
        (lambda: steps.norm(x.long(), None, EPS), "the input is int64"),
        (lambda: steps.add_norm(x, x[:1], torch.ones(8), None, None, EPS), "residual is float32 [1, 3, 8]"),
        (lambda: steps.add_norm(x, x, torch.ones(8), torch.ones(2), None, EPS), "scalar is [2]"),
        (lambda: steps.gelu_mul(x[..., :7]), "7 columns"),
        (lambda: steps.gelu_mul(x, 8), "8 columns"),
        (lambda: steps.embed(state, x[0], None, None, 8, 0, 1.0, torch.float32), "the table is float32 [3, 8] without"),
        (lambda: steps.sample(x, 1.0, None, None, state), "logits is float32 [2, 3, 8]"),
        (lambda: steps.sample(x[0], 1.0, None, None, state[:1]), "state is int64 [1]"),
        (lambda: steps.sample(x[0], -1.0, None, None, state), "temperature = -1.0"),
        (lambda: steps.sample(x[0], 1.0, 0, None, state), "top_k = 0"),
        (lambda: qkv(q=torch.zeros(1, 2, 3, 7)), "q is float32 [1, 2, 3, 7]"),
        (lambda: qkv(cos=torch.zeros(1, 2, 8)), "cos is float32 [1, 2, 8]"),
        (lambda: qkv(q_norm=torch.ones(4)), "the norms' weights must be [8]"),
        (lambda: qkv(v=None), "k comes with v"),
        (lambda: qkv(v=torch.zeros(1, 2, 2, 8)), "v float32 [1, 2, 2, 8]"),
        (lambda: qkv(v_cache=torch.zeros(1, 2, 5, 8)), "v_cache is float32 [1, 2, 5, 8]"),
        (lambda: qkv(k_cache=torch.zeros(1, 1, 5, 8, dtype=torch.float16)), "k, v and the caches must be too"),
        (lambda: qkv(slots=torch.zeros(1, 2, dtype=torch.int32)), "slots is int32 [1, 2]"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def qkv(**changed: torch.Tensor | None) -> torch.Tensor:
    args = {
        "q": torch.zeros(1, 2, 3, 8),
        "k": torch.zeros(1, 2, 1, 8),
        "v": torch.zeros(1, 2, 1, 8),
        "q_norm": torch.ones(8),
        "k_norm": torch.ones(8),
        "cos": torch.zeros(1, 2, 1, 8),
        "sin": torch.zeros(1, 2, 1, 8),
        "k_cache": torch.zeros(1, 1, 5, 8),
        "v_cache": torch.zeros(1, 1, 5, 8),
        "slots": torch.zeros(1, 2, dtype=torch.int64),
    }
    return steps.qkv_norm_rope(**(args | changed), eps=EPS)
