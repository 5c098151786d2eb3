"""GGUF files as weights: the converted checkpoint's own, gguf-py's values for every type, and refusals by name."""

import dataclasses
import re
import time
from pathlib import Path

import gguf
import pytest
import torch
from gguf.quants import dequantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from measured_memory import MEASURABLE, run
from raw_gguf import shapes_of, tensor, write_config, write_hollow

from gemma4_impl.checkpoint import CheckpointError, Weights, check_fits, open_checkpoint
from gemma4_impl.config import FULL, SLIDING, VARIANTS, TextConfig
from gemma4_impl.gguf.checkpoint import GGUFCheckpoint
from gemma4_impl.gguf.config import metadata_from_config, rope_freqs
from gemma4_impl.gguf.reader import GGUFFile
from gemma4_impl.model.decoder import Gemma4
from gemma4_impl.names import GGUF_ROPE_FREQS, from_gguf, to_gguf
from reference.tiny import TINY, aligned, make_tiny
from reference.tiny_gguf import DRAWN, TYPES, make_tiny_gguf


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """variant -> a tiny checkpoint folder whose rows are multiples of 256."""
    made: dict[str, Path] = {}

    def make(variant: str) -> Path:
        if variant not in made:
            made[variant] = make_tiny(variant, tmp_path_factory.mktemp(variant) / "m", overrides=aligned(variant, 256))
        return made[variant]

    return make


@pytest.fixture(scope="module")
def mixed(wide, tmp_path_factory) -> Path:
    """E2B in a file that holds every type."""
    places = [f"blk.{i}.{leaf}.weight" for leaf in ("ffn_up", "attn_output") for i in range(9)]
    types = dict(zip(places, TYPES, strict=False))
    return make_tiny_gguf(wide("E2B"), tmp_path_factory.mktemp("mixed") / "x.gguf", types)


def same(a: Gemma4, b: Gemma4) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


TOKENS = torch.tensor([[2, 300, 41, 107, 7, 12, 480, 9, 33, 250, 251, 8]])


# The same model


@pytest.mark.parametrize("variant", TINY)
def test_float32_files_are_the_checkpoint(variant, wide, tmp_path):
    want = Gemma4.from_pretrained(wide(variant))
    model = Gemma4.from_pretrained(make_tiny_gguf(wide(variant), tmp_path / "x.gguf"))
    assert model.config == want.config
    assert same(model, want)
    # Not bit for bit: how a product is summed depends on where its weights lie in memory.
    logits = want.double()(TOKENS)
    assert (model.double()(TOKENS) - logits).norm() / logits.norm() < 1e-13


@pytest.mark.parametrize("variant", ["26B-A4B", "31B"])
@pytest.mark.parametrize("form", [{"separate_experts": True}, {"join_qkv": True}, {"max_tensors": 30}])
def test_other_forms_are_the_checkpoint(variant, form, wide, tmp_path):
    """Experts in two tensors, q, k and v in one, many files: what a converter or a splitter may make of it."""
    file = make_tiny_gguf(wide(variant), tmp_path / "x.gguf", **form)
    assert same(Gemma4.from_pretrained(file), Gemma4.from_pretrained(wide(variant)))


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_half_files_are_the_checkpoint_rounded(kind, wide, tmp_path):
    checkpoint = GGUFCheckpoint(make_tiny_gguf(wide("26B-A4B"), tmp_path / "x.gguf", kind))
    half = {"F16": torch.float16, "BF16": torch.bfloat16}[kind]
    want = Gemma4.from_pretrained(wide("26B-A4B")).state_dict()
    dtypes = set()
    for name in checkpoint.files:
        found = checkpoint.tensor(name)
        dtypes.add(found.dtype)
        assert torch.equal(found, want[name].to(found.dtype))
        assert found.dtype == (torch.float32 if found.dim() == 1 or "router" in name else half)
        assert checkpoint.quantized(name) is None
    assert dtypes == {torch.float32, half}


def test_a_head_of_its_own(tmp_path):
    folder = make_tiny("31B", tmp_path / "m", overrides={**aligned("31B", 256), "tie_word_embeddings": False})
    model, want = Gemma4.from_pretrained(make_tiny_gguf(folder, tmp_path / "x.gguf")), Gemma4.from_pretrained(folder)
    assert same(model, want)
    assert not torch.equal(model.lm_head.weight, model.embed_tokens.weight)


