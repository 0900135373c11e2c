"""What every registered model family must satisfy, and that one `Family` and one registry entry suffice for another."""

import collections
import dataclasses
from typing import Any

import gguf_files
import jax
import numpy as np
import pytest
from model_files import FLOAT32, GOLDEN, Folder

from gemfilter_jax.checkpoints import gguf_file
from gemfilter_jax.checkpoints.gguf_file import GGUFFile
from gemfilter_jax.checkpoints.hf_folder import HuggingFaceFolder
from gemfilter_jax.checkpoints.weights import abstract_decoder, parameter_name
from gemfilter_jax.config import ModelConfig
from gemfilter_jax.errors import UserError
from gemfilter_jax.models import families
from gemfilter_jax.models.families import FAMILIES, hf_config, llama
from gemfilter_jax.models.families.family import Family

FOLDERS = [Folder.read(path.parent) for path in sorted(GOLDEN.glob("*/config.json"))]
IN_GGUF = [model_type for model_type, family in FAMILIES.items() if family.gguf_architecture]
OPTIONS = ("attention_bias", "output_bias", "mlp_bias", "qk_norm")


def folders(model_type: str) -> list[Folder]:
    return [folder for folder in FOLDERS if folder.fields["model_type"] == model_type]


def config_of(folder: Folder) -> ModelConfig:
    return FAMILIES[folder.fields["model_type"]].config_from_hf(folder.fields, "config.json")


