"""The decoder computes what Hugging Face computes in PyTorch: for stored results, and live where PyTorch is."""

import functools
import json

import bounds
import jax
import model_outputs
import numpy as np
import pytest
from model_files import FLOAT32, GOLDEN

from gemfilter_jax.checkpoints.hf_folder import HuggingFaceFolder
from gemfilter_jax.config import ModelConfig
from gemfilter_jax.generate import loop
from gemfilter_jax.generate.sampling import GREEDY
from gemfilter_jax.models import filter_view
from gemfilter_jax.models.cache import KVCache
from gemfilter_jax.models.families import FAMILIES
from gemfilter_jax.models.transformer import Decoder

VARIANTS = sorted(path.parent.name for path in GOLDEN.glob("*/expected.npz"))
SHORT = slice(60, 133)  # of the prompt: a second one
POSITIONS = 200  # of the prompt


def _program(method, **jit_options):
    """A jitted method that returns numpy arrays: indexing those compiles nothing."""
    jitted = jax.jit(method, **jit_options)
    return lambda *args, **kwargs: jax.device_get(jitted(*args, **kwargs))


hidden_states = _program(model_outputs.hidden_states)


def _keys_and_last_queries(model, ids, lengths, layer, observation_window):
    x = model_outputs.hidden_states(model, ids, lengths, layer)
    return filter_view.keys_and_last_queries(model, x, lengths, layer, observation_window)


keys_and_last_queries = _program(_keys_and_last_queries, static_argnames="observation_window")
prefill = _program(Decoder.prefill)
logits = _program(Decoder.logits)


@functools.cache
def load(variant: str) -> tuple[Decoder, dict[str, np.ndarray]]:
    """A golden folder's model and what make_models.py stored with it."""
    folder = GOLDEN / variant
    with np.load(folder / "expected.npz") as stored:
        assert len(stored["ids"]) == POSITIONS
        return HuggingFaceFolder(folder).decoder(FLOAT32), dict(stored)


