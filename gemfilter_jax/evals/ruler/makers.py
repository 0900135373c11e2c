"""Examples of RULER's tasks (arXiv 2404.06654), with its prompts; `tasks.ruler` says how they differ from RULER's."""

import dataclasses
import itertools
import random
import string
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from gemfilter_jax.evals.example import Example, token_count
from gemfilter_jax.evals.ruler import drafts
from gemfilter_jax.evals.ruler.documents import Documents
from gemfilter_jax.evals.ruler.drafts import NOISE, Draft

if TYPE_CHECKING:  # commands read the tasks' options before they import JAX
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class NeedleTask:
    """A subtask in which keys have values, and the values of some keys are asked for.

    Attributes:
      hay: what the needles are hidden in; "needles" are others that nobody asks for.
      keys: hidden keys. values: values of each key. asked: keys that are asked for.
    """

    hay: Literal["noise", "essays", "needles"]
    key: Literal["words", "uuids"] = "words"
    value: Literal["numbers", "uuids"] = "numbers"
    keys: int = 1
    values: int = 1
    asked: int = 1


NEEDLE_TASKS = {
    "niah_single_1": NeedleTask("noise"),
    "niah_single_2": NeedleTask("essays"),
    "niah_single_3": NeedleTask("essays", value="uuids"),
    "niah_multikey_1": NeedleTask("essays", keys=4),
    "niah_multikey_2": NeedleTask("needles"),
    "niah_multikey_3": NeedleTask("needles", key="uuids", value="uuids"),
    "niah_multivalue": NeedleTask("essays", values=4),
    "niah_multiquery": NeedleTask("essays", keys=4, asked=4),
}

_NEEDLE = "One of the special magic {values} for {key} is: {value}."
_NEEDLE_FORMAT = (
    "{some} special magic {values} {are} hidden within the following text. Make sure to memorize it. I will quiz you "
    "about the {values} afterwards.\n{{text}}\n{{question}}"
)
_NEEDLE_QUESTION = (
    "What {are_all} the special magic {values} for {keys} mentioned in the provided text? The special magic {values} "
    "for {keys} mentioned in the provided text {are}"
)
_ONE, _SEVERAL = {"some": "A", "are": "is", "are_all": "is"}, {"some": "Some", "are": "are", "are_all": "are all"}

_HOPS = 4
_VARIABLES_FORMAT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{text}\nQuestion: "
    "{question}"
)
_VARIABLES_QUESTION = (
    "Find all variables that are assigned the value {value} in the text above. Answer: According to the chain(s) of "
    "variable assignment in the text above, {count} variables are assigned the value {value}, they are: "
)
_EXAMPLE_LINES = 14  # RULER's example has as much noise as fits in 500 tokens

_COMMON = 10
_COMMON_FORMAT = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{text}\nQuestion: {question}"
)
_COMMON_QUESTION = (
    "What are the 10 most common words in the above list? Answer: The top 10 words that appear most often in the list "
    "are:"
)
_LONG = 4096  # tokens from which lists repeat words more often


@dataclasses.dataclass(frozen=True)
class _Repeats:
    """How often word lists repeat each word.

    Attributes:
      common, other: repeats in the text.
      common_in_shown, other_in_shown: repeats in the list that is shown with its answer.
      other_shown: number of other words in that list.
    """

    common: int
    other: int
    common_in_shown: int
    other_in_shown: int
    other_shown: int


_REPEATS_SHORT, _REPEATS_LONG = _Repeats(6, 1, 3, 1, 10), _Repeats(30, 3, 10, 3, 30)

_FREQUENT = 3
_FREQUENT_FORMAT = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. {text}\nQuestion: {question}"
)
_FREQUENT_QUESTION = (
    "Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently appeared words "
    "in the above coded text? Answer: According to the coded text above, the three most frequently appeared words are:"
)
_TOKENS_PER_CODED_WORD = 50  # tokens of the text for each different word
_LEAST_WORDS = 5
_LEAST_SIZE = 74  # from here on, the fourth most frequent word is more frequent than the fifth

_ORDER = "Answer the question based on the given documents. Only give me the answer and do not output any other words."
_DOCUMENTS_FORMAT = f"{_ORDER}\n\nThe following are given documents.\n\n{{text}}\n\n{_ORDER}\n\nQuestion: {{question}}"


@dataclasses.dataclass(frozen=True)
class Essays:
    """The sentences of each paragraph, and all of them as lower-case text."""

    paragraphs: tuple[tuple[str, ...], ...]
    lower: str


