"""Tokenizers that transformers loads from a folder."""

import pathlib

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gemfilter_jax.errors import UserError, reason


def load(folder: pathlib.Path, source: pathlib.Path) -> PreTrainedTokenizerBase:
    """The fast tokenizer and chat template of a folder. Code in the folder is never run.

    Args:
      source: names the model in error messages.

    Raises:
      UserError: a file is missing or broken, the tokenizer has no fast form, or it needs code of its own.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds for a missing or broken file
        raise UserError(f"{source}: no usable tokenizer ({reason(error)})") from error
    if not tokenizer.is_fast:
        raise UserError(f"{source}: the tokenizer has no fast form (tokenizer.json), which offsets need")
    return tokenizer
