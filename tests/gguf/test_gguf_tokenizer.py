"""A GGUF file's tokenizer gives the ids and the text of the tokenizer.json it was made from; damaged ones say what."""

import itertools
import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
from gguf import TokenType
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from gemma4_impl.gguf.reader import GGUFError, GGUFFile
from gemma4_impl.gguf.tokenizer import tokenizer_from_gguf
from gemma4_impl.tokenizer import StreamDecoder, Tokenizer, TokenizerError
from reference.tiny import TINY

TOKENS, TYPES, MERGES = (f"tokenizer.ggml.{key}" for key in ("tokens", "token_type", "merges"))
PRINTED = ["<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", "<|channel>", "<channel|>", '<|"|>']
CONTROL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|tool>", "<tool|>", "<|turn>", "<turn|>", "<|image|>"]
EMOJI = ["👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇩🇪", "❤️", "🙂"]
TEXT = """It runs down through the pines, takes in the snow of three mountains, and there is one fish less in the river.
Die Messung ist nicht das Ziel; sie ist der Weg über die Brücke. Qui mesure deux fois ne coupe qu'une fois, là-bas.
測定は二度、切断は一度。 Мост ещё стоит, а их мосты нет. कि यह नदी है। for i in range(10): print(f"{i:>3} 🙂 {x[i]}")
<table><tr><td>a</td></tr></table> if (x != 0) { return x->next; }  // 0x7F 3.14159 1000 https://example.org/a?b=c"""


def gemma_like(bytes_known: int = 256) -> tokenizers.Tokenizer:
    """About 2,000 tokens laid out as in Gemma: special ones, runs of line breaks, spaces and tabs, HTML tags that no
    merge makes, bytes, pieces and characters; each way to split a token in two others is a merge, longest first."""
    special = [*CONTROL, *PRINTED, "<unused0>", "<unused1>"]
    runs = [char * n for char in "\n▁\t" for n in range(1, 32)]
    pieces: Counter[str] = Counter()
    for word in TEXT.replace(" ", "▁").replace("▁", " ▁").split():
        for start, stop in itertools.combinations(range(len(word) + 1), 2):
            if 2 <= stop - start <= 8:
                pieces[word[start:stop]] += stop - start
    frequent = sorted(pieces, key=lambda piece: (-pieces[piece], piece))[:1500]
    alphabet = [*sorted(set(TEXT) - set(" \n")), "é", "\u200d", "\ufe0f"]
    html = ["<table>", "</table>", "<tr>"]
    tokens = dict.fromkeys(
        [*special, *runs, *html, *(f"<0x{b:02X}>" for b in range(bytes_known)), *frequent, *alphabet]
    )
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [
        (token[:i], token[i:])
        for token in sorted(vocab.keys() - set(special) - set(html), key=lambda t: (-len(t), vocab[t]))
        for i in range(1, len(token))
        if token[:i] in vocab and token[i:] in vocab
    ]
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_tokens([AddedToken(token, normalized=False, special=True) for token in [*CONTROL, *PRINTED]])
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in ("<|frame|>", "<▁>")])
    return backend


