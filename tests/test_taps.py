"""Taps: the vocabulary is what the model emits, values lie at their positions, and unrecorded nothing happens."""

import pytest
import torch
from configs import hub, random_model
from torch import Tensor

from gemma4_impl import taps
from gemma4_impl.config import VARIANTS, TextConfig
from gemma4_impl.model import decoder, moe
from gemma4_impl.model.decoder import Gemma4
from gemma4_impl.taps import Recorder, choice_names, recording, tap_names
from reference.tiny import TINY

LENGTH = 21


@pytest.fixture(scope="module")
def models(tiny) -> dict[str, Gemma4]:
    return {variant: Gemma4.from_pretrained(tiny(variant)) for variant in TINY}


@pytest.fixture(params=TINY)
def model(request, models) -> Gemma4:
    return models[request.param]


def prompt(model: Gemma4, rows: int = 1, length: int = LENGTH) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, model.config.vocab_size, (rows, length), generator=generator)


def record(model: Gemma4, *args, length: int = LENGTH, **kwargs) -> tuple[Recorder, Tensor]:
    recorder = Recorder(len(args[0]), length, **kwargs)
    with recording(recorder), torch.no_grad():
        return recorder, model(*args)


# Vocabulary


def recorded(config: TextConfig) -> list[str]:
    """The taps in order, a router's choice after its probabilities."""
    names, choices = [], iter(choice_names(config))
    for name in tap_names(config):
        names += [name, next(choices)] if name.endswith(".router") else [name]
    return names


