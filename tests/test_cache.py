"""Any way of feeding a cache gives the logits of one plain forward: random models, chunks, batches, and padding."""

import math
import random

import pytest
import torch
from configs import hub, random_model
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gemma4_impl.config import FULL, SLIDING, TextConfig
from gemma4_impl.model.cache import KVCache
from gemma4_impl.model.decoder import Gemma4

VOCAB = 24
# Measured over 3000 random feeds (58,000 calls): 3.3e-13 in float64, 99 % of them below 3e-15; 3.3e-5 in float32.
FLOORS = {torch.float64: 1e-12, torch.float32: 1e-4}
SLOW = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


@st.composite
def configs(draw) -> TextConfig:
    count = draw(st.integers(1, 5))
    types = [*draw(st.lists(st.sampled_from([SLIDING, FULL]), min_size=count - 1, max_size=count - 1)), FULL]
    # As many shared layers as leave a producer of each type.
    most = next(i for i in range(count, -1, -1) if set(types[: count - i]) == set(types)) if count > 1 else 0
    heads = draw(st.sampled_from([1, 2, 4]))
    divisors = st.sampled_from([d for d in (1, 2, 4) if heads % d == 0])
    return TextConfig.from_dict(
        hub(
            vocab_size=VOCAB,
            vocab_size_per_layer_input=VOCAB,
            hidden_size=draw(st.sampled_from([8, 12])),
            intermediate_size=8,
            num_hidden_layers=count,
            layer_types=types,
            num_attention_heads=heads,
            num_key_value_heads=draw(divisors),
            num_global_key_value_heads=draw(divisors),
            attention_k_eq_v=draw(st.booleans()),
            head_dim=draw(st.sampled_from([2, 4])),
            global_head_dim=8,
            sliding_window=draw(st.integers(1, 12)),
            num_kv_shared_layers=draw(st.integers(0, most)),
            use_double_wide_mlp=draw(st.booleans()),
            hidden_size_per_layer_input=draw(st.sampled_from([0, 3])),
            enable_moe_block=draw(st.booleans()),
            moe_intermediate_size=4,
            max_position_embeddings=256,
        )
    )


