"""Fixtures of the tests of RULER: tokenizers, files of documents, and examples."""

import functools
import json

import pytest
import ruler_samples
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gemfilter_jax.evals.tasks.ruler import Ruler


def tokenizer_of(model: models.Model, splitter: pre_tokenizers.PreTokenizer) -> PreTrainedTokenizerFast:
    backend = Tokenizer(model)
    backend.pre_tokenizer = splitter
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<u>")


@pytest.fixture(scope="session")
def tokenizers(smollm2):
    """The default model's tokenizer, one with a token for each byte, and one with a token for each word."""
    alphabet = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bytes_alone = models.BPE(vocab={**alphabet, "<u>": 256}, merges=[], unk_token="<u>")
    words = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    return {
        "default": smollm2.checkpoint.tokenizer,
        "bytes": tokenizer_of(bytes_alone, pre_tokenizers.ByteLevel(add_prefix_space=False)),
        "words": tokenizer_of(models.WordLevel({"<u>": 0}, unk_token="<u>"), words),
    }


@pytest.fixture(scope="session")
def tokenizer(tokenizers):
    return tokenizers["default"]


@pytest.fixture(scope="session")
def squad() -> dict:
    return ruler_samples.squad()


@pytest.fixture(scope="session")
def hotpot() -> list:
    return ruler_samples.hotpot()


@pytest.fixture(scope="session")
def files(squad, hotpot, tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("documents")
    for name, content in (("squad", squad), ("hotpot", hotpot)):
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return {"qa_1": str(folder / "squad"), "qa_2": str(folder / "hotpot")}


@pytest.fixture(scope="session")
def make(tokenizers, files):
    """Makes the examples of one subtask, once for the same arguments."""

    @functools.cache
    def examples(subtask: str, tokens: int, *, count: int = 3, seed: int = 0, tokenizer: str = "default"):
        options = {f"{subtask}_file": files[subtask]} if subtask in files else {}
        task = Ruler(subtasks=subtask, count=count, seed=seed, **options)
        return list(task.examples(tokenizers[tokenizer], tokens))

    return examples
