"""Ten thousand damaged headers: each is read or refused in one line, at once, and without memory."""

import os
import random
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
import torch
from raw_gguf import ARRAY, STRING, U16, U32, array, header, key, tensor, text, u32

from gemma4_impl.checkpoint import CheckpointError, check_fits
from gemma4_impl.config import ConfigError
from gemma4_impl.gguf.checkpoint import GGUFCheckpoint
from gemma4_impl.gguf.reader import GGUFError, GGUFFile
from gemma4_impl.model.decoder import Gemma4
from gemma4_impl.names import GGUF_ROPE_FREQS
from reference.tiny_gguf import make_tiny_gguf

COUNT = 10_000
CHUNKS = 4
TRACED = 20
"""Every how many files memory is counted, which takes several times as long."""

INTERESTING = [0, 1, 2, 7, 8, 9, 31, 32, 33, 255, 1 << 16, 1 << 22, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32]
INTERESTING += [1 << 40, 1 << 61, (1 << 63) - 1, 1 << 63, (1 << 64) - 32, (1 << 64) - 8, (1 << 64) - 1]


@pytest.fixture(scope="module")
def bases(tiny, tmp_path_factory) -> list[tuple[bytes, int]]:
    """Headers to damage, with `rope_freqs` behind them, and the length of the other data, which are holes."""
    folder = tmp_path_factory.mktemp("bases")
    out = []
    for variant, options in (("E2B", {}), ("26B-A4B", {"separate_experts": True})):
        file = make_tiny_gguf(tiny(variant), folder / f"{variant}.gguf", **options)
        first = min(GGUFFile(file).tensors.values(), key=lambda info: info.offset)
        assert first.name == GGUF_ROPE_FREQS
        end = first.offset + first.nbytes
        out.append((file.read_bytes()[:end], file.stat().st_size - end))
    keys = [
        key("general.architecture", STRING, text("gemma4")),
        key("general.alignment", U32, u32(64)),
        key("split.count", U16, b"\1\0"),
        key("some.strings", ARRAY, array(STRING, text("a") + text("bc") + text(""), 3)),
    ]
    small = header(keys, [tensor("token_embd.weight", [32, 4], 8), tensor("x", [2, 2, 2], 1, 192)], alignment=64)
    return [*out, (small, 256)]


def damaged(base: bytes, rng: random.Random) -> bytes:
    """The header with one to three things wrong."""
    data = bytearray(base)
    # Most of a real header is vocabulary: half the damage is done near the start, where the counts are.
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        end = len(data) if rng.random() < 0.5 else min(len(data), 600)
        at = rng.randrange(max(1, end))
        # What changes no length gets further in than what shifts all that follows.
        kind = rng.choice([0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7])
        if kind == 0:
            for _ in range(rng.choice([1, 1, 2, 8])):
                data[rng.randrange(at, min(len(data), at + 32))] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            data[at : at + 8] = rng.choice(INTERESTING).to_bytes(8, "little")
        elif kind == 3:
            data[at : at + 4] = (rng.choice(INTERESTING) & 0xFFFFFFFF).to_bytes(4, "little")
        elif kind == 4:
            data[at:at] = rng.randbytes(rng.randint(1, 16))
        elif kind == 5:
            del data[at : at + rng.randint(1, 64)]
        elif kind == 6:
            other = rng.randrange(max(1, end))
            length = rng.randint(1, 64)
            data[at : at + length], data[other : other + length] = data[other : other + length], data[at : at + length]
        else:
            data[at:at] = data[at : at + rng.randint(1, 200)]
        if not data:
            break
    return bytes(data)


def read(path: Path) -> str:
    """What becomes of the file: how far it can be read, all of it that a command would look at."""
    try:
        file = GGUFFile(path)
        for value in file.metadata.values():
            if hasattr(value, "tolist"):
                value.tolist()
        for name in file.tensors:
            assert file.bytes(name).nbytes == file.tensors[name].nbytes
    except GGUFError as error:
        check_message(path, error)
        return "refused"
    except FileNotFoundError:
        return "a part is missing"
    try:
        checkpoint = GGUFCheckpoint(path)
        with torch.device("meta"):
            check_fits(Gemma4(checkpoint.config), checkpoint)
    except (GGUFError, ConfigError, CheckpointError) as error:
        check_message(path, error)
        return "no model"
    return "read"


def check_message(path: Path, error: Exception) -> None:
    message = str(error)
    assert message.startswith(str(path.parent)), message
    assert message.isprintable(), message
    assert len(message) < 800, message


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_damaged_headers(chunk, bases, tmp_path):
    outcomes: Counter[str] = Counter()
    path = tmp_path / "x.gguf"
    for seed in range(chunk * COUNT // CHUNKS, (chunk + 1) * COUNT // CHUNKS):
        rng = random.Random(seed)
        base, length = rng.choice(bases)
        data = damaged(base, rng)
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        if rng.random() < 0.7:
            os.truncate(path, len(data) + length)
        traced = seed % TRACED == 0
        if traced:
            tracemalloc.start()
        start = time.thread_time()
        try:
            outcomes[read(path)] += 1
        except Exception as error:
            pytest.fail(f"seed {seed}: {type(error).__name__}: {error}")
        seconds = time.thread_time() - start
        if traced:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < len(data) + (4 << 20), (seed, peak)
        assert seconds < 1, (seed, seconds)
    # Both sides of the line are visited, or this tests nothing.
    assert outcomes["refused"] > COUNT // CHUNKS / 4, outcomes
    assert min(outcomes["read"], outcomes["no model"]) > COUNT // CHUNKS / 100, outcomes


def test_the_bases_are_whole(bases, tmp_path):
    found = []
    for i, (data, length) in enumerate(bases):
        path = tmp_path / f"{i}.gguf"
        path.write_bytes(data + bytes(length))
        found.append(read(path))
    assert found == ["read", "read", "no model"]
