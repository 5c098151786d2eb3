"""The command line: text on stdout, speed on stderr, and one line with exit code 2 for everything that is wrong."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner, Result

from gemma4_impl import generate as verbs
from gemma4_impl.cli import Commands, cli, user_errors
from gemma4_impl.generate import generate
from gemma4_impl.model.decoder import Gemma4
from gemma4_impl.tokenizer import Tokenizer

BAD_UTF8 = b"a\xff"


def run(*args: object, **kwargs) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in args], **kwargs)


def assert_one_line_error(result: Result, *parts: str) -> None:
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("gemma4: error: ")
    assert "Traceback" not in result.stderr
    for part in parts:
        assert part in lines[0]


@pytest.fixture
def folder(tiny, tmp_path: Path) -> Path:
    """A checkpoint that a test may damage."""
    return shutil.copytree(tiny("E2B"), tmp_path / "checkpoint")


def test_generates(tiny):
    result = run("generate", tiny("E2B"), "--prompt", "hi", "--max-new-tokens", 12, "--seed", 3, "--device", "cpu")
    assert result.exit_code == 0, result.output
    model, tokenizer = Gemma4.from_pretrained(tiny("E2B")), Tokenizer.from_pretrained(tiny("E2B"))
    expected = generate(model, tokenizer, "hi", max_new_tokens=12, top_k=64, top_p=0.95, seed=3)
    assert result.stdout.encode() == f"{expected.text}\n".encode()
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"gemma4: prompt {expected.prompt_tokens} tokens, ")
    assert f"new {len(expected.tokens)} tokens" in line
    assert "GB/s" in line
    assert line.endswith(f"stop: {expected.stop_reason}")


@pytest.mark.parametrize("variant", ["E4B", "26B-A4B", "31B"])
def test_every_variant_generates(tiny, variant):
    result = run("generate", tiny(variant), "--prompt", "hi", "--max-new-tokens", 3, "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output


def test_one_token_has_no_decode_speed(tiny):
    result = run("generate", tiny("E2B"), "--prompt", "hi", "--max-new-tokens", 1)
    assert "GB/s" not in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_prompt_from_stdin_and_as_ids(tiny):
    options = ["--max-new-tokens", "5", "--temperature", "0", "--device", "cpu"]
    argument = run("generate", tiny("E2B"), "--prompt", "naïve\nriver", *options)
    for text in ("naïve\nriver", "naïve\nriver\n", "naïve\nriver\r\n"):
        assert run("generate", tiny("E2B"), "--prompt", "-", *options, input=text.encode()).stdout == argument.stdout
    raw = run("generate", tiny("E2B"), "--prompt", "hi", "--raw", *options)
    ids = ",".join(map(str, Tokenizer.from_pretrained(tiny("E2B")).encode("hi")))
    assert run("generate", tiny("E2B"), "--tokens", ids, *options).stdout == raw.stdout


def test_ctrl_c_prints_what_there_is(tiny, monkeypatch):
    calls, decode = itertools.count(), verbs.decode_one_token

    def interrupted(*args):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return decode(*args)

    monkeypatch.setattr(verbs, "decode_one_token", interrupted)
    result = run("generate", tiny("E2B"), "--prompt", "hi", "--seed", 3)
    assert result.exit_code == 130
    (line,) = result.stderr.splitlines()
    assert line.startswith("gemma4: prompt ")
    assert line.endswith("stop: interrupted")


def test_ctrl_c_while_loading(tiny, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Gemma4, "from_pretrained", interrupted)
    result = run("generate", tiny("E2B"), "--prompt", "hi")
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "")


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["--prompt", "hi", "--nonsense"], ["--nonsense", "gemma4 generate --help"]),
        ([], ["either --prompt or --tokens"]),
        (["--prompt", "hi", "--tokens", "2"], ["either --prompt or --tokens"]),
        (["--prompt", "hi", "--dtype", "int8"], ["--dtype", "bfloat16"]),
        (["--prompt", "hi", "--device", "gpu"], ["--device 'gpu'", "cuda"]),
        (["--prompt", "hi", "--device", "cuda:99"], ["--device 'cuda:99'", "--device cpu"]),
        (["--prompt", "hi", "--device", "meta"], ["--device 'meta'"]),
        (["--prompt", "hi", "--temperature", "-1"], ["temperature = -1.0"]),
        (["--prompt", "hi", "--temperature", "nan"], ["temperature = nan"]),
        (["--prompt", "hi", "--temperature", "warm"], ["--temperature", "warm"]),
        (["--prompt", "hi", "--top-k", "0"], ["top_k = 0"]),
        (["--prompt", "hi", "--top-p", "1.5"], ["top_p = 1.5"]),
        (["--prompt", "hi", "--seed", "-1"], ["seed = -1"]),
        (["--prompt", "hi", "--max-new-tokens", "0"], ["--max-new-tokens"]),
        (["--prompt", "hi", "--max-seq-len", "0"], ["--max-seq-len"]),
        (["--prompt", "hi", "--max-seq-len", "4"], ["tokens but the context holds 4", "512"]),
        (["--prompt", "hi", "--max-seq-len", "1000"], ["max_seq_len = 1000", "512"]),
        (["--prompt", "x" * 1000], ["tokens but the context holds 512"]),
        (["--prompt", "a\udc80"], ["not valid Unicode"]),
        (["--tokens", "2,x"], ["--tokens '2,x'", "commas"]),
        (["--tokens", ""], ["--tokens ''"]),
        (["--tokens", "2,512"], ["token id 512", "512"]),
    ],
)
def test_bad_arguments(tiny, args, parts):
    assert_one_line_error(run("generate", tiny("E2B"), *args), *parts)


def test_bad_stdin(tiny):
    assert_one_line_error(run("generate", tiny("E2B"), "--prompt", "-", input=BAD_UTF8), "stdin is not UTF-8", "byte 1")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none(tiny):
    result = run("generate", tiny("E2B"), "--prompt", "hi", "--device", "cuda")
    assert_one_line_error(result, "--device 'cuda': torch cannot use it on this machine")


def test_bad_commands(tmp_path):
    assert_one_line_error(run("nonsense"), "nonsense", "gemma4 --help")
    assert_one_line_error(run("--nonsense"), "--nonsense")
    assert_one_line_error(run("generate"), "CHECKPOINT")
    assert_one_line_error(run("generate", tmp_path / "none", "--prompt", "hi"), str(tmp_path / "none"))
    assert_one_line_error(run("generate", __file__, "--prompt", "hi"), __file__)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", None),
        ("config.json", b"{"),
        ("config.json", b'{"model_type": "llama"}'),
        ("model.safetensors", None),
        ("model.safetensors", b""),
        ("model.safetensors", b"x" * 100),
        ("tokenizer.json", None),
        ("tokenizer.json", b"{}"),
        ("tokenizer_config.json", BAD_UTF8),
        ("generation_config.json", b"[]"),
        ("chat_template.jinja", b"{% if %}"),
        ("chat_template.jinja", b"{{ raise_exception('one\ntwo') }}"),
        ("chat_template.jinja", None),
    ],
)
def test_damaged_checkpoints(folder, name, content):
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    assert_one_line_error(run("generate", folder, "--prompt", "hi"), str(folder))


def test_truncated_weights(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert_one_line_error(run("generate", folder, "--prompt", "hi"), "model.safetensors")


def test_raw_needs_no_template(folder):
    (folder / "chat_template.jinja").unlink()
    result = run("generate", folder, "--prompt", "hi", "--raw", "--max-new-tokens", 2)
    assert result.exit_code == 0, result.output


def test_config_that_asks_for_unknown_maths(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"new_switch": True}))
    assert_one_line_error(run("generate", folder, "--prompt", "hi"), "new_switch")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0.\nDefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
        OSError(28, "No space left on device"),
        ModuleNotFoundError("No module named 'jax'"),
    ],
)
def test_errors_of_the_machine(tiny, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(Gemma4, "from_pretrained", fail)
    message = str(error).splitlines()[0] if str(error) else "MemoryError"
    assert_one_line_error(run("generate", tiny("E2B"), "--prompt", "hi"), message)


def test_a_bug_keeps_its_traceback(tiny, monkeypatch):
    def bug(*args, **kwargs):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(Gemma4, "from_pretrained", bug)
    result = run("generate", tiny("E2B"), "--prompt", "hi")
    assert str(result.exception) == "shapes cannot be multiplied"


def test_debug_lets_the_error_through(tmp_path, monkeypatch):
    monkeypatch.setenv("GEMMA4_DEBUG", "1")
    result = run("generate", tmp_path / "none", "--prompt", "hi")
    assert isinstance(result.exception, FileNotFoundError)


def test_lists_stay_lists():
    with pytest.raises(click.ClickException) as caught, user_errors():
        raise ValueError("two tensors\nare missing:\n  - a\n  - b\n    (shape 3)\n")
    assert caught.value.message == "two tensors are missing:\n  - a\n  - b (shape 3)"


def test_user_errors_is_a_decorator_and_added_commands_have_it():
    group = Commands("gemma4")

    @group.command()
    def outer() -> None:
        inner()

    @user_errors()
    def inner() -> None:
        raise ValueError("wrong\nvalue")

    result = CliRunner().invoke(group, ["outer"])
    assert (result.exit_code, result.stderr) == (2, "gemma4: error: wrong value\n")


def test_help_and_version():
    for args in (["--help"], ["-h"], ["generate", "--help"]):
        result = run(*args)
        assert result.exit_code == 0
        assert result.stdout.startswith("Usage: gemma4 ")
    assert run("--version").stdout.startswith("gemma4 ")
    assert "Usage" in run().output


def test_help_does_not_wait_for_torch():
    code = "import sys, gemma4_impl.cli as c; c.cli(['-h'], standalone_mode=False); print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.endswith("False\n")


def test_a_reader_that_leaves_early_is_no_error(tiny):
    read, write = os.pipe()
    os.close(read)
    code = "from gemma4_impl.cli import cli; cli()"
    args = [sys.executable, "-c", code, "generate", tiny("E2B"), "--prompt", "hi", "--seed", "0"]
    with os.fdopen(write, "w") as stdout:
        result = subprocess.run(args, stdout=stdout, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "error" not in result.stderr