def metadata_of(tokenizer_json: str) -> dict[str, Any]:
    """What a converter writes for a tokenizer.json."""
    raw = json.loads(tokenizer_json)
    added = {token["content"]: token for token in raw["added_tokens"]}
    vocab = raw["model"]["vocab"] | {content: token["id"] for content, token in added.items()}
    tokens = sorted(vocab, key=vocab.get)
    types = []
    for token in tokens:
        if re.fullmatch("<0x[0-9A-F]{2}>", token):
            types.append(TokenType.BYTE)
        elif token in PRINTED or (token in added and not added[token]["special"]):
            types.append(TokenType.USER_DEFINED)
        else:
            types.append(TokenType.CONTROL if token in added else TokenType.NORMAL)
    return {
        "tokenizer.ggml.model": "gemma4",
        TOKENS: tokens,
        "tokenizer.ggml.scores": [-1000.0] * len(tokens),
        TYPES: [int(kind) for kind in types],
        MERGES: [" ".join(pair) for pair in raw["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": vocab["<bos>"],
        "tokenizer.ggml.eos_token_id": vocab["<eos>"],
        "tokenizer.ggml.unknown_token_id": vocab["<unk>"],
        "tokenizer.ggml.padding_token_id": vocab["<pad>"],
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": False,
    }


def write(path: Path, metadata: dict[str, Any]) -> Path:
    writer = gguf.GGUFWriter(path, "gemma4")
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool | str | float):
            {bool: writer.add_bool, str: writer.add_string, float: writer.add_float32}[type(value)](key, value)
        else:
            (writer.add_uint32 if value >= 0 else writer.add_int32)(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


class Pair:
    """A tokenizer.json as the tokenizers library has it, and the same from a GGUF file."""

    def __init__(self, folder: Path, backend: tokenizers.Tokenizer):
        self.theirs = backend
        self.metadata = metadata_of(backend.to_str())
        self.ours = tokenizer_from_gguf(write(folder / "vocab.gguf", self.metadata))
        self.tokens = self.metadata[TOKENS]


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Pair:
    return Pair(tmp_path_factory.mktemp("large"), gemma_like())


@pytest.fixture(scope="module")
def partial(tmp_path_factory) -> Pair:
    """Without the byte tokens from 0x80: most characters that are not in it are the unknown token."""
    return Pair(tmp_path_factory.mktemp("partial"), gemma_like(0x80))


@pytest.fixture(scope="module")
def small(tmp_path_factory, tiny) -> Pair:
    backend = tokenizers.Tokenizer.from_file(str(tiny("E2B") / "tokenizer.json"))
    return Pair(tmp_path_factory.mktemp("small"), backend)


_names = [
    *CONTROL,
    *PRINTED,
    "<|frame|>",
    "<|image>",
    "<unused0>",
    "<table>",
    "</table>",
    "<0x41>",
    "<0xF0>",
    "<▁>",
    "< >",
]
_fragments = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    st.text("aehinort qu.'<>|\\", max_size=12),
    st.sampled_from([*EMOJI, "\r\n", "\x00", "\x1b[0m", "\u200d", "\ufeff", "\u2028", "e\u0301", "\U0010ffff"]),
    st.tuples(st.sampled_from(" \n\t▁"), st.integers(1, 70)).map(lambda run: run[0] * run[1]),
    st.sampled_from(_names),
    st.tuples(st.sampled_from(_names), st.integers(1, 16)).map(lambda cut: cut[0][: cut[1]]),
    st.sampled_from(TEXT.split("\n")),
)
texts = st.lists(_fragments, max_size=8).map("".join)


def same_both_ways(pair: Pair, text: str) -> None:
    ids = pair.theirs.encode(text, add_special_tokens=False).ids
    assert pair.ours.encode(text, bos=False) == ids
    for skip in (True, False):
        assert pair.ours.decode(ids, skip) == pair.theirs.decode(ids, skip_special_tokens=skip)


@settings(max_examples=500)
@given(text=texts)
@example("")
@example(" lead and trail ")
@example("\n" * 40 + " " * 40 + "\t" * 40)
@example("<|turn>user\nhi<turn|>\n<|channel>thought<channel|>")
@example("<|image>|<|image|>|image|>" + "".join(EMOJI))
def test_large_vocabulary(large, text):
    same_both_ways(large, text)
    # Every character has a token or its bytes, so the text comes back, but for what stands for a space.
    assert large.ours.decode(large.ours.encode(text, bos=False), skip_special=False) == text.replace("▁", " ")


@settings(max_examples=500)
@given(text=texts)
def test_tiny_vocabulary(small, text):
    same_both_ways(small, text)


@settings(max_examples=300)
@given(text=texts)
@example("日本語 の 川\x00")
def test_vocabulary_with_few_byte_tokens(partial, text):
    same_both_ways(partial, text)


@pytest.mark.parametrize("which", ["large", "small"])
@settings(max_examples=500)
@given(data=st.data())
def test_any_ids_decode_alike_at_once_and_streamed(request, which, data):
    pair = request.getfixturevalue(which)
    byte_ids = [pair.tokens.index(f"<0x{byte:02X}>") for byte in "é日🙂\0".encode() + b"\xff"]
    one = st.one_of(st.integers(0, len(pair.tokens) + 3), st.sampled_from(byte_ids), st.integers(0, 12))
    ids = data.draw(st.lists(one, max_size=16))
    for skip in (True, False):
        whole = pair.ours.decode(ids, skip)
        assert whole == pair.theirs.decode(ids, skip_special_tokens=skip)
        stream = StreamDecoder(pair.ours, skip)
        assert "".join(stream.push(i) for i in ids) + stream.finish() == whole


def test_the_vocabularies_hold_what_the_tests_are_for(large):
    """Merged runs, unmerged tags and byte fallback do occur, so that losing one of them cannot pass."""
    ids = large.ours.encode("\n" * 31 + "the river  <table>\x00🇩<|frame|>", bos=False)
    pieces = [large.tokens[i] for i in ids]
    assert pieces[0] == "\n" * 31
    assert "▁▁" in pieces
    assert "<table>" not in pieces
    assert [p for p in pieces if p.startswith("<0x")] == ["<0x00>", "<0xF0>", "<0x9F>", "<0x87>", "<0xA9>"]
    assert pieces[-1] == "<|frame|>"
    assert len(ids) < 30


def test_a_prompt_gets_one_bos(large):
    expected = [large.ours.bos_id, *large.ours.encode("river", bos=False)]
    assert large.ours.encode("<bos><bos>river") == large.ours.encode("river") == expected


@pytest.mark.parametrize("variant", TINY)
def test_file_made_by_the_converters_own_code(tiny, tmp_path, variant):
    """gguf-py reads the folder through transformers and writes the arrays; the tokenizers then agree in everything."""
    transformers = pytest.importorskip("transformers")
    folder = tiny(variant)
    vocab = gguf.LlamaHfVocab(folder)
    tokens, scores, types = zip(*vocab.all_tokens(), strict=True)
    writer = gguf.GGUFWriter(tmp_path / "vocab.gguf", "gemma4")
    writer.add_tokenizer_model("gemma4")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    gguf.SpecialVocab(folder, load_merges=True).add_to_gguf(writer, quiet=True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    ours, plain = Tokenizer.from_pretrained(tmp_path / "vocab.gguf"), Tokenizer.from_pretrained(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert (ours.bos_id, ours.turn_end_id, ours.stop_ids) == (2, 106, plain.stop_ids)
    assert ours.special_tokens.items() <= plain.special_tokens.items()
    messages = [{"role": "user", "content": "Hello  river"}, {"role": "assistant", "content": "日本 🙂"}]
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ours.apply_chat_template(messages) == text
    assert ours.encode(text, bos=False) == theirs(text, add_special_tokens=False).input_ids
    assert ours.encode("Hello  river 日本") == theirs("Hello  river 日本").input_ids


def test_replies_stop_and_hide_as_with_hugging_face(large, tmp_path):
    ids = {token: i for i, token in enumerate(large.tokens)}
    assert large.ours.stop_ids == {ids["<eos>"], ids["<turn|>"], ids["<|tool_response>"]}
    reply = [ids[t] for t in ("<|channel>", "▁", "channel|>"[0], "<channel|>", "<|frame|>", '<|"|>')]
    assert large.ours.decode(reply) == " c<|frame|>"
    # Other ids come on top: some files call the end of the turn eos.
    named = {"eos": ids["e"], "eot": ids["a"], "eom": ids["i"]}
    changed = large.metadata | {f"tokenizer.ggml.{name}_token_id": i for name, i in named.items()}
    tokenizer = tokenizer_from_gguf(write(tmp_path / "changed.gguf", changed))
    assert tokenizer.stop_ids == large.ours.stop_ids | {ids["e"], ids["a"], ids["i"]}
    assert tokenizer.turn_end_id == ids["a"]


def test_a_special_token_whose_kind_was_lost(tmp_path):
    """`<|turn>` is special though the file calls it normal, `<|>`, which a merge makes, is not."""
    tokens = ["<bos>", "<|turn>", "<turn|>", '<|"|>', "<|>", "<table>", *"<|>turn▁", "<|"]
    metadata = {
        "tokenizer.ggml.model": "gemma4",
        TOKENS: tokens,
        TYPES: [int(TokenType.UNKNOWN), *[int(TokenType.NORMAL)] * (len(tokens) - 1)],
        MERGES: ["< |", "<| >"],
    }
    tokenizer = tokenizer_from_gguf(write(tmp_path / "v.gguf", metadata))
    ids = tokenizer.encode('<bos><|turn><turn|><|"|><|><t>', bos=False)
    assert [tokens[i] for i in ids] == ["<bos>", "<|turn>", "<turn|>", '<|"|>', "<|>", "<", "t", ">"]
    assert tokenizer.decode(ids) == "<|><t>"
    assert tokenizer.stop_ids == {2}


def test_an_open_file_stays_open(small, tmp_path):
    with GGUFFile(write(tmp_path / "v.gguf", small.metadata)) as file:
        assert tokenizer_from_gguf(file).encode("river") == tokenizer_from_gguf(file).encode("river")
        assert file.paths == (tmp_path / "v.gguf",)


def test_a_file_without_scores_unknown_id_or_template(small, tmp_path):
    absent = ("tokenizer.ggml.scores", "tokenizer.ggml.unknown_token_id", "tokenizer.ggml.bos_token_id")
    metadata = {key: value for key, value in small.metadata.items() if key not in absent}
    tokenizer = tokenizer_from_gguf(write(tmp_path / "v.gguf", metadata))
    assert tokenizer.encode("\x00 river") == small.ours.encode("\x00 river")
    with pytest.raises(TokenizerError, match=r"v\.gguf: no chat template there"):
        tokenizer.apply_chat_template([])


def _with(key: str, index: int, value: Any):
    def change(metadata: dict[str, Any]) -> None:
        metadata[key] = list(metadata[key])
        metadata[key][index] = value

    return change


def _set(**values: Any):
    def change(metadata: dict[str, Any]) -> None:
        for key, value in values.items():
            key = "tokenizer.chat_template" if key == "chat_template" else f"tokenizer.ggml.{key}"
            metadata.pop(key, None)
            if value is not None:
                metadata[key] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set(model=None), r"tokenizer\.ggml\.model is missing: the file holds no tokenizer"),
        (_set(model="llama"), r"tokenizer\.ggml\.model is 'llama'; only 'gemma4' is supported"),
        (_set(model=7), r"tokenizer\.ggml\.model is 7; only"),
        (_set(tokens=None), r"tokenizer\.ggml\.tokens is missing; convert the model again"),
        (_set(tokens="x"), r"tokenizer\.ggml\.tokens must be an array of strings"),
        (_set(tokens=[1, 2]), r"tokenizer\.ggml\.tokens must be an array of strings"),
        (_set(merges=None), r"tokenizer\.ggml\.merges is missing"),
        (_set(merges=[1]), r"tokenizer\.ggml\.merges must be an array of strings"),
        (_set(token_type=None), r"tokenizer\.ggml\.token_type is missing"),
        (_set(token_type=["a"]), r"tokenizer\.ggml\.token_type must be an array of numbers"),
        (_set(token_type=[1, 1]), r"token_type has 2 entries, but tokenizer\.ggml\.tokens has 512"),
        (_set(scores=[0.5]), r"scores has 1 entries, but tokenizer\.ggml\.tokens has 512"),
        (_with(TYPES, 300, 7), "token_type of token 300 is 7; 0 to 6 are known"),
        (_with(TYPES, 300, -1), "token_type of token 300 is -1"),
        (_set(token_type=[1.5] * 512), r"token_type of token 0 is 1\.5"),
        (_with(TOKENS, 500, "a"), r"tokenizer\.ggml\.tokens holds 'a' twice, as \d+ and 500"),
        (_with(MERGES, 3, "▁ Ω"), "merges merge 3, '▁ Ω': 'Ω' is not in tokenizer.ggml.tokens"),
        (_with(MERGES, 3, "a ▁"), "merge 3, 'a ▁': 'a▁' is not in"),
        (_with(MERGES, 3, "ab"), "merge 3, 'ab ': '(ab)?' is not in"),
        (_with(MERGES, 3, "a  b"), "merge 3, 'a  b': ' b' is not in"),
        (_with(MERGES, 3, ""), "merge 3, ' ': '' is not in"),
        (_set(bos_token_id=512), r"bos_token_id = 512: must be a token id below 512"),
        (_set(eos_token_id=-1), r"eos_token_id = -1: must be"),
        (_set(eot_token_id=True), r"eot_token_id = True: must be"),
        (_set(unknown_token_id="3"), r"unknown_token_id = '3': must be"),
        (_set(padding_token_id=0.0), r"padding_token_id = 0\.0: must be"),
        (_set(bos_token_id=[2, 2]), r"bos_token_id = <array of 2 .*>: must be"),
        (_set(chat_template=3), r"tokenizer\.chat_template must be a string"),
        (_set(tokens=["a"], token_type=[1], scores=[0.0], merges=[]), r"bos_token_id = 2: must be a token id below 1"),
    ],
)
def test_arrays_that_do_not_fit_are_named_in_one_line(small, tmp_path, change, message):
    metadata = dict(small.metadata)
    change(metadata)
    path = write(tmp_path / "bad.gguf", metadata)
    with pytest.raises(TokenizerError, match=message) as caught:
        Tokenizer.from_pretrained(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 200


def test_too_many_special_tokens(small, tmp_path):
    tokens = [*small.tokens, *(f"token {i}" for i in range(1 << 16))]
    metadata = small.metadata | {TOKENS: tokens, TYPES: [3] * len(tokens), "tokenizer.ggml.scores": [0.0] * len(tokens)}
    with pytest.raises(TokenizerError, match="token_type makes 66048 tokens special; at most 65536 may be"):
        tokenizer_from_gguf(write(tmp_path / "v.gguf", metadata))


def test_no_bos_anywhere(small, tmp_path):
    tokens = ["<x>" if token == "<bos>" else token for token in small.tokens]
    metadata = {key: v for key, v in small.metadata.items() if not key.endswith("bos_token_id")} | {TOKENS: tokens}
    with pytest.raises(TokenizerError, match="bos_token '<bos>' is not in the vocabulary"):
        tokenizer_from_gguf(write(tmp_path / "v.gguf", metadata))


def test_files_that_are_no_gguf(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.gguf: no such file"):
        Tokenizer.from_pretrained(tmp_path / "none.gguf")
    (tmp_path / "tokenizer.json").write_text("{}" * 20)
    with pytest.raises(GGUFError, match=r"tokenizer\.json: not a GGUF file"):
        Tokenizer.from_pretrained(tmp_path / "tokenizer.json")


def test_a_token_that_is_not_utf8(small, tmp_path):
    path = write(tmp_path / "v.gguf", small.metadata)
    raw = path.read_bytes().replace(b"river", b"riv\xffr", 1)
    path.write_bytes(raw)
    with pytest.raises(GGUFError, match=r"v\.gguf: 'tokenizer\.ggml\.tokens': string \d+ is not UTF-8"):
        tokenizer_from_gguf(path)


@settings(max_examples=500)
@given(st.data())
def test_any_damage_gives_one_line_or_a_tokenizer(small, tmp_path_factory, data):
    """Bytes of a small vocabulary's file are changed, or its end is cut off."""
    raw = bytearray(_small_file(small, tmp_path_factory))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(raw[: data.draw(st.one_of(st.just(len(raw)), st.integers(0, len(raw))))])
    try:
        tokenizer = tokenizer_from_gguf(path)
    except (GGUFError, TokenizerError) as caught:
        error = str(caught)
    else:
        tokenizer.decode(tokenizer.encode("the river"))
        return
    assert error.startswith(f"{path}: ")
    assert "\n" not in error


def _small_file(small: Pair, tmp_path_factory) -> bytes:
    path = tmp_path_factory.getbasetemp() / "whole.gguf"
    if not path.exists():
        keep = small.tokens[:120] + [f"<0x{byte:02X}>" for byte in range(0x20, 0x30)] + ["▁", "th", "the"]
        types = [small.metadata[TYPES][small.tokens.index(token)] if token in small.tokens else 1 for token in keep]
        arrays = {TOKENS: keep, TYPES: types, MERGES: ["t h", "th e"], "tokenizer.ggml.scores": [0.0] * len(keep)}
        write(path, small.metadata | arrays | {"tokenizer.chat_template": "{{ bos_token }}"})
    return path.read_bytes()


@pytest.mark.checkpoint
@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("The bridge is holding.", [818, 11825, 563, 7046, 236761]),
        (" two  spaces\n\n\ttab\r\n", [1156, 138, 35220, 108, 255968, 4823, 251, 107]),
        ("naïve 👩‍👩‍👧 \x00", [1789, 238527, 560, 236743, 243767, 237243, 243767, 237243, 244814, 236743, 238]),
        ("<0x41>▁<unused0>", [236820, 236771, 236781, 236812, 236770, 236813, 655, 63634, 236771, 236813]),
        ("<|turn>user\nhi<turn|>\n<|channel>", [105, 2364, 107, 2202, 106, 107, 100]),
        ("\n" * 40 + " " * 40, [137, 115, 167, 145]),
    ],
)
def test_released_vocabulary(text, ids):
    """What llama.cpp gives for the vocabulary of the released files; GEMMA4_CHECKPOINT may be a GGUF file here."""
    tokenizer = Tokenizer.from_pretrained(os.environ["GEMMA4_CHECKPOINT"])
    assert len(tokenizer) == 262144
    assert tokenizer.stop_ids >= {1, 106}
    assert tokenizer.encode(text, bos=False) == ids
    assert tokenizer.decode(ids, skip_special=False) == text.replace("▁", " ")
