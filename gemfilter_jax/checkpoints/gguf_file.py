"""GGUF files (llama.cpp's format): config and tokenizer from the metadata, weights dequantised."""

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
from gemfilter_jax.models.families.hf_config import longrope_attention_scaling, yarn_attention_scaling
from gemfilter_jax.models.transformer import Decoder

# general.architecture, which is also the family. Mistral's models are stored as llama.
_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "phi3": gguf.MODEL_ARCH.PHI3,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
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
        self._architecture = self._metadata.get("general.architecture")
        if not isinstance(self._architecture, str) or self._architecture not in _ARCHITECTURES:
            raise UserError(
                f"{path}: architecture {self._architecture!r} is not supported; supported: {', '.join(_ARCHITECTURES)}"
            )
        self.config = self._config()

    @property
    def name(self) -> str:
        """The model's own name for itself."""
        return str(self._metadata.get("general.name") or self.path.stem)

    def decoder(self, loading: Loading) -> Decoder:
        """The weights, dequantised."""
        return build_decoder(self.config, self.tensors(), loading, source=str(self.path))

    def tensors(self) -> Tensors:
        """The weights under their Hugging Face names, dequantised as they are read."""
        return _Dequantised(self.path, self._tensors, self.config, self._hf_names())

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """A fast tokenizer with the file's chat template."""
        return gguf_tokenizer.build_tokenizer(self._metadata, str(self.path))

    def stop_tokens(self) -> tuple[int, ...]:
        """Ids that end an answer."""
        return gguf_tokenizer.stop_tokens(self._metadata)

    def _config(self) -> ModelConfig:
        prefix, source = f"{self._architecture}.", f"{self.path} ({self._architecture}.*)"
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
        # Of Phi-4 the converter writes 0, which says that no layer slides.
        window = fields.get("attention.sliding_window") or None
        return ModelConfig(
            family=str(self._architecture),
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
            attention_bias=self._architecture == "qwen2" or "blk.0.attn_q.bias" in self._tensors,
            output_bias="blk.0.attn_output.bias" in self._tensors,
            mlp_bias="blk.0.ffn_gate.bias" in self._tensors,
            qk_norm=self._architecture == "qwen3",
        )

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

    def _hf_names(self) -> dict[str, str]:
        """Hugging Face's name of every tensor name that the file may hold."""
        table = gguf.get_tensor_name_map(_ARCHITECTURES[self.config.family], self.config.layers)
        names = {}
        for hf in families.tensors(self.config):
            base, _, suffix = hf.rpartition(".")
            names[f"{table.get_name(base)}.{suffix}"] = hf
        return names


class _Dequantised:
    """The tensors of a file; see `weights.Tensors`."""

    def __init__(
        self,
        path: pathlib.Path,
        tensors: Mapping[str, gguf_header.Tensor],
        config: ModelConfig,
        hf_names: Mapping[str, str],
    ):
        self._path, self._config = path, config
        rotary = (_FACTORS, _LONG_FACTORS, _SHORT_FACTORS)
        ours = set(hf_names.values())  # not GGUF's: a tensor so named would stand in for another
        self._tensors = {
            hf_names.get(name, f"{name} (in GGUF)" if name in ours else name): tensor
            for name, tensor in tensors.items()
            if name not in rotary
        }
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}
        self.sizes = {name: tensor.size for name, tensor in self._tensors.items()}
        self.problems = ()

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows of a tensor, float32."""
        tensor = self._tensors[name]
        if self._config.family != "llama" or not (".q_proj." in name or ".k_proj." in name):
            return gguf_header.read_rows(self._path, tensor, start, stop)
        width = self._config.head_width  # whole heads, whose rows stand in another order
        first, last = start // width * width, -(-stop // width) * width
        heads = gguf_header.read_rows(self._path, tensor, first, last)
        return _undo_interleaving(heads, width)[start - first : stop - first]


def _undo_interleaving(tensor: np.ndarray, head_width: int) -> np.ndarray:
    """Rows [heads * E, ...] from GGUF's order, rotated pairs side by side, to the halves of `models.rotary`."""
    pairs = tensor.reshape(-1, head_width // 2, 2, *tensor.shape[1:])
    return pairs.swapaxes(1, 2).reshape(tensor.shape)
