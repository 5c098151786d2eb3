"""The report: strict JSON, a page that needs nothing else, and a table that any terminal can show."""

import io
import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from rich.console import Console

from parity import budget, engine, plots, report
from parity.candidate import TorchCandidate
from parity.compare import Comparison, Flip, compare
from parity.engine import Case, Report
from parity.metrics import LogitMetrics
from parity.quantized import Damage, Split
from parity.weights import Packed, TensorCheck

NAMES = ["embed", *(f"layers.{i}.{s}" for i in range(4) for s in ("self_attn.q", "self_attn.out", "out")), "logits"]
HOSTILE = """<script>alert("1")</script>'&$x$[red]"""


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tensors are tiny: threads would only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def comparison(bug: str | None = None, *, rows: int = 1, length: int = 9, missing: int = 0, names=NAMES) -> Comparison:
    """Noise within budget, but for `bug`: one position of one tap is scaled ("scale"), partly "nan", or "inf"."""
    torch.manual_seed(0)
    heads = {name: 8 if int(name.split(".")[1]) % 4 == 3 else 4 for name in names if name.endswith(".q")}
    truth = {name: torch.randn(rows, length, 2, heads.get(name, 8), dtype=torch.float64) for name in names}
    references = [{name: value.float() for name, value in truth.items()}]
    candidate = {name: value.float() for name, value in list(truth.items())[missing:]}
    if bug:
        value = candidate["layers.2.out"]
        value[:, 5] = {"scale": value[:, 5] * 1.5, "nan": value[:, 5], "inf": value[:, 5] + math.inf}[bug]
        if bug == "nan":
            value[:, 5, 0, 0] = math.nan
    out = compare(candidate, truth, references, torch.float32, local=candidate, local_references=references)
    out.by_position["layers.1.out"][0, 3:] = math.nan
    return out


def case(what: Comparison, path: str = "full", checkpoint: str = "E2B", dtype: str = "float32") -> Case:
    return Case(checkpoint, dtype, path, what)


def flipped() -> Comparison:
    out = comparison()
    out.choices, out.flips = 40, [Flip(2, 0, 5, 3.1e-2, 1e-6), Flip(1, 0, 4, 1e-8, 1e-6)]
    return out


def quantized(bug: str | None = None, *, misread: int = 0, damage: bool = True, candidate: str = "gguf:x") -> Report:
    """One quantized candidate: stage B green, C with `bug`, and a tensor of which `misread` values are."""
    created = {name: 0.0 if name == "embed" else 2e-2 for name in NAMES}
    stage_a = Damage({**created, "logits": 3e-2}, created, LogitMetrics(2e-3, 5e-2, 0.875, 0.9), (21.3, 22.5), 40, 3)
    q, near = "self_attn.q_proj.weight", (20.5, 21.5, 41.5, math.inf) if damage else (None,) * 4
    tensors = [
        TensorCheck("embed_tokens.weight", (64, 8), True, "Q6_K", 420, 0, near[2], 0.28),
        TensorCheck(f"layers.0.{q}", (8, 8), True, "Q4_K", 36, misread, near[0], 0.3),
        TensorCheck(f"layers.3.{q}", (8, 8), True, "Q4_K", 36, 0, near[1], 0.3),
        TensorCheck("norm.weight", (8,), False, "F32", 32, 0, near[3]),
    ]
    tensors[0].packed["float32"] = Packed("dequantize", 0.0)
    dense = [Case("E2B", "float32", "full", comparison(), f"{candidate} dequantized")]
    packed = [Case("E2B", "float32", path, comparison(bug), candidate) for path in ("full", "decode")]
    split = Split("E2B", candidate, "gguf", tensors, stage_a if damage else None, dense, packed)
    return Report([case(comparison()), *split.cases], splits=[split])


