"""The vision tower in JAX: names, parts, and the same function and gradients as the PyTorch one, in float64."""

from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gemma4_impl import Gemma4 as TorchGemma4
from gemma4_impl import names, taps
from gemma4_impl.config import TextConfig
from gemma4_impl.nnx.decoder import Gemma4
from gemma4_impl.nnx.images import load_tower
from gemma4_impl.nnx.tapped import Tapped
from gemma4_impl.nnx.vision import Constant, Vision, clip, num_soft_tokens, pool
from gemma4_impl.vision import encoder
from gemma4_impl.vision.config import VisionConfig
from reference.tiny import TINY

# Rounding in float64, 1e-16 an operation, in sums of other orders; gradients pass twice as many.
EXACT = 1e-12


@pytest.fixture(params=TINY)
def variant(request) -> str:
    return request.param


@dataclass
class State:
    """A tower's tensors in memory, as `load_tower` takes them."""

    tensors: dict[str, Tensor]
    path = Path("memory")
    dtype = torch.float64

    @property
    def towers(self) -> dict[str, Path]:
        return dict.fromkeys(self.tensors, self.path)

    def tower(self, name: str) -> Tensor:
        return self.tensors[name]


def abstract(config: VisionConfig, **options: object) -> Vision:
    return nnx.eval_shape(lambda: Vision(config, rngs=nnx.Rngs(0), **options))


def paths(model: nnx.Module, *filters: type) -> dict[tuple, nnx.Variable]:
    return dict(nnx.to_flat_state(nnx.state(model, *filters)))


def error(got: object, want: Tensor) -> float:
    """Relative L2 error."""
    got, want = np.asarray(got), want.detach().numpy()
    assert got.shape == want.shape
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def grid(shapes: list[tuple[int, int]], length: int, k: int) -> np.ndarray:
    """Positions int32 [I, length, 2] of images of so many soft tokens (width, height); (0, 0) is padding alone."""
    positions = np.full((len(shapes), length, 2), -1, np.int32)
    for row, (w, h) in zip(positions, shapes, strict=True):
        row[: w * h * k * k] = [(x, y) for y in range(h * k) for x in range(w * k)] or row[:0]
    return positions


# Names


def test_names_go_both_ways_for_every_tensor(variant, tiny_images):
    """Of the text model and the tower: each name is that of one parameter, of its shape, and of nothing else."""
    path = tiny_images(variant)
    config = TextConfig.from_file(path)
    with torch.device("meta"):
        torch_models = TorchGemma4(config), encoder.Vision(VisionConfig.from_file(path))
    text = nnx.eval_shape(lambda: Gemma4(config, rngs=nnx.Rngs(0)))
    for theirs, ours in zip(torch_models, (text, abstract(torch_models[1].config)), strict=True):
        leaves = paths(ours)
        state = {name: t for name, t in theirs.state_dict().items() if name != "lm_head.weight"}
        for name, tensor in state.items():
            at = names.to_nnx(name)
            assert names.from_nnx(at) == name
            assert leaves[at].shape == tensor.shape, name
        assert {names.to_nnx(name) for name in state} == set(leaves)


def test_bounds_and_standardisation_are_not_trained(variant, tiny_images):
    config = VisionConfig.from_file(tiny_images(variant))
    model = abstract(config, dtype="bfloat16", param_dtype="float16")
    kept = {names.from_nnx(path) for path in paths(model, Constant)}
    bounds = [f"{side}_{end}" for side in ("input", "output") for end in ("min", "max")]
    linears = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    layers = [f"vision_tower.encoder.layers.{i}." for i in range(config.num_hidden_layers)]
    want = {f"{layer}{linear}.{bound}" for layer in layers for linear in linears for bound in bounds}
    want = want if config.use_clipped_linears else set()
    assert kept == want | ({"vision_tower.std_bias", "vision_tower.std_scale"} if config.standardize else set())
    assert not set(paths(model, nnx.Param)) & set(paths(model, Constant))
    assert {leaf.dtype for leaf in paths(model).values()} == {jnp.dtype("float16")}


def test_matrices_are_spread_as_the_decoders(tiny_images):
    model = abstract(VisionConfig.from_file(tiny_images("E2B")))
    specs = {names.from_nnx(path): leaf.get_metadata()["out_sharding"] for path, leaf in paths(model).items()}
    for name, spec in specs.items():
        module = name.removesuffix(".linear.weight").split(".")[-1]
        if module in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj") or "embedding_projection" in name:
            want = ("tp", "fsdp")
        elif module in ("o_proj", "down_proj"):
            want = ("fsdp", "tp")
        elif "input_proj" in name:
            want = ("fsdp", None)
        elif module == "position_embedding_table":
            want = (None, "tp", "fsdp")
        else:
            want = (None,) if "norm" in name else ()
        assert spec == want, name
    assert sum("tp" in spec for spec in specs.values()) == 7 * 2 + 2


