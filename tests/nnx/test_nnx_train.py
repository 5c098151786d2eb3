"""Training hooks: masks and the loss against their definitions, gradients, rematerialisation, a few training steps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma4_impl.config import FULL, SLIDING, TextConfig
from gemma4_impl.nnx import train
from gemma4_impl.nnx.decoder import Gemma4
from gemma4_impl.nnx.soft_tokens import SoftTokens, image_slots
from gemma4_impl.nnx.vision import Constant, Vision
from gemma4_impl.vision.config import VisionConfig
from tests.configs import hub

CONFIG = TextConfig.from_dict(hub(num_hidden_layers=2, layer_types=[SLIDING, FULL], num_kv_shared_layers=0))
DENSE = dataclasses.replace(CONFIG, enable_moe_block=False)
EPS = float(np.finfo(np.float32).eps)
B, T = 2, 12
DTYPES = st.sampled_from(["float32", "bfloat16"])


def made(config: TextConfig = DENSE, **options: object) -> Gemma4:
    return Gemma4(config, rngs=nnx.Rngs(0), **options)


def drawn(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(4, CONFIG.vocab_size, shape).astype(np.int32)


# Masks

rows = st.lists(
    st.tuples(st.integers(0, 3), st.lists(st.integers(1, 5), max_size=3), st.booleans()), min_size=B, max_size=B
)


@settings(max_examples=40, deadline=None)
@given(rows, st.lists(st.booleans(), min_size=B * T, max_size=B * T), st.booleans())
def test_a_mask_is_its_definition(rows, image, bidirectional):
    """Each row is padding on one side or both and sequences that are packed into what is left."""
    segments, positions = np.zeros((B, T), int), np.full((B, T), -1)
    for b, (before, lengths, _) in enumerate(rows):
        at = before
        for number, length in enumerate(lengths):
            part = slice(at, min(at + length, T))
            segments[b, part], positions[b, part] = number, np.arange(part.stop - part.start)
            at = part.stop
    image = np.reshape(image, (B, T)) & (positions >= 0)
    # An image belongs to one sequence.
    image &= positions != 0
    soft = SoftTokens(image, np.zeros((B, T, 1), np.float32), bidirectional)
    found = train.get_attention_mask(CONFIG, jnp.asarray(positions), images=soft, segments=jnp.asarray(segments))
    assert set(found) == {SLIDING, FULL}
    for kind, mask in found.items():
        wanted = np.zeros((B, T, T), bool)
        for b, t, s in np.ndindex(B, T, T):
            if positions[b, t] < 0:
                wanted[b, t, s] = True
            elif positions[b, s] >= 0 and segments[b, t] == segments[b, s]:
                together = bidirectional and kind == SLIDING and image[b, min(t, s) : max(t, s) + 1].all()
                near = kind == FULL or t - s < CONFIG.sliding_window
                wanted[b, t, s] = (s <= t or together) and near
        assert np.array_equal(mask[:, 0], wanted), kind


@settings(max_examples=30, deadline=None)
@given(st.lists(st.booleans(), min_size=B * T, max_size=B * T))
def test_positions_count_what_is_no_padding(valid):
    valid = np.reshape(valid, (B, T))
    found = np.asarray(train.get_positions(jnp.asarray(valid)))
    for own, row in zip(valid, found, strict=True):
        assert (row[~own] == -1).all()
        assert row[own].tolist() == list(range(own.sum()))


def test_packed_sequences_are_as_if_each_were_alone():
    model, tokens = made(), drawn(1, 1, T)
    segments = np.array([[0] * 7 + [1] * 5])
    positions = np.concatenate([np.arange(7), np.arange(5)])[None]
    apart = np.zeros((2, T), np.int32)
    apart[0, :7], apart[1, :5] = tokens[0, :7], tokens[0, 7:]
    at = train.get_positions(jnp.arange(T) < jnp.array([[7], [5]]))
    # One shape, compiled once: what is packed is a row of two, the other being all padding.
    packed, nothing = np.concatenate([tokens, tokens]), jnp.full((1, T), -1)
    positions = jnp.concatenate([jnp.asarray(positions), nothing])
    segments = jnp.concatenate([jnp.asarray(segments), nothing])

    @nnx.jit
    def run(model: Gemma4, tokens: jax.Array, positions: jax.Array, mask: dict) -> tuple[jax.Array, jax.Array]:
        logits, _ = model(tokens, positions, mask=mask)
        return logits, train.loss(logits, tokens, train.get_targets(positions))

    together, loss = run(model, packed, positions, train.get_attention_mask(DENSE, positions, segments=segments))
    alone, wanted = run(model, apart, at, train.get_attention_mask(DENSE, at))
    each = jnp.concatenate([alone[0, :7], alone[1, :5]])
    # Sums over other keys that count nothing, in two layers.
    assert jnp.abs(together[0] - each).max() < 1e3 * EPS * jnp.abs(each).max()
    assert abs(loss - wanted) < 1e3 * EPS * wanted


# The loss


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 99),
    st.lists(st.booleans(), min_size=B * T, max_size=B * T),
    DTYPES,
)
def test_the_loss_is_its_formula(seed, targets, dtype):
    logits = jnp.asarray(20 * np.random.default_rng(seed).standard_normal((B, T, 7)), dtype)
    tokens, targets = drawn(seed, B, T) % 7, np.reshape(targets, (B, T))
    z = np.asarray(logits, np.float64)
    each = [
        np.log(np.exp(z[b, t - 1]).sum()) - z[b, t - 1, tokens[b, t]]
        for b, t in np.ndindex(B, T)
        if t and targets[b, t]
    ]
    found = train.loss(logits, tokens, jnp.asarray(targets))
    assert found.dtype == jnp.float32
    # In float32 whatever the logits: sums of values of up to 100.
    assert abs(found - np.mean(each or [0])) < 100 * 16 * EPS
    total = targets[:, 1:].sum()
    parts = [train.loss(logits[b : b + 1], tokens[b : b + 1], jnp.asarray(targets[b : b + 1]), total) for b in range(B)]
    assert not total or abs(sum(parts) - found) < 100 * 16 * EPS


def test_padding_and_images_are_no_targets():
    positions = np.array([[-1, -1, 0, 1, 2, 3], [0, 1, 2, 0, 1, -1]])
    wanted = [[False] * 3 + [True] * 3, [False, True, True, False, True, False]]
    assert train.get_targets(positions).tolist() == wanted
    image = np.zeros((2, 6), bool)
    image[0, 4] = True
    wanted[0][4] = False
    assert train.get_targets(positions, SoftTokens(image, np.zeros((2, 6, 1)), False)).tolist() == wanted


# Gradients


def values(gradients: nnx.State) -> dict[tuple, np.ndarray]:
    return {path: np.asarray(leaf[...], np.float64) for path, leaf in nnx.to_flat_state(gradients)}


def relative(got: dict, want: dict) -> float:
    """The largest error of any parameter, of which the last layer's scalar is none: a norm follows, and next to nothing
    is left of its gradient."""
    assert got.keys() == want.keys()
    some = [path for path in want if path[-1] != "layer_scalar"]
    return max(np.linalg.norm(got[path] - want[path]) / np.linalg.norm(want[path]) for path in some)


def test_padding_adds_nothing_to_any_gradient():
    """Not even NaN, which a softmax over nothing would leave; nor does a batch that has no target."""
    graphdef, state = nnx.split(made())
    tokens = drawn(2, 2, T)

    @jax.jit
    def gradients(tokens: jax.Array, positions: jax.Array, targets: jax.Array) -> nnx.State:
        return jax.grad(lambda s: train.next_token_loss(nnx.merge(graphdef, s), tokens, positions, targets))(state)

    found = []
    for fill, start in ((0, 0), (9, 3)):
        padded = np.full((2, T), fill, np.int32)
        padded[0], padded[1, start : start + 8] = tokens[0], tokens[1, :8]
        inside = (jnp.arange(T) >= start) & (jnp.arange(T) < start + 8)
        positions = train.get_positions(jnp.stack([jnp.ones(T, bool), inside]))
        found.append(values(gradients(padded, positions, train.get_targets(positions))))
    assert all(np.isfinite(value).all() for value in found[1].values())
    assert relative(found[1], found[0]) < 1e4 * EPS
    nothing = jnp.full((2, T), -1)
    found = values(gradients(tokens, nothing, train.get_targets(nothing)))
    assert all((value == 0).all() for value in found.values())


def test_remat_gives_the_same_gradients_and_keeps_less():
    tokens, found, kept = drawn(4, 1, T), [], []
    for remat in (False, True):
        graphdef, state = nnx.split(made(remat=remat))

        def loss(state: nnx.State, tokens: jax.Array, graphdef: nnx.GraphDef = graphdef) -> jax.Array:
            return train.next_token_loss(nnx.merge(graphdef, state), tokens)

        found.append(values(jax.jit(jax.grad(loss))(state, tokens)))
        long = jax.ShapeDtypeStruct((1, 128), np.int32)
        # What the forward pass hands to the backward pass. XLA's own figure shows it on an accelerator only: on the CPU
        # it computes everything again at once.
        residuals = jax.eval_shape(lambda s, t, loss=loss: jax.vjp(lambda s: loss(s, t), s)[1], state, long)
        kept.append(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(residuals)))
    assert relative(*found) < 1e3 * EPS
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert kept[1] - weights < (kept[0] - weights) / 3, kept


# Images


def test_gradients_flow_through_vision_and_merge():
    config = VisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        head_dim=8, text_hidden_size=CONFIG.hidden_size, patch_size=2, pooling_kernel_size=2, standardize=True,
        position_embedding_size=8, image_token_id=5, use_bidirectional_attention="vision",
    )  # fmt: skip
    text, vision = made(), Vision(config, rngs=nnx.Rngs(1))
    y, x = np.divmod(np.arange(16), 4)
    patches = np.stack([x, y], axis=-1)[None].astype(np.int32)
    pixels = np.random.default_rng(5).random((1, 16, 12), np.float32)
    tokens = np.array([[2, 9, 5, 5, 5, 5, 11, 12, 13]], np.int32)
    slots = image_slots(tokens, 5, [4], 4)
    loss = nnx.value_and_grad(train.multimodal_loss, argnums=(0, 1))
    value, (by_text, by_vision) = nnx.jit(loss)(text, vision, tokens, pixels, patches, slots)
    assert np.isfinite(value)
    for model, found in ((text, by_text), (vision, by_vision)):
        leaves = dict(nnx.to_flat_state(found))
        assert leaves.keys() == dict(nnx.to_flat_state(nnx.state(model, nnx.Param))).keys()
        for path, leaf in leaves.items():
            assert np.isfinite(leaf[...]).all(), path
            assert np.abs(leaf[...]).max() > 0, path
    assert dict(nnx.to_flat_state(nnx.state(vision, Constant)))
    # The image tokens themselves are looked at by nobody, nor predicted.
    assert (by_text.embed_tokens_per_layer.weight[...][5] == 0).all()


# Training


def test_a_few_steps_learn_a_batch():
    """Adam in plain JAX: every parameter is trained, in float32, by what is computed in bfloat16."""
    graphdef, state = nnx.split(made(dtype="bfloat16"))
    tokens = jnp.asarray(drawn(6, 2, 16))

    @jax.jit
    def step(state, first, second, number):
        objective = jax.value_and_grad(lambda state: train.next_token_loss(nnx.merge(graphdef, state), tokens))
        loss, gradient = objective(state)
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, gradient)
        second = jax.tree.map(lambda v, g: 0.99 * v + 0.01 * g * g, second, gradient)

        def moved(p, m, v):
            m, v = m / (1 - 0.9**number), v / (1 - 0.99**number)
            return p - 0.02 * m / (jnp.sqrt(v) + 1e-8)

        return jax.tree.map(moved, state, first, second), first, second, loss

    before = state
    first = second = jax.tree.map(jnp.zeros_like, state)
    losses = []
    for number in range(1, 26):
        state, first, second, loss = step(state, first, second, number)
        losses.append(float(loss))
    # Untrained, it knows no better than to guess.
    assert abs(losses[0] - np.log(CONFIG.vocab_size)) < 1.5
    assert losses[-1] < 0.1 * losses[0], losses
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(state), strict=True):
        assert old.dtype == new.dtype == np.float32
        assert (old != new).any()
