"""capture, compare, parity and tiny: what they write, their exit codes, and one clear line for each bad input."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from gemma4_impl.cli import cli
from gemma4_impl.config import FULL, SLIDING
from gemma4_impl.quant.recipe import RECIPES
from gemma4_impl.quant.save import quantize_checkpoint
from parity import cli as _commands  # noqa: F401  registers them
from parity import engine, tapfile
from parity.faults import FAULTS
from reference.tiny import aligned, make_tiny
from reference.tiny_gguf import make_tiny_gguf


def run(*args: object) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in args])


def refused(result: Result, *words: str) -> None:
    """Exit code 2, and nothing but one line on stderr that holds every one of `words`."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("gemma4: error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr


@pytest.fixture(scope="module")
def taps(tiny, tmp_path_factory) -> dict[str, Path]:
    """name -> tap file of the tiny 26B-A4B: candidate and reference in bfloat16, and their truth."""
    folder = tmp_path_factory.mktemp("taps")
    made = {name: folder / f"{name}.safetensors" for name in ("truth", "reference", "candidate", "other", "float32")}
    common = ("capture", tiny("26B-A4B"), "--length", "20", "--device", "cpu")
    for name, options in {
        "truth": ("--impl", "hf", "--dtype", "float64", "--weights", "bfloat16"),
        "reference": ("--impl", "hf", "--dtype", "bfloat16", "--routing", made["truth"]),
        "candidate": ("--impl", "torch", "--dtype", "bfloat16", "--routing", made["truth"], "--path", "decode"),
        "float32": ("--impl", "hf", "--dtype", "float32"),
        "other": ("--impl", "torch", "--tokens", "2,300"),
    }.items():
        arguments = common if name != "other" else (*common[:2], *common[4:])
        result = run(*arguments, *options, "-o", made[name])
        assert result.exit_code == 0, result.output
    return made


def test_a_capture_says_where_it_comes_from(taps):
    meta = tapfile.load(taps["candidate"]).meta
    assert (meta.impl, meta.dtype, meta.path, meta.device, meta.routing) == (
        *("torch", "bfloat16", "decode", "cpu", "hf float64"),
    )
    assert len(meta.tokens) == 20
    assert "torch" in meta.versions
    assert meta.top_k


def test_captured_apart_and_compared_later_they_are_green(taps):
    result = run("compare", taps["candidate"], taps["reference"], "--truth", taps["truth"])
    assert result.exit_code == 0, result.output
    assert "green" in result.stdout


def test_a_wrong_candidate_is_red_and_the_tap_is_named(taps, tmp_path):
    file = tapfile.load(taps["candidate"])
    file.taps["layers.1.mlp"] *= 1.5
    tapfile.save(tmp_path / "bad.safetensors", file.taps, file.meta)
    result = run("compare", tmp_path / "bad.safetensors", taps["reference"], "--truth", taps["truth"])
    assert result.exit_code == 1
    assert "layers.1.mlp" in result.stdout


def test_without_a_truth_there_are_differences_and_no_verdict(taps):
    result = run("compare", taps["candidate"], taps["reference"])
    assert result.exit_code == 0
    assert "layers.0.router" in result.stdout
    assert "green" not in result.stdout


def test_a_glob_selects_taps(tiny, tmp_path):
    assert run("capture", tiny("E2B"), "--taps", "layers.3.*", "-o", tmp_path / "a").exit_code == 0
    assert {name.split(".")[1] for name in tapfile.load(tmp_path / "a").taps} == {"3"}


def test_what_cannot_be_compared_is_refused(taps, tmp_path):
    refused(run("compare", taps["candidate"], tmp_path / "none"), "none", "no such file")
    refused(run("compare", taps["candidate"], taps["other"]), "different tokens")
    refused(run("compare", taps["candidate"], taps["float32"], "--truth", taps["truth"]), "bfloat16", "float32")
    refused(run("compare", taps["candidate"], taps["reference"], "--truth", taps["reference"]), "float64")


