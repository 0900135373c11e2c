"""Hugging Face model folders: config.json, safetensors (whole or in shards), tokenizer files."""

import math
import pathlib
import reprlib
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedTokenizerBase

from gemfilter_jax import files
from gemfilter_jax.checkpoints.folder_files import read_object
from gemfilter_jax.checkpoints.weights import Loading, build_decoder
from gemfilter_jax.config import ModelConfig, take
from gemfilter_jax.errors import UserError
from gemfilter_jax.models.families import FAMILIES
from gemfilter_jax.models.transformer import Decoder

_WHOLE = "model.safetensors"
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # per value, for each supported dtype of weights


class HuggingFaceFolder:
    """An opened model folder.

    Raises:
      UserError: a file is missing or damaged, or the architecture is not supported.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        path = folder / "config.json"
        self._fields = read_object(path)
        self.config = _config(self._fields, path)

    @property
    def name(self) -> str:
        """The name in config.json, else the folder's name."""
        return str(self._fields.get("_name_or_path") or self.folder.name)

    def decoder(self, loading: Loading) -> Decoder:
        """The decoder with its weights, from all shards."""
        return build_decoder(self.config, Shards(self.folder), loading, source=str(self.folder))

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The folder's own tokenizer and chat template; their classes are imported here, see `orbax_folder`."""
        from gemfilter_jax.checkpoints import tokenizer_folder

        return tokenizer_folder.load(self.folder, self.folder)

    def stop_tokens(self) -> tuple[int, ...]:
        """Ids that end an answer, from generation_config.json, else from config.json."""
        path = self.folder / "generation_config.json"
        generation = read_object(path) if path.exists() else {}
        ids = generation.get("eos_token_id", self._fields.get("eos_token_id"))
        ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
        if not all(type(token) is int and abs(token) < 2**31 for token in ids):
            raise UserError(f"{self.folder}: eos_token_id is {reprlib.repr(ids)}, expected whole numbers")
        return tuple(ids)


def read_config(path: pathlib.Path) -> ModelConfig:
    """A model's config from a config.json.

    Raises:
      UserError: it is missing or damaged, or the architecture is not supported.
    """
    return _config(read_object(path), path)


def _config(fields: dict[str, Any], path: pathlib.Path) -> ModelConfig:
    family = take(fields, "model_type", str(path))
    if not isinstance(family, str) or family not in FAMILIES:
        raise UserError(f"{path}: model_type {reprlib.repr(family)} is not supported; supported: {', '.join(FAMILIES)}")
    return FAMILIES[family].config_from_hf(fields, str(path))


class Shards:
    """The tensors of all safetensors files of a folder; see `weights.Tensors`."""

    def __init__(self, folder: pathlib.Path):
        self._folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.sizes: dict[str, int] = {}
        self.problems: list[str] = []
        self._places: dict[str, pathlib.Path] = {}
        index = self._index()
        for path in sorted({folder / place for place in index.values()} if index else {folder / _WHOLE}):
            self._add(path)
        if index:
            self._compare_with(index)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows of a tensor. Each call reopens the file, so that no mapped pages stay in memory."""
        with _opened(self._places[name]) as file:
            return file.get_slice(name)[start:stop]

    def _index(self) -> dict[str, str]:
        """Tensor name -> file name; empty for a folder with a single file."""
        path = self._folder / f"{_WHOLE}.index.json"
        if path.exists():
            places = take(read_object(path), "weight_map", str(path))
            names = list(places.values()) if isinstance(places, dict) else []
            if not names or not all(isinstance(name, str) and pathlib.PurePath(name).name == name for name in names):
                raise UserError(f"{path}: weight_map must name files of this folder for tensors")
            return dict(places)
        if (self._folder / _WHOLE).exists():
            return {}
        if any(self._folder.glob("*.bin")):
            raise UserError(
                f"{self._folder}: only pickled .bin weights, which are never loaded; where they come from a source you "
                "trust, save them again with transformers: "
                "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
            )
        raise UserError(f"{self._folder}: no {_WHOLE} and no {_WHOLE}.index.json")

    def _add(self, path: pathlib.Path) -> None:
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                stored = file.get_slice(name)
                shape, kind = tuple(stored.get_shape()), stored.get_dtype()
                if kind not in _BYTES:
                    raise UserError(
                        f"{path}: tensor {name} is {kind}, expected floating-point weights ({', '.join(_BYTES)})"
                    )
                if name in self._places:
                    self.problems.append(f"{name} is in both {self._places[name].name} and {path.name}")
                self._places[name], self.shapes[name] = path, shape
                self.sizes[name] = math.prod(shape) * _BYTES[kind]

    def _compare_with(self, index: dict[str, str]) -> None:
        for name, path in self._places.items():
            if name not in index:
                self.problems.append(f"{name} is in {path.name} but not in the index")
            elif index[name] != path.name:
                self.problems.append(f"{name} is in {path.name}, which the index says of {index[name]}")
        self.problems += [f"{name} is in the index but in no file" for name in index if name not in self._places]


def _opened(path: pathlib.Path) -> safe_open:
    files.check_plain(path)
    try:
        return safe_open(path, framework="numpy")
    except (OSError, UnicodeError):
        raise UserError(f"{path}: missing or not readable, although the folder's weights are in it") from None
    except SafetensorError as error:
        raise UserError(f"{path}: damaged or truncated safetensors file ({error})") from error
