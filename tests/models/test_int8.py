"""int8 weights: what quantisation does to one matrix, and to the default model's tokens, kept set and answers."""

import dataclasses

import bounds
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from model_files import GOLDEN
from model_outputs import hidden_states, top1_and_last_logits

from gemfilter_jax import pipeline
from gemfilter_jax.checkpoints.hf_folder import HuggingFaceFolder
from gemfilter_jax.checkpoints.weights import Loading
from gemfilter_jax.evals.tasks import needles
from gemfilter_jax.models.transformer import Decoder


@pytest.fixture(scope="module")
def int8():
    return pipeline.load("smollm2", dtype="float32", weights="int8")


def bytes_held(model) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(model))


@pytest.mark.parametrize("variant", ["llama_mha_untied", "phi3_sliding"])
def test_symmetric_with_a_scale_for_each_output(variant):
    folder = HuggingFaceFolder(GOLDEN / variant)
    whole, small = (folder.decoder(Loading(jnp.dtype(jnp.float32), int8=int8)) for int8 in (False, True))
    for name in ("query", "key", "value", "output", "gate", "up", "down"):
        kernel = np.asarray(getattr(whole.layers, name).kernel[...])
        held = getattr(small.layers, name)
        steps, scales = np.asarray(held.kernel[...]), np.asarray(held.scale[...])
        assert steps.dtype == np.int8
        assert scales.dtype == np.float32
        np.testing.assert_allclose(scales, np.abs(kernel).max(axis=1) / 127, rtol=1e-6)
        assert (np.abs(steps).max(axis=1) == 127).all()
        assert (np.abs(steps * scales[:, None] - kernel) <= scales[:, None] * 0.5001).all()
    assert small.lm_head.kernel[...].dtype == jnp.int8
    np.testing.assert_array_equal(small.embedding[...], whole.embedding[...])


def test_bytes_on_the_device(smollm2, int8):
    """A matrix's number takes one byte in place of four here, of two in bfloat16."""
    matrices = 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)
    scales = 30 * (2 * 576 + 2 * 192 + 2 * 1536 + 576)
    saved = bytes_held(smollm2.checkpoint.model) - bytes_held(int8.checkpoint.model)
    assert saved == 3 * matrices - 4 * scales


def test_the_likeliest_token_is_the_same_at_97_percent_of_positions(int8):
    with np.load(GOLDEN / "smollm2_top1.npz") as expected:
        top1, _ = top1_and_last_logits(int8.checkpoint.model, expected["ids"])
        assert np.mean(np.asarray(top1) == expected["top1"]) >= 0.97


@pytest.mark.parametrize("weights", ["float", "int8"])
def test_products_in_int8(weights):
    """A row's numbers have one scale, an output's weights another; what is held as int8 is taken as it is."""
    model = Decoder(tiny.CONFIG, int8=weights == "int8", rngs=nnx.Rngs(0))
    linear, held = model.in_int8().layer(1).gate, model.layer(1).gate
    x = np.random.default_rng(0).normal(size=(2, 3, tiny.CONFIG.width)).astype(np.float32)
    x[0, 1] *= 1000
    x[1, 2] = 0
    kernel = np.asarray(held.kernel[...], np.float64)
    if weights == "int8":
        steps, scale = kernel, np.asarray(held.scale[...], np.float64)
    else:
        scale = np.abs(kernel).max(axis=0) / 127
        steps = np.rint(kernel / scale)
    row_scale = np.maximum(np.abs(x).max(axis=-1, keepdims=True), 1e-30) / np.float32(127)
    expected = np.rint(x / row_scale).astype(np.float64) @ steps * row_scale * scale
    # Sums are of whole numbers below 2^24, and exact; three products with scales and their quotients are rounded.
    assert 127**2 * tiny.CONFIG.width < 2**24
    np.testing.assert_allclose(linear(jnp.asarray(x)), expected, rtol=bounds.of_sum(6, 1.0), atol=0)


def test_a_model_in_int8_leaves_the_first_as_it_was(smollm2):
    model = smollm2.checkpoint.model
    ids, lengths = jnp.arange(64)[None], jnp.array([64])
    before, rounded, after = (hidden_states(one, ids, lengths, 4) for one in (model, model.in_int8(), model))
    np.testing.assert_array_equal(before, after)
    difference = np.linalg.norm(rounded - before, axis=-1) / np.linalg.norm(before, axis=-1)
    assert 0.001 < np.median(difference) < 0.1


def test_kept_set_and_answer(smollm2, int8):
    case = next(needles.Needles(needles.NEEDLES[1:], depths=(0.5,)).examples(smollm2.checkpoint.tokenizer, 1024))
    method = dataclasses.replace(smollm2.method(keep=256), filter_precision="float")  # so that weights alone differ
    whole, small = (
        model.generate(case.text, case.question, method=method, max_new_tokens=16) for model in (smollm2, int8)
    )
    assert small.text == whole.text
    assert case.references[0] in small.text
    assert len(set(whole.selection.indices) & set(small.selection.indices)) >= 0.9 * 256
