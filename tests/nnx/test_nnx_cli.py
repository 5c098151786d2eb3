"""`gemma4 generate --backend jax`: what PyTorch writes, images, a mesh, and one line for everything that is wrong."""

import subprocess
import sys

import pytest
from click.testing import CliRunner, Result

from gemma4_impl.cli import cli
from gemma4_impl.nnx.command import find_devices
from gemma4_impl.nnx.engine import Generator
from parity.images import drawn

PROMPT = ("--prompt", "Where does the river go?", "--max-new-tokens", "12")
GREEDY = ("--temperature", "0", "--device", "cpu")


def run(*args: object) -> Result:
    return CliRunner().invoke(cli, ["generate", *map(str, args)])


@pytest.fixture(scope="module")
def written(tiny) -> Result:
    """By one device."""
    return run(tiny("31B"), *PROMPT, *GREEDY, "--backend", "jax")


def test_writes_what_pytorch_writes(tiny, written):
    expected = run(tiny("31B"), *PROMPT, *GREEDY)
    assert (written.exit_code, expected.exit_code) == (0, 0), written.output
    assert written.stdout == expected.stdout
    (line,) = written.stderr.splitlines()
    assert line.startswith("gemma4: prompt ")
    assert "new 12 tokens" in line
    assert " GB/s; stop: length" in line


def test_images(tiny_images, tmp_path):
    path, images = tiny_images("31B"), []
    for i, image in enumerate(drawn()[:2]):
        image.save(tmp_path / f"{i}.png")
        images += ["--image", tmp_path / f"{i}.png"]
    args = (path, *images, "--prompt", "What is it?", "--max-new-tokens", 6, *GREEDY)
    result = run(*args, "--backend", "jax")
    assert result.exit_code == 0, result.output
    assert result.stdout == run(*args).stdout


def test_a_mesh_changes_no_token(tiny, written):
    result = run(tiny("31B"), *PROMPT, *GREEDY, "--backend", "jax", "--mesh", "fsdp=1,tp=8")
    assert result.exit_code == 0, result.output
    assert result.stdout == written.stdout


def test_ctrl_c_prints_what_there_is(tiny, monkeypatch):
    def interrupted(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Generator, "warm_up", lambda *_args: None)
    monkeypatch.setattr(Generator, "decode", interrupted)
    result = run(tiny("31B"), *PROMPT, "--backend", "jax")
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1].endswith("new 1; stop: interrupted")


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["--mesh", "tp=8"], ["--mesh needs --backend jax"]),
        (["--backend", "jax", "--mesh", "tp=3"], ["mesh 'tp=3' is for 3 devices, but there are 8"]),
        (["--backend", "jax", "--mesh", "pp=8"], ["unknown axis 'pp'"]),
        (["--backend", "jax", "--device", "gpux"], ["--device 'gpux'", "try --device cpu"]),
        (["--backend", "jax", "--device", "cpu:8"], ["--device 'cpu:8'", "the devices of cpu are 0 to 7"]),
        (["--backend", "jax", "--temperature", "-1"], ["temperature = -1.0"]),
        (["--backend", "jax", "--max-seq-len", "4"], ["tokens but the context holds 4"]),
        (["--backend", "tpu"], ["--backend", "jax"]),
    ],
)
def test_one_line_for_everything_that_is_wrong(tiny, args, parts):
    result = run(tiny("31B"), *PROMPT, *args)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("gemma4: error: ")
    for part in parts:
        assert part in line


def test_devices():
    assert len(find_devices("cpu")) == 8
    assert [device.id for device in find_devices("cpu:3")] == [3]


def test_without_jax_one_line_names_the_extra(tiny):
    code = "import sys; sys.modules['jax'] = None; from gemma4_impl.cli import cli; cli()"
    args = ["generate", str(tiny("31B")), *PROMPT, "--backend", "jax"]
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "jax not installed" in line
    assert "gemma4-parity[jax]" in line
