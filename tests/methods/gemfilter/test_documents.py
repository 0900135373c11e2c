"""A document read once: the same scores and kept tokens as reading it anew, in memory and from disk, or none at all."""

import dataclasses

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


def _save(model, prompt, method, folder):
    made = documents.read(model, prompt, method)
    documents.save(made, folder, documents.key(model, prompt, method))
    return made


def test_a_saved_reading_is_the_same(tmp_path):
    model, prompt = tiny.decoder(), _prompt(1999)
    folder = tmp_path / "new" / "folder"
    made = _save(model, prompt, _METHOD, folder)
    _save(model, prompt, _METHOD, folder)
    loaded = documents.load(model, _prompt(1999, question=1), _METHOD, folder)
    assert loaded is not None
    np.testing.assert_array_equal(loaded.scores(model, prompt, _METHOD), made.scores(model, prompt, _METHOD))
    assert [path.name for path in folder.iterdir()] == [documents.key(model, prompt, _METHOD)]


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
    assert documents.load(*before, tmp_path) is not None
    model, prompt, method = change(*before)
    assert documents.load(model, prompt, method, tmp_path) is None
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
    assert documents.load(model, prompt, longer, tmp_path) is None


def test_a_damaged_reading_is_read_again(tmp_path):
    model, prompt = tiny.decoder(), _prompt(700)
    _save(model, prompt, _METHOD, tmp_path)
    for path in (tmp_path / documents.key(model, prompt, _METHOD)).rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    assert documents.load(model, prompt, _METHOD, tmp_path) is None


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
