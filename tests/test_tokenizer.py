"""Encoding, the chat template, streamed decoding, and what damaged tokenizer files say."""

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from gemma4_impl.tokenizer import StreamDecoder, Tokenizer, TokenizerError

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = ["<pad>", "<eos>", "<bos>", "<unk>", *BYTES, *"▁helo\nd", "▁▁", "he", "▁he", "é", "\ufffd"]


def gemma_like() -> tokenizers.Tokenizer:
    """Gemma's pipeline over a few tokens: spaces as ▁, BPE, byte fallback."""
    vocab = {token: i for i, token in enumerate(WORDS)}
    merges = [("h", "e"), ("▁", "he"), ("▁", "▁")]
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["<pad>", "<eos>", "<bos>"])
    backend.add_tokens(["<unused0>"])
    return backend


TOKENIZER = Tokenizer(gemma_like())
ID = {token: TOKENIZER._backend.token_to_id(token) for token in [*WORDS, "<unused0>"]}


@pytest.fixture
def folder(tiny, tmp_path: Path) -> Path:
    """A tokenizer folder that a test may damage."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(tiny("E2B") / name, tmp_path)
    return tmp_path


@pytest.mark.parametrize("text", ["hello", "<bos>hello", "<bos><bos>hello"])
def test_bos_comes_exactly_once(tiny, text):
    # The tiny tokenizer.json also has a post-processor that adds one.
    tokenizer = Tokenizer.from_pretrained(tiny("E2B"))
    ids = tokenizer.encode(text)
    assert ids == [tokenizer.bos_id, *tokenizer.encode("hello", bos=False)]


def test_bos_is_not_added_unasked(tiny):
    tokenizer = Tokenizer.from_pretrained(tiny("E2B"))
    assert tokenizer.bos_id not in tokenizer.encode("hello", bos=False)
    assert tokenizer.encode("") == [tokenizer.bos_id]
    assert tokenizer.encode("", bos=False) == []


@pytest.mark.parametrize("text", ["", " ", "  two  spaces ", "naïve 日本語 🙂\n\ttab", "a" * 500])
def test_round_trip(tiny, text):
    tokenizer = Tokenizer.from_pretrained(tiny("E2B"))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_are_shown_only_when_asked():
    ids = [ID["<bos>"], ID["he"], ID["<eos>"]]
    assert TOKENIZER.decode(ids) == "he"
    assert TOKENIZER.decode(ids, skip_special=False) == "<bos>he<eos>"


def test_saved_truncation_and_padding_are_ignored():
    backend = gemma_like()
    backend.enable_truncation(3)
    backend.enable_padding(length=8)
    assert len(Tokenizer(backend).encode("l" * 5)) == 6


def test_lone_surrogate_is_refused():
    with pytest.raises(TokenizerError, match="not valid Unicode"):
        TOKENIZER.encode("a\udc80")


def test_matches_hugging_face(tiny):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tiny("E2B"))
    ours = Tokenizer.from_pretrained(tiny("E2B"))
    messages = [{"role": "user", "content": "Hello  river"}, {"role": "assistant", "content": "日本 🙂"}]
    for add in (True, False):
        text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=add)
        assert ours.apply_chat_template(messages, add_generation_prompt=add) == text
        assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids
    assert ours.encode("Hello  river 日本") == theirs("Hello  river 日本").input_ids


def test_stop_ids(folder):
    def load(generation: object = None, config: dict | None = None) -> Tokenizer:
        (folder / "generation_config.json").write_text(json.dumps(generation or {}))
        stored = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(stored | (config or {})))
        return Tokenizer.from_pretrained(folder)

    assert load().stop_ids == {106}  # <turn|>
    assert load({"eos_token_id": 1}).stop_ids == {1, 106}
    assert load({"eos_token_id": [1, 50]}).stop_ids == {1, 50, 106}
    assert load(config={"eot_token": "<eos>"}).turn_end_id == 1
    assert Tokenizer(gemma_like()).stop_ids == frozenset()
    with pytest.raises(TokenizerError, match=r"generation_config\.json: eos_token_id must be"):
        load({"eos_token_id": "<eos>"})


# Chat template


def rendered(template: str, messages: list | None = None, **variables) -> str:
    tokenizer = Tokenizer(gemma_like(), {"eot_token": "<eos>"}, template)
    return tokenizer.apply_chat_template(messages or [{"role": "user", "content": "hi"}], **variables)


def test_template_sees_what_hugging_face_gives_it():
    template = "{{ bos_token }}{{ eot_token }}{{ tools is none }}{{ add_generation_prompt }}{{ messages[0].content }}"
    assert rendered(template) == "<bos><eos>TrueTruehi"
    assert rendered("{{ enable_thinking }}", enable_thinking=False) == "False"
    assert rendered("{% for m in [1, 2, 3] %}{% if m == 2 %}{% break %}{% endif %}{{ m }}{% endfor %}") == "1"
    assert rendered("{{ {'a': '<é>'} | tojson }}") == '{"a": "<é>"}'
    assert rendered("{{ strftime_now('%Y') | length }}") == "4"


def test_template_blocks_leave_no_lines_and_indents():
    assert rendered("a\n  {% if true %}\nb\n  {% endif %}\nc") == "a\nb\nc"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must\n alternate') }}", r"\(roles must alternate\)"),
        ("{% if %}", "line 1: Expected an expression"),
        ("{{ messages[0].content.x.y }}", "no attribute 'x'"),
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{{ messages.append(1) }}", "'append' of 'list' object is unsafe"),
        ("{{ ''.__class__.__mro__ }}", "'__class__' of 'str' object is unsafe"),
    ],
)
def test_template_errors_are_one_line(template, message):
    with pytest.raises(TokenizerError, match=message) as caught:
        rendered(template)
    assert "the chat template failed" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_template_is_found_where_it_is(folder):
    messages = [{"role": "user", "content": "hi"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "from config"}))
    assert Tokenizer.from_pretrained(folder).apply_chat_template(messages) != "from config"
    (folder / "chat_template.jinja").unlink()
    assert Tokenizer.from_pretrained(folder).apply_chat_template(messages) == "from config"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert Tokenizer.from_pretrained(folder).apply_chat_template(messages) == "plain"
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(TokenizerError, match="no chat template"):
        Tokenizer.from_pretrained(folder).apply_chat_template(messages)


# Streaming

token_ids = st.lists(
    st.one_of(
        st.sampled_from(sorted(ID.values())),
        st.sampled_from([ID[f"<0x{byte:02X}>"] for byte in "é日🙂A".encode() + b"\xff"]),
        st.just(len(TOKENIZER) + 5),  # a model's vocabulary may be larger than its tokenizer's
    ),
    max_size=16,
)


@given(ids=token_ids, skip_special=st.booleans())
def test_stream_joins_to_decode(ids, skip_special):
    stream = StreamDecoder(TOKENIZER, skip_special)
    text = "".join(stream.push(i) for i in ids) + stream.finish()
    assert text == TOKENIZER.decode(ids, skip_special)


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=20))
def test_stream_of_a_text_is_the_text(text):
    backend = gemma_like()
    tokenizer = Tokenizer(backend)
    ids = backend.encode(text, add_special_tokens=False).ids
    stream = StreamDecoder(tokenizer, skip_special=False)
    assert "".join(stream.push(i) for i in ids) + stream.finish() == text


def test_stream_emits_no_half_character():
    stream = StreamDecoder(TOKENIZER)
    ids = [ID["▁he"], *(ID[f"<0x{b:02X}>"] for b in "🙂".encode()), ID["<bos>"], ID["▁"], ID["l"]]
    assert [stream.push(i) for i in ids] == [" he", "", "", "", "", "", "🙂 ", "l"]
    assert stream.finish() == ""


def test_stream_keeps_spaces_where_the_decoder_strips_the_first():
    backend = gemma_like()
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    stream = StreamDecoder(Tokenizer(backend))
    assert [stream.push(ID[t]) for t in ("▁he", "▁he", "▁", "▁he")] == ["he", " he", " ", " he"]


def test_stream_decodes_no_more_than_a_few_tokens_at_a_time(monkeypatch):
    longest = 0
    decode = TOKENIZER.decode

    def spy(ids, skip_special=True):
        nonlocal longest
        longest = max(longest, len(ids))
        return decode(ids, skip_special)

    monkeypatch.setattr(TOKENIZER, "decode", spy)
    stream = StreamDecoder(TOKENIZER)
    for _ in range(200):
        for token in ("▁he", "<0xC3>", "<0xA9>", "l"):
            stream.push(ID[token])
    assert longest == 4


# Damaged files


def test_missing_folder_and_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder; a checkpoint folder holds"):
        Tokenizer.from_pretrained(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json: no such file; copy it"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"", "not a tokenizer"),
        ("tokenizer.json", b'{"version": "1.0", "model"', "not a tokenizer"),
        ("tokenizer.json", b"{}", "not a tokenizer"),
        ("tokenizer.json", b"\xff\xfe", "not a tokenizer"),
        ("tokenizer_config.json", b"{", "not valid JSON"),
        ("tokenizer_config.json", b"[" * 100_000, "not valid JSON"),
        ("tokenizer_config.json", b"[]", "expected a JSON object, got list"),
        ("tokenizer_config.json", b'{"bos_token": "<none>"}', "bos_token '<none>' is not in the vocabulary"),
        ("generation_config.json", b"\xff", "not valid JSON"),
        ("chat_template.jinja", b"\xff", "not UTF-8"),
    ],
)
def test_damaged_file_is_named_in_one_line(folder, name, content, message):
    (folder / name).write_bytes(content)
    with pytest.raises(TokenizerError, match=message) as caught:
        Tokenizer.from_pretrained(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_special_tokens_in_every_form_that_files_have(folder):
    config = {
        "bos_token": {"content": "<bos>", "special": True},
        "extra_special_tokens": {"image_token": "<|image|>"},
        "model_specific_special_tokens": {"eot_token": "<turn|>"},
        "pad_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_pretrained(folder)
    assert tokenizer.special_tokens == {"bos_token": "<bos>", "image_token": "<|image|>", "eot_token": "<turn|>"}
