"""Conformance of every method; a new one enters by a row in METHODS."""

import dataclasses
import json
import pathlib
import re
import subprocess
import sys
import types

import numpy as np
import pytest
import tiny
from absl import flags

from gemfilter_jax import methods, settings
from gemfilter_jax.cli import options
from gemfilter_jax.errors import UserError
from gemfilter_jax.evals.tasks.hidden_facts import HiddenFacts
from gemfilter_jax.generate.sampling import Sampling
from gemfilter_jax.methods.bm25 import BM25
from gemfilter_jax.methods.fastkv import FastKV
from gemfilter_jax.methods.first_last import FirstLast
from gemfilter_jax.methods.full import Full
from gemfilter_jax.methods.gemfilter.method import GemFilter
from gemfilter_jax.methods.h2o import H2O
from gemfilter_jax.methods.presets import preset_for
from gemfilter_jax.methods.random_passages import RandomPassages
from gemfilter_jax.methods.snapkv import SnapKV
from gemfilter_jax.methods.streaming_llm import StreamingLLM
from gemfilter_jax.models.hooks import Visit

KEEP = 48
_DEFAULT = GemFilter(filter_layer=2, keep=KEEP, observation_window=16, chunk=8, sentences=False)
METHODS = {
    "full": Full(),
    "default": _DEFAULT,
    "paper": GemFilter.paper(filter_layer=2, keep=KEEP),
    "rounds": dataclasses.replace(_DEFAULT, segment=100, rounds=(80,), filter_precision="int8"),
    "original positions": dataclasses.replace(_DEFAULT, order="text", positions="original"),
    "streaming_llm": StreamingLLM(keep=KEEP),
    "snapkv": SnapKV(keep=KEEP),
    "h2o": H2O(keep=KEEP),
    "fastkv": FastKV(keep=KEEP, filter_layer=1),
    "bm25": BM25(keep=KEEP, chunk=8, sentences=False),
    "first_last": FirstLast(keep=KEEP),
    "random": RandomPassages(keep=KEEP, chunk=8, sentences=False),
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
     for one in {type(method): method for method in reversed(METHODS.values())}.values() for option in one.options()],
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
        if method.eviction is None:
            assert len(kept) == min(budget, result.selection.prompt_tokens)
        else:  # heads may keep different tokens
            assert len(kept) >= min(budget, result.selection.prompt_tokens)


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