def test_parity_writes_both_reports_and_is_green(tiny, tmp_path):
    result = run("parity", tiny("E2B"), "--dtype", "float32", "--path", "full", "--path", "decode", "-o", tmp_path)
    assert result.exit_code == 0, result.output
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["summary"]["red"] == 0
    assert data["summary"]["worst_ratio"] <= 2
    assert [c["path"] for c in data["cases"]] == ["full", "decode"]
    assert "<html" in (tmp_path / "report.html").read_text()


def test_parity_of_a_wrong_model_exits_with_1_and_names_the_tap(tiny, tmp_path, monkeypatch):
    class Wrong(engine.TorchCandidate):
        def __init__(self, *args):
            super().__init__(*args)
            FAULTS["window_too_small"].inject(self)

    monkeypatch.setattr(engine, "TorchCandidate", Wrong)
    result = run("parity", tiny("E4B"), "--dtype", "float32", "--path", "full", "-o", tmp_path)
    assert result.exit_code == 1
    assert "layers.0.self_attn.out" in result.stdout.replace("\n", "")
    divergence = json.loads((tmp_path / "report.json").read_text())["cases"][0]["first_divergence"]
    assert (divergence["tap"], divergence["origin"]) == ("layers.0.self_attn.out", "created")


# Quantized candidates


@pytest.fixture(scope="module")
def quantized(tmp_path_factory) -> dict[str, Path]:
    """A checkpoint, and what was made of it; `other` is another one."""
    folder = tmp_path_factory.mktemp("quantized")
    overrides = aligned("31B", 32) | {"num_hidden_layers": 2, "layer_types": [SLIDING, FULL]}
    original = make_tiny("31B", folder / "original", overrides=overrides)
    quantize_checkpoint(original, folder / "int4", RECIPES["default"])
    return {
        "original": original,
        "folder": folder / "int4",
        "file": make_tiny_gguf(original, folder / "model-Q4_0.gguf", "Q4_0"),
        "other": make_tiny("31B", folder / "other", overrides=overrides | {"sliding_window": 5}),
    }


_QUICK = ("--dtype", "float32", "--path", "full")


def test_a_quantized_candidate_of_each_kind_is_split_in_three(quantized, tmp_path):
    candidates = [f"--candidate=quantized:{quantized['folder']}", f"--candidate=gguf:{quantized['file']}"]
    result = run("parity", quantized["original"], "--candidate", "torch", *candidates, *_QUICK, "-o", tmp_path)
    assert result.exit_code == 0, result.output
    data = json.loads((tmp_path / "report.json").read_text())
    assert [c["candidate"] for c in data["cases"]] == [
        *("torch", "quantized:int4 dequantized", "quantized:int4"),
        *("gguf:model-Q4_0 dequantized", "gguf:model-Q4_0"),
    ]
    assert [entry["candidate"] for entry in data["quantized"]] == ["quantized:int4", "gguf:model-Q4_0"]
    assert all(entry["stages"]["weights"]["logits"]["kl_mean"] > 0 for entry in data["quantized"])
    assert len(data["meta"]["inputs"]) == 3
    assert len({inputs["fingerprint"] for inputs in data["meta"]["inputs"].values()}) == 3
    page = (tmp_path / "report.html").read_text()
    assert "Quantized: original quantized:int4" in page
    assert "Quantized: original gguf:model-Q4_0" in page
    assert "original gguf:model-Q4_0" in result.stdout


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_quantized_candidate_needs_no_original(quantized, tmp_path, kind: str):
    candidate = f"{'gguf' if kind == 'file' else 'quantized'}:{quantized[kind]}"
    result = run("parity", "--candidate", candidate, *_QUICK, "-o", tmp_path)
    assert result.exit_code == 0, result.output
    (entry,) = json.loads((tmp_path / "report.json").read_text())["quantized"]
    assert entry["stages"]["weights"] is None
    assert entry["checkpoint"] == quantized[kind].stem