@dataclasses.dataclass(frozen=True)
class Maker:
    """Makes example number `index` of a subtask."""

    tokenizer: "PreTrainedTokenizerBase"
    tokens: int
    subtask: str
    seed: int
    index: int

    def random(self, purpose: str) -> random.Random:
        """Random numbers for one purpose; the same for all lengths."""
        return random.Random(f"ruler {self.seed} {self.subtask} {self.index} {purpose}")

    def fitted(self, compose: Callable[[int], Draft], **bounds: int) -> Draft:
        """See `drafts.fitted`."""
        return drafts.fitted(self.tokenizer, self.tokens, compose, self.subtask, **bounds)

    def example(self, draft: Draft, question: str, references: Sequence[str], message_format: str) -> Example:
        """The example made of a draft."""
        return Example(
            name=f"{self.subtask} {self.index + 1}",
            text=draft.text,
            question=question,
            references=tuple(references),
            tokens=self.tokens,
            spans=draft.spans,
            group=self.subtask,
            message_format=message_format,
        )


def needles(maker: Maker, task: NeedleTask, essays: Essays) -> Example:
    """An example of one of `NEEDLE_TASKS`: the values of keys, hidden in sentences of a task's hay."""
    rng = maker.random("needles")
    draws = drafts.Draws(rng, essays.lower if task.hay == "essays" else NOISE.lower())
    keys = [draws.draw(task.key, reserve=True) for _ in range(task.keys)]
    values = [[draws.draw(task.value, reserve=True) for _ in range(task.values)] for _ in keys]
    pairs = [(key, value) for key, own in zip(keys, values, strict=True) for value in own]
    rng.shuffle(pairs)
    hidden = [_NEEDLE.format(values=task.value, key=key, value=value) for key, value in pairs]
    separator = " " if task.hay == "essays" else "\n"
    supply = drafts.Supply(_hay(maker, task, essays, draws), separator)

    def compose(size: int) -> Draft:
        sentences, places = supply.first(size), maker.random("places")
        if task.hay == "essays":
            chosen = drafts.depths(places, len(hidden), len(sentences))
        else:
            chosen = sorted(places.sample(range(len(sentences)), len(hidden)))
        return drafts.hidden(sentences, hidden, chosen, separator)

    draft = maker.fitted(compose, least=len(NOISE))
    references = [value for own in values[: task.asked] for value in own]
    spans = dict(zip((value for _, value in pairs), draft.spans, strict=True))
    wording = {**(_ONE if len(references) == 1 else _SEVERAL), "keys": _listed(keys[: task.asked])}
    wording["values"] = task.value[:-1] if len(references) == 1 else task.value
    return maker.example(
        Draft(draft.text, tuple(spans[value] for value in references)),
        _NEEDLE_QUESTION.format(**wording),
        references,
        _NEEDLE_FORMAT.format(**wording),
    )


def _hay(maker: Maker, task: NeedleTask, essays: Essays, draws: drafts.Draws) -> Iterator[str]:
    """The sentences in which needles are hidden, endlessly."""
    if task.hay == "noise":
        return itertools.repeat(NOISE)
    if task.hay == "essays":
        return itertools.chain.from_iterable(drafts.shuffled(maker.random("hay"), essays.paragraphs))
    return (
        _NEEDLE.format(values=task.value, key=draws.draw(task.key), value=draws.draw(task.value))
        for _ in itertools.count()
    )


def _listed(keys: Sequence[str]) -> str:
    return f"{', '.join(keys[:-1])}, and {keys[-1]}" if len(keys) > 1 else keys[0]


def variables(maker: Maker) -> Example:
    """An example of "vt": the variables to which noise assigns a value in turn."""
    rng = maker.random("chain")
    draws = drafts.Draws(rng, NOISE.lower())
    value, names, statements = _chain(rng, draws, length=5)
    supply = drafts.Supply(itertools.repeat(NOISE), "\n")
    least = len(statements) * (len(NOISE) + 1)
    draft = maker.fitted(lambda size: _among(supply.first(size), statements, maker.random("places")), least=least)
    value_shown, names_shown, statements_shown = _chain(rng, draws, length=3)
    shown = _among([NOISE] * _EXAMPLE_LINES, statements_shown, rng)
    before = _filled(_VARIABLES_FORMAT, shown.text, _question_about_variables(value_shown))
    return maker.example(
        draft,
        _question_about_variables(value),
        names,
        f"{before} {' '.join(names_shown)}\n\n{_VARIABLES_FORMAT}",
    )


def _chain(rng: random.Random, draws: drafts.Draws, length: int) -> tuple[str, list[str], list[str]]:
    """A value, variables with names of `length` letters, and the statements that assign the value to them in turn."""
    value = draws.unlike(lambda: str(rng.randrange(10_000, 100_000)), reserve=True)
    variables = [
        draws.unlike(lambda: drafts.letters(rng, string.ascii_uppercase, length), reserve=True)
        for _ in range(_HOPS + 1)
    ]
    copies = [f"VAR {after} = VAR {before} " for before, after in itertools.pairwise(variables)]
    return value, variables, [f"VAR {variables[0]} = {value}", *copies]


