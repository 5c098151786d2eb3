"""prefill, decode_one_token and generate on tiny checkpoints, against the full forward without a cache."""

import dataclasses
import itertools

import pytest
import torch

from gemma4_impl import generate as verbs
from gemma4_impl.generate import Interrupted, bytes_per_token, decode_one_token, generate, prefill
from gemma4_impl.generation import Sampling, encode_prompt
from gemma4_impl.model.decoder import Gemma4
from gemma4_impl.tokenizer import Tokenizer

VARIANTS = ("E2B", "E4B", "26B-A4B", "31B")
PROMPT = "The river starts as a thin line of water under the stones"  # longer than every tiny sliding window


@pytest.fixture(scope="module")
def loaded(tiny):
    """variant -> (model, tokenizer), loaded once."""
    made = {}

    def load(variant: str) -> tuple[Gemma4, Tokenizer]:
        if variant not in made:
            made[variant] = Gemma4.from_pretrained(tiny(variant)), Tokenizer.from_pretrained(tiny(variant))
        return made[variant]

    return load


def without_stops(model: Gemma4, monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> None:
    monkeypatch.setattr(model, "config", dataclasses.replace(model.config, eos_token_id=()))
    monkeypatch.setattr(tokenizer, "stop_ids", frozenset())


@torch.inference_mode()
def greedy(model: Gemma4, ids: list[int], n: int) -> list[int]:
    """n repeated argmaxes of the full forward."""
    out = list(ids)
    for _ in range(n):
        out.append(int(model(torch.tensor([out]))[0, -1].argmax()))
    return out[len(ids) :]


@pytest.mark.parametrize("max_chunk", [5, 512])
@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_is_repeated_argmax_of_the_full_forward(loaded, monkeypatch, variant, max_chunk):
    model, tokenizer = loaded(variant)
    without_stops(model, monkeypatch, tokenizer)
    ids = tokenizer.encode(PROMPT)
    result = generate(
        model, tokenizer, PROMPT, chat=False, max_new_tokens=20, temperature=0, max_chunk=max_chunk, seed=0
    )
    assert list(result.tokens) == greedy(model, ids, 20)
    assert result.prompt_tokens == len(ids)
    assert result.stop_reason == "length"


@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_prefill_gives_the_last_logits(loaded, chunk):
    model, tokenizer = loaded("E2B")
    tokens = torch.tensor([tokenizer.encode(PROMPT)])
    cache = model.make_cache(max_seq_len=64, max_chunk=chunk)
    logits = prefill(model, tokens, cache)
    whole = model(tokens)[:, -1]
    # Nine layers of float32 rounding differ by 1e-6 to 5e-6 between two orders of the same sums.
    assert (logits - whole).norm() < 1e-5 * whole.norm()
    assert cache.lengths == [tokens.shape[1]]


@pytest.mark.parametrize("left", [True, False])
def test_a_padded_batch_goes_on_like_its_rows(loaded, left):
    model, tokenizer = loaded("E4B")
    prompts = [tokenizer.encode(PROMPT), tokenizer.encode("What does it know?")]
    T = max(map(len, prompts))
    tokens, positions = torch.zeros(2, T, dtype=torch.long), torch.full((2, T), -1)
    for row, ids in enumerate(prompts):
        at = slice(T - len(ids), T) if left else slice(0, len(ids))
        tokens[row, at], positions[row, at] = torch.tensor(ids), torch.arange(len(ids))
    cache = model.make_cache(2, max_seq_len=64, max_chunk=7)
    token = prefill(model, tokens, cache, positions).argmax(dim=-1, keepdim=True)
    steps = [token]
    for _ in range(8):
        steps.append(decode_one_token(model, steps[-1], cache))
    for row, ids in enumerate(prompts):
        assert torch.cat(steps, dim=1)[row].tolist() == greedy(model, ids, 9)


def test_prefill_refuses_padding_only_and_nothing(loaded):
    model, _ = loaded("E2B")
    cache = model.make_cache(max_seq_len=8)
    with pytest.raises(ValueError, match="nothing but padding"):
        prefill(model, torch.tensor([[0, 0]]), cache, torch.tensor([[-1, -1]]))
    with pytest.raises(ValueError, match="T >= 1"):
        prefill(model, torch.zeros(1, 0, dtype=torch.long), cache)


def test_decode_one_token_samples_with_its_generator(loaded):
    model, _ = loaded("E2B")

    def draw(seed: int) -> list[int]:
        cache = model.make_cache(max_seq_len=40)
        sampling = Sampling(temperature=2.0, top_k=50, seed=seed)
        generator, token, out = sampling.generator("cpu"), torch.tensor([[2]]), []
        for _ in range(10):
            token = decode_one_token(model, token, cache, sampling, generator)
            out.append(token.item())
        return out

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_seed_decides_the_text(loaded):
    model, tokenizer = loaded("E2B")
    texts = [generate(model, tokenizer, "hi", max_new_tokens=20, seed=seed).tokens for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("where", ["config", "tokenizer"])
def test_stop_token_ends_and_is_not_shown(loaded, monkeypatch, where):
    model, tokenizer = loaded("31B")
    without_stops(model, monkeypatch, tokenizer)
    how = {"chat": False, "temperature": 0, "max_new_tokens": 12}
    tokens = generate(model, tokenizer, PROMPT, **how).tokens
    at = next(i for i in range(1, len(tokens)) if tokens[i] not in tokens[:i])
    if where == "config":
        other = next(i for i in range(512) if i not in tokens)
        monkeypatch.setattr(tokenizer, "stop_ids", frozenset([other]))
        monkeypatch.setattr(model, "config", dataclasses.replace(model.config, eos_token_id=(other, tokens[at])))
    else:
        monkeypatch.setattr(tokenizer, "stop_ids", frozenset([tokens[at]]))
    result = generate(model, tokenizer, PROMPT, **how)
    assert result.stop_reason == "eos"
    assert result.tokens == tokens[: at + 1]
    assert result.text == tokenizer.decode(tokens[:at])


def test_stream_joins_to_the_text(loaded, monkeypatch):
    model, tokenizer = loaded("E2B")
    without_stops(model, monkeypatch, tokenizer)
    for seed in range(5):
        pieces = []
        result = generate(model, tokenizer, "hi", max_new_tokens=60, temperature=5.0, seed=seed, stream=pieces.append)
        assert "".join(pieces) == result.text == tokenizer.decode(result.tokens)
        assert all(pieces)
        assert len(pieces) > 1


def test_prompts_become_ids(loaded):
    _, tokenizer = loaded("E2B")
    chat = tokenizer.encode("<bos><|turn>user\nhi<turn|>\n<|turn>model\n")
    assert chat[:2] == [2, 105]
    assert encode_prompt(tokenizer, "hi") == chat
    assert encode_prompt(tokenizer, [{"role": "user", "content": "hi"}]) == chat
    assert encode_prompt(tokenizer, "hi", chat=False) == tokenizer.encode("hi")
    assert encode_prompt(tokenizer, [7, 8]) == [7, 8]


def test_empty_prompts(loaded):
    model, tokenizer = loaded("E2B")
    result = generate(model, tokenizer, "", chat=False, max_new_tokens=3, seed=0)
    assert result.prompt_tokens == 1  # BOS alone
    assert generate(model, tokenizer, "", max_new_tokens=3, seed=0).prompt_tokens > 1
    with pytest.raises(ValueError, match="the prompt is empty"):
        generate(model, tokenizer, [])


def test_context_holds_all_but_the_last_token(loaded, monkeypatch):
    model, tokenizer = loaded("E2B")
    without_stops(model, monkeypatch, tokenizer)
    result = generate(model, tokenizer, [2, 5, 6], max_new_tokens=50, max_seq_len=8, seed=0)
    assert (len(result.tokens), result.stop_reason) == (6, "length")
    assert len(generate(model, tokenizer, [2, 5, 6], max_new_tokens=50, max_seq_len=3, seed=0).tokens) == 1
    ids = [2] + [9] * 509
    assert len(generate(model, tokenizer, ids, max_new_tokens=50, seed=0).tokens) == 3


def test_what_does_not_fit_is_refused_in_one_line(loaded):
    model, tokenizer = loaded("E2B")
    cases = [
        ({"prompt": [2] * 9, "max_seq_len": 8}, r"9 tokens but the context holds 8; .* raise max_seq_len .*allows 512"),
        ({"prompt": [2] * 513}, "513 tokens but the context holds 512; shorten it$"),
        ({"prompt": [2], "max_seq_len": 513}, "exceeds the model's max_position_embeddings"),
        ({"prompt": [2], "max_seq_len": 0}, "the context holds 0"),
        ({"prompt": [2, 512]}, "token id 512 is outside the model's vocabulary of 512"),
        ({"prompt": [2, -1]}, "token id -1 is outside"),
        ({"prompt": [2], "max_new_tokens": 0}, "max_new_tokens = 0: must be at least 1"),
        ({"prompt": [2], "max_chunk": 0}, "max_chunk = 0"),
        ({"prompt": [2], "temperature": -1}, "temperature = -1"),
    ]
    for how, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            generate(model, tokenizer, how.pop("prompt"), **how)
        assert "\n" not in str(caught.value)


def test_nan_logits_are_reported(tiny):
    model, tokenizer = Gemma4.from_pretrained(tiny("E2B")), Tokenizer.from_pretrained(tiny("E2B"))
    torch.nn.init.constant_(model.norm.weight, float("nan"))
    with pytest.raises(ValueError, match="the logits are NaN; try another dtype"):
        generate(model, tokenizer, "hi")


def test_interruption_hands_over_what_there_is(loaded, monkeypatch):
    model, tokenizer = loaded("E2B")
    without_stops(model, monkeypatch, tokenizer)
    calls = itertools.count()

    def interrupted(*args):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return decode_one_token(*args)

    full = generate(model, tokenizer, "hi", max_new_tokens=4, seed=0)
    monkeypatch.setattr(verbs, "decode_one_token", interrupted)
    with pytest.raises(Interrupted) as caught:
        generate(model, tokenizer, "hi", max_new_tokens=10, seed=0)
    result = caught.value.generation
    assert result.tokens == full.tokens
    assert result.text == full.text
    assert result.stop_reason == "interrupted"


# Speed


def test_rates(loaded, monkeypatch):
    model, tokenizer = loaded("E2B")
    without_stops(model, monkeypatch, tokenizer)
    result = generate(model, tokenizer, [2] * 10, max_new_tokens=4, seed=0)
    assert result.prefill_tokens_per_second == pytest.approx(10 / result.prefill_seconds)
    assert result.decode_tokens_per_second == pytest.approx(3 / result.decode_seconds)
    assert result.decode_bytes == sum(bytes_per_token(model, context) for context in (11, 12, 13))
    assert result.gb_per_second == pytest.approx(result.decode_bytes / result.decode_seconds / 1e9)
    one = generate(model, tokenizer, [2], max_new_tokens=1, seed=0)
    assert (one.decode_tokens_per_second, one.gb_per_second) == (0, 0)


def test_bytes_of_a_model_with_per_layer_inputs_and_shared_keys(loaded):
    model, _ = loaded("E2B")  # D=40, F=64, N=4, K=1, H=16 or 32, V=512, PLE 8, 9 layers, window 7
    kinds = "SSSSFSFSF"
    weights = 512 * 40 + 40  # the tied head, read whole, and the final norm
    weights += 9 * 8 + 40 * 9 * 8 + 8  # one PLE row, its projection from D, its norm
    weights += 16 + 32  # RoPE frequencies of both types
    for i, kind in enumerate(kinds):
        H = 16 if kind == "S" else 32
        weights += 4 * 40 + 1  # norms, layer_scalar
        weights += 2 * 40 * 4 * H + H  # q, o, q_norm
        if i < 7:  # the last two share keys, and have an MLP twice as wide
            weights += 2 * 40 * H + H
        weights += 3 * 40 * (64 if i < 7 else 128)
        weights += 2 * 40 * 8 + 40  # PLE gate and projection, norm
    for context in (1, 7, 10, 400):
        cache = sum(2 * min(context, 7) * 16 if kind == "S" else 2 * context * 32 for kind in kinds)
        assert bytes_per_token(model, context) == 4 * (weights + cache)


def test_bytes_of_a_mixture_of_experts(loaded):
    model, _ = loaded("26B-A4B")  # D=56, F=48, N=8, K=4 or 2, H=16 or 32, V=512, 3 of 8 experts of 16, window 6
    weights = 512 * 56 + 56 + 16 + 32
    cache = 0
    for kind in "SSFSSF":
        K, H = (4, 16) if kind == "S" else (2, 32)
        weights += 7 * 56 + 1
        weights += 2 * 56 * 8 * H + 2 * H + (2 if kind == "S" else 1) * 56 * K * H  # full layers: v is k
        weights += 3 * 56 * 48
        weights += 8 * 56 + 56 + 8  # router
        weights += 3 * 3 * 56 * 16
        cache += 2 * K * H * (6 if kind == "S" else 9)
    assert bytes_per_token(model, 9) == 4 * (weights + cache)


def test_bytes_of_untied_embeddings_and_of_half_precision(tiny, loaded):
    model = Gemma4.from_pretrained(tiny("E2B"), dtype=torch.bfloat16)
    frequencies = 16 + 32  # stay in float32
    tied = bytes_per_token(model, 5)
    assert tied == bytes_per_token(loaded("E2B")[0], 5) // 2 + frequencies * 2
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    assert bytes_per_token(model, 5) == tied + 40 * 2  # and one row of the table