@pytest.mark.parametrize("method", [_DEFAULT, BM25(keep=KEEP, chunk=8, sentences=False)], ids=["default", "bm25"])
def test_a_document_takes_other_options_of_its_method(model, method):
    """Another budget reads nothing anew; another filter layer does."""
    text, other = tiny.words(LENGTHS[-1]), dataclasses.replace(method, keep=KEEP // 2)
    document = model.document(text, method=method)
    document.ask(QUESTION, max_new_tokens=2)
    asked = document.ask(QUESTION, method=other, max_new_tokens=8, sampling=WARM)
    anew = model.generate(text, QUESTION, method=other, max_new_tokens=8, sampling=WARM)
    assert (asked.tokens, asked.selection) == (anew.tokens, anew.selection)
    assert asked.selection.kept_tokens == KEEP // 2
    assert "read" not in asked.timings
    assert document.select(QUESTION, method=other)[0] == asked.selection
    if method is _DEFAULT:
        earlier = dataclasses.replace(method, filter_layer=1)
        kept, timings = document.select(QUESTION, method=earlier)
        assert "read" in timings
        assert kept == model.select(text, QUESTION, method=earlier)[0]
    with pytest.raises(UserError, match=f"the document was opened for {type(method).__name__}"):
        document.ask(QUESTION, method=Full())


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


class TestByName:
    def test_options_are_the_presets_or_those_given(self, model):
        assert model.method() == model.preset.default
        assert model.method("paper", keep=33).budget == 33
        assert model.method("streaming_llm", keep=20, sinks=2) == StreamingLLM(20, 2)
        assert model.method("streaming_llm").budget == model.preset.default.keep
        assert model.method("full") == Full()
        assert model.method("default", share=None, band=9) == dataclasses.replace(model.preset.default, band=9)

    def test_a_name_serves_as_a_method(self, model):
        assert answer(model, 90, method="full").tokens == answer(model, 90, method=Full()).tokens
        assert model.document(tiny.words(90), method="full").ask(QUESTION, max_new_tokens=2).stop_reason == "length"

    @pytest.mark.parametrize(
        ("name", "options", "words"),
        [
            ("papper", {}, "method 'papper' is unknown; one of full, default, paper"),
            ("full", {"keep": 3}, "method 'full' has no option 'keep'; it has none"),
            ("streaming_llm", {"band": 3}, "method 'streaming_llm' has no option 'band'; it has keep, sinks"),
            ("streaming_llm", {"keep": "auto"}, "streaming_llm keeps a number of tokens"),
            ("paper", {"keep": "auto"}, "the paper's rule keeps a number of tokens"),
        ],
    )
    def test_what_does_not_exist_is_refused(self, model, name, options, words):
        with pytest.raises(UserError, match=words):
            model.method(name, **options)

    def test_a_method_that_keeps_no_tokens_selects_no_text(self, model):
        with pytest.raises(UserError, match="StreamingLLM keeps keys and values, not tokens"):
            model.select(tiny.words(90), QUESTION, method="streaming_llm")
        with pytest.raises(UserError, match="StreamingLLM keeps keys and values, not tokens"):
            model.document(tiny.words(90), method="streaming_llm").select(QUESTION)


class TestFlags:
    def given(self, *arguments: str) -> dict[str, methods.Method]:
        values = flags.FlagValues()
        options.define_filter(values)
        options.define_comparison(values, lengths=["9"])
        values(["evaluate", *arguments])
        options.check_methods(values)
        model = types.SimpleNamespace(
            preset=preset_for(tiny.CONFIG), checkpoint=types.SimpleNamespace(model=tiny.decoder())
        )
        return {one.name: one.method for one in options.contestants(values, model)}

    def test_each_method_takes_the_flags_that_it_has(self):
        made = self.given("--method=full", "--method=default", "--method=streaming_llm", "--keep=70", "--sinks=3")
        assert made["full"] == Full()
        assert made["streaming_llm"] == StreamingLLM(70, 3)
        assert made["default"] == dataclasses.replace(preset_for(tiny.CONFIG).default, keep=70)

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (("--method=full", "--keep=9"), "--keep means nothing to --method=full; it is for default"),
            (("--method=default", "--sinks=9"), "--sinks means nothing to --method=default; it is for streaming_llm"),
            (("--filter_layer=99",), "filter layer 99 is out of range; the model has layers 0 to 3"),
            (("--method=streaming_llm", "--keep=4"), "sinks is 4 and keep 4, which leaves no room for other tokens"),
        ],
    )
    def test_what_cannot_be_compared_is_refused_before_it_runs(self, arguments, words):
        with pytest.raises(UserError, match=words):
            self.given(*arguments)


def documented(name: str) -> type:
    """A class of the documentation's code blocks, as they stand."""
    text = (pathlib.Path(__file__).parents[2] / "docs" / "architecture.md").read_text()
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if f"class {name}(" in block)
    space: dict = {"__name__": "example"}
    exec(code, space)
    return space[name]


def test_the_example_of_a_method_that_selects(model):
    """It keeps the end of the document, and refuses what it must."""
    method = documented("LastTokens").of("last_tokens", model.preset, keep=48)
    result = answer(model, 200, method=method)
    assert result.selection.indices == tuple(range(result.selection.prompt_tokens - 48, result.selection.prompt_tokens))
    assert answer(model, 20, method=method).tokens == answer(model, 20, method="full").tokens
    with pytest.raises(UserError, match="keep is 2, but the template and the question alone are 3 tokens"):
        answer(model, 200, method=dataclasses.replace(method, keep=2))
    with pytest.raises(UserError, match="keep is 0"):
        answer(model, 200, method=dataclasses.replace(method, keep=0))


