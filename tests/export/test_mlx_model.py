"""The model on MLX's operators, eager: any chunking gives what the model gives, on rings that are just enough."""

from itertools import pairwise

import pytest
import torch
from configs import hub, random_model
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma4_impl.config import FULL, SLIDING, TextConfig
from gemma4_impl.model.decoder import Gemma4

pytest.importorskip("executorch")
from gemma4_impl.export.mlx.model import MlxGemma4

CHUNK = 6
# At most 6e-6 was measured, against 3e-6 between correct float32 implementations.
BOUND = 2e-5


@pytest.fixture(scope="module")
def model() -> Gemma4:
    """Every feature, and a layer of each type on either side of the KV-shared ones."""
    layers = {"num_hidden_layers": 4, "layer_types": [SLIDING, FULL, SLIDING, FULL], "num_kv_shared_layers": 2}
    return random_model(TextConfig.from_dict(hub(**layers)), torch.float32)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.shape == want.shape
    return float((got.double() - want.double()).norm() / want.double().norm())


@torch.no_grad()
def run(program: MlxGemma4, tokens: torch.Tensor, ends: list[int]) -> torch.Tensor:
    """Logits of the last token of each chunk [1, chunks, V]."""
    parts = [program(tokens[:, start:end], torch.tensor([start])) for start, end in pairwise([0, *ends])]
    return torch.cat(parts, dim=1)


@given(lengths=st.lists(st.integers(1, CHUNK), min_size=4, max_size=12), seed=st.integers(0, 99))
@settings(max_examples=12, deadline=None)
def test_any_chunking_is_the_model(model, lengths, seed):
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    tokens = torch.randint(0, 64, (1, ends[-1]), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        full = model(tokens)
    got = run(MlxGemma4(model, 80, CHUNK), tokens, ends)
    assert error(got, full[:, [end - 1 for end in ends]]) <= BOUND


@pytest.mark.parametrize("variant", ["E2B", "26B-A4B"])
def test_tiny_variants(variant, tiny):
    model = Gemma4.from_pretrained(tiny(variant), torch.float32)
    ends = [5, 11, 13, 14, 15, 21, 22, 25, 31, 32, 33, 37, 38]
    assert ends[-1] >= 4 * model.config.sliding_window
    tokens = torch.randint(0, model.config.vocab_size, (1, ends[-1]), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        full = model(tokens)
    program = MlxGemma4(model, 64, CHUNK)
    want = full[:, [end - 1 for end in ends]]
    assert error(run(program, tokens, ends), want) <= BOUND
    program.reset()
    assert not any(buffer.any() for _, buffer in program.caches())
    assert error(run(program, tokens, ends), want) <= BOUND


def test_a_ring_that_is_one_slot_too_small_is_wrong(model):
    """What the capacity is for: the first query of a whole chunk still needs the key W - 1 before it."""
    tokens = torch.randint(0, 64, (1, 4 * CHUNK), generator=torch.Generator().manual_seed(2))
    ends = list(range(CHUNK, 4 * CHUNK + 1, CHUNK))
    # The last position of a chunk needs less, so every position's output of the last layer with a ring is looked at.
    outs = []
    for slots in (0, -1):
        program = MlxGemma4(model, 80, CHUNK)
        program.ring += slots
        for layer in program.model.layers:
            if layer.self_attn.sliding:
                layer.self_attn.slots += slots
                if not layer.config.kv_shared:
                    for name in ("k_cache", "v_cache"):
                        setattr(layer.self_attn, name, getattr(layer.self_attn, name)[:, :, : program.ring].clone())
        seen = []
        program.model.layers[1].register_forward_hook(lambda module, args, out, seen=seen: seen.append(out))
        run(program, tokens, ends)
        outs.append(torch.cat(seen, dim=1))
    assert error(outs[1], outs[0]) > 1e-3


def test_caches_and_parameters(model):
    program = MlxGemma4(model, 80, CHUNK)
    config = model.config
    shapes = {name: list(buffer.shape) for name, buffer in program.caches()}
    sliding, full = config.layers[:2]
    ring = config.sliding_window - 1 + CHUNK
    assert shapes == {
        f"model.layers.{layer.index}.self_attn.{name}": [1, layer.num_key_value_heads, slots, layer.head_dim]
        for layer, slots in ((sliding, ring), (full, 80))
        for name in ("k_cache", "v_cache")
    }
    ours = {p.data_ptr() for p in program.parameters()}
    assert {p.data_ptr() for p in model.parameters()} == ours
    assert type(model.layers[0].self_attn).__name__ == "Attention"
    assert [MlxGemma4(model, 8, 20).max_chunk, MlxGemma4(model, 8, 20).ring] == [8, 8]
