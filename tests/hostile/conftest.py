"""The model of these tests: a tiny one, with control tokens, a chat template and a context of 512 tokens."""

import pathlib

import gguf_files
import pytest
from model_files import GOLDEN, Folder

from gemfilter_jax import pipeline
from gemfilter_jax.pipeline import Pipeline

_TEMPLATE = "<|turn|>{{ messages[0]['content'] }}<|end|>{% if add_generation_prompt %}<|turn|>{% endif %}"


@pytest.fixture(scope="session")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    return gguf_files.write(path, Folder.read(GOLDEN / "llama_gqa_tied"), extra={"tokenizer.chat_template": _TEMPLATE})


@pytest.fixture(scope="module")
def model(model_file: pathlib.Path) -> Pipeline:
    return pipeline.load(model_file, dtype="float32")