# Values


@pytest.mark.parametrize("variant", TINY)
@pytest.mark.parametrize("types", ["Q4_K_M", "Q8_0"])
def test_values_are_gguf_pys(variant, types, wide, tmp_path):
    check_values(make_tiny_gguf(wide(variant), tmp_path / "x.gguf", types))


def test_values_of_every_type(mixed):
    stored = check_values(mixed)
    assert stored == set(TYPES)


def check_values(file: Path) -> set[str]:
    """Compares every tensor with gguf-py's bit for bit and returns the types met."""
    checkpoint, reader, kinds = GGUFCheckpoint(file), gguf.GGUFReader(file), set()
    assert len(checkpoint.files) == len(reader.tensors) - 1
    for theirs in reader.tensors:
        if theirs.name == GGUF_ROPE_FREQS:
            continue
        name = from_gguf(theirs.name)
        want = torch.from_numpy(dequantize(theirs.data, theirs.tensor_type).copy())
        found = checkpoint.tensor(name)
        assert found.shape == checkpoint.shape(name) == want.shape
        assert torch.equal(found.float(), want), name
        assert found.float().isfinite().all()
        assert checkpoint.files[name] == file
        assert [info.name for info in checkpoint.stored(name)] == [theirs.name]
        packed = checkpoint.quantized(name)
        assert (packed is not None) == (theirs.tensor_type.name not in ("F32", "F16", "BF16"))
        assert packed is None or packed.shape == want.shape
        kinds.add(theirs.tensor_type.name)
    return kinds


@pytest.mark.parametrize("kind", DRAWN)
def test_drawn_weights_are_new_and_of_the_same_size(kind, wide, tmp_path):
    name = "layers.0.mlp.up_proj.weight"
    want = Gemma4.from_pretrained(wide("31B")).state_dict()[name]
    found = [
        GGUFCheckpoint(make_tiny_gguf(wide("31B"), tmp_path / f"{i}.gguf", {to_gguf(name): kind}, seed=seed))
        for i, seed in enumerate((0, 0, 1))
    ]
    assert found[0].stored(name)[0].type.name == kind
    a, b, c = (checkpoint.tensor(name) for checkpoint in found)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    # Of 65,536 draws the spread is known to a hundredth; the blocks' scales vary by half, which adds a twentieth.
    assert a.std() / want.std() == pytest.approx(1, abs=0.1)
    assert abs(a.mean()) < 0.1 * want.std()


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_rows_are_rows_of_the_tensor(mixed, data):
    checkpoint = GGUFCheckpoint(mixed)
    name = data.draw(st.sampled_from(sorted(checkpoint.files)))
    count = checkpoint.shape(name)[0]
    start, stop = sorted((data.draw(st.integers(0, count)), data.draw(st.integers(0, count))))
    assert torch.equal(checkpoint.rows(name, start, stop), checkpoint.tensor(name)[start:stop])


@pytest.mark.parametrize("form", [{"separate_experts": True}, {"join_qkv": True}])
def test_rows_of_parts(form, wide, tmp_path):
    checkpoint = GGUFCheckpoint(make_tiny_gguf(wide("26B-A4B"), tmp_path / "x.gguf", "Q8_0", **form))
    parts = ("experts.gate_up_proj", "self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")
    for name in (f"layers.1.{part}" for part in parts):
        whole = checkpoint.tensor(name)
        assert whole.shape == checkpoint.shape(name)
        for start, stop in ((0, 1), (3, 8), (5, 5), (0, len(whole))):
            assert torch.equal(checkpoint.rows(name, start, stop), whole[start:stop])


# Parts of one


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_separate_experts_are_the_joined_ones(kind, wide, tmp_path):
    """The gate comes first, also where the file has it last."""
    one = GGUFCheckpoint(make_tiny_gguf(wide("26B-A4B"), tmp_path / "1.gguf", kind))
    two = GGUFCheckpoint(make_tiny_gguf(wide("26B-A4B"), tmp_path / "2.gguf", kind, separate_experts=True))
    for layer in range(one.config.num_hidden_layers):
        name = f"layers.{layer}.experts.gate_up_proj"
        assert two.stored(name)[0].name == f"blk.{layer}.ffn_gate_exps.weight"
        assert two.stored(name)[1].name == f"blk.{layer}.ffn_up_exps.weight"
        assert two.shape(name) == one.shape(name) == (8, 512, 256)
        assert torch.equal(one.tensor(name), two.tensor(name))
        a, b = one.quantized(name), two.quantized(name)
        assert (a.bits, a.offset) == (b.bits, b.offset)
        assert torch.equal(a.qdata, b.qdata)
        assert torch.equal(a.scale, b.scale)
        assert (a.zero is None) == (b.zero is None)
        assert a.zero is None or torch.equal(a.zero, b.zero)


