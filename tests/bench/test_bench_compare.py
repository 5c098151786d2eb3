"""Two runs are compared by the ratio of their medians."""

import math
import re
from pathlib import Path

import pytest
from benchmark_runs import MACHINE, row, without, write
from hypothesis import given
from hypothesis import strategies as st

from bench.compare import Change, main

TIMES = st.floats(1e-7, 1e2)


@given(TIMES, TIMES, st.floats(1, 10))
def test_a_row_regresses_by_its_ratio(old: float, new: float, threshold: float) -> None:
    change = Change("group", "backend", old, new)
    assert change.ratio == new / old
    assert change.regressed(threshold) == (new / old > threshold)
    assert change.improved(threshold) == (new / old < 1 / threshold)
    assert not (change.regressed(threshold) and change.improved(threshold))


@given(TIMES, st.booleans())
def test_a_row_of_one_run_is_no_regression(time: float, first: bool) -> None:
    change = Change("group", "backend", *((time, None) if first else (None, time)))
    assert change.ratio is None
    assert not change.regressed(1)
    assert not change.improved(1)


@pytest.mark.parametrize(("times", "threshold", "code"), [(1.2, "1.1", 1), (1.2, "1.3", 0), (0.5, "1.1", 0)])
def test_exit_code(tmp_path: Path, capsys, times: float, threshold: str, code: int) -> None:
    old = write(tmp_path / "old.json", [row("SDPA, small", "gemma4", 1e-3), row("SDPA, small", "peer", 2e-3)])
    new = write(tmp_path / "new.json", [row("SDPA, small", "gemma4", times * 1e-3), row("SDPA, small", "peer", 2e-3)])
    assert main([str(old), str(new), "--threshold", threshold]) == code
    out = capsys.readouterr().out
    assert f"2 rows in both runs: {code} regressed" in out
    assert ("slower" in out) == bool(code)
    assert ("1 faster" in out) == (times == 0.5)


def test_rows_of_one_run_are_listed(tmp_path: Path, capsys) -> None:
    old = write(tmp_path / "old.json", [row("SDPA, small", "gemma4", 1e-3), row("SDPA, old", "gemma4", 1e-3)])
    new = write(tmp_path / "new.json", [row("SDPA, small", "gemma4", 1e-3), row("SDPA, new", "gemma4", 1e-3)])
    assert main([str(old), str(new)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"SDPA, old, gemma4 .*only in the old run", out)
    assert re.search(r"SDPA, new, gemma4 .*only in the new run", out)
    assert "1 rows in both runs: 0 regressed" in out


@pytest.mark.parametrize(("status", "code"), [("not in parity", 1), ("refused", 1), ("absent", 0)])
def test_a_row_that_lost_its_number(tmp_path: Path, capsys, status: str, code: int) -> None:
    old = write(tmp_path / "old.json", [row("SDPA, small", "gemma4", 1e-3)])
    new = write(tmp_path / "new.json", [], [without("SDPA, small", "gemma4", status, "error 1e-2")])
    assert main([str(old), str(new)]) == code
    assert (f"{status}: error" in capsys.readouterr().out) == bool(code)


def test_a_difference_of_machines_is_said(tmp_path: Path, capsys) -> None:
    old = write(tmp_path / "old.json", [row("SDPA, small", "gemma4", 1e-3)])
    new = write(tmp_path / "new.json", [row("SDPA, small", "gemma4", 1e-3)], machine=MACHINE | {"gpu": "NVIDIA H200"})
    assert main([str(old), str(new)]) == 0
    assert "the machines or versions differ" in capsys.readouterr().out
    assert main([str(old), str(old)]) == 0
    assert "differ" not in capsys.readouterr().out


BAD = {
    "empty": "",
    "no JSON": "{",
    "a list": "[]",
    "no rows": "{}",
    "rows of another kind": '{"benchmarks": [1], "machine_info": {}, "datetime": ""}',
    "no statistics": '{"benchmarks": [{"group": "g"}], "machine_info": {}, "datetime": ""}',
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("kind", [*BAD, "missing", "folder", "a time of zero", "an infinite time"])
def test_bad_files_are_one_line_and_exit_2(tmp_path: Path, capsys, kind: str) -> None:
    good = write(tmp_path / "good.json", [row("SDPA, small", "gemma4", 1e-3)])
    bad = tmp_path / "bad.json"
    if kind in BAD:
        bad.write_text(BAD[kind])
    elif kind == "folder":
        bad.mkdir()
    elif kind != "missing":
        entry = row("SDPA, small", "gemma4", 1e-3)
        entry["stats"]["median"] = 0 if "zero" in kind else math.inf
        write(bad, [entry])
    for pair in ([good, bad], [bad, good]):
        assert main([str(path) for path in pair]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith(f"{bad}: ")
        assert captured.err.count("\n") == 1


@pytest.mark.parametrize("threshold", ["0.9", "nan", "inf", "x"])
def test_a_bad_threshold_is_refused(tmp_path: Path, threshold: str) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["a", "b", "--threshold", threshold])
    assert exit.value.code == 2
