"""Writes GGUF files as llama.cpp's converter does, from a Hugging Face model folder. Independent of our reader.

After `conversion/{base,llama,phi,qwen}.py` of https://github.com/ggml-org/llama.cpp.
"""

import math
import pathlib
import zlib
from collections.abc import Callable
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from model_files import Folder

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "phi3": "phi3", "qwen2": "qwen2", "qwen3": "qwen3"}
"""What each `model_type` is stored as. The converter knows no Ministral."""
_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_TOP_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
# Two control tokens, of which one ends an answer and the other has no role, and a user-defined one.
TOKENS = ["<|end|>", "<|turn|>", "<tool>", "Ġ", "a", "b", "ab", "Ġab", "1", "2", "12"]
TOKENS += [f"<unused{i}>" for i in range(len(TOKENS), 128)]
_TYPES = [gguf.TokenType.CONTROL, gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED]
_TYPES += [gguf.TokenType.NORMAL] * (len(TOKENS) - len(_TYPES))
MERGES = ["a b", "Ġ ab", "1 2"]

# Where in a block of bytes the scales are, float16; every other byte may be anything.
_SCALES = {Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2), Kind.Q6_K: (208,)}

KindOf = Callable[[str], Kind]
"""From a tensor's name, which is that of Hugging Face."""


