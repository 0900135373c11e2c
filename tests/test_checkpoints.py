"""Every way into a model gives the same model: shards, one file, GGUF with its quantised forms, old configs."""

import dataclasses

import gguf
import gguf_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from model_files import GOLDEN, Folder

from gemfilter_jax.checkpoints import load_checkpoint
from gemfilter_jax.checkpoints.gguf import GGUFFile
from gemfilter_jax.checkpoints.huggingface import HuggingFaceFolder
from gemfilter_jax.config import LinearRope, Llama3Rope, ModelConfig
from gemfilter_jax.models import llama
from gemfilter_jax.models.decoder import Decoder
from gemfilter_jax.models.rotary import inverse_frequencies

WHOLE, SHARDED, SCALED, BIASED = (
    GOLDEN / f"llama_{name}" for name in ("gqa_tied", "mha_untied", "gqa_llama3", "mqa_bias_linear")
)


def assert_same_weights(actual: Decoder, expected: Decoder) -> None:
    """Bit by bit."""
    ours, theirs = jax.tree.leaves(actual), jax.tree.leaves(expected)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


def assert_same_config(actual: ModelConfig, expected: ModelConfig) -> None:
    """But for how rotary scaling is spelled, and for the norm's epsilon, which GGUF rounds to float32."""
    np.testing.assert_allclose(inverse_frequencies(actual), inverse_frequencies(expected), rtol=1e-6)
    np.testing.assert_allclose(actual.rms_eps, expected.rms_eps, rtol=1e-7)
    spelled_alike = {"rope_scaling": expected.rope_scaling, "rms_eps": expected.rms_eps}
    assert dataclasses.replace(actual, **spelled_alike) == expected


@pytest.mark.parametrize("source", [SHARDED, WHOLE, SCALED, BIASED], ids=lambda path: path.name)
@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1], ids=lambda k: k.name)
def test_gguf_holds_the_same_weights(tmp_path, source, kind):
    folder = Folder.read(source)
    folder.fields["mlp_bias"] = False  # GGUF's llama has none here
    folder.tensors = {n: t for n, t in folder.tensors.items() if not (".mlp." in n and n.endswith(".bias"))}
    ours = GGUFFile(gguf_files.write(tmp_path / "model.gguf", folder, kind)).decoder(jnp.float32)
    for name, tensor in folder.tensors.items():
        folder.tensors[name] = gguf.quants.dequantize(*gguf_files.quantised(tensor, kind)).reshape(tensor.shape)
    reference = HuggingFaceFolder(folder.save(tmp_path / "folder")).decoder(jnp.float32)
    assert_same_weights(ours, reference)
    assert_same_config(ours.config, reference.config)


def test_gguf_computes_what_pytorch_computes(tmp_path):
    """The variant whose rotary scaling GGUF stores in another form."""
    model = GGUFFile(gguf_files.write(tmp_path / "model.gguf", Folder.read(SCALED))).decoder(jnp.float32)
    with np.load(SCALED / "expected.npz") as expected:
        ids, rows, logits = expected["ids"], expected["rows"], expected["logits"]
    x = jax.jit(Decoder.hidden_states)(model, ids[None], np.array([len(ids)]), model.config.layers)
    np.testing.assert_allclose(model.logits(x[0, rows]), logits, rtol=0, atol=1e-4)


def test_gguf_tokenizer_and_stop_tokens(tmp_path):
    loaded = load_checkpoint(str(gguf_files.write(tmp_path / "tiny.gguf", Folder.read(WHOLE))), "float32")
    ids = [1, 6, 2, 7, 10, 0]
    assert loaded.tokenizer("<|turn|>ab<tool> ab12<|end|>")["input_ids"] == ids
    assert loaded.tokenizer.decode(ids) == "<|turn|>ab<tool> ab12<|end|>"
    assert loaded.tokenizer.decode(ids, skip_special_tokens=True) == "ab<tool> ab12"
    assert loaded.stop_tokens == (0,)


@pytest.mark.parametrize(("name", "ids"), [("gpt-2", [10]), ("smollm", [8, 9]), ("llama-bpe", [10])])
def test_gguf_pre_tokenizer_decides_how_digits_split(tmp_path, name, ids):
    path = gguf_files.write(tmp_path / "tiny.gguf", Folder.read(WHOLE), pre_tokenizer=name)
    assert GGUFFile(path).tokenizer()("12")["input_ids"] == ids


def test_shards_and_one_file_hold_the_same_weights(tmp_path):
    assert len(list(SHARDED.glob("*.safetensors"))) > 1
    whole = Folder.read(SHARDED).save(tmp_path / "whole")
    assert_same_weights(HuggingFaceFolder(SHARDED).decoder(jnp.float32), HuggingFaceFolder(whole).decoder(jnp.float32))


def test_dtype_is_that_of_the_weights():
    model = HuggingFaceFolder(WHOLE).decoder(jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_config_of_transformers_4(key):
    """Before release 5 the base stood at the top level and the scaling in rope_scaling, its kind under either name."""
    folder = Folder.read(SCALED)
    now = llama.config_from_hf(folder.fields, "now")
    rope = folder.fields.pop("rope_parameters")
    folder.fields["rope_theta"] = rope.pop("rope_theta")
    folder.fields["rope_scaling"] = {key: rope.pop("rope_type"), **rope}
    assert llama.config_from_hf(folder.fields, "then") == now
    assert now.rope_scaling == Llama3Rope(8.0, 1.0, 4.0, 256)
    folder.fields["rope_scaling"] = {key: "linear", "factor": 2}
    assert llama.config_from_hf(folder.fields, "then").rope_scaling == LinearRope(2.0)


def test_what_a_config_may_leave_out():
    """Head counts and widths follow from the others in old checkpoints."""
    fields = Folder.read(SHARDED).fields
    for name in ("num_key_value_heads", "head_dim", "attention_bias", "mlp_bias", "tie_word_embeddings"):
        del fields[name]
    assert llama.config_from_hf(fields, "old") == HuggingFaceFolder(SHARDED).config


def test_leftover_tensors_that_change_nothing_are_allowed(tmp_path):
    """Old checkpoints hold rotary frequencies, and tied ones their embedding twice."""
    folder = Folder.read(WHOLE)
    folder.tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    folder.tensors["lm_head.weight"] = folder.tensors["model.embed_tokens.weight"].copy()
    loaded = HuggingFaceFolder(folder.save(tmp_path / "folder")).decoder(jnp.float32)
    assert_same_weights(loaded, HuggingFaceFolder(WHOLE).decoder(jnp.float32))