def test_the_example_of_a_method_that_evicts(model):
    """It keeps the smallest keys but for the last ones, by each key head, and the whole of a short prompt."""
    method = documented("SmallKeys").of("small_keys", model.preset, keep=6, last=2)
    keys = np.random.default_rng(0).normal(size=(1, 20, 2, 4))
    visit = Visit(0, keys, keys, keys, keys, None, key_heads=2)
    kept = np.asarray(method.kept(visit, np.array([20])))
    for head in range(2):
        smallest = np.argsort(np.linalg.norm(keys[0, :18, head], axis=-1))[:4]
        assert kept[0, head].tolist() == [*sorted(smallest.tolist()), 18, 19]
    whole = dataclasses.replace(method, keep=256)
    assert answer(model, 90, method=whole).tokens == answer(model, 90, method="full").tokens
    assert answer(model, 90, method=method).tokens != answer(model, 90, method="full").tokens
    with pytest.raises(UserError, match="last is 6 and keep 6, which leaves no room"):
        answer(model, 90, method=dataclasses.replace(method, last=6))


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
        with pytest.raises(UserError, match="'window' and 'observation_window' mean the same"):
            GemFilter.from_fields(_DEFAULT.fields | {"window": 16}, tiny.CONFIG, "preset.json")


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
        ({"sizes": [10**400]}, "expected a list of whole numbers"),
        ({"number": 10**400}, "expected a number above 0 and at most 1"),
        ({"number": -(10**400)}, "expected a number above 0 and at most 1"),
    ],
    ids=str,
)
def test_a_value_that_is_none_of_an_option_is_refused(fields, words):
    with pytest.raises(UserError, match=words):
        settings.from_json(_Settings, fields, "here")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"keep": 10**400}, "keep'? is .*, expected at most 2,147,483,647"),
        ({"band": -(10**400)}, "band'? is .*, expected a number of at least 1"),
        ({"head_weights": (10**400, 0, 0, 0)}, "head_weights'? is .*, expected a list of numbers of at least 0"),
        ({"head_weights": (1e300, 0, 0, 0)}, "4 head weights .* float32 holds for each of 4 query heads"),
        ({"head_weights": (1e-60,) * 4}, "4 head weights .* not all 0"),
        ({"head_weights": (0.0,) * 4}, "4 head weights .* not all 0"),
        ({"share": 0.5, "normalisation": "none", "lexical": 0.0}, "share is 0.5, which needs attention alone"),
    ],
    ids=str,
)
def test_what_programs_cannot_hold_is_refused_in_the_constructor_and_in_json(change, words):
    with pytest.raises(UserError, match=words):
        dataclasses.replace(_DEFAULT, **change).check(tiny.decoder())
    with pytest.raises(UserError, match=f"^preset.json: .*{words}"):
        GemFilter.from_fields(_DEFAULT.fields | change, tiny.CONFIG, "preset.json")


def test_numpy_and_lists_are_taken():
    plain = GemFilter(2, keep=40, head_weights=(1.0, 0.0, 0.5, 0.0), rounds=(60,))
    assert GemFilter(np.int64(2), keep=np.int32(40), head_weights=np.array([1, 0, 0.5, 0]), rounds=[60]) == plain
    assert hash(GemFilter(2, keep=40, head_weights=[1.0, 0.0, 0.5, 0.0], rounds=[60])) == hash(plain)


def test_seeds_are_not_counts():
    assert HiddenFacts(seed=3_000_000_000).seed == 3_000_000_000


def test_values_of_options_pass():
    fields = {"number": 1, "name": "b", "sizes": [2, 3]}
    assert settings.from_json(_Settings, fields, "here") == fields | {"sizes": (2, 3)}
    assert settings.from_json(_Settings, {"sizes": None}, "here") == {"sizes": None}