def test_the_model_emits_the_vocabulary_in_order(model):
    recorder, logits = record(model, prompt(model))
    assert recorder.order == list(recorder.values) == recorded(model.config)
    assert torch.equal(recorder.values["logits"], logits)
    assert all(value.isfinite().all() for value in recorder.values.values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_released_variants_have_the_taps_of_their_tiny_ones(variant, models):
    def kinds(config: TextConfig) -> set[str]:
        return {name.split(".", 2)[-1] if name.startswith("layers.") else name for name in tap_names(config)}

    names = tap_names(VARIANTS[variant])
    assert len(names) == len(set(names))
    assert kinds(VARIANTS[variant]) == kinds(models[variant].config)


def test_vocabulary_by_feature():
    plain = {"enable_moe_block": False, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
    layer = ["self_attn.q", "self_attn.k", "self_attn.v", "self_attn.out", "resid_mid", "mlp", "resid_mlp", "out"]
    names = tap_names(TextConfig.from_dict(hub(**plain)))
    assert names == ["embed", *[f"layers.{i}.{n}" for i in range(4) for n in layer], "norm", "logits"]
    full = set(tap_names(TextConfig.from_dict(hub())))
    added = {f"layers.{i}.{n}" for i in range(4) for n in ("router", "experts", "resid_ple")} | {"per_layer_inputs"}
    assert full ^ set(names) == added | {"layers.3.self_attn.k", "layers.3.self_attn.v"}


def test_shapes(models):
    for model in models.values():
        config, (recorder, _) = model.config, record(model, prompt(model))
        shapes = {name: tuple(value.shape[2:]) for name, value in recorder.values.items()}
        D, L = config.hidden_size, config.num_hidden_layers
        assert shapes["embed"] == shapes["norm"] == (D,)
        assert shapes["logits"] == (config.vocab_size,)
        assert shapes.get("per_layer_inputs") in (None, (L, config.hidden_size_per_layer_input))
        for layer in config.layers:
            at = f"layers.{layer.index}."
            assert shapes[at + "self_attn.q"] == (config.num_attention_heads, layer.head_dim)
            if not layer.kv_shared:
                assert shapes[at + "self_attn.k"] == (layer.num_key_value_heads, layer.head_dim)
                assert shapes[at + "self_attn.v"] == shapes[at + "self_attn.k"]
            assert shapes.get(at + "router") in (None, (config.num_experts,))
            for name in ("self_attn.out", "resid_mid", "mlp", "experts", "resid_mlp", "resid_ple", "out"):
                assert shapes.get(at + name, (D,)) == (D,)


# Recording


def close(a: Tensor, b: Tensor) -> bool:
    return bool(((a - b).norm() <= 1e-5 * b.norm()).item())


def test_chunks_and_padding_fill_the_same_tensors(model):
    """Two rows of different lengths, padded on both sides, in three chunks: each value at its own row and position."""
    tokens = prompt(model, 2)
    lengths = (LENGTH, LENGTH - 6)
    recorder, cache = Recorder(2, LENGTH), model.make_cache(2, LENGTH, 12)
    with recording(recorder), torch.no_grad():
        for start in range(0, LENGTH, 7):
            chunk, positions = torch.zeros(2, 12, dtype=torch.long), torch.full((2, 12), -1)
            for row, left in ((0, 2), (1, 4)):
                count = max(0, min(7, lengths[row] - start))
                chunk[row, left : left + count] = tokens[row, start : start + count]
                positions[row, left : left + count] = torch.arange(start, start + count)
            model(chunk, positions, cache)
    assert recorder.order == recorded(model.config)
    for row, length in enumerate(lengths):
        want, _ = record(model, tokens[row : row + 1, :length], length=length)
        for name, value in recorder.values.items():
            assert value[row, length:].isnan().all(), name
            assert close(value[row, :length], want.values[name][0]), name


def test_logits_last_records_what_was_computed(model):
    recorder = Recorder(1, LENGTH)
    with recording(recorder), torch.no_grad():
        model(prompt(model), logits="last")
    first = model.config.first_kv_shared_layer
    for name, value in recorder.values.items():
        layer = int(name.split(".")[1]) if name.startswith("layers.") else -1
        only_last = layer >= first or name in ("norm", "logits")
        assert value[0, :-1].isnan().all() == only_last, name
        assert value[0, -1].isfinite().all(), name


def test_glob_keeps_matching_taps_only(models):
    model = models["26B-A4B"]
    recorder, _ = record(model, prompt(model), glob="layers.?.rout*")
    assert recorder.order == [f"layers.{i}.router" for i in range(model.config.num_hidden_layers)]


# Forcing


def test_a_forced_value_replaces_the_tap_after_it_was_recorded(model):
    """Everything up to the forced tap is unchanged, itself included as it was computed; what follows differs."""
    names = tap_names(model.config)
    free, _ = record(model, prompt(model))
    for name in (names[0], "layers.1.self_attn.v", "layers.1.mlp", f"layers.{model.config.num_hidden_layers - 1}.out"):
        value = free.values[name] + 1
        forced, logits = record(model, prompt(model), forced={name: value})
        at = names.index(name)
        for earlier in names[: at + 1]:
            assert torch.equal(forced.values[earlier], free.values[earlier]), (name, earlier)
        assert not close(forced.values["norm"], free.values["norm"]), name
        assert not close(logits, free.values["logits"])


def test_forcing_its_own_values_changes_nothing(model):
    free, _ = record(model, prompt(model))
    forced, logits = record(model, prompt(model), forced=free.values)
    assert torch.equal(logits, free.values["logits"])
    assert all(torch.equal(forced.values[name], free.values[name]) for name in free.values)


def test_forcing_leaves_the_models_own_tensors_alone(models):
    model = models["31B"]
    before = {name: t.clone() for name, t in model.state_dict().items()}
    value = torch.ones(1, LENGTH, model.config.hidden_size)
    record(model, prompt(model), forced=dict.fromkeys(("embed", "norm", "layers.0.out"), value))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_forced_values_reach_by_position(model):
    """In chunks with padding the value of each (row, position) is used, as in one forward."""
    tokens = prompt(model)
    value = torch.randn(1, LENGTH, model.config.hidden_size, generator=torch.Generator().manual_seed(5))
    want, _ = record(model, tokens, forced={"layers.0.out": value})
    recorder, cache = Recorder(1, LENGTH, forced={"layers.0.out": value}), model.make_cache(1, LENGTH, 9)
    with recording(recorder), torch.no_grad():
        for start in range(0, LENGTH, 7):
            positions = torch.tensor([[-1, *range(start, start + 7), -1]])
            model(torch.nn.functional.pad(tokens[:, start : start + 7], (1, 1)), positions, cache)
    assert all(close(value, want.values[name]) for name, value in recorder.values.items())


def test_forced_routing(models):
    model, k = models["26B-A4B"], models["26B-A4B"].config.top_k_experts
    free, _ = record(model, prompt(model))
    chosen = {f"layers.{i}.": free.values[f"layers.{i}.router"].topk(k).indices for i in range(6)}
    same, _ = record(model, prompt(model), routing=chosen)
    assert torch.equal(same.values["logits"], free.values["logits"])
    worst = {"layers.2.": free.values["layers.2.router"].topk(k, largest=False).indices}
    other, _ = record(model, prompt(model), routing=worst)
    assert torch.equal(other.values["layers.2.router"], free.values["layers.2.router"])
    assert not close(other.values["layers.2.experts"], free.values["layers.2.experts"])


# Off


def test_off_is_the_same_as_absent(model, monkeypatch):
    """Bit for bit what a model gives whose tap calls are taken out."""
    tokens = prompt(model, 2)

    def logits() -> list[Tensor]:
        cache = model.make_cache(2, LENGTH, 11)
        parts = [model(tokens[:, start : start + 11], cache=cache) for start in range(0, LENGTH, 11)]
        return [model(tokens), *parts]

    with torch.no_grad():
        off = logits()
        recorder, on = record(model, tokens)
        monkeypatch.setattr(decoder, "taps", Untapped)
        monkeypatch.setattr(moe, "taps", Untapped)
        assert all(torch.equal(*pair) for pair in zip(off, logits(), strict=True))
    assert torch.equal(on, off[0])
    assert recorder.order


class Untapped:
    @staticmethod
    def at(positions: Tensor) -> None:
        pass

    @staticmethod
    def tap(prefix: str, name: str, value: Tensor) -> Tensor:
        return value

    @staticmethod
    def route(prefix: str, index: Tensor) -> Tensor:
        return index


def test_one_recorder_at_a_time_and_none_after_an_error():
    model = random_model(TextConfig.from_dict(hub()), torch.float32)
    with pytest.raises(RuntimeError, match="already active"), recording(Recorder(1, 1)), recording(Recorder(1, 1)):
        pass
    with pytest.raises(ValueError, match="outside the vocabulary"), recording(Recorder(1, 1)):
        model(torch.tensor([[999]]))
    value = torch.ones(1)
    assert taps.tap("", "embed", value) is value
    assert taps.route("", value) is value
    with recording(Recorder(1, 1)) as recorder:
        model(torch.tensor([[1]]))
    assert recorder.order == recorded(model.config)
