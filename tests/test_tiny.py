"""The tiny checkpoints: real Hugging Face folders, the same bytes every time, with every feature of their variant."""

import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer

from gemma4_impl.config import FULL, SLIDING, VARIANTS, TextConfig
from reference.tiny import TINY, make_tiny

LENGTH = 40


@pytest.fixture(scope="module")
def folders(tiny) -> dict[str, Path]:
    return {variant: tiny(variant) for variant in TINY}


@pytest.fixture(scope="module")
def tokenizer(folders) -> Tokenizer:
    return Tokenizer.from_file(str(folders["E2B"] / "tokenizer.json"))


@pytest.fixture(params=TINY)
def variant(request) -> str:
    return request.param


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def load(folder: Path, kind=transformers.AutoModelForCausalLM) -> transformers.PreTrainedModel:
    model, info = kind.from_pretrained(folder, attn_implementation="eager", output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def prompt() -> torch.Tensor:
    ids = torch.randint(107, 512, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    ids[0, 0] = 2
    return ids


def rms(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item()


# Determinism


def test_two_builds_are_byte_identical(variant, folders, tmp_path):
    state = torch.get_rng_state()
    assert digests(make_tiny(variant, tmp_path / "again")) == digests(folders[variant])
    assert torch.equal(torch.get_rng_state(), state), "the global random state was used"


def test_another_process_writes_the_same_bytes(folders, tmp_path):
    code = "import sys; from reference.tiny import make_tiny; make_tiny('E2B', sys.argv[1])"
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "m")], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == done.stderr == "", "transformers was not silenced"
    assert digests(tmp_path / "m") == digests(folders["E2B"])


def test_weights_are_pinned(variant, folders):
    """A capture made elsewhere names its checkpoint by hash: changing the weights is a deliberate act."""
    pinned = {
        "E2B": "e5ede1ebe892727a",
        "E4B": "28f45e9d74c1839b",
        "26B-A4B": "dcc85c6816f97137",
        "31B": "f33871c47bfd6088",
    }
    digest = hashlib.sha256()
    for name, tensor in sorted(weights(folders[variant]).items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    assert digest.hexdigest()[:16] == pinned[variant]


def test_seed_changes_the_weights_only(folders, tmp_path):
    other = make_tiny("31B", tmp_path / "m", seed=1)
    before, after = digests(folders["31B"]), digests(other)
    assert {name for name in before if before[name] != after[name]} == {"model.safetensors"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_dtypes_hold_the_rounded_values(dtype, folders, tmp_path):
    folder = make_tiny("26B-A4B", tmp_path / "m", dtype=dtype)
    want = {name: t.to(getattr(torch, dtype)) for name, t in weights(folders["26B-A4B"]).items()}
    got = weights(folder)
    assert got.keys() == want.keys()
    assert all(got[name].dtype == want[name].dtype and torch.equal(got[name], want[name]) for name in want)
    assert json.loads((folder / "config.json").read_text())["dtype"] == dtype


# Structure


def test_features_are_the_variants(variant, folders):
    tiny, real = TextConfig.from_file(folders[variant]), VARIANTS[variant]
    same = ("attention_k_eq_v", "use_double_wide_mlp", "enable_moe_block", "final_logit_softcapping", "rope_parameters")
    for key in same:
        assert getattr(tiny, key) == getattr(real, key), key
    for key in ("num_kv_shared_layers", "hidden_size_per_layer_input", "num_experts", "num_global_key_value_heads"):
        assert bool(getattr(tiny, key)) == bool(getattr(real, key)), key
    assert (tiny.pad_token_id, tiny.bos_token_id, tiny.eos_token_id) == (0, 2, (1, 106))
    assert tiny.layer_types.count(FULL) >= 2
    assert tiny.layer_types[0] == SLIDING
    assert tiny.global_head_dim != tiny.head_dim
    assert tiny.num_attention_heads * tiny.head_dim != tiny.hidden_size
    assert tiny.sliding_window < LENGTH / 4
    if tiny.attention_k_eq_v:
        assert tiny.num_global_key_value_heads < tiny.num_key_value_heads
    if first := tiny.num_kv_shared_layers and tiny.first_kv_shared_layer:
        for kind in (SLIDING, FULL):
            assert tiny.layer_types[:first].count(kind) >= 2
            assert kind in tiny.layer_types[first:]
    if tiny.enable_moe_block:
        assert 2 <= tiny.top_k_experts < tiny.num_experts


def test_bfloat16_rounds_the_embedding_scale_visibly(variant, folders):
    scale = math.sqrt(TextConfig.from_file(folders[variant]).hidden_size)
    assert abs(torch.tensor(scale).bfloat16().item() / scale - 1) >= 1.3e-3


def test_variants_differ():
    for key in ("hidden_size", "sliding_window", "intermediate_size"):
        assert len({kwargs[key] for kwargs in TINY.values()}) >= len(TINY) - 1, key
    assert TINY["E2B"]["layer_types"] != TINY["E4B"]["layer_types"]


def test_is_small(variant, folders):
    assert (folders[variant] / "model.safetensors").stat().st_size < 1.5e6


# Weights


def test_no_norm_or_scale_is_close_to_one(variant, folders):
    tensors = weights(folders[variant])
    checked = [n for n in tensors if n.endswith(("norm.weight", "layernorm.weight", "scale")) or "layernorm_" in n]
    assert len(checked) >= 5 * TINY[variant]["num_hidden_layers"]
    for name in checked:
        assert rms(tensors[name] - 1) > 0.15, name
        assert tensors[name].min() > 0.05, name
        assert tensors[name].std() > 0.05, name


def test_layer_scalars_differ(variant, folders):
    scalars = [t.item() for n, t in weights(folders[variant]).items() if n.endswith("layer_scalar")]
    assert len(scalars) == len(set(scalars)) == TINY[variant]["num_hidden_layers"]
    assert all(0.55 < s < 1.35 and abs(s - 1) > 0.04 for s in scalars)


def test_only_the_needed_tensors_are_saved(variant, folders):
    names = weights(folders[variant]).keys()
    assert "lm_head.weight" not in names
    for layer in TextConfig.from_file(folders[variant]).layers:
        attn = f"model.layers.{layer.index}.self_attn."
        assert (attn + "k_proj.weight" in names) is (attn + "k_norm.weight" in names) is not layer.kv_shared
        assert (attn + "v_proj.weight" in names) is (not layer.kv_shared and not layer.k_eq_v)


def test_activations_are_neither_flat_nor_saturated(variant, folders):
    """One pass over 40 random tokens: each branch counts, softmaxes are spread, softcapping is at work."""
    model = load(folders[variant])
    seen = {}

    def keep(name):
        return lambda module, args, output: seen.__setitem__(name, output)

    for i, layer in enumerate(model.model.layers):
        for name in ("post_attention_layernorm", "post_feedforward_layernorm", "post_per_layer_input_norm", "router"):
            if hasattr(layer, name):
                getattr(layer, name).register_forward_hook(keep((i, name)))
        # The layer scales its output in place afterwards, so its size is taken at once.
        layer.register_forward_hook(lambda m, a, out, i=i: seen.__setitem__((i, "out"), rms(out) / m.layer_scalar))
    with torch.no_grad():
        output = model(prompt(), output_attentions=True)

    for (i, name), value in seen.items():
        if name.startswith("post_"):
            assert 0.15 < rms(value) / seen[i, "out"] < 1, (i, name)
        elif name == "router":
            probabilities, _, chosen = value
            ranked = probabilities.log().sort(-1, descending=True).values
            assert chosen.unique().numel() >= 6, i
            k = model.config.top_k_experts
            assert (ranked[:, k - 1] - ranked[:, k]).median() > 0.2, i

    for i, attention in enumerate(output.attentions):
        p = attention[0, :, LENGTH // 2 :]  # [heads, queries, keys]
        entropy = torch.special.entr(p).sum(-1) / (p > 0).sum(-1).log()
        assert 0.4 < entropy.mean() < 0.95, i

    logits = output.logits[0]
    p = logits.softmax(-1)
    assert 2 < logits.std() < 8
    assert 10 < logits.abs().max() < 30
    assert 1 < torch.special.entr(p).sum(-1).mean() < 5
    assert 0.1 < p.max(-1).values.mean() < 0.8
    assert logits.argmax(-1).unique().numel() > LENGTH / 2


# Forms of a checkpoint


def test_both_config_forms_are_the_same_model(variant, folders, tmp_path):
    hub = make_tiny(variant, tmp_path / "hub", hub_form=True)
    raw = json.loads((hub / "config.json").read_text())
    assert raw["global_head_dim"] == 32
    assert "per_layer_config" not in raw
    assert raw["num_global_key_value_heads"] == TINY[variant].get("num_global_key_value_heads")
    assert TextConfig.from_file(hub) == TextConfig.from_file(folders[variant])
    with torch.no_grad():
        logits = [load(folder)(prompt()).logits for folder in (hub, folders[variant])]
    assert torch.equal(*logits)


@pytest.mark.parametrize("hub_form", [False, True])
def test_multimodal_holds_the_same_text_model(variant, hub_form, folders, tmp_path):
    folder = make_tiny(variant, tmp_path / "m", multimodal=True, hub_form=hub_form)
    assert TextConfig.from_file(folder) == TextConfig.from_file(folders[variant])
    got = weights(folder)
    for name, tensor in weights(folders[variant]).items():
        assert torch.equal(got[name.replace("model.", "model.language_model.", 1)], tensor), name
    assert any(name.startswith("model.vision_tower.") for name in got)
    assert all(t.isfinite().all() for t in got.values())
    with torch.no_grad():
        whole = load(folder, transformers.Gemma4ForConditionalGeneration)(prompt()).logits
        assert torch.equal(whole, load(folders[variant])(prompt()).logits)


def test_shards(folders, tmp_path):
    folder = make_tiny("E4B", tmp_path / "m", shards=3)
    files = sorted(p.name for p in folder.glob("*.safetensors"))
    assert files == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    want, got = weights(folders["E4B"]), weights(folder)
    assert index["weight_map"].keys() == got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    load(folder)


def test_overrides(tmp_path):
    overrides = {"num_hidden_layers": 2, "layer_types": [SLIDING, FULL], "global_head_dim": 8, "sliding_window": 3}
    config = TextConfig.from_file(make_tiny("31B", tmp_path / "m", overrides=overrides))
    assert (config.layer_types, config.global_head_dim, config.sliding_window) == ((SLIDING, FULL), 8, 3)
    load(tmp_path / "m")
    untied = weights(make_tiny("E2B", tmp_path / "untied", overrides={"tie_word_embeddings": False}))
    assert not torch.equal(untied["lm_head.weight"], untied["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    ("variant", "options", "message"),
    [
        ("12B", {}, "unknown variant '12B'; known: E2B, E4B, 26B-A4B, 31B"),
        ("E2B", {"dtype": "int8"}, "unknown dtype 'int8'"),
        ("E2B", {"shards": 0}, "shards = 0: must lie between 1"),
        ("E2B", {"shards": 10_000}, "shards = 10000: must lie between 1"),
        ("E2B", {"overrides": {"window": 3}}, "unknown override 'window'"),
        ("E2B", {"overrides": {"num_hidden_layers": 3}}, "num_hidden_layers = 3: but layer_types has 9 entries"),
        ("31B", {"overrides": {"enable_moe_block": True}}, "num_experts = None: is needed"),
    ],
)
def test_mistakes_are_named_and_leave_nothing_behind(variant, options, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        make_tiny(variant, tmp_path / "m", **options)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_existing_folder_is_refused_unless_empty(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("kept")
    (tmp_path / "file").write_text("kept")
    for name in ("full", "file"):
        with pytest.raises(ValueError, match="already exists"):
            make_tiny("E2B", tmp_path / name)
    assert (tmp_path / "full" / "mine").read_text() == (tmp_path / "file").read_text() == "kept"
    (tmp_path / "empty").mkdir()
    assert TextConfig.from_file(make_tiny("E2B", tmp_path / "empty"))


def test_interruption_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("reference.tiny._write_tokenizer", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_tiny("E2B", tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


# Tokenizer


def test_vocabulary(tokenizer):
    vocab = tokenizer.get_vocab()
    assert sorted(vocab.values()) == list(range(512))
    special = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<|turn>": 105, "<turn|>": 106}
    assert special.items() <= vocab.items()
    assert all(f"<0x{byte:02X}>" in vocab for byte in range(256))
    assert len(tokenizer.encode("the river and the bridge", add_special_tokens=False).ids) < 10


@settings(deadline=None, max_examples=200)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁")))
def test_any_text_round_trips(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.encode(text).ids == [2, *ids]


@pytest.mark.parametrize("text", [" leading", "  two  inside ", "\ttab\n\n", "naïve 中文 🙂", "<0x41>", "<|turn>"])
def test_spaces_and_rare_characters_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) == text


def test_auto_tokenizer_gives_the_same_ids(folders, tokenizer):
    auto = transformers.AutoTokenizer.from_pretrained(folders["E2B"])
    assert (auto.pad_token_id, auto.eos_token_id, auto.bos_token_id, auto.unk_token_id) == (0, 1, 2, 3)
    for text in ("", "The river.", " a\n b", "中 🙂 é", "<|turn>user\nHi<turn|>\n"):
        assert auto(text).input_ids == tokenizer.encode(text).ids
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert auto(text, add_special_tokens=False).input_ids == ids
        assert auto.decode(ids) == text


def test_chat_template(folders):
    auto = transformers.AutoTokenizer.from_pretrained(folders["E2B"])
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": " Hi"}, {"type": "text", "text": " there\n"}]},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Bye"},
    ]
    want = (
        "<bos><|turn>system\nBe brief.<turn|>\n<|turn>user\n Hi there\n<turn|>\n"
        "<|turn>model\nHello.<turn|>\n<|turn>user\nBye<turn|>\n"
    )
    assert auto.apply_chat_template(messages, tokenize=False) == want
    assert auto.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == want + "<|turn>model\n"
    ids = auto.apply_chat_template(messages, return_dict=False)
    assert ids == auto(want, add_special_tokens=False).input_ids
    assert ids.count(2) == 1


def test_generation_stops_at_either_token(folders):
    config = transformers.GenerationConfig.from_pretrained(folders["31B"])
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 2, [1, 106])
