"""Attention's own kernel compiled ahead of time for GPUs, at real shapes."""

import functools

import gpu_compiler
import jax
import pytest
from gpu_compiler import every_target
from real_shapes import HEADS, LENGTH

from gemfilter_jax.ops.attention import TriShape, pallas

_FORMS = ("tri_shape", "windowed", "dense")


@every_target
@pytest.mark.parametrize("form", _FORMS)
@pytest.mark.parametrize("model", HEADS)
def test_one_kernel_without_temporaries(model, form, target):
    """A few numbers alone, where one head's logits within the band take 0.3 GB. No register spills."""
    program = gpu_compiler.compiled(__file__, target)[f"{model} {form}"]
    heads, groups, width = HEADS[model]
    assert program["kernels"] == 1
    assert program["arguments"] >= LENGTH * (heads + 2 * groups) * width * 2
    assert program["temporaries"] < 1024


@every_target
def test_wide_heads_and_a_prompt_of_a_million_tokens(target):
    """Beyond 2**32 bytes of queries."""
    for name in ("heads of 256", "a million tokens"):
        assert gpu_compiler.compiled(__file__, target)[name]["kernels"] == 1


def _programs() -> gpu_compiler.Programs:
    def attend(q, k, v, lengths, tails, form):
        pattern = TriShape(tails, first=64, band=512, room=64) if form == "tri_shape" else None
        window = 2047 if form == "windowed" else None
        asked = {"positions": None, "scale": q.shape[-1] ** -0.5, "soft_cap": 30.0 if form == "windowed" else None}
        return pallas.causal(q, k, v, lengths=lengths, window=window, pattern=pattern, **asked)

    def lowered(gpu, heads, groups, width, form="tri_shape", length=LENGTH):
        q, k = (jax.ShapeDtypeStruct((1, length, count, width), "bfloat16", sharding=gpu) for count in (heads, groups))
        one = jax.ShapeDtypeStruct((1,), "int32", sharding=gpu)
        return jax.jit(functools.partial(attend, form=form)).lower(q, k, k, one, one)

    for model, (heads, groups, width) in HEADS.items():
        for form in _FORMS:
            given = {"heads": heads, "groups": groups, "width": width, "form": form}
            yield f"{model} {form}", functools.partial(lowered, **given)
    yield "heads of 256", functools.partial(lowered, heads=16, groups=8, width=256)
    yield "a million tokens", functools.partial(lowered, heads=32, groups=8, width=128, length=2**20)


if __name__ == "__main__":
    gpu_compiler.main(_programs())
