"""Elementary functions are right to an ulp or two, do not lean to one side, and have finite gradients."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_impl.nnx import elementary

pytestmark = pytest.mark.usefixtures("optimized")

EPS = float(np.finfo(np.float32).eps)


def _draw(low: float, high: float) -> np.ndarray:
    return np.random.default_rng(0).uniform(low, high, 200_000).astype(np.float32)


def _errors(function: Callable, x: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Largest error in units of the last place, and the error that is a change of scale."""
    error = np.asarray(jax.jit(function)(x), np.float64) - truth
    return np.abs(error / np.spacing(np.abs(truth).astype(np.float32))).max(), float(error @ truth / (truth @ truth))


CASES = {
    "tanh of small": (elementary.tanh, jnp.tanh, np.tanh, _draw(-0.2, 0.2)),
    "tanh": (elementary.tanh, jnp.tanh, np.tanh, _draw(-4, 4)),
    "divide by 30": (lambda x: elementary.divide(x, 30), lambda x: x / 30, lambda x: x / 30, _draw(-100, 100)),
    "divide by 96": (lambda x: elementary.divide(x, 96), lambda x: x / 96, lambda x: x / 96, _draw(0, 100)),
    "rsqrt": (elementary.rsqrt, jax.lax.rsqrt, lambda x: x**-0.5, _draw(0.5, 2)),
}


@pytest.mark.parametrize("name", CASES)
def test_exact_to_two_ulps_and_without_bias(name: str) -> None:
    ours, _, exact, x = CASES[name]
    ulps, gain = _errors(ours, x, exact(x.astype(np.float64)))
    assert ulps <= 2
    # The mean of n independent roundings of up to an ulp, with the sixteen sigmas that a gain is granted in parity.
    assert abs(gain) < 16 * EPS / np.sqrt(len(x))


def test_what_xla_does_on_its_own_would_be_found() -> None:
    if jax.default_backend() != "cpu":
        pytest.skip("the biases are those of XLA's CPU backend")
    for name in ("tanh of small", "divide by 30"):  # rsqrt leans or not by the processor's own instruction
        _, theirs, exact, x = CASES[name]
        assert abs(_errors(theirs, x, exact(x.astype(np.float64)))[1]) > 16 * EPS / np.sqrt(len(x)), name


@pytest.mark.parametrize("x", [0.0, -0.0, 1e-30, -0.624, 0.626, -50.0, 1e4, -3e38])
def test_tanh_and_its_gradient_at_the_edges(x: float) -> None:
    value, slope = jax.value_and_grad(elementary.tanh)(jnp.float32(x))
    assert abs(float(value) - np.tanh(x)) <= 2 * EPS * abs(np.tanh(x))
    assert abs(float(slope) - (1 - np.tanh(x) ** 2)) <= 8 * EPS
    assert np.signbit(value) == np.signbit(x)


def test_tanh_of_what_is_no_number() -> None:
    assert np.isnan(elementary.tanh(jnp.float32(jnp.nan)))
    assert [float(elementary.tanh(jnp.float32(x))) for x in (jnp.inf, -jnp.inf)] == [1.0, -1.0]


def test_gelu_follows_its_formula() -> None:
    x = _draw(-6, 6)
    wide = x.astype(np.float64)
    truth = 0.5 * wide * (1 + np.tanh(np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3)))
    # 1 + tanh cancels where x < 0: the error is one of x, not of the result.
    assert np.abs(np.asarray(elementary.gelu(jnp.asarray(x))) - truth).max() <= 2 * EPS * 6


def test_float64_is_kept() -> None:
    with jax.enable_x64(True):
        x = jnp.linspace(-3, 3, 101)
        for function, exact in ((elementary.tanh, np.tanh), (lambda v: elementary.divide(v, 7), lambda v: v / 7)):
            assert function(x).dtype == jnp.float64
            assert np.abs(np.asarray(function(x)) - exact(np.asarray(x))).max() < 1e-15
