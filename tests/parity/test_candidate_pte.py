"""Exported programs as candidates: what is fed to them, what is made of their answers, and what is refused."""

from pathlib import Path

import pytest
import torch
from configs import hub
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gemma4_impl.config import TextConfig
from gemma4_impl.export import Step
from gemma4_impl.model.decoder import Gemma4
from gemma4_impl.quant.quantize import quantize
from gemma4_impl.quant.recipe import QuantConfig
from gemma4_impl.quant.tensor import QuantizedTensor
from gemma4_impl.taps import Recorder, recording, tap_names
from parity.affine import AffineWeights
from parity.candidate_pte import PATHS, ProgramCandidate
from parity.engine import Baseline, baseline
from parity.exported import judge_program
from parity.inputs import default_tokens
from reference.activations import quantize_inputs, rounded
from reference.hf import HFReference
from reference.tiny import SHORT, make_tiny

CHUNK, LENGTH = 5, 30
CONFIG = TextConfig.from_dict(hub())


class StepSession:
    """What an exported program computes, run eagerly, with every tap."""

    taps = True

    def __init__(self, model: Gemma4, max_chunk: int = CHUNK):
        self.step = Step(model, model.make_cache(1, 64, max_chunk))
        self.routing: dict[str, Tensor] = {}

    def reset(self) -> None:
        self.step.cache.reset()

    @torch.no_grad()
    def forward(self, tokens: Tensor, position: int, taps: bool = False):
        stop = position + tokens.shape[1]
        recorder = Recorder(1, stop, routing=self.routing)
        with recording(recorder):
            logits = self.step(tokens, torch.arange(position, stop)[None])[0]
        found = {name: value[:, position:] for name, value in recorder.values.items()}
        # What was run for the last position alone has one position, and no gaps.
        found = {name: value[:, -1:] if value[:, 0].isnan().any() else value for name, value in found.items()}
        return (logits, found) if taps else logits


class Spy:
    """Remembers what it is fed; its logits are the position of the last token."""

    def __init__(self) -> None:
        self.fed: list[tuple[int, int]] = []
        self.before: list[tuple[int, int]] = []

    def reset(self) -> None:
        self.before, self.fed = self.fed, []

    def forward(self, tokens: Tensor, position: int) -> Tensor:
        assert tokens.dtype == torch.long
        self.fed.append((position, tokens.shape[1]))
        return torch.full((CONFIG.vocab_size,), position + tokens.shape[1] - 1.0)


@pytest.fixture(scope="module", params=("E2B", "26B-A4B"))
def base(request, tmp_path_factory) -> tuple[Path, Baseline]:
    path = make_tiny(request.param, tmp_path_factory.mktemp("pte") / "m", overrides=SHORT[request.param])
    tokens = default_tokens(TextConfig.from_file(path), path, LENGTH)
    return path, baseline(path, tokens, torch.float32, paths=PATHS, local=False)


def candidate(path: Path, **changes) -> ProgramCandidate:
    model = Gemma4.from_pretrained(path)
    return ProgramCandidate(StepSession(model), model.config, CHUNK, **({"tapped": True} | changes))


