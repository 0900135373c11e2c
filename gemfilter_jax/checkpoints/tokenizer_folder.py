"""Tokenizers that transformers loads from a folder, which is untrusted input.

transformers would load a class of any kind that `tokenizer_class` names, and some of those offer to run the folder's
code, whatever they are told here. It would also open some files that fields name, wherever those are.
"""

import os
import pathlib
import reprlib
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

from gemfilter_jax import files
from gemfilter_jax.checkpoints.folder_files import read_object
from gemfilter_jax.errors import UserError, is_fault, reason

_READ = (
    *("tokenizer*", "vocab*", "merges*", "spiece*", "*.tiktoken", "added_tokens.json", "special_tokens_map.json"),
    *("config.json", "generation_config.json", "chat_template*", "additional_chat_templates/*.jinja"),
)
"""Names of the files that tokenizers are made of."""

_LARGEST = 1 << 28  # bytes of a file; the largest that are published have 40 million
_LARGEST_ID = 1 << 24  # far above any vocabulary, yet transformers may fill gaps before it
_NEVER_GIVEN = ("vocab", "merges", "gguf_file", "tokenizer_object")  # in place of the files of the folder


def load(folder: pathlib.Path, source: pathlib.Path) -> PreTrainedTokenizerBase:
    """The fast tokenizer and chat template of a folder. Code in the folder is never run.

    Args:
      source: names the model in error messages.

    Raises:
      UserError: a file is missing or broken, the tokenizer has no fast form, or it needs code of its own.
    """
    for path in sorted({path for pattern in _READ for path in folder.glob(pattern)}):
        if not path.is_dir():
            files.check_plain(path, _LARGEST)
    for name, check in (
        ("config.json", _check_class),
        ("tokenizer_config.json", _check_config),
        ("special_tokens_map.json", _check_map),
    ):
        if (folder / name).exists():
            check(read_object(folder / name), folder / name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if tokenizer.is_fast:
            tokenizer("a", return_offsets_mapping=True, verbose=False)
    except BaseException as error:  # transformers raises many kinds for a missing or broken file, and tokenizers panics
        if not is_fault(error):
            raise
        if "trust_remote_code" in str(error):
            raise UserError(f"{source}: the tokenizer needs code of the folder's own, which is never run") from error
        raise UserError(f"{source}: no usable tokenizer ({reason(error)})") from error
    if not tokenizer.is_fast:
        raise UserError(f"{source}: the tokenizer has no fast form (tokenizer.json), which offsets need")
    return tokenizer


def _check_class(fields: dict[str, Any], path: pathlib.Path) -> None:
    """Raise a `UserError` if `tokenizer_class` names anything but a tokenizer of transformers or of the folder."""
    name = fields.get("tokenizer_class")
    if name is None:
        return
    if not isinstance(name, str) or not name.isidentifier():
        raise UserError(f"{path}: field 'tokenizer_class' is {reprlib.repr(name)}, expected a class")
    for spelling in (name, name.removesuffix("Fast"), f"{name}Fast"):
        found = tokenizer_class_from_name(spelling)
        if found is None or found is PreTrainedTokenizer:
            continue
        if not (isinstance(found, type) and issubclass(found, PreTrainedTokenizerFast)):
            raise UserError(
                f"{path}: field 'tokenizer_class' is {reprlib.repr(name)}, expected a fast tokenizer's class"
            )


def _check_config(fields: dict[str, Any], path: pathlib.Path) -> None:
    """Raise a `UserError` if a field of tokenizer_config.json would read elsewhere, or claims a huge vocabulary."""
    _check_class(fields, path)
    if given := [name for name in _NEVER_GIVEN if name in fields]:
        raise UserError(f"{path}: unsupported field {given[0]!r}, which the folder's files must give")
    named = [fields[name] for name in fields if name.endswith("_file")]
    if (path.parent / "tokenizer.json").exists():
        named = []  # no other file is opened then; the fields hold the paths of whoever saved the tokenizer
    versions = fields.get("fast_tokenizer_files") or []
    for name in [*named, *(versions if isinstance(versions, list) else [versions])]:
        if name is not None and (not isinstance(name, str) or os.path.basename(name) != name):
            raise UserError(f"{path}: names file {reprlib.repr(name)}, expected a file of this folder")
    added = fields.get("added_tokens_decoder")
    for number in added if isinstance(added, dict) else {}:
        if not (number.isascii() and number.isdecimal() and len(number) < 10 and int(number) < _LARGEST_ID):
            raise UserError(
                f"{path}: field 'added_tokens_decoder' has token {reprlib.repr(number)}, expected a whole number below "
                f"{_LARGEST_ID:,}"
            )


def _check_map(fields: dict[str, Any], path: pathlib.Path) -> None:
    """Raise a `UserError` if special_tokens_map.json names anything but tokens. transformers takes it as arguments."""
    for name in fields:
        if not name.endswith(("_token", "_tokens")):
            raise UserError(f"{path}: unsupported field {reprlib.repr(name)}, expected names that end with _token")
