"""The manifest of an exported folder: written and read back, and refused in one line when anything in it is wrong."""

import contextlib
import copy
import json
import os
import shutil

import pytest
import torch
from configs import hub
from exported import manifest_for, write_exported
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma4_impl.config import TextConfig
from gemma4_impl.export.folder import MANIFEST, PROGRAM, ExportError, Manifest, hash_files, open_folder
from gemma4_impl.export.program import Lowered, Settings, constants

CONFIG = TextConfig.from_dict(hub())


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_exported(tmp_path_factory.mktemp("exported") / "x", CONFIG)


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "x")


def change(folder, edit) -> None:
    raw = json.loads((folder / MANIFEST).read_text())
    edit(raw)
    (folder / MANIFEST).write_text(json.dumps(raw))


def test_round_trip(written):
    exported = open_folder(written)
    manifest = exported.manifest
    assert manifest == Manifest.from_dict(json.loads(json.dumps(manifest.to_dict())))
    assert (manifest.max_seq_len, manifest.max_prefill_chunk, manifest.dtype) == (64, 8, torch.float32)
    assert manifest.vocab_size == CONFIG.vocab_size
    assert set(CONFIG.eos_token_id) < set(manifest.eos_ids)
    assert exported.config == CONFIG
    assert exported.program == written / PROGRAM
    assert manifest.nbytes == sum(f.stat().st_size for f in written.rglob("*") if f.is_file() and f.name != MANIFEST)
    assert "sub/a.txt" in manifest.files


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_seq_len": 0}, "max_seq_len = 0: must be an integer >= 1"),
        ({"max_seq_len": True}, "max_seq_len = True"),
        ({"max_prefill_chunk": 65}, "max_prefill_chunk = 65 exceeds max_seq_len = 64"),
        ({"dtype": torch.int8}, "must be float32, bfloat16 or float16"),
    ],
)
def test_settings_are_checked(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Settings(**{"max_seq_len": 64, "max_prefill_chunk": 8, "dtype": torch.float32} | kwargs)


ONES = torch.ones(1, 8, dtype=torch.long)


@pytest.mark.parametrize(
    ("tokens", "position", "message"),
    [
        (ONES, 1, "position 1 does not continue the sequence, which ends at 16"),
        (torch.ones(1, 9, dtype=torch.long), 16, "9 tokens at once; the program takes 8"),
        (ONES * CONFIG.vocab_size, 16, f"token id {CONFIG.vocab_size} is outside the vocabulary"),
        (-ONES, 16, "token id -1 is outside"),
        (ONES.int(), 16, r"tokens are int32 \[1, 8\]; expected int64 \[1, T\]"),
        (ONES[0], 16, "expected int64"),
        (ONES[:, :0], 16, "expected int64"),
        (ONES.repeat(2, 1), 16, "expected int64"),
    ],
)
def test_what_programs_are_fed_is_checked(tokens, position, message):
    limits = manifest_for(CONFIG, {}).limits
    with pytest.raises(ValueError, match=message):
        limits.check_chunk(tokens, position, 16)


def test_a_sequence_ends_with_the_context():
    limits = manifest_for(CONFIG, {}).limits
    assert limits.check_chunk(ONES, 56, 56) == 8
    assert limits.check_chunk(ONES[:, :1], 63, 63) == 1
    for position in (57, 63, 64):
        with pytest.raises(ValueError, match=rf"position {position + 7} is past the end \(max_seq_len = 64\)"):
            limits.check_chunk(ONES, position, position)


def _without(*keys):
    def edit(raw):
        for key in keys[:-1]:
            raw = raw[key]
        del raw[keys[-1]]

    return edit


def _with(value, *keys):
    def edit(raw):
        for key in keys[:-1]:
            raw = raw[key]
        raw[keys[-1]] = value

    return edit


WRONG = {
    "no backend": (_without("backend"), "backend is missing"),
    "unknown backend": (_with("vulkan", "backend"), "backend 'vulkan' is unknown; known: xnnpack, mlx, cuda"),
    "version": (_with(2, "format_version"), "format_version 2 is unknown; this program reads 1"),
    "type": (_with("1", "format_version"), "format_version = '1': must be of type int"),
    "dtype": (_with("float31", "dtype"), "dtype = 'float31': no such dtype"),
    "not a dtype": (_with("nn", "dtype"), "dtype = 'nn': no such dtype"),
    "context": (_with(4, "constants", "get_max_seq_len"), "max_prefill_chunk = 8 exceeds max_seq_len = 4"),
    "chunk": (_with(7, "constants", "get_max_prefill_chunk"), "takes up to 8 tokens, but .*get_max_prefill_chunk is 7"),
    "constant": (_with(1.5, "constants", "get_bos_id"), "constants.get_bos_id = 1.5: must be an integer"),
    "a list": (_with([1], "constants", "get_n_layers"), "constants.get_n_layers = .1. is of the wrong type"),
    "no list": (_with(1, "constants", "get_eos_ids"), "constants.get_eos_ids = 1 is of the wrong type"),
    "eos": (_with([999_999], "constants", "get_eos_ids"), "token id 999999 is outside the vocabulary"),
    "layers": (_with(77, "constants", "get_n_layers"), "get_n_layers is 77, but config.json says"),
    "window": (_with(5000, "constants", "get_sliding_window"), "get_sliding_window is 5000, but config.json says"),
    "method": (_without("methods", "decode"), "methods: decode is missing, which xnnpack programs have"),
    "inputs": (_without("methods", "decode", "inputs"), "methods.decode.inputs is missing"),
    "shape": (_with([-1], "methods", "decode", "inputs", 0, "shape"), "-1 is neither a size nor"),
    "bounds": (_with([{"min": 3, "max": 2}], "methods", "decode", "inputs", 0, "shape"), "is neither a size nor"),
    "no program": (_without("files", "model.pte"), "files: model.pte is missing"),
    "no config": (_without("files", "config.json"), "files: config.json is missing"),
    "hash": (_with("0" * 64, "files", "model.pte", "sha256"), "model.pte: its sha256 is not the one in manifest.json"),
    "no hash": (_with("xyz", "files", "model.pte", "sha256"), "files.model.pte: bytes and sha256 are not those"),
    "size": (_with(1, "files", "model.pte", "bytes"), "model.pte: has 12 bytes, but manifest.json says 1"),
    "fingerprint": (_without("source", "fingerprint"), "source.fingerprint is missing"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_manifest_is_one_line(folder, name):
    edit, message = WRONG[name]
    change(folder, edit)
    with pytest.raises(ExportError, match=message) as error:
        open_folder(folder)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize(
    "path", ["../secret", "/etc/passwd", "a/../../secret", "..", ".", "", "a//b", "a\\b", "C:x", "x\0", "./model.pte"]
)
def test_a_path_that_is_none_of_the_folders(folder, path):
    change(folder, _with({"bytes": 1, "sha256": "0" * 64}, "files", path))
    with pytest.raises(ExportError, match="is not the name of a file in the folder"):
        open_folder(folder)


def test_a_link_that_leaves_the_folder(folder, tmp_path):
    (tmp_path / "outside").write_bytes((folder / PROGRAM).read_bytes())
    (folder / PROGRAM).unlink()
    os.symlink(tmp_path / "outside", folder / PROGRAM)
    with pytest.raises(ExportError, match=r"model\.pte leads out of the folder"):
        open_folder(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / PROGRAM).unlink(), "model.pte: no such file, but manifest.json lists it"),
        (lambda f: (f / PROGRAM).write_bytes(b"other bytes!"), "its sha256 is not the one in manifest.json"),
        (lambda f: (f / "sub" / "a.txt").write_text("longer"), "a.txt: has 6 bytes, but manifest.json says"),
        (lambda f: (f / "other.ptd").write_bytes(b""), "other.ptd is in the folder but not listed"),
        (lambda f: (f / MANIFEST).unlink(), "no folder that `gemma4 export` wrote"),
        (lambda f: (f / MANIFEST).write_bytes(b"\xff\xfe"), "not valid JSON"),
        (lambda f: (f / MANIFEST).write_text("[" * 100_000), "not valid JSON"),
        (lambda f: (f / MANIFEST).write_text('{"format_version": 1' + "0" * 5000 + "}"), "not valid JSON"),
        (lambda f: (f / MANIFEST).write_text(" " * (1 << 24) + "{}"), "too large for a manifest"),
    ],
)
def test_a_damaged_folder(folder, damage, message):
    damage(folder)
    with pytest.raises(ExportError, match=message):
        open_folder(folder)


