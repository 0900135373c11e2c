"""`gemfilter plan`: counted work, predicted memory and verdicts, on CPU devices in processes of their own."""

import dataclasses
import functools
import gc
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
import tpu_compiler
from tiny import CONFIG

from gemfilter_jax.errors import UserError
from gemfilter_jax.models import shapes
from gemfilter_jax.planning import chips, models
from gemfilter_jax.planning.chips import Topology

LENGTH, LAYER, KEEP = 131072, 13, 1024
_ON_TOPOLOGY = "cpu:8"
_MESHES = ("seq:8", "seq:4,model:2")
_SEQ, _OF_PART = (2, 4, 8), 4096  # parts of prompts that grow with them, tokens of each
_MEASURED = 4, 32768  # devices, tokens


def _plan(*flags):
    command = [sys.executable, "-m", "gemfilter_jax.cli.main", "plan", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@functools.cache
def _own_process(what):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, __file__, what], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    """A config.json of the tiny model of other tests."""
    c = CONFIG
    fields = {
        "model_type": "llama",
        "num_hidden_layers": c.layers,
        "hidden_size": c.width,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "intermediate_size": c.mlp_width,
        "vocab_size": c.vocab,
        "max_position_embeddings": 8192,
        "rms_norm_eps": c.rms_eps,
    }
    path = tmp_path_factory.mktemp("small") / "config.json"
    path.write_text(json.dumps(fields))
    return str(path)


# A hand count for Llama-3.1-8B: a product of [a, b] and [b, c] takes 2abc.
_LAYER_WEIGHTS = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336


def _pairs(attention):
    """Of queries and keys that they see: all up to their own place, or 64 first ones and a band of 512."""
    return LENGTH * LENGTH / 2 if attention == "dense" else LENGTH * (64 + 512)


@pytest.mark.parametrize("mesh", _MESHES)
@pytest.mark.parametrize("attention", ["dense", "tri_shape"])
def test_flops_of_the_filter_are_those_of_a_hand_count(attention, mesh):
    of_all = LAYER * (2 * LENGTH * _LAYER_WEIGHTS + 4 * 4096 * _pairs(attention))
    counted = _own_process("counts")["filter"][attention][mesh]["flops"]
    assert counted == pytest.approx(of_all / 8, rel=0.05)


def test_flops_of_stage_2_are_those_of_a_hand_count():
    counted = _own_process("counts")
    layers, head = 32 * _LAYER_WEIGHTS, 4096 * 128256
    prefill = 2 * KEEP * layers + 32 * 4 * 4096 * KEEP**2 / 2 + 2 * head
    assert counted["prefill"] == pytest.approx(prefill / 8, rel=0.05)
    decode = 2 * (layers + head) + 32 * 4 * 4096 * (KEEP + 128)
    assert counted["decode"] == pytest.approx(decode / 8, rel=0.05)


@pytest.mark.parametrize("attention", ["dense", "tri_shape"])
def test_each_layer_sums_over_the_model_axis_twice(attention):
    """After attention and after the MLP, of 512 rows at a time, bfloat16; embeddings and scores once."""
    counted = _own_process("counts")["filter"][attention]["seq:4,model:2"]["psum model"]
    rows = LENGTH // 4
    assert counted["count"] == 2 * LAYER * rows // 512 + 2
    assert counted["bytes"] == (2 * LAYER + 1) * rows * 4096 * 2 + rows * 4


