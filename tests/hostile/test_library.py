"""Arguments of the wrong kind end in a `UserError`, before any work."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hostile.attacks import VALUES
from refusals import refusal

import gemfilter_jax
from gemfilter_jax import pipeline
from gemfilter_jax.errors import UserError
from gemfilter_jax.generate.sampling import Sampling
from gemfilter_jax.methods import VARIANTS
from gemfilter_jax.methods.base import Method
from gemfilter_jax.methods.gemfilter.method import GemFilter
from gemfilter_jax.methods.presets import preset_for

_TEXT = tiny.words(60)
_MODEL = tiny.pipeline(tiny.decoder())
_METHOD = _MODEL.method(keep=32, filter_layer=1)
_SHORT: dict[str, Any] = {"method": _METHOD, "max_new_tokens": 2}

DOORS: dict[str, tuple[Callable[[Any], object], tuple]] = {
    "text": (lambda value: _MODEL.generate(value, "w1", **_SHORT), ("a", "8", "two\nlines", "\0")),
    "question": (lambda value: _MODEL.generate(_TEXT, value, **_SHORT), (None, "a", "8", "two\nlines", "\0")),
    "method": (lambda value: _MODEL.generate(_TEXT, "w1", max_new_tokens=2, method=value), (None,)),
    "rule": (lambda value: _MODEL.method(value), ()),
    "max_new_tokens": (lambda value: _MODEL.generate(_TEXT, "w1", method=_METHOD, max_new_tokens=value), (1, 2)),
    "sampling": (lambda value: _MODEL.generate(_TEXT, "w1", sampling=value, **_SHORT), ()),
    "temperature": (
        lambda value: _MODEL.generate(_TEXT, "w1", sampling=Sampling(temperature=value), **_SHORT),
        (0, 1, 2, 0.5),
    ),
    "top_k": (lambda value: _MODEL.generate(_TEXT, "w1", sampling=Sampling(top_k=value), **_SHORT), (0, 1, 2)),
    "top_p": (lambda value: _MODEL.generate(_TEXT, "w1", sampling=Sampling(top_p=value), **_SHORT), (0, 1, 0.5)),
    "seed": (
        lambda value: _MODEL.generate(_TEXT, "w1", seed=value, **_SHORT),
        (0, 1, -1, 2, 10**18, -(10**18), 10**400),
    ),
    "on_text": (lambda value: _MODEL.generate(_TEXT, "w1", on_text=value, **_SHORT), (None, len)),
    "texts": (lambda value: _MODEL.generate_batch(value, **_SHORT), ([], ["a"], ())),
    "questions": (lambda value: _MODEL.generate_batch([_TEXT], value, **_SHORT), (None, ["a"], [None])),
    "seeds": (
        lambda value: _MODEL.generate_batch([_TEXT], seed=value, **_SHORT),
        (0, 1, -1, 2, 10**18, -(10**18), 10**400, [1]),
    ),
    "document": (lambda value: _MODEL.document(value), ("", "a", "8", "two\nlines", "\0")),
    "cache": (lambda value: _MODEL.document(_TEXT, cache=value), (None, "a", "8", "two\nlines", "\0", "\ud800")),
    "question of a document": (
        lambda value: _MODEL.document(_TEXT, method=_METHOD).ask(value, max_new_tokens=2),
        ("a", "8", "two\nlines", "\0"),
    ),
    "keep": (
        lambda value: _MODEL.generate(_TEXT, "w1", method=dataclasses.replace(_METHOD, keep=value), max_new_tokens=2),
        (1, 2),
    ),
    "keep of a rule": (lambda value: _MODEL.method(keep=value).check(_MODEL.checkpoint.model), (None, 1, 2)),
    "model": (lambda value: gemfilter_jax.load(value), ()),
    "filter_layers": (lambda value: pipeline.load("smollm2", filter_layers=value), (None, 1, 2)),
    "dtype": (lambda value: pipeline.load("smollm2", dtype=value), ()),
    "weights": (lambda value: pipeline.load("smollm2", weights=value), ()),
    "mesh": (lambda value: pipeline.load("smollm2", mesh=value, filter_layers=1), (None,)),
    "preset": (lambda value: pipeline.load("smollm2", preset=value, filter_layers=1), (None,)),
    "chat_template": (lambda value: pipeline.load("smollm2", chat_template=value, filter_layers=1), (True, False)),
    "attention": (lambda value: pipeline.load("smollm2", attention=value, filter_layers=1), (None,)),
}
"""What is called with each hostile value, and the values that serve."""


def _is_among(value: object, allowed: tuple) -> bool:
    return any(type(value) is type(one) and value == one for one in allowed)


@pytest.mark.parametrize("door", DOORS)
def test_an_argument_of_the_wrong_kind(door):
    call, allowed = DOORS[door]
    for value in VALUES:
        if _is_among(value, allowed):
            call(value)
            continue
        message = refusal(call, value)
        assert message is not None, f"{value!r} was taken"
        assert len(message) < 1000


def _checked(variant: str, name: str, value: object) -> Method:
    made = _MODEL.method(variant, **{name: value})
    made.check(_MODEL.checkpoint.model)
    return made


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_option_of_the_wrong_kind(variant):
    """No method lets a value through that its check would not name."""
    for one in VARIANTS[variant].options():
        for value in VALUES:
            if not refusal(_checked, variant, one.name, value):
                made = _checked(variant, one.name, value)
                assert one.fault(getattr(made, one.name)) is None


def test_arrays_and_iterators_serve():
    texts = [_TEXT, _TEXT]
    whole = _MODEL.generate_batch(texts, ["w1", "w2"], seed=[1, 2], **_SHORT)
    for given in (np.array(texts), iter(texts), dict.fromkeys([*texts, "w3"]).keys()):
        made = _MODEL.generate_batch(given, iter(["w1", "w2"]), seed=np.array([1, 2]), **_SHORT)
        assert [one.text for one in made][:1] == [one.text for one in whole][:1]
    sampling = Sampling(jnp.float32(0.5), jnp.int32(3), np.array(0.5))
    assert _MODEL.generate(_TEXT, "w1", sampling=sampling, seed=jnp.int32(3), **_SHORT).text


def test_numbers_of_numpy_serve():
    kept = GemFilter(filter_layer=np.int64(1), keep=np.int32(32))
    result = _MODEL.generate(_TEXT, "w1", method=kept, max_new_tokens=np.int64(2), seed=np.int32(-4))
    assert result.selection.kept_tokens == 32
    assert preset_for(tiny.CONFIG).name == "none"


def test_what_is_known_before_the_filter_is_told_before_it(monkeypatch):
    def read(*_: object, **__: object) -> None:
        raise AssertionError("the filter ran")

    monkeypatch.setattr(GemFilter, "select", read)
    for settings, said in (
        ({"max_new_tokens": tiny.CONTEXT}, f"max_new_tokens is {tiny.CONTEXT}, but the model's context"),
        ({"max_new_tokens": tiny.CONTEXT - 20}, "32 kept tokens and 236 new ones exceed the model's context of 256"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"sampling": Sampling(top_p=2.0)}, "top_p is 2.0"),
    ):
        with pytest.raises(UserError, match=said):
            _MODEL.generate(_TEXT, "w1", method=_METHOD, **settings)
        with pytest.raises(UserError, match=said):
            _MODEL.document(_TEXT, method=_METHOD).ask("w1", **settings)


def test_a_token_beyond_the_vocabulary_is_told():
    model = tiny.pipeline(tiny.decoder())
    model.checkpoint.tokenizer.add_tokens(["beyond"])
    model.checkpoint.tokenizer.add_tokens([f"x{number}" for number in range(tiny.CONFIG.vocab)])
    with pytest.raises(UserError, match=r"token \d+, 'x\d+', and the model knows 0 to 127"):
        model.generate(f"w1 w2 x{tiny.CONFIG.vocab - 1} w3", "w1", method=_METHOD)
