"""The filter compiled ahead of time for GPUs at a published shape: its memory."""

import dataclasses
import functools

import gpu_compiler
import jax
import jax.numpy as jnp
import pytest
from gpu_compiler import every_target

from gemfilter_jax.checkpoints.weights import Loading, abstract_decoder
from gemfilter_jax.methods import presets
from gemfilter_jax.models.transformer import Decoder
from gemfilter_jax.planning import models, programs
from gemfilter_jax.planning.programs import Request

_CONFIG = models.config_of("llama-3.1-8b")
_CARD = 80e9
_LENGTHS = (2**17, 2**20)
_FORMS = ("tri_shape", "dense")


@pytest.mark.exhaustive
@every_target
@pytest.mark.parametrize("form", _FORMS)
@pytest.mark.parametrize("tokens", _LENGTHS)
def test_no_array_of_all_tokens_is_held_twice(tokens, form, target):
    """Residual stream, queries and attention's results; keys and values; a layer's weights; and a tenth more."""
    program = gpu_compiler.compiled(__file__, target)[f"{form} {tokens}"]
    per_token = (_CONFIG.width + 2 * _CONFIG.heads * _CONFIG.head_width + 2 * _CONFIG.kv_heads * _CONFIG.head_width) * 2
    layer = programs.bytes_on_device(_model(_CONFIG.layers).layers[0])
    assert tokens * per_token < program["temporaries"] < 1.1 * (tokens * per_token + layer)
    if tokens == 2**17:
        assert _held(_CONFIG.layers) + program["temporaries"] < 21e9
        assert _held(_filter_layers()) + program["temporaries"] < 13e9
    assert _held(_CONFIG.layers) + program["temporaries"] < 0.9 * _CARD


def _filter_layers() -> int:
    return presets.preset_for(_CONFIG).method("default").filter_layer + 1


@functools.cache
def _model(layers: int) -> Decoder:
    filter_layers = None if layers == _CONFIG.layers else layers
    loading = Loading(dtype=jnp.dtype(jnp.bfloat16), filter_layers=filter_layers)
    return gpu_compiler.unstacked(abstract_decoder(_CONFIG, loading))


def _held(layers: int) -> int:
    return programs.bytes_on_device(_model(layers))


def _lowered(gpu: jax.sharding.Sharding, tokens: int, form: str) -> jax.stages.Lowered:
    method = dataclasses.replace(presets.preset_for(_CONFIG).method("default"), filter_attention=form)
    program = programs.filtering(_model(_CONFIG.layers), Request(_CONFIG, tokens, method))
    model, arguments = gpu_compiler.placed((program.model, program.arguments), gpu)
    return program.function.lower(model, *arguments, **program.options)


if __name__ == "__main__":
    gpu_compiler.main(
        (f"{form} {tokens}", functools.partial(_lowered, tokens=tokens, form=form))
        for form in _FORMS
        for tokens in _LENGTHS
    )
