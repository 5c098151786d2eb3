"""The README's tables are those of the committed runs, and writing them again changes nothing."""

from pathlib import Path

import pytest
from benchmark_runs import row, without, write
from hypothesis import given
from hypothesis import strategies as st

from bench.readme import BEGIN, END, README, main, replaced, tables

WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40).filter(lambda t: "<!--" not in t)


@given(WORDS, WORDS, WORDS, WORDS)
def test_only_what_is_between_the_markers_is_replaced(before: str, old: str, after: str, new: str) -> None:
    once = replaced(f"{before}{BEGIN}{old}{END}{after}", new)
    assert once == f"{before}{BEGIN}\n\n{new}\n\n{END}{after}"
    assert replaced(once, new) == once


@pytest.mark.parametrize("text", ["", BEGIN, END, f"{END}{BEGIN}", f"{BEGIN}{END}{BEGIN}", f"{BEGIN}{BEGIN}{END}"])
def test_markers_are_needed(text: str) -> None:
    with pytest.raises(ValueError, match="needs one line"):
        replaced(text, "tables")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    group = "SDPA decode, 31B: S=4096"
    rows = [
        row(group, "peer", 2e-5),
        row(group, "gemma4", 1e-5),
        row("SDPA decode, tiny: S=4", "gemma4", 1e-6),
        row("decode of 32 tokens, small", "gemma4", 0.5, suite="decode", tokens_per_s=64.0, roofline_s=0.25),
    ]
    hidden = [
        without(group, "wrong one", "not in parity", "error 1"),
        without(group, "picky", "refused", "no"),
        without(group, "gone", "absent", "gone is not installed"),
    ]
    return write(tmp_path / "run.json", rows, hidden)


def test_a_table_has_a_row_a_shape_and_a_column_a_backend(run: Path) -> None:
    text = tables([run])
    lines = text.splitlines()
    assert lines[0].startswith("**A processor, 2 cores; Python 3.12.3, torch 2.13.0** (`run.json`). Ceilings")
    assert "| SDPA decode | gemma4 | peer | roofline | reached |" in lines
    assert "| 31B: S=4096 | **10.0 µs** | 20.0 µs | 1.00 µs | 10 % |" in lines
    assert "| decode of 32 tokens, tokens/s | gemma4 | roofline | reached |" in lines
    assert any(line.startswith("| small | 64 | 128 |") for line in lines)
    assert "tiny" not in text
    assert lines[-1] == "Absent from this run: gone (gone is not installed)."


def test_files_of_one_machine_are_one_section(run: Path, tmp_path: Path) -> None:
    more = write(tmp_path / "more.json", [row("int4 linear, 31B: head", "gemma4", 1e-3, suite="int4_linear")])
    other = write(
        tmp_path / "other.json", [row("int4 linear, 31B: head", "gemma4", 2e-3)], machine={"gpu": "NVIDIA H200"}
    )
    text = tables([run, other, more])
    assert text.count("Ceilings in the same run") == 2
    assert "(`run.json`, `more.json`)" in text
    assert text.index("| 31B: head | 1.00 ms |") < text.index("**NVIDIA H200;") < text.index("| 31B: head | 2.00 ms |")


def test_writing_twice_changes_nothing(run: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n\n{BEGIN}\nold\n{END}\n\nrest\n", encoding="utf-8")
    assert main([str(run), "--readme", str(readme)]) == 0
    once = readme.read_text(encoding="utf-8")
    assert once.startswith(f"# Title\n\n{BEGIN}\n\n")
    assert once.endswith(f"\n\n{END}\n\nrest\n")
    assert "old" not in once
    assert main([str(run), "--readme", str(readme)]) == 0
    assert readme.read_text(encoding="utf-8") == once


@pytest.mark.parametrize("kind", ["no markers", "no file", "a bad run"])
def test_errors_are_one_line_and_exit_2(run: Path, tmp_path: Path, capsys, kind: str) -> None:
    readme = tmp_path / "README.md"
    if kind != "no file":
        readme.write_text("text" if kind == "no markers" else f"{BEGIN}{END}")
    if kind == "a bad run":
        run.write_text("{")
    assert main([str(run), "--readme", str(readme)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not readme.exists() or BEGIN not in readme.read_text() or readme.read_text() == f"{BEGIN}{END}"


def test_the_readme_shows_the_committed_runs() -> None:
    runs = sorted((README.parent / "docs" / "bench").glob("*.json"))
    text = README.read_text(encoding="utf-8")
    assert runs
    assert replaced(text, tables(runs)) == text
