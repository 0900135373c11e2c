"""What cannot be loaded faithfully is refused, in one clear line, before anything runs."""

import json
import pathlib
import shutil

import gguf_files
import numpy as np
import pytest
from model_files import FLOAT32, GOLDEN, Folder
from safetensors.numpy import load_file, save_file

from gemfilter_jax.checkpoints import gguf_header, load_checkpoint
from gemfilter_jax.checkpoints.gguf_file import GGUFFile
from gemfilter_jax.checkpoints.hf_folder import HuggingFaceFolder
from gemfilter_jax.errors import UserError
from gemfilter_jax.models.transformer import Decoder

WHOLE, SHARDED = GOLDEN / "llama_gqa_tied", GOLDEN / "llama_mha_untied"
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1],
    "long_factor": [1],
    "original_max_position_embeddings": 100,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 256}


def refusal(load, *words: str) -> None:
    """`load` raises a UserError whose one line holds all of `words`."""
    with pytest.raises(UserError) as caught:
        load()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def drop(folder: Folder) -> None:
    del folder.tensors["model.layers.1.mlp.up_proj.weight"]


def add(folder: Folder) -> None:
    folder.tensors["model.layers.0.self_attn.q_norm.weight"] = np.ones(8, np.float32)


def cut(folder: Folder) -> None:
    folder.tensors["model.norm.weight"] = folder.tensors["model.norm.weight"][:47].copy()


def add_to_all(folder: Folder) -> None:
    for layer in range(3):
        folder.tensors[f"model.layers.{layer}.self_attn.q_norm.weight"] = np.ones(8, np.float32)


def drop_from_all(folder: Folder) -> None:
    for layer in range(3):
        del folder.tensors[f"model.layers.{layer}.mlp.up_proj.weight"]


def fewer_layers(folder: Folder) -> None:
    folder.fields["num_hidden_layers"] -= 1


def more_layers(folder: Folder) -> None:
    folder.fields["num_hidden_layers"] += 2


def far_more_layers(folder: Folder) -> None:
    folder.fields["num_hidden_layers"] = 9999


TENSOR_FAULTS = [
    (drop, ["model.layers.1.mlp.up_proj.weight is missing"]),
    (add, [".0.", "q_norm.weight is unexpected"]),
    (cut, ["model.norm.weight has shape [47], expected [48]"]),
    (fewer_layers, [".2.", "norm.weight is unexpected"]),
    (more_layers, ["model.layers.3,4.mlp.gate_proj.weight is missing", "model.layers.3,4.input_layernorm.weight"]),
    (far_more_layers, ["9999", "29 tensors"]),
    (drop_from_all, ["model.layers.0,1,2.mlp.up_proj.weight is missing"]),
]


@pytest.mark.parametrize(("fault", "words"), TENSOR_FAULTS)
@pytest.mark.parametrize("container", ["safetensors", "gguf"])
def test_tensors_must_fit_the_config(tmp_path, fault, words, container):
    folder = Folder.read(WHOLE)
    fault(folder)
    if container == "gguf":
        path = gguf_files.write(tmp_path / "model.gguf", folder)
        refusal(lambda: GGUFFile(path).decoder(FLOAT32), path.name, "tensors do not fit", *words)
    else:
        path = folder.save(tmp_path / "folder")
        refusal(lambda: HuggingFaceFolder(path).decoder(FLOAT32), path.name, "tensors do not fit", *words)


def test_the_same_fault_in_many_layers_is_told_once(tmp_path):
    folder = Folder.read(WHOLE)
    add_to_all(folder)
    drop_from_all(folder)
    refusal(
        lambda: decode(folder.save(tmp_path / "folder")),
        "config: model.layers.0,1,2.mlp.up_proj.weight is missing; "
        "model.layers.0,1,2.self_attn.q_norm.weight is unexpected",
    )