REPORTS = {
    "green": lambda: Report([case(comparison()), case(comparison(rows=2), "left_padded")]),
    "red": lambda: Report([case(comparison()), case(comparison("scale"), "decode")]),
    "nan": lambda: Report([case(comparison("nan")), case(comparison("inf"), "decode")]),
    "missing": lambda: Report([case(comparison(missing=3)), case(Comparison([], ["embed"], [], [], None), "decode")]),
    "flips": lambda: Report([case(flipped(), checkpoint="26B")]),
    "two candidates": lambda: Report([case(comparison()), Case("E2B", "float32", "full", comparison(), "nnx")]),
    "quantized": quantized,
    "quantized, misread": lambda: quantized(misread=5),
    "quantized, wrong kernel": lambda: quantized("scale"),
    "quantized, no original": lambda: quantized("nan", damage=False),
    "empty": Report,
}


@pytest.fixture(params=REPORTS)
def any_report(request) -> Report:
    return REPORTS[request.param]()


def strict(data: dict) -> dict:
    def refuse(constant: str):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(json.dumps(data, allow_nan=False), parse_constant=refuse)


def page(what: Report, **meta) -> str:
    return report.to_html(what, report.to_json(what, meta))


def table(what: Report, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, no_color=True, force_terminal=False)
    report.print_table(what, console)
    return console.file.getvalue()


def test_json_is_strict_and_has_every_case(any_report):
    data = strict(report.to_json(any_report, {"inputs": {"tokens": 9}, "folder": Path("x"), "loss": math.nan}))
    assert data["format"] == "gemma4-parity-1"
    assert data["meta"]["k"] == budget.K
    assert data["meta"]["floors"] == {"float32": 2**-25, "bfloat16": 2**-9}
    assert (data["meta"]["folder"], data["meta"]["loss"], data["meta"]["inputs"]) == ("x", "nan", {"tokens": 9})
    assert data["summary"]["cases"] == len(data["cases"]) == len(any_report.cases)
    assert data["summary"]["red"] == sum(c["verdict"] == "red" for c in data["cases"])
    for record in data["cases"]:
        assert set(record) == {
            *("checkpoint", "dtype", "path", "candidate", "reference", "verdict", "worst_ratio", "worst_tap"),
            *("first_divergence", "missing", "partial", "unexpected", "routing", "logits", "taps"),
        }
        for tap in record["taps"]:
            assert set(tap) == {"name", "shape", "metrics", "local", "checks", "ratio", "red"}
            assert set(tap["checks"]) == {"total", "local", "local_worst", "local_gain", "local_row_gain"}
            assert set(tap["checks"]["total"]) == {"error", "reference", "allowed", "ratio", "red"}
            assert {"rel_l2", "max_abs", "cosine", "sqnr_db", "worst_position"} <= set(tap["metrics"])


def test_json_summary_of_green_and_red():
    green = report.to_json(REPORTS["green"](), {})
    assert green["summary"]["red"] == 0
    assert 0 < green["summary"]["worst_ratio"] <= budget.K
    assert green["summary"]["top1_float32"] == 1
    assert green["cases"][0]["first_divergence"] is None
    red = report.to_json(REPORTS["red"](), {})
    assert red["summary"]["worst"]["path"] == "decode"
    assert red["summary"]["worst"]["tap"] == "layers.2.out"
    first = red["cases"][1]["first_divergence"]
    assert (first["tap"], first["row"], first["position"], first["origin"]) == ("layers.2.out", 0, 5, "created")
    assert first["ratio"] > budget.K


def test_json_writes_infinities_as_strings_that_float_reads():
    for record in strict(report.to_json(REPORTS["nan"](), {}))["cases"]:
        tap = next(tap for tap in record["taps"] if tap["name"] == "layers.2.out")
        assert tap["metrics"]["rel_l2"] == "inf"
        assert float(tap["metrics"]["sqnr_db"]) == -math.inf
        assert record["verdict"] == "red"


def test_json_of_flips():
    routing = strict(report.to_json(REPORTS["flips"](), {}))["cases"][0]["routing"]
    assert routing["choices"] == 40
    assert routing["flips"][0] == {
        **{"layer": 2, "row": 0, "position": 5, "margin": 3.1e-2, "allowed": 1e-6},
        "tie": False,
    }