def test_a_recipe_makes_a_candidate_of_the_checkpoint(quantized, tmp_path):
    result = run(
        "parity", quantized["original"], "--candidate", "quantized:sensitive", *_QUICK, "-o", tmp_path / "report"
    )
    assert result.exit_code == 0, result.output
    (entry,) = json.loads((tmp_path / "report" / "report.json").read_text())["quantized"]
    assert entry["candidate"] == "quantized:sensitive"
    assert {t["kind"] for t in entry["tensors"] if t["quantized"]} == {"int4, group 32", "int8, a row"}


def test_a_file_of_another_checkpoint_is_red(quantized, tmp_path):
    shutil.copytree(quantized["original"], tmp_path / "changed")
    weights = tmp_path / "changed" / "model.safetensors"
    tensors = load_file(weights)
    save_file({name: t * 1.5 if "mlp.up" in name else t for name, t in tensors.items()}, weights, {"format": "pt"})
    candidate = f"gguf:{quantized['file']}"
    result = run("parity", tmp_path / "changed", "--candidate", candidate, *_QUICK, "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "layers.0.mlp.up_proj.weight is not a rounding of the original" in result.stdout
    assert "2 tensors wrong" in result.stdout


def test_quantized_weights_captured_apart_are_green(quantized, tmp_path):
    made = {name: tmp_path / f"{name}.safetensors" for name in ("truth", "reference", "candidate")}
    common = ("capture", quantized["file"], "--length", "20", "--device", "cpu")
    for name, options in {
        "truth": ("--impl", "hf", "--dtype", "float64", "--weights", "bfloat16"),
        "reference": ("--impl", "hf", "--dtype", "bfloat16"),
        "candidate": ("--impl", "torch", "--dtype", "bfloat16", "--path", "decode"),
    }.items():
        result = run(*common, *options, "-o", made[name])
        assert result.exit_code == 0, result.output
    result = run("compare", made["candidate"], made["reference"], "--truth", made["truth"])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("checkpoints", "candidate", "words"),
    [
        (["original"], "int4", ["--candidate 'int4'", "quantized:DIR", "gguf:FILE"]),
        (["original"], "gguf:", ["gguf:FILE"]),
        (["original"], "gguf:nothing.gguf", ["nothing.gguf", "no such file"]),
        ([], "gguf:Q9_9", ["Q9_9", "Q4_K_M", "Q8_0"]),
        (["original"], "quantized:nothing", ["nothing", "no such folder", "default", "sensitive"]),
        (["original"], "quantized:{original}", ["names no quantization", "gemma4 quantize"]),
        (["original"], "gguf:{folder}", ["int4", "no file"]),
        (["original"], "gguf:{original}/config.json", ["config.json", "GGUF"]),
        (["other"], "gguf:{file}", ["sliding_window = 9", "but 5", "not made from this checkpoint"]),
        (["other"], "quantized:{folder}", ["sliding_window = 9", "but 5"]),
        (["original", "other"], "gguf:{file}", ["one CHECKPOINT alone"]),
        (["folder"], "torch", ["--candidate quantized:", "CHECKPOINT"]),
        (["file"], "torch", ["--candidate gguf:", "CHECKPOINT"]),
    ],
)
def test_a_candidate_that_cannot_be_is_one_line_and_exit_code_2(quantized, tmp_path, checkpoints, candidate, words):
    paths = [quantized[name] for name in checkpoints]
    named = {name: str(path) for name, path in quantized.items()}
    refused(run("parity", *paths, "--candidate", candidate.format(**named), "-o", tmp_path / "out"), *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("package", ["gguf", "torchao.prototype.safetensors.safetensors_support"])
def test_without_another_reader_there_is_one_line(quantized, tmp_path, monkeypatch, package: str):
    monkeypatch.setitem(sys.modules, package, None)
    candidate = f"gguf:{quantized['file']}" if package == "gguf" else f"quantized:{quantized['folder']}"
    words = ["not installed", "pip install", "gguf-py" if package == "gguf" else "torchao"]
    refused(run("parity", quantized["original"], "--candidate", candidate, "-o", tmp_path / "out"), *words)


def test_tiny_makes_a_checkpoint_once(tmp_path):
    assert run("tiny", "E4B", "-o", tmp_path / "t").exit_code == 0
    assert (tmp_path / "t" / "model.safetensors").is_file()
    refused(run("tiny", "E4B", "-o", tmp_path / "t"), str(tmp_path / "t"))
    refused(run("tiny", "E5B", "-o", tmp_path / "u"), "E5B", "E2B")


BAD = {
    "a folder that is not there": (lambda path: shutil.rmtree(path), ["no such folder"]),
    "no config": (lambda path: (path / "config.json").unlink(), ["config.json"]),
    "broken config": (lambda path: (path / "config.json").write_text("{"), ["config.json", "JSON"]),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), ["model.safetensors"]),
    "truncated weights": (
        lambda path: (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-100]),
        ["model.safetensors"],
    ),
    "another model": (
        lambda path: (path / "config.json").write_text('{"model_type": "llama"}'),
        ["config.json", "model_type", "llama"],
    ),
    "config and tensors disagree": (
        lambda path: _edit_config(path, intermediate_size=200),
        ["layers.0.mlp.down_proj.weight"],
    ),
    "an unknown switch": (lambda path: _edit_config(path, attn_logit_softcapping=50.0), ["attn_logit_softcapping"]),
    "a hostile index": (lambda path: _hostile_index(path), ["points outside", "../../etc/passwd"]),
}


