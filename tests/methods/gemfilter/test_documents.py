"""A document read once: the same scores and kept tokens as reading it anew, in memory and from disk, or none at all."""

import dataclasses
import os
import resource
import stat
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from gemfilter_jax.config import LongRope
from gemfilter_jax.methods.gemfilter import documents, filtering, segments
from gemfilter_jax.methods.gemfilter.method import GemFilter
from gemfilter_jax.models.transformer import Decoder

_METHOD = GemFilter(
    filter_layer=2, keep=64, observation_window=16, pooling="none", pool_size=1, chunk=8, sentences=False
)
_PREFIX, _SUFFIX = 7, 12


def _prompt(length: int, question: int = 0, suffix: int = _SUFFIX):
    """A document that depends on `length` alone, and one of several questions."""
    ids = tiny.random_ids(length - suffix)
    return tiny.prompt_of(np.concatenate([ids, tiny.random_ids(suffix, 1 + question)]), _PREFIX, suffix)


_TRI_SHAPE = {"filter_attention": "tri_shape", "band": 24, "first_tokens": 5}


@pytest.mark.parametrize(
    ("change", "suffix"),
    [
        ({}, _SUFFIX),
        ({}, 4),  # a question shorter than the window
        (_TRI_SHAPE, _SUFFIX),
        (_TRI_SHAPE, 4),
        (_TRI_SHAPE, 30),
        ({"normalisation": "none", "lexical": 0.0}, _SUFFIX),
        ({"heads": ("0/1", "2/3:0.5"), "normalisation": "sink"}, _SUFFIX),
        ({"heads": ("1/2",)} | _TRI_SHAPE, _SUFFIX),
        ({"recall": 0.5, "least": 40}, _SUFFIX),
        ({"rounds": (90,)}, _SUFFIX),
    ],
    ids=str,
)
@pytest.mark.parametrize("length", [200, 1999])
def test_other_questions_keep_what_they_keep_anew(length, change, suffix):
    model, method = tiny.decoder(), dataclasses.replace(_METHOD, **change)
    read = documents.read(model, _prompt(length, suffix=suffix), method)
    for question in (0, 1):
        prompt = _prompt(length, question, suffix)
        assert read.fits(model.config, prompt, method)
        again = filtering.keep_tokens_of_document(model, prompt, method, read).indices
        anew = filtering.keep_tokens(model, [prompt], method)[0].indices
        np.testing.assert_array_equal(again, anew)


def _path(model, prompt, method, folder):
    return folder / documents.key(model, prompt, method)


def _save(model, prompt, method, folder):
    made = documents.read(model, prompt, method)
    documents.save(made, _path(model, prompt, method, folder))
    return made


def _load(model, prompt, method, folder):
    return documents.load(model, prompt, method, _path(model, prompt, method, folder))


def test_a_saved_reading_is_the_same(tmp_path):
    model, prompt = tiny.decoder(), _prompt(1999)
    folder = tmp_path / "new" / "folder"
    made = _save(model, prompt, _METHOD, folder)
    _save(model, prompt, _METHOD, folder)
    loaded = _load(model, _prompt(1999, question=1), _METHOD, folder)
    assert loaded is not None
    np.testing.assert_array_equal(loaded.scores(model, prompt, _METHOD), made.scores(model, prompt, _METHOD))
    (path,) = folder.iterdir()
    assert path.name == documents.key(model, prompt, _METHOD)
    assert [stat.S_IMODE(one.stat().st_mode) for one in (folder, path)] == [0o700, 0o600]


def test_a_saved_reading_in_bfloat16(tmp_path):
    model = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tiny.decoder())
    prompt = _prompt(300)
    made = _save(model, prompt, _METHOD, tmp_path)
    loaded = _load(model, prompt, _METHOD, tmp_path)
    np.testing.assert_array_equal(loaded.scores(model, prompt, _METHOD), made.scores(model, prompt, _METHOD))


