"""Splash attention compiled ahead of time for TPU chips at real shapes."""

import functools

import jax
import pytest
import tpu_compiler
from real_shapes import HEADS, LENGTH
from tpu_compiler import every_topology

from gemfilter_jax.ops.attention import TriShape, splash

_FORMS = ("dense", "windowed", "tri_shape")


@every_topology
@pytest.mark.parametrize("form", [pytest.param("dense", marks=pytest.mark.exhaustive), *_FORMS[1:]])
@pytest.mark.parametrize("model", HEADS)
def test_it_makes_no_square_array(model, form, topology):
    """All temporaries together are smaller than an S x S array of single bytes, for one head."""
    heads, groups, width = HEADS[model]
    program = tpu_compiler.compiled(__file__, topology)[f"{model} {form}"]
    assert program["kernels"]
    assert program["arguments"] >= LENGTH * (heads + 2 * groups) * width * 2
    assert program["temporaries"] < LENGTH**2


@pytest.mark.parametrize("form", _FORMS)
def test_it_takes_float32_and_narrow_heads(form):
    assert tpu_compiler.compiled(__file__, "v5e:2x2")[f"float32 {form}"]["kernels"]


def _programs() -> tpu_compiler.Programs:
    def attend(q, k, v, lengths, tails, form):
        pattern = TriShape(tails, first=64, band=512, room=64) if form == "tri_shape" else None
        window = 2047 if form == "windowed" else None
        asked = {"positions": None, "scale": q.shape[-1] ** -0.5, "soft_cap": None}
        return splash.causal(q, k, v, lengths=lengths, window=window, pattern=pattern, **asked)

    def programs(name, heads, groups, width, length=LENGTH, dtype="bfloat16"):
        q, k = (jax.ShapeDtypeStruct((1, length, count, width), dtype) for count in (heads, groups))
        one = jax.ShapeDtypeStruct((1,), "int32")
        for form in _FORMS:
            yield f"{name} {form}", functools.partial(attend, form=form), (q, k, k, one, one)

    for model, shape in HEADS.items():
        yield from programs(model, *shape)
    yield from programs("float32", 9, 3, 64, length=8192, dtype="float32")


if __name__ == "__main__":
    tpu_compiler.main(_programs())
