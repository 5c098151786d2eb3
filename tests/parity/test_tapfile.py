"""Tap files: round trip, refusal of what is not one, and of captures that cannot be compared."""

import contextlib
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from parity import tapfile
from parity.tapfile import TapFile, TapMeta

META = TapMeta("f" * 64, (2, 5, 9), "torch", "float32", "float32", "cpu", versions={"torch": "2"}, precision={"a": "b"})
TAPS = {
    "norm": torch.randn(1, 3, 4),
    "embed": torch.full((1, 3, 4), torch.nan),
    "layers.0.self_attn.q": torch.ones(1, 3, 2, 2),
}


def test_round_trip_keeps_order_values_and_metadata(tmp_path):
    tapfile.save(tmp_path / "sub" / "a.safetensors", TAPS, META)
    back = tapfile.load(tmp_path / "sub" / "a.safetensors")
    assert list(back.taps) == list(TAPS)
    assert all(torch.equal(back.taps[n], TAPS[n]) or back.taps[n].isnan().all() for n in TAPS)
    assert back.meta == META
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["a.safetensors"]


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    tapfile.save(path, TAPS, META)
    before = path.read_bytes()

    def half_way(tensors, file, metadata):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(tapfile, "save_file", half_way)
    with pytest.raises(KeyboardInterrupt):
        tapfile.save(path, TAPS, META)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        tapfile.load(tmp_path / "none")
    save_file({"x": torch.ones(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="not a tap file"):
        tapfile.load(tmp_path / "weights.safetensors")
    tapfile.save(tmp_path / "flat.safetensors", {"norm": torch.ones(3)}, META)
    with pytest.raises(ValueError, match=r"norm is not a tap of shape \[B, L, ...\]"):
        tapfile.load(tmp_path / "flat.safetensors")
    save_file({"x": torch.ones(1, 1, 1)}, tmp_path / "bare.safetensors", {"format": tapfile.FORMAT})
    with pytest.raises(ValueError, match="not a whole tap file"):
        tapfile.load(tmp_path / "bare.safetensors")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_is_a_value_error_and_nothing_else(tmp_path, data):
    path = tmp_path / "a.safetensors"
    tapfile.save(path, TAPS, META)
    raw = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        raw = raw[: data.draw(st.integers(0, len(raw) - 1))]
    else:
        raw[data.draw(st.integers(0, min(len(raw) - 1, 600)))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(raw)
    with contextlib.suppress(ValueError):
        tapfile.load(path)


def test_only_captures_of_the_same_weights_and_tokens_compare():
    one = TapFile(TAPS, META)
    tapfile.check_comparable(one, one, ("a", "b"))
    with pytest.raises(ValueError, match="a and b were captured from different weights"):
        tapfile.check_comparable(one, TapFile(TAPS, replace(META, fingerprint="0" * 64)), ("a", "b"))
    with pytest.raises(ValueError, match="different tokens"):
        tapfile.check_comparable(one, TapFile(TAPS, replace(META, tokens=(2, 5))), ("a", "b"))