class References(HTMLParser):
    """Collects what a browser would load, and the tags."""

    def __init__(self):
        super().__init__()
        self.loaded: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.loaded += [value for name, value in attrs if name in ("src", "href", "xlink:href", "data", "srcset")]


def test_page_loads_nothing(any_report):
    text = page(any_report)
    parser = References()
    parser.feed(text)
    assert all(value.startswith(("data:image/png;base64,", "#")) for value in parser.loaded)
    assert not re.search(r"url\((?!#)|@import", text)
    assert not parser.tags & {"script", "link", "iframe", "img"}


def test_page_says_what_and_where():
    green, red = page(REPORTS["green"]()), page(REPORTS["red"]())
    assert "all 2 cases are within budget" in green
    assert "1 of 2 cases is out of budget" in red
    assert "first divergence layers.2.out, row 0 position 5, created here" in red
    assert "layers.2.out, created here" in red
    assert "no case in this report" in page(Report())
    assert "routing: 1 of 40 choices flipped and no tie, worst in layer 2" in page(REPORTS["flips"]())


def test_page_shows_provenance():
    inputs = {"E2B": {"fingerprint": "f00d", "tokens": list(range(2, 602))}}
    text = page(REPORTS["green"](), versions={"torch": "2.99"}, command="gemma4 parity", device="H100", inputs=inputs)
    for part in ("torch", "2.99", "gemma4 parity", "H100", "fingerprint f00d", "2, 3, 4, 5, 6, ... (600 in all)"):
        assert part in text
    assert "floors" in text
    assert "599, 600" not in text


def test_page_escapes_labels():
    what = Report([case(comparison("scale"), HOSTILE, HOSTILE), case(comparison(missing=1), "full", HOSTILE)])
    text = page(what, command=HOSTILE)
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert HOSTILE in table(what, width=300)


def test_page_ids_are_unique_and_colours_are_the_style_sheets():
    text = page(Report([case(comparison(), p, c) for c in ("E2B", "31B") for p in ("full", "decode")]))
    ids = re.findall(r'<(?:clipPath|image)[^>]* id="([^"]+)"', text)
    assert ids
    assert len(ids) == len(set(ids))
    style = text[text.index("<style>") : text.index("</style>")]
    for name in set(re.findall(r"var\((--[\w-]+)\)", text)):
        assert style.count(f"{name}: ") == 2, f"{name} must have a light and a dark value"
    assert not re.search(r"#0[12]0[12]0", text)


def test_page_of_a_large_model_stays_small():
    names = [f"layers.{i}.{s}" for i in range(60) for s in ("self_attn.q", "self_attn.out", "mlp", "out")]
    text = page(Report([case(comparison("scale", rows=2, length=100, names=names))]))
    assert len(text) < 300_000
    labels = re.findall(r">layer (\d+)</text>", text)
    assert 10 < len(labels) <= 60


def test_tap_order_merges_what_each_path_lacks():
    whole, partial = comparison(), comparison(missing=2)
    del partial.taps[4]
    assert plots.tap_order([partial, whole]) == NAMES
    assert plots.tap_order([]) == []


def test_blocks_mark_full_layers():
    shapes = {tap.name: tap.shape for tap in comparison().taps}
    found = plots.blocks(["vision.layers.0.out", *NAMES], shapes)
    assert [(b.label, b.start, b.end, b.full) for b in found[:2]] == [("v0", 0, 1, False), ("0", 2, 5, False)]
    assert [b.label for b in found if b.full] == ["3"]


def test_write_leaves_two_files(any_report, tmp_path):
    folder = tmp_path / "new" / "folder"
    report.write(any_report, folder, {"command": "gemma4 parity"})
    assert sorted(os.listdir(folder)) == ["report.html", "report.json"]
    assert strict(json.loads((folder / "report.json").read_text()))["meta"]["command"] == "gemma4 parity"
    assert (folder / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize("broken", ["to_html", "write_text", "replace"])
def test_a_failed_write_keeps_the_old_report(broken, tmp_path, monkeypatch):
    report.write(REPORTS["green"](), tmp_path, {})
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*_args, **_kwargs):
        raise OSError("disk full")

    target = {"to_html": report, "write_text": Path, "replace": os}[broken]
    monkeypatch.setattr(target, broken, fail)
    with pytest.raises(OSError, match="disk full"):
        report.write(REPORTS["red"](), tmp_path, {})
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == old


