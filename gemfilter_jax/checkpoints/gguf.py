"""GGUF files (llama.cpp's format): config and tokenizer from the metadata, weights dequantised."""

import pathlib
from collections.abc import Mapping
from typing import Any

import gguf
import jax
import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from gemfilter_jax.checkpoints.weights import build_decoder, tensor_names
from gemfilter_jax.config import (
    FactorRope,
    LinearRope,
    ModelConfig,
    RopeScaling,
    refuse_unknown,
    take,
    take_count,
    take_positive,
)
from gemfilter_jax.errors import UserError
from gemfilter_jax.models.decoder import Decoder

_MAGIC = b"GGUF"
_ROPE_FACTORS = "rope_freqs.weight"
_READ = {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon",
    "rope.freq_base", "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor", "vocab_size",
}  # fmt: skip
_CONTROL, _USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type

# How text is split before byte-pair merging, by the metadata's name for it. The Llama 3 pattern is the one in the
# tokenizer.json that Meta publishes with the model.
_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split_digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def _split_llama3() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_LLAMA3_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


_PRE_TOKENIZERS = {
    "smollm": _split_digits,
    "llama-bpe": _split_llama3,
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
}


class GGUFFile:
    """An opened GGUF file of the llama architecture.

    Raises:
      UserError: the file is not GGUF, is damaged, or holds an architecture or setting that is not supported.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        with path.open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise UserError(f"{path}: not a GGUF file (it does not begin with {_MAGIC.decode()!r})")
        try:
            reader = gguf.GGUFReader(path)
            self.metadata: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
            self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        except Exception as error:  # the reader trusts its input: damage shows as whatever error comes first
            raise UserError(f"{path}: damaged or truncated GGUF file ({error})") from error
        self._refuse_unsupported()
        self.config = self._config()

    @property
    def name(self) -> str:
        """The model's own name for itself."""
        return str(self.metadata.get("general.name") or self.path.stem)

    def decoder(self, dtype: jax.typing.DTypeLike) -> Decoder:
        """The weights, dequantised."""
        ours = self._names()
        shapes = {ours.get(name, name): tuple(map(int, t.shape[::-1])) for name, t in self._tensors.items()}
        shapes.pop(_ROPE_FACTORS, None)
        theirs = {hf: name for name, hf in ours.items()}

        def read(name: str) -> np.ndarray:
            tensor = self._dequantised(theirs[name])
            if name.endswith(("q_proj.weight", "q_proj.bias")):
                return _undo_interleaving(tensor, self.config.heads)
            if name.endswith(("k_proj.weight", "k_proj.bias")):
                return _undo_interleaving(tensor, self.config.kv_heads)
            return tensor

        return build_decoder(self.config, shapes, read, dtype=dtype, source=str(self.path))

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """A fast tokenizer with the file's chat template."""
        source = str(self.path)
        kind = take(self.metadata, "tokenizer.ggml.model", source)
        if kind != "gpt2":
            raise UserError(f"{source}: tokenizer model {kind!r} is not supported; supported: gpt2 (byte-level BPE)")
        split = self.metadata.get("tokenizer.ggml.pre", "gpt-2")
        if split not in _PRE_TOKENIZERS:
            raise UserError(
                f"{source}: pre-tokenizer {split!r} is not supported; supported: {', '.join(_PRE_TOKENIZERS)}"
            )
        tokens = take(self.metadata, "tokenizer.ggml.tokens", source)
        kinds = take(self.metadata, "tokenizer.ggml.token_type", source)
        merges = [tuple(merge.split(" ", 1)) for merge in take(self.metadata, "tokenizer.ggml.merges", source)]
        tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
        tokenizer.pre_tokenizer = _PRE_TOKENIZERS[split]()
        tokenizer.decoder = decoders.ByteLevel()
        if len(kinds) != len(tokens):
            raise UserError(f"{source}: {len(tokens)} tokens but {len(kinds)} token types")
        special = [AddedToken(tokens[i], special=True, normalized=False) for i, k in enumerate(kinds) if k == _CONTROL]
        tokenizer.add_special_tokens(special)
        tokenizer.add_tokens(
            [AddedToken(tokens[i], normalized=False) for i, k in enumerate(kinds) if k == _USER_DEFINED]
        )
        roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
        ids = {role: self.metadata.get(f"tokenizer.ggml.{field}_token_id") for role, field in roles.items()}
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            chat_template=self.metadata.get("tokenizer.chat_template"),
            clean_up_tokenization_spaces=False,
            **{role: tokens[i] for role, i in ids.items() if i is not None and 0 <= i < len(tokens)},
        )

    def stop_tokens(self) -> tuple[int, ...]:
        """Ids that end an answer: end of sequence, of turn, of message."""
        ids = (self.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
        return tuple(dict.fromkeys(i for i in ids if i is not None))

    def _refuse_unsupported(self) -> None:
        architecture = self.metadata.get("general.architecture")
        if architecture != "llama":
            raise UserError(f"{self.path}: architecture {architecture!r} is not supported; supported: llama")
        refuse_unknown(self._fields(), _READ, f"{self.path} (llama.*)")

    def _fields(self) -> Mapping[str, Any]:
        prefix = "llama."
        return {name.removeprefix(prefix): v for name, v in self.metadata.items() if name.startswith(prefix)}

    def _config(self) -> ModelConfig:
        fields, source = self._fields(), f"{self.path} (llama.*)"
        heads, width = (take_count(fields, name, source) for name in ("attention.head_count", "embedding_length"))
        head_width = take_count(fields, "attention.key_length", source, max(width // heads, 1))
        for name in ("attention.value_length", "rope.dimension_count"):
            if fields.get(name, head_width) != head_width:
                raise UserError(f"{source}: {name} is {fields[name]}; only the head width, {head_width}, will do")
        embedding = self._tensors.get("token_embd.weight")
        if embedding is None:
            raise UserError(f"{self.path}: tensor token_embd.weight is missing")
        return ModelConfig(
            family="llama",
            layers=take_count(fields, "block_count", source),
            width=width,
            heads=heads,
            kv_heads=take_count(fields, "attention.head_count_kv", source, heads),
            head_width=head_width,
            mlp_width=take_count(fields, "feed_forward_length", source),
            vocab=int(embedding.shape[-1]),
            context=take_count(fields, "context_length", source),
            rms_eps=take_positive(fields, "attention.layer_norm_rms_epsilon", source),
            rope_theta=take_positive(fields, "rope.freq_base", source, 10000.0),
            rope_scaling=self._rope_scaling(fields, source),
            tie_embeddings="output.weight" not in self._tensors,
            attention_bias="blk.0.attn_q.bias" in self._tensors,
        )

    def _rope_scaling(self, fields: Mapping[str, Any], source: str) -> RopeScaling | None:
        kind = fields.get("rope.scaling.type", "none")
        if kind not in ("none", "linear"):
            raise UserError(f"{source}: rope scaling {kind!r} is not supported; supported: none, linear")
        linear = LinearRope(take_positive(fields, "rope.scaling.factor", source)) if kind == "linear" else None
        if _ROPE_FACTORS not in self._tensors:
            return linear
        if linear:
            raise UserError(f"{source}: rope scaling {kind!r} together with tensor {_ROPE_FACTORS} is not supported")
        return FactorRope(tuple(self._dequantised(_ROPE_FACTORS).ravel().tolist()))

    def _names(self) -> dict[str, str]:
        """Hugging Face's name of every tensor name that the file may hold."""
        table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, self.config.layers)
        names = {}
        for hf in tensor_names(self.config.layers):
            base, _, suffix = hf.rpartition(".")
            names[f"{table.get_name(base)}.{suffix}"] = hf
        return names

    def _dequantised(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        try:
            return gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise UserError(
                f"{self.path}: tensor {name} is quantised as {tensor.tensor_type.name}, "
                "which the gguf package does not dequantise"
            ) from error


def _undo_interleaving(tensor: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads * E, ...] from GGUF's order, rotated pairs side by side, to the halves of `models.rotary`."""
    pairs = tensor.reshape(heads, tensor.shape[0] // heads // 2, 2, *tensor.shape[1:])
    return pairs.swapaxes(1, 2).reshape(tensor.shape)
