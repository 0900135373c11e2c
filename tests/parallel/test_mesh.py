"""Programs on meshes of 8 and of 4 devices, forced on the CPU of another process: the same tokens as on one device."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import mesh_programs
import numpy as np
import pytest
import tiny

from gemfilter_jax.checkpoints.weights import Loading, abstract_decoder
from gemfilter_jax.errors import UserError
from gemfilter_jax.parallel import sharding
from gemfilter_jax.parallel.sharding import MeshShape
from gemfilter_jax.parallel.shards import SequenceShards

_TESTS = pathlib.Path(__file__).parents[1]
_FAMILIES = {  # and the parts of the model axis that they admit
    "llama_mqa_bias_linear": (1, 2, 4),
    "mistral_sliding": (1, 2, 4),
    "phi3_longrope": (1, 2, 4),
    "qwen3_norms": (1, 2, 4),
}
_EVERY = ()  # mesh that 8 and 4 devices make
_MESHES = {  # each axis alone and with others; all that is asked for on the first, where two parts share a key head
    "llama_mqa_bias_linear": ("data:2,seq:2,model:2", "data:1,seq:1,model:8"),
    "mistral_sliding": ("data:1,seq:8,model:1",),
    "phi3_longrope": ("data:1,seq:4,model:1",),
}


def _on_eight(*arguments: str) -> str:
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"  # which compiles faster
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=550, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize(
    ("family", "meshes"),
    [
        *(pytest.param(family, meshes, id=family) for family, meshes in _MESHES.items()),
        *(
            pytest.param(family, _EVERY, id=f"{family}, every mesh", marks=pytest.mark.exhaustive)
            for family in _FAMILIES
        ),
    ],
)
def test_a_mesh_keeps_and_answers_what_one_device_does(family, meshes):
    folder = _TESTS / "golden" / family
    found = json.loads(_on_eight(str(_TESTS / "mesh_programs.py"), str(folder), *meshes))
    one = found.pop("one")
    assert one["dense"] != one["tri_shape"]
    refused = {mesh for mesh, made in found.items() if "refused" in made}
    assert refused == {mesh for mesh in found if int(mesh.rpartition(":")[2]) not in _FAMILIES[family]}
    compared = dict.fromkeys(one, 0)
    for mesh in set(found) - refused:
        for what, made in found[mesh].items():
            assert made == one[what], (mesh, what)
            compared[what] += 1
    with_all = "data:2,seq:2,model:2" in found
    if with_all:
        assert len(set(map(str, [one["answers"], one["paper"], one["int8"], one["heads"]]))) == 4
    assert len(found) == (len(meshes) or 10 + 6)
    counts = {"dense": len(found) - len(refused), "answers": 6 if meshes is _EVERY else len(found) - len(refused)}
    counts["tri_shape"] = counts["dense"]
    once = ("paper", "int8", "heads", "document", *mesh_programs.EVICTING) if with_all else ()
    assert compared == counts | dict.fromkeys(once, 1)


_LONG = 2**18
_COMPILED = f"""
import dataclasses
import sys
import jax
import jax.numpy as jnp
import tiny
from gemfilter_jax.parallel import sharding
from gemfilter_jax.methods.gemfilter import scoring_pass
from gemfilter_jax.ops.attention import TriShape
from gemfilter_jax.checkpoints.weights import Loading, abstract_decoder

