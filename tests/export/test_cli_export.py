"""`gemma4 export`, `export --inspect` and `run`: what they print, and one line with exit code 2 for what is wrong."""

import contextlib
import json
import os
import shutil

import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gemma4_impl import cli_export
from gemma4_impl.cli import cli
from gemma4_impl.export import folder, front
from gemma4_impl.export.folder import MANIFEST, PROGRAM
from gemma4_impl.export.inspect import inspect
from gemma4_impl.generate import generate
from gemma4_impl.generation import Sampling, encode_prompt
from gemma4_impl.model.decoder import Gemma4
from gemma4_impl.runner import Run
from gemma4_impl.tokenizer import Tokenizer


def run(*args: object, **kwargs) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in args], **kwargs)


def assert_one_line_error(result: Result, *parts: str) -> None:
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("gemma4: error: ")
    for part in parts:
        assert part in line


@pytest.fixture(scope="module", autouse=True)
def fake():
    """The fake backend in the place of XNNPACK's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(front.MODULES, "xnnpack", "fake_backend")
        yield


@pytest.fixture(scope="module")
def exported(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "x"
    options = ("--backend", "xnnpack", "--max-seq-len", 64, "--max-prefill-chunk", 6)
    result = run("export", tiny("E2B"), *options, "-o", out)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return out, result.stdout


def test_the_backends_are_those_of_the_manifest():
    assert cli_export.BACKENDS == folder.BACKENDS == tuple(front.MODULES)


def test_export_says_what_it_wrote(exported):
    out, stdout = exported
    lines = stdout.splitlines()
    assert lines[0].startswith(f"{out}: xnnpack, float32, ")
    assert lines[0].endswith("methods decode, prefill")
    assert lines[1].startswith("- context 64 tokens, up to 6 in one call; caches ")
    assert lines[2] == f"- what runs where: gemma4 export --inspect {out / PROGRAM}"


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        ((), ["Give SRC, --backend and --output, or --inspect FILE.pte"]),
        (("SRC", "--backend", "xnnpack"), ["Give SRC, --backend and --output"]),
        (("SRC", "--backend", "tpu", "-o", "x"), ["'tpu' is not one of", "xnnpack", "mlx", "cuda"]),
        (("SRC", "--inspect", "a.pte"), ["--inspect takes neither SRC nor"]),
        (("SRC", "--backend", "mlx", "-o", "x", "--json"), ["--json needs --inspect"]),
        (("SRC", "--backend", "xnnpack", "-o", "x", "--max-seq-len", "0"), ["--max-seq-len"]),
        (("nowhere", "--backend", "xnnpack", "-o", "x"), ["nowhere: no such folder"]),
        (("SRC", "--backend", "xnnpack", "-o", "x", "--max-seq-len", "9999"), ["max_position_embeddings = 512"]),
        (("SRC", "--backend", "xnnpack", "-o", "x", "--dtype", "float16"), ["do not compute in float16"]),
        (("SRC", "--backend", "xnnpack", "-o", "x", "--vision"), ["takes text only"]),
    ],
)
def test_export_refuses(args, parts, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_one_line_error(run("export", *(tiny("E2B") if a == "SRC" else a for a in args)), *parts)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", [("--tokens", "2,9,44,17,30,22,7,90"), ("--prompt", "An old house"), ("--raw",)])
def test_run_gives_what_generate_gives(what, exported, tiny):
    out, _ = exported
    if what == ("--raw",):
        what = ("--prompt", "-", "--raw")
    result = run("run", out, *what, "--max-new-tokens", 9, "--seed", 3, "--top-k", 30, input="An old house\n")
    assert result.exit_code == 0, result.output
    model, tokenizer = Gemma4.from_pretrained(tiny("E2B")), Tokenizer.from_pretrained(tiny("E2B"))
    prompt = [int(i) for i in what[1].split(",")] if what[0] == "--tokens" else "An old house"
    options = {"max_new_tokens": 9, "top_k": 30, "top_p": 0.95, "seed": 3, "chat": "--raw" not in what}
    want = generate(model, tokenizer, prompt, **options)
    assert result.stdout.encode() == f"{want.text}\n".encode()
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"gemma4: prompt {want.prompt_tokens} tokens, first token after 0.")
    assert f"; new {len(want.tokens)} tokens, " in line
    assert line.endswith(f" tokens/s; stop: {want.stop_reason}")


def test_run_refuses(exported, tmp_path, monkeypatch):
    out, _ = exported
    assert_one_line_error(run("run", out), "Give either --prompt or --tokens")
    assert_one_line_error(run("run", out, "--tokens", "1", "--top-p", 2), "top_p = 2.0: must be in (0, 1]")
    assert_one_line_error(run("run", out, "--tokens", "1,x"), "expected token ids separated by commas")
    assert_one_line_error(run("run", tmp_path / "no", "--tokens", "1"), "no such folder; `gemma4 export` makes one")
    assert_one_line_error(run("run", tmp_path, "--tokens", "1"), "no folder that `gemma4 export` wrote")
    assert_one_line_error(run("run", out, "--tokens", "7", "--image", "a.png"), "exported without a vision tower")
    damaged = shutil.copytree(out, tmp_path / "x")
    with (damaged / PROGRAM).open("r+b") as file:
        file.seek(100)
        file.write(b"\xff" * 8)
    assert_one_line_error(run("run", damaged, "--tokens", "1"), "its sha256 is not the one in manifest.json")
    raw = json.loads((damaged / MANIFEST).read_text())
    (damaged / MANIFEST).write_text(json.dumps(raw | {"backend": "vulkan"}))
    assert_one_line_error(run("run", damaged, "--tokens", "1"), "backend 'vulkan' is unknown")
    monkeypatch.setattr(front.importlib.util, "find_spec", lambda name: None)
    assert_one_line_error(run("run", out, "--tokens", "1"), "executorch", "pip install 'gemma4-parity[export]'")


def test_the_runner_gets_the_prompt_and_streams(exported, monkeypatch):
    out, _ = exported
    asked = {}

    def continued(folder, tokens, max_new_tokens, sampling, *, bos, stream):
        asked.update(folder=folder, tokens=tokens, count=max_new_tokens, sampling=sampling, bos=bos)
        for token in (70, 80, 1):
            stream(token)
        return Run((70, 80, 1), len(tokens), "eos", 0.1, 0.25, 0.5, False)

    monkeypatch.setattr("gemma4_impl.runner.generate", continued)
    result = run("run", out, "--runner", "--prompt", "An old house", "--seed", 3, "--max-new-tokens", 7)
    assert result.exit_code == 0, result.output
    tokenizer = Tokenizer.from_pretrained(out)
    assert asked == {
        "folder": out,
        "tokens": encode_prompt(tokenizer, "An old house"),
        "count": 7,
        "sampling": Sampling(1.0, 64, 0.95, 3),
        "bos": "any",
    }
    assert result.stdout == tokenizer.decode([70, 80]) + "\n"
    assert "first token after 0.250 s" in result.stderr
    assert result.stderr.endswith("new 3 tokens, 4.0 tokens/s; stop: eos\n")
    assert_one_line_error(run("run", out, "--runner", "--tokens", "7", "--image", "a.png"), "--runner takes no --image")
    assert_one_line_error(
        run("run", out, "--runner", "--tokens", ",".join("7" * 65)), "65 tokens but the program holds 64"
    )


class Half(nn.Module):
    """A linear and a tanh, which XNNPACK takes, and a cumulative sum, which it does not."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 16)

    def forward(self, x):
        return torch.cumsum(self.linear(x).tanh(), 1)


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    program = torch.export.export(Half(), (torch.zeros(2, 8),), strict=True)
    edge = to_edge_transform_and_lower(
        {"forward": program},
        partitioner=[XnnpackPartitioner()],
        constant_methods={"get_x": 3, "get_ids": [1, 2], "get_y": 0.5},
        compile_config=EdgeCompileConfig(_check_ir_validity=False),
    )
    path = tmp_path_factory.mktemp("half") / "half.pte"
    edge.to_executorch().save(str(path))
    return path


