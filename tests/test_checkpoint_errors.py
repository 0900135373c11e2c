"""What cannot be loaded faithfully is refused, in one clear line, before anything runs."""

import json
import pathlib
import shutil

import gguf_files
import jax.numpy as jnp
import numpy as np
import pytest
from model_files import GOLDEN, Folder

from gemfilter_jax.checkpoints import load_checkpoint
from gemfilter_jax.checkpoints.gguf import GGUFFile
from gemfilter_jax.checkpoints.huggingface import HuggingFaceFolder
from gemfilter_jax.errors import UserError
from gemfilter_jax.models.decoder import Decoder

WHOLE, SHARDED = GOLDEN / "llama_gqa_tied", GOLDEN / "llama_mha_untied"


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


def fewer_layers(folder: Folder) -> None:
    folder.fields["num_hidden_layers"] -= 1


TENSOR_FAULTS = [
    (drop, ["model.layers.1.mlp.up_proj.weight is missing"]),
    (add, ["q_norm.weight is unexpected"]),
    (cut, ["model.norm.weight has shape [47], expected [48]"]),
    (fewer_layers, ["is unexpected", "and 4 more"]),
]


@pytest.mark.parametrize(("fault", "words"), TENSOR_FAULTS)
@pytest.mark.parametrize("container", ["safetensors", "gguf"])
def test_tensors_must_fit_the_config(tmp_path, fault, words, container):
    folder = Folder.read(WHOLE)
    fault(folder)
    if container == "gguf":
        opened = GGUFFile(gguf_files.write(tmp_path / "model.gguf", folder))
    else:
        opened = HuggingFaceFolder(folder.save(tmp_path / "folder"))
    refusal(lambda: opened.decoder(jnp.float32), "tensors do not fit", *words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sliding_window": 4096}, ["unsupported field", "sliding_window"]),
        ({"quantization_config": {"bits": 4}}, ["unsupported field", "quantization_config"]),
        ({"model_type": "mamba"}, ["model_type 'mamba' is not supported", "llama"]),
        ({"model_type": None}, ["'model_type' is missing"]),
        ({"hidden_size": None}, ["'hidden_size' is missing"]),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, ["rope type 'yarn' is not supported", "llama3"]),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic"}}, ["rope type 'dynamic' is not supported"]),
        ({"rope_parameters": {"rope_type": "linear"}}, ["'factor' is missing"]),
        ({"rope_interleaved": True}, ["rope_interleaved", "not supported"]),
        ({"num_key_value_heads": 4}, ["6 query heads", "4 key/value heads"]),
        ({"head_dim": 7}, ["head width 7 is odd"]),
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
    refusal(lambda: opened.decoder(jnp.float32), "activation 'swish7' is not supported", "silu")


def test_end_tokens_must_be_numbers(tmp_path):
    folder = Folder.read(WHOLE)
    folder.fields["eos_token_id"] = "</s>"
    opened = HuggingFaceFolder(folder.save(tmp_path / "folder"))
    refusal(opened.stop_tokens, "eos_token_id", "</s>")


def test_weights_must_be_floating_point(tmp_path):
    folder = Folder.read(WHOLE)
    folder.tensors["model.norm.weight"] = folder.tensors["model.norm.weight"].astype("int32")
    opened = HuggingFaceFolder(folder.save(tmp_path / "folder"))
    refusal(lambda: opened.decoder(jnp.float32), "model.norm.weight is int32", "floating-point")


@pytest.fixture
def copy(tmp_path) -> pathlib.Path:
    """A golden folder with shards, to be damaged."""
    return shutil.copytree(SHARDED, tmp_path / "copy")


def decode(folder: pathlib.Path) -> Decoder:
    return HuggingFaceFolder(folder).decoder(jnp.float32)


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
    refusal(lambda: decode(copy), shard.name, "missing", "index")


def test_only_pickled_weights(copy):
    for path in copy.glob("*.safetensors*"):
        path.unlink()
    refusal(lambda: decode(copy), "no model.safetensors")
    (copy / "pytorch_model.bin").touch()
    refusal(lambda: decode(copy), ".bin weights", "safetensors")


def test_config_json_missing_or_broken(copy):
    path = copy / "config.json"
    truncate(path, 100)
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
    path = gguf_files.write(tmp_path / "model.gguf", Folder.read(WHOLE), architecture="qwen2")
    refusal(lambda: GGUFFile(path), "architecture 'qwen2' is not supported", "llama")


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"llama.rope.scaling.type": "yarn"}, ["rope scaling 'yarn' is not supported", "linear"]),
        ({"llama.expert_count": "8"}, ["unsupported field", "expert_count"]),
    ],
    ids=str,
)
def test_gguf_metadata_must_be_understood(tmp_path, extra, words):
    path = gguf_files.write(tmp_path / "model.gguf", Folder.read(WHOLE), extra=extra)
    refusal(lambda: GGUFFile(path), *words)


def test_gguf_without_embedding(tmp_path):
    folder = Folder.read(WHOLE)
    del folder.tensors["model.embed_tokens.weight"]
    path = gguf_files.write(tmp_path / "model.gguf", folder)
    refusal(lambda: GGUFFile(path), "token_embd.weight is missing")


def test_unknown_source_and_dtype(tmp_path):
    refusal(lambda: load_checkpoint(str(tmp_path / "nothing")), "nothing", "not a folder, a file, a hub id")
    refusal(lambda: load_checkpoint("smolm2"), "did you mean 'smollm2'")
    refusal(lambda: load_checkpoint("smollm2", "float16"), "dtype 'float16' is unknown", "bfloat16")


@pytest.mark.parametrize("places", [{"a": 1}, {"a": "../outside.safetensors"}, [["a"]]], ids=str)
def test_index_must_name_files_of_the_folder(copy, places):
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    refusal(lambda: decode(copy), "weight_map must name files of this folder")