def test_a_config_that_is_none(folder):
    (folder / "config.json").write_text("{}")
    change(folder, lambda raw: raw["files"].update(hash_of(folder)))
    with pytest.raises(ExportError, match=r"config\.json: model_type is None"):
        open_folder(folder)


def hash_of(folder):
    return {name: {"bytes": f.bytes, "sha256": f.sha256} for name, f in hash_files(folder).items()}


def test_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder; `gemma4 export` makes one"):
        open_folder(tmp_path / "nothing")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
VALID = manifest_for(CONFIG, {}).to_dict()


def _places(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield from _places(part, (*path, key))


@given(st.data())
@settings(max_examples=120, deadline=None)
def test_any_mangled_manifest_is_read_or_refused(data):
    """Values replaced, keys removed and added: a Manifest that survives its own writing, or an ExportError."""
    raw = copy.deepcopy(VALID)
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(list(_places(raw))))
        if not path:
            raw = data.draw(JSON)
            break
        parent = raw
        for key in path[:-1]:
            parent = parent[key]
        how = data.draw(st.sampled_from(["replace", "remove", "add"]))
        if how == "replace":
            parent[path[-1]] = data.draw(JSON)
        elif how == "remove":
            del parent[path[-1]]
        elif isinstance(parent, dict):
            parent[data.draw(st.text(max_size=8))] = data.draw(JSON)
        if not isinstance(raw, dict | list):
            break
    with contextlib.suppress(ExportError):
        manifest = Manifest.from_dict(raw)
        assert repr(Manifest.from_dict(manifest.to_dict())) == repr(manifest)


@given(st.binary(max_size=200))
@settings(max_examples=60, deadline=None)
def test_any_bytes_for_a_manifest(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("bytes")
    (folder / MANIFEST).write_bytes(data)
    with pytest.raises(ExportError):
        open_folder(folder)


def test_constants_have_the_tokenizers_stops():
    found = constants(CONFIG, Settings(16, 4, torch.float32, eos_ids=(7,)))
    assert found["get_eos_ids"] == sorted({*CONFIG.eos_token_id, 7})
    assert Lowered(lambda folder: None, {}, found, {}).extra == {}
