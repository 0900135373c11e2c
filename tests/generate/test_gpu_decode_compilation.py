"""Decoding compiled ahead of time for GPUs, with four layers of a published shape: how often weights move."""

import dataclasses
import functools

import gpu_compiler
import hlo_traffic
import jax
import jax.numpy as jnp
import pytest
from gpu_compiler import every_target

from gemfilter_jax.checkpoints.weights import Loading, abstract_decoder
from gemfilter_jax.generate import loop
from gemfilter_jax.methods.gemfilter.method import GemFilter
from gemfilter_jax.planning import models, programs
from gemfilter_jax.planning.programs import Request

_LAYERS, _KEPT, _NEW = 4, 1024, 128
_WHILE = """HloModule made_by_hand

%sliced (p0: f32[8,64], p1: s32[]) -> f32[1,64] {
  %p0 = f32[8,64]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice.1 = f32[1,64]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,64}
}

%updated (p0: f32[8,64], p1: f32[1,64], p2: s32[]) -> f32[8,64] {
  %p0 = f32[8,64]{1,0} parameter(0)
  %p1 = f32[1,64]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %update.1 = f32[8,64]{1,0} dynamic-update-slice(%p0, %p1, %p2, %zero)
}

%inner (state.1: (s32[], f32[8,64])) -> (s32[], f32[8,64]) {
  %state.1 = (s32[], f32[8,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state.1), index=0
  %x = f32[8,64]{1,0} get-tuple-element(%state.1), index=1
  %row = f32[1,64]{1,0} fusion(%x, %i), kind=kLoop, calls=%sliced
  %y = f32[8,64]{1,0} fusion(%x, %row, %i), kind=kLoop, calls=%updated
  ROOT %made = (s32[], f32[8,64]{1,0}) tuple(%i, %y)
}

%outer (state.2: (s32[], f32[8,64])) -> (s32[], f32[8,64]) {
  %state.2 = (s32[], f32[8,64]{1,0}) parameter(0)
  %loop = (s32[], f32[8,64]{1,0}) while(%state.2), body=%inner, backend_config={"known_trip_count":{"n":"5"}}
  %i.2 = s32[] get-tuple-element(%loop), index=0
  %x.2 = f32[8,64]{1,0} get-tuple-element(%loop), index=1
  %x.3 = f32[8,64]{1,0} copy(%x.2)
  ROOT %made.2 = (s32[], f32[8,64]{1,0}) tuple(%i.2, %x.3)
}

ENTRY %main (a: (s32[], f32[8,64])) -> (s32[], f32[8,64]) {
  %a = (s32[], f32[8,64]{1,0}) parameter(0)
  ROOT %out = (s32[], f32[8,64]{1,0}) while(%a), body=%outer
}
"""


def test_the_counter_counts_slices_updates_and_loops():
    """An iteration reads and writes a row twice, with an index each; the copy reads and writes eight rows."""
    row = 64 * 4
    assert hlo_traffic.per_iteration(_WHILE) == 5 * (2 * (2 * row + 4)) + 2 * 8 * row


@pytest.mark.exhaustive
@every_target
def test_a_token_moves_weights_and_cache_once(target):
    """An eighth more at most: of the smallest matrices, XLA writes the products before it sums them."""
    model, state = _model_and_state()
    unread = programs.bytes_on_device(model.embedding)
    needed = programs.bytes_on_device(model) - unread + programs.bytes_on_device(state.cache)
    program = gpu_compiler.compiled(__file__, target)["decode"]
    assert needed <= program["moved"] <= 1.125 * needed


@pytest.mark.exhaustive
@every_target
def test_the_cache_is_updated_in_place(target):
    _, state = _model_and_state()
    program = gpu_compiler.compiled(__file__, target)["decode"]
    assert program["aliased"] >= programs.bytes_on_device(state.cache)


@pytest.mark.exhaustive
@every_target
def test_a_token_is_one_graph(target):
    """The host launches one command buffer for each token; XLA's defaults suffice."""
    assert gpu_compiler.compiled(__file__, target)["decode"]["launches"] == ["kCommandBuffer"]


@functools.cache
def _model_and_state():
    config = dataclasses.replace(models.config_of("llama-3.1-8b"), layers=_LAYERS)
    model = gpu_compiler.unstacked(abstract_decoder(config, Loading(dtype=jnp.dtype(jnp.bfloat16))))
    request = Request(config, tokens=32768, method=GemFilter(filter_layer=1, keep=_KEPT), new_tokens=_NEW)
    return model, programs.decode(programs.prefill(model, request)).arguments[0]


def _decode(gpu: jax.sharding.Sharding) -> jax.stages.Lowered:
    return loop.decode.lower(*gpu_compiler.placed(_model_and_state(), gpu))


if __name__ == "__main__":
    gpu_compiler.main(iter([("decode", _decode)]), count_moved=True)
