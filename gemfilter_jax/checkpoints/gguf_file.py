"""GGUF files (llama.cpp's format): config and tokenizer from the metadata, weights dequantised."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np
from transformers import PreTrainedTokenizerBase

from gemfilter_jax.checkpoints import gguf_header, gguf_tokenizer
from gemfilter_jax.checkpoints.weights import Loading, Tensors, build_decoder
from gemfilter_jax.config import (
    FactorRope,
    LinearRope,
    LongRope,
    ModelConfig,
    RopeScaling,
    YarnRope,
    refuse_unknown,
    take_count,
    take_numbers,
    take_positive,
)
from gemfilter_jax.errors import UserError
from gemfilter_jax.models import families
from gemfilter_jax.models.families.family import Family
from gemfilter_jax.models.families.hf_config import longrope_attention_scaling, yarn_attention_scaling
from gemfilter_jax.models.transformer import Decoder

_READ = {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon",
    "attention.sliding_window", "rope.freq_base", "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor",
    "rope.scaling.original_context_length", "rope.scaling.attn_factor", "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow", "rope.scaling.finetuned", "vocab_size",
}  # fmt: skip
_SCALINGS = ("none", "linear", "yarn", "longrope")
_FACTORS, _LONG_FACTORS, _SHORT_FACTORS = (
    f"{name}.weight" for name in ("rope_freqs", "rope_factors_long", "rope_factors_short")
)


class GGUFFile:
    """An opened GGUF file.

    Raises:
      UserError: the file is not GGUF, is damaged, or holds an architecture or setting that is not supported.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        header = gguf_header.read_header(path)
        self._metadata, self._tensors = header.metadata, header.tensors
        architecture = self._metadata.get("general.architecture")
        known = families.by_gguf_architecture()
        if not isinstance(architecture, str) or architecture not in known:
            raise UserError(f"{path}: architecture {architecture!r} is not supported; supported: {', '.join(known)}")
        self.config = self._config(known[architecture])

    @property
    def name(self) -> str:
        """The model's own name for itself."""
        return str(self._metadata.get("general.name") or self.path.stem)

    def decoder(self, loading: Loading) -> Decoder:
        """The decoder with dequantised weights."""
        return build_decoder(self.config, self.tensors(), loading, source=str(self.path))

    def tensors(self) -> Tensors:
        """The weights under their Hugging Face names, dequantised as they are read."""
        return _Dequantised(self.path, self._tensors, self.config)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """A fast tokenizer with the file's chat template."""
        return gguf_tokenizer.build_tokenizer(self._metadata, str(self.path))

    def stop_tokens(self) -> tuple[int, ...]:
        """Ids that end an answer."""
        return gguf_tokenizer.stop_tokens(self._metadata)

    def _config(self, family: Family) -> ModelConfig:
        prefix, source = f"{family.gguf_architecture}.", f"{self.path} ({family.gguf_architecture}.*)"
        fields = {name.removeprefix(prefix): v for name, v in self._metadata.items() if name.startswith(prefix)}
        refuse_unknown(fields, _READ, source)
        heads, width = (take_count(fields, name, source) for name in ("attention.head_count", "embedding_length"))
        head_width = take_count(fields, "attention.key_length", source, max(width // heads, 1))
        if fields.get("attention.value_length", head_width) != head_width:
            raise UserError(
                f"{source}: attention.value_length is {fields['attention.value_length']}; only the head width, "
                f"{head_width}, will do"
            )
        rotated = take_count(fields, "rope.dimension_count", source, head_width)
        embedding = self._tensors.get("token_embd.weight")
        if embedding is None:
            raise UserError(f"{self.path}: tensor token_embd.weight is missing")
        layers, context = (take_count(fields, name, source) for name in ("block_count", "context_length"))
        if layers > len(self._tensors):
            raise UserError(
                f"{self.path}: the tensors do not fit the model's config: it says {layers} layers, "
                f"and there are {len(self._tensors)} tensors"
            )
        # Converters write 0 for a model without sliding windows.
        window = fields.get("attention.sliding_window") or None
        config = ModelConfig(
            family=family.model_types[0],
            layers=layers,
            width=width,
            heads=heads,
            kv_heads=take_count(fields, "attention.head_count_kv", source, heads),
            head_width=head_width,
            mlp_width=take_count(fields, "feed_forward_length", source),
            vocab=embedding.shape[0],
            context=context,
            rms_eps=take_positive(fields, "attention.layer_norm_rms_epsilon", source),
            rope_theta=take_positive(fields, "rope.freq_base", source, 10000.0),
            rope_scaling=self._rope_scaling(fields, context, source),
            rotary_width=None if rotated == head_width else rotated,
            sliding_windows=(
                (take_count(fields, "attention.sliding_window", source),) * layers if window is not None else None
            ),
            tie_embeddings="output.weight" not in self._tensors,
            attention_bias="blk.0.attn_q.bias" in self._tensors,
            output_bias="blk.0.attn_output.bias" in self._tensors,
            mlp_bias="blk.0.ffn_gate.bias" in self._tensors,
        )
        return dataclasses.replace(config, **family.gguf_implies)

    def _rope_scaling(self, fields: Mapping[str, Any], context: int, source: str) -> RopeScaling | None:
        kind = fields.get("rope.scaling.type", "none")
        if kind not in _SCALINGS:
            raise UserError(f"{source}: rope scaling {kind!r} is not supported; supported: {', '.join(_SCALINGS)}")
        tables = {_FACTORS, _LONG_FACTORS, _SHORT_FACTORS} & set(self._tensors)
        if tables and kind not in ("none", "longrope"):
            raise UserError(f"{source}: rope scaling {kind!r} together with tensor {min(tables)} is not supported")
        original = take_count(fields, "rope.scaling.original_context_length", source, context)
        if kind == "longrope" or _LONG_FACTORS in tables:
            scaling = longrope_attention_scaling(context / original, original)
            return LongRope(
                short_factors=self._numbers(_SHORT_FACTORS),
                long_factors=self._numbers(_LONG_FACTORS),
                original_context=original,
                attention_scaling=take_positive(fields, "rope.scaling.attn_factor", source, scaling),
            )
        if _FACTORS in tables:
            return FactorRope(self._numbers(_FACTORS))
        if kind == "linear":
            return LinearRope(take_positive(fields, "rope.scaling.factor", source))
        if kind == "yarn":
            factor = take_positive(fields, "rope.scaling.factor", source)
            attention = take_positive(fields, "rope.scaling.attn_factor", source, 1.0)
            return YarnRope(
                factor=factor,
                original_context=original,
                attention_scaling=attention * yarn_attention_scaling(factor),
                beta_fast=take_positive(fields, "rope.scaling.yarn_beta_fast", source, 32.0),
                beta_slow=take_positive(fields, "rope.scaling.yarn_beta_slow", source, 1.0),
            )
        return None

    def _numbers(self, name: str) -> tuple[float, ...]:
        if name not in self._tensors:
            raise UserError(f"{self.path}: tensor {name} is missing")
        tensor = self._tensors[name]
        values = gguf_header.read_rows(self.path, tensor, 0, tensor.shape[0]).ravel().tolist()
        return take_numbers({name: values}, name, f"{self.path} (tensors)")


def hf_names(config: ModelConfig) -> dict[str, str]:
    """GGUF name -> Hugging Face name, of every tensor that a GGUF file of this family and size may hold."""
    architecture = families.FAMILIES[config.family].gguf_architecture
    (known,) = (arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(known, config.layers)
    names = {}
    for hf in families.tensors(config):
        base, _, suffix = hf.rpartition(".")
        names[f"{table.get_name(base)}.{suffix}"] = hf
    return names


class _Dequantised:
    """The tensors of a file; see `weights.Tensors`."""

    def __init__(self, path: pathlib.Path, tensors: Mapping[str, gguf_header.Tensor], config: ModelConfig):
        self._path, self._head_width = path, config.head_width
        self._interleaved = _interleaved(config)
        rotary = (_FACTORS, _LONG_FACTORS, _SHORT_FACTORS)
        names = hf_names(config)
        ours = set(names.values())  # a GGUF tensor with such a name would replace another
        self._tensors = {
            names.get(name, f"{name} (in GGUF)" if name in ours else name): tensor
            for name, tensor in tensors.items()
            if name not in rotary
        }
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}
        self.sizes = {name: tensor.size for name, tensor in self._tensors.items()}
        self.problems = ()

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows of a tensor, float32."""
        tensor = self._tensors[name]
        if name not in self._interleaved:
            return gguf_header.read_rows(self._path, tensor, start, stop)
        width = self._head_width  # read whole heads, because rows are reordered within a head
        first, last = start // width * width, -(-stop // width) * width
        heads = gguf_header.read_rows(self._path, tensor, first, last)
        return _undo_interleaving(heads, width)[start - first : stop - first]


def _interleaved(config: ModelConfig) -> set[str]:
    """Hugging Face names of the tensors whose rows `_undo_interleaving` must reorder."""
    if not families.FAMILIES[config.family].gguf_interleaved_rotary:
        return set()
    rotated = {"query.kernel", "query.bias", "key.kernel", "key.bias"}
    return {name for name, (_, targets) in families.tensors(config).items() if rotated.issuperset(targets)}


def _undo_interleaving(tensor: np.ndarray, head_width: int) -> np.ndarray:
    """Reorder rows [heads * E, ...] from GGUF's rotated pairs side by side to the halves of `models.rope`."""
    pairs = tensor.reshape(-1, head_width // 2, 2, *tensor.shape[1:])
    return pairs.swapaxes(1, 2).reshape(tensor.shape)
