"""`quantize_checkpoint`: what is in the folder it makes, that nothing is there when it fails, and its report."""

import errno
import itertools
import json
import math
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict, unflatten_tensor_state_dict
from torchao.quantization import FqnToConfig, Int4WeightOnlyConfig, IntxWeightOnlyConfig, fqn_matches_fqn_config
from transformers import TorchAoConfig

from gemma4_impl import folders
from gemma4_impl.checkpoint import Checkpoint, CheckpointError
from gemma4_impl.names import from_hf
from gemma4_impl.quant import container, page, save
from gemma4_impl.quant.checkpoint import QuantizedCheckpoint
from gemma4_impl.quant.convert import to_torchao
from gemma4_impl.quant.quantize import quantize
from gemma4_impl.quant.recipe import RECIPES, QuantConfig, QuantRecipe, QuantRule, RecipeError, plan
from gemma4_impl.quant.save import quantize_checkpoint
from gemma4_impl.quant.sqnr import Sqnr
from reference.tiny import aligned, make_tiny

VARIANTS = ("E2B", "E4B", "26B-A4B", "31B")
INT8 = QuantConfig(8, None)
KEEP = QuantRule("*", None)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """(variant, keyword arguments of make_tiny) -> a bfloat16 checkpoint whose rows are multiples of 32."""
    made = {}

    def make(variant: str, overrides=(), **kwargs) -> Path:
        key = variant, *overrides, *kwargs.items()
        if key not in made:
            kwargs = {"dtype": "bfloat16", **kwargs}
            out = tmp_path_factory.mktemp("tiny") / variant
            made[key] = make_tiny(variant, out, overrides=aligned(variant, 32) | dict(overrides), **kwargs)
        return made[key]

    return make


def parts(q) -> list:
    return [q.qdata, q.scale, q.zero if q.zero is not None else torch.zeros_like(q.scale)]


def same(a, b) -> bool:
    return (a.bits, a.offset) == (b.bits, b.offset) and all(map(torch.equal, parts(a), parts(b)))


def origin(name: str) -> str:
    return "embed_tokens.weight" if name == "lm_head.weight" else name


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("recipe", ["default", "sensitive"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_tensor_is_what_quantize_makes_of_it(source, tmp_path, monkeypatch, variant, recipe):
    monkeypatch.setattr(save, "_BLOCK", 1000)  # a few rows, or one expert: no group crosses a block
    path = source(variant)
    report = quantize_checkpoint(path, tmp_path / "q", RECIPES[recipe])
    before, after = Checkpoint(path), QuantizedCheckpoint(tmp_path / "q")
    configs = plan(RECIPES[recipe], before.config)
    assert set(after.files) == set(configs)
    assert [t.name for t in report.tensors] == list(configs)
    for name, config in configs.items():
        weight = before.tensor(origin(name))
        if config is None:
            assert after.quantized(name) is None
            assert torch.equal(after.tensor(name), weight)
            assert after.tensor(name).dtype == weight.dtype
        else:
            assert same(after.quantized(name), quantize(weight, config, torch.bfloat16))
    assert not after.config.tie_word_embeddings
    assert after.dtype == torch.bfloat16


@pytest.mark.parametrize("multimodal", [False, True])
@pytest.mark.parametrize("variant", ["E2B", "26B-A4B"])
def test_torchao_reads_each_file_by_itself(source, tmp_path, variant, multimodal):
    """Names, classes, bits and metadata are those that torchao's own `flatten_tensor_state_dict` would write."""
    path = source(variant, multimodal=multimodal)
    quantize_checkpoint(path, tmp_path / "q", RECIPES["sensitive"], shard_bytes=100_000)
    files = sorted((tmp_path / "q").glob("*.safetensors"))
    assert len(files) > 3
    read, stored = {}, {}
    for file in files:
        with safe_open(file, "pt") as handle:
            metadata = handle.metadata()
        tensors = load_file(file)
        found, leftover = unflatten_tensor_state_dict(tensors, metadata)
        assert not leftover
        assert not set(found) & set(read)
        read |= found
        stored |= tensors
    before = Checkpoint(path)
    configs = plan(RECIPES["sensitive"], before.config)
    assert {from_hf(name) for name in read} - {None} == set(configs)
    for name, tensor in read.items():
        if (config := configs.get(from_hf(name))) is not None:
            expected = to_torchao(quantize(before.tensor(origin(from_hf(name))), config, torch.bfloat16))
            assert type(tensor) is type(expected)
            assert tensor.dtype == torch.bfloat16
            for part in expected.tensor_data_names:
                ours, theirs = getattr(tensor, part), getattr(expected, part)
                assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)), (name, part)
    flat, described = flatten_tensor_state_dict(read)
    assert set(flat) == set(stored)
    assert {name: t.dtype for name, t in flat.items()} == {name: t.dtype for name, t in stored.items()}
    assert metadata.pop("format") == "pt"
    assert sorted(json.loads(metadata.pop("tensor_names"))) == sorted(json.loads(described.pop("tensor_names")))
    assert {name: json.loads(text) for name, text in metadata.items()} == {
        name: json.loads(text) for name, text in described.items()
    }


