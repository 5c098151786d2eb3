"""Loading onto NNX models: the checkpoint's own values from every kind of file, on every mesh, in bounded memory."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from configs import HUB, hub, save
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from measured_memory import MEASURABLE, run
from safetensors.torch import load_file, save_file

from gemma4_impl import names
from gemma4_impl.checkpoint import CheckpointError, open_checkpoint
from gemma4_impl.config import TextConfig
from gemma4_impl.model.decoder import Gemma4 as TorchGemma4
from gemma4_impl.nnx import load
from gemma4_impl.nnx.decoder import Gemma4
from gemma4_impl.nnx.load import from_pretrained, from_weights, place, to_torch
from gemma4_impl.nnx.sharding import make_mesh
from gemma4_impl.quant.recipe import RECIPES
from gemma4_impl.quant.save import quantize_checkpoint
from reference.tiny import TINY, aligned, make_tiny
from reference.tiny_gguf import make_tiny_gguf

CPUS = jax.devices("cpu")


def loaded(model: nnx.Module) -> dict[str, jax.Array]:
    return {names.from_nnx(path): leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.split(model)[1])}


def check_values(model: Gemma4, path, dtype: torch.dtype) -> None:
    source, found = open_checkpoint(path), loaded(model)
    assert found.keys() == source.files.keys()
    for name, value in found.items():
        assert torch.equal(to_torch(value), source.tensor(name).to(dtype)), name


@pytest.fixture
def mesh():
    return make_mesh("fsdp=2,tp=4", CPUS)


@pytest.mark.parametrize("variant", TINY)
def test_values(variant, tiny, mesh, monkeypatch):
    """A few rows at a time, so that tensors are put together from blocks."""
    monkeypatch.setattr(load, "_BLOCK", 1000)
    for where in (None, mesh):
        model = from_pretrained(tiny(variant), mesh=where)
        check_values(model, tiny(variant), torch.float32)
        assert model.config == TextConfig.from_file(tiny(variant))
        spread = {isinstance(value.sharding, NamedSharding) for value in loaded(model).values()}
        assert spread == {where is not None}


def test_the_mesh_of_the_context(tiny, mesh):
    with jax.set_mesh(mesh):
        model = from_pretrained(tiny("E2B"))
    explicit = loaded(from_pretrained(tiny("E2B"), mesh=mesh))
    for name, value in loaded(model).items():
        assert value.sharding == explicit[name].sharding
        assert set(value.sharding.device_set) == set(CPUS)
    assert jax.sharding.get_mesh().empty


@pytest.mark.parametrize("kind", ["quantized", "gguf", "bfloat16"])
def test_other_files(kind, tmp_path, mesh, monkeypatch):
    """Dequantized, and rounded to the dtype that is asked for."""
    monkeypatch.setattr(load, "_BLOCK", 1000)
    path = make_tiny("26B-A4B", tmp_path / "m", dtype="bfloat16", overrides=aligned("26B-A4B", 32))
    if kind == "quantized":
        quantize_checkpoint(path, tmp_path / "q", RECIPES["default"])
        path = tmp_path / "q"
    elif kind == "gguf":
        path = make_tiny_gguf(path, tmp_path / "m.gguf", "Q8_0")
    for where in (None, mesh):
        model = from_pretrained(path, "float32", "bfloat16", mesh=where)
        assert model.dtype == jnp.float32
        check_values(model, path, torch.bfloat16)


def test_dtypes(tmp_path):
    path = make_tiny("31B", tmp_path / "m", dtype="bfloat16")
    for given_, computed, stored in (
        ({}, "bfloat16", "bfloat16"),
        ({"dtype": "float32"}, "float32", "float32"),
        ({"dtype": jnp.float32, "param_dtype": jnp.bfloat16}, "float32", "bfloat16"),
        ({"param_dtype": "float16"}, "bfloat16", "float16"),
    ):
        model = from_pretrained(path, **given_)
        assert model.dtype == computed
        assert {value.dtype.name for value in loaded(model).values()} == {stored}
    with jax.enable_x64(True):
        check_values(from_pretrained(path, "float64"), path, torch.float64)


def test_remat(tiny):
    assert from_pretrained(tiny("31B"), remat=True).remat
    assert not from_weights(open_checkpoint(tiny("31B"))).remat


# What does not fit, and what is not needed


def edited(folder, out, change) -> None:
    """A copy of a checkpoint folder with `change` made to its tensors."""
    out.mkdir()
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors")
    (out / "config.json").write_text((folder / "config.json").read_text())


def test_what_does_not_fit_is_listed_as_for_pytorch(tiny, tmp_path):
    def change(tensors):
        del tensors["model.layers.0.mlp.up_proj.weight"]
        tensors["model.layers.1.mlp.side_proj.weight"] = torch.ones(2)
        tensors["model.norm.weight"] = torch.ones(3)

    edited(tiny("31B"), tmp_path / "m", change)
    with pytest.raises(CheckpointError) as ours:
        from_pretrained(tmp_path / "m")
    assert "1 missing: layers.0.mlp.up_proj.weight; 1 unexpected: layers.1.mlp.side_proj.weight" in str(ours.value)
    assert "norm.weight is [3], expected [96]" in str(ours.value)
    with pytest.raises(CheckpointError) as theirs:
        TorchGemma4.from_pretrained(tmp_path / "m")
    assert str(ours.value) == str(theirs.value)
    assert "\n" not in str(ours.value)


def test_leftovers_of_shared_layers_and_a_tied_head(tiny, tmp_path):
    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.8.self_attn.k_proj.weight"] = torch.ones(2, 2)
        tensors["model.layers.7.self_attn.v_proj.weight"] = torch.ones(5)

    edited(tiny("E2B"), tmp_path / "m", change)
    expected = loaded(from_pretrained(tiny("E2B")))
    found = loaded(from_pretrained(tmp_path / "m"))
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in found)
    edited(tmp_path / "m", tmp_path / "other", lambda tensors: tensors["lm_head.weight"].mul_(2))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from embed_tokens\.weight"):
        from_pretrained(tmp_path / "other")


def test_an_untied_head(tmp_path):
    path = make_tiny("31B", tmp_path / "m", overrides={"tie_word_embeddings": False})
    check_values(from_pretrained(path), path, torch.float32)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(CheckpointError, match="tie_word_embeddings is true"):
        from_pretrained(path)


def test_no_such_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        from_pretrained(tmp_path / "none")


def test_progress_is_silent_unless_asked_for_at_a_terminal(tiny, capsys):
    from_pretrained(tiny("31B"), progress=True)
    from_pretrained(tiny("31B"))
    assert capsys.readouterr() == ("", "")


# Shards


@given(
    st.lists(st.sampled_from([1, 2, 3, 4, 8, 12]), min_size=0, max_size=3),
    st.permutations(["fsdp", "tp", None]),
    st.sampled_from(["fsdp=8,tp=1", "fsdp=4,tp=2", "fsdp=2,tp=4", "fsdp=1,tp=8"]),
    st.sampled_from(["float32", "bfloat16"]),
    st.integers(1, 40),
)
def test_place(shape, axes, mesh, dtype, block):
    """Any shape over any mesh: every row is asked for once for each cut of the rows, in blocks of bounded size."""
    mesh, shape = make_mesh(mesh, CPUS), tuple(shape)
    spec = tuple(a if a and n % mesh.shape[a] == 0 else None for n, a in zip(shape, axes[: len(shape)], strict=True))
    leaf = nnx.Param(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)), out_sharding=spec, eager_sharding=False)
    tensor = torch.randn(shape)
    stored = tensor if shape else tensor[None]
    asked = []

    def rows(start: int, stop: int) -> torch.Tensor:
        asked.extend(range(start, stop))
        assert (stop - start) * max(1, stored[0].numel()) <= block or stop - start == 1
        return stored[start:stop]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "_BLOCK", block)
        for where in (mesh, None):
            asked.clear()
            value = place(leaf, rows, where)
            assert sorted(asked) == list(range(len(stored)))
            assert torch.equal(to_torch(value), tensor.to(getattr(torch, dtype)))
            assert where is None or value.sharding == NamedSharding(mesh, PartitionSpec(*spec))


def test_values_are_copies(tmp_path):
    """Nothing that the file's owner does afterwards changes the model."""
    leaf = nnx.Param(jax.ShapeDtypeStruct((4, 64), jnp.dtype("float32")))
    tensor = torch.zeros(4, 64)
    value = place(leaf, lambda start, stop: tensor[start:stop], None)
    tensor.fill_(1)
    assert not np.asarray(value).any()


