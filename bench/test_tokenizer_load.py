"""A vocabulary of Gemma 4's size, 262,144 tokens and 514,906 merges: seconds and memory to load it, speed to encode."""

import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import gguf
import pytest
from gguf import TokenType

from gemma4_impl.tokenizer import Tokenizer

TOKENS, MERGES = 262_144, 514_906
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>"]
# 64 letters of 1, 2 and 3 bytes: all pairs are tokens, and enough triples, each of which two merges make.
LETTERS = (
    "▁" + "abcdefghijklmnopqrstuvwxyz" + "".join(map(chr, range(0x430, 0x445))) + "川山水火木金土日月人大小上中下左"
)
PEAK = """
import sys, torch
from gemma4_impl.gguf import tokenizer
from gemma4_impl.tokenizer import Tokenizer

def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM:"))

before = peak()
Tokenizer.from_pretrained(sys.argv[1])
print(peak() - before)
"""


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


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    folder, (tokens, merges) = tmp_path_factory.mktemp("real_size"), vocabulary()
    return {
        "tokenizer.json": write_folder(folder / "checkpoint", tokens, merges),
        "GGUF": write_gguf(folder / "vocab.gguf", tokens, merges),
    }


def _text(size: int) -> str:
    """Words of 1 to 9 letters, one character in a thousand an emoji that only its bytes spell."""
    rng = random.Random(1)
    words = []
    while size > 0:
        words.append("".join(rng.choices(LETTERS[1:], k=rng.randint(1, 9))) + ("🙂" if rng.random() < 0.005 else ""))
        size -= len(words[-1].encode()) + 1
    return " ".join(words)


def _peak(source: Path) -> float:
    """MB that loading adds to the peak of a process that has imported everything; NaN where there is no /proc."""
    if not Path("/proc/self/status").exists():
        return math.nan
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", PEAK, str(source)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return int(done.stdout) * 1024 / 1e6


def test_load(benchmark, sources) -> None:
    """Both, in turn; they must then give the same ids."""
    texts = ["", " the river \n\t🙂\x00 <|turn>", _text(20_000)]
    loaded = {name: Tokenizer.from_pretrained(path) for name, path in sources.items()}
    for text in texts:
        ids = loaded["tokenizer.json"].encode(text)
        assert loaded["GGUF"].encode(text) == ids
        assert loaded["GGUF"].decode(ids[1:], skip_special=False) == text
    assert [len(tokenizer) for tokenizer in loaded.values()] == [TOKENS] * 2
    del loaded
    seconds: dict[str, list[float]] = {name: [] for name in sources}

    def load_each() -> None:
        for name, path in sources.items():
            start = time.perf_counter()
            Tokenizer.from_pretrained(path)
            seconds[name].append(time.perf_counter() - start)

    benchmark.group = f"load {TOKENS:,} tokens and {MERGES:,} merges from tokenizer.json, then from GGUF"
    benchmark.pedantic(load_each, rounds=5, warmup_rounds=0 if benchmark.disabled else 1)
    for name, path in sources.items():
        median, peak = statistics.median(seconds[name]), _peak(path)
        benchmark.extra_info |= {f"{name}: seconds": median, f"{name}: peak MB": peak}
        print(f"\n{name}, {TOKENS:,} tokens and {MERGES:,} merges: {median:.2f} s, peak {peak:.0f} MB")


def test_encode(benchmark, sources) -> None:
    """A megabyte of text in one call."""
    tokenizer, text = Tokenizer.from_pretrained(sources["GGUF"]), _text(10**6)
    ids = benchmark.pedantic(tokenizer.encode, (text,), rounds=5)
    assert tokenizer.decode(ids) == text
    benchmark.group = "encode 1 MB with a real-size vocabulary"
    if benchmark.stats:
        seconds = benchmark.stats.stats.median
        benchmark.extra_info |= {"MB_per_second": len(text.encode()) / 1e6 / seconds, "tokens": len(ids)}
        print(f"\nencode: {len(text.encode()) / 1e6 / seconds:.1f} MB/s, {len(ids) / seconds / 1e6:.2f} M tokens/s")