def _changed_text(model, prompt, method):
    ids = prompt.ids.copy()
    ids[900] += 1
    return model, dataclasses.replace(prompt, ids=ids), method


def _another_model(model, prompt, method):
    return Decoder(tiny.CONFIG, rngs=nnx.Rngs(1)), prompt, method


def _another_layer(model, prompt, method):
    return model, prompt, dataclasses.replace(method, filter_layer=1)


def _another_band(model, prompt, method):
    return model, prompt, dataclasses.replace(method, band=32)


def _a_long_question(model, prompt, method):
    return model, _prompt(1999, suffix=40), method


@pytest.mark.parametrize(
    "change", [_changed_text, _another_model, _another_layer, _another_band, _a_long_question], ids=lambda f: f.__name__
)
def test_a_reading_of_something_else_is_not_used(tmp_path, change):
    before = (tiny.decoder(), _prompt(1999), _METHOD)
    made = _save(*before, tmp_path)
    assert _load(*before, tmp_path) is not None
    model, prompt, method = change(*before)
    assert _load(model, prompt, method, tmp_path) is None
    if change in (_changed_text, _a_long_question):  # what may change between the questions of one document
        assert not made.fits(model.config, prompt, method)


def test_segments_that_passed_in_other_numbers_are_not_used(tmp_path):
    """Of two lengths that cut the same segments, the shorter lets three pass together and the longer two."""
    model, prompt = tiny.decoder(), _prompt(1999)
    shorter, longer = (dataclasses.replace(_METHOD, segment=segment) for segment in (127, 128))
    pieces, same = (segments.pieces(model.config, prompt, np.arange(1999), one) for one in (shorter, longer))
    assert [piece.tolist() for piece in pieces] == [piece.tolist() for piece in same]
    assert [len(segments.groups(model.config, one, pieces)[0]) for one in (shorter, longer)] == [3, 2]
    _save(model, prompt, shorter, tmp_path)
    assert _load(model, prompt, longer, tmp_path) is None


def test_every_weight_is_part_of_the_key():
    """One value of each array changes, in its last bit, at a place that was drawn."""
    model, prompt = tiny.decoder(), _prompt(300)
    leaves, structure = jax.tree.flatten(model)
    rng = np.random.default_rng(0)
    keys = {documents.key(model, prompt, _METHOD)}
    for number, leaf in enumerate(leaves):
        changed = np.array(leaf)
        bits = changed.reshape(-1).view(np.uint32)
        bits[rng.integers(bits.size)] ^= 1
        other = [*leaves[:number], jnp.asarray(changed), *leaves[number + 1 :]]
        keys.add(documents.key(jax.tree.unflatten(structure, other), prompt, _METHOD))
    assert len(keys) == 1 + len(leaves)


def test_weights_in_another_order_are_other_weights():
    model, prompt = tiny.decoder(), _prompt(300)
    leaves, structure = jax.tree.flatten(model)
    for number, leaf in enumerate(leaves):
        if len(np.unique(np.array(leaf))) > 1:
            swapped = np.array(leaf)
            flat = swapped.reshape(-1)
            first, second = 0, int(np.flatnonzero(flat != flat[0])[-1])
            flat[[first, second]] = flat[[second, first]]
            other = jax.tree.unflatten(structure, [*leaves[:number], jnp.asarray(swapped), *leaves[number + 1 :]])
            assert documents.key(other, prompt, _METHOD) != documents.key(model, prompt, _METHOD)


def _flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes() + b"0"),
        lambda path: (path.unlink(), path.mkdir()),
        *(lambda path, place=place: _flip(path, place) for place in (0, 9, 80, -1, -40_000, -90_001)),
    ],
)
def test_a_damaged_reading_is_replaced(tmp_path, damage):
    model, prompt = tiny.decoder(), _prompt(700)
    made = _save(model, prompt, _METHOD, tmp_path)
    path = _path(model, prompt, _METHOD, tmp_path)
    whole = path.read_bytes()
    damage(path)
    assert _load(model, prompt, _METHOD, tmp_path) is None
    if not path.is_dir():
        documents.save(made, path)
        assert path.read_bytes() == whole


