"""`QuantizedCheckpoint`: what torchao stores, by whomever written, read without torchao; and hostile metadata."""

import copy
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torchao.quantization import (
    Float8WeightOnlyConfig,
    FqnToConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    IntxUnpackedToInt8Tensor,
    IntxWeightOnlyConfig,
    MappingType,
    PerAxis,
    PerGroup,
)
from transformers import AutoModelForCausalLM, TorchAoConfig
from transformers.utils import logging

from gemma4_impl.checkpoint import Checkpoint, CheckpointError, check_fits, open_checkpoint
from gemma4_impl.config import TextConfig
from gemma4_impl.model.decoder import Gemma4
from gemma4_impl.quant.checkpoint import QuantizedCheckpoint
from gemma4_impl.quant.convert import from_torchao
from gemma4_impl.quant.quantize import quantize
from gemma4_impl.quant.recipe import RECIPES, QuantConfig
from gemma4_impl.quant.save import quantize_checkpoint
from gemma4_impl.quant.stored import INTX, KINDS, Stored, join, split
from gemma4_impl.quant.tensor import QuantizedTensor
from reference.tiny import aligned, make_tiny

LINEAR = "model.layers.0.self_attn.q_proj"
NAME = LINEAR + ".weight"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    made = {}

    def make(variant: str) -> Path:
        if variant not in made:
            made[variant] = make_tiny(
                variant, tmp_path_factory.mktemp("tiny") / variant, overrides=aligned(variant, 32)
            )
        return made[variant]

    return make


@pytest.fixture(scope="module")
def quantized(plain, tmp_path_factory):
    """The `sensitive` checkpoint of a variant: both classes, with and without zeros."""
    made = {}

    def make(variant: str) -> Path:
        if variant not in made:
            made[variant] = tmp_path_factory.mktemp("quantized") / variant
            quantize_checkpoint(plain(variant), made[variant], RECIPES["sensitive"], shard_bytes=300_000)
        return made[variant]

    return make


@pytest.fixture
def folder(quantized, tmp_path) -> Path:
    """One that a test may damage, in one file."""
    out = tmp_path / "q"
    out.mkdir()
    tensors, metadata = {}, {}
    for file in quantized("31B").glob("*.safetensors"):
        with safe_open(file, "pt") as handle:
            metadata = handle.metadata()
        tensors |= load_file(file)
    save_file(tensors, out / "model.safetensors", metadata)
    shutil.copy(quantized("31B") / "config.json", out)
    return out


def rewrite(folder: Path, change) -> None:
    """`change(tensors, metadata)` edits them in place."""
    file = folder / "model.safetensors"
    with safe_open(file, "pt") as handle:
        metadata = handle.metadata()
    tensors = load_file(file)
    change(tensors, metadata)
    save_file(tensors, file, metadata)


def edited(metadata: dict[str, str], name: str, change) -> None:
    entry = json.loads(metadata[name])
    change(entry)
    metadata[name] = json.dumps(entry)