def test_tensor_names_cannot_break_the_line(tmp_path):
    folder = Folder.read(WHOLE)
    folder.tensors["two\nlines \x1b[31m"] = np.ones(1, np.float32)
    refusal(lambda: decode(folder.save(tmp_path / "folder")), r"two\nlines \x1b[31m is unexpected")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("container", ["safetensors", "gguf"])
def test_weights_that_are_no_finite_numbers_are_loaded_with_a_warning(tmp_path, caplog, value, container):
    folder = Folder.read(WHOLE)
    folder.tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = value
    if container == "gguf":
        opened = GGUFFile(gguf_files.write(tmp_path / "model.gguf", folder))
    else:
        opened = HuggingFaceFolder(folder.save(tmp_path / "folder"))
    with caplog.at_level("WARNING", logger="absl"):
        model = opened.decoder(FLOAT32)
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        "tensor model.layers.1.mlp.down_proj.weight holds values that are not finite numbers"
    ]
    np.testing.assert_array_equal(model.layers.down.kernel[1, 5, 3], np.float32(value))


def test_finite_weights_load_without_a_warning(caplog):
    decode(WHOLE)
    assert not caplog.records


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sliding_window": 4096}, ["unsupported field", "sliding_window"]),
        ({"quantization_config": {"bits": 4}}, ["unsupported field", "quantization_config"]),
        ({"model_type": "mamba"}, ["model_type 'mamba' is not supported", "llama"]),
        ({"model_type": None}, ["'model_type' is missing"]),
        ({"hidden_size": None}, ["'hidden_size' is missing"]),
        ({"rope_parameters": {"rope_type": "ntk", "factor": 4.0}}, ["rope type 'ntk' is not supported", "llama3"]),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic"}}, ["rope type 'dynamic' is not supported"]),
        ({"rope_parameters": {"rope_type": "linear"}}, ["'factor' is missing"]),
        ({"rope_interleaved": True}, ["rope_interleaved", "not supported"]),
        ({"num_key_value_heads": 4}, ["6 query heads", "4 key/value heads"]),
        ({"head_dim": 7}, ["7 of a head", "even number"]),
        ({"num_hidden_layers": "3"}, ["'num_hidden_layers' is '3'", "whole number"]),
        ({"num_hidden_layers": True}, ["'num_hidden_layers' is True"]),
        ({"num_attention_heads": 0}, ["'num_attention_heads' is 0"]),
        ({"num_key_value_heads": 0}, ["'num_key_value_heads' is 0"]),
        ({"hidden_size": 50, "head_dim": None}, ["hidden_size 50 is no multiple"]),
        ({"rms_norm_eps": "1e-5"}, ["'rms_norm_eps' is '1e-5'", "number above 0"]),
        ({"rope_parameters": None, "rope_theta": 0}, ["'rope_theta' is 0"]),
        ({"rope_parameters": [1]}, ["'rope_parameters' is [1]"]),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, ["'factor' is 0"]),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2, "mscale": 3}}, ["unsupported field", "mscale"]),
        ({"tie_word_embeddings": "yes"}, ["'tie_word_embeddings' is 'yes'"]),
        ({"model_type": ["llama"]}, ["model_type ['llama'] is not supported"]),
        ({"num_hidden_layers": 10**9}, ["'num_hidden_layers' is 1000000000", "at most 10,000"]),
        ({"intermediate_size": 10**12}, ["'intermediate_size' is 1000000000000", "at most 2,147,483,647"]),
        ({"rms_norm_eps": 10**400}, ["'rms_norm_eps' is 1000", "float32"]),
        ({"rms_norm_eps": 1e-60}, ["'rms_norm_eps' is 1e-60", "float32"]),
        ({"partial_rotary_factor": 0.5}, ["unsupported field", "partial_rotary_factor"]),
        ({"rope_parameters": {"partial_rotary_factor": 3}}, ["'partial_rotary_factor' is 3", "at most 1"]),
        ({"rope_parameters": {"partial_rotary_factor": 0.1}}, ["0 of a head"]),
        ({"rope_parameters": {"rope_type": ["linear"]}}, ["rope type ['linear'] is not supported"]),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2, "rope_theta": 1}}, ["theta 1.0 with YaRN"]),
        (
            {"rope_parameters": LLAMA3 | {"low_freq_factor": 4.0, "high_freq_factor": 4.0}},
            ["low_freq_factor 4.0 is not below high_freq_factor 4.0"],
        ),
        ({"rope_parameters": LONGROPE | {"original_max_position_embeddings": 1}}, ["LongRoPE", "at least 2"]),
        ({"rope_parameters": LONGROPE | {"short_factor": [1, 0]}}, ["'short_factor' is 0"]),
        ({"rope_parameters": LONGROPE}, ["1 rope factors, expected 4"]),
        ({"hidden_act": ["silu"]}, ["'hidden_act' is ['silu']"]),
        ({"two\nlines": 1}, [r"unsupported field(s) two\nlines"]),
    ],
    ids=str,
)
def test_config_must_be_understood(tmp_path, changes, words):
    folder = Folder.read(WHOLE)
    folder.fields |= changes
    refusal(lambda: HuggingFaceFolder(folder.save(tmp_path / "folder")), *words)