def test_shards_are_as_large_as_they_may_be(source, tmp_path):
    path = source("31B")
    quantize_checkpoint(path, tmp_path / "one", RECIPES["default"])
    assert not (tmp_path / "one/model.safetensors.index.json").exists()
    whole = load_file(tmp_path / "one/model.safetensors")
    quantize_checkpoint(path, tmp_path / "some", RECIPES["default"], shard_bytes=60_000)
    index = json.loads((tmp_path / "some/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    shards: dict[str, list[int]] = {}
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "some" / file, "pt") as handle:
            tensor = handle.get_tensor(name)
        assert torch.equal(tensor, whole[name])
        shards.setdefault(file, []).append(tensor.nbytes)
    sizes = [sum(sizes) for _, sizes in sorted(shards.items())]
    assert max(sizes) <= 60_000
    assert all(a + b > 60_000 - 60_000 // 4 for a, b in itertools.pairwise(sizes))
    assert QuantizedCheckpoint(tmp_path / "some").fingerprint() == QuantizedCheckpoint(tmp_path / "one").fingerprint()


@pytest.mark.parametrize("multimodal", [False, True])
def test_config_says_how_each_module_is_quantized(source, tmp_path, multimodal):
    """transformers reads it back, and torchao matches every quantized tensor, and no other, with what it is."""
    path = source("26B-A4B", multimodal=multimodal)
    quantize_checkpoint(path, tmp_path / "q", RECIPES["sensitive"])
    raw = json.loads((tmp_path / "q/config.json").read_text())
    quantization = raw.pop("quantization_config")
    before = json.loads((path / "config.json").read_text())
    before["tie_word_embeddings"] = False
    if multimodal:
        before["text_config"]["tie_word_embeddings"] = False
    assert raw == before
    config = TorchAoConfig.from_dict(quantization)
    assert isinstance(config.quant_type, FqnToConfig)
    assert config.to_dict()["quant_method"] == "torchao"
    assert TorchAoConfig.from_dict(config.to_dict()).quant_type == config.quant_type
    checkpoint = QuantizedCheckpoint(tmp_path / "q")
    configs = plan(RECIPES["sensitive"], checkpoint.config)
    for name, how in configs.items():
        fqn = checkpoint.hf_names[name].removesuffix(".weight")
        assert fqn_matches_fqn_config(fqn, config.quant_type) == (how is not None), name
        matches = [c for p, c in config.quant_type.fqn_to_config.items() if matched(p, fqn)]
        if how is None:
            continue
        assert len(matches) == 1
        if how.bits == 4:
            assert isinstance(matches[0], Int4WeightOnlyConfig)
            assert matches[0].group_size == how.group_size
        else:
            assert isinstance(matches[0], IntxWeightOnlyConfig)
            assert matches[0].weight_dtype == torch.int8
            assert matches[0].granularity.axis == 0


def matched(pattern: str, fqn: str) -> bool:
    return fqn_matches_fqn_config(fqn, FqnToConfig({pattern: None}))


def test_towers_are_copied(source, tmp_path):
    path = source("E2B", multimodal=True)
    report = quantize_checkpoint(path, tmp_path / "q", RECIPES["default"])
    before, after = load_file(path / "model.safetensors"), load_file(tmp_path / "q/model.safetensors")
    towers = [name for name in before if from_hf(name) is None]
    assert len(towers) > 20
    assert sorted(report.towers) == sorted(towers)
    assert report.tower_bytes == sum(before[name].nbytes for name in towers)
    for name in towers:
        assert after[name].dtype == before[name].dtype
        assert torch.equal(after[name], before[name])


def test_files_beside_the_weights(source, tmp_path):
    path = shutil.copytree(source("31B"), tmp_path / "source")
    (path / "additional_chat_templates").mkdir()
    kept = {
        "tokenizer.model", "special_tokens_map.json", "preprocessor_config.json", "processor_config.json",
        "video_preprocessor_config.json", "chat_template.json", "additional_chat_templates/tool.jinja",
    }  # fmt: skip
    left = {"README.md", "optimizer.pt", "model.safetensors.bak", "tokenizer.py"}
    for name in kept | left:
        (path / name).write_text(name)
    quantize_checkpoint(path, tmp_path / "q", RECIPES["default"])
    made = set(listing(tmp_path / "q"))
    kept |= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    written = {"config.json", "model.safetensors", "quantization.json", "quantization.html"}
    assert made == kept | written | {"additional_chat_templates"}
    assert all((tmp_path / "q" / name).read_bytes() == (path / name).read_bytes() for name in kept)


def test_a_head_stays_tied_to_an_embedding_that_stays(source, tmp_path):
    recipe = QuantRecipe("mlp", (QuantRule("*.mlp.*", INT8), KEEP))
    report = quantize_checkpoint(source("31B"), tmp_path / "q", recipe)
    checkpoint = QuantizedCheckpoint(tmp_path / "q")
    assert checkpoint.config.tie_word_embeddings
    assert not report.untied
    assert "lm_head.weight" not in checkpoint.files
    assert {t.name.split(".")[2] for t in report.quantized} == {"mlp"}


@pytest.mark.parametrize("quantized", ["embed_tokens.weight", "lm_head.weight"])
def test_a_head_is_untied_if_either_changes(source, tmp_path, quantized):
    recipe = QuantRecipe("one", (QuantRule(quantized, INT8), KEEP))
    report = quantize_checkpoint(source("31B"), tmp_path / "q", recipe)
    before, after = Checkpoint(source("31B")), QuantizedCheckpoint(tmp_path / "q")
    assert report.untied
    assert not after.config.tie_word_embeddings
    for name in ("embed_tokens.weight", "lm_head.weight"):
        assert (after.quantized(name) is not None) == (name == quantized)
        weight = before.tensor("embed_tokens.weight")
        expected = quantize(weight, INT8).dequantize() if name == quantized else weight
        assert torch.equal(after.tensor(name), expected)


def test_a_head_of_its_own(source, tmp_path):
    path = source("31B", overrides=(("tie_word_embeddings", False),))
    report = quantize_checkpoint(path, tmp_path / "q", RECIPES["default"])
    head = Checkpoint(path).tensor("lm_head.weight")
    assert not torch.equal(head, Checkpoint(path).tensor("embed_tokens.weight"))
    assert same(QuantizedCheckpoint(tmp_path / "q").quantized("lm_head.weight"), quantize(head, QuantConfig(4, 32)))
    assert not report.untied
    assert report.tensors[-1].name == "lm_head.weight"
    assert report.tensors[-1].bytes_before == head.nbytes


def test_weights_that_the_model_does_not_read_are_left_out(source, tmp_path):
    """Released files may hold the keys and values of layers that share another's, and a copy of the tied head."""
    path = shutil.copytree(source("E2B"), tmp_path / "source")
    tensors = load_file(path / "model.safetensors")
    extra = {
        "model.layers.8.self_attn.k_proj.weight": torch.ones(32, 96, dtype=torch.bfloat16),
        "lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
    }
    save_file(tensors | extra, path / "model.safetensors", metadata={"format": "pt"})
    report = quantize_checkpoint(path, tmp_path / "q", RECIPES["default"])
    assert report.dropped == ("model.layers.8.self_attn.k_proj.weight",)
    assert "layers.8.self_attn.k_proj.weight" not in QuantizedCheckpoint(tmp_path / "q").files


def test_older_prefix(source, tmp_path):
    path = shutil.copytree(source("31B"), tmp_path / "source")
    tensors = load_file(path / "model.safetensors")
    save_file(
        {f"language_{n.replace('model.', 'model.model.', 1)}": t for n, t in tensors.items()},
        path / "model.safetensors",
    )
    quantize_checkpoint(path, tmp_path / "q", RECIPES["default"])
    assert QuantizedCheckpoint(tmp_path / "q").hf_names["lm_head.weight"] == "language_model.lm_head.weight"


def test_report(source, tmp_path):
    """Sizes are those of the files' tensors; each SQNR is that of float64 arithmetic on what is read back."""
    path = source("E2B")
    report = quantize_checkpoint(path, tmp_path / "q", RECIPES["default"])
    raw = json.loads((tmp_path / "q/quantization.json").read_text(), parse_constant=pytest.fail)
    before, after = Checkpoint(path), QuantizedCheckpoint(tmp_path / "q")
    stored = load_file(tmp_path / "q/model.safetensors")
    assert raw["summary"]["bytes_after"] == sum(t.nbytes for t in stored.values())
    assert raw["summary"]["bytes_before"] == sum(t.nbytes for t in load_file(path / "model.safetensors").values())
    assert raw["recipe"] == RECIPES["default"].to_dict()
    assert QuantRecipe.from_dict(raw["recipe"]) == RECIPES["default"]
    assert raw["source"] == {"name": path.name, "fingerprint": before.fingerprint()}
    assert [t["name"] for t in raw["tensors"]] == [t.name for t in report.tensors]
    signal = noise = 0.0
    for row in raw["tensors"]:
        name = row["name"]
        weight = before.tensor(origin(name)).double()
        assert row["bytes_before"] == (0 if name == "lm_head.weight" else weight.numel() * 2)
        if "bits" not in row:
            assert row["stored"] == "bfloat16"
            continue
        error = after.tensor(name).double() - weight
        expected = 10 * math.log10(weight.square().sum() / error.square().sum())
        assert row["sqnr_db"] == pytest.approx(expected, abs=1e-4)
        assert row["bits_per_weight"] == pytest.approx(8 * row["bytes_after"] / weight.numel())
        signal += weight.square().sum().item()
        noise += error.square().sum().item()
    assert raw["summary"]["sqnr_db"] == pytest.approx(10 * math.log10(signal / noise), abs=1e-4)


def test_sqnr_of_extremes():
    weight = torch.tensor([[1.5e38, -1e38], [0.0, 0.0]])
    sqnr = Sqnr()
    q = quantize(weight, QuantConfig(8, None))
    sqnr.add(weight, q)
    error = q.dequantize().double() - weight.double()
    assert sqnr.db == pytest.approx(10 * math.log10(weight.double().square().sum() / error.square().sum()), abs=1e-4)
    exact, nothing = Sqnr(), Sqnr()
    exact.add(torch.zeros(2, 4), quantize(torch.zeros(2, 4), QuantConfig(8, None)))
    assert exact.db == math.inf
    nothing.signal, nothing.noise = 0.0, 1.0
    assert nothing.db == -math.inf


@pytest.mark.parametrize("shape", [(3, 5, 1030), (700, 416), (1, 2), (2, 300_000)])
def test_sqnr_adds_up_over_blocks(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    q = quantize(weight, QuantConfig(8, 2))
    whole, halves, merged = Sqnr(), Sqnr(), Sqnr()
    whole.add(weight, q)
    if shape[0] > 1:
        halves.add(weight[:1], q[:1])
        merged.add(weight[1:], q[1:])
        halves.merge(merged)
        assert (halves.signal, halves.noise) == pytest.approx((whole.signal, whole.noise), rel=1e-6)
    error = q.dequantize().double() - weight.double()
    assert whole.signal == pytest.approx(weight.double().square().sum().item(), rel=1e-6)
    assert whole.noise == pytest.approx(error.square().sum().item(), rel=1e-6)


def test_page(source, tmp_path):
    report = quantize_checkpoint(source("26B-A4B"), tmp_path / "q", RECIPES["sensitive"])
    html = (tmp_path / "q/quantization.html").read_text()
    assert html.count("<svg") == 1
    assert "matplotlib" not in html
    assert "http" not in html.replace("http://www.w3.org/", "").replace("https://www.w3.org/", "")  # self-contained
    assert all(t.name in html for t in report.tensors)
    for text in ("int8: SQNR, dB", "int4: SQNR, dB", "q_proj", "experts.gate_up_proj", "lm_head", "edge"):
        assert text in html
    assert page.to_html(report) == html
    assert "#0202" not in html
    assert "#0101" not in html


def test_page_without_matplotlib(source, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    quantize_checkpoint(source("31B"), tmp_path / "q", RECIPES["default"])
    html = (tmp_path / "q/quantization.html").read_text()
    assert "<svg" not in html
    assert "matplotlib is not installed" in html
    assert "layers.0.self_attn.q_proj.weight" in html


def test_page_escapes_names(source, tmp_path):
    path = shutil.copytree(source("31B"), tmp_path / "<b>")
    quantize_checkpoint(path, tmp_path / "q", QuantRecipe("<script>", RECIPES["default"].rules))
    html = (tmp_path / "q/quantization.html").read_text()
    assert "<script>" not in html
    assert "<b>:" not in html


def test_progress_ends_where_it_should(source, tmp_path, monkeypatch):
    monkeypatch.setattr(save, "_BLOCK", 5000)
    seen = []
    quantize_checkpoint(
        source("E2B", multimodal=True), tmp_path / "q", RECIPES["default"], 10**6, lambda *a: seen.append(a)
    )
    done, total = zip(*seen, strict=True)
    assert len(set(total)) == 1
    assert list(done) == sorted(done)
    assert done[-1] == total[0]
    assert len(done) > 200


def test_refuses_to_overwrite(source, tmp_path):
    for name in ("file", "folder", "link"):
        out = tmp_path / name
        {"file": out.touch, "folder": out.mkdir, "link": lambda out=out: out.symlink_to("nowhere")}[name]()
        with pytest.raises(FileExistsError, match=f"{name}: already exists"):
            quantize_checkpoint(source("31B"), out, RECIPES["default"])
    assert listing(tmp_path) == ["file", "folder", "link"]


def test_refuses_a_folder_inside_its_source(source, tmp_path):
    path = shutil.copytree(source("31B"), tmp_path / "source")
    before = listing(tmp_path)
    (tmp_path / "alias").symlink_to(path)
    for out in (path / "q", path / "a/../b/q", tmp_path / "alias/q"):
        with pytest.raises(ValueError, match="inside the checkpoint"):
            quantize_checkpoint(path, out, RECIPES["default"])
    (tmp_path / "alias").unlink()
    assert listing(tmp_path) == before


def test_refuses_what_is_quantized_already(source, tmp_path):
    quantize_checkpoint(source("31B"), tmp_path / "q", RECIPES["default"])
    with pytest.raises(CheckpointError, match="is quantized already"):
        quantize_checkpoint(tmp_path / "q", tmp_path / "qq", RECIPES["default"])
    (tmp_path / "m.gguf").touch()
    for path in (tmp_path / "m.gguf", tmp_path / "none.gguf", source("31B") / "config.json"):
        with pytest.raises(CheckpointError, match="only a checkpoint folder"):
            quantize_checkpoint(path, tmp_path / "qq", RECIPES["default"])
    with pytest.raises(FileNotFoundError):
        quantize_checkpoint(tmp_path / "none", tmp_path / "qq", RECIPES["default"])
    assert listing(tmp_path)[:1] == ["m.gguf"]
    assert not (tmp_path / "qq").exists()


@pytest.mark.parametrize(
    ("rules", "match"),
    [
        ((KEEP,), "keeps every tensor"),
        ((QuantRule("*_proj.weight", QuantConfig(4, 64)), KEEP), "groups of 64"),
        ((QuantRule("*_proj.weight", INT8),), "no rule matches"),
        ((QuantRule("*", INT8),), "norms, scalars and routers stay"),
    ],
)
def test_refuses_recipes(source, tmp_path, rules, match):
    with pytest.raises(RecipeError, match=match):
        quantize_checkpoint(source("31B"), tmp_path / "q", QuantRecipe("mine", rules))
    assert listing(tmp_path) == []


def test_refuses_float64(tmp_path):
    path = make_tiny("31B", tmp_path / "source", dtype="float64", overrides=aligned("31B", 32))
    with pytest.raises(
        CheckpointError, match=r"'model\.embed_tokens\.weight' is stored as F64; save the checkpoint as"
    ):
        quantize_checkpoint(path, tmp_path / "q", RECIPES["default"])
    assert not (tmp_path / "q").exists()


def damage(path: Path, name: str, change) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors[name])
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_named(source, tmp_path, value):
    path = shutil.copytree(source("31B"), tmp_path / "source")
    name = "model.layers.5.mlp.down_proj.weight"
    damage(path, name, lambda t: t[7, 9].fill_(value))
    before = listing(tmp_path)
    with pytest.raises(ValueError, match=rf"model\.safetensors: '{name}'"):
        quantize_checkpoint(path, tmp_path / "a/b/q", RECIPES["default"])
    assert listing(tmp_path) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, ZeroDivisionError])
def test_whatever_happens_nothing_is_left(source, tmp_path, error):
    def interrupt(done: int, total: int) -> None:
        if done > total / 2:
            raise error

    (tmp_path / "there").mkdir()
    with pytest.raises(error):
        quantize_checkpoint(source("31B"), tmp_path / "there/a/b/q", RECIPES["default"], 50_000, interrupt)
    assert listing(tmp_path) == ["there"]


def test_nothing_is_there_before_all_is(source, tmp_path):
    seen = []
    out = tmp_path / "q"
    quantize_checkpoint(source("31B"), out, RECIPES["default"], 50_000, lambda *_: seen.append(out.exists()))
    assert not any(seen)
    assert out.exists()


def test_a_folder_that_appears_meanwhile_is_not_replaced(source, tmp_path):
    def create(*_) -> None:
        (tmp_path / "q").mkdir(exist_ok=True)
        (tmp_path / "q/mine").touch()

    with pytest.raises(FileExistsError):
        quantize_checkpoint(source("31B"), tmp_path / "q", RECIPES["default"], progress=create)
    assert listing(tmp_path) == ["q", "q/mine"]


def test_a_disk_without_room(source, tmp_path, monkeypatch):
    usage = shutil._ntuple_diskusage(10**9, 10**9, 1000)
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"q: needs .* GB, but only 0\.0 GB are free"):
        quantize_checkpoint(source("31B"), tmp_path / "q", RECIPES["default"])
    assert listing(tmp_path) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_a_disk_that_fills_up(source, tmp_path, monkeypatch):
    """/dev/full takes no byte, as a full disk would not."""
    full = Path("/dev/full").open("wb", buffering=0)  # noqa: SIM115
    monkeypatch.setattr(container, "open", lambda *_: full, raising=False)
    with pytest.raises(OSError, match="q: No space left on device; nothing was written") as caught:
        quantize_checkpoint(source("31B"), tmp_path / "q", RECIPES["default"])
    assert caught.value.errno is None or caught.value.errno == errno.ENOSPC
    assert "\n" not in str(caught.value)
    assert listing(tmp_path) == []


def test_weights_can_be_hub_links(source, tmp_path):
    """A hub cache's snapshot holds links to its blobs; the copy holds files."""
    path = tmp_path / "snapshot"
    path.mkdir()
    for file in source("31B").iterdir():
        (path / file.name).symlink_to(file)
    quantize_checkpoint(path, tmp_path / "q", RECIPES["default"])
    assert not any(file.is_symlink() for file in (tmp_path / "q").iterdir())
