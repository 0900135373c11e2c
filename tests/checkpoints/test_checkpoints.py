"""Every way into a model gives the same model: shards, one file, GGUF with its quantised forms, old configs."""

import dataclasses

import bounds
import gguf_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from model_files import FLOAT32, GOLDEN, Folder
from model_outputs import hidden_states

from gemfilter_jax.checkpoints import load_checkpoint
from gemfilter_jax.checkpoints.gguf_file import GGUFFile
from gemfilter_jax.checkpoints.hf_folder import HuggingFaceFolder
from gemfilter_jax.checkpoints.weights import Loading
from gemfilter_jax.config import LinearRope, Llama3Rope, ModelConfig
from gemfilter_jax.models.families import llama
from gemfilter_jax.models.rope import inverse_frequencies
from gemfilter_jax.models.transformer import Decoder

WHOLE, SHARDED, SCALED = (GOLDEN / f"llama_{name}" for name in ("gqa_tied", "mha_untied", "gqa_llama3"))
IN_GGUF = sorted(
    path.parent
    for path in GOLDEN.glob("*/config.json")
    if Folder.read(path.parent).fields["model_type"] in gguf_files.ARCHITECTURES
)
KINDS = [
    Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q4_K, Kind.Q5_K,
    Kind.Q6_K,
]  # fmt: skip


def assert_same_weights(actual: Decoder, expected: Decoder) -> None:
    """Bit by bit."""
    ours, theirs = jax.tree.leaves(actual), jax.tree.leaves(expected)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


def assert_same_config(actual: ModelConfig, expected: ModelConfig) -> None:
    """But for how rotary scaling is spelled, for the norm's epsilon, which GGUF rounds, and for what GGUF loses."""
    for long in (False, True):
        np.testing.assert_allclose(
            inverse_frequencies(actual, long=long), inverse_frequencies(expected, long=long), rtol=1e-6
        )
    for name in ("attention_scaling", "original_context"):
        ours, theirs = (getattr(config.rope_scaling, name, 1.0) for config in (actual, expected))
        if name == "attention_scaling" or hasattr(actual.rope_scaling, name):
            np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    np.testing.assert_allclose(actual.rms_eps, expected.rms_eps, rtol=1e-7)
    spelled_alike = {"rope_scaling": expected.rope_scaling, "rms_eps": expected.rms_eps}
    if expected.family in ("mistral", "qwen2"):
        spelled_alike["sliding_windows"] = expected.sliding_windows
    if expected.family == "mistral":
        assert actual.family == "llama"
        spelled_alike["family"] = "mistral"
    assert dataclasses.replace(actual, **spelled_alike) == expected


def assert_gguf_holds(tmp_path, folder: Folder, kind: Kind | gguf_files.KindOf) -> None:
    ours = GGUFFile(gguf_files.write(tmp_path / "model.gguf", folder, kind)).decoder(FLOAT32)
    stored = gguf_files.dequantised(folder, kind).save(tmp_path / "folder")
    reference = HuggingFaceFolder(stored).decoder(FLOAT32)
    assert_same_weights(ours, reference)
    assert_same_config(ours.config, reference.config)


@pytest.mark.parametrize("source", IN_GGUF, ids=lambda path: path.name)
def test_gguf_describes_the_same_model(tmp_path, source):
    written = gguf_files.write(tmp_path / "model.gguf", Folder.read(source))
    assert_same_config(GGUFFile(written).config, HuggingFaceFolder(source).config)


@pytest.mark.parametrize("variant", ["llama_mqa_bias_linear", "phi4_partial", "qwen2_windows", "qwen3_bias_yarn"])
def test_gguf_holds_the_same_weights(tmp_path, variant):
    """Of some matrices, rows are not whole blocks and stay float32."""
    assert_gguf_holds(tmp_path, Folder.read(GOLDEN / variant), Kind.Q8_0)


@pytest.mark.parametrize("model_type", ["llama", "phi3", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_gguf_holds_the_dequantised_weights(tmp_path, model_type, kind):
    folder = gguf_files.wide(model_type)
    stored = [gguf_files.quantised(tensor, kind)[1] for tensor in folder.tensors.values() if tensor.ndim == 2]
    assert set(stored) == {kind}
    assert_gguf_holds(tmp_path, folder, kind)


@pytest.mark.parametrize("model_type", ["llama", "phi3", "qwen2", "qwen3"])
def test_gguf_of_mixed_kinds(tmp_path, model_type):
    """As in a Q4_K_M of llama-quantize: more bits where they matter, other kinds where the rows do not fit."""

    def kind_of(name: str) -> Kind:
        if name == "lm_head.weight" or "v_proj" in name or "qkv_proj" in name:
            return Kind.Q6_K
        if "down_proj" in name:
            return Kind.Q5_0
        return Kind.Q8_0 if "k_proj" in name else Kind.Q4_K

    folder = gguf_files.wide(model_type)
    kinds = {gguf_files.quantised(tensor, kind_of(name))[1] for name, tensor in folder.tensors.items()}
    assert kinds >= {Kind.F32, Kind.Q4_K, Kind.Q5_0, Kind.Q6_K}
    assert_gguf_holds(tmp_path, folder, kind_of)


@pytest.mark.parametrize("variant", ["llama_gqa_llama3", "phi4_partial", "qwen2_bias", "qwen3_bias_yarn"])
def test_gguf_computes_what_pytorch_computes(tmp_path, variant):
    """In GGUF rotary scaling has other forms."""
    model = GGUFFile(gguf_files.write(tmp_path / "model.gguf", Folder.read(GOLDEN / variant))).decoder(FLOAT32)
    with np.load(GOLDEN / variant / "expected.npz") as expected:
        ids, rows, logits = expected["ids"], expected["rows"], expected["logits"]
    x = jax.jit(hidden_states)(model, ids[None], np.array([len(ids)]), model.config.layers)
    bound = bounds.of_decoder(model.config, len(ids), np.abs(logits).max())
    np.testing.assert_allclose(model.logits(x[0, rows]), logits, rtol=0, atol=bound)


def test_gguf_window_of_zero_is_none(tmp_path):
    """So llama.cpp's converter says of Phi-4 that no layer slides."""
    folder = Folder.read(GOLDEN / "phi3_sliding")
    folder.fields["sliding_window"] = None
    assert GGUFFile(gguf_files.write(tmp_path / "model.gguf", folder)).config.sliding_windows is None


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
    assert_same_weights(HuggingFaceFolder(SHARDED).decoder(FLOAT32), HuggingFaceFolder(whole).decoder(FLOAT32))


def test_dtype_is_that_of_the_weights():
    model = HuggingFaceFolder(WHOLE).decoder(Loading(jnp.dtype(jnp.bfloat16)))
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
    loaded = HuggingFaceFolder(folder.save(tmp_path / "folder")).decoder(FLOAT32)
    assert_same_weights(loaded, HuggingFaceFolder(WHOLE).decoder(FLOAT32))