def _among(lines: Sequence[str], statements: Sequence[str], rng: random.Random) -> Draft:
    """The statements in order, each before a different line."""
    return drafts.hidden(lines, statements, sorted(rng.sample(range(len(lines)), len(statements))), "\n")


def _question_about_variables(value: str) -> str:
    return _VARIABLES_QUESTION.format(value=value, count=_HOPS + 1)


def _filled(message_format: str, text: str, question: str) -> str:
    return message_format.replace("{text}", text).replace("{question}", question)


def common_words(maker: Maker) -> Example:
    """An example of "cwe": the ten words that a numbered list repeats most often."""
    repeats = _REPEATS_SHORT if maker.tokens < _LONG else _REPEATS_LONG
    rng = maker.random("words")
    common, shown, others = _parted(rng.sample(drafts.all_words(), len(drafts.all_words())), repeats)
    if _too_few(maker, common, others, repeats):
        draws = drafts.Draws(rng)
        needed = maker.tokens // repeats.other + 2 * _COMMON + repeats.other_shown
        common, shown, others = _parted([draws.draw("words") for _ in range(needed)], repeats)

    def compose(size: int) -> Draft:
        return Draft(_word_list(common, others[:size], repeats.common, repeats.other, maker.random("order")))

    draft = maker.fitted(compose, most=len(others))
    common_shown, others_shown = shown[:_COMMON], shown[_COMMON:]
    text_shown = _word_list(common_shown, others_shown, repeats.common_in_shown, repeats.other_in_shown, rng)
    before = f"{_filled(_COMMON_FORMAT, text_shown, _COMMON_QUESTION)} {drafts.numbered(common_shown)}"
    return maker.example(draft, _COMMON_QUESTION, common, f"{before}\n{_COMMON_FORMAT}")


def _too_few(maker: Maker, common: Sequence[str], others: Sequence[str], repeats: _Repeats) -> bool:
    """Whether the list of all words is too short."""
    if repeats.common * len(common) + repeats.other * len(others) >= maker.tokens:
        return False  # an item takes a token or more
    longest = _word_list(common, others, repeats.common, repeats.other, maker.random("order"))
    return token_count(maker.tokenizer, longest) < maker.tokens


def _parted(words: Sequence[str], repeats: _Repeats) -> tuple[list[str], list[str], list[str]]:
    """The common words, of which none contains another; those of the list that is shown with its answer; and others."""
    common: list[str] = []
    for word in words:
        if len(common) < _COMMON and not any(word in other or other in word for other in common):
            common.append(word)
    others = [word for word in words if word not in common]
    shown = _COMMON + repeats.other_shown
    return common, others[:shown], others[shown:]


def _word_list(common: Sequence[str], others: Sequence[str], times: int, times_other: int, rng: random.Random) -> str:
    """A numbered list of words, each repeated, in random order."""
    items = [*common] * times + [*others] * times_other
    rng.shuffle(items)
    return drafts.numbered(items)


def frequent_words(maker: Maker) -> Example:
    """An example of "fwe": the three most frequent words of a coded text, whose frequencies follow Zipf's law."""
    vocabulary = drafts.coded_words(maker.random("words"), max(maker.tokens // _TOKENS_PER_CODED_WORD, _LEAST_WORDS))

    def compose(size: int) -> Draft:
        counts = drafts.zeta_counts(size, len(vocabulary))
        words = [word for word, count in zip(vocabulary, counts, strict=True) for _ in range(count)]
        maker.random("order").shuffle(words)
        return Draft(" ".join(words))

    draft = maker.fitted(compose, least=_LEAST_SIZE)
    return maker.example(draft, _FREQUENT_QUESTION, vocabulary[1 : 1 + _FREQUENT], _FREQUENT_FORMAT)


def about_documents(maker: Maker, documents: Documents) -> Example:
    """An example of "qa_1" or "qa_2": a question about paragraphs, among others."""
    order = random.Random(f"ruler {maker.seed} {maker.subtask}").sample(documents.questions, len(documents.questions))
    question = order[maker.index]
    others = documents.others(question, maker.random("documents"))
    supply = drafts.Supply(others, "\n\n")

    def compose(size: int) -> Draft:
        texts = [*(documents.paragraphs[index] for index in question.own), *supply.first(size)]
        places = maker.random("order").sample(range(len(texts)), len(texts))  # the text's number by place
        shown = [f"Document {place}:\n{texts[number]}" for place, number in enumerate(places, 1)]
        gold = [question.own.index(index) for index in question.gold]
        return drafts.joined(shown, "\n\n", {places.index(number): texts[number] for number in gold})

    return maker.example(maker.fitted(compose), f"{question.text} Answer:", question.answers, _DOCUMENTS_FORMAT)
