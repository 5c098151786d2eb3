"""The dispatcher: the backends that the CPU has agree with the definition, and the choice follows the measurements."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import normal
from sdpa_cases import Attention, attentions

from gemma4_impl.kernels.sdpa import dispatch, naive, tune
from gemma4_impl.kernels.sdpa.backends import BACKENDS, Case
from gemma4_impl.kernels.sdpa.dispatch import choose, explain, sdpa

GPU = torch.device("cuda", 0)


def case(**change) -> Case:
    usual = {"B": 1, "N": 32, "K": 4, "H": 256, "T": 2048, "S": 2048, "window": None, "mask": "causal"}
    return Case(**({"device": GPU, "dtype": torch.bfloat16} | usual | change))


def row(ms: dict, **change) -> dict:
    usual = {"op": "prefill", "mask": "causal", "window": None, "dtype": "bfloat16"}
    return usual | {"B": 1, "N": 32, "K": 4, "H": 256, "T": 2048, "S": 2048} | change | {"ms": ms}


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Writes a table for a GPU that this machine need not have."""

    def write(*rows: dict, device: str = "a GPU") -> None:
        path = tmp_path / "table.json"
        path.write_text(json.dumps({"device": device, "capability": [9, 9], "rows": rows}))
        monkeypatch.setenv("GEMMA4_SDPA_TABLE", str(path))
        forget()

    def forget() -> None:
        dispatch._table.cache_clear()
        choose.cache_clear()

    monkeypatch.delenv("GEMMA4_SDPA", raising=False)
    real = dispatch._device
    monkeypatch.setattr(dispatch, "_device", lambda d: ("a GPU", (9, 9)) if d.type == "cuda" else real(d))
    yield write
    forget()


@pytest.mark.parametrize("backend", ["torch", "naive"])
@pytest.mark.parametrize("kind", ["causal", "padded", "ring", "images"])
@settings(max_examples=10, deadline=None)
@given(st.data())
def test_on_the_cpu(backend: str, kind: str, data: st.DataObject) -> None:
    a: Attention = data.draw(attentions(kind, dtypes=(torch.float64,)))
    vectors = () if kind == "causal" else (a.q_positions, a.k_positions)
    out = sdpa(a.q, a.k, a.v, *vectors, ends=a.ends, window=a.window, scale=a.scale, backend=backend)
    torch.testing.assert_close(out, a.naive(torch.float64), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ["torch", "naive"])
@settings(max_examples=20, deadline=None)
@given(attentions("ring", most_queries=10, dtypes=(torch.float64,)))
def test_length(backend: str, a: Attention) -> None:
    length = (a.q_positions[:, -1] + 1).to(torch.int32)
    for keys in (None, a.k_positions):
        out = sdpa(a.q, a.k, a.v, None, keys, length=length, window=a.window, scale=a.scale, backend=backend)
        torch.testing.assert_close(out, a.naive(torch.float64), rtol=1e-10, atol=1e-10)


def test_the_fastest_at_the_nearest_shape(table) -> None:
    table(
        row({"triton": 1.0, "flash": 2.0}, T=256, S=256),
        row({"triton": 9.0, "flash": 8.0, "cudnn": 7.0}, T=8192, S=8192),
        row({"triton": 3.0}, T=8192, S=8192, window=1024),
    )
    assert choose(case(T=300, S=300)).backend == "triton"
    chosen = choose(case(T=5000, S=5000))
    assert (chosen.backend, dict(chosen.times)) == ("cudnn", {"triton": 9.0, "flash": 8.0, "cudnn": 7.0})
    assert "the fastest at prefill causal, B=1, N=32, K=4, H=256, T=8192, S=8192" in str(chosen)
    assert "measured: cudnn 7 ms, flash 8 ms, triton 9 ms" in str(chosen)
    # One that is fastest where it was measured, but cannot do this.
    assert choose(case(T=5000, S=6000)).backend == "triton"
    assert choose(case(T=5000, S=5000, window=1024)).backend == "triton"


def test_measured_on_its_like(table) -> None:
    table(row({"triton": 1.0, "flash": 2.0}), device="its like")
    assert choose(case()).backend == "triton"
    assert "on its like, of the same compute capability" in choose(case()).reason