def test_activation_must_be_known(tmp_path):
    folder = Folder.read(WHOLE)
    folder.fields["hidden_act"] = "swish7"
    opened = HuggingFaceFolder(folder.save(tmp_path / "folder"))
    refusal(lambda: opened.decoder(FLOAT32), "activation 'swish7' is not supported", "silu")


@pytest.mark.parametrize("ids", ["</s>", ["</s>"], True, 10**30, 1.5])
def test_end_tokens_must_be_numbers(tmp_path, ids):
    folder = Folder.read(WHOLE)
    folder.fields["eos_token_id"] = ids
    opened = HuggingFaceFolder(folder.save(tmp_path / "folder"))
    refusal(opened.stop_tokens, "eos_token_id", str(ids))


def test_weights_must_be_floating_point(tmp_path):
    folder = Folder.read(WHOLE)
    folder.tensors["model.norm.weight"] = folder.tensors["model.norm.weight"].astype("int32")
    opened = HuggingFaceFolder(folder.save(tmp_path / "folder"))
    refusal(lambda: opened.decoder(FLOAT32), "model.norm.weight is I32", "floating-point")


@pytest.fixture
def copy(tmp_path) -> pathlib.Path:
    """A golden folder with shards, to be damaged."""
    return shutil.copytree(SHARDED, tmp_path / "copy")


def decode(folder: pathlib.Path) -> Decoder:
    return HuggingFaceFolder(folder).decoder(FLOAT32)


