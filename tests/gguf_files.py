"""Writes GGUF files as llama.cpp's converter does, from a Hugging Face model folder. Independent of our reader."""

import pathlib

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from model_files import Folder

_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_TOP_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
# Two control tokens, of which one ends an answer and the other has no role, and a user-defined one.
TOKENS = ["<|end|>", "<|turn|>", "<tool>", "Ġ", "a", "b", "ab", "Ġab", "1", "2", "12"]
TOKENS += [f"<unused{i}>" for i in range(len(TOKENS), 128)]
_TYPES = [gguf.TokenType.CONTROL, gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED]
MERGES = ["a b", "Ġ ab", "1 2"]


def quantised(tensor: np.ndarray, kind: Kind) -> tuple[np.ndarray, Kind]:
    """The stored form of a tensor: norms, biases and rows that no block fits stay float32, as in the converter."""
    fits = tensor.ndim == 2 and tensor.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0
    kind = kind if fits else Kind.F32
    return gguf.quants.quantize(tensor, kind), kind


def write(
    path: pathlib.Path,
    folder: Folder,
    kind: Kind = Kind.F32,
    *,
    architecture: str = "llama",
    pre_tokenizer: str = "gpt-2",
    extra: dict[str, str] | None = None,
) -> pathlib.Path:
    """Write `folder` with matrices stored as `kind`; `extra` holds further string metadata."""
    fields, writer = folder.fields, gguf.GGUFWriter(path, architecture)
    head_width = fields["head_dim"]
    writer.add_block_count(fields["num_hidden_layers"])
    writer.add_context_length(fields["max_position_embeddings"])
    writer.add_embedding_length(fields["hidden_size"])
    writer.add_feed_forward_length(fields["intermediate_size"])
    writer.add_head_count(fields["num_attention_heads"])
    writer.add_head_count_kv(fields["num_key_value_heads"])
    writer.add_key_length(head_width)
    writer.add_value_length(head_width)
    writer.add_layer_norm_rms_eps(fields["rms_norm_eps"])
    writer.add_rope_dimension_count(head_width)
    writer.add_rope_freq_base(fields["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(fields["vocab_size"])
    for name, value in (extra or {}).items():
        writer.add_string(name, value)
    _add_rope_scaling(writer, fields["rope_parameters"], head_width)
    _add_tokenizer(writer, pre_tokenizer)
    for name, tensor in folder.tensors.items():
        stored, stored_kind = quantised(_interleaved(name, tensor, fields), kind)
        writer.add_tensor(_gguf_name(name), stored, raw_dtype=stored_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _gguf_name(name: str) -> str:
    base, suffix = name.rsplit(".", 1)
    if base in _TOP_NAMES:
        return f"{_TOP_NAMES[base]}.{suffix}"
    _, _, layer, part = base.split(".", 3)
    return f"blk.{layer}.{_NAMES.get(part, part)}.{suffix}"


def _interleaved(name: str, tensor: np.ndarray, fields: dict) -> np.ndarray:
    """Query and key rows with rotated pairs side by side."""
    heads = {"q_proj": fields["num_attention_heads"], "k_proj": fields["num_key_value_heads"]}.get(name.split(".")[-2])
    if heads is None:
        return tensor
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(tensor.shape))


def _add_rope_scaling(writer: gguf.GGUFWriter, rope: dict, head_width: int) -> None:
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", np.array(_llama3_factors(rope, head_width), np.float32))


def _llama3_factors(rope: dict, head_width: int) -> list[float]:
    """What each frequency is divided by, following llama.cpp's converter."""
    low, high, context = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    factors = []
    for exponent in range(0, head_width, 2):
        wavelength = 2 * np.pi * rope["rope_theta"] ** (exponent / head_width)
        if wavelength < context / high:
            factors.append(1.0)
        elif wavelength > context / low:
            factors.append(rope["factor"])
        else:
            smooth = (context / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    assert 1.0 in factors
    assert rope["factor"] in factors
    assert len(set(factors)) > 2
    return factors


def _add_tokenizer(writer: gguf.GGUFWriter, pre_tokenizer: str) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(TOKENS)
    writer.add_token_types(_TYPES + [gguf.TokenType.NORMAL] * (len(TOKENS) - len(_TYPES)))
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(0)
