"""Two thousand damaged safetensors folders: each is read or refused in one line, at once, and without memory."""

import json
import os
import random
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
import torch
from configs import hub, random_model, save

from gemma4_impl.checkpoint import Checkpoint, CheckpointError, check_fits
from gemma4_impl.config import ConfigError, TextConfig
from gemma4_impl.model.decoder import Gemma4
from gemma4_impl.names import to_hf

COUNT = 2_000
TRACED = 20
INDEX = "model.safetensors.index.json"
NUMBERS = [
    b"-1",
    b"0",
    b"1e999",
    b"99999999999999999999",
    b"18446744073709551615",
    b"4294967296",
    b"true",
    b"null",
    b'""',
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    """The files of a checkpoint in two shards, by name."""
    tensors = random_model(TextConfig.from_dict(hub()), torch.float32).state_dict()
    del tensors["lm_head.weight"]
    renamed = {to_hf(name): tensor.clone() for name, tensor in tensors.items()}
    folder = save(tmp_path_factory.mktemp("whole") / "m", renamed, shards=2)
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def damaged(data: bytes, is_weights: bool, rng: random.Random) -> bytes:
    """A file with one to three things wrong in what describes it: the header of weights, all of a JSON file."""
    length = 8 + int.from_bytes(data[:8], "little") if is_weights else len(data)
    head, rest = bytearray(data[:length]), data[length:]
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(max(1, len(head)))
        kind = rng.randrange(7)
        if kind == 0:
            head[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            del head[at:]
            rest = b""
        elif kind == 2 and is_weights:
            head[:8] = rng.choice([0, 1, 100, 1 << 31, 1 << 40, 1 << 63, (1 << 64) - 1]).to_bytes(8, "little")
        elif kind == 3:
            digits = [i for i, c in enumerate(head) if 48 <= c < 58]
            if digits:
                where = rng.choice(digits)
                head[where : where + rng.randint(1, 3)] = rng.choice(NUMBERS)
        elif kind == 4:
            del head[at : at + rng.randint(1, 40)]
        elif kind == 5:
            head[at:at] = head[at : at + rng.randint(1, 200)]
        else:
            head[at:at] = rng.choice([b"[" * 2000, b'{"a":' * 2000, b"\\u0000", b"\xff", b"9" * 5000, rng.randbytes(8)])
    if is_weights and rng.random() < 0.7 and len(head) >= 8:
        # The length is right again, so that the damage inside is looked at.
        head[:8] = (len(head) - 8).to_bytes(8, "little")
    return bytes(head) + rest


def read(folder: Path) -> str:
    try:
        checkpoint = Checkpoint(folder)
        with torch.device("meta"):
            model = Gemma4(checkpoint.config)
        for name in check_fits(model, checkpoint):
            assert tuple(checkpoint.tensor(name).shape) == checkpoint.shape(name)
        checkpoint.fingerprint()
    except (CheckpointError, ConfigError, FileNotFoundError) as error:
        message = str(error)
        assert message.startswith(str(folder)), message
        assert "\n" not in message
        assert len(message) < 2000, message
        return "refused"
    return "read"


def test_damaged_folders(whole, tmp_path):
    outcomes: Counter[str] = Counter()
    folder = tmp_path / "m"
    folder.mkdir()
    for name, data in whole.items():
        (folder / name).write_bytes(data)
    assert read(folder) == "read"
    for seed in range(COUNT):
        rng = random.Random(seed)
        chosen = rng.choice(sorted(whole))
        for name, data in whole.items():
            # A new file each time: an open mapping of the old one must not be cut.
            (folder / name).unlink(missing_ok=True)
            is_weights = name.endswith(".safetensors")
            (folder / name).write_bytes(damaged(data, is_weights, rng) if name == chosen else data)
        traced = seed % TRACED == 0
        if traced:
            tracemalloc.start()
        start = time.thread_time()
        try:
            outcomes[read(folder)] += 1
        except Exception as error:
            pytest.fail(f"seed {seed}, {chosen}: {type(error).__name__}: {error}")
        seconds = time.thread_time() - start
        if traced:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < sum(map(len, whole.values())) + (4 << 20), (seed, peak)
        assert seconds < 1, (seed, seconds)
    assert outcomes["refused"] > COUNT / 4, outcomes
    assert outcomes["read"] > COUNT / 50, outcomes


# What random damage does not find


def header_only(folder: Path, entries: object, data: bytes = b"", length: int | None = None) -> Path:
    raw = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    (folder / "model.safetensors").write_bytes(
        (len(raw) if length is None else length).to_bytes(8, "little") + raw + data
    )
    (folder / "config.json").write_text(json.dumps(hub()))
    return folder


def entry(dtype: str, shape: list[int], start: int, stop: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


BIG = 1 << 62
NAME = "model.norm.weight"


@pytest.mark.parametrize(
    "entries",
    [
        {NAME: entry("F32", [4], 0, BIG)},
        {NAME: entry("F32", [BIG], 0, 16)},
        {NAME: entry("F32", [BIG, BIG], 0, 16)},
        {NAME: entry("F32", [1 << 32, 1 << 32], 0, 16)},
        {NAME: entry("F32", [4], 16, 0)},
        {NAME: entry("F32", [4], -16, 0)},
        {NAME: entry("F32", [-4], 0, 16)},
        {NAME: entry("F32", [4.5], 0, 16)},
        {NAME: entry("F33", [4], 0, 16)},
        {NAME: entry("F32", [5], 0, 16)},
        {NAME: entry("F32", [4], 0, 16), "model.x": entry("F32", [4], 0, 16)},
        {NAME: entry("F32", [4], 0, 16), "model.x": entry("F32", [2], 8, 16)},
        {NAME: [1, 2]},
        [],
        b"",
        b"{",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"\xff" * 64,
        b'{"' + NAME.encode() + b'":{"dtype":"F32","shape":[' + b"9" * 100_000 + b'],"data_offsets":[0,16]}}',
    ],
)
def test_hostile_headers(entries, tmp_path):
    folder = header_only(tmp_path, entries, bytes(16))
    start = time.thread_time()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a complete safetensors file") as error:
        Checkpoint(folder)
    assert time.thread_time() - start < 1
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_experts", "global_head_dim", "sliding_window"])
@pytest.mark.parametrize("value", [1 << 31, 1 << 63, 10**30])
def test_sizes_of_no_model(key, value, tmp_path):
    """As Python integers these are fine, and torch would overflow."""
    with pytest.raises(ConfigError, match=rf"config: {key} = \d+.*: (is larger than that of any model|must )"):
        TextConfig.from_dict(hub(**{key: value}))


def test_the_largest_sizes_make_a_model():
    sizes = dict.fromkeys(("hidden_size", "num_experts", "moe_intermediate_size", "intermediate_size"), (1 << 20) - 1)
    with torch.device("meta"):
        model = Gemma4(
            TextConfig.from_dict(hub(**sizes, vocab_size=(1 << 20) - 1, vocab_size_per_layer_input=(1 << 20) - 1))
        )
    assert model.layers[0].experts.gate_up_proj.shape == ((1 << 20) - 1, 2 * ((1 << 20) - 1), (1 << 20) - 1)


@pytest.mark.parametrize("length", [1 << 63, (1 << 64) - 1, 1 << 40, 100_000_001])
def test_a_header_longer_than_the_file(length, tmp_path):
    with pytest.raises(CheckpointError, match=r"not a complete safetensors file"):
        Checkpoint(header_only(tmp_path, {}, length=length))
    os.truncate(tmp_path / "model.safetensors", 200 << 30)
    start = time.thread_time()
    with pytest.raises(CheckpointError, match=r"not a complete safetensors file"):
        Checkpoint(tmp_path)
    assert time.thread_time() - start < 1
