"""Methods that evict keys and values, against the reference implementations' data and PyTorch's on tiny models.

golden/make_compressed.py says what PyTorch computed.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from model_files import FLOAT32, GOLDEN

from gemfilter_jax.checkpoints.hf_folder import HuggingFaceFolder
from gemfilter_jax.errors import UserError
from gemfilter_jax.generate import loop
from gemfilter_jax.generate.sampling import GREEDY
from gemfilter_jax.methods import selection
from gemfilter_jax.methods.eviction import EvictingMethod
from gemfilter_jax.methods.fastkv import FastKV
from gemfilter_jax.methods.h2o import H2O
from gemfilter_jax.methods.snapkv import SnapKV
from gemfilter_jax.methods.streaming_llm import StreamingLLM
from gemfilter_jax.models.hooks import Visit

_OFFICIAL = np.load(GOLDEN / "official_selection.npz")
_PYTORCH = np.load(GOLDEN / "compressed.npz")
_MODELS = sorted({name.split("/")[0] for name in _PYTORCH.files})
_OFTEN = ("llama_gqa_tied", "ministral_mixed", "phi3_sliding", "qwen3_norms")  # the others run with exhaustive tests
_PROMPTS = ("0", "1", "2")
_CAPACITY, _NEW = 48, 12
_METHODS: dict[str, EvictingMethod] = {
    "streaming_llm": StreamingLLM(_CAPACITY),
    "snapkv": SnapKV(_CAPACITY, observation_window=16),
    "snapkv_max": SnapKV(_CAPACITY, observation_window=8, pooling="max", pool_size=7),
    "h2o": H2O(_CAPACITY),
    "fastkv": FastKV(_CAPACITY, filter_layer=1, propagated_share=0.5),
}


def _prefill(model, prompts: list[np.ndarray], method: EvictingMethod | None) -> loop.DecodeState:
    ids, lengths = loop.pad(prompts, max(map(len, prompts)) + 7)
    return loop.prefill(
        model,
        ids,
        lengths,
        jnp.arange(ids.shape[1])[None].repeat(len(ids), axis=0),
        stop_tokens=jnp.array([-1]),
        sampling=jax.tree.map(jnp.float32, GREEDY),
        seeds=jnp.zeros(len(ids), jnp.uint32),
        limit=_NEW,
        capacity=_NEW,
        eviction=method,
    )


def _marked(model: str):
    return model if model in _OFTEN else pytest.param(model, marks=pytest.mark.exhaustive)


@pytest.fixture(scope="module", params=map(_marked, _MODELS))
def variant(request):
    return request.param, HuggingFaceFolder(GOLDEN / request.param).decoder(FLOAT32)


@pytest.mark.parametrize("name", _METHODS)
def test_a_ragged_batch_keeps_and_answers_what_pytorch_does(variant, name):
    """One prompt is far above the capacity, one above it, one below it."""
    folder, model = variant
    prompts = [_PYTORCH[f"{folder}/ids/{prompt}"].astype(np.int32) for prompt in _PROMPTS]
    state = _prefill(model, prompts, _METHODS[name])
    positions = np.asarray(state.cache.positions)
    answers = np.asarray(loop.decode(model, state).tokens)
    for row, prompt in enumerate(_PROMPTS):
        kept = _PYTORCH[f"{folder}/{name}/{prompt}/kept"]
        held = positions[:, row, :, : kept.shape[-1]]
        np.testing.assert_array_equal(held, kept)
        assert (positions[:, row, :, kept.shape[-1] :] == -1).all()
        np.testing.assert_array_equal(answers[row], _PYTORCH[f"{folder}/{name}/{prompt}/greedy"])
    assert (answers[0] != _PYTORCH[f"{folder}/full/0/greedy"]).any()
    np.testing.assert_array_equal(answers[2], _PYTORCH[f"{folder}/full/2/greedy"])


@pytest.mark.parametrize("name", _METHODS)
def test_bytes_of_the_cache(name):
    """Those of the kept tokens and the answer alone: the prompt's length does not count."""
    method, config = _METHODS[name], tiny.CONFIG
    cache = _prefill(tiny.decoder(), [tiny.random_ids(length) for length in (200, 60)], method).cache
    numbers = config.layers * 2 * (_CAPACITY + _NEW) * config.kv_heads * config.head_width
    assert cache.keys.nbytes == cache.values.nbytes == 4 * numbers
    assert cache.lengths.tolist() == [_CAPACITY, _CAPACITY]


