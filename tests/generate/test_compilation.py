"""One set of compiled programs serves every setting within its buckets, and stage 1 stays small."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from gemfilter_jax.generate import loop
from gemfilter_jax.generate.sampling import GREEDY, Sampling
from gemfilter_jax.methods.gemfilter import filtering, scoring_pass
from gemfilter_jax.methods.gemfilter.method import GemFilter
from gemfilter_jax.methods.gemfilter.scoring_pass import ScoringPass

_COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """Grows by one with every program that XLA compiles."""
    seen: list[str] = []

    def listen(event: str, seconds: float, **_) -> None:
        if event == _COMPILED:
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


def _run(lengths: list[int], method: GemFilter, sampling: Sampling, *, seed: int, limit: int) -> None:
    """Both stages, with one streamed step, as the pipeline runs them."""
    model = tiny.decoder()
    prompts = [tiny.prompt_of(tiny.random_ids(length), prefix=3, suffix=4) for length in lengths]
    kept = [one.indices for one in filtering.keep_tokens(model, prompts, method)]
    ids, counts = loop.pad([prompt.ids[rows] for prompt, rows in zip(prompts, kept, strict=True)], 32)
    positions, _ = loop.pad(kept, 32)
    state = loop.prefill(
        model,
        ids,
        counts,
        positions,
        stop_tokens=jnp.asarray([-1, -1], jnp.int32),
        sampling=jax.tree.map(jnp.float32, sampling),
        seeds=jnp.asarray(np.arange(len(prompts)) + seed, jnp.uint32),
        limit=jnp.int32(limit),
        capacity=16,
    )
    state = loop.decode(model, loop.decode_step(model, state))
    assert np.asarray(state.lengths).tolist() == [limit] * len(prompts)


def _method(filter_layer: int, keep: int, head_weights: tuple[float, ...] | None = None) -> GemFilter:
    return GemFilter(filter_layer=filter_layer, keep=keep, head_weights=head_weights, observation_window=8, chunk=4)


def test_settings_within_a_bucket_compile_nothing(compilations):
    _run([64, 50, 64, 64], _method(1, 32), GREEDY, seed=0, limit=16)
    compilations.clear()
    _run([49, 64, 33, 60], _method(3, 25), Sampling(0.7, top_k=5, top_p=0.9), seed=9, limit=9)
    _run([50, 60, 30, 49], _method(0, 28, (0.0, 1.0, 0.5, 0.0)), Sampling(1.3), seed=2**31, limit=12)
    assert not compilations
    _run([65, 64, 64, 64], _method(1, 32), GREEDY, seed=0, limit=16)
    assert compilations


def test_segments_within_a_bucket_compile_nothing(compilations):
    def keep(length: int, method: GemFilter) -> None:
        filtering.keep_tokens(tiny.decoder(), [tiny.prompt_of(tiny.random_ids(length), 3, 4)], method)

    keep(2000, _method(1, 32))
    keep(1650, _method(1, 32))  # segments that are left over pass one by one
    compilations.clear()
    keep(1700, _method(2, 25))
    keep(1999, _method(3, 28, (0.0, 1.0, 0.0, 0.0)))
    assert not compilations


@pytest.mark.parametrize("normalisation", ["none", "softmax"])
def test_stage_1_makes_no_square_array(normalisation):
    """All temporaries of the compiled filter pass together are smaller than an S x S array of single bytes."""
    length = 8192
    one = jax.ShapeDtypeStruct((1,), jnp.int32)
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
    scoring = ScoringPass(
        jnp.int32(2), jnp.array([2]), jnp.ones((1, tiny.CONFIG.heads)), None, 32, normalisation, int8=False
    )
    program = scoring_pass.score_prompt.lower(tiny.decoder(), ids, one, one, scoring).compile()
    assert program.memory_analysis().temp_size_in_bytes < length**2
