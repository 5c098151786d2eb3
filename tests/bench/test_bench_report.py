"""The report is one file that needs no other, names what is absent, and gives no time to what is wrong."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from benchmark_runs import row, without, write
from hypothesis import given
from hypothesis import strategies as st

from bench.report import main, to_html
from bench.results import load, seconds


@pytest.fixture
def run(tmp_path: Path) -> Path:
    rows = []
    for context in (1024, 4096):
        group = f"SDPA decode, S={context}"
        rows += [row(group, "gemma4", context * 1e-8, context=context, series="K=4")]
        rows += [row(group, "peer <b>", context * 2e-8, context=context, series="K=4")]
    group = "SDPA prefill, T=2048"
    hidden = [
        without(group, "wrong one", "not in parity", "error 1.2e-02, allowed 4.1e-03"),
        without(group, "picky", "refused", "RuntimeError: head size"),
        without(group, "gone", "absent", "gone is not installed"),
    ]
    other = row("load a thing, small", "gemma4", 0.5, suite="load", bytes=0, flops=0, roofline_s=None)
    for key in ("ceilings", "roofline_share", "gb_per_s", "tflop_per_s"):
        del other["extra_info"][key]
    return write(tmp_path / "run.json", [*rows, row(group, "gemma4", 3e-3), other], hidden)


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if tag != "meta":
            self.open.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href", "action", "data") and v]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_self_contained(run: Path, tmp_path: Path) -> None:
    assert main([str(run), "-o", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    tags = _Tags()
    tags.feed(page)
    assert tags.open == []
    assert all(link.startswith("#") for link in tags.links)
    assert not re.search(r"<(script|link|img|iframe)\b|@import|url\((?!#)", page)
    # Namespaces of SVG are names; nothing is fetched.
    assert set(re.findall(r"https?://[\w./-]+", page)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert page.count("<svg") == 6, "a roofline, time against context, and four groups"


def test_what_it_says(run: Path) -> None:
    page = to_html(load(run))
    assert "<b>gone</b>: gone is not installed" in page
    assert "2.00 x as fast as the fastest peer, peer &lt;b&gt;" in page
    assert "<b>2 of 2</b>" in page
    assert "peer <b>" not in page
    wrong = re.search(r'<p class="hidden">.*?wrong one.*?</p>', page)[0]
    assert "not in parity</span>: error 1.2e-02, allowed 4.1e-03" in wrong
    assert "<td>wrong one" not in page
    assert "picky: refused</span>: RuntimeError: head size" in page
    assert "copy (read and written)" in page
    assert "4,000 GB/s" in page


def test_of_a_run_without_a_number(tmp_path: Path) -> None:
    path = write(tmp_path / "run.json", [], [without("SDPA, small", "gemma4", "refused", "no", ours=True)])
    page = to_html(load(path))
    assert "gemma4: refused" in page
    assert "<svg" not in page


def test_several_files_are_one_report(run: Path, tmp_path: Path) -> None:
    later = write(tmp_path / "later.json", [row("SDPA prefill, T=2048", "gone", 1e-3)])
    results = load(run, later)
    published, unpublished = results.of("SDPA prefill, T=2048")
    assert [r.backend for r in published] == ["gone", "gemma4"]
    assert results.absent == []
    assert [r.backend for r in unpublished] == ["wrong one", "picky"]
    assert to_html(results)


def test_a_bad_file_leaves_the_old_report(tmp_path: Path, capsys) -> None:
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "report.html").write_text("old")
    assert main([str(tmp_path / "bad.json"), "-o", str(tmp_path / "report.html")]) == 2
    assert (tmp_path / "report.html").read_text() == "old"
    assert capsys.readouterr().err.count("\n") == 1


@given(st.floats(1e-8, 1e3))
def test_seconds_have_three_digits_and_a_unit(value: float) -> None:
    number, unit = seconds(value).split()
    scale = {"s": 1.0, "ms": 1e-3, "µs": 1e-6}[unit]
    assert float(number) * scale == pytest.approx(value, rel=0.0051)