# Random weights


def test_random_weights_are_made_on_their_shards(mesh):
    sizes = TINY["31B"] | {"num_hidden_layers": 2, "layer_types": TINY["31B"]["layer_types"][2:4]}
    config = TextConfig.from_dict(sizes | {"model_type": "gemma4_text"})
    plain = loaded(Gemma4(config, rngs=nnx.Rngs(0)))
    with jax.set_mesh(mesh):
        spread = Gemma4(config, rngs=nnx.Rngs(0))
        state = nnx.split(spread)[1]
        wanted = dict(nnx.to_flat_state(nnx.get_named_sharding(state, mesh)))
    for path, leaf in nnx.to_flat_state(state):
        value = leaf.get_value()
        assert value.sharding.is_equivalent_to(wanted[path].get_value(), value.ndim), path
        assert (np.asarray(value) == np.asarray(plain[names.from_nnx(path)])).all()


# Memory

MEASURE = """
import gc, sys, jax, torch
from flax import nnx
from gemma4_impl.nnx.load import from_pretrained
from gemma4_impl.nnx.sharding import make_mesh
from measured_memory import watched

torch.set_num_threads(1)
from_pretrained(sys.argv[1])  # what is imported and allocated on first use is not the loader's
for dtype, mesh in (("bfloat16", None), ("float32", None), ("float32", make_mesh("fsdp=2,tp=4"))):
    gc.collect()
    with watched() as memory:
        model = from_pretrained(sys.argv[1], dtype, mesh=mesh)
    arrays = jax.tree.leaves(nnx.state(model))
    shards = {s.data.unsafe_buffer_pointer(): s.data.nbytes for a in arrays for s in a.addressable_shards}
    mapped = sys.argv[1] in open("/proc/self/maps").read()
    print(sum(shards.values()) / 2**20, max(a.nbytes for a in arrays) / 2**20, memory.peak, int(mapped))
    del model, arrays, shards
"""