def batch(*prompts: np.ndarray, width: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded ids [B, S] and lengths [B]; padding is a real token, so that whoever reads it is found out."""
    width = width or max(map(len, prompts))
    ids = np.stack([np.pad(prompt, (0, width - len(prompt)), constant_values=1) for prompt in prompts])
    return ids.astype(np.int32), np.array([len(prompt) for prompt in prompts], np.int32)


def both(expected: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The prompt and the shorter one as a batch."""
    return batch(expected["ids"], expected["ids"][SHORT])


def greedy(model: Decoder, ids: np.ndarray, lengths: np.ndarray, count: int) -> np.ndarray:
    """`count` greedy tokens for each row, which nothing ends."""
    positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    state = loop.prefill(
        model,
        ids,
        lengths,
        positions,
        stop_tokens=np.array([-1], np.int32),
        sampling=jax.tree.map(np.float32, GREEDY),
        seeds=np.zeros(len(ids), np.uint32),
        limit=count,
        capacity=count,
    )
    return np.asarray(loop.decode(model, state).tokens)


def assert_close(config: ModelConfig, actual, expected) -> None:
    """No element is further off than two orders of summation may be, over as many positions as the prompts have."""
    bound = bounds.of_decoder(config, POSITIONS, np.abs(expected).max())
    np.testing.assert_allclose(actual, expected, rtol=0, atol=bound)


def test_every_family_is_here():
    assert {json.loads((GOLDEN / v / "config.json").read_text())["model_type"] for v in VARIANTS} == set(FAMILIES)


@pytest.mark.parametrize("variant", VARIANTS)
def test_residual_stream_of_every_layer(variant):
    """Of a prompt longer and one shorter than the sliding windows and the thresholds of rotary scaling, padded."""
    model, expected = load(variant)
    for layers, (stream, short_stream) in enumerate(zip(expected["hidden"], expected["short_hidden"], strict=True)):
        x = hidden_states(model, *both(expected), layers)
        assert_close(model.config, x[0, expected["rows"]], stream)
        assert_close(model.config, x[1, expected["short_rows"]], short_stream)
    assert layers == model.config.layers


@pytest.mark.parametrize("variant", VARIANTS)
def test_keys_and_last_queries_of_every_layer(variant):
    model, expected = load(variant)
    window = expected["queries"].shape[1]
    for layer in range(model.config.layers):
        q, k, rows = keys_and_last_queries(model, *both(expected), layer, observation_window=window)
        assert_close(model.config, k[0, expected["rows"]].swapaxes(0, 1), expected["keys"][layer])
        assert_close(model.config, q[0], expected["queries"][layer])
        assert rows[0].tolist() == list(range(len(expected["ids"])))[-window:]


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits(variant):
    model, expected = load(variant)
    ids, lengths = both(expected)
    x = hidden_states(model, ids, lengths, model.config.layers)
    actual = logits(model, np.concatenate([x[0, expected["rows"]], x[1, expected["short_rows"]]]))
    assert_close(model.config, actual, np.concatenate([expected["logits"], expected["short_logits"]]))
    cache = KVCache.empty(model.config, 2, ids.shape[1], model.dtype)
    last, cache = prefill(model, ids, lengths, np.broadcast_to(np.arange(ids.shape[1]), ids.shape), cache)
    assert expected["rows"][-1] == len(expected["ids"]) - 1
    assert_close(model.config, last[0], expected["logits"][-1])
    assert_close(model.config, cache.keys[:, 0, expected["rows"]].swapaxes(1, 2), expected["keys"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens(variant):
    """Next to a shorter prompt, both padded: neither padding nor company may change a token."""
    model, expected = load(variant)
    tokens = greedy(model, *both(expected), len(expected["greedy"]))
    assert tokens[0].tolist() == expected["greedy"].tolist()
    assert tokens[1].tolist() == expected["short_greedy"].tolist()


def test_padding_and_company_change_nothing():
    """700 columns are two attention blocks, so prompts this short also skip a block that is padding for all."""
    model, expected = load("llama_gqa_llama3")
    prompts = [expected["ids"], expected["ids"][SHORT]]
    padded = batch(*prompts, width=700)
    layers = model.config.layers
    x = hidden_states(model, *padded, layers)
    q, k, rows = keys_and_last_queries(model, *padded, layers - 1, observation_window=8)
    for row, prompt in enumerate(prompts):
        alone = batch(prompt)
        assert_close(model.config, x[row, : len(prompt)], hidden_states(model, *alone, layers)[0])
        q_alone, k_alone, rows_alone = keys_and_last_queries(model, *alone, layers - 1, observation_window=8)
        assert_close(model.config, k[row, : len(prompt)], k_alone[0])
        assert_close(model.config, q[row], q_alone[0])
        assert rows[row].tolist() == rows_alone[0].tolist()


def test_live_against_pytorch(tmp_path):
    """Other head counts than the golden folders, and whatever release of PyTorch and transformers is installed."""
    torch = pytest.importorskip("torch")
    from golden import make_models

    torch.set_num_threads(1)  # its threads and XLA's would wait for each other
    theirs, prompt = make_models.clear_cut(
        model_type="llama",
        vocab_size=96,
        hidden_size=40,
        intermediate_size=72,
        num_hidden_layers=3,
        num_attention_heads=10,
        num_key_value_heads=5,
        head_dim=6,
        max_position_embeddings=512,
    )
    theirs.save_pretrained(tmp_path)
    ours = HuggingFaceFolder(tmp_path).decoder(FLOAT32)
    expected = make_models.forward(theirs, prompt["ids"])
    ids, lengths = batch(prompt["ids"])
    x = hidden_states(ours, ids, lengths, ours.config.layers)
    assert_close(ours.config, x[0], expected["hidden"][-1])
    assert_close(ours.config, logits(ours, x[0]), expected["logits"])
    assert greedy(ours, ids, lengths, len(prompt["greedy"]))[0].tolist() == prompt["greedy"].tolist()
