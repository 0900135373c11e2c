"""A model whose layers have arrays of their own does what the stacked one does, which it takes its arrays from."""

import bounds
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from gemfilter_jax.generate import loop
from gemfilter_jax.generate.sampling import Sampling
from gemfilter_jax.methods.gemfilter import scoring_pass
from gemfilter_jax.methods.gemfilter.method import GemFilter
from gemfilter_jax.models.transformer import Decoder

_LENGTH = 40


def _model(*, int8: bool = False) -> Decoder:
    return Decoder(tiny.CONFIG, int8=int8, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("precision", ["float", "int8"])
def test_the_filter_scores_alike(precision):
    method = GemFilter(filter_layer=3, keep=8, heads=("1/0", "3/2"), filter_precision=precision)
    suffix_lengths = np.array([12], np.int32)
    scoring = scoring_pass.ScoringPass.of(method, tiny.CONFIG.heads, document=28, suffix_lengths=suffix_lengths)
    ids, lengths = loop.pad([tiny.random_ids(_LENGTH)], _LENGTH)
    of_stacked, of_own = (
        np.asarray(scoring_pass.score_prompt(model, ids, lengths, jnp.asarray(suffix_lengths), scoring))
        for model in (_model(), _model().unstacked())
    )
    # The same operations on the same numbers; XLA may fuse them in another way, and sum in another order.
    np.testing.assert_allclose(of_own, of_stacked, rtol=bounds.of_sum(1000, 1.0), atol=0)


@pytest.mark.parametrize("int8", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_it_writes_the_same_tokens(int8):
    ids, lengths = loop.pad([tiny.random_ids(_LENGTH), tiny.random_ids(25)], _LENGTH)
    written = []
    for model in (_model(int8=int8), _model(int8=int8).unstacked()):
        state = loop.prefill(
            model,
            ids,
            lengths,
            jnp.tile(jnp.arange(_LENGTH), (2, 1)),
            stop_tokens=jnp.asarray([-1]),
            sampling=jax.tree.map(jnp.float32, Sampling(temperature=1.0)),
            seeds=jnp.zeros(2, jnp.uint32),
            limit=jnp.int32(12),
            capacity=16,
        )
        written.append(np.asarray(loop.decode(model, state).tokens)[:, :12])
    np.testing.assert_array_equal(*written)
    assert len(np.unique(written[0])) > 6


def test_it_holds_the_arrays_once():
    model = _model()
    stacks = jax.tree.leaves(model.layers)
    layers = [[np.asarray(stack[layer]) for stack in stacks] for layer in range(tiny.CONFIG.layers)]
    own = model.unstacked()
    assert all(stack.is_deleted() for stack in stacks)
    for layer, expected in zip(own.layers, layers, strict=True):
        for array, wanted in zip(jax.tree.leaves(layer), expected, strict=True):
            np.testing.assert_array_equal(array, wanted)