def test_dense_attention_sends_all_keys_round():
    counted = _own_process("counts")["filter"]["dense"]["seq:8"]["ppermute seq"]
    assert counted == {"count": 2 * LAYER * 7, "bytes": 2 * LAYER * 7 * LENGTH // 8 * 1024 * 2}


def test_stage_1_gathers_each_layers_weights_and_the_embedding_once():
    """Those of eight devices; of the filter layer itself the keys and queries alone."""
    counted = _own_process("counts")["filter"]["dense"]["seq:8"]["all_gather seq"]
    last = 4096 * 4096 + 4096 * 1024
    assert counted["bytes"] == 2 * (LAYER * _LAYER_WEIGHTS + last + 4096 * 128256) // 8


def test_weak_scaling_exchanges_as_much_with_tri_shape_and_more_with_dense():
    """Twice the prompt on twice the devices; with tri_shape also on as many."""
    tri_shape, dense = (_own_process("counts")["weak"][attention] for attention in ("tri_shape", "dense"))
    assert tri_shape == [tri_shape[0]] * 3
    assert _own_process("counts")["twice as long"] == tri_shape[0]
    keys = 2 * LAYER * _OF_PART * 1024 * 2  # keys and values of one part, all layers
    assert [after - before for before, after in itertools.pairwise(dense)] == [2 * keys, 4 * keys]


def test_predicted_memory_is_what_a_run_takes():
    measured = _own_process("memory")
    assert measured["temporaries"] > measured["weights"]
    of_runtime = _MEASURED[0] * 48 * 2**20  # of each device: packed matrices, threads
    assert 0.95 * measured["predicted"] < measured["grown"] < 1.05 * measured["predicted"] + of_runtime
    assert of_runtime < 0.6 * measured["temporaries"]


def test_fields_of_json(small_model, tmp_path):
    file = tmp_path / "plan.json"
    flags = ("--tokens=2048", "--keep=64", "--max_new_tokens=16", "--filter_layer=2", f"--topology={_ON_TOPOLOGY}")
    done = _plan(f"--model={small_model}", *flags, "--format=json", f"--output={file}")
    assert (done.returncode, done.stderr) == (0, "")
    made = json.loads(done.stdout)
    assert made == json.loads(file.read_text())
    assert made["mesh"] == {"data": 1, "seq": 8, "model": 1}
    assert made["fits"]
    assert made["fits_on"] == _ON_TOPOLOGY
    assert made["filter_attention"] == "tri_shape"
    assert list(made["stages"]) == ["filter", "prefill", "decode"]
    weights = 4 * (4 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32) + 32 + 2 * 128 * 32)
    for stage in made["stages"].values():
        memory = stage["memory"]
        assert memory["weights"] == weights
        assert memory["total"] == sum(memory[part] for part in ("weights", "arguments", "temporaries"))
        assert stage["flops"] > 0
    assert made["full_attention"]["prefill"]["flops"] > made["stages"]["filter"]["flops"]
    assert made["full_attention_cache_bytes"] == 2 * 4 * 4 * (2048 + 16) * 2 * 8


def test_a_mesh_that_takes_more_devices_than_there_are_is_told_in_one_line(small_model):
    done = _plan(f"--model={small_model}", "--tokens=2048", "--topology=cpu:2", "--mesh=model:4")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "takes 4 devices; there are 2" in done.stderr


@pytest.mark.parametrize("text", ["v9:2x2", "v5e", "v5e:", "v5e:2x", "cpu:0", "cpu:2x2", "v5e:02x2", ":2x2"])
def test_an_unknown_topology_is_told_with_those_that_are_known(text):
    with pytest.raises(UserError, match=r"is unknown; v5e:1x1, 2x2"):
        Topology.parse(text)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"keep": LENGTH}, "leaves nothing to filter"),
        ({"filter_layer": 32}, "has layers 0 to 31"),
        ({"keep": LENGTH - 100}, "exceed the model's context"),
    ],
)
def test_an_impossible_request_is_told(given, message):
    with pytest.raises(UserError, match=message):
        _request("auto", **given)


def test_an_unknown_model_is_told_with_those_that_are_known():
    with pytest.raises(UserError, match=r"'llama' is not a folder, a file or one of .*llama-3\.1-8b"):
        models.config_of("llama")


@pytest.mark.parametrize("name", shapes.names())
def test_published_configs_are_understood(name):
    assert models.config_of(name).layers > 0


def test_without_the_compiler_of_tpu_it_is_told_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(chips, "_LIBTPU", tmp_path / "absent")
    monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    with pytest.raises(UserError, match="pip install libtpu"):
        chips.prepare_process(Topology.parse("v5e:2x2"))