def test_the_order_of_separate_experts_in_the_file(wide, tmp_path):
    file = make_tiny_gguf(wide("26B-A4B"), tmp_path / "x.gguf", "Q8_0", separate_experts=True)
    want = GGUFCheckpoint(file).tensor("layers.0.experts.gate_up_proj")
    gate, up, data = (*GGUFCheckpoint(file).stored("layers.0.experts.gate_up_proj"), file.read_bytes())
    start = GGUFFile(file).tensors[GGUF_ROPE_FREQS].offset  # the first tensor: offsets count from it
    a, b = (tensor(info.name, info.shape[::-1], info.type.id, info.offset - start) for info in (gate, up))
    before, between, after = data.partition(a)[0], data.partition(a)[2].partition(b)[0], data.partition(b)[2]
    (tmp_path / "y.gguf").write_bytes(before + b + between + a + after)
    names = list(GGUFFile(tmp_path / "y.gguf").tensors)
    assert names.index(up.name) < names.index(gate.name)
    assert torch.equal(GGUFCheckpoint(tmp_path / "y.gguf").tensor("layers.0.experts.gate_up_proj"), want)


def test_separate_experts_of_two_types(wide, tmp_path):
    types = {"*ffn_gate_exps.weight": "Q8_0", "*ffn_up_exps.weight": "Q4_0"}
    file = make_tiny_gguf(wide("26B-A4B"), tmp_path / "x.gguf", types, separate_experts=True)
    checkpoint, name = GGUFCheckpoint(file), "layers.2.experts.gate_up_proj"
    stored = {t.name: torch.from_numpy(dequantize(t.data, t.tensor_type).copy()) for t in gguf.GGUFReader(file).tensors}
    want = torch.cat([stored[f"blk.2.ffn_{part}_exps.weight"] for part in ("gate", "up")], dim=1)
    assert torch.equal(checkpoint.tensor(name), want)
    assert torch.equal(checkpoint.rows(name, 2, 5), want[2:5])
    assert checkpoint.quantized(name) is None


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_joined_projections_are_the_separate_ones(kind, wide, tmp_path):
    one = GGUFCheckpoint(make_tiny_gguf(wide("26B-A4B"), tmp_path / "1.gguf", kind))
    two = GGUFCheckpoint(make_tiny_gguf(wide("26B-A4B"), tmp_path / "2.gguf", kind, join_qkv=True))
    assert one.config == two.config
    for name in one.files:
        assert torch.equal(one.tensor(name), two.tensor(name)), name
        if "proj.weight" in name and "router" not in name:
            assert torch.equal(one.quantized(name).qdata, two.quantized(name).qdata)


# What it says of itself


def test_it_is_a_source_of_weights(mixed):
    checkpoint: Weights = open_checkpoint(mixed)
    assert isinstance(checkpoint, GGUFCheckpoint)
    assert checkpoint.path == mixed
    assert checkpoint.config == TextConfig.from_file(mixed)
    assert checkpoint.dtype == torch.bfloat16
    with torch.device("meta"):
        model = Gemma4(checkpoint.config)
    assert set(check_fits(model, checkpoint)) == set(checkpoint.files)


def test_any_file_name_will_do(mixed, tmp_path):
    (tmp_path / "blob").symlink_to(mixed)
    assert isinstance(open_checkpoint(tmp_path / "blob"), GGUFCheckpoint)
    with pytest.raises(FileNotFoundError, match=r"absent\.gguf: no such file"):
        open_checkpoint(tmp_path / "absent.gguf")


@pytest.mark.parametrize(
    ("types", "dtype"),
    [("F32", torch.float32), ("BF16", torch.bfloat16), ("F16", torch.bfloat16), ("Q8_0", torch.bfloat16)],
)
def test_dtype(types, dtype, wide, tmp_path):
    assert GGUFCheckpoint(make_tiny_gguf(wide("31B"), tmp_path / "x.gguf", types)).dtype == dtype