@pytest.mark.parametrize("method", [*_METHODS.values(), FastKV(120, filter_layer=3)], ids=str)
def test_a_capacity_of_the_prompt_changes_nothing(method):
    prompts = [tiny.random_ids(length) for length in (_CAPACITY, 31, 2)]
    state, full = _prefill(tiny.decoder(), prompts, method), _prefill(tiny.decoder(), prompts, None)
    np.testing.assert_array_equal(loop.decode(tiny.decoder(), state).tokens, loop.decode(tiny.decoder(), full).tokens)


def _visit(q: np.ndarray, k: np.ndarray) -> Visit:
    """A layer's queries [H, n, E] and keys [G, n, E] as a batch of one."""
    q, k = (jnp.asarray(x).swapaxes(0, 1)[None] for x in (q, k))
    return Visit(0, q, q, k, k, sliding_window=None, key_heads=k.shape[2])


@pytest.mark.parametrize("case", [0, 1])
def test_snapkv_keeps_what_the_reference_implementation_keeps(case):
    """But for ties: the greatest of neighbours is the same for several keys, of which any may be kept."""
    k, window = (_OFFICIAL[f"snapkv{case}_{name}"] for name in ("k", "q_window"))
    capacity, rows, pool_size = _OFFICIAL[f"snapkv{case}_capacity_window_kernel"].tolist()
    pooling = {"avgpool": "mean", "maxpool": "max"}[str(_OFFICIAL[f"snapkv{case}_pooling"])]
    q = np.concatenate([np.zeros((len(k), k.shape[1] - rows, k.shape[2]), np.float32), window], axis=1)
    method = SnapKV(capacity, observation_window=rows, pooling=pooling, pool_size=pool_size)
    lengths = jnp.array([k.shape[1]])
    kept = np.asarray(method.kept(_visit(q, k), lengths))[0]
    reference = np.sort(_OFFICIAL[f"snapkv{case}_kept"], axis=1)
    if pooling == "mean":
        np.testing.assert_array_equal(kept, reference)
        return
    before = np.asarray(method.scores(_visit(q, k), lengths))[0, :, : k.shape[1] - rows]
    pooled = np.asarray(selection.pool(before, pooling, pool_size))
    for head, (ours, theirs) in enumerate(zip(kept, reference, strict=True)):
        only_one_keeps = sorted(set(ours) ^ set(theirs))
        last = min(pooled[head][[key for key in theirs if key < k.shape[1] - rows]])
        assert (pooled[head][only_one_keeps] == last).all()


def test_h2o_keeps_what_the_reference_implementation_keeps():
    heavy, recent = _OFFICIAL["h2o0_heavy_recent"].tolist()
    kept = H2O(heavy + recent, recent=recent).kept(
        _visit(_OFFICIAL["h2o0_q"], _OFFICIAL["h2o0_k"]), jnp.array([_OFFICIAL["h2o0_k"].shape[1]])
    )
    np.testing.assert_array_equal(kept[0], np.sort(_OFFICIAL["h2o0_kept"], axis=1))


@pytest.mark.parametrize(
    ("length", "share", "go_on"),
    [(121, 0.5, 61), (75, 0.5, 48), (25, 0.5, 25), (1_000_000, 0.2, 200_000), (3_000_001, 0.999, 2_997_001)],
)
def test_so_many_tokens_go_on(length, share, go_on):
    assert FastKV(_CAPACITY, filter_layer=1, propagated_share=share).propagated_slots(length) == go_on


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (SnapKV(32), "observation_window is 32 and keep 32, which leaves no room for other tokens"),
        (H2O(10, recent=12), "recent is 12 and keep 10"),
        (FastKV(40, filter_layer=4), "filter layer 4 is out of range; the model has layers 0 to 3"),
        (FastKV(8, filter_layer=1), "observation_window is 8 and keep 8"),
    ],
)
def test_what_cannot_be_is_refused(method, words):
    with pytest.raises(UserError, match=words):
        method.check(tiny.decoder())
