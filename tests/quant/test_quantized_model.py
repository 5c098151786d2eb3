"""Models whose weights come quantized: against the same model with the dequantized weights, on every path."""

from pathlib import Path

import pytest
import torch
from measured_memory import MEASURABLE, run
from quantizing import OnTheFly
from torch import Tensor

from gemma4_impl import taps
from gemma4_impl.checkpoint import Checkpoint
from gemma4_impl.generate import bytes_per_token, decode_one_token, generate, prefill
from gemma4_impl.kernels import cuda
from gemma4_impl.model.decoder import Gemma4
from gemma4_impl.quant.cpu import _block_rows
from gemma4_impl.quant.modules import QuantizedEmbedding, QuantizedExperts, QuantizedLinear
from gemma4_impl.quant.pack import can_pack, pack_model
from gemma4_impl.quant.packed import PackedWeight
from gemma4_impl.tokenizer import Tokenizer
from parity.budget import check_total
from parity.compare import routing_of
from parity.metrics import measure
from reference.tiny import aligned, make_tiny

VARIANTS = ("E2B", "E4B", "26B-A4B", "31B")
TOKENS = torch.randint(107, 512, (1, 24), generator=torch.Generator().manual_seed(0))
KERNELS = _block_rows() is not None


def choose(name: str) -> tuple | None:
    """Every form that a kernel takes, and None for what no kernel takes."""
    if "embed_tokens" in name or name == "lm_head.weight" or name.endswith("v_proj.weight"):
        return 8, None, False
    if name.endswith(("k_proj.weight", "experts.down_proj")):
        return 8, 16, False
    if name.endswith(("gate_proj.weight", "o_proj.weight")):
        return 4, 32, True
    if name.endswith(("_proj.weight", "_proj", "per_layer_input_gate.weight", "projection.weight")):
        return 4, 32, False
    return None


class Dequantized(OnTheFly):
    """The same values as dense tensors."""

    def tensor(self, name: str) -> Tensor:
        how = self.choose(name)
        return Checkpoint.tensor(self, name) if how is None else OnTheFly(self.path, self.choose).tensor(name)

    def quantized(self, name: str) -> None:
        return None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = {}

    def make(variant: str, **overrides) -> Path:
        key = variant, *overrides.items()
        if key not in made:
            out = tmp_path_factory.mktemp("tiny") / variant
            made[key] = make_tiny(variant, out, dtype="bfloat16", overrides=aligned(variant, 32) | overrides)
        return made[key]

    return make


@torch.no_grad()
def logits(model: Gemma4, path: str, routing: dict[str, Tensor]) -> Tensor:
    """All logits [1, L, V], by one forward or by a prefill in chunks and then one token at a time."""
    length, tokens = TOKENS.shape[1], TOKENS.to(model.device)
    with taps.recording(taps.Recorder(1, length, "logits", routing=routing)) as recorder:
        if path == "full":
            model(tokens)
        else:
            cache = model.make_cache(1, length, max_chunk=7)
            for start in range(0, 14, 7):
                model(tokens[:, start : start + 7], cache=cache)
            for i in range(14, length):
                model(tokens[:, i : i + 1], cache=cache)
    return recorder.values["logits"]


