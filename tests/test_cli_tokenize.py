"""`gemma4 tokenize`: lines for people and pipes, JSON, decoding, and one line for what is wrong."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma4_impl.cli import cli
from gemma4_impl.cli_tokenize import parse_ids, printable
from gemma4_impl.tokenizer import Tokenizer
from reference.tiny_gguf import make_tiny_gguf

TEXT = "Hello  river\n\t\x00\u200d🙂 \\n▁<|turn>"


def run(*args: object, **kwargs) -> Result:
    return CliRunner().invoke(cli, ["tokenize", *map(str, args)], **kwargs)


def assert_one_line_error(result: Result, *parts: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("gemma4: error: ")
    for part in parts:
        assert part in line


@pytest.fixture(scope="module")
def sources(tiny, tmp_path_factory) -> dict[str, Path]:
    file = make_tiny_gguf(tiny("E2B"), tmp_path_factory.mktemp("gguf") / "tiny.gguf")
    return {"folder": tiny("E2B"), "gguf": file}


@pytest.fixture(params=["folder", "gguf"])
def source(request, sources) -> Path:
    return sources[request.param]


def test_lines_are_an_id_a_tab_and_the_token(source, tiny):
    result = run(source, "--text", TEXT)
    assert result.exit_code == 0, result.output
    tokenizer = Tokenizer.from_pretrained(tiny("E2B"))
    ids = tokenizer.encode(TEXT)
    lines = result.stdout.removesuffix("\n").split("\n")
    assert [int(line.split("\t")[0]) for line in lines] == ids
    shown = [line.split("\t")[1] for line in lines]
    assert shown[:2] == ["<bos>", "He"]
    assert shown[-1] == "<|turn>"
    assert {"\\n", "▁", "<0x00>", "\\\\"} <= set(shown)
    assert result.stderr == f"gemma4: {len(ids)} tokens\n"
    assert run(source, "--text", "e", "--no-bos").stderr == "gemma4: 1 token\n"


def test_no_text_has_no_lines(source):
    assert run(source, "--text", "").stdout == "2\t<bos>\n"
    result = run(source, "--text", "", "--no-bos")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "gemma4: 0 tokens\n")


def test_a_file_counts_to_the_last_byte(source, tmp_path):
    for text in ("river", "river\n", "river\r\n", "\ufeffriver\r\n\n"):
        (tmp_path / "text").write_bytes(text.encode())
        ids = json.loads(run(source, "--file", tmp_path / "text", "--json").stdout)["ids"]
        decoded = run(source, "--text", ",".join(map(str, ids)), "--decode", "--no-bos", "--json")
        assert json.loads(decoded.stdout) == {"text": text}


def test_stdin_goes_without_its_last_line_break(source):
    plain = run(source, "--text", "naïve river")
    for text in ("naïve river", "naïve river\n", "naïve river\r\n"):
        assert run(source, "--text", "-", input=text.encode()).stdout == plain.stdout


def test_json_holds_what_lines_do(source):
    result = json.loads(run(source, "--text", TEXT, "--json").stdout)
    lines = run(source, "--text", TEXT).stdout.removesuffix("\n").split("\n")
    assert [f"{i}\t{printable(piece)}" for i, piece in zip(result["ids"], result["pieces"], strict=True)] == lines


def test_decode_shows_special_tokens_and_takes_its_own_output(source):
    output = run(source, "--text", TEXT).stdout
    for ids in (output, output.replace("\n", "\r\n"), ", ".join(line.split("\t")[0] for line in output.splitlines())):
        result = run(source, "--text", "-", "--decode", input=ids)
        assert result.stdout == f"<bos>{TEXT}\n".replace("▁", " ")
    # One BOS is the command's own; a second one is text.
    assert run(source, "--text", "2,2,105", "--decode", "--no-bos").stdout == "<bos><|turn>\n"
    assert run(source, "--text", "105,2", "--decode", "--no-bos").stdout == "<|turn><bos>\n"
    assert run(source, "--text", " ", "--decode").stdout == "\n"


def test_bytes_that_are_no_character(source):
    ids = json.loads(run(source, "--text", "🙂", "--no-bos", "--json").stdout)["ids"]
    assert len(ids) == 4
    result = run(source, "--text", ",".join(map(str, ids[:3])), "--decode")
    assert (result.exit_code, result.stdout) == (0, "\ufffd\ufffd\ufffd\n")


@settings(max_examples=200)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=12))
def test_printable_is_one_line_and_says_all(piece):
    shown = printable(piece)
    assert shown.isprintable()
    pieces, at = [], 0
    while at < len(shown):
        end = at + ({"x": 4, "u": 6, "U": 10}.get(shown[at + 1], 2) if shown[at] == "\\" else 1)
        escaped = shown[at:end]
        pieces.append(escaped.encode().decode("unicode_escape") if len(escaped) > 1 else escaped)
        at = end
    assert "".join(pieces) == piece


@settings(max_examples=200)
@given(st.lists(st.integers(0, 2**63 - 1)), st.sampled_from([",", " ", ", ", "\n", "\r\n", "\tpiece\n"]))
def test_ids_may_be_separated_in_any_way(ids, separator):
    assert parse_ids(separator.join(map(str, ids))) == ids


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        ([], ["either --text or --file"]),
        (["--text", "a", "--file", "b"], ["either --text or --file"]),
        (["--file", "none.txt"], ["none.txt: no such file"]),
        (["--file", "."], ["directory"]),
        (["--text", "a\udcff"], ["not valid Unicode"]),
        (["--text", "2,x", "--decode"], ["number 2 is 'x'", "2,105,9259"]),
        (["--text", "-5", "--decode"], ["number 1 is '-5'"]),
        (["--text", "2," + "9" * 10**5, "--decode"], ["number 2 is '9999"]),
        (["--text", "2 512", "--decode"], ["token 2 of 2, 512, is not in its vocabulary"]),
        (["--text", "9223372036854775807", "--decode"], ["9223372036854775807, is not in its vocabulary"]),
        (["--text", "٣", "--decode"], ["number 1 is '٣'"]),
    ],
)
def test_bad_input_is_one_line(source, args, parts):
    result = run(source, *args)
    assert_one_line_error(result, *parts)
    assert len(result.stderr) < 400


def test_text_that_is_not_utf8(source, tmp_path):
    (tmp_path / "latin1.txt").write_bytes("na\xefve".encode("latin-1"))
    assert_one_line_error(run(source, "--file", tmp_path / "latin1.txt"), "latin1.txt: not UTF-8 text (byte 2)")
    assert_one_line_error(run(source, "--text", "-", input=b"ab\xff"), "--text -: stdin is not UTF-8 text (byte 2)")


def test_bad_sources(tiny, tmp_path, sources):
    assert_one_line_error(run(tmp_path / "none", "--text", "a"), "no such folder")
    assert_one_line_error(run(tmp_path / "none.gguf", "--text", "a"), "none.gguf: no such file")
    assert_one_line_error(run(tmp_path, "--text", "a"), "tokenizer.json: no such file")
    damaged = shutil.copy(sources["gguf"], tmp_path / "damaged.gguf")
    damaged.write_bytes(damaged.read_bytes()[:5000])
    assert_one_line_error(run(damaged, "--text", "a"), "damaged.gguf: ", "truncated or damaged")


def test_pipes(source):
    """As a program: what a terminal cannot show is escaped, and a reader that stops early ends it quietly."""
    command = f"from gemma4_impl.cli import cli; cli(['tokenize', {str(source)!r}, '--text', '-'])"

    def piped(text: str, shell: str = "cat", **env: str) -> subprocess.CompletedProcess:
        line = f'"{sys.executable}" -c "{command}" | {shell}'
        root = Path(__file__).parents[1]
        return subprocess.run(line, shell=True, cwd=root, input=text.encode(), capture_output=True, env=env)

    latin = piped(" ", PYTHONIOENCODING="latin-1")
    assert latin.stdout.splitlines()[1].split(b"\t")[1] == b"\\u2581"
    early = piped("river " * 20_000, "head -n 1")
    assert early.stdout == b"2\t<bos>\n"
    assert b"Traceback" not in early.stderr
