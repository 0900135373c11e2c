"""Orbax checkpoints: the same model comes back, on one device and split over eight; damage is told in one line."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import bounds
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_files import FLOAT32, GOLDEN, tokenizer
from model_outputs import hidden_states

from gemfilter_jax.checkpoints import load_checkpoint, orbax_folder
from gemfilter_jax.checkpoints.hf_folder import HuggingFaceFolder
from gemfilter_jax.checkpoints.orbax_folder import OrbaxFolder
from gemfilter_jax.checkpoints.weights import Loading
from gemfilter_jax.errors import UserError
from gemfilter_jax.models.transformer import Decoder

VARIANT = "phi4_partial"  # fused tensors, tables of rotary factors, tied
STOPS = (3, 5)


@pytest.fixture(scope="module")
def original() -> Decoder:
    return HuggingFaceFolder(GOLDEN / VARIANT).decoder(FLOAT32)


@pytest.fixture(scope="module")
def saved(original, tmp_path_factory):
    folder = tmp_path_factory.mktemp("orbax") / "model"
    orbax_folder.save(folder, "tiny", original, tokenizer(), STOPS)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def assert_same(actual, expected) -> None:
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_was_saved_comes_back(saved, original):
    loaded = load_checkpoint(str(saved), "float32")
    assert loaded.model.config == original.config
    assert_same(loaded.model, original)
    assert (loaded.name, loaded.stop_tokens) == ("tiny", STOPS)
    assert loaded.tokenizer("b a")["input_ids"] == [1, 0]
    assert loaded.tokenizer.chat_template == tokenizer().chat_template
    with np.load(GOLDEN / VARIANT / "expected.npz") as expected:
        ids, rows, logits = expected["ids"], expected["rows"], expected["logits"]
    x = jax.jit(hidden_states)(loaded.model, ids[None], np.array([len(ids)]), original.config.layers)
    bound = bounds.of_decoder(original.config, len(ids), np.abs(logits).max())
    np.testing.assert_allclose(loaded.model.logits(x[0, rows]), logits, rtol=0, atol=bound)


def test_another_dtype(saved, original):
    loaded = OrbaxFolder(saved).decoder(Loading(jnp.dtype(jnp.bfloat16)))
    assert_same(loaded, jax.tree.map(lambda x: x.astype(jnp.bfloat16), original))


def test_only_the_first_layers(saved, original):
    loaded = OrbaxFolder(saved).decoder(Loading(jnp.dtype(jnp.float32), filter_layers=2))
    assert_same(loaded.layers, jax.tree.map(lambda x: x[:2], original.layers))
    assert loaded.final_norm is loaded.lm_head is None


def test_int8_stays_int8(tmp_path):
    model = HuggingFaceFolder(GOLDEN / VARIANT).decoder(Loading(jnp.dtype(jnp.float32), int8=True))
    orbax_folder.save(tmp_path / "model", "tiny", model, tokenizer(), STOPS)
    assert_same(OrbaxFolder(tmp_path / "model").decoder(FLOAT32), model)


_ON_EIGHT = """
import sys
import jax
import numpy as np
from model_outputs import hidden_states
from gemfilter_jax.parallel import collectives, sharding
from gemfilter_jax.checkpoints import load_checkpoint

