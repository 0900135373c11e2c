"""The 13 tasks of RULER: retrieval, tracking of variables, counting of words, and questions about documents."""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from gemfilter_jax.errors import UserError
from gemfilter_jax.evals import haystack, metrics
from gemfilter_jax.evals.example import Example
from gemfilter_jax.evals.ruler import documents, drafts, makers
from gemfilter_jax.evals.ruler.makers import NEEDLE_TASKS, Essays, Maker, NeedleTask
from gemfilter_jax.evals.task import MOST_EXAMPLES, Task
from gemfilter_jax.settings import option

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


DOCUMENT_TASKS = {
    "qa_1": ("dev-v2.0.json of SQuAD v2.0", documents.read_squad),
    "qa_2": ("hotpot_dev_distractor_v1.json of HotpotQA", documents.read_hotpotqa),
}
_OTHERS = {
    "vt": makers.variables,
    "cwe": makers.common_words,
    "fwe": makers.frequent_words,
}
WITHOUT_FILES = (*NEEDLE_TASKS, *_OTHERS)
"""The subtasks that need no file."""

SUBTASKS = (*WITHOUT_FILES, *DOCUMENT_TASKS)

_NEW_TOKENS = {
    **dict.fromkeys(NEEDLE_TASKS, 128),
    "vt": 30,
    "cwe": 120,
    "fwe": 50,
    **dict.fromkeys(DOCUMENT_TASKS, 32),
}


@dataclasses.dataclass(frozen=True)
class Ruler(Task):
    """RULER: needles with one or several keys and values, variables to track, words to count, and questions about
    documents among others. Lengths are those of the text.

    The subtasks, prompts, answer lengths and scores are those of RULER (arXiv 2404.06654, github.com/NVIDIA/RULER).
    Differences:

    - The length asked for is the text's alone. RULER's includes instruction, example, question and answer. To come near
      the length, the last sentence or one of the other documents is cut.
    - RULER's start of the answer ends the question; there, it follows the chat template's header.
    - The word lists and the essays are this project's; `texts` replaces the essays. Their paragraphs are shuffled for
      each example. Word counts with more words than the list has use pairs such as "quiet-harbor" throughout.
    - Keys, values and variables are unique, do not contain each other, and occur nowhere else in the text. No common
      word contains another.
    - Questions about documents are drawn from all of a file; RULER takes the first ones. Other paragraphs may contain
      the answer, as in RULER. A question's own paragraphs occur once, however long the text is.

    As in RULER, an example with its answer comes before the instruction of vt and cwe; it is a part of
    `Example.message_format`.

    Raises:
      UserError: an option is out of bounds or without effect, a subtask is unknown or lacks its file, or a file or
        folder cannot be used.
    """

    name: ClassVar[str] = "ruler"
    title: ClassVar[str] = "RULER"
    parts: ClassVar[str] = "subtask"
    subtasks: str = option(
        ",".join(WITHOUT_FILES), f"Subtasks, separated by commas, of {', '.join(SUBTASKS)}. The last two need files."
    )
    count: int = option(10, "Examples of each subtask and length.", at_least=1, at_most=MOST_EXAMPLES)
    seed: int = option(0, "Random seed of the examples.")
    texts: str | None = option(None, "Take essays from the .txt and .md files of this folder.")
    qa_1_file: str | None = option(None, "File dev-v2.0.json of SQuAD v2.0, for qa_1.")
    qa_2_file: str | None = option(None, "File hotpot_dev_distractor_v1.json of HotpotQA, for qa_2.")

    def __post_init__(self):
        super().__post_init__()
        chosen = self._chosen
        for subtask, (published, _) in DOCUMENT_TASKS.items():
            option_name = f"{subtask}_file"
            given = getattr(self, option_name)
            if subtask in chosen and given is None:
                raise UserError(f"{option_name} is missing, but subtasks has {subtask}; give the file {published}")
            if subtask not in chosen and given is not None:
                raise UserError(
                    f"{option_name} is {given}, but subtasks lacks {subtask}; add it, or leave out the file"
                )
        if self.texts is not None and not any(one.hay == "essays" for one in self._needle_tasks):
            raise UserError(f"texts is {self.texts}, but no subtask of {self.subtasks} takes essays; leave it out")
        for subtask, own in self._documents.items():
            if self.count > len(own.questions):
                raise UserError(
                    f"count is {self.count}, but {getattr(self, f'{subtask}_file')} has {len(own.questions):,} "
                    "questions; ask for at most as many"
                )
        _ = self._essays  # so that an unusable folder is reported before a model is loaded

    @functools.cached_property
    def _chosen(self) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(name.strip() for name in self.subtasks.split(",")))
        for name in names:
            if name not in SUBTASKS:
                raise UserError(f"subtasks is {self.subtasks!r}: {name!r} is unknown; one of {', '.join(SUBTASKS)}")
        return names

    @property
    def _needle_tasks(self) -> list[NeedleTask]:
        return [NEEDLE_TASKS[name] for name in self._chosen if name in NEEDLE_TASKS]

    @functools.cached_property
    def _documents(self) -> dict[str, documents.Documents]:
        return {
            subtask: read(pathlib.Path(getattr(self, f"{subtask}_file")))
            for subtask, (_, read) in DOCUMENT_TASKS.items()
            if subtask in self._chosen
        }

    @functools.cached_property
    def _essays(self) -> Essays:
        if not any(one.hay == "essays" for one in self._needle_tasks):
            return Essays((), "")
        given = haystack.of_folder_or_essays(self.texts)
        paragraphs = tuple(tuple(drafts.sentences(paragraph)) for paragraph in given)
        return Essays(paragraphs, "\n".join(itertools.chain.from_iterable(paragraphs)).lower())

    def examples(self, tokenizer: "PreTrainedTokenizerBase", tokens: int) -> Iterator[Example]:
        """`count` examples of each subtask, in the order of `subtasks`; `Example.group` is the subtask.

        References are all expected answers; for questions about documents, they are alternatives. Spans are those of
        the needles asked for, in the order of the references; the assignments of the variables; the paragraphs that
        hold the answer; or none where words are counted.

        Args:
          tokens: length of each text; at most 2 % off.

        Raises:
          UserError: the text is too short for its needles, words or documents.
        """
        for subtask in self._chosen:
            for index in range(self.count):
                yield self._example(Maker(tokenizer, tokens, subtask, self.seed, index))

    def _example(self, maker: Maker) -> Example:
        if maker.subtask in NEEDLE_TASKS:
            return makers.needles(maker, NEEDLE_TASKS[maker.subtask], self._essays)
        if maker.subtask in DOCUMENT_TASKS:
            return makers.about_documents(maker, self._documents[maker.subtask])
        return _OTHERS[maker.subtask](maker)

    def new_tokens(self, example: Example) -> int:
        """As many as RULER generates for the subtask."""
        return _NEW_TOKENS[example.group]

    def score(self, example: Example, answer: str) -> dict[str, float]:
        """ "right": the share of the references that the answer contains, ignoring case (string_match_all); for
        questions about documents, 1 if it contains any (string_match_part).
        """
        if example.group in DOCUMENT_TASKS:
            return {"right": float(any(metrics.contains_all(answer, [one]) for one in example.references))}
        return {"right": metrics.share_contained(answer, example.references)}
