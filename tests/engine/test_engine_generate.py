"""The engine against `generate`: the same tokens from every tiny variant, dense and quantized, on every path."""

import dataclasses
import itertools

import pytest
import torch
from engine_models import NAMES, PROMPT, Quantized, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gemma4_impl import engine
from gemma4_impl.engine import Engine, PackedModel, Session
from gemma4_impl.generate import Interrupted, bytes_per_token, generate
from gemma4_impl.generation import Sampling
from gemma4_impl.model.decoder import Gemma4
from gemma4_impl.model.soft_tokens import SoftTokens
from gemma4_impl.tokenizer import Tokenizer
from gemma4_impl.vision.images import ImageEncoder
from reference.tiny import aligned, make_tiny


@pytest.fixture(scope="module")
def loaded(tiny, tmp_path_factory):
    """(variant, whether quantized) -> (model, engine, tokenizer), loaded once; in float32, without stop tokens."""
    made = {}

    def load(variant: str, quantized: bool = False) -> tuple[Gemma4, Engine, Tokenizer]:
        key = variant, quantized
        if key not in made:
            if quantized:
                overrides = aligned(variant, 32) | {"eos_token_id": []}
                path = make_tiny(variant, tmp_path_factory.mktemp("quantized") / variant, overrides=overrides)
                weights = Quantized(path)
            else:
                overrides = {"eos_token_id": []}
                path = make_tiny(variant, tmp_path_factory.mktemp("dense") / variant, overrides=overrides)
                weights = path
            tokenizer = Tokenizer.from_pretrained(path)
            tokenizer.stop_ids = frozenset()
            if quantized:
                model, packed = Gemma4.from_weights(weights), PackedModel.from_weights(weights)
            else:
                model, packed = Gemma4.from_pretrained(weights), PackedModel.from_pretrained(weights)
            made[key] = model, Engine(packed), tokenizer
        return made[key]

    return load


@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "quantized"])
@pytest.mark.parametrize("variant", NAMES)
def test_greedy_tokens_are_those_of_generate(loaded, variant, quantized):
    """The prompt is longer than the window, and rings of W - 1 + 5 slots wrap several times."""
    model, fast, tokenizer = loaded(variant, quantized)
    for chunk in (5, 512):
        options = {"chat": False, "temperature": 0, "max_new_tokens": 30, "max_chunk": chunk}
        expected = generate(model, tokenizer, PROMPT, **options)
        fast._session = None
        result = engine.generate(fast, tokenizer, PROMPT, **options)
        assert result.tokens == expected.tokens
        assert len(set(result.tokens)) > 3
        assert result.text == expected.text
        assert (result.stop_reason, result.prompt_tokens) == (expected.stop_reason, expected.prompt_tokens)
        assert result.decode_bytes == expected.decode_bytes


@pytest.mark.parametrize("variant", NAMES)
def test_bytes_per_token(loaded, variant):
    model, fast, _ = loaded(variant, True)
    assert fast.bytes_per_token(40) == bytes_per_token(model, 40)