def parameters(config: ModelConfig) -> set[tuple[int | None, str]]:
    """(layer, name) of each parameter of a decoder."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(abstract_decoder(config, FLOAT32))
    found: set[tuple[int | None, str]] = set()
    for name in (parameter_name(path) for path, _ in leaves):
        if name.startswith("layers."):
            found |= {(layer, name.removeprefix("layers.")) for layer in range(config.layers)}
        else:
            found.add((None, name))
    return found


def test_every_model_type_has_one_family():
    listed = [model_type for family in families._REGISTERED for model_type in family.model_types]
    assert sorted(listed) == sorted(set(listed)) == sorted(FAMILIES)


def test_every_gguf_architecture_has_one_family():
    architectures = [family.gguf_architecture for family in families._REGISTERED if family.gguf_architecture]
    assert len(architectures) == len(set(architectures))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_golden_folder_exists(model_type):
    assert folders(model_type)
    assert all(config_of(folder).family == model_type for folder in folders(model_type))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_parameter_is_filled_by_one_tensor(model_type):
    for folder in folders(model_type):
        config = config_of(folder)
        wanted = parameters(config)
        tensors = families.tensors(config)
        filled = collections.Counter((layer, name) for layer, names in tensors.values() for name in names)
        assert all(filled[parameter] == 1 for parameter in wanted), wanted - filled.keys()
        read = {name for name, (layer, targets) in tensors.items() if any((layer, t) in wanted for t in targets)}
        assert read == {name for name in folder.tensors if not families.is_leftover(name, config)}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_name_is_that_of_a_parameter(model_type):
    config = dataclasses.replace(
        config_of(folders(model_type)[0]), tie_embeddings=False, **dict.fromkeys(OPTIONS, True)
    )
    named = {(layer, name) for layer, names in families.tensors(config).values() for name in names}
    assert named <= parameters(config)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_config_with_an_unknown_field_is_refused(model_type):
    folder = folders(model_type)[0]
    changed = Folder(folder.fields | {"unheard_of": 1}, folder.tensors)
    with pytest.raises(UserError, match=r"^config\.json: unsupported field\(s\) unheard_of; they may change"):
        config_of(changed)


@pytest.mark.parametrize("model_type", IN_GGUF)
def test_gguf_metadata_with_an_unknown_field_is_refused(tmp_path, model_type):
    name = f"{FAMILIES[model_type].gguf_architecture}.unheard_of"
    path = gguf_files.write(tmp_path / "model.gguf", folders(model_type)[0], extra={name: 1})
    with pytest.raises(UserError, match=r"unsupported field\(s\) unheard_of; they may change"):
        GGUFFile(path)


@pytest.mark.parametrize("model_type", IN_GGUF)
def test_every_tensor_has_one_gguf_name(model_type):
    config = config_of(folders(model_type)[0])
    names = gguf_file.hf_names(config)
    assert sorted(names.values()) == sorted(families.tensors(config))
    assert not [name for name in names if name.startswith("None.")]


@pytest.mark.parametrize("model_type", IN_GGUF)
def test_gguf_files_are_read_as_the_family_says(tmp_path, model_type):
    family = FAMILIES[model_type]
    config = GGUFFile(gguf_files.write(tmp_path / "model.gguf", folders(model_type)[0])).config
    assert config.family == family.model_types[0]
    assert {name: getattr(config, name) for name in family.gguf_implies} == family.gguf_implies


@pytest.mark.parametrize("model_type", [name for name in IN_GGUF if FAMILIES[name].gguf_interleaved_rotary])
def test_interleaved_queries_and_keys_have_tensors_of_their_own(model_type):
    for targets in FAMILIES[model_type].layer_weights.values():
        if any(target.startswith(("query", "key")) for target in targets):
            (target,) = targets
            assert target in ("query.kernel", "query.bias", "key.kernel", "key.bias")


# Hunyuan's names in place of Qwen3's, and a config.json with one field that it alone has.
_NORMS = {"self_attn.q_norm": "self_attn.query_layernorm", "self_attn.k_norm": "self_attn.key_layernorm"}


def _throwaway_config(fields: Any, source: str) -> ModelConfig:
    return hf_config.model_config(fields, source, also_read={"use_qk_norm"}, qk_norm=fields["use_qk_norm"])


THROWAWAY = Family(
    model_types=("throwaway",),
    config_from_hf=_throwaway_config,
    layer_weights=llama.LAYER_WEIGHTS
    | {
        "self_attn.query_layernorm.weight": ("query_norm.scale",),
        "self_attn.key_layernorm.weight": ("key_norm.scale",),
    },
    gguf_architecture="hunyuan-dense",
    gguf_implies={"qk_norm": True},
)


def _renamed(name: str) -> str:
    for theirs, ours in _NORMS.items():
        name = name.replace(theirs, ours)
    return name


def test_one_family_and_one_registry_entry_suffice(tmp_path, monkeypatch):
    qwen = Folder.read(GOLDEN / "qwen3_norms")
    expected = HuggingFaceFolder(GOLDEN / "qwen3_norms").decoder(FLOAT32)
    unread = {"max_window_layers", "use_sliding_window", "sliding_window", "layer_types", "attention_bias"}
    fields = {name: value for name, value in qwen.fields.items() if name not in unread}
    fields |= {"model_type": "throwaway", "use_qk_norm": True}
    folder = Folder(fields, {_renamed(name): tensor for name, tensor in qwen.tensors.items()}).save(tmp_path / "folder")
    stored = gguf_files.write(tmp_path / "model.gguf", qwen, architecture="hunyuan-dense")
    with pytest.raises(UserError, match="model_type 'throwaway' is not supported"):
        HuggingFaceFolder(folder)
    with pytest.raises(UserError, match="architecture 'hunyuan-dense' is not supported"):
        GGUFFile(stored)

    monkeypatch.setitem(FAMILIES, "throwaway", THROWAWAY)
    for opened in (HuggingFaceFolder(folder), GGUFFile(stored)):
        model = opened.decoder(FLOAT32)
        rounded = {"family": "qwen3", "rms_eps": expected.config.rms_eps}  # GGUF holds the epsilon as float32
        assert dataclasses.replace(opened.config, **rounded) == expected.config
        assert opened.config.family == "throwaway"
        for actual, wanted in zip(jax.tree.leaves(model), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(actual, wanted)
