"""Saving NNX models: a folder that our PyTorch model, transformers and the loader read, with the same bits."""

import dataclasses
import json

import jax
import pytest
import torch
import transformers
from flax import nnx
from safetensors.torch import load_file

from gemma4_impl import folders, names
from gemma4_impl.checkpoint import Checkpoint, CheckpointError
from gemma4_impl.model.decoder import Gemma4 as TorchGemma4
from gemma4_impl.nnx.images import ImageEncoder
from gemma4_impl.nnx.load import from_pretrained, to_torch
from gemma4_impl.nnx.save import save_pretrained
from gemma4_impl.nnx.sharding import make_mesh
from gemma4_impl.quant import container
from gemma4_impl.quant.recipe import RECIPES
from gemma4_impl.quant.save import quantize_checkpoint
from gemma4_impl.tokenizer import Tokenizer
from reference.tiny import aligned, make_tiny
from reference.tiny_gguf import make_tiny_gguf


def tensors(path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def changed(model: nnx.Module) -> nnx.Module:
    """Every parameter times 1.5, as if it had been trained."""
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(lambda x: x * 1.5, state))


def values(model: nnx.Module) -> dict[str, torch.Tensor]:
    return {names.from_nnx(path): to_torch(leaf.get_value()) for path, leaf in nnx.to_flat_state(nnx.split(model)[1])}


@pytest.mark.parametrize(
    ("variant", "dtype", "mesh"), [("E2B", "float32", None), ("26B-A4B", "bfloat16", "fsdp=2,tp=4")]
)
def test_round_trip(variant, dtype, mesh, tiny, tmp_path):
    """The source's own bytes if nothing was trained; else those of the model, for every reader."""
    mesh = mesh and make_mesh(mesh, jax.devices("cpu"))
    source = tiny(variant)
    model = from_pretrained(source, dtype, mesh=mesh)
    save_pretrained(model, tmp_path / "same", source, shard_bytes=100_000)
    assert len(list((tmp_path / "same").glob("model-*-of-*.safetensors"))) > 1
    assert same(tensors(tmp_path / "same"), {n: t.to(getattr(torch, dtype)) for n, t in tensors(source).items()})

    model = changed(model)
    out = tmp_path / "parents" / "out"
    save_pretrained(model, out, source)
    assert same(values(from_pretrained(out)), values(model))
    ours = TorchGemma4.from_pretrained(out)
    assert ours.dtype == getattr(torch, dtype)
    text = {name: tensor for name, tensor in ours.state_dict().items() if name != "lm_head.weight"}
    assert same(text, values(model))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert theirs.dtype == ours.dtype
    saved = {name.removeprefix("model."): t for name, t in theirs.state_dict().items() if name != "lm_head.weight"}
    assert same({name: saved[name] for name in text}, text)
    assert Tokenizer.from_pretrained(out).encode("hi") == Tokenizer.from_pretrained(source).encode("hi")
    kept = {file.name for file in source.iterdir()} - {"model.safetensors", "config.json"}
    assert {name for name in kept if (out / name).read_bytes() == (source / name).read_bytes()} == kept


def test_towers(tiny_images, tmp_path):
    """They are the source's, or trained ones in their place."""
    source = tiny_images("31B")
    model = from_pretrained(source)
    save_pretrained(model, tmp_path / "same", source)
    assert same(tensors(tmp_path / "same"), tensors(source))
    vision = changed(ImageEncoder.from_pretrained(source).model)
    save_pretrained(model, tmp_path / "trained", source, vision)
    before, after = tensors(source), tensors(tmp_path / "trained")
    assert before.keys() == after.keys()
    tower = {names.tower_from_hf(name) for name in before if names.from_hf(name) is None}
    assert set(values(vision)) <= tower
    for name, tensor in before.items():
        trained = names.from_hf(name) is None and names.tower_from_hf(name) in values(vision)
        assert torch.equal(after[name], tensor * 1.5 if trained else tensor)
    assert same(values(ImageEncoder.from_pretrained(tmp_path / "trained").model), values(vision))
    transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "trained")


def test_a_tower_of_another_model(tiny, tiny_images, tmp_path):
    vision = ImageEncoder.from_pretrained(tiny_images("31B")).model
    with pytest.raises(CheckpointError, match=r"holds no embed_vision\.\S+, which the vision tower has"):
        save_pretrained(from_pretrained(tiny("31B")), tmp_path / "out", tiny("31B"), vision)
    assert not any(tmp_path.iterdir())


def test_a_quantized_source(tmp_path):
    """What was loaded dequantized is saved as floats."""
    source = make_tiny("31B", tmp_path / "m", dtype="bfloat16", overrides=aligned("31B", 32))
    quantize_checkpoint(source, tmp_path / "q", RECIPES["default"])
    model = from_pretrained(tmp_path / "q", "float32")
    save_pretrained(model, tmp_path / "out", tmp_path / "q")
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    assert type(saved := Checkpoint(tmp_path / "out")).__name__ == "Checkpoint"
    assert saved.config == model.config
    assert same({name: saved.tensor(name) for name in saved.files}, values(model))


def test_bad_places(tiny, tmp_path):
    model, source = from_pretrained(tiny("31B")), tiny("31B")
    with pytest.raises(FileExistsError, match="already exists"):
        save_pretrained(model, tmp_path, source)
    with pytest.raises(ValueError, match="lies inside the checkpoint"):
        save_pretrained(model, source / "new", source)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        save_pretrained(model, tmp_path / "new", tmp_path / "none")
    with pytest.raises(CheckpointError, match="do not fit"):
        save_pretrained(model, tmp_path / "new", tiny("E2B"))
    file = make_tiny_gguf(source, tmp_path / "m.gguf", "F32")
    with pytest.raises(CheckpointError, match=r"m\.gguf: has no config\.json"):
        save_pretrained(model, tmp_path / "new", file)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_all_or_nothing(tiny, tmp_path, monkeypatch):
    model = from_pretrained(tiny("31B"))
    seen = []

    class Failing(container.StreamWriter):
        def write(self, name, piece):
            seen.append([path.name for path in (tmp_path / "parent").iterdir()])
            if len(seen) == 20:
                raise OSError(28, "No space left on device")
            super().write(name, piece)

    monkeypatch.setattr("gemma4_impl.nnx.save.StreamWriter", Failing)
    with pytest.raises(OSError, match="No space left on device; nothing was written"):
        save_pretrained(model, tmp_path / "parent/out", tiny("31B"))
    assert len(seen) == 20
    assert not any("out" in names_ for names_ in seen)
    assert not any(tmp_path.iterdir())
    usage = dataclasses.make_dataclass("Usage", ["free"])(1000)
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"needs .* GB, but only 0\.0 GB are free"):
        save_pretrained(model, tmp_path / "parent/out", tiny("31B"))
    assert not any(tmp_path.iterdir())


def test_the_model_keeps_no_copy_on_the_host(tiny, tmp_path):
    """What an array once gave to the host, it keeps: these must not."""
    model = from_pretrained(tiny("31B"), mesh=make_mesh("fsdp=8", jax.devices("cpu")))
    save_pretrained(model, tmp_path / "out", tiny("31B"))
    assert all(leaf._npy_value is None for leaf in jax.tree.leaves(nnx.state(model)))
