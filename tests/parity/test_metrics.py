"""Metrics and budgets on tensors whose errors are known."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gemma4_impl.taps import Recorder
from parity import budget
from parity.compare import compare, routing_of
from parity.metrics import measure, measure_logits, measure_positions

T = torch.arange(1, 25, dtype=torch.float64).reshape(1, 6, 4)


def test_equal_tensors_have_no_error():
    m = measure(T, T)
    assert (m.rel_l2, m.max_abs, m.cosine, m.gain, m.worst_rel_l2, m.reached) == (0, 0, 1, 0, 0, 6)
    assert m.sqnr_db == math.inf


def test_a_change_of_scale_is_all_gain():
    m = measure(T * 1.01, T)
    assert m.gain == pytest.approx(0.01)
    assert m.rel_l2 == pytest.approx(0.01)
    assert m.cosine == pytest.approx(1)
    assert m.sqnr_db == pytest.approx(40)


def test_the_worst_position_is_found_and_named():
    c = T.clone()
    c[0, 4, 2] += 3
    m = measure(c, T)
    assert m.worst_position == (0, 4)
    assert m.max_abs == 3
    assert m.worst_rel_l2 == pytest.approx(3 / (T.norm() / math.sqrt(6)))
    by_position = measure_positions(c, T)[1]
    assert int(by_position[0].argmax()) == 4
    assert float(by_position.max()) == pytest.approx(m.worst_rel_l2)


def test_unreached_positions_are_left_out_and_rows_share_the_truth():
    c = T.expand(2, 6, 4).clone()
    c[1, 4:] = torch.nan
    c[1, 3] += 1
    m = measure(c, T)
    assert m.reached == 10
    assert m.worst_position == (1, 3)


def test_the_size_of_a_block_does_not_matter(monkeypatch):
    c = T + torch.randn(T.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = measure(c, T), measure_logits(c.repeat(1, 1, 2), T.repeat(1, 1, 2))
    monkeypatch.setattr("parity.metrics._BLOCK", 5)
    assert (measure(c, T), measure_logits(c.repeat(1, 1, 2), T.repeat(1, 1, 2))) == whole


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_one_non_finite_value_in_a_reached_position_is_an_infinite_error(bad):
    c = T.clone()
    c[0, 2, 1] = bad
    m = measure(c, T)
    assert m.rel_l2 == math.inf
    assert m.worst_position == (0, 2)
    assert budget.check(m.rel_l2, [1.0], 1.0).red


def test_a_capture_that_reached_nothing_is_red():
    empty = torch.full_like(T, torch.nan)
    assert measure(empty, T).reached == 0
    assert compare({"norm": empty}, {"norm": T}, [{"norm": T}], torch.float32).red


def test_budget_is_k_times_the_worst_reference_plus_the_floor():
    check = budget.check(3e-6, [1e-6, 2e-6], 1e-7)
    assert check.allowed == pytest.approx(2 * 2e-6 + 1e-7)
    assert not check.red
    assert check.ratio == pytest.approx(2 * 3e-6 / check.allowed)
    assert budget.check(check.allowed, [2e-6], 1e-7).ratio == pytest.approx(budget.K)
    assert budget.check(check.allowed * 1.001, [2e-6], 1e-7).red


@given(st.floats(0, 1), st.floats(0, 1), st.floats(1e-12, 1))
def test_a_check_is_red_exactly_when_its_ratio_exceeds_k(error, reference, floor):
    check = budget.check(error, [reference], floor)
    if abs(check.ratio - budget.K) > 1e-9:
        assert check.red == (check.ratio > budget.K)


def test_floors_are_half_a_unit_roundoff():
    assert budget.floor(torch.float32) == 2**-25
    assert budget.floor(torch.bfloat16) == 2**-9


def test_logit_metrics():
    logits = torch.tensor([[[0.0, 1, 2, 3, 4, 5], [5.0, 4, 3, 2, 1, 0]]])
    same = measure_logits(logits, logits)
    assert (same.kl_max, same.top1, same.top5) == (0, 1, 1)
    other = measure_logits(logits.flip(-1), logits)
    assert other.top1 == 0
    assert other.top5 == pytest.approx(0.8)
    p = logits[0, 0].double().softmax(-1)
    assert other.kl_max == pytest.approx(float((p * (p.log() - p.flip(-1).log())).sum()))


def _taps(**changes):
    taps = {"embed": T, "layers.0.out": T * 2, "norm": T + 1}
    return {**taps, **changes}


def test_first_divergence_is_the_first_in_execution_order_and_says_where_it_arose():
    truth = _taps()
    reference = {n: t * (1 + 1e-7) for n, t in truth.items()}
    bad = _taps(**{"layers.0.out": truth["layers.0.out"] * 1.001, "norm": truth["norm"] * 1.1})
    created = compare(bad, truth, [reference], torch.float32, local=bad, local_references=[reference])
    assert (created.first_divergence.tap, created.first_divergence.origin) == ("layers.0.out", "created")
    healthy = {n: t.clone() for n, t in truth.items()}
    inherited = compare(bad, truth, [reference], torch.float32, local=healthy, local_references=[reference])
    assert (inherited.first_divergence.tap, inherited.first_divergence.origin) == ("layers.0.out", "inherited")
    unknown = compare(bad, truth, [reference], torch.float32)
    assert unknown.first_divergence.origin == "unknown"


def test_missing_and_unexpected_taps_are_named_and_missing_ones_are_red():
    candidate = {n: t for n, t in _taps(extra=T).items() if n != "norm"}
    result = compare(candidate, _taps(), [_taps()], torch.float32)
    assert result.missing == ["norm"]
    assert result.unexpected == ["extra"]
    assert result.red


def test_a_shape_that_differs_is_refused_by_name():
    with pytest.raises(ValueError, match=r"norm: the candidate has shape \[1, 6, 3\]"):
        compare(_taps(norm=T[..., :3]), _taps(), [_taps()], torch.float32)


def _router(probs):
    return {"layers.2.router": torch.tensor([[probs]], dtype=torch.float64)}


def test_a_flip_within_the_error_is_a_tie_and_one_beyond_it_a_bug():
    tie = _router([0.40, 0.30000001, 0.29999999, 0.0])
    reference = _router([0.4000001, 0.3, 0.3, 0.0])
    flipped = _router([0.40, 0.29999999, 0.30000001, 0.0])
    result = compare(flipped, tie, [reference], torch.float32, top_k=2)
    assert len(result.flips) == 1
    assert result.flips[0].tie
    assert result.flips[0].layer == 2
    assert not result.bugs

    clear = _router([0.40, 0.35, 0.25, 0.0])
    result = compare(_router([0.40, 0.25, 0.35, 0.0]), clear, [clear], torch.float32, top_k=2)
    assert len(result.bugs) == 1
    assert result.flips[0].margin == pytest.approx(0.1)
    assert result.red


def test_routing_of_reads_the_chosen_experts():
    routing = routing_of(_router([0.1, 0.4, 0.2, 0.3]), 2)
    assert routing["layers.2."].tolist() == [[[1, 3]]]
    assert routing_of(_router([0.1, 0.9]), None) == {}


def test_a_tap_that_skips_positions_is_partial_and_red():
    candidate = _taps()
    candidate["norm"] = candidate["norm"].clone()
    candidate["norm"][0, 2] = torch.nan
    result = compare(candidate, _taps(), [_taps()], torch.float32)
    assert result.partial == ["norm"]
    assert result.red
    assert not compare(candidate, _taps(), [_taps()], torch.float32, may_be_partial=lambda n: n == "norm").red


def test_a_model_that_computes_nan_is_red_and_not_taken_for_one_that_computes_nothing():
    recorder = Recorder(1, 3)
    recorder.at(torch.arange(3)[None])
    recorder.record("norm", torch.full((1, 3, 4), torch.nan))
    truth = {"norm": torch.ones(1, 3, 4, dtype=torch.float64)}
    result = compare(recorder.values, truth, [truth], torch.float32)
    assert result.taps[0].metrics.reached == 3
    assert result.red
    assert result.worst_ratio == math.inf
