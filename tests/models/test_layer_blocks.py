"""A layer's steps over blocks of rows: the same as over all rows at once, in place, and not where no row is real."""

import dataclasses

import bounds
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from gemfilter_jax.models import layer as layer_module
from gemfilter_jax.models.rope import rotary_table


@pytest.fixture(scope="module")
def layer():
    return tiny.decoder().layer(0)


def _inputs(batch, length):
    c = tiny.CONFIG
    keys = jax.random.split(jax.random.key(length), 2)
    x = jax.random.normal(keys[0], (batch, length, c.width))
    attended = jax.random.normal(keys[1], (batch, length, c.heads, c.head_width))
    return x, attended, rotary_table(c, jnp.arange(length)[None], jnp.array([length]))


@pytest.mark.parametrize(("length", "rows", "touched"), [(1300, 1300, 1300), (2048, 600, 1024)])
def test_blocks_of_rows_give_what_the_rows_give_and_padding_is_left(layer, length, rows, touched, monkeypatch):
    def both(x, attended, table, rows):
        return *layer.open(x, table, rows), layer.close(x, attended, rows)

    x, attended, table = _inputs(2, length)
    blocked = jax.jit(both)(x, attended, table, rows)
    monkeypatch.setattr(layer_module, "_BLOCK", length)
    at_once = jax.jit(lambda *given: both(*given))(x, attended, table, rows)
    for made, whole in zip(blocked, at_once, strict=True):
        terms = bounds.terms_of_decoder(dataclasses.replace(tiny.CONFIG, layers=1), 0)
        bound = bounds.of_sum(terms, float(jnp.abs(whole).max()))
        np.testing.assert_allclose(made[:, :touched], whole[:, :touched], rtol=0, atol=bound)
    *opened, closed = blocked
    np.testing.assert_array_equal(closed[:, touched:], x[:, touched:])
    for made in opened:
        assert not made[:, touched:].any()


def test_the_residual_stream_is_updated_in_place(layer):
    x, attended, _ = _inputs(2, 16400)
    close = jax.jit(layer.close, donate_argnums=0)
    memory = close.lower(x, attended, 16400).compile().memory_analysis()
    assert memory.alias_size_in_bytes == x.nbytes
    assert memory.temp_size_in_bytes < x.nbytes / 4
