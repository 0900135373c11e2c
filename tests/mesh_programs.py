"""Answers of a tiny model on every mesh that 8 and 4 devices make, as JSON; run in a process that has 8 devices."""

import dataclasses
import json
import pathlib
import sys
import tempfile

import jax
import jax.numpy as jnp
import tiny
from jax.sharding import NamedSharding

from gemfilter_jax.checkpoints import HuggingFaceFolder
from gemfilter_jax.checkpoints.weights import Loading
from gemfilter_jax.errors import UserError
from gemfilter_jax.methods.base import Method
from gemfilter_jax.methods.eviction import EvictingMethod
from gemfilter_jax.methods.fastkv import FastKV
from gemfilter_jax.methods.gemfilter.method import GemFilter
from gemfilter_jax.methods.h2o import H2O
from gemfilter_jax.methods.snapkv import SnapKV
from gemfilter_jax.models.transformer import Decoder
from gemfilter_jax.parallel import sharding
from gemfilter_jax.parallel.sharding import MeshShape
from gemfilter_jax.pipeline import Pipeline

_DEFAULT = GemFilter(filter_layer=2, keep=48, observation_window=16, chunk=8, sentences=False, band=24, first_tokens=4)
_METHODS = {
    "dense": dataclasses.replace(_DEFAULT, filter_attention="dense"),
    "tri_shape": dataclasses.replace(_DEFAULT, filter_attention="tri_shape"),
}
_OTHERS = {
    "paper": GemFilter.paper(filter_layer=2, keep=48),
    "int8": dataclasses.replace(_DEFAULT, filter_precision="int8", head_weights=None),
    "heads": dataclasses.replace(_DEFAULT, heads=("0/3", "1/0", "2/1:0.5"), normalisation="sink"),
}
EVICTING: dict[str, EvictingMethod] = {
    "snapkv": SnapKV(keep=48),
    "h2o": H2O(keep=48),
    "fastkv": FastKV(keep=48, filter_layer=1),
}
_WITH_ALL = MeshShape(2, 2, 2)  # the mesh on which the others and a document are tried, too


def _shapes(devices: int) -> list[MeshShape]:
    """All ways to write a number as data x seq x model."""
    sizes = [size for size in range(1, devices + 1) if devices % size == 0]
    found = (MeshShape(data, seq, devices // (data * seq)) for data in sizes for seq in sizes if data * seq <= devices)
    return [shape for shape in found if shape.size == devices]


def _pipeline(one: Decoder, shape: MeshShape | None) -> Pipeline:
    """A model on one device, or the same on a mesh of a shape."""
    model = one
    if shape is not None:
        mesh = sharding.make_mesh(shape)
        layouts = jax.tree.map(lambda spec: NamedSharding(mesh, spec), sharding.specs(one, mesh))
        model = jax.device_put(one, layouts).replace(mesh=mesh)
    return tiny.pipeline(model)


def _kept(model: Pipeline, method: GemFilter) -> list[int]:
    return list(model.select(tiny.words(230), "w1 w2 w3", method=method)[0].indices)


def _answers(model: Pipeline, method: Method, *words: int) -> list[dict]:
    questions = ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9"]
    texts = [tiny.words(count) for count in words]
    results = model.generate_batch(texts, questions[: len(texts)], method=method, max_new_tokens=6)
    return [{"kept": result.selection.indices, "tokens": result.tokens} for result in results]


def _document(model: Pipeline, cache: str) -> list[dict]:
    """Two questions of a document; the cache may hold what another mesh has read of it."""
    document = model.document(tiny.words(700), method=_METHODS["tri_shape"], cache=cache)
    results = [document.ask(question, max_new_tokens=6) for question in ("w1 w2 w3", "w4 w5 w6")]
    return [{"kept": result.selection.indices, "tokens": result.tokens} for result in results]


def main(folder: str, *meshes: str) -> None:
    """Print {mesh: {what: result}}; "one" is a single device, other meshes may be {"refused": why}.

    Answers are asked for once of the shapes that are one shape in stage 2; see `MeshShape.generating`.

    Args:
      folder: of the model. meshes: as in "seq:8"; none for every one that 8 and 4 devices make.
    """
    one = HuggingFaceFolder(pathlib.Path(folder)).decoder(Loading(jnp.dtype(jnp.float32)))
    shapes = [MeshShape.parse(mesh) for mesh in meshes] or [*_shapes(8), *_shapes(4)]
    found, answered = {}, set()
    cache = tempfile.mkdtemp()
    for shape in (None, *shapes):
        try:
            sharding.check(one.config, shape or MeshShape())
        except UserError as error:
            found[str(shape)] = {"refused": str(error)}
            continue
        model = _pipeline(one, shape)
        made = found[str(shape) if shape else "one"] = {name: _kept(model, _METHODS[name]) for name in _METHODS}
        alike = shape and shape.generating(one.config)
        if alike not in answered:
            made["answers"] = _answers(model, _METHODS["tri_shape"], 230)
            answered.add(alike)
        if shape == _WITH_ALL or (shape is None and _WITH_ALL in shapes):
            # Prompts that are kept whole, filtered in one pass, and in segments.
            made |= {name: _answers(model, method, 20, 230, 700) for name, method in _OTHERS.items()}
            made |= {name: _answers(model, method, 20, 230) for name, method in EVICTING.items()}
            made["document"] = _document(model, cache)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
