"""torch.export, strict, of cached prefill and decode: the programs share one cache and compute what the model does."""

import pytest
import torch
from configs import hub, random_model
from torch import Tensor

from gemma4_impl.config import FULL, SLIDING, TextConfig
from gemma4_impl.export import Step, export_decode, export_prefill
from gemma4_impl.model.cache import KVCache
from gemma4_impl.model.decoder import Gemma4
from reference.tiny import TINY

CHUNK = 6
# 4 or more windows of every tiny variant, so that each ring wraps several times.
LENGTHS = (5, 6, 2, 1, 1, 6, 1, 3, 6, 1, 1, 4, 1)


@pytest.fixture
def graph_branches(monkeypatch):
    """Makes eager code take the branches that a graph takes."""
    return lambda: monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


class Programs:
    """Both programs on one cache: a call runs the one for its length."""

    def __init__(self, model: Gemma4, cache: KVCache):
        self.decode, self.prefill = export_decode(model, cache).module(), export_prefill(model, cache).module()

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        with torch.no_grad():
            return (self.decode if tokens.shape[1] == 1 else self.prefill)(tokens, positions)


def error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    return float((got.double() - want.double()).norm() / want.double().norm())


def prompt(model: Gemma4, rows: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, model.config.vocab_size, (rows, sum(LENGTHS)), generator=generator)


def chunks(tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
    positions = torch.arange(tokens.shape[1]).repeat(tokens.shape[0], 1)
    return list(zip(tokens.split(LENGTHS, dim=1), positions.split(LENGTHS, dim=1), strict=True))


@pytest.mark.parametrize("variant", TINY)
@torch.no_grad()
def test_programs_equal_the_model(variant, short, graph_branches):
    model = Gemma4.from_pretrained(short(variant))
    assert sum(LENGTHS) >= 4 * model.config.sliding_window
    tokens = prompt(model)
    cache, eager_cache, same_cache = (model.make_cache(1, 64, CHUNK) for _ in range(3))
    programs = Programs(model, cache)
    assert cache.lengths == [0]
    results = [programs(*chunk) for chunk in chunks(tokens)]
    usual = [model(*chunk, eager_cache, "last") for chunk in chunks(tokens)]
    graph_branches()
    same = Step(model, same_cache)
    for got, want, (chunk, positions) in zip(results, usual, chunks(tokens), strict=True):
        # The same operations in the same order.
        assert torch.equal(got, same(chunk, positions))
        # Eager attention reads the slots in use only, and eager experts their own tokens only, which in float32 rounds
        # differently: 6e-6 at most was measured, against 3e-6 between correct implementations.
        assert error(got, want) <= 2e-5
    assert all(torch.equal(*pair) for pair in zip(cache.buffers(), same_cache.buffers(), strict=True))


# Small: 3 layers with every feature but k_eq_v on a shared layer, two rows.
SMALL = {"num_hidden_layers": 3, "layer_types": [SLIDING, FULL, FULL]}


@pytest.fixture(scope="module")
def small() -> tuple[Gemma4, KVCache, Programs]:
    model = random_model(TextConfig.from_dict(hub(**SMALL)))
    cache = model.make_cache(2, 64, CHUNK)
    return model, cache, Programs(model, cache)


@torch.no_grad()
def test_rows_of_different_lengths(small):
    """In float64 nothing is lost but rounding. Then both programs start over on the same buffers."""
    model, cache, programs = small
    tokens, eager = prompt(model, 2), model.make_cache(2, 64, CHUNK)
    for _ in range(2):
        cache.reset()
        eager.reset()
        for chunk, positions in chunks(tokens):
            # Row 1 begins 4 columns later: those are padding.
            positions = torch.stack([positions[0], (positions[1] - 4).clamp(min=-1)])
            want = model(chunk, positions, eager, "last")
            got = programs(chunk, positions)
            rows = positions[:, -1] >= 0
            assert got.isfinite().all()
            assert error(got[rows], want[rows]) <= 1e-12


def test_both_programs_hold_the_caches_buffers(small):
    _, cache, programs = small
    assert cache.lengths == [0, 0]
    for name, buffer in cache.state_dict().items():
        for module in (programs.prefill, programs.decode):
            assert module.get_buffer(f"cache.{name}").data_ptr() == buffer.data_ptr(), name


def test_other_lengths_are_refused(small):
    """A chunk that the ring has no room for would overwrite keys that it still needs."""
    *_, programs = small
    for program, length in ((programs.prefill, CHUNK + 1), (programs.decode, 2)):
        with pytest.raises(AssertionError, match="Guard failed: tokens"):
            program(torch.zeros(2, length, dtype=torch.long), torch.arange(length).repeat(2, 1))


@torch.no_grad()
def test_bfloat16_experts(graph_branches):
    """In bfloat16 a graph has grouped_mm, in other dtypes plain matrix products."""
    one = {"num_hidden_layers": 1, "layer_types": [FULL], "num_kv_shared_layers": 0}
    model = random_model(TextConfig.from_dict(hub(**one)), torch.bfloat16)
    cache, same_cache = model.make_cache(1, 64, CHUNK), model.make_cache(1, 64, CHUNK)
    program = export_prefill(model, cache)
    operators = {str(node.target) for node in program.graph.nodes}
    assert any("grouped_mm" in name for name in operators)
    assert not any("einsum" in name for name in operators)
    tokens, positions = chunks(prompt(model))[0]
    usual = model(tokens, positions, model.make_cache(1, 64, CHUNK), "last")
    got = program.module()(tokens, positions)
    assert error(got, usual) <= 1e-2
    graph_branches()
    assert error(got, Step(model, same_cache)(tokens, positions)) <= 1e-6


@pytest.mark.parametrize("chunk", [1, 2])
def test_small_chunks(chunk):
    one = {"num_hidden_layers": 1, "layer_types": [FULL], "num_kv_shared_layers": 0, "enable_moe_block": False}
    model = random_model(TextConfig.from_dict(hub(**one)), torch.float32)
    cache = model.make_cache(1, 16, chunk)
    if chunk == 1:
        with pytest.raises(ValueError, match="max_chunk = 1: prefill takes at least 2 tokens"):
            export_prefill(model, cache)
    else:
        logits = export_prefill(model, cache).module()(torch.ones(1, 2, dtype=torch.long), torch.arange(2)[None])
        assert logits.shape == (1, 1, 64)