def test_fingerprint(wide, tmp_path):
    file = make_tiny_gguf(wide("31B"), tmp_path / "x.gguf", "Q8_0")
    before = GGUFCheckpoint(file).fingerprint()
    assert re.fullmatch("[0-9a-f]{64}", before)
    parts = make_tiny_gguf(wide("31B"), tmp_path / "y.gguf", "Q8_0", max_tensors=20)
    assert GGUFCheckpoint(parts).fingerprint() == before
    assert GGUFCheckpoint(make_tiny_gguf(wide("31B"), tmp_path / "z.gguf", "Q4_0")).fingerprint() != before
    info = GGUFCheckpoint(file).stored("layers.3.mlp.up_proj.weight")[0]
    data = file.read_bytes()
    for at in (0, 1023, info.nbytes - 1024, info.nbytes - 1):
        changed = bytearray(data)
        changed[info.offset + at] ^= 1
        (tmp_path / "w.gguf").unlink(missing_ok=True)
        (tmp_path / "w.gguf").write_bytes(changed)
        assert GGUFCheckpoint(tmp_path / "w.gguf").fingerprint() != before, at


@pytest.mark.parametrize("variant", VARIANTS)
def test_real_sizes_open_at_once_and_rows_are_cheap(variant, tmp_path):
    """62 GB of holes."""
    start = time.process_time()
    checkpoint = GGUFCheckpoint(write_config(tmp_path / "x.gguf", VARIANTS[variant]))
    with torch.device("meta"):
        check_fits(Gemma4(checkpoint.config), checkpoint)
    rows = checkpoint.rows("embed_tokens.weight", 262_140, 262_144)
    assert rows.shape == (4, checkpoint.config.hidden_size)
    assert time.process_time() - start < 5


MEASURE = """
import sys, torch
from gemma4_impl.gguf.checkpoint import GGUFCheckpoint
from measured_memory import watched

torch.set_num_threads(1)
checkpoint = GGUFCheckpoint(sys.argv[1])
name = "embed_tokens.weight"
calls = {"rows": lambda: checkpoint.rows(name, 60_000, 60_016), "tensor": lambda: checkpoint.tensor(name),
         "quantized": lambda: checkpoint.quantized(name), "fingerprint": lambda: checkpoint.fingerprint()}
checkpoint.rows(name, 0, 4096), checkpoint.quantized("layers.0.mlp.up_proj.weight")  # what first use itself takes
for what, call in calls.items():
    with watched() as memory:
        result = call()
    print(what, f"{getattr(result, 'nbytes', 0) / 2**20:.1f} {memory.peak:.1f}")
    del result
"""


@pytest.mark.skipif(not MEASURABLE, reason="reads Linux's own account of memory")
@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "F16"])
def test_memory_is_that_of_the_result(kind, tmp_path):
    """A table of 64 million weights: 256 MiB as floats, and 16 of its rows."""
    sizes = {"vocab_size": 65_536, "hidden_size": 1024, "num_hidden_layers": 2, "layer_types": (SLIDING, FULL)}
    config = dataclasses.replace(VARIANTS["E4B"], **sizes, num_kv_shared_layers=0, hidden_size_per_layer_input=0)
    file = write_config(tmp_path / "x.gguf", config, kind)
    lines = (line.split() for line in run(MEASURE, str(file)).splitlines())
    found = {what: (float(size), float(peak)) for what, size, peak in lines}
    assert found["tensor"][0] == (128 if kind == "F16" else 256)
    if kind == "F16":
        # A view of the mapped file.
        assert found["tensor"][1] < 8
    else:
        assert found["quantized"][0] < 100
        for what in ("tensor", "quantized"):
            size, peak = found[what]
            assert peak < size + 24, (what, found)
    assert found["rows"][1] < 8
    assert found["fingerprint"][1] < 8


# What does not fit


def hollow(path: Path, variant: str, **changes: tuple[int, ...] | None) -> Path:
    """A hollow tiny file with these tensors (without ".weight") added or changed, or left out."""
    config = TextConfig.from_dict({**TINY[variant], "model_type": "gemma4_text"})
    shapes = shapes_of(config) | {f"{name}.weight": shape for name, shape in changes.items()}
    shapes = {name: shape for name, shape in shapes.items() if shape is not None}
    return write_hollow(path, metadata_from_config(config), shapes, rope_freqs(config).numpy())


