"""Hugging Face model folders as values, so that tests can change one and save it elsewhere."""

import dataclasses
import json
import pathlib

import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gemfilter_jax.checkpoints.weights import Loading

FLOAT32 = Loading(np.dtype("float32"))
GOLDEN = pathlib.Path(__file__).parent / "golden"


@dataclasses.dataclass
class Folder:
    """The parsed config.json and all tensors of a folder."""

    fields: dict
    tensors: dict[str, np.ndarray]

    @classmethod
    def read(cls, path: pathlib.Path) -> "Folder":
        tensors = {}
        for shard in path.glob("*.safetensors"):
            tensors |= load_file(shard)
        return cls(json.loads((path / "config.json").read_text(encoding="utf-8")), tensors)

    def save(self, path: pathlib.Path) -> pathlib.Path:
        """Write a new folder with one safetensors file."""
        path.mkdir()
        (path / "config.json").write_text(json.dumps(self.fields), encoding="utf-8")
        save_file(self.tensors, path / "model.safetensors")
        return path


def tokenizer() -> PreTrainedTokenizerFast:
    """Three words, and a chat template that is the message alone."""
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", chat_template="{{ messages[0]['content'] }}")