@given(st.integers(1, 70), st.integers(1, 20), st.sampled_from(PATHS))
@settings(max_examples=50, deadline=None)
def test_every_token_is_fed_once_in_chunks_that_the_program_takes(length, most, path):
    spy = Spy()
    program = ProgramCandidate(spy, CONFIG, most)
    logits = program.capture(range(length), path)["logits"]
    at = 0
    for position, size in spy.fed:
        assert position == at
        assert 1 <= size <= most
        at += size
    assert at == length
    if path == "decode":
        assert {size for _, size in spy.fed} == {1}
    if path == "generate":
        assert sum(size for position, size in spy.fed if position >= length // 2) == length - length // 2
        assert all(size == 1 for position, size in spy.fed if position >= length // 2)
    # The last position of every call has its logits, at its own place; nothing else has any.
    ends = torch.tensor([position + size - 1 for position, size in spy.fed])
    assert torch.equal(logits[0, ends, 0], ends.float())
    assert int(logits[0, :, 0].isnan().sum()) == length - len(ends)


def test_a_path_starts_over():
    spy = Spy()
    program = ProgramCandidate(spy, CONFIG, 4)
    program.capture(range(9), "chunked")
    program.capture(range(3), "decode")
    assert spy.fed == [(0, 1), (1, 1), (2, 1)]
    assert spy.before[0] == (0, 4)


@pytest.mark.parametrize("path", ["full", "left_padded", "right_padded"])
def test_paths_that_a_program_lacks_are_refused(path):
    with pytest.raises(ValueError, match=f"--path {path}: .*it has chunked, decode, generate"):
        ProgramCandidate(Spy(), CONFIG, 4).capture([2, 3], path)


def test_a_computed_nan_is_an_error_and_no_gap():
    class Broken(Spy):
        def forward(self, tokens, position):
            return torch.full((CONFIG.vocab_size,), torch.nan if position == 3 else 1.0)

    logits = ProgramCandidate(Broken(), CONFIG, 4).capture(range(6), "decode")["logits"]
    assert not logits.isnan().any()
    assert logits[0, 3].isinf().all()


@pytest.mark.parametrize("answer", [torch.tensor([[7]]), torch.ones(1, 3)])
def test_what_is_no_logits_is_refused(answer):
    class Sampling(Spy):
        def forward(self, tokens, position):
            return answer

    with pytest.raises(ValueError, match="not the logits of 64 tokens: is a sampler left in it"):
        ProgramCandidate(Sampling(), CONFIG, 4).capture([2, 3])


@pytest.mark.parametrize("path", PATHS)
def test_a_right_program_is_green(base, path):
    checkpoint, truth = base
    found = judge_program(candidate(checkpoint), truth, path)
    assert not found.red, (found.first_divergence, found.missing, found.partial)
    assert [tap.name for tap in found.taps] == tap_names(truth.config)
    assert all(tap.local is None for tap in found.taps)
    reached = {tap.name: tap.metrics.reached for tap in found.taps}
    assert reached["embed"] == LENGTH
    if path == "decode":
        assert set(reached.values()) == {LENGTH}
    else:
        assert reached["logits"] < LENGTH


def test_without_taps_the_logits_are_judged(base):
    checkpoint, truth = base
    found = judge_program(candidate(checkpoint, tapped=False), truth, "generate")
    assert not found.red
    assert [tap.name for tap in found.taps] == ["logits"]


def test_what_is_wrong_is_named_by_its_first_tap(base):
    """And through the logits alone by them."""
    checkpoint, truth = base
    for tapped, tap in ((True, "layers.1.mlp"), (False, "logits")):
        program = candidate(checkpoint, tapped=tapped)
        with torch.no_grad():
            # One output channel: the scale of all is taken away by the norm that follows.
            program.session.step.model.layers[1].mlp.down_proj.weight[3] *= 1.5
        found = judge_program(program, truth, "chunked")
        assert found.red
        assert (found.first_divergence.tap, found.first_divergence.origin) == (tap, "unknown")


def test_a_missing_tap_is_red(base):
    checkpoint, truth = base

    class Lacking(StepSession):
        def forward(self, tokens, position, taps=False):
            logits, found = super().forward(tokens, position, taps=True)
            found.pop("layers.0.mlp")
            return logits, found

    program = candidate(checkpoint)
    program.session = Lacking(program.session.step.model)
    assert judge_program(program, truth, "chunked").missing == ["layers.0.mlp"]


def test_other_experts_than_the_truths_are_followed_and_judged_as_choices(tmp_path):
    """No later tap is blamed for a choice."""
    path = make_tiny("26B-A4B", tmp_path / "m", overrides=SHORT["26B-A4B"])
    tokens = default_tokens(TextConfig.from_file(path), path, 12)

    def make(routing=None) -> Baseline:
        return baseline(path, tokens, torch.float32, paths=PATHS, local=False, routing=routing)

    base = make()
    swapped = base.truth["layers.0.router"].topk(4).indices[..., [0, 1, 3]]

    class Swapped(StepSession):
        def forward(self, tokens, position, taps=False):
            self.routing = {"layers.0.": swapped}
            logits, found = super().forward(tokens, position, taps=True)
            found["layers.0.choice"] = swapped[:, position : position + tokens.shape[1]].float()
            return logits, found

    program = candidate(path)
    program.session = Swapped(program.session.step.model)
    left = judge_program(program, base, "decode")
    assert left.first_divergence.tap == "layers.0.choice"
    assert any(tap.red for tap in left.taps)
    followed = judge_program(program, base, "decode", make)
    assert followed.first_divergence.tap == "layers.0.choice"
    assert len(followed.bugs) > 0
    assert not any(tap.red for tap in followed.taps)
    assert judge_program(candidate(path), base, "decode", lambda routing: pytest.fail("nothing to follow")).red is False


# Weights


class Held:
    """One quantized tensor, as `Weights` and as `Source`."""

    def __init__(self, packed: QuantizedTensor):
        self.packed, self.files = packed, {"w": Path("file")}

    def quantized(self, name: str) -> QuantizedTensor:
        return self.packed


@given(st.integers(0, 10**6), st.sampled_from([4, 8]), st.booleans(), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=60, deadline=None)
def test_a_product_and_a_sum_make_the_weight_but_for_two_roundings(seed, bits, symmetric, dtype):
    original = torch.randn(4, 64, generator=torch.Generator().manual_seed(seed))
    # In bfloat16 a scale, which is rounded too, is no part of this.
    packed = quantize(original, QuantConfig(bits, 32, symmetric), dtype)
    held = Held(packed)
    got = AffineWeights(held, held, dtype).tensor("w").double()
    want = packed.dequantize(torch.float64)
    # The product is at most 255 steps, the bias as much again, and each of the two is rounded, as is their sum.
    step = packed.scale.double().repeat_interleave(32, -1)
    assert ((got - want).abs() <= torch.finfo(dtype).eps * 2 * (255 * step + want.abs())).all()
    assert torch.equal(AffineWeights(held, held, dtype).rows("w", 1, 3).double(), got[1:3])


# Activations


@given(st.integers(0, 10**6), st.floats(1e-6, 1e6), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=60, deadline=None)
def test_activations_are_rounded_as_torchao_rounds_them(seed, scale, dtype):
    from torchao.quantization.quant_primitives import (
        MappingType,
        choose_qparams_affine,
        dequantize_affine,
        quantize_affine,
    )

    x = (torch.randn(1, 3, 40, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)
    block, limits = (1, 1, 40), (-128, 127)
    grid = choose_qparams_affine(x, MappingType.ASYMMETRIC, block, torch.int8, *limits, zero_point_dtype=torch.int8)
    codes = quantize_affine(x, block, *grid, torch.int8, *limits)
    assert torch.equal(rounded(x), dequantize_affine(codes, block, *grid, torch.int8, *limits, output_dtype=dtype))


@given(st.integers(0, 10**6), st.integers(1, 50))
@settings(max_examples=60, deadline=None)
def test_rounding_moves_a_value_by_half_a_step_at_most_and_keeps_zero(seed, columns):
    x = torch.randn(2, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x[0, 0] = 0
    step = (x.amax(-1).clamp(min=0) - x.amin(-1).clamp(max=0)) / 255
    got = rounded(x)
    # A zero point is an integer: what it is rounded by can push the outermost value half a step past the last code.
    assert ((got - x).abs() <= step[:, None] * (1 + 1e-9)).all()
    assert got[0, 0] == 0
    assert torch.allclose(rounded(got), got, rtol=0, atol=float(step.max()))


def test_the_reference_rounds_the_inputs_of_the_named_linears_only(base):
    checkpoint, truth = base
    model = HFReference(checkpoint, torch.float32, activations=["layers.1.mlp.down_proj.weight"])
    found = model.capture([truth.tokens], routing=truth.routing)
    free = truth.references[0]
    names = list(free)
    changed = names.index("layers.1.mlp")
    assert all(torch.equal(found[name], free[name]) for name in names[:changed])
    off = float((found["layers.1.mlp"] - free["layers.1.mlp"]).norm() / free["layers.1.mlp"].norm())
    assert 1e-4 < off < 0.05
    with pytest.raises(ValueError, match=r"norm\.weight: is not the weight of a linear"):
        quantize_inputs(model.model, ["norm.weight"])
