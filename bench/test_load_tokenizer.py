"""A vocabulary of Gemma 4's size, 262,144 tokens and 514,906 merges: to load it, and to encode with it."""

import functools
import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.harness import Backend, Case, equal_to, grid, needs, publish, scratch, timed
from gemma4_impl.tokenizer import Tokenizer

TOKENS, MERGES = 262_144, 514_906
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>"]
# 64 letters of 1, 2 and 3 bytes: all pairs are tokens, and enough triples, each of which two merges make.
LETTERS = (
    "▁" + "abcdefghijklmnopqrstuvwxyz" + "".join(map(chr, range(0x430, 0x445))) + "川山水火木金土日月人大小上中下左"
)


def vocabulary() -> tuple[list[str], list[str]]:
    """Tokens by id, and merges in order of rank, as "left right"."""
    pairs = ["".join(pair) for pair in itertools.product(LETTERS, repeat=2)]
    triples = itertools.islice(map("".join, itertools.product(LETTERS, repeat=3)), (MERGES - len(pairs)) // 2)
    base = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *LETTERS, *pairs]
    longest = list(triples)
    random.Random(0).shuffle(longest)
    unused = [f"<unused{i}>" for i in range(TOKENS - len(base) - len(longest))]
    tokens = [*base, *longest, *unused]
    merges = [merge for t in longest for merge in (f"{t[:2]} {t[2]}", f"{t[0]} {t[1:]}")]
    merges += [f"{pair[0]} {pair[1]}" for pair in pairs]
    assert (len(set(tokens)), len(merges)) == (TOKENS, MERGES)
    return tokens, merges


def write_folder(folder: Path, tokens: list[str], merges: list[str]) -> Path:
    folder.mkdir()
    added = [
        {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        for i, token in enumerate(SPECIAL)
    ]
    model = {
        "type": "BPE",
        "unk_token": "<unk>",
        "fuse_unk": True,
        "byte_fallback": True,
        "vocab": {token: i for i, token in enumerate(tokens)},
        "merges": [merge.split(" ") for merge in merges],
    }
    space = {"pattern": {"String": "▁"}, "content": " "}
    decoder = [{"type": "Replace", **space}, {"type": "ByteFallback"}, {"type": "Fuse"}]
    raw = {
        "version": "1.0",
        "added_tokens": [token | {"special": True} for token in added],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "decoder": {"type": "Sequence", "decoders": decoder},
        "model": model,
    }
    # Indented, as the released file is.
    (folder / "tokenizer.json").write_text(json.dumps(raw, ensure_ascii=False, indent=2), encoding="utf-8")
    return folder


def write_gguf(path: Path, tokens: list[str], merges: list[str]) -> Path:
    import gguf
    from gguf import TokenType

    kinds = {True: TokenType.CONTROL, False: TokenType.NORMAL}
    writer = gguf.GGUFWriter(path, "gemma4")
    writer.add_tokenizer_model("gemma4")
    writer.add_token_list(tokens)
    writer.add_token_types(
        [TokenType.BYTE if token.startswith("<0x") else kinds[i < len(SPECIAL)] for i, token in enumerate(tokens)]
    )
    writer.add_token_merges(merges)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@functools.cache
def _sources() -> dict[str, Path]:
    folder, (tokens, merges) = scratch() / "real_size", vocabulary()
    folder.mkdir()
    return {
        "tokenizer.json": write_folder(folder / "checkpoint", tokens, merges),
        "GGUF": write_gguf(folder / "vocab.gguf", tokens, merges),
    }


@functools.cache
def _text(size: int) -> str:
    """Words of 1 to 9 letters, one character in a thousand an emoji that only its bytes spell."""
    rng = random.Random(1)
    words = []
    while size > 0:
        words.append("".join(rng.choices(LETTERS[1:], k=rng.randint(1, 9))) + ("🙂" if rng.random() < 0.005 else ""))
        size -= len(words[-1].encode()) + 1
    return " ".join(words)


def _ids(tokenizer: Any) -> list[list[int]]:
    """Of the texts that all must agree on."""
    encoded = [tokenizer.encode(text) for text in ("", " the river \n\t🙂\x00 <|turn>", _text(20_000))]
    return [list(getattr(ids, "ids", ids)) for ids in encoded]


def _backend(name: str, source: str, ours: bool = True) -> Backend:
    def prepare(sources: dict[str, Path]) -> Callable[[], Any]:
        if ours:
            return lambda: Tokenizer.from_pretrained(sources[source])
        import tokenizers

        path = str(sources[source] / "tokenizer.json")
        return lambda: tokenizers.Tokenizer.from_file(path)

    # Ours puts the beginning-of-sequence token first, which the file's own rules do not.
    read = _ids if ours else lambda tokenizer: [[2, *ids] for ids in _ids(tokenizer)]
    return Backend(name, prepare, ours, absent=needs("gguf"), read=read)


LOAD = Case(
    suite="load",
    operation="load a tokenizer",
    shape=f"{TOKENS:,} tokens and {MERGES:,} merges",
    backends=[
        _backend("gemma4, tokenizer.json", "tokenizer.json"),
        _backend("gemma4, GGUF", "GGUF"),
        _backend("tokenizers, tokenizer.json", "tokenizer.json", ours=False),
    ],
    make=lambda i: _sources(),
    judge=lambda sources: equal_to(_ids(Tokenizer.from_pretrained(sources["tokenizer.json"]))),
    rotate=False,
    threads=1,
)


def _encode(sources: dict[str, Path]) -> Callable[[], list[int]]:
    tokenizer, text = Tokenizer.from_pretrained(sources["GGUF"]), _text(10**6)
    return lambda: tokenizer.encode(text)


ENCODE = Case(
    suite="load",
    operation="encode text",
    shape=f"1 MB with {TOKENS:,} tokens",
    backends=[Backend("gemma4", _encode, ours=True, absent=needs("gguf"))],
    make=lambda i: _sources(),
    judge=lambda sources: equal_to(Tokenizer.from_pretrained(sources["tokenizer.json"]).encode(_text(10**6))),
    rotate=False,
    threads=1,
)


@timed
@grid([LOAD, ENCODE])
def test_tokenizer(benchmark: Any, rows: Callable, case: Case, backend: str) -> None:
    publish(benchmark, rows(case)[backend])