def test_a_label_that_is_not_unicode_is_written(tmp_path):
    report.write(Report([case(comparison(), checkpoint="caf\udce9")]), tmp_path, {})
    assert json.loads((tmp_path / "report.json").read_text())["cases"][0]["checkpoint"] == "caf\udce9"


def test_table_fits_80_columns_without_colour():
    paths = ("full", "chunked", "decode", "generate", "left_padded", "right_padded")
    good, bad = comparison(), comparison("scale")
    what = Report([case(bad if p == "decode" else good, p, "26B-A4B", d) for d in engine.DTYPES for p in paths])
    text = table(what)
    assert "\x1b" not in text
    lines = text.splitlines()
    for path in paths:
        assert path in text
    assert max(len(line) for line in lines if "first divergence" not in line and "worst ratio" not in line) <= 80
    row = next(line for line in lines if line.strip().startswith("26B-A4B bfloat16"))
    assert row.count("!") == 1


def test_table_names_what_is_wrong_on_one_line():
    red = table(REPORTS["red"]())
    assert re.search(
        r"^E2B float32 decode: first divergence layers\.2\.out, row 0 position 5, created here "
        r"\((local\w*): \d\.\de-\d, allowed \d\.\de-\d\)$",
        red,
        re.MULTILINE,
    )
    assert "E2B float32 full: missing: embed, layers.0.self_attn.q, layers.0.self_attn.out\n" in table(
        REPORTS["missing"]()
    )
    assert "E2B float32 decode: no taps captured\n" in table(REPORTS["missing"]())
    assert "(margin: 3.1e-2, allowed 1.0e-6)" in table(REPORTS["flips"]())
    assert "E2B float32 nnx " in table(REPORTS["two candidates"]())
    assert table(REPORTS["green"]()).splitlines()[-1].startswith("green: 2 cases")
    assert table(Report()) == "red: 0 cases\n"


def terminal(show, what: Comparison) -> str:
    console = Console(file=io.StringIO(), width=80, no_color=True)
    show(what, console)
    return console.file.getvalue()


def test_verdict_lists_the_worst_taps_and_the_reasons():
    red = terminal(report.print_verdict, comparison("scale"))
    assert re.search(r"^ *layers\.2\.out .*! +local", red, re.MULTILINE)
    assert "\nfirst divergence layers.2.out, row 0 position 5" in red
    assert red.splitlines()[-1].startswith("red: 14 taps, worst ratio ")
    green = terminal(report.print_verdict, comparison())
    assert green.splitlines()[-1].startswith("green: 14 taps, worst ratio ")
    assert "!" not in green


def test_differences_list_every_tap_and_no_verdict():
    what = comparison("scale", missing=1)
    what.unexpected.append("extra")
    text = terminal(report.print_differences, what)
    assert all(name in text for name in NAMES)
    assert "missing: embed\n" in text
    assert "only the candidate has: extra\n" in text
    assert "no verdict" in text
    assert not re.search(r"\bred\b|green|!", text)


def test_a_tap_that_skips_positions_is_named():
    what = comparison()
    what.partial.append("layers.2.out")
    assert "E2B float32 full: not at every position: layers.2.out\n" in table(Report([case(what)]))
    assert "1 taps incomplete" in page(Report([case(what)]))


