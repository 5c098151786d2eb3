"""Models spread over eight devices: the same logits and tokens as on one, weights and caches where they should be."""

import functools
import re
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import example, given
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from gemma4_impl.config import FULL, SLIDING, TextConfig
from gemma4_impl.model.decoder import Gemma4 as TorchGemma4
from gemma4_impl.nnx.cache import cache_sharding, make_cache
from gemma4_impl.nnx.decoder import Gemma4
from gemma4_impl.nnx.load import from_pretrained
from gemma4_impl.nnx.sharding import FSDP, TP, MeshError, constrain, make_mesh, parse_mesh, partition
from reference.tiny import TINY, make_tiny

CPUS = jax.devices("cpu")
MESHES = ("fsdp=8,tp=1", "fsdp=4,tp=2", "fsdp=2,tp=4", "fsdp=1,tp=8")
# A layer of each type, and a shared one where the variant has them: 1, 2 and 4 key/value heads of 4 or 8 query heads.
SMALL = {
    "E2B": {"num_hidden_layers": 3, "layer_types": [SLIDING, FULL, FULL], "num_kv_shared_layers": 1},
    "26B-A4B": {"num_hidden_layers": 2, "layer_types": [SLIDING, FULL]},
    "31B": {"num_hidden_layers": 2, "layer_types": [SLIDING, FULL]},
}
DIVISIBLE = {
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "num_global_key_value_heads": 8,
    "hidden_size": 48,
    "intermediate_size": 64,
}
B, T, PROMPT = 8, 12, 3


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Callable[..., Path]:
    """variant, whether all sizes are multiples of eight -> checkpoint folder."""

    @functools.cache
    def make(variant: str, divisible: bool = False) -> Path:
        sizes = SMALL[variant] | (DIVISIBLE if divisible else {})
        return make_tiny(variant, tmp_path_factory.mktemp("small") / variant, overrides=sizes)

    return make


# Compiling takes most of the time here, and most of that goes into code that is no faster on so few numbers.
QUICK = {"xla_backend_optimization_level": 0}