@torch.no_grad()
def truth(path: Path, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of the dequantized weights in float64, and the experts chosen. The embedding's scale is what a model in
    `dtype` has."""
    model = Gemma4.from_weights(Dequantized(path, choose), torch.float64)
    for module in model.modules():
        if hasattr(module, "scale") and isinstance(module.scale, dict):
            module.scale[torch.float64] = module.scale[dtype]
    with taps.recording(taps.Recorder(1, TOKENS.shape[1])) as recorder:
        model(TOKENS)
    return recorder.values["logits"], routing_of(recorder.values, model.config.top_k_experts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_as_exact_as_the_dequantized_model(folder, variant, dtype):
    expected, routing = truth(folder(variant), dtype)
    quantized = Gemma4.from_weights(OnTheFly(folder(variant), choose), dtype)
    dense = Gemma4.from_weights(Dequantized(folder(variant), choose), dtype)
    packed = {name: module for name, module in quantized.named_modules() if isinstance(module, PackedWeight)}
    assert len(packed) > 30
    kernels = {"int4pack", "int8pack", "dequantize"} if KERNELS and dtype == torch.bfloat16 else {"dequantize"}
    assert {weight.kernel for weight in packed.values()} == kernels
    errors = {}
    for path in ("full", "cached"):
        reference = measure(logits(dense, path, routing), expected).rel_l2
        errors[path] = measure(logits(quantized, path, routing), expected).rel_l2
        (check,) = check_total(errors[path], [reference], dtype).values()
        assert not check.red, f"{path}: {check}"
    assert all(errors.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_verbs(folder, variant, dtype):
    model = Gemma4.from_weights(OnTheFly(folder(variant), choose), dtype)
    assert (model.dtype, model.device.type) == (dtype, "cpu")
    cache = model.make_cache(1, 40, max_chunk=16)
    token = prefill(model, TOKENS, cache).argmax(-1, keepdim=True)
    assert decode_one_token(model, token, cache).shape == (1, 1)
    result = generate(model, Tokenizer.from_pretrained(folder(variant)), "hello", max_new_tokens=5, temperature=0)
    assert 1 <= len(result.tokens) <= 5
    assert result.gb_per_second > 0 or len(result.tokens) == 1


def test_names_stay(folder):
    """Modules are where they were, and what cannot be quantized is dense, with the dequantized values."""

    def all_of_it(name: str) -> tuple | None:
        return choose(name) or ((8, None, False) if name.endswith("router.proj.weight") else None)

    weights = OnTheFly(folder("26B-A4B"), all_of_it)
    model = Gemma4.from_weights(weights, torch.float32)
    dense = Gemma4.from_weights(Checkpoint(folder("26B-A4B")), torch.float32)
    assert {n for n, _ in dense.named_modules()} <= {n for n, _ in model.named_modules()}
    layer = model.layers[0]
    assert isinstance(layer.self_attn.q_proj, QuantizedLinear)
    assert isinstance(layer.experts, QuantizedExperts)
    assert isinstance(model.embed_tokens, QuantizedEmbedding)
    assert type(layer.router.proj) is torch.nn.Linear
    assert torch.equal(layer.router.proj.weight, weights.tensor("layers.0.router.proj.weight"))
    assert not torch.equal(layer.router.proj.weight, dense.layers[0].router.proj.weight)
    parameters = {name for name, _ in model.named_parameters()}
    assert parameters == {n for n, _ in dense.named_parameters() if not all_of_it(n) or "router" in n}


def test_a_quantized_table_of_per_layer_inputs(folder):
    model = Gemma4.from_weights(OnTheFly(folder("E2B"), choose), torch.float32)
    assert isinstance(model.embed_tokens_per_layer, QuantizedEmbedding)
    assert model.embed_tokens_per_layer.weight.shape == (512, 9 * 32)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_on_a_gpu(folder, variant, dtype):
    """By kernels of ours on Hopper in bfloat16, else on the codes as they are."""
    expected, routing = truth(folder(variant), dtype)
    quantized = Gemma4.from_weights(OnTheFly(folder(variant), choose), dtype, "cuda")
    dense = Gemma4.from_weights(Dequantized(folder(variant), choose), dtype, "cuda")
    packed = [module for module in quantized.modules() if isinstance(module, PackedWeight)]
    kernels = {"int4tile", "dequantize"} if cuda.available() and dtype == torch.bfloat16 else {"dequantize"}
    assert {(weight.kernel, weight.device.type) for weight in packed} == {(kernel, "cuda") for kernel in kernels}
    error, reference = (measure(logits(model, "cached", routing), expected).rel_l2 for model in (quantized, dense))
    (check,) = check_total(error, [reference], dtype).values()
    assert not check.red, check


# The head


def memory_read(model: Gemma4) -> int:
    """By a step that attends to one position: all memory but the rows and experts that are not chosen."""
    config, head = model.config, {id(t) for t in [*model.lm_head.parameters(), *model.lm_head.buffers()]}
    tensors = {id(t): (name, t) for name, t in [*model.named_parameters(), *model.named_buffers()]}
    read = 0
    for name, t in tensors.values():
        if name.startswith("embed_tokens") and id(t) not in head:
            assert len(t) in (512, 0)
            read += t[:1].nbytes
        elif ".experts." in name:
            read += t[: config.top_k_experts].nbytes
        else:
            read += t.nbytes
    return read + sum(2 * layer.num_key_value_heads * layer.head_dim * model.dtype.itemsize for layer in config.layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("embedding", [(8, None, False), (8, 16, False), None])
def test_tied_head(folder, embedding, dtype):
    """It has the embedding's codes themselves wherever its kernel takes them."""

    def embedding_only(name: str) -> tuple | None:
        return embedding if name == "embed_tokens.weight" else None

    model = Gemma4.from_weights(OnTheFly(folder("31B"), embedding_only), dtype)
    table, head = model.embed_tokens.weight, model.lm_head.weight
    if embedding is None:
        assert head is table
    elif not KERNELS or dtype == torch.float32:
        assert head is table
        assert head.kernel == "dequantize"
    elif embedding[1] is None:
        assert head.kernel == "int8pack"
        assert head.qdata is table.qdata
    else:
        assert head.kernel == "int4pack"
    assert bytes_per_token(model, 1) == memory_read(model)


def test_untied_head(folder):
    path = folder("E4B", tie_word_embeddings=False)
    model = Gemma4.from_weights(OnTheFly(path, choose), torch.bfloat16)
    weights = OnTheFly(path, choose)
    assert not torch.equal(weights.tensor("lm_head.weight"), weights.tensor("embed_tokens.weight"))
    expected = weights.tensor("lm_head.weight")
    error = (model.lm_head.weight.dequantize() - expected).norm() / expected.norm()
    assert error < 2**-8


@pytest.mark.parametrize("variant", ["E2B", "26B-A4B"])
def test_bytes_per_token(folder, variant):
    for dtype in (torch.bfloat16, torch.float32):
        model = Gemma4.from_weights(OnTheFly(folder(variant), choose), dtype)
        assert bytes_per_token(model, 1) == memory_read(model)


# Packing a model that is loaded


@pytest.mark.parametrize("variant", ["E2B", "26B-A4B"])
def test_pack_model(folder, variant):
    weights = OnTheFly(folder(variant), choose)
    loaded = Gemma4.from_weights(weights, torch.bfloat16)
    model = Gemma4.from_weights(Checkpoint(folder(variant)), torch.bfloat16)
    for _ in range(2):  # a packed model can be packed again
        kernels = pack_model(model, weights)
        assert set(kernels) == {name for name in weights.files if choose(name) and can_pack(loaded, name)}
        assert kernels["layers.0.self_attn.q_proj.weight"] == ("int4pack" if KERNELS else "dequantize")
        assert kernels["embed_tokens.weight"] == "dequantize"
        state, expected = model.state_dict(), loaded.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in state)
    with torch.no_grad():
        assert torch.equal(model(TOKENS), loaded(TOKENS))


