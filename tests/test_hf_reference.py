"""transformers behind our taps: its truth is float64 all the way, forced values reach, and nothing global is left."""

import contextlib
import math

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma4 import modeling_gemma4
from transformers.utils import logging

from gemma4_impl.taps import choice_names, tap_names
from parity.candidate import TorchCandidate
from reference import hf
from reference.hf import HFReference
from reference.tiny import TINY

pytestmark = pytest.mark.parity
TOKENS = torch.randint(0, 512, (40,), generator=torch.Generator().manual_seed(2)).tolist()
Taps = dict[str, Tensor]


@pytest.fixture(scope="module")
def truths(tiny) -> dict[str, tuple[HFReference, Taps]]:
    references = {variant: HFReference(tiny(variant), truth=True) for variant in TINY}
    return {variant: (reference, reference.capture([TOKENS])) for variant, reference in references.items()}


@pytest.fixture(params=TINY)
def variant(request) -> str:
    return request.param


def errors(got: Taps, want: Taps) -> dict[str, float]:
    assert got.keys() <= want.keys()
    return {name: float((got[name] - want[name]).norm() / want[name].norm()) for name in got}


def forceable(reference: HFReference, taps: Taps) -> Taps:
    return {name: value for name, value in taps.items() if reference.forceable(name)}


# Float64


def test_truth_is_float64_at_every_tap(variant, truths):
    """Two orders of summing, eager and sdpa, agree to float64's rounding: nothing on the way was narrower."""
    reference, truth = truths[variant]
    assert list(truth) == tap_names(reference.config) + choice_names(reference.config)
    assert all(value.dtype == torch.float64 for value in truth.values())
    reference.use("sdpa")
    other = reference.capture([TOKENS])
    reference.use("eager")
    found = errors(other, truth)
    assert max(found.values()) <= 1e-12
    assert max(found.values()) > 0, "eager and sdpa ran the same code"


def test_a_port_in_float64_agrees(variant, truths, tiny):
    """The other implementation, which shares no code with transformers, is as close: the truth is the model's."""
    _, truth = truths[variant]
    ours = TorchCandidate(tiny(variant), torch.float64, weights=torch.float32).capture(TOKENS)
    assert max(errors(ours, truth).values()) <= 1e-12


def test_without_promoting_casts_it_would_not_be(variant, truths, monkeypatch):
    reference, truth = truths[variant]
    monkeypatch.setattr(hf, "PromoteFloat32", contextlib.nullcontext)
    plain = reference.capture([TOKENS])
    assert max(errors(plain, truth).values()) > 1e-8


def test_promotion_reaches_what_transformers_casts():
    x = torch.linspace(-3, 3, 64, dtype=torch.float64)
    with hf.PromoteFloat32():
        for y in (x.float(), x.to(torch.float32), x.to(dtype=torch.float32), x.to("cpu", torch.float32)):
            assert y.dtype == torch.float64
            assert torch.equal(y, x)
        assert nn.functional.softmax(x, dim=-1, dtype=torch.float32).dtype == torch.float64
        assert x.softmax(-1, dtype=torch.float32).dtype == torch.float64
        assert torch.arange(3, dtype=torch.float32).dtype == torch.float64
        assert x.to(torch.bfloat16).dtype == torch.bfloat16
        assert x.to(torch.int64).dtype == torch.int64
    assert x.float().dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_truth_rounds_the_embedding_scale_as_the_model_does(variant, dtype, tiny):
    """The weights and the scale are what a model in `dtype` holds; their product is not rounded."""
    reference = HFReference(tiny(variant), dtype, truth=True)
    embed = reference.capture([TOKENS], glob="embed")["embed"][0]
    weight = HFReference(tiny(variant), dtype).text.embed_tokens.weight.double()[TOKENS]
    exact = math.sqrt(reference.config.hidden_size)
    scale = float(torch.tensor(exact, dtype=torch.float64).to(dtype))
    assert torch.equal(embed, weight * scale)
    if dtype == torch.bfloat16:
        assert abs(scale / exact - 1) > 1e-3
    if ple := reference.config.hidden_size_per_layer_input:
        scale = float(torch.tensor(math.sqrt(ple), dtype=torch.float64).to(dtype))
        assert float(reference.text.embed_tokens_per_layer.embed_scale) == scale


# Nothing global


def state() -> dict[str, object]:
    """Everything that the adapter could have replaced, by identity."""
    found = {f"gemma4.{name}": id(value) for name, value in vars(modeling_gemma4).items()}
    for name, cls in vars(modeling_gemma4).items():
        if isinstance(cls, type) and cls.__module__ == modeling_gemma4.__name__:
            found |= {f"{name}.{key}": id(value) for key, value in vars(cls).items() if callable(value)}
    for owner in (torch, torch.Tensor, nn.functional, nn.Module):
        found |= {f"{owner.__name__}.{n}": id(v) for n, v in vars(owner).items() if callable(v)}
    found |= {f"attention {name}": id(ALL_ATTENTION_FUNCTIONS[name]) for name in ALL_ATTENTION_FUNCTIONS}
    found |= {"dtype": torch.get_default_dtype(), "modes": len(_get_current_function_mode_stack())}
    found |= {"verbosity": logging.get_verbosity(), "bars": logging.is_progress_bar_enabled()}
    found |= {"hooks": len(nn.modules.module._global_forward_hooks), "grad": torch.is_grad_enabled()}
    return found


