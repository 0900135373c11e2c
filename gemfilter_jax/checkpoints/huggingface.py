"""Hugging Face model folders: config.json, safetensors (whole or in shards), tokenizer files."""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gemfilter_jax.checkpoints.weights import build_decoder
from gemfilter_jax.config import ModelConfig, take
from gemfilter_jax.errors import UserError
from gemfilter_jax.models import llama
from gemfilter_jax.models.decoder import Decoder

_FAMILIES = {"llama": llama.config_from_hf}


class HuggingFaceFolder:
    """An opened model folder.

    Raises:
      UserError: a file is missing or damaged, or the architecture is not supported.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self._fields = _read_json(folder / "config.json")
        family = take(self._fields, "model_type", str(folder / "config.json"))
        if not isinstance(family, str) or family not in _FAMILIES:
            raise UserError(
                f"{folder / 'config.json'}: model_type {family!r} is not supported; supported: {', '.join(_FAMILIES)}"
            )
        self.config: ModelConfig = _FAMILIES[family](self._fields, str(folder / "config.json"))

    @property
    def name(self) -> str:
        """The name the folder gives itself, else the folder's own."""
        return self._fields.get("_name_or_path") or self.folder.name

    def decoder(self, dtype: jax.typing.DTypeLike) -> Decoder:
        """The weights, from all shards."""
        # "flax" rather than "numpy", which has no bfloat16 in older releases.
        files = {path: self._open(path) for path in self._weight_files()}
        place = {name: file for file in files.values() for name in file.keys()}  # noqa: SIM118 - not a dict
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name, file in place.items()}

        def read(name: str) -> np.ndarray:
            tensor = np.asarray(place[name].get_tensor(name))
            if not jnp.issubdtype(tensor.dtype, jnp.floating):
                raise UserError(f"{self.folder}: tensor {name} is {tensor.dtype}, expected floating-point weights")
            return tensor

        return build_decoder(self.config, shapes, read, dtype=dtype, source=str(self.folder))

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The folder's own tokenizer and chat template."""
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        except Exception as error:  # transformers raises many kinds for a missing or broken file
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"{self.folder}: no usable tokenizer ({reason})") from error
        if not tokenizer.is_fast:
            raise UserError(f"{self.folder}: the tokenizer has no fast form (tokenizer.json), which offsets need")
        return tokenizer

    def stop_tokens(self) -> tuple[int, ...]:
        """Ids that end an answer, from generation_config.json or else config.json."""
        path = self.folder / "generation_config.json"
        generation = _read_json(path) if path.exists() else {}
        ids = generation.get("eos_token_id", self._fields.get("eos_token_id"))
        ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
        if not all(isinstance(token, int) for token in ids):
            raise UserError(f"{self.folder}: eos_token_id is {ids!r}, expected whole numbers")
        return tuple(ids)

    def _weight_files(self) -> list[pathlib.Path]:
        index = self.folder / "model.safetensors.index.json"
        if index.exists():
            places = take(_read_json(index), "weight_map", str(index))
            names = list(places.values()) if isinstance(places, dict) else [places]
            if not all(isinstance(name, str) and pathlib.PurePath(name).name == name for name in names):
                raise UserError(f"{index}: weight_map must name files of this folder for tensors")
            return sorted(self.folder / name for name in set(names))
        whole = self.folder / "model.safetensors"
        if whole.exists():
            return [whole]
        if any(self.folder.glob("*.bin")):
            raise UserError(f"{self.folder}: only pickled .bin weights, which are never loaded; save as safetensors")
        raise UserError(f"{self.folder}: no model.safetensors and no model.safetensors.index.json")

    def _open(self, path: pathlib.Path) -> safe_open:
        if not path.exists():
            raise UserError(f"{path}: missing, although the index names it")
        try:
            return safe_open(path, framework="flax")
        except SafetensorError as error:
            raise UserError(f"{path}: damaged or truncated safetensors file ({error})") from error


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent}: not a model folder, {path.name} is missing") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(fields, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(fields).__name__}")
    return fields
