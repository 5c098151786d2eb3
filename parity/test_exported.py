"""Exported programs of the variants that a backend takes: in budget on every cache path; quantized ones in parts."""

import json
import math
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from gemma4_impl.cli import cli
from gemma4_impl.config import TextConfig
from gemma4_impl.export.front import export
from gemma4_impl.taps import tap_names
from parity import budget, exported
from parity import cli as _commands  # noqa: F401  registers them
from parity.candidate_pte import PATHS
from parity.engine import Report
from parity.exported import Program, judge_program, open_program
from parity.faults.export_fault import CHUNK, QUANTIZED, SHARED, XNNPACK, Recipe
from parity.report import to_html, to_json
from reference.tiny import make_tiny

pytestmark = pytest.mark.parity

pytest.importorskip("executorch")
pytest.importorskip("mlx.core")

_PLAIN = (
    SHARED,
    Recipe("26B-A4B", "mlx"),
    Recipe("E4B", "mlx", dtype="bfloat16"),
    XNNPACK,
    Recipe("E2B", "xnnpack"),
    Recipe("26B-A4B", "xnnpack"),
)
_QUANTIZED = (QUANTIZED, Recipe("E4B", "xnnpack", "default"))


def target(program) -> Program:
    """Of a quantized one, with the checkpoint that its source was made from."""
    original = program.original if program.recipe.quantized else None
    return Program(program.recipe.variant, f"pte:{program.recipe.backend}", program.folder, program.source, original)


@pytest.mark.parametrize("recipe", [pytest.param(r, id=r.name) for r in _PLAIN])
def test_every_tap_of_every_path_is_in_budget(made, recipe: Recipe) -> None:
    report, program = Report(), made(recipe)
    exported.run(report, target(program), program.tokens)
    assert [case.path for case in report.cases] == list(PATHS)
    for case in report.cases:
        found = case.comparison
        assert not found.red, (case.path, found.first_divergence, found.missing, found.partial, found.bugs)
        assert found.worst_ratio <= budget.K
        assert [tap.name for tap in found.taps] == tap_names(TextConfig.from_file(program.source))
        assert found.choices == (len(program.tokens) if recipe.variant == "26B-A4B" else 0)
        if recipe.dtype == "float32":
            assert found.logits.top1 == 1.0


@pytest.mark.parametrize("recipe", [pytest.param(r, id=r.name) for r in _QUANTIZED])
def test_a_quantized_programs_error_is_split(made, recipe: Recipe) -> None:
    report, program = Report(), made(recipe)
    exported.run(report, target(program), program.tokens, ("chunked", "generate"))
    (split,) = report.splits
    assert not report.failed, [(c.candidate, c.path, c.comparison.first_divergence) for c in report.red]
    assert [tensor.why for tensor in split.tensors if tensor.why] == []
    assert [case.path for case in split.dense] == ["full"]
    assert [case.path for case in split.packed] == ["chunked", "generate"]
    assert 0.01 < split.damage.taps["logits"] < 1
    if recipe.backend == "xnnpack":
        # Activations of 8 bits cost something, but less than weights of 4.
        assert 1e-3 < split.activations.taps["logits"] < split.damage.taps["logits"]
        assert 0 < split.activations.logits.kl_mean < math.inf
    else:
        assert split.activations is None
    page = to_html(report, to_json(report, {}))
    assert f"the {recipe.backend} program that was made of it" in page
    assert "C program float32" in page
    assert ("rounds the inputs of its linears" in page) == (recipe.backend == "xnnpack")


def test_two_programs_in_turn_do_not_meet(made) -> None:
    program = made(SHARED)
    one, other = (open_program(program.folder)[0] for _ in range(2))
    tokens = program.tokens[:24]
    alone = one.capture(tokens, "chunked")["logits"]
    one.session.reset()
    parts = []
    for start in range(0, len(tokens), CHUNK):
        chunk = torch.tensor([tokens[start : start + CHUNK]])
        parts.append(one.session.forward(chunk, start))
        other.session.forward(chunk.flip(1), start)
    again = judge_program(one, program.base, "chunked")
    assert not again.red
    one.session.reset()
    for part, start in zip(parts, range(0, len(tokens), CHUNK), strict=True):
        assert torch.equal(part, one.session.forward(torch.tensor([tokens[start : start + CHUNK]]), start))
    assert alone.shape == (1, len(tokens), one.config.vocab_size)


# What cannot be


@pytest.mark.parametrize(
    ("backend", "dtype", "words"), [("xnnpack", torch.bfloat16, "xnnpack: .*bfloat16.* not supported")]
)
def test_what_a_backend_cannot_do_is_refused_by_name(tiny, tmp_path: Path, backend, dtype, words) -> None:
    with pytest.raises(ValueError, match=words):
        export(tiny("31B"), tmp_path / "out", backend, dtype=dtype, max_seq_len=64, max_prefill_chunk=CHUNK)
    assert not (tmp_path / "out").exists()


# The command


def run(*args: object):
    return CliRunner().invoke(cli, ["parity", *map(str, args)])


def test_the_command_judges_a_program(made, tmp_path: Path) -> None:
    program = made(SHARED)
    options = ("--candidate", f"pte:{program.folder}", "--path", "chunked", "--length", 40, "-o", tmp_path)
    result = run(program.source, *options)
    assert result.exit_code == 0, result.output
    data = json.loads((tmp_path / "report.json").read_text())
    assert [(c["candidate"], c["dtype"], c["path"]) for c in data["cases"]] == [("pte:program", "float32", "chunked")]
    assert "pte:program" in (tmp_path / "report.html").read_text()


def test_the_command_names_what_is_wrong_with_its_arguments(made, tmp_path: Path) -> None:
    program = made(SHARED)
    other = make_tiny("E2B", tmp_path / "other", seed=1)
    pte = f"pte:{program.folder}"
    for args, words in (
        ((other, "--candidate", pte), ("was made from original, whose fingerprint is", "other")),
        (("--candidate", pte), ("give the CHECKPOINT that it was made from, original",)),
        ((program.source, "--candidate", pte, "--dtype", "bfloat16"), ("is a float32 program",)),
        ((program.source, "--candidate", pte, "--path", "full"), ("it has chunked, decode, generate",)),
        ((program.source, "--candidate", pte, "--length", 65), ("the program holds 64; give --length 64",)),
        (("--candidate", "pte:nowhere"), ("no such folder, nor a backend; there are xnnpack, mlx, cuda",)),
    ):
        result = run(*args, "-o", tmp_path / "report")
        assert result.exit_code == 2, result.output
        assert result.stderr.count("\n") == 1, result.stderr
        assert all(word in result.stderr for word in words), result.stderr


def test_a_healthy_quantized_program_is_found_by_its_fingerprint(made, tmp_path: Path) -> None:
    """The checkpoint, what was quantized from it, and the program of that: it is the latter's."""
    program = made(QUANTIZED)
    candidates = ("--candidate", f"quantized:{program.source}", "--candidate", f"pte:{program.folder}")
    result = run(program.original, *candidates, "--path", "decode", "--length", 20, "-o", tmp_path)
    assert result.exit_code == 0, result.output
    data = json.loads((tmp_path / "report.json").read_text())
    assert [(q["candidate"], q["program"]) for q in data["quantized"]] == [
        ("quantized:quantized", None),
        ("pte:program", "mlx"),
    ]
    assert all(q["stages"]["weights"] for q in data["quantized"])