class Runs:
    """A model on a mesh, or on one device if there is none."""

    def __init__(self, path: Path, mesh: str | None = None, dtype: str = "float32"):
        self.mesh, self.dtype = mesh and make_mesh(mesh, CPUS), dtype
        with self.on():
            self.model = from_pretrained(path, dtype)
            graphdef, self.state = nnx.split(self.model)
            self.call = jax.jit(
                lambda state, tokens, cache: nnx.merge(graphdef, state)(tokens, cache=cache),
                donate_argnums=2,
                compiler_options=QUICK,
            )

    def on(self):
        return jax.set_mesh(self.mesh) if self.mesh else nullcontext()

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        with self.on():
            return np.asarray(self.call(self.state, tokens, None)[0], np.float64)

    def greedy(self, prompt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [B, T], a prompt and then the likeliest ones, and logits [B, T, V] of each when it is fed alone."""
        with self.on():
            cache = make_cache(self.model.config, B, T, 1, self.dtype)
            sharding = None if self.mesh is None else cache_sharding(cache, self.mesh)
            fed, out = np.split(prompt, prompt.shape[1], axis=1), []
            for i in range(T):
                logits, cache = self.call(self.state, fed[i], cache)
                out.append(np.asarray(logits, np.float64))
                if len(fed) == i + 1:
                    fed.append(out[-1].argmax(-1).astype(np.int32))
        if sharding is not None:
            same = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), cache, sharding)
            assert all(jax.tree.leaves(same)), "the cache did not stay where it was"
        return np.concatenate(fed[:T], axis=1), np.concatenate(out, axis=1)


@pytest.fixture(scope="module")
def truth(small) -> Callable[[str], tuple[np.ndarray, np.ndarray, float]]:
    """variant -> tokens [B, T], a prompt and then the likeliest ones; their logits [B, T, V] by the PyTorch model in
    float64; and the error that our model makes in float32 on one device."""

    @functools.cache
    def make(variant: str) -> tuple[np.ndarray, np.ndarray, float]:
        model = TorchGemma4.from_pretrained(small(variant), torch.float64)
        tokens = np.random.default_rng(0).integers(107, 512, (B, PROMPT))
        with torch.no_grad():
            while tokens.shape[1] < T:
                last = model(torch.from_numpy(tokens))[:, -1:].numpy()
                tokens = np.concatenate([tokens, last.argmax(-1)], axis=1)
            exact = model(torch.from_numpy(tokens)).numpy()
        tokens = tokens.astype(np.int32)
        return tokens, exact, np.linalg.norm(Runs(small(variant)).logits(tokens) - exact)

    return make


# All that a mesh changes is the order in which products are summed along a dim that is cut. XLA's order for one device
# is no better than another one, so the error E of float32 on one device, |float32 - truth|, is what any order makes,
# and twice that is granted, as in the parity budget. In float64 roundings are smaller by the ratio of the units, and
# the truth has such an error of its own, so that the two may be three times that apart.
ORDER = 2
FINER = np.finfo(np.float64).eps / np.finfo(np.float32).eps


@pytest.mark.parametrize("variant", SMALL)
@pytest.mark.parametrize("mesh", MESHES)
def test_generated_tokens(variant, mesh, small, truth):
    expected, exact, error = truth(variant)
    tokens, logits = Runs(small(variant), mesh).greedy(expected[:, :PROMPT])
    assert (tokens == expected).all()
    assert np.linalg.norm(logits - exact) <= ORDER * error


@pytest.mark.parametrize("variant", SMALL)
def test_logits_of_a_whole_sequence(variant, small, truth):
    tokens, exact, error = truth(variant)
    assert np.linalg.norm(Runs(small(variant), "fsdp=2,tp=4").logits(tokens) - exact) <= ORDER * error


@pytest.mark.parametrize("variant", SMALL)
def test_logits_in_float64(variant, small, truth):
    tokens, exact, error = truth(variant)
    with jax.enable_x64(True):
        found = Runs(small(variant), "fsdp=2,tp=4", "float64").logits(tokens)
    assert 0 < np.linalg.norm(found - exact) <= (ORDER + 1) * error * FINER
    assert np.linalg.norm(found - exact) < 1e-13 * np.linalg.norm(exact)


def test_a_batch_that_is_not_divided(small, truth):
    """Three rows are whole on every device, weights are not."""
    tokens, exact, error = truth("31B")
    assert np.linalg.norm(Runs(small("31B"), "fsdp=2,tp=4").logits(tokens[:3]) - exact[:3]) <= ORDER * error


# Where things are


def held(state) -> dict[jax.Device, int]:
    """Bytes of each device."""
    out: Counter[jax.Device] = Counter()
    for value in jax.tree.leaves(state):
        for shard in value.addressable_shards:
            out[shard.device] += shard.data.nbytes
    return dict(out)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("variant", SMALL)
def test_each_device_holds_its_part(variant, mesh, small):
    """All matrices are cut into eight equal parts but those listed, if every size can be divided by eight."""
    state = nnx.state(from_pretrained(small(variant, divisible=True), mesh=make_mesh(mesh, CPUS)))
    leaves = {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}
    sizes = parse_mesh(mesh)
    expected = 0
    for name, value in leaves.items():
        parts = 8
        if value.ndim == 1:  # norms and scalars
            parts = 1
        elif "router.proj" in name or "per_layer_input_gate" in name or "per_layer_projection" in name:
            parts = sizes[FSDP]
        assert value.addressable_shards[0].data.nbytes * parts == value.nbytes, name
        expected += value.nbytes // parts
    assert held(state) == dict.fromkeys(CPUS, expected)
    total = sum(value.nbytes for value in leaves.values())
    assert total / 8 <= expected < total / 8 * 1.35


def test_heads_are_never_cut(small):
    """With fewer key/value heads than tp their projections and caches are whole, and the queries are not."""
    mesh = make_mesh("fsdp=2,tp=4", CPUS)
    model = from_pretrained(small("31B"), mesh=mesh)
    sliding, full = (layer.self_attn for layer in model.layers)
    weights = {name: getattr(sliding, name).weight for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    spec = {name: weight.get_value().sharding.spec for name, weight in weights.items()}
    whole, cut = PartitionSpec(None, FSDP), PartitionSpec(TP, FSDP)
    assert spec == {"q_proj": cut, "k_proj": whole, "v_proj": whole, "o_proj": PartitionSpec(FSDP, TP)}
    assert full.k_proj.weight.get_value().sharding.spec == whole
    with jax.set_mesh(mesh):
        cache = make_cache(model.config, 4, 16, 4)
        odd = make_cache(model.config, 3, 16, 4)
    assert {x.sharding.spec[0] for x in jax.tree.leaves(cache)} == {FSDP}
    assert cache.layers[0][0].sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(FSDP)), 4)
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(odd))
    config = TextConfig.from_dict(TINY["26B-A4B"] | {"model_type": "gemma4_text"})
    abstract = jax.eval_shape(lambda: make_cache(config, 4, 16, 4))
    specs = {layer: pair[0].spec for layer, pair in cache_sharding(abstract, mesh).layers.items()}
    assert specs == {i: PartitionSpec(FSDP, None, None if i in (2, 5) else TP, None) for i in range(6)}


# What devices tell each other

COLLECTIVE = re.compile(
    r" = (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|collective-broadcast)(?:-start)?\("
)


def collectives(compiled) -> list[tuple[str, int]]:
    """Each with the most values that one of its results has."""
    out = []
    for line in compiled.as_text().splitlines():
        if found := COLLECTIVE.search(line):
            shapes = [list(map(int, dims.split(","))) for dims in re.findall(r"\[([\d,]+)\]\{", found[1])]
            out.append((found[2], max(int(np.prod(shape)) for shape in shapes)))
    return out


def compiled_step(config: TextConfig, mesh: str, devices: int, batch: int):
    """One decode step, never run."""
    mesh = make_mesh(mesh, CPUS[:devices])
    with jax.set_mesh(mesh):
        graphdef, state = nnx.split(nnx.eval_shape(lambda: Gemma4(config, rngs=nnx.Rngs(0))))
        cache = jax.eval_shape(lambda: make_cache(config, batch, 16, 1))
        placed = [(state, nnx.get_named_sharding(state, mesh)), (cache, cache_sharding(cache, mesh))]
        state, cache = (
            jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), *pair) for pair in placed
        )
        step = jax.jit(lambda state, tokens, cache: nnx.merge(graphdef, state)(tokens, cache=cache), donate_argnums=2)
        return step.lower(state, jax.ShapeDtypeStruct((batch, 1), jnp.int32), cache).compile(QUICK)


def changed(variant: str, **changes) -> TextConfig:
    return TextConfig.from_dict(TINY[variant] | SMALL[variant] | changes | {"model_type": "gemma4_text"})


@pytest.mark.parametrize("heads", [{}, {"num_key_value_heads": 4, "num_global_key_value_heads": 4}])
def test_a_decode_step_over_tp(heads):
    """Two sums of activations a layer, of attention and of the MLP, and one of the embedding; no weight and no cache
    moves, whether there are as many key/value heads as devices or fewer."""
    config = changed("31B", num_attention_heads=8, **heads)
    found = collectives(compiled_step(config, "tp=4", 4, 2))
    assert {size for _, size in found} == {2 * config.hidden_size}
    assert Counter(kind for kind, _ in found) == {"all-reduce": 2 * config.num_hidden_layers + 1}


@pytest.mark.parametrize("variant", ["E2B", "26B-A4B"])
def test_what_other_variants_add(variant):
    """Activations of one token only: the experts' gates and ups change places, per-layer inputs are gathered."""
    config = changed(variant)
    found = collectives(compiled_step(config, "tp=4", 4, 1))
    ple = config.num_hidden_layers * config.hidden_size_per_layer_input
    experts = config.top_k_experts * config.hidden_size if config.enable_moe_block else 0
    assert max(size for _, size in found) <= max(config.hidden_size, ple, experts)
    gathers = [kind for kind, _ in found if kind == "all-gather"]
    assert len(gathers) <= (1 if ple else 0)


def test_a_decode_step_over_both_axes():
    """A batch over fsdp: still nothing larger than the batch's activations moves, the weights stay."""
    config = changed("31B", num_attention_heads=8, hidden_size=256, intermediate_size=512, vocab_size=2048)
    found = collectives(compiled_step(config, "fsdp=2,tp=4", 8, 4))
    assert max(size for _, size in found) <= 4 * max(config.intermediate_size, config.vocab_size) // 4
    smallest = config.hidden_size * config.num_key_value_heads * config.head_dim // 2
    assert max(size for _, size in found) < smallest


# Meshes

names = st.sampled_from([FSDP, TP, "other", None])


@given(
    st.lists(st.tuples(st.integers(1, 96), names), max_size=4), st.dictionaries(names.filter(bool), st.integers(1, 9))
)
def test_partition(dims, sizes):
    """Every dim has the axis that was asked for, exactly where the mesh has that axis and it divides the units."""
    units, axes = [n for n, _ in dims], [axis for _, axis in dims]
    assert partition(units, axes) == tuple(axes)
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    with jax.sharding.use_abstract_mesh(mesh):
        found = partition(units, axes)
    if not sizes:
        assert found == tuple(axes)
        return
    assert len(found) == len(dims)
    for axis, (count, wanted) in zip(found, dims, strict=True):
        fits = wanted in sizes and count % sizes[wanted] == 0
        assert axis == (wanted if fits else None)


def test_constrain_changes_no_value():
    x = jnp.arange(48.0).reshape(4, 12)
    assert constrain(x, FSDP, TP) is x
    with jax.set_mesh(make_mesh("fsdp=2,tp=4", CPUS)):
        y = jax.jit(lambda x: constrain(x, FSDP, TP))(x)
        assert constrain(jnp.ones((3, 4)), FSDP, TP).sharding.spec == PartitionSpec(None, TP)
    assert y.sharding.spec == PartitionSpec(FSDP, TP)
    assert (np.asarray(x) == np.asarray(y)).all()


@given(st.integers(1, 10**9 - 1), st.integers(1, 10**9 - 1), st.booleans())
def test_parse(fsdp, tp, swapped):
    parts = [f"fsdp={fsdp}", f" tp = {tp} "]
    assert list(parse_mesh(",".join(parts[::-1] if swapped else parts)).items()) == [(FSDP, fsdp), (TP, tp)]
    assert parse_mesh(f"tp={tp}") == {FSDP: 1, TP: tp}


@given(st.text(max_size=30) | st.from_regex(r"((fsdp|tp|x)=[0-9]{0,3},?){1,3}", fullmatch=True))
@example("fsdp=" + "9" * 5000)
@example("fsdp=²")
@example("fsdp=1\n,tp=x")
def test_any_text_is_a_mesh_or_refused_in_one_line(text):
    try:
        sizes = parse_mesh(text)
    except MeshError as error:
        message = str(error)
    else:
        message = ""
        assert list(sizes) == [FSDP, TP]
        assert all(size >= 1 for size in sizes.values())
    assert len(message.splitlines()) <= 1
    assert len(message) < 400


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fsdp", r"'fsdp' is not of the form axis=size, as in fsdp=1,tp=4"),
        ("", "'' is not of the form"),
        ("tp=4,", "'' is not of the form"),
        ("tp=-4", "'tp=-4' is not of the form"),
        ("dp=2,tp=4", "unknown axis 'dp'; the axes are fsdp and tp"),
        ("tp=2,tp=4", "tp is given twice"),
        ("tp=0", "the size of tp must be from 1"),
        ("tp=4", "is for 4 devices, but there are 8; it could be fsdp=8,tp=1, fsdp=4,tp=2, fsdp=2,tp=4, fsdp=1,tp=8"),
        ("fsdp=3,tp=3", "is for 9 devices, but there are 8"),
    ],
)
def test_bad_meshes(text, message):
    with pytest.raises(MeshError, match=message):
        make_mesh(text, CPUS)


def test_mesh():
    mesh = make_mesh("tp=4,fsdp=2", CPUS)
    assert (mesh.axis_names, mesh.axis_sizes) == ((FSDP, TP), (2, 4))
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert sorted(d.id for d in mesh.devices.flat) == list(range(8))
