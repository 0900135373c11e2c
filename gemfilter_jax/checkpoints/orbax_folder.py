"""Folders written by `gemfilter convert`: weights as Orbax arrays, config and tokenizer beside them.

Orbax reads only each device's shard of an array, so a checkpoint loads directly into any sharded layout. It and the
classes of tokenizers are imported when they are used: other models start sooner without.
"""

import contextlib
import dataclasses
import json
import logging
import math
import pathlib
import reprlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from transformers import PreTrainedTokenizerBase

from gemfilter_jax import config as config_lib
from gemfilter_jax import files
from gemfilter_jax.checkpoints import folder_files
from gemfilter_jax.checkpoints.weights import Loading, abstract_decoder, check_arrays, parameter_name
from gemfilter_jax.config import ModelConfig, refuse_unknown, take, take_flag, take_list, take_name, take_object
from gemfilter_jax.errors import UserError, reason
from gemfilter_jax.models.families import FAMILIES
from gemfilter_jax.models.transformer import Decoder

MANIFEST = "gemfilter.json"
_WEIGHTS, _TOKENIZER = "weights", "tokenizer"
_VERSION = 1
_LATE = ("Event loop is closed", "OCDBT")  # in the errors of writes and reads that end after the one that failed
_DATA = "d"  # folders of the only files that are read in part, and so may have any size
_LARGEST = 1 << 28  # bytes of another file
_MOST_PER_BYTE = 64
"""Bytes of arrays for each byte of the files that hold them. Weights hardly compress to less than a half, but chunks
that are missing or full of zeros take next to no bytes, whatever the size that is claimed for them."""


class OrbaxFolder:
    """An opened folder.

    Raises:
      UserError: a file is missing or damaged.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        path = folder / MANIFEST
        manifest, source = folder_files.read_object(path), str(path)
        version = take(manifest, "version", source)
        if type(version) is not int or version != _VERSION:
            raise UserError(
                f"{path}: version {reprlib.repr(version)} is not supported, only {_VERSION}; convert the model again"
            )
        refuse_unknown(manifest, {"version", "name", "config", "int8", "stop_tokens"}, source)
        self.name = take_name(manifest, "name", source)
        self.config = config_lib.from_json(ModelConfig, take_object(manifest, "config", source), f"{source} (config)")
        if (family := self.config.family) not in FAMILIES:
            raise UserError(
                f"{source}: family {reprlib.repr(family)} is not supported; supported: {', '.join(FAMILIES)}"
            )
        self._int8 = take_flag(manifest, "int8", source)
        self._stop_tokens = tuple(take_list(manifest, "stop_tokens", source, "token ids"))
        if not all(type(token) is int and 0 <= token < self.config.vocab for token in self._stop_tokens):
            raise UserError(
                f"{source}: field 'stop_tokens' is {reprlib.repr(self._stop_tokens)}, expected ids of the "
                f"{self.config.vocab:,} tokens"
            )

    def decoder(self, loading: Loading) -> Decoder:
        """The decoder; each array is read directly into its sharded layout."""
        if loading.int8 and not self._int8:
            raise UserError(
                f"{self.folder}: holds floating-point weights; for int8, convert the model with --weights=int8"
            )
        import orbax.checkpoint as ocp

        loading = dataclasses.replace(loading, int8=self._int8)
        leaves, structure = jax.tree_util.tree_flatten_with_path(abstract_decoder(self.config, loading))
        wanted = {parameter_name(path): leaf for path, leaf in leaves}
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        arguments = {
            name: ocp.ArrayRestoreArgs(
                sharding=leaf.sharding or device,
                global_shape=leaf.shape,
                strict=False,  # allows reading only the first layers of a stack
                dtype=leaf.dtype,
            )
            for name, leaf in wanted.items()
        }
        path = (self.folder / _WEIGHTS).absolute()
        for file in path.rglob("*"):
            if not file.is_dir():
                files.check_plain(file, None if file.parent.name == _DATA else _LARGEST)
        try:
            with _quiet(), ocp.PyTreeCheckpointer() as checkpointer:
                stored = checkpointer.metadata(path).item_metadata.tree
                check_arrays(self.config, {name: array.shape for name, array in stored.items()}, self._int8, str(path))
                _check_sizes(stored, path)
                restore = ocp.args.PyTreeRestore(
                    item=dict.fromkeys(wanted, 0), restore_args=arguments, partial_restore=True
                )
                arrays = checkpointer.restore(path, args=restore)
        except UserError:
            raise
        except Exception as error:  # Orbax and TensorStore raise many kinds for a missing or damaged file
            raise UserError(f"{path}: damaged or incomplete Orbax checkpoint ({reason(error)})") from error
        if loading.progress:
            size = sum(array.nbytes for array in arrays.values())
            loading.progress(size, size)
        return jax.tree.unflatten(structure, [arrays[name] for name in wanted])

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that was saved with the weights."""
        from gemfilter_jax.checkpoints import tokenizer_folder

        return tokenizer_folder.load(self.folder / _TOKENIZER, self.folder)

    def stop_tokens(self) -> tuple[int, ...]:
        """Ids that end an answer."""
        return self._stop_tokens