def truncate(path: pathlib.Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize("size", [0, 4, 100, 50_000])
def test_truncated_safetensors(copy, size):
    shard = max(copy.glob("*.safetensors"))
    truncate(shard, size)
    refusal(lambda: decode(copy), shard.name, "damaged or truncated safetensors")


def test_shard_that_the_index_names_is_missing(copy):
    shard = max(copy.glob("*.safetensors"))
    shard.unlink()
    refusal(lambda: decode(copy), shard.name, "cannot be read")


def test_only_pickled_weights(copy):
    for path in copy.glob("*.safetensors*"):
        path.unlink()
    refusal(lambda: decode(copy), "no model.safetensors")
    (copy / "pytorch_model.bin").touch()
    refusal(lambda: decode(copy), ".bin weights", "never loaded", "save_pretrained(NEW_FOLDER)")


def test_config_json_missing_or_broken(copy):
    path = copy / "config.json"
    truncate(path, 100)
    refusal(lambda: HuggingFaceFolder(copy), "config.json", "not readable as JSON")
    path.write_text("[" * 100_000, encoding="utf-8")
    refusal(lambda: HuggingFaceFolder(copy), "config.json", "not readable as JSON")
    path.write_text("[]", encoding="utf-8")
    refusal(lambda: HuggingFaceFolder(copy), "config.json", "expected a JSON object", "list")
    path.unlink()
    refusal(lambda: HuggingFaceFolder(copy), "not a model folder", "config.json is missing")


def test_folder_without_tokenizer():
    refusal(lambda: HuggingFaceFolder(WHOLE).tokenizer(), WHOLE.name, "no usable tokenizer")


@pytest.fixture
def written(tmp_path) -> pathlib.Path:
    """A good GGUF file, to be damaged."""
    return gguf_files.write(tmp_path / "model.gguf", Folder.read(WHOLE))


@pytest.mark.parametrize("share", [0.0002, 0.002, 0.01, 0.05, 0.5, 0.99])
def test_truncated_gguf(written, share):
    """From inside the header, over the metadata and the tensor list, to the last tensor's numbers."""
    truncate(written, int(written.stat().st_size * share))
    refusal(lambda: GGUFFile(written), written.name, "damaged or truncated GGUF")


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04 a zip file, not a model"])
def test_not_gguf(tmp_path, content):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    refusal(lambda: GGUFFile(path), path.name, "not a GGUF file")


def test_gguf_pre_tokenizer_must_be_known(tmp_path):
    path = gguf_files.write(tmp_path / "model.gguf", Folder.read(WHOLE), pre_tokenizer="deepseek-llm")
    refusal(lambda: GGUFFile(path).tokenizer(), "pre-tokenizer 'deepseek-llm' is not supported", "smollm")


def test_gguf_architecture_must_be_known(tmp_path):
    path = gguf_files.write(tmp_path / "model.gguf", Folder.read(WHOLE), architecture="gemma3")
    refusal(lambda: GGUFFile(path), "architecture 'gemma3' is not supported", "llama, phi3, qwen2, qwen3")


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"llama.rope.scaling.type": "dynamic"}, ["rope scaling 'dynamic' is not supported", "linear"]),
        ({"llama.rope.scaling.type": "yarn"}, ["'rope.scaling.factor' is missing"]),
        ({"llama.rope.scaling.type": "longrope"}, ["tensor rope_factors_short.weight is missing"]),
        ({"llama.expert_count": 8}, ["unsupported field", "expert_count"]),
        ({"llama.rope.scaling.yarn_attn_factor": 1.5}, ["unsupported field", "yarn_attn_factor"]),
        ({"llama.attention.value_length": 4}, ["attention.value_length is 4", "8"]),
        ({"llama.block_count": 2**31}, ["'block_count' is 2147483648", "at most"]),
        ({"llama.rope.dimension_count": 10}, ["10 of a head are rotated", "8 wide"]),
    ],
    ids=str,
)
def test_gguf_metadata_must_be_understood(tmp_path, extra, words):
    path = gguf_files.write(tmp_path / "model.gguf", Folder.read(WHOLE), extra=extra)
    refusal(lambda: GGUFFile(path), *words)


@pytest.mark.parametrize(
    ("variant", "tensor", "words"),
    [
        ("llama_gqa_llama3", "rope_freqs.weight", ["'rope_freqs.weight' is 0.0", "number above 0"]),
        ("phi3_longrope", "rope_factors_long.weight", ["'rope_factors_long.weight' is 0.0", "number above 0"]),
    ],
)
def test_gguf_rope_factors_must_be_positive(tmp_path, variant, tensor, words):
    path = gguf_files.write(tmp_path / "model.gguf", Folder.read(GOLDEN / variant))
    found = gguf_header.read_header(path).tensors[tensor]
    content = bytearray(path.read_bytes())
    content[found.offset + 4 : found.offset + 8] = bytes(4)
    path.write_bytes(content)
    refusal(lambda: GGUFFile(path), *words)