def test_another_dtype_later(folder):
    """A model packed for bfloat16 and moved to float32 computes in float32 with the weights that it has."""
    model = Gemma4.from_weights(OnTheFly(folder("31B"), choose), torch.bfloat16)
    packed = {n: m.dequantize() for n, m in model.named_modules() if isinstance(m, PackedWeight)}
    model.to(torch.float32)
    with torch.no_grad():
        assert model(TOKENS).dtype == torch.float32
    for name, weight in packed.items():
        if model.get_submodule(name).kernel != "dequantize":
            assert torch.equal(model.get_submodule(name).dequantize(), weight)


# Cost


def test_imports_no_optional_package():
    code = "import sys, gemma4_impl.model.decoder; print({'torchao', 'gguf', 'transformers'} & sys.modules.keys())"
    assert run(code) == "set()\n"


MEASURE = """
import torch
from gemma4_impl.checkpoint import check_fits
from gemma4_impl.config import VARIANTS
from gemma4_impl.model.decoder import Gemma4
from gemma4_impl.quant.pack import can_pack
from gemma4_impl.quant.tensor import QuantizedTensor
from measured_memory import watched
import dataclasses

torch.set_num_threads(1)
changes = dict(num_hidden_layers=6, vocab_size=65536, hidden_size=1024, intermediate_size=4096)
changes |= dict(num_attention_heads=8, num_key_value_heads=4, num_global_key_value_heads=2)
config = dataclasses.replace(VARIANTS["31B"], layer_types=VARIANTS["31B"].layer_types[:6], **changes)

class Made:
    # Tensors that are made when they are asked for, and owned by who asked.
    path, dtype = "made", torch.bfloat16

    def __init__(self, bits, group):
        self.config, self.bits, self.group, self.largest = config, bits, group, 0
        with torch.device("meta"):
            self.model = Gemma4(config)
        self.shapes = {n: tuple(t.shape) for n, t in self.model.state_dict().items() if n != "lm_head.weight"}
        self.files = dict.fromkeys(self.shapes, "made")

    def shape(self, name):
        return self.shapes[name]

    def tensor(self, name):
        return torch.ones(self.shapes[name])

    def quantized(self, name):
        if not can_pack(self.model, name):
            return None
        *lead, N, K = self.shapes[name]
        q = torch.full((N, K // 2), 0x5A, dtype=torch.uint8) if self.bits == 4 else torch.ones(N, K, dtype=torch.int8)
        q = QuantizedTensor(q, torch.ones(N, K // self.group), None, self.bits, 0)
        self.largest = max(self.largest, q.nbytes)
        return q

Gemma4.from_weights(Made(4, 32))
for bits, group in ((4, 32), (8, 16)):
    weights = Made(bits, group)
    with watched() as memory:
        model = Gemma4.from_weights(weights)
    size = sum({t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}.values())
    print(size / 2**20, weights.largest / 2**20, memory.peak)
    del model
"""


@pytest.mark.skipif(not MEASURABLE, reason="needs Linux's /proc")
def test_peak_memory():
    """Never more than the packed model, the largest tensor as it comes, and blocks of a few MB.

    Memory that a process owns, sampled every half millisecond while a model is packed. Its largest tensor, the
    embedding, is a fifth of it or more, so that holding two of them would show."""
    # With a fixed threshold, memory that is freed leaves the process at once.
    for line in run(MEASURE, MALLOC_MMAP_THRESHOLD_="65536").splitlines():
        size, largest, peak = map(float, line.split())
        assert size > 40
        assert peak <= size + largest + 16, line
        assert peak >= 0.9 * size, f"{line}: it was not measured"
