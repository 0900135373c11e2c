"""Folders written by `gemfilter convert`: weights as Orbax arrays, config and tokenizer beside them.

Orbax reads only each device's shard of an array, so a checkpoint loads directly into any sharded layout.
"""

import dataclasses
import json
import pathlib
import shutil
import tempfile
from typing import Any

import jax
import orbax.checkpoint as ocp
from transformers import PreTrainedTokenizerBase

from gemfilter_jax import config as config_lib
from gemfilter_jax import files
from gemfilter_jax.checkpoints import tokenizer_folder
from gemfilter_jax.checkpoints.weights import Loading, abstract_decoder, check_arrays, parameter_name
from gemfilter_jax.config import ModelConfig, take, take_flag
from gemfilter_jax.errors import UserError, reason
from gemfilter_jax.models.families import FAMILIES
from gemfilter_jax.models.transformer import Decoder

MANIFEST = "gemfilter.json"
_WEIGHTS, _TOKENIZER = "weights", "tokenizer"
_VERSION = 1
_SCALINGS = {
    kind.__name__: kind
    for kind in (
        config_lib.Llama3Rope,
        config_lib.LinearRope,
        config_lib.FactorRope,
        config_lib.LongRope,
        config_lib.YarnRope,
    )
}


class OrbaxFolder:
    """An opened folder.

    Raises:
      UserError: a file is missing or damaged.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        path = folder / MANIFEST
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            version = manifest["version"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not a manifest written by gemfilter convert ({error!r})") from error
        if version != _VERSION:
            raise UserError(f"{path}: version {version} is not supported, only {_VERSION}; convert the model again")
        self.name = str(take(manifest, "name", str(path)))
        self.config = _config_from_json(take(manifest, "config", str(path)), str(path))
        self._int8 = take_flag(manifest, "int8", str(path))
        self._stop_tokens = tuple(take(manifest, "stop_tokens", str(path)))

    def decoder(self, loading: Loading) -> Decoder:
        """The decoder; each array is read directly into its sharded layout."""
        if loading.int8 and not self._int8:
            raise UserError(
                f"{self.folder}: holds floating-point weights; for int8, convert the model with --weights=int8"
            )
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
        try:
            with ocp.PyTreeCheckpointer() as checkpointer:
                stored = checkpointer.metadata(path).item_metadata.tree
                check_arrays(self.config, {name: array.shape for name, array in stored.items()}, self._int8, str(path))
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
    files.check_new_folder(folder)
    aside = pathlib.Path(tempfile.mkdtemp(dir=folder.absolute().parent, prefix=f".{folder.name}."))
    try:
        leaves, _ = jax.tree_util.tree_flatten_with_path(model)
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(aside.absolute() / _WEIGHTS, {parameter_name(path): leaf for path, leaf in leaves})
        tokenizer.save_pretrained(aside / _TOKENIZER)
        manifest = {
            "version": _VERSION,
            "name": name,
            "config": _config_to_json(model.config),
            "int8": model.layers.query.scale is not None,
            "stop_tokens": list(stop_tokens),
        }
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        aside.chmod(0o755)
        aside.rename(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _config_to_json(config: ModelConfig) -> dict[str, Any]:
    fields = dataclasses.asdict(config)
    if config.rope_scaling is not None:
        fields["rope_scaling"] = {"kind": type(config.rope_scaling).__name__, **fields["rope_scaling"]}
    return fields


def _config_from_json(fields: Any, source: str) -> ModelConfig:
    try:
        values = {name: _tuple(value) for name, value in fields.items()}
        scaling = values.pop("rope_scaling", None)
        if scaling is not None:
            kind = _SCALINGS[scaling["kind"]]
            scaling = kind(**{name: _tuple(value) for name, value in scaling.items() if name != "kind"})
        config = ModelConfig(**values, rope_scaling=scaling)
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{source}: field 'config' is damaged ({error!r})") from error
    if config.family not in FAMILIES:
        raise UserError(f"{source}: family {config.family!r} is not supported; supported: {', '.join(FAMILIES)}")
    return config


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