def save(
    folder: pathlib.Path,
    name: str,
    model: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    stop_tokens: tuple[int, ...],
) -> None:
    """Write a model to a new folder, which appears complete or not at all.

    Raises:
      UserError: the folder exists or cannot be written.
    """
    import orbax.checkpoint as ocp

    files.check_new_folder(folder)
    leaves, _ = jax.tree_util.tree_flatten_with_path(model)
    manifest = {
        "version": _VERSION,
        "name": name,
        "config": config_lib.to_json(model.config),
        "int8": model.holds_int8,
        "stop_tokens": list(stop_tokens),
    }
    try:
        with files.folder_aside(folder) as aside:
            with _quiet(), ocp.PyTreeCheckpointer() as checkpointer:
                checkpointer.save(aside / _WEIGHTS, {parameter_name(path): leaf for path, leaf in leaves})
            tokenizer.save_pretrained(aside / _TOKENIZER)
            (aside / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    except Exception as error:  # Orbax, TensorStore and tokenizers raise many kinds for a full disk
        raise UserError(f"{folder}: cannot be written ({reason(error)})") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep an error from being printed besides: it is told once, by what is raised.

    Orbax logs it. It also closes its event loop, and what TensorStore's threads still wrote or read is told later, by
    them or when its future is collected: after a failure, such errors stay unprinted.
    """
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    before, hook = [logger.disabled for logger in loggers], sys.unraisablehook
    sys.unraisablehook = lambda told: None if _is_late(told.exc_value) else hook(told)
    for logger in loggers:
        logger.disabled = True
    try:
        yield
        sys.unraisablehook = hook
    except BaseException:
        logging.getLogger("asyncio").addFilter(_is_no_late_record)
        raise
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled


def _is_late(error: BaseException | None) -> bool:
    return any(words in str(error) for words in _LATE)


def _is_no_late_record(record: logging.LogRecord) -> bool:
    return not (record.exc_info and _is_late(record.exc_info[1]))


def _check_sizes(stored: Mapping[str, Any], path: pathlib.Path) -> None:
    """Raise a `UserError` if reading arrays would take far more memory than their files hold.

    Args:
      stored: name -> Orbax's metadata of an array.
    """
    for name, array in stored.items():
        chunk = array.storage.chunk_shape
        if math.prod(chunk) > math.prod(array.shape):
            raise UserError(f"{path}: {name} of shape {list(array.shape)} has larger chunks, of shape {list(chunk)}")
    claimed = sum(math.prod(array.shape) * array.dtype.itemsize for array in stored.values())
    held = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    if claimed > _MOST_PER_BYTE * held:
        raise UserError(
            f"{path}: the arrays take {claimed:,} bytes and the files {held:,}, expected at least one in "
            f"{_MOST_PER_BYTE} of those; convert the model again"
        )