def test_what_does_not_fit_is_told_with_what_does(small_model, tmp_path):
    """Matrices of 17.7 GB, on a chip of 16 GB."""
    tpu_compiler.skip_where_absent()
    fields = json.loads(pathlib.Path(small_model).read_text())
    fields |= {"num_hidden_layers": 2, "hidden_size": 2048, "intermediate_size": 704 * 1024}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(fields))
    flags = ("--topology=v5e:1x1", "--tokens=512", "--keep=64", "--filter_layer=1", "--format=json")
    done = _plan(f"--model={path}", *flags)
    assert (done.returncode, done.stderr) == (0, "")
    made = json.loads(done.stdout)
    assert made["fits_on"] == "v5e:2x2"
    assert not made["fits"]
    memory = [stage["memory"]["total"] for stage in made["stages"].values() if "memory" in stage]
    assert min(memory) > 2 * 2 * 3 * 2048 * 704 * 1024
    assert made["excess_bytes"] == max(memory) - made["device_memory"]
    assert made["stages"]["filter"]["seconds"]["bound"] in ("compute", "memory", "exchange")


def _request(attention, **of_method):
    from gemfilter_jax.methods import presets
    from gemfilter_jax.planning.programs import Request

    config = models.config_of("llama-3.1-8b")
    default = presets.preset_for(config).default
    method = dataclasses.replace(default, heads=None, filter_attention=attention, **of_method)
    return Request(config, LENGTH, method)


def _counts():
    """Costs of one of eight devices."""
    from gemfilter_jax.parallel.sharding import MeshShape, make_mesh
    from gemfilter_jax.planning import plan, programs

    def abstract(request, mesh):
        return plan.abstract(request, make_mesh(MeshShape.parse(mesh)), "bfloat16")

    def filtered(request, mesh):
        return programs.filtering(abstract(request, mesh), request).costs()

    def exchanged(request, mesh):
        """Bytes of collectives but those that gather weights, which are the same for every prompt."""
        exchanges = filtered(request, mesh).exchanges
        return sum(one.bytes for (kind, _), one in exchanges.items() if kind != "all_gather")

    found = {"filter": {}, "weak": {}}
    for attention in ("dense", "tri_shape"):
        request = _request(attention, filter_layer=LAYER, keep=KEEP)
        of_mesh = found["filter"][attention] = {}
        for mesh in _MESHES:
            costs = filtered(request, mesh)
            of_mesh[mesh] = {"flops": costs.flops}
            for (kind, axis), one in costs.exchanges.items():
                of_mesh[mesh][f"{kind} {axis}"] = {"count": one.count, "bytes": one.bytes}
        found["weak"][attention] = [
            exchanged(dataclasses.replace(request, tokens=parts * _OF_PART), f"seq:{parts}") for parts in _SEQ
        ]
    longer = dataclasses.replace(request, tokens=2 * _SEQ[-1] * _OF_PART)
    found["twice as long"] = exchanged(longer, f"seq:{_SEQ[-1]}")
    prefill = programs.prefill(abstract(request, "model:8"), request)
    found |= {"prefill": prefill.costs().flops, "decode": programs.decode(prefill).costs().flops}
    return found


def _memory():
    """What stage 1 of a model of SmolLM2-135M's shape, cut to two layers, takes on several devices of this process."""
    import jax
    import jax.numpy as jnp

    from gemfilter_jax.methods.gemfilter.method import GemFilter
    from gemfilter_jax.parallel.sharding import MeshShape, make_mesh
    from gemfilter_jax.planning import plan, programs

    devices, tokens = _MEASURED
    config = dataclasses.replace(models.config_of("smollm2-135m"), layers=2, vocab=2048)
    request = programs.Request(config, tokens, GemFilter(filter_layer=1, keep=KEEP))
    model = plan.abstract(request, make_mesh(MeshShape(seq=devices)), "float32")
    program = programs.filtering(model, request)
    predicted, compiled = plan.compiled(program)
    gc.collect()
    before = _resident("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    real = jax.tree.map(lambda leaf: jax.device_put(jnp.full(leaf.shape, 0.01, leaf.dtype), leaf.sharding), model)
    jax.block_until_ready(compiled(real, *program.arguments))
    return {
        "weights": devices * predicted.weights,
        "temporaries": devices * predicted.temporaries,
        "predicted": devices * predicted.total,
        "grown": _resident("VmHWM") - before,
    }


def _resident(name):
    with open("/proc/self/status") as status:
        return int(re.search(rf"{name}:\s+(\d+) kB", status.read())[1]) * 1024


if __name__ == "__main__":
    count = 8 if sys.argv[1] == "counts" else _MEASURED[0]
    chips.prepare_process(Topology.parse(f"cpu:{count}"))
    print(json.dumps(_counts() if sys.argv[1] == "counts" else _memory()))