# Parts


def test_clip_is_torchs_and_so_is_its_gradient():
    """On the bounds too, where values of few bits often are."""
    x = np.array([-3, -2, -1, 0, 1, 2, 3, np.inf, -np.inf], np.float32)
    for low, high in [(-2.0, 2.0), (-np.inf, np.inf), (-1.0, np.inf)]:
        theirs = torch.from_numpy(x).requires_grad_()
        clamped = torch.clamp(theirs, low, high)
        clamped.nansum().backward()
        bounds = [Constant(jnp.array(bound, jnp.float32)) for bound in (low, high)]
        values, gradients = jax.vmap(jax.value_and_grad(lambda x, bounds=bounds: clip(x, *bounds)))(jnp.asarray(x))
        assert np.array_equal(values, clamped.detach().numpy())
        assert np.array_equal(gradients, theirs.grad.numpy())


K, GRIDS = 3, [(4, 2), (1, 5), (7, 1), (0, 0)]
jitted_pool = jax.jit(pool, static_argnums=2)


@settings(max_examples=20, deadline=None)
@given(st.permutations(GRIDS), st.integers(0, 99))
def test_pool_is_the_mean_of_each_square(shapes, seed):
    """Patches in any order, padding anywhere."""
    positions = grid(shapes, 8 * K * K, K)
    rng = np.random.default_rng(seed)
    x = np.where(positions[..., :1] < 0, 0, rng.normal(size=(*positions.shape[:2], 5))).astype(np.float32)
    order = rng.permutation(x.shape[1])
    got = np.asarray(jitted_pool(x[:, order], positions[:, order], K))
    counts = np.asarray(num_soft_tokens(positions, K))
    for i, (w, h) in enumerate(shapes):
        assert counts[i] == w * h
        for n in range(w * h):
            inside = (positions[i] // K == (n % w, n // w)).all(axis=-1) & (positions[i] >= 0).all(axis=-1)
            # Nine values, each rounded once as it is added.
            np.testing.assert_allclose(got[i, n], x[i, inside].astype(np.float64).mean(axis=0), atol=9 * 2**-23)
        assert not got[i, w * h :].any()


def test_all_levels_of_a_pixel_arrive_in_bfloat16():
    """Rescaled before they are rounded, each is the nearest that bfloat16 has."""
    vision = {"hidden_size": 48, "patch_size": 4, "intermediate_size": 1, "num_hidden_layers": 1, "head_dim": 4}
    vision |= {"num_attention_heads": 1, "num_key_value_heads": 1, "position_embedding_size": 3}
    config = VisionConfig.from_dict(
        {"model_type": "gemma4", "vision_config": vision, "text_config": {"hidden_size": 7}}
    )
    embedder = Vision(config, dtype="bfloat16", rngs=nnx.Rngs(0)).vision_tower.patch_embedder
    embedder.input_proj.weight[...] = jnp.eye(48)
    embedder.position_embedding_table[...] = jnp.zeros((2, 3, 48))
    pixels = (np.arange(9 * 48, dtype=np.float32) % 256 / 255).reshape(1, 9, 48)
    got = nnx.jit(embedder)(pixels, grid([(1, 1)], 9, 3), np.zeros((1, 9), bool))
    assert np.array_equal(got, (2 * (pixels - np.float32(0.5))).astype(jnp.bfloat16))


# The tower


def configs() -> st.SearchStrategy[dict]:
    heads = st.sampled_from([(1, 1), (3, 3), (4, 2), (6, 2)])
    return st.builds(
        lambda heads, **keys: {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], **keys},
        heads,
        hidden_size=st.integers(3, 40),
        intermediate_size=st.integers(1, 40),
        num_hidden_layers=st.just(1),
        head_dim=st.sampled_from([4, 8, 12, 36]),
        patch_size=st.integers(1, 5),
        pooling_kernel_size=st.integers(2, 4),
        rms_norm_eps=st.sampled_from([1e-6, 1e-2]),
        rope_parameters=st.sampled_from([{"rope_type": "default", "rope_theta": t} for t in (2.0, 100.0, 1e4)]),
        position_embedding_size=st.just(32),
        use_clipped_linears=st.booleans(),
        standardize=st.booleans(),
    )