def test_no_global_state_is_left(variant, tiny):
    plain = modeling_gemma4.Gemma4ForCausalLM.from_pretrained(tiny(variant), attn_implementation="eager").eval()
    rng = torch.get_rng_state()
    before, logits = state(), plain(torch.tensor([TOKENS])).logits
    for truth in (True, False):
        reference = HFReference(tiny(variant), truth=truth)
        reference.use("sdpa")
        value = reference.capture([TOKENS])["embed"]
        reference.capture([TOKENS], forced={"embed": value})
        with pytest.raises(IndexError):
            reference.capture([[10**6]])
    assert state() == before
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(plain(torch.tensor([TOKENS])).logits, logits)
    after = modeling_gemma4.Gemma4ForCausalLM.from_pretrained(tiny(variant), attn_implementation="eager").eval()
    assert torch.equal(after(torch.tensor([TOKENS])).logits, logits)


# Captures


def test_ragged_rows(truths, variant):
    reference, truth = truths[variant]
    both = reference.capture([TOKENS, TOKENS[:7]])
    for name, value in both.items():
        assert torch.equal(value[:1], truth[name]), name
        assert value[1, 7:].isnan().all(), name
        # Causal: a prefix is the same, but for the order in which products of other sizes are summed.
        assert float((value[1, :7] - truth[name][0, :7]).norm() / truth[name][0, :7].norm()) <= 1e-12, name


def test_capture_equals_the_plain_model(variant, tiny):
    """Taps only look: logits are bit for bit transformers' own."""
    reference = HFReference(tiny(variant))
    plain = modeling_gemma4.Gemma4ForCausalLM.from_pretrained(tiny(variant), attn_implementation="eager").eval()
    plain.set_experts_implementation("eager")
    with torch.no_grad():
        want = plain(torch.tensor([TOKENS])).logits
    assert torch.equal(reference.capture([TOKENS])["logits"], want)


@pytest.mark.parametrize("variant", ["E2B", "E4B"])
def test_shared_keys_come_from_their_producer(variant, truths):
    """With every residual held at the truth, a change of one layer's k or v shows in the layers that share it alone."""
    reference, truth = truths[variant]
    layers = reference.config.layers
    held = {name: value for name, value in forceable(reference, truth).items() if ".self_attn." not in name}
    for part in ("k", "v"):
        for producer in {layer.kv_source for layer in layers if layer.kv_shared}:
            name = f"layers.{producer}.self_attn.{part}"
            moved = reference.capture([TOKENS], forced={**held, name: truth[name].roll(1, dims=1)})
            changed = {layer.index for layer in layers if not unmoved(moved, truth, layer.index)}
            assert changed == {layer.index for layer in layers if layer.kv_source == producer}


def unmoved(moved: Taps, truth: Taps, index: int) -> bool:
    name = f"layers.{index}.self_attn.out"
    return torch.equal(moved[name], truth[name])


# Forcing


def test_every_forceable_tap_reaches_the_logits(variant, truths):
    reference, truth = truths[variant]
    names = [name for name in truth if name != "logits"]
    for name in names:
        value = truth[name] * 1.25 if not name.endswith("router") else truth[name].roll(1, dims=-1)
        moved = reference.capture([TOKENS], forced={name: value}, glob="logits")
        assert torch.equal(moved["logits"], truth["logits"]) != reference.forceable(name), name


def test_forcing_changes_nothing_before_itself(variant, truths):
    reference, truth = truths[variant]
    names = list(truth)
    for name in names[2::9]:
        moved = reference.capture([TOKENS], forced={name: truth[name].flip(1)})
        for earlier in names[: names.index(name) + 1]:
            assert torch.equal(moved[earlier], truth[earlier]), (name, earlier)


def test_forced_truth_leaves_only_local_error(variant, truths, tiny):
    """With the truth in every tap each is computed from the truth: none in float64, one step's rounding in float32."""
    reference, truth = truths[variant]
    forced = forceable(reference, truth)
    assert {name.rsplit(".", 1)[-1] for name in truth.keys() - forced.keys()} <= {"resid_ple", "resid_mlp", "choice"}
    again = reference.capture([TOKENS], forced=forced)
    assert max(errors(again, truth).values()) <= 1e-15
    ours = TorchCandidate(tiny(variant), torch.float64, weights=torch.float32).capture(TOKENS, forced=forced)
    assert max(errors(ours, truth).values()) <= 1e-14
    narrow = HFReference(tiny(variant))
    for attention in ("eager", "sdpa"):
        narrow.use(attention)
        found = errors(narrow.capture([TOKENS], forced=forced), truth)
        assert 1e-8 < max(found.values()) <= 1e-6, attention


def test_forced_routing_reaches(truths):
    reference, truth = truths["26B-A4B"]
    k = reference.config.top_k_experts
    chosen = {f"layers.{i}.": truth[f"layers.{i}.router"].topk(k).indices for i in range(6)}
    assert torch.equal(reference.capture([TOKENS], routing=chosen)["logits"], truth["logits"])
    least = {"layers.2.": truth["layers.2.router"].topk(k, largest=False).indices}
    moved = reference.capture([TOKENS], routing=least)
    assert torch.equal(moved["layers.2.router"], truth["layers.2.router"])
    assert errors(moved, truth)["layers.2.experts"] > 0.1
