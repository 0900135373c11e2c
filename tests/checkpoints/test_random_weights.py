"""Models with random weights have the shapes, dtypes and layers of real ones, and run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from gemfilter_jax import pipeline
from gemfilter_jax.checkpoints import RandomWeights
from gemfilter_jax.checkpoints.weights import Loading, abstract_decoder
from gemfilter_jax.errors import UserError

CONFIG = dataclasses.replace(tiny.CONFIG, vocab=49152, context=1024)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("filter_layers", [None, 2])
def test_shapes_and_values(int8, filter_layers):
    loading = Loading(jnp.dtype("bfloat16"), int8=int8, filter_layers=filter_layers)
    made = RandomWeights(CONFIG, "tiny").decoder(loading)
    leaves, wanted = jax.tree.leaves(made), jax.tree.leaves(abstract_decoder(CONFIG, loading))
    assert [(leaf.shape, leaf.dtype) for leaf in leaves] == [(leaf.shape, leaf.dtype) for leaf in wanted]
    for leaf in leaves:
        values = np.asarray(leaf, np.float32)
        deviation = ((255**2 - 1) / 12) ** 0.5 if leaf.dtype == jnp.int8 else 0.02
        # Of n values the standard error of the deviation is under 1 / sqrt(2 n); five of them, and bfloat16's rounding.
        assert values.std() == pytest.approx(deviation, rel=5 / (2 * values.size) ** 0.5 + 2**-8)
        if values.ndim > 1:
            assert len({row.tobytes() for row in values}) == len(values)


def test_it_answers():
    model = pipeline.load(RandomWeights(CONFIG, "tiny"), dtype="float32")
    assert model.checkpoint.name == "tiny, random weights"
    result = model.generate(
        "The lamp is green. " * 60, "Which colour?", method=model.method("paper", keep=64), max_new_tokens=3
    )
    assert result.selection.kept_tokens == 64


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused():
    with pytest.raises(
        UserError, match="tiny: the vocabulary has 128 tokens; random weights need the default model's 49152"
    ):
        RandomWeights(tiny.CONFIG, "tiny")