@torch.inference_mode()
@settings(deadline=None, max_examples=12)
@given(data=st.data())
def test_any_chunks_and_steps_give_the_logits_of_the_whole(loaded, data):
    """Teacher-forced: prefills of any lengths one after the other, then decoding, against one forward."""
    variant = data.draw(st.sampled_from(NAMES))
    model, fast, _ = loaded(variant)
    T, steps = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 6))
    ids = tokens(T + steps, data.draw(st.integers(0, 2**20)))
    whole = model(ids[None])[0]
    session = Session(fast.model, 1, 64, max_chunk=data.draw(st.sampled_from([1, 3, 16, 64])))
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, T - 1)), max_size=3)) | {0, T})
    logits = [session.prefill(ids[a:b]) for a, b in itertools.pairwise(cuts)][-1]
    session.start(logits[None])
    got = [logits]
    for i in range(T, T + steps):
        session.step.token.copy_(ids[i])
        next(session.decode(1))
        got.append(session.step.logits[0].clone())
    expected = whole[T - 1 : T + steps]
    # Two orders of the same sums differ by 1e-6 to 5e-6 in float32.
    assert (torch.stack(got) - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("variant", ["E4B", "26B-A4B"])
def test_rows_of_a_batch_are_what_they_are_alone(loaded, variant):
    model, fast, _ = loaded(variant)
    prompts = [tokens(n, seed=n) for n in (3, 31, 12)]
    session = Session(fast.model, 3, 64, max_chunk=7)
    logits = [session.prefill(ids, row=row) for row, ids in enumerate(prompts)]
    out = [session.start(torch.stack(logits)), *session.decode(12)]
    for row, ids in enumerate(prompts):
        expected = list(ids)
        for _ in range(13):
            expected.append(model(torch.tensor([expected]))[0, -1].argmax())
        assert [step[row] for step in out] == [int(t) for t in expected[len(ids) :]]


def test_half_of_a_fused_linear_may_be_dense(loaded, tmp_path):
    path = make_tiny("31B", tmp_path / "m", overrides=aligned("31B", 32))

    class Mixed(Quantized):
        def quantized(self, name):
            return None if name.endswith(("q_proj.weight", "up_proj.weight")) else super().quantized(name)

    model, packed = Gemma4.from_weights(Mixed(path)), PackedModel.from_weights(Mixed(path))
    session = Session(packed, 1, 32)
    logits = session.prefill(tokens(20))
    with torch.inference_mode():
        expected = model(tokens(20)[None])[0, -1]
    assert (logits - expected).norm() < 1e-5 * expected.norm()


def test_a_seed_decides_and_draws_follow_the_logits(loaded):
    """Twenty thousand draws of the first token against its softmax, by chi-square at 1e-6."""
    _, fast, tokenizer = loaded("31B")
    options = {"max_new_tokens": 12, "temperature": 1.5, "top_k": 50, "top_p": 0.9}
    same = [engine.generate(fast, tokenizer, "hi", seed=seed, **options).tokens for seed in (1, 1, 2)]
    assert same[0] == same[1] != same[2]
    n, rows = 100, 200
    session = Session(fast.model, rows, 32)
    logits = torch.zeros(rows, 512) - torch.inf
    logits[:, 7], logits[:, 300], logits[:, 511] = 0.0, 1.0, 2.0
    counts = torch.zeros(512)
    for seed in range(n):
        counts += torch.tensor(session.start(logits, Sampling(seed=seed))).bincount(minlength=512)
    expected = logits[0].softmax(0) * n * rows
    some = expected > 0
    assert counts[~some].sum() == 0
    assert ((counts - expected)[some].square() / expected[some]).sum() < 28  # 2 degrees of freedom


def test_stop_token_ends(loaded, monkeypatch):
    _, fast, tokenizer = loaded("31B")
    options = {"chat": False, "temperature": 0, "max_new_tokens": 12}
    drawn = engine.generate(fast, tokenizer, PROMPT, **options).tokens
    at = next(i for i in range(1, len(drawn)) if drawn[i] not in drawn[:i])
    monkeypatch.setattr(tokenizer, "stop_ids", frozenset([drawn[at]]))
    result = engine.generate(fast, tokenizer, PROMPT, **options)
    assert (result.stop_reason, result.tokens) == ("eos", drawn[: at + 1])
    assert result.text == tokenizer.decode(drawn[:at])


def test_ctrl_c_keeps_what_there_is(loaded, monkeypatch):
    _, fast, tokenizer = loaded("E2B")
    pieces = []

    def stream(text: str) -> None:
        pieces.append(text)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    options = {"chat": False, "temperature": 0, "max_new_tokens": 20}
    whole = engine.generate(fast, tokenizer, PROMPT, **options)
    with pytest.raises(Interrupted) as caught:
        engine.generate(fast, tokenizer, PROMPT, stream=stream, **options)
    result = caught.value.generation
    assert result.stop_reason == "interrupted"
    assert 0 < len(result.tokens) < len(whole.tokens)
    assert result.tokens == whole.tokens[: len(result.tokens)]
    assert engine.generate(fast, tokenizer, PROMPT, **options).tokens == whole.tokens


def test_the_context_ends(loaded):
    _, fast, tokenizer = loaded("31B")
    ids = tokenizer.encode(PROMPT)
    room = len(ids) + 4
    result = engine.generate(fast, tokenizer, ids, temperature=0, max_seq_len=room)
    assert (len(result.tokens), result.stop_reason) == (5, "length")
    with pytest.raises(ValueError, match=f"the context holds {len(ids) - 1}"):
        engine.generate(fast, tokenizer, ids, max_seq_len=len(ids) - 1)
    with pytest.raises(ValueError, match="max_position_embeddings"):
        engine.generate(fast, tokenizer, ids, max_seq_len=1000)


def test_a_session_goes_on_in_the_same_memory(loaded):
    _, fast, tokenizer = loaded("E4B")
    options = {"chat": False, "temperature": 0, "max_new_tokens": 9}
    fast._session = None
    short = [engine.generate(fast, tokenizer, "What?", **options).tokens for _ in range(2)]
    first = fast._session
    long = engine.generate(fast, tokenizer, PROMPT, **options).tokens
    assert fast._session is not first
    second = fast._session
    assert engine.generate(fast, tokenizer, "What?", **options).tokens == short[0] == short[1]
    assert engine.generate(fast, tokenizer, PROMPT, **options).tokens == long
    assert fast._session is second


def test_what_a_session_refuses(loaded):
    _, fast, _ = loaded("31B")
    session = Session(fast.model, 1, 16)
    with pytest.raises(ValueError, match="T >= 1"):
        session.prefill(torch.zeros(0, dtype=torch.long))
    with pytest.raises(ValueError, match="T >= 1"):
        session.prefill(torch.zeros(1, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="vocabulary of 512"):
        session.prefill(torch.tensor([512]))
    with pytest.raises(ValueError, match="past the end"):
        session.prefill(tokens(17))
    with pytest.raises(ValueError, match="start"):
        next(session.decode(1))
    session.start(session.prefill(tokens(10))[None])
    with pytest.raises(ValueError, match="7 more tokens do not fit"):
        next(session.decode(7))
    assert len(list(session.decode(6))) == 6


def test_nan_logits_are_an_error(loaded, tmp_path):
    _, fast, tokenizer = loaded("31B")
    broken = Engine(dataclasses.replace(fast.model, norm=torch.full_like(fast.model.norm, torch.nan)))
    with pytest.raises(ValueError, match="the logits are NaN"):
        engine.generate(broken, tokenizer, PROMPT)
    step = Session(broken.model, 1, 16)
    step.start(torch.zeros(1, 512))
    assert list(step.decode(3)) == [[-1]] * 3  # which is fed back as 0


@pytest.mark.parametrize("variant", ["E2B", "31B"])
@pytest.mark.parametrize("chunk", [6, 64])
def test_images_in_the_prompt(tiny_images, variant, chunk):
    """Blocks of 6 and 4 soft tokens, seen both ways where the variant does so, cut by no chunk."""
    path = tiny_images(variant)
    model, fast = Gemma4.from_pretrained(path), PackedModel.from_pretrained(path)
    ids = tokens(30)[None]
    mask = torch.zeros(1, 30, dtype=torch.bool)
    mask[0, 4:10] = mask[0, 17:21] = True
    embeds = torch.randn(1, 30, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    soft = SoftTokens(mask, embeds, bidirectional=variant == "31B")
    with torch.inference_mode():
        expected = model(ids, images=soft)[0, -1]
    logits = Session(fast, 1, 64, max_chunk=chunk).prefill(ids[0], soft)
    assert (logits - expected).norm() < 1e-5 * expected.norm()
    if variant == "31B":
        with pytest.raises(ValueError, match="max_chunk = 5"):
            Session(fast, 1, 64, max_chunk=5).prefill(ids[0], soft)


def test_an_image_from_the_prompt_to_the_text(tiny_images):
    """The whole way, with the tower, against `generate`."""
    path = tiny_images("31B")
    encoder, tokenizer = ImageEncoder.from_pretrained(path), Tokenizer.from_pretrained(path)
    image = Image.new("RGB", (64, 48), (200, 40, 90))
    options = {"images": [image], "encoder": encoder, "temperature": 0, "max_new_tokens": 8}
    expected = generate(Gemma4.from_pretrained(path), tokenizer, "What?", **options)
    assert engine.generate(Engine.from_pretrained(path), tokenizer, "What?", **options).tokens == expected.tokens
