"""Prefill, decode and generate in JAX: PyTorch's greedy tokens, nothing compiled twice, nothing written in error."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma4_impl.generate import bytes_per_token, decode_one_token, prefill
from gemma4_impl.generate import generate as torch_generate
from gemma4_impl.generation import Interrupted, Sampling
from gemma4_impl.model.decoder import Gemma4 as TorchGemma4
from gemma4_impl.nnx.cache import make_cache
from gemma4_impl.nnx.engine import Decoding, Generator
from gemma4_impl.nnx.generate import generate
from gemma4_impl.nnx.load import from_pretrained
from gemma4_impl.nnx.sharding import make_mesh
from gemma4_impl.tokenizer import Tokenizer

VARIANTS = ("E2B", "E4B", "26B-A4B", "31B")
CHUNK, SEGMENT, ROOM, ROWS = 16, 8, 96, 3
"""Few sizes, for each is compiled for every variant. Rings of C = W - 1 + CHUNK slots are shorter than prompts."""
GREEDY = {"top_k": 100, "top_p": 1e-9}
"""The likeliest token by filters, for which the same is compiled as for draws."""
PROMPT = "The river starts as a thin line of water under the stones"
COMPILED = "/jax/core/compile/backend_compile_duration"
compiled: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def _count_compilations():
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: compiled.append(name))


@pytest.fixture(scope="module")
def loaded(tiny):
    """variant -> engine, PyTorch model, tokenizer."""
    made: dict[str, tuple[Generator, TorchGemma4, Tokenizer]] = {}

    def load(variant: str) -> tuple[Generator, TorchGemma4, Tokenizer]:
        if variant not in made:
            path = tiny(variant)
            engine = Generator(from_pretrained(path, "float32"), max_chunk=CHUNK, segment=SEGMENT)
            made[variant] = engine, TorchGemma4.from_pretrained(path, torch.float32), Tokenizer.from_pretrained(path)
        return made[variant]

    return load


def random_prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    draw = np.random.default_rng(seed)
    return [draw.integers(107, 512, n).tolist() for n in lengths]


def torch_greedy(model: TorchGemma4, prompt: Sequence[int], n: int) -> list[int]:
    cache = model.make_cache(1, ROOM, CHUNK)
    token = prefill(model, torch.tensor([prompt]), cache).argmax(dim=-1, keepdim=True)
    out = [int(token)]
    for _ in range(n - 1):
        token = decode_one_token(model, token, cache)
        out.append(int(token))
    return out


def start(engine: Generator, prompts: list[list[int]], **how) -> Decoding:
    logits, cache = engine.prefill(prompts, engine.make_cache(len(prompts), ROOM))
    return engine.start(logits, cache, **{"stop": ()} | how)


def decoded(engine: Generator, decoding: Decoding, *counts: int) -> np.ndarray:
    """The first token of each row and those of one decode after the other, [B, n]."""
    tokens = [np.asarray(decoding.token)[:, None]]
    for count in counts:
        out, decoding = engine.decode(decoding, count)
        assert (np.asarray(out)[:, count:] == engine.config.pad_token_id).all()
        tokens.append(np.asarray(out)[:, :count])
    return np.concatenate(tokens, axis=1)


@pytest.mark.parametrize("variant", ["E2B", "26B-A4B"])
def test_decode_is_stepwise_decode_and_pytorchs(loaded, variant):
    engine, model, _ = loaded(variant)
    prompts = random_prompts(40, 3, 17)
    tokens = decoded(engine, start(engine, prompts), SEGMENT, 3, SEGMENT)
    assert tokens.tolist() == [torch_greedy(model, prompt, 2 * SEGMENT + 4) for prompt in prompts]

    @jax.jit
    def step(state, token, cache):
        logits, cache = nnx.merge(graphdef, state)(token, cache=cache, logits="last")
        return logits[:, -1:].argmax(axis=-1), cache

    graphdef, state = nnx.split(engine._model(engine._weights))
    decoding = start(engine, prompts)
    token, cache, steps = decoding.token[:, None], decoding.cache, []
    for _ in range(tokens.shape[1]):
        steps.append(token)
        token, cache = step(state, token, cache)
    assert np.concatenate(steps, axis=1).tolist() == tokens.tolist()


@settings(max_examples=12, deadline=None)
@given(lengths=st.lists(st.integers(1, ROOM - SEGMENT), min_size=ROWS, max_size=ROWS), seed=st.integers(0, 99))
def test_any_prompts_go_on_as_in_pytorch(loaded, lengths, seed):
    engine, model, _ = loaded("E2B")
    prompts = random_prompts(*lengths, seed=seed)
    tokens = decoded(engine, start(engine, prompts), SEGMENT)
    assert tokens.tolist() == [torch_greedy(model, prompt, SEGMENT + 1) for prompt in prompts]


def test_prefill_goes_on_where_the_cache_ends(loaded):
    engine, _, _ = loaded("E2B")
    prompts = random_prompts(40, 30, 17)
    whole, _ = engine.prefill(prompts, engine.make_cache(ROWS, ROOM))
    _, cache = engine.prefill([p[:n] for p, n in zip(prompts, (39, 1, 5), strict=True)], engine.make_cache(ROWS, ROOM))
    parts, cache = engine.prefill([p[n:] for p, n in zip(prompts, (39, 1, 5), strict=True)], cache)
    assert cache.lengths.tolist() == [40, 30, 17]
    # Nine layers of float32 rounding differ by 1e-6 to 5e-6 between two orders of the same sums.
    assert jnp.linalg.norm(parts - whole) < 1e-5 * jnp.linalg.norm(whole)


def test_stopped_rows_are_padded_and_all_stopped_ends_early(loaded):
    engine, _, _ = loaded("E2B")
    prompts = random_prompts(40, 3, 17)
    free = decoded(engine, start(engine, prompts), SEGMENT)
    # The first token of one row that no row has earlier; then one for each row.
    row, at = next((r, i) for i in range(2, SEGMENT) for r in range(ROWS) if free[r, i] not in free[:, :i])
    decoding = start(engine, prompts, stop=[int(free[row, at])])
    out, decoding = engine.decode(decoding)
    expected = free[:, 1:].copy()
    for other in range(ROWS):
        ends = np.flatnonzero(free[other, 1:] == free[row, at])
        if len(ends):
            expected[other, ends[0] + 1 :] = engine.config.pad_token_id
    assert np.asarray(out).tolist() == expected.tolist()
    # A stopped row's cache holds its prompt and what was drawn before the stop token.
    assert decoding.cache.lengths[row] == len(prompts[row]) + at

    stops = {int(free[r, min(2 + r, SEGMENT)]) for r in range(ROWS)}
    last = max(next(i for i in range(SEGMENT + 1) if free[r, i] in stops) for r in range(ROWS))
    _, decoding = engine.decode(start(engine, prompts, stop=stops))
    assert decoding.done.all()
    assert int(decoding.drawn) == 1 + last < 1 + SEGMENT


def test_a_key_decides_and_segments_do_not(loaded):
    engine, _, _ = loaded("E2B")
    prompts, sampling = random_prompts(17), Sampling(1.5, top_k=100, top_p=0.99)
    runs = [
        decoded(engine, start(engine, prompts, sampling=sampling, key=jax.random.key(seed)), *counts)
        for seed, counts in ((1, [SEGMENT, SEGMENT]), (1, [3, SEGMENT, 5]), (2, [SEGMENT, SEGMENT]))
    ]
    assert runs[0].tolist() == runs[1].tolist()
    assert (runs[0] != runs[2]).any()
    seeds = (7, 7 << 32, 2**64 - 1)
    firsts = [start(engine, prompts, sampling=Sampling(50.0, top_k=100, top_p=0.99, seed=s)).key for s in seeds]
    assert len({jax.random.key_data(key).tobytes() for key in firsts}) == len(seeds)


def test_caches_are_donated(loaded):
    engine, _, _ = loaded("E2B")
    empty = engine.make_cache(ROWS, ROOM)
    logits, filled = engine.prefill(random_prompts(40, 3, 17), empty)
    assert all(x.is_deleted() for x in jax.tree.leaves(empty.layers))
    engine.decode(engine.start(logits, filled, stop=()))
    assert all(x.is_deleted() for x in jax.tree.leaves(filled.layers))
    assert not logits.is_deleted()


def test_nothing_compiles_twice(loaded):
    engine, _, tokenizer = loaded("E2B")
    how = {"max_new_tokens": 20, "max_seq_len": ROOM, "top_k": 100}
    generate(engine, tokenizer, [2] * 20, seed=0, top_p=0.95, **how)
    sizes = [f._cache_size() for f in (engine._feed, engine._decode, engine._draw)]
    before = len(compiled)
    for length, seed, temperature, top_p in ((18, 1, 0.5, 0.9), (CHUNK, 2, 1.0, 1.0), (31, 3, 2.0, 0.5)):
        generate(engine, tokenizer, [2] * length, seed=seed, temperature=temperature, top_p=top_p, **how)
    assert [name for name in compiled[before:] if name == COMPILED] == []
    assert [f._cache_size() for f in (engine._feed, engine._decode, engine._draw)] == sizes
    # The listener does hear of what is compiled.
    jax.jit(lambda x: x + len(compiled))(0)
    assert COMPILED in compiled[before:]


def test_buckets():
    engine = object.__new__(Generator)
    engine.max_chunk = 100
    lengths = (1, 16, 17, 32, 33, 64, 65, 100)
    assert [engine.bucket(n) for n in lengths] == [16, 16, 32, 32, 64, 64, 100, 100]
    engine.max_chunk = 7
    assert engine.bucket(7) == 7


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[5], [5], []], "the prompt of row 2 is empty"),
        ([[5], [5], [512]], "token id 512 is outside the model's vocabulary of 512"),
        ([[5], [-1], [5]], "token id -1 is outside"),
        ([[5], [5]], "batch of 2 rows, but the cache was made for 3"),
        ([[5], [5], [5] * (ROOM - 3)], f"position {ROOM} is past the end of the cache .max_seq_len = {ROOM}"),
    ],
)
def test_prefill_refuses_before_it_writes(loaded, prompts, message):
    engine, _, _ = loaded("E2B")
    _, cache = engine.prefill([[2] * 4] * ROWS, engine.make_cache(ROWS, ROOM))
    with pytest.raises(ValueError, match=message):
        engine.prefill(prompts, cache)
    assert cache.lengths.tolist() == [4] * ROWS
    engine.prefill([[5]] * ROWS, cache)


def test_decode_and_caches_of_others_are_refused(loaded):
    engine, _, _ = loaded("E2B")
    small = make_cache(engine.config, ROWS, ROOM, max_chunk=4)
    with pytest.raises(ValueError, match="chunk of 16 tokens exceeds the cache's max_chunk = 4"):
        engine.prefill([[2] * 20] * ROWS, small)
    assert small.lengths.tolist() == [0] * ROWS
    decoding = start(engine, [[2] * (ROOM - 3)] * ROWS)
    with pytest.raises(ValueError, match=f"position {ROOM} is past the end of the cache"):
        engine.decode(decoding, 4)
    with pytest.raises(ValueError, match="count = 9: one dispatch decodes at most 8"):
        engine.decode(decoding, SEGMENT + 1)
    _, decoding = engine.decode(decoding, 3)
    assert decoding.cache.lengths.tolist() == [ROOM] * ROWS
    for how in ({"max_chunk": 0}, {"segment": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            Generator(engine._model(engine._weights), **how)


def test_cache_is_in_the_dtype_computed_in(tiny):
    engine = Generator(from_pretrained(tiny("E2B"), "bfloat16", "float32"))
    assert {x.dtype for x in jax.tree.leaves(engine.make_cache(1, 32).layers)} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("variant", VARIANTS)
def test_bytes_per_token_are_pytorchs(loaded, variant):
    engine, model, _ = loaded(variant)
    rotary = sum(buffer.nbytes for rope in model.rope.values() for buffer in rope.buffers())
    for context in (1, 5, 300):
        assert engine.bytes_per_token(context) == bytes_per_token(model, context) - rotary


@pytest.mark.parametrize("prompt", [PROMPT, [{"role": "user", "content": "hi"}], [2, 7, 9]])
def test_generates_as_pytorch_does(loaded, prompt):
    engine, model, tokenizer = loaded("E2B")
    how = {"max_new_tokens": 25, "max_seq_len": ROOM}
    pieces: list[str] = []
    result = generate(engine, tokenizer, prompt, stream=pieces.append, **how, **GREEDY)
    expected = torch_generate(model, tokenizer, prompt, temperature=0, **how)
    timed = ("prefill_seconds", "decode_seconds", "decode_bytes")
    assert dataclasses.replace(result, **dict.fromkeys(timed, 0)) == dataclasses.replace(
        expected, **dict.fromkeys(timed, 0)
    )
    assert "".join(pieces) == result.text
    assert result.decode_bytes == sum(
        engine.bytes_per_token(result.prompt_tokens + i) for i in range(1, len(result.tokens))
    )


def test_context_holds_all_but_the_last_token(loaded):
    engine, _, tokenizer = loaded("E2B")
    how = {"max_new_tokens": 50, "max_seq_len": ROOM} | GREEDY
    result = generate(engine, tokenizer, [2] * (ROOM - 5), **how)
    assert (len(result.tokens), result.stop_reason) == (6, "length")
    assert len(generate(engine, tokenizer, [2] * ROOM, **how).tokens) == 1
    assert len(generate(engine, tokenizer, [2] * 5, **how | {"max_new_tokens": 1}).tokens) == 1


def test_what_does_not_fit_is_refused_in_one_line(loaded):
    engine, _, tokenizer = loaded("E2B")
    cases = [
        ({"prompt": [2] * 9, "max_seq_len": 8}, r"9 tokens but the context holds 8; .* raise max_seq_len .*allows 512"),
        ({"prompt": [2], "max_seq_len": 513}, "exceeds the model's max_position_embeddings"),
        ({"prompt": [2], "max_seq_len": 0}, "the context holds 0"),
        ({"prompt": [2, 512]}, "token id 512 is outside the model's vocabulary of 512"),
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": [2], "max_new_tokens": 0}, "max_new_tokens = 0: must be at least 1"),
        ({"prompt": [2], "top_k": 0}, "top_k = 0"),
        ({"prompt": "hi", "images": ["x.png"]}, "images need the vision tower"),
    ]
    for how, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            generate(engine, tokenizer, how.pop("prompt"), **how)
        assert "\n" not in str(caught.value)


def test_nan_logits_are_reported(loaded, monkeypatch):
    engine, _, tokenizer = loaded("E2B")
    nan = [jnp.asarray(np.full(w.shape, np.nan, w.dtype)) for w in engine._weights]
    monkeypatch.setattr(engine, "_weights", nan)
    with pytest.raises(ValueError, match="no next token after 0 new ones: the logits are NaN"):
        generate(engine, tokenizer, [2] * 5, max_seq_len=ROOM, **GREEDY)


def test_ctrl_c_keeps_what_there_is(loaded, monkeypatch):
    engine, _, tokenizer = loaded("E2B")
    how = {"max_new_tokens": 30, "max_seq_len": ROOM} | GREEDY
    whole = generate(engine, tokenizer, [2, 7, 9], **how)
    calls, decode = [], engine.decode

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return decode(*args)

    monkeypatch.setattr(engine, "decode", interrupted)
    with pytest.raises(Interrupted) as caught:
        generate(engine, tokenizer, [2, 7, 9], **how)
    result = caught.value.generation
    assert result.stop_reason == "interrupted"
    assert 0 < len(result.tokens) < 30
    assert result.tokens == whole.tokens[: len(result.tokens)]


def test_spread_over_devices_it_draws_the_same_tokens(tiny, loaded):
    _, model, _ = loaded("31B")
    prompts = random_prompts(CHUNK, 5)
    expected = [torch_greedy(model, prompt, SEGMENT + 4) for prompt in prompts]
    with jax.set_mesh(make_mesh("fsdp=2,tp=2", jax.devices()[:4])):
        engine = Generator(from_pretrained(tiny("31B"), "float32"), CHUNK, SEGMENT)
        assert decoded(engine, start(engine, prompts), SEGMENT, 3).tolist() == expected
        before = len(compiled)
        decoding = start(engine, prompts)
        assert decoded(engine, decoding, 3, SEGMENT).tolist() == expected
        assert COMPILED not in compiled[before:]
        k, _ = engine.make_cache(2, ROOM).layers[0]
        assert k.addressable_shards[0].data.nbytes * 4 == k.nbytes