def test_inspect(half):
    result = run("export", "--inspect", half, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["constants"] == {"get_x": 3, "get_ids": [1, 2], "get_y": 0.5}
    method = found["methods"]["forward"]
    assert method["inputs"] == [{"dtype": "float32", "shape": [2, 8], "dynamic": False}]
    assert method["outputs"] == [{"dtype": "float32", "shape": [2, 16], "dynamic": False}]
    part = method["delegates"]["XnnpackBackend"]
    assert (part["calls"], part["nodes"]) == (1, 2)
    assert method["operators"] == {"aten::cumsum.out": 1}
    assert method["nodes_outside"] == 1
    assert method["share_delegated"] == pytest.approx(2 / 3)
    sizes = found["bytes"]
    assert sizes["file"] == os.path.getsize(half)
    assert sizes["delegates"] == part["bytes"]
    assert sizes["delegates' constants"] >= 4 * (8 * 16 + 16)
    assert sizes["program"] + sizes["delegates"] + sizes["delegates' constants"] <= sizes["file"]

    lines = run("export", "--inspect", half).stdout.splitlines()
    assert lines[0].startswith(f"{half}: file ")
    assert any(line.split()[:4] == ["forward", "XnnpackBackend", "1", "2"] and "66.7 %" in line for line in lines)
    assert "- forward outside delegates: aten::cumsum.out x1" in lines
    assert "- get_ids = [1, 2]" in lines


def test_inspect_refuses(half, tmp_path):
    file, data = tmp_path / "m.pte", half.read_bytes()
    assert_one_line_error(run("export", "--inspect", file), "No such file")
    for content, what in (
        (b"", "empty, no ExecuTorch program"),
        (b"short", "5 bytes are no ExecuTorch program"),
        (b"\0" * 100, "no ExecuTorch program"),
        (data[:200], "truncated: 200 bytes of at least"),
        (data[:-64], "truncated: segment"),
        (data[:40] + b"\xff" * 60 + data[100:], "damaged"),
    ):
        file.write_bytes(content)
        assert_one_line_error(run("export", "--inspect", file), str(file), what)


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_a_damaged_program_is_shown_or_refused(half, tmp_path_factory, data):
    """Bytes changed anywhere, most of them in the flatbuffer: something is shown, or it is a ValueError."""
    content = bytearray(half.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1) | st.integers(0, 1500))
        content[at] = data.draw(st.integers(0, 255))
    file = tmp_path_factory.mktemp("damaged") / "m.pte"
    file.write_bytes(content[: data.draw(st.none() | st.integers(0, len(content)))])
    with contextlib.suppress(ValueError):
        json.dumps(inspect(file))