def rel_l2(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def sequence(length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (1, length), generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, want: Tensor) -> bool:
    return got.shape == want.shape and rel_l2(got, want) <= FLOORS[want.dtype]


class Feed:
    """Rows of tokens, fed to a cache in calls of any width, each row's next tokens anywhere in its part of the call."""

    def __init__(self, model: Gemma4, cache: KVCache, rows: list[Tensor]):
        self.model, self.cache, self.rows = model, cache, rows
        self.want = [model(row[None])[0] for row in rows]
        self.at = [0] * len(rows)

    @property
    def left(self) -> list[int]:
        return [len(row) - at for row, at in zip(self.rows, self.at, strict=True)]

    def __call__(self, width: int, places: list[list[int]], logits: str = "all", plain: bool = False) -> None:
        """Row b's next tokens go to columns `places[b]`; the rest is padding. `plain`: the model counts positions."""
        tokens, positions = torch.randint(0, VOCAB, (len(self.rows), width)), torch.full((len(self.rows), width), -1)
        ends = [at + len(place) for at, place in zip(self.at, places, strict=True)]
        for b, place in enumerate(places):
            tokens[b, place] = self.rows[b][self.at[b] : ends[b]]
            positions[b, place] = torch.arange(self.at[b], ends[b])
        got = self.model(tokens, None if plain else positions, self.cache, logits)
        if logits == "none":
            assert got is None
        else:
            assert got.isfinite().all()
            for b, place in enumerate(places):
                if logits == "all":
                    assert not place or close(got[b, place], self.want[b][self.at[b] : ends[b]])
                elif place:
                    assert close(got[b, -1], self.want[b][ends[b] - 1])
        self.at = ends
        assert self.cache.lengths == ends


@SLOW
@given(
    configs(), st.lists(st.integers(1, 101), min_size=1, max_size=3), st.integers(1, 9) | st.just(101), st.integers(0)
)
def test_any_way_of_feeding(config, lengths, max_chunk, seed):
    """Ragged rows, padded left, right, between and altogether, in chunks of any width, with any logits kept."""
    rng = random.Random(seed)
    # In float32 a router's near tie can go either way, as it may.
    narrow = not config.enable_moe_block and rng.random() < 0.3
    model = random_model(config, torch.float32 if narrow else torch.float64)
    rows = [sequence(n, seed)[0] for seed, n in enumerate(lengths)]
    cache = model.make_cache(len(rows), max(lengths) + rng.choice([0, 3]), max_chunk)
    feed = Feed(model, cache, rows)
    while any(feed.left):
        width = rng.randint(1, cache.max_chunk)
        plain = rng.random() < 0.4 and min(feed.left) >= width
        places = [
            list(range(width)) if plain else sorted(rng.sample(range(width), rng.randint(0, min(width, left))))
            for left in feed.left
        ]
        feed(width, places, rng.choice(["all", "last", "none"]), plain)
    assert all(buffer.isfinite().all() for buffer in cache.buffers())


@SLOW
@given(configs(), st.data())
def test_padding_without_a_cache(config, data):
    model = random_model(config)
    width = data.draw(st.integers(1, 30))
    places = data.draw(st.lists(st.sets(st.integers(0, width - 1)).map(sorted), min_size=1, max_size=3))
    tokens, positions = torch.randint(0, VOCAB, (len(places), width)), torch.full((len(places), width), -1)
    for b, place in enumerate(places):
        positions[b, place] = torch.arange(len(place))
    got, last = model(tokens, positions), model(tokens, positions, logits="last")
    assert got.isfinite().all()
    assert last.isfinite().all()
    assert model(tokens, positions, logits="none") is None
    for b, place in enumerate(places):
        if place:
            want = model(tokens[b : b + 1, place])[0]
            assert close(got[b, place], want)
            assert close(last[b, -1], want[-1])


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("window", [1, 2, 5, 8])
def test_the_ring_wraps(window, chunk):
    """Twelve windows long; the ring holds W - 1 + chunk slots, so almost every one is overwritten many times."""
    model = random_model(TextConfig.from_dict(hub(sliding_window=window)))
    tokens = torch.randint(0, 64, (1, 12 * window), generator=torch.Generator().manual_seed(window))
    want = model(tokens)
    cache = model.make_cache(1, tokens.shape[1], chunk)
    assert cache.capacity == {SLIDING: min(12 * window, window - 1 + cache.max_chunk), FULL: 12 * window}
    for start in range(0, tokens.shape[1], chunk):
        part = slice(start, start + chunk)
        assert close(model(tokens[:, part], cache=cache), want[:, part])


@settings(max_examples=30, deadline=None)
@given(configs(), st.integers(1, 20), st.integers(1, 20), st.sampled_from([0, 3]))
@example(TextConfig.from_dict(hub()), 7, 6, 3)
def test_decode_after_prefill(config, prompt, new, shorter):
    """Rows of different lengths, padded on the left; then one token at a time, positions left to the model."""
    model = random_model(config)
    rows = [sequence(prompt + new)[0] % VOCAB, sequence(max(1, prompt - shorter) + new, 1)[0] % VOCAB]
    feed = Feed(model, model.make_cache(2, prompt + new, prompt), rows)
    lengths = [len(row) - new for row in rows]
    feed(prompt, [list(range(prompt - n, prompt)) for n in lengths], "last")
    for _ in range(new):
        feed(1, [[0], [0]], plain=True)


def test_logits_last_and_none():
    for kv_shared in (0, 1, 2):
        model = random_model(TextConfig.from_dict(hub(num_kv_shared_layers=kv_shared)))
        tokens = torch.randint(0, 64, (2, 17))
        want = model(tokens)
        assert close(model(tokens, logits="last"), want[:, -1:])
        for first in ("all", "last", "none"):
            cache = model.make_cache(2, 17, 17)
            model(tokens[:, :9], cache=cache, logits=first)
            assert close(model(tokens[:, 9:], cache=cache), want[:, 9:])


def test_reset_forgets():
    """Bit for bit what a new cache gives, although the old keys still lie in the buffers."""
    model = random_model(TextConfig.from_dict(hub()))
    tokens = torch.randint(0, 64, (2, 40))
    used, new = model.make_cache(2, 40, 8), model.make_cache(2, 40, 8)
    for start in range(0, 40, 8):
        model(tokens[:, start : start + 8], cache=used)
    used.reset()
    assert used.lengths == [0, 0]
    for start in range(0, 24, 6):
        part = tokens.flip(1)[:, start : start + 6]
        assert torch.equal(model(part, cache=used), model(part, cache=new))


@settings(max_examples=30, deadline=None)
@given(configs(), st.integers(0, 2**32))
def test_other_rows_and_padding_change_nothing(config, seed):
    model = random_model(config)
    generator = torch.Generator().manual_seed(seed)
    own = torch.randint(0, VOCAB, (1, 12), generator=generator)
    outputs = []
    for _ in range(2):
        cache = model.make_cache(3, 20, 6)
        parts = []
        for start in range(0, 12, 4):
            tokens = torch.randint(0, VOCAB, (3, 6), generator=generator)
            positions = torch.full((3, 6), -1)
            tokens[1, 1:5], positions[1, 1:5] = own[0, start : start + 4], torch.arange(start, start + 4)
            positions[2, 2:] = torch.arange(start, start + 4)
            parts.append(model(tokens, positions, cache)[1, 1:5])
        outputs.append(torch.cat(parts))
    assert close(*outputs)
    assert close(outputs[0], model(own)[0])


# Wrong uses

P = torch.tensor
WRONG = {
    "chunk too long": (P([[1] * 5] * 2), None, "chunk of 5 tokens exceeds the cache's max_chunk = 4"),
    "padding too long": (P([[1] * 5] * 2), P([[6, -1, -1, -1, -1]] * 2), "chunk of 5 tokens exceeds"),
    "past the end": (P([[1] * 4] * 2), None, "position 9 is past the end of the cache"),
    "one row past the end": (P([[1] * 4] * 2), P([[6, 7, 8, 9], [6, -1, -1, -1]]), "position 9 is past the end"),
    "gap": (P([[1, 1]] * 2), P([[6, 7], [6, 8]]), "row 1: position 8 does not continue the cache, which ends at 6"),
    "gap at once": (P([[1]] * 2), P([[6], [7]]), "row 1: position 7 does not continue"),
    "repeat": (P([[1, 1]] * 2), P([[5, 6], [6, 7]]), "row 0: position 5 does not continue"),
    "repeat within": (P([[1, 1]] * 2), P([[6, 6], [6, 7]]), "row 0: position 6 does not continue"),
    "backwards": (P([[1, 1]] * 2), P([[7, 6], [6, 7]]), "row 0: position 7 does not continue"),
    "one row": (P([[1]]), None, "batch of 1 rows, but the cache was made for 2"),
    "one row, positions": (P([[1]]), P([[6]]), "batch of 1 rows"),
    "three rows": (P([[1]] * 3), None, "batch of 3 rows"),
    "token too high": (P([[1, 64]] * 2), None, "token id 64 is outside the vocabulary of 64"),
    "token too low": (P([[1, -1]] * 2), None, "token id -1 is outside the vocabulary"),
    "no tokens": (torch.zeros(2, 0, dtype=torch.long), None, r"got shape \(2, 0\)"),
    "no rows": (torch.zeros(0, 2, dtype=torch.long), None, r"got shape \(0, 2\)"),
    "no batch dimension": (P([1, 2]), None, r"got shape \(2,\)"),
    "fewer positions": (P([[1, 1]] * 2), P([[6]] * 2), "positions"),
    "more positions": (P([[1]] * 2), P([[6, 7]] * 2), "positions"),
    "positions without rows": (P([[1, 1]] * 2), P([6, 7]), "positions"),
    "fractional positions": (P([[1, 1]] * 2), P([[6.0, 7.0]] * 2), "positions"),
    "narrow positions": (P([[1, 1]] * 2), P([[6, 7]] * 2, dtype=torch.int32), "positions must be int64"),
}


@pytest.mark.parametrize("logits", ["all", "last", "none"])
@pytest.mark.parametrize("case", WRONG)
def test_wrong_uses_change_nothing(case, logits):
    tokens, positions, message = WRONG[case]
    model = random_model(TextConfig.from_dict(hub()))
    cache = model.make_cache(2, 9, 4)
    start = torch.randint(0, 64, (2, 9))
    model(start[:, :4], cache=cache)
    model(start[:, 4:6], cache=cache)
    before, lengths = {name: buffer.clone() for name, buffer in cache.named_buffers()}, list(cache.lengths)
    with pytest.raises(ValueError, match=message):
        model(tokens, positions, cache, logits)
    assert cache.lengths == lengths
    assert all(torch.equal(buffer, before[name]) for name, buffer in cache.named_buffers())
    assert close(model(start[:, 6:], cache=cache), model(start)[:, 6:])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((1, 129, 8), "max_seq_len = 129 exceeds the model's max_position_embeddings = 128"),
        ((0, 8, 8), "batch_size = 0: must be at least 1"),
        ((1, 0, 8), "max_seq_len = 0: must be at least 1"),
        ((1, 8, 0), "max_chunk = 0: must be at least 1"),
    ],
)
def test_impossible_caches(sizes, message):
    with pytest.raises(ValueError, match=message):
        random_model(TextConfig.from_dict(hub())).make_cache(*sizes)


def test_size():
    """Only layers that compute keys have buffers, the sliding ones just their ring and a slot for the padding."""
    config = TextConfig.from_dict(hub())
    cache = random_model(config, torch.float32).make_cache(3, 100, 10)
    shapes = {name: tuple(b.shape) for name, b in cache.named_buffers() if name.startswith("layers_")}
    assert shapes == {
        **{f"layers_{i}_{n}": (3, 2, 5 - 1 + 10 + 1, 8) for i in (0, 2) for n in "kv"},
        **{f"layers_1_{n}": (3, 1, 101, 16) for n in "kv"},
    }
    floats = sum(math.prod(shape) for shape in shapes.values())
    assert cache.nbytes == 4 * floats + 8 * (3 * 15 + 3 * 101 + 3)