config = dataclasses.replace(tiny.CONFIG, width=64, head_width=16, kv_heads=1, context={_LONG})
mesh = sharding.make_mesh(sharding.MeshShape(seq=int(sys.argv[1])))
model = abstract_decoder(config, Loading(jnp.dtype(jnp.float32), mesh=mesh))
one = jax.ShapeDtypeStruct((1,), jnp.int32)
pattern = TriShape(one, first=64, band=512, room=32) if sys.argv[2] == "tri_shape" else None
weights = jnp.ones((1, config.heads))
scoring = scoring_pass.ScoringPass(jnp.int32(2), jnp.array([2]), weights, pattern, 32, "softmax", int8=False)
lowered = scoring_pass.score_prompt.lower(model, jax.ShapeDtypeStruct((1, {_LONG}), jnp.int32), one, one, scoring)
print(lowered.compile().as_text())
"""


@pytest.mark.parametrize("attention", ["dense", "tri_shape"])
def test_no_device_holds_a_whole_prompt(attention):
    """No array of a device has as many numbers as the keys of one key head of the whole prompt."""

    def largest(parts: int) -> int:
        program = _on_eight("-c", _COMPILED, str(parts), attention)
        shapes = re.findall(r"\b(?:f32|bf16)\[([\d,]+)\]", program)
        return max(int(np.prod([int(size) for size in shape.split(",")])) for shape in shapes)

    assert largest(8) < _LONG * 16
    assert largest(1) >= _LONG * 64


@pytest.mark.parametrize("parts", [2, 3, 8])
@pytest.mark.parametrize("mirrored", [False, True])
def test_pieces_are_alike_and_every_position_has_one(parts, mirrored):
    shards = SequenceShards(parts, mirrored)
    for length in (1, 100, 5000, 70_000):
        padded = shards.padded(length)
        order = shards.order(padded)
        assert length <= padded < length * 1.3 + 16
        np.testing.assert_array_equal(np.sort(order), np.arange(padded))
        share = padded // parts
        assert share % shards.pieces == 0
        assert share // shards.pieces % shards.block(share) == 0
        assert shards.block(share) >= min(128, share // shards.pieces)
        for part in range(parts):
            starts = np.asarray(shards.starts(share, part))
            mine = (starts[:, None] + np.arange(share // shards.pieces)).reshape(-1)
            np.testing.assert_array_equal(order[part * share : (part + 1) * share], mine)
        work = order.reshape(parts, share).sum(axis=1)  # keys before each row, as dense attention sees them
        assert not mirrored or len(set(work)) == 1


def test_shapes_are_read_from_text():
    assert MeshShape.parse("data:1,seq:4,model:2") == MeshShape(1, 4, 2)
    assert MeshShape.parse("model:2") == MeshShape(model=2)
    assert str(MeshShape.parse("seq:4, data:2")) == "data:2,seq:4,model:1"


@pytest.mark.parametrize("text", ["", "seq", "seq:", "seq:0", "seq:-1", "seq:2,seq:2", "heads:2", "seq:2x"])
def test_other_texts_are_refused(text):
    with pytest.raises(UserError, match="is not one of data:N, seq:N, model:N"):
        MeshShape.parse(text)


def test_what_cannot_be_split_is_named():
    with pytest.raises(UserError, match=r"model:3 cannot split 4 query heads evenly; this model takes model:1, 2, 4$"):
        sharding.check(tiny.CONFIG, MeshShape(model=3))
    with pytest.raises(UserError, match="takes 64 devices; there are"):
        sharding.make_mesh(MeshShape(8, 4, 2))


@pytest.mark.parametrize(
    ("weights", "memory", "many", "shape"),
    [
        (100, None, False, MeshShape(seq=8)),
        (100, 1000, False, MeshShape(seq=8)),
        (100, 1000, True, MeshShape(data=8)),
        (1000, 1000, False, MeshShape(seq=4, model=2)),
        (1001, 1000, True, MeshShape(data=2, model=4)),
        (9000, 1000, False, MeshShape(seq=2, model=4)),
    ],
)
def test_the_model_is_cut_as_little_as_memory_allows(weights, memory, many, shape):
    assert sharding.automatic_shape(tiny.CONFIG, 8, weights=weights, memory=memory, many_prompts=many) == shape


@pytest.mark.parametrize(
    ("shape", "generating"),
    [
        (MeshShape(seq=4), MeshShape(model=4)),
        (MeshShape(2, 2, 2), MeshShape(data=2, model=4)),
        (MeshShape(seq=8), MeshShape(data=8)),  # 8 parts of 4 heads
        (MeshShape(seq=4, model=2), MeshShape(data=4, model=2)),
    ],
)
def test_the_seq_axis_joins_the_model_axis_in_stage_2_where_heads_allow(shape, generating):
    assert shape.generating(tiny.CONFIG) == generating


def test_a_device_holds_a_share_of_seq_and_model_together():
    """An eighth of the weights but norms, with 8 heads; the 2 key heads, which 8 do not divide, are on every device."""
    config = dataclasses.replace(tiny.CONFIG, heads=8, width=64)
    mesh = jax.sharding.AbstractMesh((2, 4, 1), ("model", "seq", "data"))
    model = abstract_decoder(config, Loading(jnp.dtype(jnp.float32)))
    held = sharding.specs(model, mesh)
    for name in ("query", "output", "gate", "up", "down"):
        assert ("model", "seq") in getattr(held.layers, name).kernel.get_value()
    assert held.embedding.get_value()[0] == ("model", "seq")
    assert set(held.layers.key.kernel.get_value()) == {None}


def test_batches_are_filled_up():
    assert sharding.evenly([1, 2, 3], 4) == [1, 2, 3, 3]
    assert sharding.evenly([1, 2], 2) == [1, 2]
