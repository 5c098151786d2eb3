"""The command `gemma4 quantize`."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from gemma4_impl import Gemma4
from gemma4_impl.checkpoint import open_checkpoint
from gemma4_impl.cli import cli
from gemma4_impl.cli_quantize import parse_size
from gemma4_impl.quant import save
from reference.tiny import aligned, make_tiny

TOKENS = torch.randint(107, 512, (1, 24), generator=torch.Generator().manual_seed(0))


def run(*args: object) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in args])


def assert_one_line_error(result: Result, *parts: str) -> None:
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("gemma4: error: ")
    for part in parts:
        assert part in line


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("tiny") / "E2B"
    return make_tiny("E2B", out, dtype="bfloat16", multimodal=True, overrides=aligned("E2B", 32))


def test_quantizes_and_generates(source, tmp_path):
    out = tmp_path / "q"
    result = run("quantize", source, "-o", out, "--shard-size", "300kB")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""  # no progress bar where there is no terminal
    report = json.loads((out / "quantization.json").read_text())
    first, *rest = result.stdout.splitlines()
    assert first.startswith(f"{out}: 1.4 MB -> ")
    assert f"{report['summary']['bits_per_weight']:.2f} bits a weight" in first
    assert f"SQNR {report['summary']['sqnr_db']:.1f} dB" in first
    assert any("tensors of embed_vision, vision_tower" in line for line in rest)
    assert any("lm_head.weight" in line for line in rest)
    assert rest[-1] == f"- every tensor: {out / 'quantization.html'}"
    assert len(list(out.glob("*.safetensors"))) > 1
    result = run("generate", out, "--prompt", "hi", "--max-new-tokens", 4, "--temperature", 0)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("variant", ["E4B", "26B-A4B", "31B"])
def test_what_it_makes_is_the_model(tmp_path, variant):
    """Loaded back in float32: the logits of the dequantized weights, up to rounding. Those are themselves 25 to 29
    units of 2**-24 away from float64; four times that is allowed."""
    source = make_tiny(variant, tmp_path / "s", overrides=aligned(variant, 32))
    assert run("quantize", source, "-o", tmp_path / "q").exit_code == 0
    checkpoint = open_checkpoint(tmp_path / "q")
    model = Gemma4(checkpoint.config).eval()
    model.load_state_dict({name: checkpoint.tensor(name) for name in checkpoint.files})
    with torch.no_grad():
        expected, found = model(TOKENS).double(), Gemma4.from_pretrained(tmp_path / "q")(TOKENS).double()
    assert (found - expected).norm() <= 100 * 2**-24 * expected.norm()


def test_recipe_from_a_file(source, tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text(
        'name = "mine"\nrules = [{pattern = "*.mlp.*_proj.weight", config = {bits = 8, group_size = "axis"}}, '
        '{pattern = "*", config = "keep"}]\n'
    )
    result = run("quantize", source, "-o", tmp_path / "q", "--recipe", recipe)
    assert result.exit_code == 0, result.output
    checkpoint = open_checkpoint(tmp_path / "q")
    assert {name for name in checkpoint.files if checkpoint.quantized(name) is not None} == {
        name for name in checkpoint.files if ".mlp." in name
    }
    assert "lm_head" not in result.stdout


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("2GiB", 2**31),
        ("500MB", 5 * 10**8),
        ("1 gb".replace(" ", ""), 10**9),
        ("7", 7),
        ("3k", 3000),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "0GB", "-1", "5 GB x", "GB", "1e9", "5TB5", "9" * 40, "٣GB"])
def test_bad_sizes(source, tmp_path, text):
    assert_one_line_error(run("quantize", source, "-o", tmp_path / "q", f"--shard-size={text}"), "--shard-size", "5GB")


def test_bad_input(source, tmp_path):
    out = tmp_path / "q"
    assert_one_line_error(run("quantize", source), "-o")
    assert_one_line_error(run("quantize"), "SRC")
    assert_one_line_error(run("quantize", tmp_path / "none", "-o", out), str(tmp_path / "none"))
    assert_one_line_error(run("quantize", source, "-o", out, "--recipe", "nonsense"), "nonsense", "default")
    assert_one_line_error(run("quantize", source, "-o", source / "q"), "inside the checkpoint")
    assert_one_line_error(run("quantize", source, "-o", source), "already exists")
    (tmp_path / "file").touch()
    assert_one_line_error(run("quantize", source, "-o", tmp_path / "file/q"), str(tmp_path))
    assert_one_line_error(run("quantize", tmp_path / "a.gguf", "-o", out), "GGUF")
    assert not out.exists()


def test_truncated_weights(source, tmp_path):
    broken = shutil.copytree(source, tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert_one_line_error(run("quantize", broken, "-o", tmp_path / "q"), str(weights))
    assert not (tmp_path / "q").exists()


def test_rows_that_no_group_divides(tmp_path):
    source = make_tiny("31B", tmp_path / "s", overrides={"hidden_size": 40})
    result = run("quantize", source, "-o", tmp_path / "q")
    assert_one_line_error(result, "rows of 40", "groups of 32")


def test_ctrl_c_leaves_nothing(source, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(save, "_write_config", interrupted)
    result = run("quantize", source, "-o", tmp_path / "a/q")
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "")
    assert list(tmp_path.iterdir()) == []


def test_being_ended_leaves_nothing(source, tmp_path):
    code = (
        "import os, signal, time; from gemma4_impl.cli import cli; import gemma4_impl.quant.save as s\n"
        "def end(*_): os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)\n"
        "s._write_config = end; cli()"
    )
    command = [sys.executable, "-c", code, "quantize", str(source), "-o", str(tmp_path / "q")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stderr) == (130, "")
    assert list(tmp_path.iterdir()) == []


def test_the_bar_shows_on_a_terminal(source, tmp_path):
    code = (
        "import sys; sys.stderr.isatty = lambda: True; from gemma4_impl.cli import cli; "
        "import gemma4_impl.quant.save as s; s._BLOCK = 20000; cli()"
    )
    command = [sys.executable, "-c", code, "quantize", str(source), "-o", str(tmp_path / "q")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"FORCE_COLOR": "1"})
    assert done.returncode == 0, done.stderr
    assert "quantizing" in done.stderr
    assert "Mweights/s" in done.stderr


def test_help_does_not_wait_for_torch():
    code = (
        "import sys, gemma4_impl.cli as c; c.cli(['quantize', '-h'], standalone_mode=False); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--shard-size" in done.stdout
    assert done.stdout.endswith("False\n")
