"""Conformance of every method; a new one enters by a row in METHODS."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import tiny

from gemfilter_jax import methods, settings
from gemfilter_jax.errors import UserError
from gemfilter_jax.generate.sampling import Sampling
from gemfilter_jax.methods.full import Full
from gemfilter_jax.methods.gemfilter.method import GemFilter
from gemfilter_jax.methods.presets import preset_for
from gemfilter_jax.methods.streaming_llm import StreamingLLM

KEEP = 48
_DEFAULT = GemFilter(filter_layer=2, keep=KEEP, observation_window=16, chunk=8, sentences=False)
METHODS = {
    "full": Full(),
    "default": _DEFAULT,
    "paper": GemFilter.paper(filter_layer=2, keep=KEEP),
    "rounds": dataclasses.replace(_DEFAULT, segment=100, rounds=(80,), filter_precision="int8"),
    "original positions": dataclasses.replace(_DEFAULT, order="text", positions="original"),
    "streaming_llm": StreamingLLM(keep=KEEP),
    "streaming_llm without sinks": StreamingLLM(keep=KEEP, sinks=0),
}
QUESTION = "w1 w2 w3"
WARM = Sampling(temperature=1.0, top_k=40, top_p=0.95)  # a random model's greedy tokens are few
LENGTHS = (20, 90, 200)

every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())


@pytest.fixture(scope="module")
def model():
    return tiny.pipeline(tiny.decoder())


def answer(model, words, **options):
    return model.generate(tiny.words(words), QUESTION, max_new_tokens=8, sampling=WARM, **options)


def test_every_method_has_a_row_and_every_variant_a_method():
    assert {type(method) for method in METHODS.values()} == set(methods.METHODS)
    named = [variant for method in methods.METHODS for variant in method.variants]
    assert len(set(named)) == len(named)
    preset = preset_for(tiny.CONFIG)
    for variant in named:
        made = methods.make(variant, preset, keep=33, filter_layer=1, sinks=2, unknown="nothing to any")
        assert made.budget in (33, None)
        made.check(tiny.decoder())


@every_method
def test_a_method_is_a_value(method):
    assert dataclasses.replace(method) == method
    assert hash(dataclasses.replace(method)) == hash(method)
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.anything = 1


@every_method
def test_the_json_form_makes_the_method_again(method):
    stored = json.loads(json.dumps(method.fields))
    made = type(method).from_fields(stored, tiny.CONFIG, "preset.json")
    unstored = {one.name: getattr(method, one.name) for one in method.options() if not one.stored}
    assert dataclasses.replace(made, **unstored) == method
    with pytest.raises(UserError, match=r"preset\.json: unsupported field\(s\) colour"):
        type(method).from_fields(stored | {"colour": 1}, tiny.CONFIG, "preset.json")


@pytest.mark.parametrize(
    ("method", "option"),
    [pytest.param(type(one), option, id=f"{one.__class__.__name__} {option.name}")
     for one in (METHODS["full"], _DEFAULT, METHODS["streaming_llm"]) for option in one.options()],
)  # fmt: skip
def test_every_option_is_told_and_checked(method, option):
    assert option.help.endswith(".")
    own = next(one for one in METHODS.values() if type(one) is method)
    bad = {bool: "yes", int: "5", float: "much", str: "nonsense"}[option.kind]
    for value in [bad, None] if not option.optional else [bad]:
        with pytest.raises(UserError) as error:
            dataclasses.replace(own, **{option.name: (value,) if option.several and value else value}).check(
                tiny.decoder()
            )
        assert option.name in str(error.value).replace(" ", "_")
        assert "\n" not in str(error.value)
    for bound, beyond in ((option.at_least, -1), (option.at_most, 1)):
        if bound is not None and not option.several:
            with pytest.raises(UserError, match=option.name.replace("_", "[ _]")):
                dataclasses.replace(own, **{option.name: option.kind(bound + beyond)}).check(tiny.decoder())


@every_method
def test_no_more_than_the_budget_is_kept(model, method):
    for words in LENGTHS:
        result = answer(model, words, method=method)
        kept = np.array(result.selection.indices)
        assert (np.diff(kept) > 0).all()
        assert 0 <= kept[0] <= kept[-1] < result.selection.prompt_tokens
        budget = result.selection.prompt_tokens if method.budget is None else method.budget
        assert len(kept) == min(budget, result.selection.prompt_tokens)


@every_method
def test_a_prompt_within_the_budget_is_answered_as_by_full_attention(model, method):
    result, full = (answer(model, LENGTHS[0], method=one) for one in (method, Full()))
    assert result.tokens == full.tokens
    assert result.selection == full.selection


def test_methods_answer_longer_prompts_each_in_its_own_way(model):
    answers = {name: answer(model, LENGTHS[-1], method=method).tokens for name, method in METHODS.items()}
    assert len(set(answers.values())) == len(METHODS), answers


@every_method
def test_a_batch_gives_what_its_rows_give_alone(model, method):
    texts = [tiny.words(words) for words in LENGTHS]
    options = {"method": method, "max_new_tokens": 8, "sampling": WARM}
    together = model.generate_batch(texts, [QUESTION] * len(texts), seed=[5, 6, 7], **options)
    for seed, text, row in zip((5, 6, 7), texts, together, strict=True):
        alone = model.generate(text, QUESTION, seed=seed, **options)
        assert (row.tokens, row.selection) == (alone.tokens, alone.selection)


@every_method
def test_a_document_gives_what_its_text_gives(model, method):
    document = model.document(tiny.words(LENGTHS[-1]), method=method)
    for question in (QUESTION, "w4 w5"):
        asked = document.ask(question, max_new_tokens=8, sampling=WARM)
        anew = model.generate(tiny.words(LENGTHS[-1]), question, method=method, max_new_tokens=8, sampling=WARM)
        assert (asked.tokens, asked.selection) == (anew.tokens, anew.selection)


@every_method
def test_a_streamed_answer_is_the_answer(model, method):
    pieces: list[str] = []
    result = answer(model, LENGTHS[-1], method=method, on_text=pieces.append)
    assert "".join(pieces) == result.text
    assert result.tokens == answer(model, LENGTHS[-1], method=method).tokens


def test_methods_are_read_without_jax():
    code = "import sys; import gemfilter_jax.methods as m; m.VARIANTS; print({'jax', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "set()"


class TestFormerNames:
    def test_in_the_constructor_in_replace_and_as_attributes(self):
        method = GemFilter(filter_layer=2, window=7, kernel=3)
        assert method == GemFilter(filter_layer=2, observation_window=7, pool_size=3)
        assert dataclasses.replace(method, window=5).observation_window == 5
        assert dataclasses.replace(method, keep=9) == GemFilter(2, keep=9, window=7, kernel=3)
        assert (method.window, method.kernel) == (7, 3)

    def test_in_json(self):
        fields = {
            name: value for name, value in _DEFAULT.fields.items() if name not in ("observation_window", "pool_size")
        }
        made = GemFilter.from_fields(fields | {"window": 16, "kernel": 9}, tiny.CONFIG, "preset.json")
        assert made == _DEFAULT


@dataclasses.dataclass(frozen=True)
class _Settings:
    number: float = settings.option(0.5, "A number.", above=0, at_most=1)
    name: str = settings.option("a", "A name.")
    sizes: tuple[int, ...] | None = settings.option(None, "Sizes.", at_least=2)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"number": 0}, "'number' is 0, expected a number above 0 and at most 1"),
        ({"number": float("nan")}, "expected a number above 0 and at most 1"),
        ({"number": True}, "'number' is True, expected a number"),
        ({"name": 3}, "'name' is 3, expected a string"),
        ({"sizes": [1, 2]}, r"'sizes' is \[1, 2\], expected a list of whole numbers of at least 2"),
        ({"sizes": 4}, "'sizes' is 4, expected a list of whole numbers"),
        ({"sizes": [2**31]}, "expected a list of whole numbers"),
    ],
    ids=str,
)
def test_a_value_that_is_none_of_an_option_is_refused(fields, words):
    with pytest.raises(UserError, match=words):
        settings.from_json(_Settings, fields, "here")


def test_values_of_options_pass():
    fields = {"number": 1, "name": "b", "sizes": [2, 3]}
    assert settings.from_json(_Settings, fields, "here") == fields | {"sizes": (2, 3)}
    assert settings.from_json(_Settings, {"sizes": None}, "here") == {"sizes": None}