def test_a_reading_of_another_shape_or_type_is_not_used(tmp_path):
    """Even if its digest is right."""
    model, prompt = tiny.decoder(), _prompt(700)
    made = _save(model, prompt, _METHOD, tmp_path)
    path = _path(model, prompt, _METHOD, tmp_path)
    for change in (lambda keys: keys[..., :-1], lambda keys: keys.astype(jnp.bfloat16), lambda keys: keys[:, :, :-1]):
        states = [dataclasses.replace(one, keys=change(one.keys)) for one in made.states]
        documents.save(dataclasses.replace(made, states=states), path)
        assert _load(model, prompt, _METHOD, tmp_path) is None
    documents.save(dataclasses.replace(made, states=made.states * 2), path)
    assert _load(model, prompt, _METHOD, tmp_path) is None


def test_leftovers_of_a_killed_run_are_swept(tmp_path):
    code = """
import os, pathlib, sys
from gemfilter_jax import files
with files.aside(pathlib.Path(sys.argv[1]) / "reading") as file:
    file.write(b"half")
    file.flush()
    if sys.argv[2] == "killed":
        os._exit(9)
    print("open", flush=True)
    sys.stdin.read()
"""
    subprocess.run([sys.executable, "-c", code, tmp_path, "killed"], check=False)
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path, ""], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline()
        assert len(list(tmp_path.iterdir())) == 2
        model, prompt = tiny.decoder(), _prompt(300)
        _save(model, prompt, _METHOD, tmp_path)
        held = {path.name for path in tmp_path.iterdir()}
        assert len(held) == 2
        assert documents.key(model, prompt, _METHOD) in held
        other.stdin.close()
    assert {path.name for path in tmp_path.iterdir()} == {"reading", documents.key(model, prompt, _METHOD)}


def test_a_reading_that_another_process_writes_is_not_swept(tmp_path, monkeypatch):
    """Not even when all of it is there and only its name is not yet."""
    model, prompt = tiny.decoder(), _prompt(300)
    path, fchmod = _path(model, prompt, _METHOD, tmp_path), os.fchmod
    code = "import pathlib, sys; from gemfilter_jax import files; files.sweep(pathlib.Path(sys.argv[1]))"

    def swept(*arguments) -> None:
        subprocess.run([sys.executable, "-c", code, tmp_path], check=True)
        fchmod(*arguments)

    monkeypatch.setattr(os, "fchmod", swept)
    _save(model, prompt, _METHOD, tmp_path)
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_a_full_disk_costs_a_warning(tmp_path, caplog):
    model, prompt = tiny.decoder(), _prompt(700)
    made = documents.read(model, prompt, _METHOD)
    path = _path(model, prompt, _METHOD, tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        documents.save(made, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "is not kept there" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_long_rope_tells_documents_apart_by_the_table_of_the_whole_prompt():
    """A question that carries a prompt past the threshold turns every key of its document."""
    scaling = LongRope((1.0,) * 4, (4.0,) * 4, original_context=100, attention_scaling=1.0)
    model = Decoder(dataclasses.replace(tiny.CONFIG, rope_scaling=scaling), rngs=nnx.Rngs(0))
    below, above = (tiny.prompt_of(tiny.random_ids(120)[:length], _PREFIX, length - 85) for length in (98, 105))
    method = dataclasses.replace(_METHOD, keep=40)
    assert documents.key(model, below, method) != documents.key(model, above, method)
    for prompt in (below, above):
        made = documents.read(model, prompt, method)
        again = filtering.keep_tokens_of_document(model, prompt, method, made).indices
        np.testing.assert_array_equal(again, filtering.keep_tokens(model, [prompt], method)[0].indices)