def refused(folder: Path, *parts: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        QuantizedCheckpoint(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000
    for part in (str(folder), *parts):
        assert part in message


@pytest.mark.parametrize("variant", ["E2B", "26B-A4B", "31B"])
def test_weights_protocol(plain, quantized, variant):
    checkpoint = open_checkpoint(quantized(variant))
    assert isinstance(checkpoint, QuantizedCheckpoint)
    with torch.device("meta"):
        model = Gemma4(checkpoint.config)
    assert set(check_fits(model, checkpoint)) == set(checkpoint.files) == set(model.state_dict())
    assert {file.parent for file in checkpoint.files.values()} == {quantized(variant)}
    assert checkpoint.dtype == torch.float32
    count = 0
    for name, tensor in model.state_dict().items():
        assert checkpoint.shape(name) == tuple(tensor.shape)
        dense = checkpoint.tensor(name)
        assert (dense.shape, dense.dtype) == (tensor.shape, torch.float32)
        weight = checkpoint.quantized(name)
        if weight is not None:
            count += 1
            assert torch.equal(dense, weight.dequantize())
        for start, stop in [(0, 1), (1, 3), (0, len(dense)), (len(dense) - 1, len(dense)), (1, 1)]:
            assert torch.equal(checkpoint.rows(name, start, stop), dense[start:stop]), (name, start, stop)
    assert count > 40


def test_reads_without_torchao(quantized, tmp_path):
    """In a process in which importing torchao fails."""
    code = """
import sys
sys.modules["torchao"] = sys.modules["transformers"] = None
from gemma4_impl.checkpoint import open_checkpoint
checkpoint = open_checkpoint(sys.argv[1])
print(sum(float(checkpoint.tensor(name).double().sum()) for name in checkpoint.files))
"""
    command = [sys.executable, "-c", code, str(quantized("E2B"))]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    checkpoint = open_checkpoint(quantized("E2B"))
    assert float(done.stdout) == sum(float(checkpoint.tensor(name).double().sum()) for name in checkpoint.files)


def test_a_plain_checkpoint_is_not_what_it_is(quantized, tmp_path):
    with pytest.raises(CheckpointError, match="its weights are quantized"):
        Checkpoint(quantized("31B"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_is_that_of_the_embeddings_scales(tmp_path, dtype):
    source = make_tiny("31B", tmp_path / "s", dtype=dtype, overrides=aligned("31B", 32))
    quantize_checkpoint(source, tmp_path / "q", RECIPES["default"])
    checkpoint = QuantizedCheckpoint(tmp_path / "q")
    assert checkpoint.dtype == getattr(torch, dtype)
    assert checkpoint.quantized("layers.0.mlp.up_proj.weight").scale.dtype == getattr(torch, dtype)


def test_fingerprint(folder, quantized):
    before = QuantizedCheckpoint(folder).fingerprint()
    assert before == QuantizedCheckpoint(quantized("31B")).fingerprint()  # whatever the sharding
    rewrite(folder, lambda tensors, _: tensors[LINEAR + "._weight_scale"][0, 0].mul_(2))
    after = QuantizedCheckpoint(folder).fingerprint()
    assert after != before

    def group(tensors, metadata) -> None:
        scale = tensors[LINEAR + "._weight_scale"].repeat_interleave(2, 0)
        tensors[LINEAR + "._weight_scale"] = scale
        tensors[LINEAR + "._weight_zero_point"] = torch.zeros_like(scale)
        edited(metadata, NAME, lambda entry: entry["_data"].update(block_size=[1, 16]))

    rewrite(folder, group)
    assert QuantizedCheckpoint(folder).fingerprint() not in (before, after)


@st.composite
def any_quantized(draw: st.DrawFn) -> QuantizedTensor:
    """Any codes and scales that `quantize` could give."""
    bits = draw(st.sampled_from([4, 8]))
    group = 2 * draw(st.integers(1, 6))
    shape = (*draw(st.sampled_from([(), (1,), (3,)])), draw(st.integers(1, 5)), group * draw(st.integers(1, 4)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    if bits == 4:
        qdata = torch.randint(0, 256, (*shape[:-1], shape[-1] // 2), dtype=torch.uint8, generator=generator)
    else:
        qdata = torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    scale = torch.randn(*shape[:-1], shape[-1] // group, generator=generator).to(dtype)
    zero = torch.randn(scale.shape, generator=generator).to(dtype) if bits == 4 and draw(st.booleans()) else None
    return QuantizedTensor(qdata, scale, zero, bits, 8 if bits == 4 else 0)


@settings(max_examples=150, deadline=None)
@given(any_quantized())
def test_split_and_join_are_inverses(q):
    stored = Stored(KINDS[q.bits], tuple(q.shape), q.group_size, q.bits)
    parts = split(q)
    if q.bits == 4:
        parts |= {name: parts[name].mT.contiguous() for name in ("scale", "zero_point")}
    assert {name: (t.dtype, tuple(t.shape)) for name, t in parts.items()} == stored.parts(q.scale.dtype)
    back = join(stored, parts)
    assert (back.bits, back.offset) == (q.bits, q.offset)
    for name in ("qdata", "scale", "zero"):
        ours, theirs = getattr(back, name), getattr(q, name)
        assert (ours is None) == (theirs is None), name
        assert ours is None or (ours.dtype == theirs.dtype and torch.equal(ours, theirs)), name


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_zero_points_that_are_subtracted(data):
    """w = (q - zero_point) * scale with an int8 or a float zero point, in float64; int4 codes are packed."""
    bits, target = data.draw(st.sampled_from([(4, "int4"), (4, "int2"), (8, "int8"), (8, "int6")]))
    low, high = {"int4": (-8, 8), "int2": (-2, 2), "int8": (-128, 128), "int6": (-32, 32)}[target]
    group, rows, groups = 2 * data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    scale = torch.randn(rows, groups, generator=generator).to(dtype)
    qdata = torch.randint(low, high, (rows, group * groups), dtype=torch.int8, generator=generator)
    kind = data.draw(st.sampled_from(["zero", "same", "differ", "float"]))
    zero = torch.randint(low, high, scale.shape, dtype=torch.int8, generator=generator)
    if kind in ("zero", "same"):
        zero = torch.full_like(zero, 0 if kind == "zero" else int(zero[0, 0]))
    elif kind == "float":
        zero = (zero + torch.rand(scale.shape, generator=generator)).to(dtype)
    stored = Stored(INTX, tuple(qdata.shape), group, bits)
    q = join(stored, {"qdata": qdata, "scale": scale, "zero_point": zero})
    assert q.bits == bits
    assert (q.zero is None) == (not zero.is_floating_point() and not (zero != zero[0, 0]).any())
    expected = qdata.double().unflatten(-1, (-1, group)) - zero.double()[..., None]
    expected = (expected * scale.double()[..., None]).flatten(-2)
    exact = q.zero is None or (dtype == torch.bfloat16 and kind == "differ")
    # Else zero_point * scale, q * scale and their sum are rounded to float32: half a unit of the largest, each.
    largest = 2 * max(abs(low), float(zero.abs().max()) + 1) * scale.double().abs().max()
    allowed = 2**-24 * expected.abs() if exact else 3 * 2**-24 * largest
    assert bool(((q.dequantize().double() - expected).abs() <= allowed).all())


def test_codes_that_the_dtype_does_not_have(folder):
    name = "model.embed_tokens.weight"
    rewrite(folder, lambda _, m: edited(m, name, lambda e: e["_data"]["target_dtype"].update(_data="int4")))
    checkpoint = QuantizedCheckpoint(folder)
    with pytest.raises(CheckpointError, match=r"'model\.embed_tokens\.weight': codes outside of -8\.\.7"):
        checkpoint.tensor("embed_tokens.weight")


AFFINE = {"mapping_type": MappingType.ASYMMETRIC}
INT4 = torch.int4


@pytest.mark.parametrize(
    ("variant", "config"),
    [
        ("31B", IntxWeightOnlyConfig(torch.int8, PerAxis(0))),
        ("31B", IntxWeightOnlyConfig(torch.int8, PerGroup(32), **AFFINE)),
        ("E2B", IntxWeightOnlyConfig(INT4, PerGroup(32))),
        ("31B", IntxWeightOnlyConfig(INT4, PerGroup(16), **AFFINE)),
        ("26B-A4B", IntxWeightOnlyConfig(torch.int3, PerAxis(0))),
        (
            "E2B",
            FqnToConfig({r"re:.*self_attn\..*_proj": IntxWeightOnlyConfig(INT4, PerGroup(32)), r"re:.*mlp.*": None}),
        ),
    ],
)
def test_reads_what_transformers_wrote(plain, tmp_path, variant, config):
    """Dequantized weights equal torchao's: bit for bit if zero points are 0, else up to float32's rounding."""
    model = load(plain(variant), quantization_config=TorchAoConfig(config))
    model.save_pretrained(tmp_path / "q")
    checkpoint = open_checkpoint(tmp_path / "q")
    with torch.device("meta"):
        check_fits(Gemma4(checkpoint.config), checkpoint)
    count = 0
    for name, tensor in model.named_parameters():
        ours = name.removeprefix("model.")
        if isinstance(tensor.data, IntxUnpackedToInt8Tensor):
            count += 1
            weight, expected = checkpoint.quantized(ours), tensor.dequantize()
            assert weight.bits == (8 if tensor.target_dtype == torch.int8 else 4)
            if tensor.target_dtype in (torch.int4, torch.int8):
                assert torch.equal(weight.dequantize(), from_torchao(tensor).dequantize())
            if tensor.zero_point.any():
                largest = tensor.scale.abs().max() * 2**8
                assert (weight.dequantize() - expected).abs().max() <= 3 * 2**-24 * largest
            else:
                assert torch.equal(weight.dequantize(), expected)
        else:
            assert checkpoint.quantized(ours) is None
            assert torch.equal(checkpoint.tensor(ours), tensor)
    assert count >= 30


def load(path: Path, **kwargs):
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        return AutoModelForCausalLM.from_pretrained(path, **kwargs)
    finally:
        logging.set_verbosity(verbosity)


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (Int8WeightOnlyConfig(), "Int8Tensor"),
        (Float8WeightOnlyConfig(), "Float8Tensor"),
        (Int8DynamicActivationIntxWeightConfig(INT4, PerGroup(32)), "activation_quantization"),
    ],
)
def test_other_classes_are_refused_by_name(plain, tmp_path, config, what):
    load(plain("31B"), quantization_config=TorchAoConfig(config)).save_pretrained(tmp_path / "q")
    refused(tmp_path / "q", what, "not supported" if "act" in what else "only Int4Tensor and IntxUnpackedToInt8Tensor")


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors", "fp8", None, 4, ["x" * 10**6]])
@pytest.mark.parametrize("where", ["top", "text_config"])
def test_other_tools_are_refused_by_name(plain, tmp_path, method, where):
    folder = shutil.copytree(plain("31B"), tmp_path / "q")
    raw = json.loads((folder / "config.json").read_text())
    quantization = {"quantization_config": {"quant_method": method, "bits": 4}}
    raw = raw | quantization if where == "top" else {"model_type": "gemma4", "text_config": raw | quantization}
    (folder / "config.json").write_text(json.dumps(raw))
    for read in (QuantizedCheckpoint, open_checkpoint, Gemma4.from_pretrained):
        with pytest.raises(CheckpointError) as caught:
            read(folder)
        message = str(caught.value)
        assert str(folder) in message
        assert "quant_method" in message
        assert "gemma4 quantize" in message
        assert len(message) < 1000
        if isinstance(method, str):
            assert method in message
    with pytest.raises(CheckpointError, match="quantized"):
        Checkpoint(folder)


@pytest.mark.parametrize("quantization", ["torchao", 4, [], {}, {"quant_type": "torchao"}])
def test_malformed_quantization_config(plain, tmp_path, quantization):
    folder = shutil.copytree(plain("31B"), tmp_path / "q")
    raw = json.loads((folder / "config.json").read_text()) | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="quant_method"):
        open_checkpoint(folder)


def test_the_config_alone_may_be_read(quantized):
    assert TextConfig.from_file(quantized("31B")).hidden_size == 96


def test_plain_weights_said_to_be_torchaos(plain, quantized, tmp_path):
    folder = shutil.copytree(plain("31B"), tmp_path / "q")
    shutil.copy(quantized("31B") / "config.json", folder)
    refused(folder, "no safetensors file names a quantized tensor")


DEEP = "[" * 100_000
QDATA, SCALE = LINEAR + "._weight_qdata", LINEAR + "._weight_scale"


def put(key: str, value):
    return lambda tensors, metadata: edited(metadata, NAME, lambda entry: entry["_data"].update({key: value}))


def top(key: str, value):
    return lambda tensors, metadata: edited(metadata, NAME, lambda entry: entry.update({key: value}))


def text(value: str):
    return lambda tensors, metadata: metadata.update({NAME: value})


def listed(value: str):
    return lambda tensors, metadata: metadata.update(tensor_names=value)


def tensor(name: str, value: torch.Tensor | None):
    return lambda tensors, metadata: tensors.pop(name) if value is None else tensors.update({name: value})


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (text("{"), NAME),
        (text(DEEP), NAME),
        (text("[]"), "names no tensor class"),
        (text("null"), "names no tensor class"),
        (text('{"_type": 4}'), "names no tensor class"),
        (text('{"_type": "Int4Tensor"}'), "its metadata is no Int4Tensor"),
        (top("_type", "Int4TilePackedTo4dTensor"), "Int4TilePackedTo4dTensor"),
        (top("_type", "x" * 10**6), "only Int4Tensor"),
        (top("_type", "IntxUnpackedToInt8Tensor"), "target_dtype"),
        (top("_data", [1]), "its metadata is no Int4Tensor"),
        (top("_tensor_data_names", ["qdata", "scale"]), "its parts are"),
        (top("_tensor_data_names", ["qdata", "scale", "zero_point", "act_pre_scale"]), "act_pre_scale"),
        (top("_tensor_data_names", [["qdata"], {}, 4]), "its parts are"),
        (put("block_size", None), "block_size"),
        (put("block_size", []), "block_size"),
        (put("block_size", [1]), "block_size"),
        (put("block_size", [1, 0]), "block_size"),
        (put("block_size", [1, -32]), "block_size"),
        (put("block_size", [1, 2**80]), "block_size"),
        (put("block_size", [1, 33]), "block_size"),
        (put("block_size", [1, 16]), "its scale is F32 [3, 64]; expected F32 or BF16 or F16 [6, 64]"),
        (put("block_size", [2, 32]), "block_size"),
        (put("block_size", [True, 32]), "block_size"),
        (put("block_size", [1.0, 32.0]), "block_size"),
        (put("block_size", ["1", "32"]), "block_size"),
        (put("shape", [64, 2**62]), "its shape is"),
        (put("shape", [96, 64]), "its shape is"),
        (put("shape", 4), "its shape is"),
        (put("activation_dtype", {"_type": "torch.dtype", "_data": "float8_e4m3fn"}), "activation_dtype"),
        (listed("{"), "its metadata is not torchao's"),
        (listed(DEEP), "its metadata is not torchao's"),
        (listed("4"), "its metadata is not torchao's"),
        (listed('["model.absent"]'), "its metadata is not torchao's"),
        (listed("[[]]"), "its metadata is not torchao's"),
        (listed("[]"), "no safetensors file names a quantized tensor"),
        (tensor(QDATA, None), "its qdata is in no file"),
        (tensor(SCALE, None), "its scale is in no file"),
        (tensor(QDATA, torch.zeros(64, 47, dtype=torch.int8)), "its shape is"),
        (tensor(QDATA, torch.zeros(64, 48)), "its qdata is F32"),
        (tensor(QDATA, torch.zeros(0, 48, dtype=torch.int8)), "its shape is"),
        (tensor(QDATA, torch.tensor(4, dtype=torch.int8)), "its shape is"),
        (tensor(SCALE, torch.ones(64, 3)), "its scale is F32 [64, 3]"),
        (tensor(SCALE, torch.ones(3, 64, dtype=torch.int8)), "its scale is I8"),
        (tensor(SCALE, torch.ones(3, 64, dtype=torch.float64)), "its scale is F64"),
        (tensor(SCALE, torch.ones(3, 64, dtype=torch.bfloat16)), "its zero_point is F32"),
        (tensor(NAME, torch.ones(64, 96)), "it is there twice"),
    ],
)
def test_hostile_metadata(folder, change, part):
    rewrite(folder, change)
    refused(folder, part)


def test_metadata_that_files_disagree_on(quantized, tmp_path):
    folder = shutil.copytree(quantized("31B"), tmp_path / "q")
    file = sorted(folder.glob("*.safetensors"))[-1]
    with safe_open(file, "pt") as handle:
        metadata = handle.metadata()
    edited(metadata, NAME, lambda entry: entry["_data"].update(block_size=[1, 16]))
    save_file(load_file(file), file, metadata)
    refused(folder, file.name, "differs from another file's")


def test_leftover_parts_fit_no_model(folder):
    """Parts that no metadata describes are tensors that the model does not have."""

    def change(tensors, metadata) -> None:
        metadata["tensor_names"] = json.dumps([n for n in json.loads(metadata["tensor_names"]) if n != NAME])

    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=r"1 missing: layers\.0\.self_attn\.q_proj\.weight; 3 unexpected"):
        Gemma4.from_pretrained(folder)


WORDS = [
    None,
    True,
    0,
    -1,
    1,
    2,
    3,
    16,
    2**63,
    2**200,
    1e999,
    "",
    "int4",
    "Tensor",
    [],
    [1],
    [1, 32],
    {},
    {"_data": "int4"},
]


def test_damaged_metadata_is_read_or_refused(folder):
    """Two hundred random edits of the JSON: at once, in one line, and without traceback."""
    rng = random.Random(0)
    file = folder / "model.safetensors"
    with safe_open(file, "pt") as handle:
        original = handle.metadata()
    tensors = load_file(file)
    # A small file: what is read is the metadata.
    kept = {name: t for name, t in tensors.items() if ".layers.0." in name or "embed_tokens" in name}
    names = sorted(name for name in original if ".layers.0." in name or "embed_tokens" in name)
    messages, read = [], 0
    for _ in range(200):
        metadata = {name: original[name] for name in names} | {"tensor_names": json.dumps(names)}
        for name in rng.sample(names, rng.randint(1, 3)):
            entry = json.loads(metadata[name])
            at = entry
            while True:
                key = rng.choice(list(at) if isinstance(at, dict) else range(len(at)))
                if not isinstance(at[key], dict | list) or not at[key] or rng.random() < 0.3:
                    break
                at = at[key]
            at[key] = copy.deepcopy(rng.choice(WORDS))
            metadata[name] = json.dumps(entry) if rng.random() < 0.9 else json.dumps(entry)[: rng.randrange(60)]
        save_file(kept, file, metadata)
        start = time.perf_counter()
        try:
            checkpoint = QuantizedCheckpoint(folder)
            for name in checkpoint.files:
                checkpoint.tensor(name)
            read += 1
        except CheckpointError as error:
            messages.append(str(error))
        assert time.perf_counter() - start < 2
    assert read > 0
    assert read + len(messages) == 200
    assert all("\n" not in message and len(message) < 1000 for message in messages)


def test_int8_quantized_per_group_of_experts(tmp_path):
    """3-D int8 weights, whose scales lie as the weights do."""
    weight = torch.randn(4, 6, 32, generator=torch.Generator().manual_seed(0))
    q = quantize(weight, QuantConfig(8, 8))
    stored = Stored(INTX, (4, 6, 32), 8, 8)
    metadata = {"model.layers.0.experts.down_proj": stored.metadata(torch.float32)}
    metadata["tensor_names"] = json.dumps(list(metadata))
    prefix = "model.layers.0.experts._down_proj_"
    save_file({prefix + part: t.contiguous() for part, t in split(q).items()}, tmp_path / "model.safetensors", metadata)
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "torchao"}}')
    checkpoint = QuantizedCheckpoint(tmp_path)
    name = "layers.0.experts.down_proj"
    assert checkpoint.shape(name) == (4, 6, 32)
    assert torch.equal(checkpoint.tensor(name), q.dequantize())
    assert torch.equal(checkpoint.rows(name, 1, 3), q.dequantize()[1:3])
    assert checkpoint.dtype == torch.float32