def test_nothing_measured(table) -> None:
    table(row({"triton": 1.0}))
    chosen = choose(case(H=128))
    assert chosen.backend == ("cuda" if "cuda" not in chosen.refused else "flash")
    assert "nothing like it was measured on a GPU" in chosen.reason


@pytest.mark.parametrize(
    ("change", "backend", "why"),
    [
        ({"H": 512}, "cudnn", "head dim 512 is more than 256"),
        ({"H": 512}, "flash", "head dim 512 is more than 256"),
        ({"window": 100}, "flash", "no window"),
        ({"mask": "ends"}, "cudnn", "ends"),
        ({"mask": "positions"}, "flash", "positions"),
        ({"mask": "length", "T": 1}, "flash", "lengths"),
        ({"T": 100}, "flash", "neither one nor as many"),
        ({"dtype": torch.float32}, "flash", "float32"),
        ({"dtype": torch.float64}, "triton", "float64"),
        ({"device": torch.device("cpu")}, "triton", "needs a GPU"),
        ({"device": torch.device("cpu")}, "cuda", "needs a Hopper GPU"),
        ({}, "torch", "no CUDA"),
    ],
)
def test_refused(table, change: dict, backend: str, why: str) -> None:
    """Even if a table says that it is fast."""
    table(row({backend: 0.001, "efficient": 1.0}, **{k: v for k, v in change.items() if k in "HTS"}))
    chosen = choose(case(**change))
    assert chosen.backend != backend
    assert why in chosen.refused[backend]
    assert f"not {backend}: " in str(chosen)
    with pytest.raises(ValueError, match="cannot compute this"):
        choose(case(**change), backend)


def test_forced(table, monkeypatch) -> None:
    q, k = normal(1, 2, 3, 16, seed=1), normal(1, 1, 8, 16, seed=2)
    truth = naive.sdpa(q, k, k, *naive.known_positions(q, k))
    monkeypatch.setenv("GEMMA4_SDPA", "naive")
    assert explain(q, k, k).backend == "naive"
    assert torch.equal(sdpa(q, k, k), truth)
    assert explain(q, k, k, backend="torch").backend == "torch"
    monkeypatch.setenv("GEMMA4_SDPA", "fastest")
    with pytest.raises(ValueError, match="'fastest' is none of cuda, triton, cudnn"):
        sdpa(q, k, k)


def test_bad_input() -> None:
    q, k, length = normal(1, 2, 3, 16, seed=1), normal(1, 1, 8, 16, seed=2), torch.ones(1, dtype=torch.int32)
    for wrong, message in (
        ({"window": 0}, "at least 1"),
        ({"scale": -1.0}, "positive"),
        ({"length": length.long()}, "int32"),
        ({"length": length, "q_positions": torch.arange(3)[None]}, "give one"),
        ({"k": k[:, :, :2], "v": k[:, :, :2]}, "last of 2 keys"),
    ):
        with pytest.raises(ValueError, match=message):
            sdpa(**({"q": q, "k": k, "v": k} | wrong))


def test_what_tuning_writes_is_found(table) -> None:
    """Each measured shape finds its own row."""
    rows = [tune.row_of(tune.case_of(shape), {"triton": 1.0 + i}) for i, shape in enumerate(tune.SHAPES)]
    table(*json.loads(json.dumps(rows)))
    for i, shape in enumerate(tune.SHAPES):
        if "triton" not in choose(tune.case_of(shape)).refused:
            assert choose(tune.case_of(shape)).times == {"triton": 1.0 + i}, shape


def test_tables_that_are_shipped_name_what_there_is():
    """And the cases that they were measured for."""
    paths = list(dispatch.TABLES.glob("*.json"))
    assert paths
    for path in paths:
        table = json.loads(path.read_text(encoding="utf-8"))
        wanted = [tune.case_of(shape) for shape in tune.SHAPES]
        assert [tune.row_of(case, row["ms"]) for case, row in zip(wanted, table["rows"], strict=True)] == table["rows"]
        assert all(row["ms"] and set(row["ms"]) <= set(BACKENDS) for row in table["rows"])