@pytest.mark.parametrize(
    "name", ["blk.0.attn_x", "output_scale", "blk.0.ffn_up.lora_a", "v.blk.0.attn_q", "blk.00.attn_q"]
)
def test_unknown_tensors_are_refused(name, tmp_path):
    expected = re.escape(f"tensor '{name}.weight' is unknown in Gemma 4; it would be ignored")
    with pytest.raises(CheckpointError, match=expected):
        GGUFCheckpoint(hollow(tmp_path / "x.gguf", "31B", **{name: (2, 2)}))


GATE_UP = "blk.1.ffn_gate_up_exps"
GATE, UP = "blk.1.ffn_gate_exps", "blk.1.ffn_up_exps"
HALF = (8, 16, 56)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({GATE: HALF}, r"gate_up_proj needs gates and ups, once; there is ffn_gate_up_exps and ffn_gate_exps"),
        ({GATE: HALF, UP: HALF}, r"there is ffn_gate_up_exps and ffn_gate_exps and ffn_up_exps"),
        (
            {GATE_UP: None, GATE: HALF},
            r"layers\.1\.experts\.gate_up_proj needs gates and ups, once; there is ffn_gate_exps",
        ),
        ({GATE_UP: None, UP: HALF}, r"there is ffn_up_exps$"),
        (
            {GATE_UP: None, GATE: HALF, UP: (8, 15, 56)},
            r"do not fit together: .*ffn_gate_exps\.weight \[8, 16, 56\] and",
        ),
        ({GATE_UP: None, GATE: (16, 56), UP: (16, 56)}, r"do not fit together"),
        (
            {"blk.1.attn_qkv": (256, 56)},
            r"'blk\.1\.attn_q\.weight' and 'blk\.1\.attn_qkv\.weight' both hold layers\.1\.",
        ),
        ({"blk.1.attn_qkv": (255, 56)}, r"tensor 'blk\.1\.attn_qkv\.weight' is \[255, 56\], expected \[256, 56\]"),
        ({"blk.1.attn_qkv": (256, 55)}, r"is \[256, 55\], expected \[256, 56\]"),
        ({"blk.6.attn_qkv": (256, 56)}, r"tensor 'blk\.6\.attn_qkv\.weight': there are 6 layers"),
    ],
)
def test_parts_that_do_not_fit_together(changes, why, tmp_path):
    with pytest.raises(CheckpointError, match=why):
        GGUFCheckpoint(hollow(tmp_path / "x.gguf", "26B-A4B", **changes))


def test_everything_that_does_not_fit_is_listed(tmp_path):
    changes = {
        "blk.0.ffn_up": None,
        "output_norm": None,
        "blk.9.ffn_up": (64, 96),
        "blk.1.attn_q": (3, 4),
        "blk.2.layer_output_scale": (2,),
    }
    with pytest.raises(CheckpointError, match=r"x\.gguf: the tensors do not fit the metadata; ") as error:
        Gemma4.from_pretrained(hollow(tmp_path / "x.gguf", "31B", **changes))
    for part in (
        "2 missing: layers.0.mlp.up_proj.weight, norm.weight",
        "1 unexpected: layers.9.mlp.up_proj.weight",
        "2 mis-shaped: layers.1.self_attn.q_proj.weight is [3, 4], expected [64, 96]",
        "layers.2.layer_scalar is [2], expected [1]",
    ):
        assert part in str(error.value)


def test_unused_tensors_of_layers_that_share_keys(tmp_path):
    """The released files carry them."""
    unused = {"blk.8.attn_k": (64, 40), "blk.8.attn_v": (64, 40), "blk.8.attn_k_norm": (32,)}
    checkpoint = GGUFCheckpoint(hollow(tmp_path / "x.gguf", "E2B", **unused))
    assert checkpoint.config.layers[8].kv_shared
    with torch.device("meta"):
        taken = check_fits(Gemma4(checkpoint.config), checkpoint)
    assert "layers.8.self_attn.q_proj.weight" in taken
    assert not any(re.fullmatch(r"layers\.8\.self_attn\.[kv]_.*", name) for name in taken)


def test_a_missing_layer_scalar_is_no_scalar_of_1(tmp_path):
    with pytest.raises(CheckpointError, match=r"1 missing: layers\.3\.layer_scalar"):
        Gemma4.from_pretrained(hollow(tmp_path / "x.gguf", "31B", **{"blk.3.layer_output_scale": None}))