def quantised(tensor: np.ndarray, kind: Kind) -> tuple[np.ndarray, Kind]:
    """The stored form of a tensor: norms, biases and rows that no block fits stay float32, as in the converter.

    The gguf package cannot quantise to K-quants: these are random blocks, other ones for other tensors.
    """
    block, block_size = gguf.GGML_QUANT_SIZES[kind]
    if tensor.ndim != 2 or tensor.shape[-1] % block:
        return gguf.quants.quantize(tensor, Kind.F32), Kind.F32
    if kind not in _SCALES:
        return gguf.quants.quantize(tensor, kind), kind
    rng = np.random.default_rng(zlib.crc32(tensor.tobytes()))
    blocks = rng.integers(0, 256, (tensor.size // block, block_size), np.uint8)
    for place in _SCALES[kind]:
        scales = rng.uniform(-0.01, 0.01, (len(blocks), 1)).astype(np.float16)
        blocks[:, place : place + 2] = scales.view(np.uint8)
    return blocks.reshape(len(tensor), -1), kind


def wide(model_type: str) -> Folder:
    """One layer whose rows are blocks of 256, as K-quants need."""
    fields: dict[str, Any] = {
        "model_type": model_type,
        "vocab_size": 32,
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "original_max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    if model_type == "qwen3":
        fields["head_dim"] = 128
    if model_type != "phi3":
        del fields["original_max_position_embeddings"]
    head = fields.get("head_dim", 64)
    query, key = 4 * head, 2 * head
    shapes = {
        "self_attn.o_proj.weight": (256, query),
        "mlp.down_proj.weight": (256, 256),
        "input_layernorm.weight": (256,),
        "post_attention_layernorm.weight": (256,),
    }
    if model_type == "phi3":
        shapes |= {"self_attn.qkv_proj.weight": (query + 2 * key, 256), "mlp.gate_up_proj.weight": (512, 256)}
    else:
        rows = {"q": query, "k": key, "v": key}
        shapes |= {f"self_attn.{name}_proj.weight": (count, 256) for name, count in rows.items()}
        shapes |= {f"mlp.{name}_proj.weight": (256, 256) for name in ("gate", "up")}
        if model_type == "qwen2":
            shapes |= {f"self_attn.{name}_proj.bias": (count,) for name, count in rows.items()}
        if model_type == "qwen3":
            shapes |= {f"self_attn.{name}_norm.weight": (head,) for name in "qk"}
    shapes = {f"model.layers.0.{name}": shape for name, shape in shapes.items()}
    shapes |= {"model.embed_tokens.weight": (32, 256), "model.norm.weight": (256,), "lm_head.weight": (32, 256)}
    rng = np.random.default_rng(0)
    return Folder(fields, {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()})


def dequantised(folder: Folder, kind: Kind | KindOf) -> Folder:
    """What a reader of the written file should find."""
    kind_of = kind if callable(kind) else lambda name: kind
    tensors = {
        name: gguf.quants.dequantize(*quantised(tensor, kind_of(name))).reshape(tensor.shape)
        for name, tensor in folder.tensors.items()
    }
    return Folder(folder.fields, tensors)


def write(
    path: pathlib.Path,
    folder: Folder,
    kind: Kind | KindOf = Kind.F32,
    *,
    architecture: str | None = None,
    pre_tokenizer: str = "gpt-2",
    extra: dict[str, str | int | float] | None = None,
) -> pathlib.Path:
    """Write `folder` with matrices stored as `kind`; `extra` holds further metadata, or other values of it."""
    architecture = architecture or ARCHITECTURES[folder.fields["model_type"]]
    writer, fields = gguf.GGUFWriter(path, architecture), folder.fields
    (_add_phi_fields if architecture == "phi3" else _add_fields)(writer, fields)
    for name, value in (extra or {}).items():
        writer.kv_data[0].pop(name, None)
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
        add(name, value)
    _add_tokenizer(writer, pre_tokenizer, fields["vocab_size"])
    kind_of = kind if callable(kind) else lambda name: kind
    for name, tensor in folder.tensors.items():
        stored, stored_kind = quantised(tensor, kind_of(name))
        stored = _interleaved(name, stored, fields) if architecture == "llama" else stored
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


def _add_sizes(writer: gguf.GGUFWriter, fields: dict) -> None:
    writer.add_block_count(fields["num_hidden_layers"])
    writer.add_context_length(fields["max_position_embeddings"])
    writer.add_embedding_length(fields["hidden_size"])
    writer.add_feed_forward_length(fields["intermediate_size"])
    writer.add_head_count(fields["num_attention_heads"])
    writer.add_head_count_kv(fields["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(fields["rms_norm_eps"])
    writer.add_rope_freq_base(fields["rope_parameters"]["rope_theta"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_fields(writer: gguf.GGUFWriter, fields: dict) -> None:
    """All that the converter reads: sliding windows are lost."""
    rope = fields["rope_parameters"]
    head_width = fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
    _add_sizes(writer, fields)
    if fields.get("head_dim") is not None:
        writer.add_key_length(head_width)
        writer.add_value_length(head_width)
    if writer.arch == "llama":
        writer.add_vocab_size(fields["vocab_size"])
        writer.add_rope_dimension_count(head_width)
    match rope["rope_type"]:
        case "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])
        case "yarn":
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(rope["factor"])
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        case "llama3":
            writer.add_tensor("rope_freqs.weight", np.array(_llama3_factors(rope, head_width), np.float32))


def _add_phi_fields(writer: gguf.GGUFWriter, fields: dict) -> None:
    """A window of 0 says that there is none. Nothing says that the factors are there but themselves."""
    rope, context = fields["rope_parameters"], fields["max_position_embeddings"]
    original = fields["original_max_position_embeddings"]
    _add_sizes(writer, fields)
    writer.add_rope_scaling_orig_ctx_len(original)
    share = rope.get("partial_rotary_factor", 1.0)
    writer.add_rope_dimension_count(int(share * fields["hidden_size"]) // fields["num_attention_heads"])
    writer.add_sliding_window(fields.get("sliding_window") or 0)
    if "long_factor" in rope:
        assert context > original
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(context / original) / math.log(original)))
        writer.add_tensor("rope_factors_long.weight", np.array(rope["long_factor"], np.float32))
        writer.add_tensor("rope_factors_short.weight", np.array(rope["short_factor"], np.float32))


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


def _add_tokenizer(writer: gguf.GGUFWriter, pre_tokenizer: str, vocab: int) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(TOKENS[:vocab])
    writer.add_token_types(_TYPES[:vocab])
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(0)
