"""Loading holds little more than the model: its size and two of its largest tensors, on a checkpoint above 1 GB."""

import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

LAYERS, WIDTH, MLP, VOCAB, HEADS = 8, 2048, 8192, 32_000, 16
BYTES = 2  # of bfloat16
LARGEST = VOCAB * WIDTH * BYTES
WORKSPACE = 40 * 2**20  # compiled programs, a block of rows that is on its way, what the allocator keeps

_MEASURE = """
import pathlib
import re
import sys
import jax.numpy as jnp
from gemfilter_jax.checkpoints.hf_folder import HuggingFaceFolder
from gemfilter_jax.checkpoints.weights import Loading

def resident(field):
    return int(re.search(rf"{field}:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) * 1024

opened = HuggingFaceFolder(pathlib.Path(sys.argv[1]))
loading = Loading(jnp.dtype(jnp.bfloat16), int8=sys.argv[2] == "int8", filter_layers=int(sys.argv[3]) or None)
HuggingFaceFolder(pathlib.Path(sys.argv[4])).decoder(loading)  # what the runtime itself takes
before = resident("VmRSS")
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
model = opened.decoder(loading)
print(resident("VmHWM") - before)
"""


def _save(folder, layers: int, width: int, mlp: int, vocab: int, heads: int) -> int:
    """A Llama of ones in two shards; returns the bytes of its tensors."""
    shapes = {"model.embed_tokens": (vocab, width), "lm_head": (vocab, width), "model.norm": (width,)}
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.self_attn.{name}_proj": (width, width) for name in "qkvo"}
        shapes |= {f"model.layers.{layer}.mlp.{name}_proj": (mlp, width) for name in ("gate", "up")}
        shapes[f"model.layers.{layer}.mlp.down_proj"] = (width, mlp)
        shapes |= {f"model.layers.{layer}.{name}_layernorm": (width,) for name in ("input", "post_attention")}
    config = {
        "model_type": "llama", "num_hidden_layers": layers, "hidden_size": width, "intermediate_size": mlp,
        "vocab_size": vocab, "num_attention_heads": heads, "max_position_embeddings": 512,
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    ones = np.ones(max(map(np.prod, shapes.values())), ml_dtypes.bfloat16)
    names = sorted(shapes)
    places = {}
    for part, own in enumerate((names[::2], names[1::2])):
        file = f"model-{part}.safetensors"
        save_file(
            {f"{name}.weight": ones[: np.prod(shapes[name])].reshape(shapes[name]) for name in own}, folder / file
        )
        places |= {f"{name}.weight": file for name in own}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return sum(int(np.prod(shape)) for shape in shapes.values()) * BYTES


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    size = _save(folder / "large", LAYERS, WIDTH, MLP, VOCAB, HEADS)
    _save(folder / "small", 2, 64, 128, 100, 4)
    assert size > 1e9
    yield folder / "large", folder / "small", size
    for path in (folder / "large").iterdir():  # pytest keeps temporary folders; a gigabyte need not stay
        path.unlink()


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory from /proc")
@pytest.mark.parametrize(("kind", "layers"), [("float", 0), ("int8", 2)])
def test_peak_memory_of_loading(folders, kind, layers):
    large, small, size = folders
    if kind == "int8":  # of the layers that select needs
        size = LARGEST + layers * (4 * WIDTH * WIDTH + 3 * WIDTH * MLP)
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, large, kind, str(layers), small],
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    )
    peak = int(done.stdout)
    print(f"{kind} {layers or LAYERS} layers: model {size:,}, peak {peak:,}, two tensors {2 * LARGEST:,}")
    assert 0.9 * size < peak <= size + 2 * LARGEST + WORKSPACE