# Every example is compiled: a failing one is not made smaller, which takes minutes.
@settings(max_examples=3, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    configs(),
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=3),
    st.booleans(),
    st.integers(0, 99),
)
def test_any_sizes_and_gradients_in_float64(keys, shapes, remat, seed):
    """Towers of any shape with random weights, on images of any grids and one that is padding alone."""
    raw = {"model_type": "gemma4", "vision_config": keys, "text_config": {"hidden_size": 7}}
    config, generator = VisionConfig.from_dict(raw), torch.Generator().manual_seed(seed)
    theirs, k = encoder.Vision(config).double(), config.pooling_kernel_size
    theirs.reset_rope(torch.float64, "cpu")
    for name, t in theirs.state_dict().items():
        t.copy_(torch.randn(t.shape, generator=generator, dtype=torch.float64))
        if name.endswith(("_min", "_max")):
            t.abs_().mul_(-1 if name.endswith("_min") else 1)
    shapes = [*shapes, (0, 0)]
    positions = grid(shapes, k * k * max(w * h for w, h in shapes), k)
    size = (*positions.shape[:2], 3 * config.patch_size**2)
    pixels = torch.rand(size, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn((len(shapes), size[1] // k**2, 7), generator=generator, dtype=torch.float64)
    for row, (w, h) in zip(weight, shapes, strict=True):
        row[w * h :] = 0
    # PyTorch's softmax over nothing is NaN, and so is its gradient.
    soft = theirs(pixels[:-1], torch.from_numpy(positions[:-1]).long())
    (soft * weight[:-1]).sum().backward()
    with jax.enable_x64(True):
        model = load_tower(config, State(theirs.state_dict()))
        model.vision_tower.encoder.remat = remat
        assert {leaf.dtype for leaf in paths(model).values()} == {jnp.dtype("float64")}

        @nnx.jit
        def run(model, pixels, positions, weight):
            def loss(model, pixels):
                soft = model(pixels, positions)
                return (soft * weight).sum(), soft

            return nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True)(model, pixels)

        (_, got), (by_weight, by_pixel) = run(model, pixels.detach().numpy(), positions, weight.numpy())
    own = weight.numpy() != 0
    assert error(np.asarray(got)[own], (soft.detach())[weight[:-1] != 0]) < EXACT
    assert error(by_pixel[:-1], pixels.grad[:-1]) < EXACT
    assert not np.asarray(by_pixel[-1]).any()
    grads = {names.from_nnx(path): leaf for path, leaf in nnx.to_flat_state(by_weight)}
    assert set(grads) == {name for name, _ in theirs.named_parameters()}
    for name, parameter in theirs.named_parameters():
        got, want = np.asarray(grads[name][...]), parameter.grad.numpy()
        # One that the bounds let nothing through to is 0.
        assert np.linalg.norm(got - want) <= EXACT * max(np.linalg.norm(want), 1), name


def test_forced_values_reach(tiny_images):
    """Each forced tap changes what comes after it and nothing before."""
    config = replace(VisionConfig.from_file(tiny_images("31B")), num_hidden_layers=1)
    k = config.pooling_kernel_size
    positions = grid([(3, 2), (1, 4)], 6 * k * k, k)
    pixels = np.random.default_rng(0).random((2, 6 * k * k, 3 * config.patch_size**2), np.float32)
    run, order = Tapped(Vision(config, rngs=nnx.Rngs(0))), taps.vision_tap_names(config)

    def record(forced: dict[str, Tensor]) -> dict[str, Tensor]:
        recorder = taps.Recorder(2, 6 * k * k, forced=forced)
        run(recorder, pixels, positions)
        assert set(recorder.order) == set(order)
        return recorder.values

    clean = record({})
    sizes = {name: value.isfinite().flatten(2).all(-1).sum(dim=1).tolist() for name, value in clean.items()}
    pooled = order[order.index("vision.pool") :]
    assert sizes == {name: [6, 4] if name in pooled else [6 * k * k, 4 * k * k] for name in order}
    for i, name in enumerate(order):
        changed = record({name: clean[name].nan_to_num() * 1.1 + 0.1})
        for j, other in enumerate(order):
            # q, k and v do not depend on each other.
            beside = name[:-1] == other[:-1] and {name[-1], other[-1]} <= {*"qkv"}
            untouched = j <= i or beside
            same = torch.equal(changed[other].nan_to_num(), clean[other].nan_to_num())
            assert same is untouched, (name, other)


@pytest.mark.parametrize(
    ("pixels", "positions", "message"),
    [
        ((2, 9, 48), (2, 9, 3), r"positions must be integers of shape \(2, 9, 2\)"),
        ((2, 9, 47), (2, 9, 2), r"pixel_values must be \[I, P, 48\], got shape \(2, 9, 47\)"),
        ((9, 48), (9, 2), r"pixel_values must be \[I, P, 48\]"),
        ((2, 10, 48), (2, 10, 2), "10 patches are no multiple of 3 x 3"),
    ],
)
def test_shapes_are_checked(pixels, positions, message, tiny_images):
    model = abstract(VisionConfig.from_file(tiny_images("E2B")))
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(model, np.zeros(pixels, np.float32), np.zeros(positions, np.int32))


def test_positions_are_integers(tiny_images):
    model = abstract(VisionConfig.from_file(tiny_images("E2B")))
    with pytest.raises(ValueError, match="positions must be integers"):
        nnx.eval_shape(model, np.zeros((2, 9, 48), np.float32), np.zeros((2, 9, 2), np.float32))