@pytest.mark.parametrize(
    ("variant", "missing"),
    [("qwen2_bias", "self_attn.k_proj.bias"), ("qwen3_norms", "self_attn.q_norm.weight")],
)
def test_gguf_without_what_its_architecture_always_has(tmp_path, variant, missing):
    folder = Folder.read(GOLDEN / variant)
    folder.tensors = {name: tensor for name, tensor in folder.tensors.items() if not name.endswith(missing[9:])}
    path = gguf_files.write(tmp_path / "model.gguf", folder)
    refusal(lambda: GGUFFile(path).decoder(FLOAT32), f"model.layers.0,1,2.{missing} is missing")


def test_gguf_tensor_under_the_name_it_has_elsewhere(tmp_path):
    """It must not stand in for the one that GGUF's name would mean."""
    folder = Folder.read(WHOLE)
    folder.tensors["model.layers.0.self_attn.k_proj.bias"] = np.zeros(48, np.float32)
    path = gguf_files.write(tmp_path / "model.gguf", folder)
    path.write_bytes(path.read_bytes().replace(b"blk.0.attn_k.bias", b"model.norm.weight"))
    assert {"output_norm.weight", "model.norm.weight"} < set(gguf_header.read_header(path).tensors)
    refusal(lambda: GGUFFile(path).decoder(FLOAT32), "config: model.norm.weight (in GGUF) is unexpected")


def test_gguf_without_embedding(tmp_path):
    folder = Folder.read(WHOLE)
    del folder.tensors["model.embed_tokens.weight"]
    path = gguf_files.write(tmp_path / "model.gguf", folder)
    refusal(lambda: GGUFFile(path), "token_embd.weight is missing")


def test_unknown_source_and_dtype(tmp_path):
    refusal(lambda: load_checkpoint(str(tmp_path / "nothing")), "nothing", "not a folder, a file, a hub id")
    refusal(lambda: load_checkpoint("smolm2"), "did you mean 'smollm2'")
    refusal(lambda: load_checkpoint("smollm2", "float16"), "dtype 'float16' is unknown", "bfloat16")


def reindex(folder: pathlib.Path, change) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    change(index["weight_map"])
    path.write_text(json.dumps(index), encoding="utf-8")


def test_index_must_list_what_the_shards_hold(copy):
    """No more, no less, nothing elsewhere, nothing twice."""
    name = "model.norm.weight"
    names = sorted(path.name for path in copy.glob("*.safetensors"))
    place = json.loads((copy / "model.safetensors.index.json").read_text())["weight_map"][name]
    (elsewhere,) = set(names) - {place}
    reindex(copy, lambda places: places.pop(name))
    refusal(lambda: decode(copy), f"{name} is in {place} but not in the index")
    reindex(copy, lambda places: places.update({name: elsewhere}))
    refusal(lambda: decode(copy), f"{name} is in {place}, which the index says of {elsewhere}")
    reindex(copy, lambda places: places.update({name: place, "more": place}))
    refusal(lambda: decode(copy), "more is in the index but in no file")
    reindex(copy, lambda places: places.pop("more"))
    decode(copy)
    save_file(load_file(copy / elsewhere) | {name: load_file(copy / place)[name]}, copy / elsewhere)
    refusal(lambda: decode(copy), f"{name} is in both {names[0]} and {names[1]}")


@pytest.mark.parametrize("name", ["x" * 5000, "\0", "\ud800", ".."])
def test_index_with_what_no_file_is_called(copy, name):
    reindex(copy, lambda places: places.update({"model.norm.weight": name}))
    refusal(lambda: decode(copy), "expected a plain file" if name == ".." else "cannot be read")


@pytest.mark.parametrize("places", [{"a": 1}, {"a": "../outside.safetensors"}, [["a"]]], ids=str)
def test_index_must_name_files_of_the_folder(copy, places):
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    refusal(lambda: decode(copy), "weight_map must name files of this folder")