def test_a_real_run(tiny, tmp_path):
    folder = tiny("E2B")
    tokens = [2, *range(20, 50)]
    base = engine.baseline(folder, tokens, torch.float32)
    candidate = TorchCandidate(folder)
    good = engine.judge(candidate, base, "full")
    candidate.model.layers[3].layer_scalar.mul_(0.5)
    bad = engine.judge(candidate, base, "full")
    what = Report([case(good), case(bad, checkpoint="broken")])
    report.write(what, tmp_path, {})
    first = json.loads((tmp_path / "report.json").read_text())["cases"][1]["first_divergence"]
    assert (first["tap"], first["origin"]) == ("layers.3.out", "created")
    assert "broken float32 full: first divergence layers.3.out" in table(what)


# Quantized candidates


def test_json_of_a_quantized_candidate():
    data = strict(report.to_json(quantized(misread=5), {}))
    assert data["summary"]["verdict"] == "red"
    assert data["summary"]["red"] == 0
    (entry,) = data["quantized"]
    assert (entry["checkpoint"], entry["candidate"], entry["verdict"]) == ("E2B", "gguf:x", "red")
    assert entry["stored_bytes"] == 420 + 36 + 36 + 32
    assert entry["bits_per_weight"] == pytest.approx(8 * 524 / (64 * 8 + 2 * 64 + 8))
    assert set(entry["stages"]) == {"weights", "activations", "dequantized", "packed"}
    assert entry["stages"]["activations"] is None
    assert entry["stages"]["weights"]["logits"]["kl_mean"] == 2e-3
    assert [stage["path"] for stage in entry["stages"]["packed"]] == ["full", "decode"]
    assert entry["tensors"][1]["wrong"] == ["misread: 5 of 64 values are not what the reference's reader finds"]
    assert entry["tensors"][0]["packed"] == {"float32": {"kernel": "dequantize", "error": 0}}
    assert entry["tensors"][3]["sqnr_db"] == "inf"
    assert strict(report.to_json(quantized(damage=False), {}))["quantized"][0]["stages"]["weights"] is None
    assert strict(report.to_json(quantized(), {}))["summary"]["verdict"] == "green"


def test_a_misread_tensor_is_red_though_no_case_is():
    what = quantized(misread=5)
    assert what.failed
    assert not what.red
    line = "E2B gguf:x: layers.0.self_attn.q_proj.weight is misread: 5 of 64 values"
    assert line in table(what)
    assert table(what).splitlines()[-1].startswith("red: 4 cases, 1 tensors wrong (!)")
    assert "quantized tensors are wrong" in page(what)
    assert "layers.0.self_attn.q_proj.weight is misread" in page(what)
    assert not quantized().failed


def test_a_wrong_kernel_is_red_in_its_own_stage():
    what = quantized("scale")
    row = next(line for line in table(what).splitlines() if line.startswith(" E2B gguf:x  "))
    assert row.count("!") == 1
    assert row.rstrip().endswith("!")
    text = page(what)
    section = text[text.index("Quantized: E2B gguf:x") :]
    assert section.index("✓ green") < section.index("B dequantized") < section.index("✗ red")


def test_page_of_a_quantized_candidate():
    text = page(quantized())
    for part in ("Quantized: E2B gguf:x", "21.3 → 22.5", "87.5 %", "3 / 40", "SQNR 20.5 to 41.5 dB", "gguf-py read"):
        assert part in text
    assert "1 x dequantize; weights exact" in text
    alone = page(quantized(damage=False))
    assert "Without the original checkpoint there is no A" in alone
    assert "21.3" not in alone


def test_the_table_of_quantized_candidates_fits_80_columns():
    what = quantized(candidate="quantized:sensitive")
    what.cases += (more := [Case("E2B", "bfloat16", "full", comparison(), "quantized:sensitive")])
    what.splits[0].packed += more
    what.splits[0].checkpoint = "tiny E2B/32"
    text = table(what)
    header = next(line for line in text.splitlines() if "top-1" in line)
    assert header.split()[-2:] == ["float32", "bfloat16"]
    assert max(map(len, text.splitlines()[:-1])) <= 80
    assert "2.0e-3" in text
    assert "87.5 %" in text
    assert "20.5" in text


def test_a_quantized_label_is_escaped():
    text = page(quantized(misread=1, candidate=HOSTILE))
    assert "<script" not in text
