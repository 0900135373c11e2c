"""Sampling draws from the distribution it names, and greedy is its limit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemfilter_jax.generate.sampling import Sampling, sample

_DRAWS = 4000
_LOGITS = np.log([0.4, 0.25, 0.15, 0.1, 0.06, 0.04]).astype(np.float32)[[3, 0, 5, 1, 4, 2]]

_sample = jax.jit(sample)


def _frequencies(sampling: Sampling) -> np.ndarray:
    keys = jax.random.split(jax.random.key(0), _DRAWS)
    drawn = np.asarray(_sample(np.tile(_LOGITS, (_DRAWS, 1)), sampling, keys))
    return np.bincount(drawn, minlength=len(_LOGITS)) / _DRAWS


def _softmax(logits: np.ndarray) -> np.ndarray:
    masses = np.exp(logits - logits.max())
    return masses / masses.sum()


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        pytest.param(Sampling(1.0), 6, id="temperature 1"),
        pytest.param(Sampling(0.5), 6, id="temperature 0.5"),
        pytest.param(Sampling(3.0), 6, id="temperature 3"),
        pytest.param(Sampling(1.0, top_k=3), 3, id="top_k 3"),
        pytest.param(Sampling(1.0, top_k=99), 6, id="top_k beyond the vocabulary"),
        pytest.param(Sampling(1.0, top_p=0.7), 3, id="top_p crossed by the third token"),
        pytest.param(Sampling(2.0, top_p=0.7), 4, id="top_p after temperature"),
        pytest.param(Sampling(1.0, top_k=3, top_p=0.45), 1, id="top_p of what top_k leaves"),
    ],
)
def test_frequencies_match_the_distribution(sampling, allowed):
    """Within four standard deviations of the softmax over the `allowed` likeliest tokens, and never another token."""
    likeliest = np.argsort(-_LOGITS)[:allowed]
    want = np.zeros(len(_LOGITS))
    want[likeliest] = _softmax(_LOGITS[likeliest] / sampling.temperature)
    deviation = np.sqrt(want * (1 - want) / _DRAWS)
    assert (np.abs(_frequencies(sampling) - want) <= 4 * deviation + 1e-6).all()


@pytest.mark.parametrize(
    "sampling",
    [
        pytest.param(Sampling(), id="temperature 0"),
        pytest.param(Sampling(1.0, top_k=1), id="top_k 1"),
        pytest.param(Sampling(1.0, top_p=1e-6), id="tiny top_p"),
        pytest.param(Sampling(1.0, top_p=0.0), id="top_p 0"),
        pytest.param(Sampling(1e-4), id="tiny temperature"),
    ],
)
def test_greedy_is_the_limit(sampling):
    logits = np.random.default_rng(0).normal(size=(64, 50)).astype(np.float32)
    drawn = _sample(logits, sampling, jax.random.split(jax.random.key(0), len(logits)))
    np.testing.assert_array_equal(drawn, logits.argmax(axis=1))


def test_a_row_draws_by_its_own_key():
    logits = jnp.zeros((3, 1000))
    keys = jax.random.split(jax.random.key(0), 3)
    drawn = _sample(logits, Sampling(1.0), keys)
    np.testing.assert_array_equal(_sample(logits, Sampling(1.0), keys[::-1]), drawn[::-1])
    assert len(set(drawn.tolist())) == 3
