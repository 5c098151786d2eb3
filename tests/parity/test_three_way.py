"""Three implementations beside each other: what is taken of each, when truths are too far apart, how it is shown."""

import io
import json
import math

import pytest
import torch
from rich.console import Console

from parity import budget, report
from parity.compare import Comparison, compare
from parity.engine import Report
from parity.three_way import ThreeWay, compare_truths

NAMES = ["embed", "layers.0.mlp", "logits"]
HOSTILE = """<script>alert("1")</script>'&"""


def truth() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(1, 9, 8, dtype=torch.float64, generator=generator) for name in NAMES}


def comparison(scale: float) -> Comparison:
    """Errors `scale` times those of the reference, which rounds to bfloat16."""
    right = truth()
    rounded = {name: value.bfloat16().double() for name, value in right.items()}
    mine = {name: value + scale * (rounded[name] - value) for name, value in right.items()}
    return compare(mine, right, [rounded], torch.bfloat16)


def three(apart: float = 1e-12, dtype: str = "bfloat16", checkpoint: str = "tiny E2B") -> ThreeWay:
    other = truth()
    other["layers.0.mlp"] = other["layers.0.mlp"] * (1 + apart)
    found = {"torch": [comparison(0.5), comparison(1.5)], "jax": [comparison(1.0)], "hf": [comparison(1.0)]}
    return compare_truths(checkpoint, dtype, found, truth(), other)


def table(what: Report) -> str:
    console = Console(file=io.StringIO(), width=80, no_color=True)
    report.print_table(what, console)
    return console.file.getvalue()


def page(what: Report) -> str:
    return report.to_html(what, report.to_json(what, {}))


def test_the_worst_path_of_each_counts():
    stands = three().standings
    assert list(stands) == ["torch", "jax", "hf"]
    assert stands["torch"].logits == pytest.approx(1.5 * stands["jax"].logits)
    assert stands["torch"].ratio == comparison(1.5).worst_ratio > stands["hf"].ratio
    assert stands["torch"].tap in NAMES


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_truths_may_differ_by_what_no_ratio_shows(dtype):
    allowed = budget.floor(getattr(torch, dtype)) / 1024
    assert not three(0.9 * allowed, dtype).red
    far = three(1.1 * allowed, dtype)
    assert far.red
    assert (far.truths_tap, far.truths_logits) == ("layers.0.mlp", 0)
    assert far.truths == pytest.approx(1.1 * allowed)


@pytest.mark.parametrize("lacking", ["first", "second", "nan"])
def test_a_tap_that_a_truth_lacks_is_infinitely_far(lacking):
    one, other = truth(), truth()
    if lacking == "nan":
        other["embed"] = other["embed"] * math.nan
    else:
        del {"first": one, "second": other}[lacking]["embed"]
    found = {name: [comparison(1.0)] for name in ("torch", "jax", "hf")}
    result = compare_truths("E2B", "float32", found, one, other)
    assert result.red
    assert (result.truths, result.truths_tap) == (math.inf, "embed")


def test_no_comparison_at_all_is_infinitely_wrong():
    nothing = Comparison([], ["embed"], [], [], None)
    found = {"torch": [nothing], "jax": [nothing], "hf": [comparison(1.0)]}
    result = compare_truths("E2B", "float32", found, truth(), truth())
    assert (result.standings["jax"].logits, result.standings["jax"].ratio) == (math.inf, math.inf)
    data = json.loads(json.dumps(report.to_json(Report(three_way=[result]), {}), allow_nan=False))
    assert data["three_way"][0]["implementations"]["jax"]["logits"] == "inf"
    assert ">inf<" in page(Report(three_way=[result]) + _case())


def test_truths_that_differ_make_the_report_red():
    good, bad = Report(three_way=[three()]), Report(three_way=[three(), three(1e-4)])
    assert not good.failed
    assert bad.failed
    line = "tiny E2B bfloat16: the truths of transformers and JAX differ by 1.0e-4 at layers.0.mlp (allowed 1.9e-6)\n"
    assert line in table(bad)
    assert "1 truths apart (!)" in table(bad)
    assert "truths of transformers and JAX differ" in page(bad + _case())
    assert "the truths differ" in page(bad + _case())
    data = report.to_json(bad + _case(), {})
    assert data["summary"]["verdict"] == "red"
    assert [entry["verdict"] for entry in data["three_way"]] == ["green", "red"]


def _case() -> Report:
    from parity.engine import Case

    return Report([Case("tiny E2B", "bfloat16", "full", comparison(1.0), "jax")])


def test_it_is_shown_and_fits_80_columns():
    what = Report(three_way=[three(checkpoint=f"tiny {name}") for name in ("E2B", "26B-A4B", "26B-A4B + images")])
    text = table(what + _case())
    assert max(map(len, text.splitlines()[:-1])) <= 80
    assert "tiny E2B bfloat16 jax" in text
    row = next(line for line in text.splitlines() if line.startswith(" tiny E2B bfloat16  "))
    assert row.split()[-1] == "1.0e-12"
    html = page(what + _case())
    for part in ("Three implementations of one model", "transformers", "1.0e-12", "tiny 26B-A4B + images bfloat16"):
        assert part in html
    assert html.count("Three implementations of one model") == 1
    assert "Three implementations" not in page(_case())
    assert "<script" not in page(Report(three_way=[three(checkpoint=HOSTILE)]) + _case())


def test_reports_add_up():
    both = Report(three_way=[three()]) + Report(three_way=[three(dtype="float32")])
    assert [entry.dtype for entry in both.three_way] == ["bfloat16", "float32"]