def _edit_config(path: Path, **changes: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


def _hostile_index(path: Path) -> None:
    (path / "model.safetensors").rename(path / "a.safetensors")
    index = {"weight_map": {"model.norm.weight": "../../etc/passwd"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("command", ["parity", "capture", "generate"])
@pytest.mark.parametrize("what", BAD)
def test_a_bad_checkpoint_is_one_line_and_exit_code_2(tiny, tmp_path, command: str, what: str):
    path = tmp_path / "checkpoint"
    shutil.copytree(tiny("31B"), path)
    damage, words = BAD[what]
    damage(path)
    options = {"parity": ["-o", tmp_path / "out"], "capture": ["-o", tmp_path / "out"], "generate": ["--prompt", "hi"]}
    refused(run(command, path, *options[command]), *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tokens", "2,5,512"], ["token id 512", "vocabulary of 512"]),
        (["--tokens", "2,-1"], ["token id -1"]),
        (["--tokens", "2,x"], ["--tokens", "2,x"]),
        (["--length", "100000"], ["100000", "context"]),
        (["--tokens", "2", "--length", "3"], ["one of"]),
        (["--device", "tpu"], ["--device", "tpu"]),
    ],
)
@pytest.mark.parametrize("command", ["parity", "capture"])
def test_bad_options_are_one_line_and_exit_code_2(tiny, tmp_path, command: str, options: list[str], words: list[str]):
    refused(run(command, tiny("31B"), *options, "-o", tmp_path / "out"), *words)
    assert not (tmp_path / "out").exists()


def test_other_refusals_of_capture_and_parity(tiny, tmp_path):
    out = ["-o", tmp_path / "out"]
    refused(run("capture", tiny("31B"), "--impl", "hf", "--path", "decode", *out), "--path decode")
    refused(run("capture", tiny("31B"), "--dtype", "bfloat16", "--weights", "float32", *out), "--weights")
    refused(run("capture", tiny("31B"), "--taps", "nothing.*", *out), "nothing.*")
    refused(run("capture", tiny("31B"), "--dtype", "int8", *out), "int8")
    refused(run("parity", tiny("31B"), tiny("31B"), *out), "twice")


def test_a_prompt_from_stdin_serves_every_checkpoint(tiny, tmp_path):
    arguments = ["parity", tiny("E2B"), tiny("31B"), "--prompt", "-", "--dtype", "float32", "--path", "full"]
    result = CliRunner().invoke(cli, [*map(str, arguments), "-o", str(tmp_path)], input="a river\n")
    assert result.exit_code == 0, result.output
    inputs = json.loads((tmp_path / "report.json").read_text())["meta"]["inputs"]
    first, second = (value["tokens"] for value in inputs.values())
    assert first == second
    assert len(first) > 2