@pytest.mark.skipif(not MEASURABLE, reason="needs Linux's /proc")
def test_peak_memory(tmp_path):
    """RssAnon, the memory that a process owns, sampled every half millisecond while a 100 MB bfloat16 file is loaded.

    The shards on CPU devices are the memory that they were read to, so the peak is the model and a block of 4M weights
    in float32. The largest tensor has 64 MB in float32: a copy of it would show. The file is no longer mapped."""
    changes = {"vocab_size": 16384, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 3}
    changes |= {"layer_types": [*HUB["layer_types"][:1] * 2, "full_attention"], "num_kv_shared_layers": 0}
    changes |= {"enable_moe_block": False, "hidden_size_per_layer_input": 0, "head_dim": 128, "global_head_dim": 256}
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in TorchGemma4(TextConfig.from_dict(hub(**changes))).state_dict().items()}
    del shapes["lm_head.weight"]
    tensors = {names.to_hf(name): torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    folder = save(tmp_path / "m", tensors, **changes)
    del tensors
    # With a fixed threshold, memory that is freed leaves the process at once.
    environment = {"JAX_PLATFORMS": "cpu", "MALLOC_MMAP_THRESHOLD_": "65536"}
    lines = run(MEASURE, str(folder), **environment).splitlines()
    (folder / "model.safetensors").unlink()
    assert len(lines) == 3
    for line, expected in zip(lines, (32, 64, 64), strict=True):
        size, largest, peak, mapped = map(float, line.split())
        assert largest == expected
        assert size > 3 * largest
        assert size - 1 <= peak <= size + 16 + 4, line
        assert not mapped