assert jax.device_count() == 8
ids = np.load(sys.argv[2])["ids"]
out = {}
for parts in (1, 2, 4):
    mesh = sharding.make_mesh(sharding.MeshShape(data=2, model=parts))
    model = load_checkpoint(sys.argv[1], "float32", mesh=mesh).model
    shards = model.layers.gate.kernel[...].addressable_shards
    assert len(shards) == 2 * parts
    assert {shard.data.shape[-1] for shard in shards} == {model.config.mlp_width // parts}, shards

    def logits(model, ids):
        return model.logits(hidden_states(model, ids, np.array([ids.shape[1]]), model.config.layers)[0])

    run = collectives.shard_map(mesh, logits, (sharding.specs(model, mesh), None), sharding.spec())
    out[str(parts)] = jax.jit(run)(model, ids[None])
np.savez(sys.argv[3], **out)
"""


@pytest.mark.parametrize("source", ["orbax", pytest.param("safetensors", marks=pytest.mark.exhaustive)])
def test_split_over_devices(saved, original, tmp_path, source):
    folder = saved
    if source == "safetensors":
        folder = shutil.copytree(GOLDEN / VARIANT, tmp_path / "folder")
        tokenizer().save_pretrained(folder)
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(pathlib.Path(__file__).parents[1]), *sys.path]),
    }
    expected = GOLDEN / VARIANT / "expected.npz"
    subprocess.run(
        [sys.executable, "-c", _ON_EIGHT, folder, expected, tmp_path / "out.npz"], check=True, env=environment
    )
    ids = np.load(expected)["ids"]
    x = jax.jit(hidden_states)(original, ids[None], np.array([len(ids)]), original.config.layers)
    want = jax.jit(Decoder.logits)(original, x[0])
    bound = bounds.of_decoder(original.config, len(ids), np.abs(want).max())
    with np.load(tmp_path / "out.npz") as out:
        np.testing.assert_array_equal(out["1"], want)
        for parts in ("2", "4"):
            np.testing.assert_allclose(out[parts], want, rtol=0, atol=bound)


def refusal(load, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        load()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_an_existing_folder_is_not_touched(saved, original):
    before = sorted(path.name for path in saved.parent.rglob("*"))
    refusal(lambda: orbax_folder.save(saved, "tiny", original, tokenizer(), STOPS), "exists already")
    refusal(lambda: orbax_folder.save(saved / "no" / "x", "tiny", original, tokenizer(), STOPS), "does not exist")
    assert sorted(path.name for path in saved.parent.rglob("*")) == before


def test_nothing_is_left_of_a_failed_save(tmp_path, original, monkeypatch):
    broken = tokenizer()
    monkeypatch.setattr(broken, "save_pretrained", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(UserError, match=r"model: cannot be written \(disk full\)"):
        orbax_folder.save(tmp_path / "model", "tiny", original, broken, STOPS)
    assert list(tmp_path.iterdir()) == []


def test_int8_is_not_made_of_floats_on_the_way(saved):
    refusal(lambda: load_checkpoint(str(saved), "float32", weights="int8"), "convert", "--weights=int8")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 9}, ["version 9 is not supported"]),
        ({"config": {"layers": 3}}, ["(config): field 'family' is missing"]),
        ({"config": None}, ["'config' is missing"]),
        ({"stop_tokens": None}, ["'stop_tokens' is missing"]),
    ],
    ids=str,
)
def test_damaged_manifest(copy, change, words):
    path = copy / orbax_folder.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refusal(lambda: load_checkpoint(str(copy)), orbax_folder.MANIFEST, *words)
    path.write_text("{")
    refusal(lambda: load_checkpoint(str(copy)), orbax_folder.MANIFEST, "not readable as JSON")


def test_config_that_the_arrays_do_not_fit(copy):
    path = copy / orbax_folder.MANIFEST
    manifest = json.loads(path.read_text())
    manifest["config"]["mlp_width"] += 1
    path.write_text(json.dumps(manifest))
    refusal(lambda: load_checkpoint(str(copy), "float32"), "layers.gate.kernel has shape", "expected")


def test_missing_and_truncated_arrays(copy):
    for path in (copy / "weights").rglob("*"):
        if path.is_file() and path.stat().st_size > 4_000:
            path.write_bytes(path.read_bytes()[:1_000])
    refusal(lambda: load_checkpoint(str(copy), "float32"), "damaged or incomplete Orbax checkpoint")
    shutil.rmtree(copy / "weights")
    refusal(lambda: load_checkpoint(str(copy), "float32"), "damaged or incomplete Orbax checkpoint")
