"""Damaged config.json files, shard indexes and GGUF metadata: refused in one line, or a config that can be used."""

import copy
import itertools
import json
import pathlib
import random
import shutil
import struct
import warnings
from collections.abc import Iterator

import gguf
import gguf_files
import numpy as np
import pytest
from gguf import GGUFValueType as Value
from model_files import GOLDEN, Folder
from refusals import places, refusal

from gemfilter_jax.checkpoints.gguf_file import GGUFFile
from gemfilter_jax.checkpoints.hf_folder import HuggingFaceFolder, Shards
from gemfilter_jax.checkpoints.weights import check_tensors
from gemfilter_jax.config import ModelConfig
from gemfilter_jax.models.rope import inverse_frequencies

CONFIGS = ["llama_gqa_llama3", "ministral_mixed", "mistral_sliding", "phi4_partial", "qwen2_windows", "qwen3_bias_yarn"]
IN_GGUF = ["llama_gqa_llama3", "phi4_partial", "qwen2_bias", "qwen3_bias_yarn"]
SHARDED = GOLDEN / "qwen2_windows"
MUTATIONS = 300  # of each
CHECKED = 12  # every so many configs are held against the tensors, which takes longer
NUMBERS = [0, 1, 2, 3, 7, 100, -1, 9_999, 10**9, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64, 10**30, 10**400, 0.0, 0.5]
NUMBERS += [1.0, 1.5, -2.0, 1e-300, 1e-40, 1e38, 1e300, float("nan"), float("inf"), -float("inf")]
OTHERS = [None, True, False, "", "8", "silu", "yarn", "two\nlines", "\ud800", "\0", [], [1], [None], [[1]], ["x"], {}]
OTHERS += [[1.0, 0.0, 2.0], [10**400, 1.0, 1.0], {"a": 1}, {"rope_type": "default"}, {"rope_type": []}, [{}], [0.5] * 9]
ROPE = ["default", "linear", "llama3", "longrope", "yarn", "su", "dynamic"]


def use(config: ModelConfig) -> None:
    """What is done with a config before a tensor is read."""
    assert isinstance(config, ModelConfig)
    hash(config)
    if config.rotated > 10_000:  # the tensors are looked at before so many numbers are made
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for long in (False, True):
            frequencies = inverse_frequencies(config, long=long)
            assert frequencies.shape == (config.rotated // 2,)
            assert np.isfinite(frequencies).all()
    assert all(1 <= config.reach(layer) <= config.context for layer in range(config.layers))


def mutated(good: dict, rng: random.Random, strings: list[str]) -> dict:
    fields = copy.deepcopy(good)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        container, key = rng.choice(places(fields))
        match rng.randrange(8):
            case 0:
                del container[key]
            case 1 | 2 | 3:
                container[key] = rng.choice(NUMBERS)
            case 4 | 5:
                container[key] = copy.deepcopy(rng.choice(OTHERS))
            case 6:
                container[key] = rng.choice(strings)
            case 7:
                target, name = rng.choice(places(fields)) if places(fields) else (fields, "x")
                target[name] = rng.choice([*NUMBERS, "x"])
        if not places(fields):
            break
    return fields


@pytest.mark.parametrize("variant", CONFIGS)
def test_mutated_config_json(tmp_path, variant):
    rng, good = random.Random(variant), Folder.read(GOLDEN / variant).fields
    tensors, used = Shards(GOLDEN / variant), 0
    use(HuggingFaceFolder(GOLDEN / variant).config)
    for index in range(MUTATIONS):
        fields = mutated(good, rng, [*ROPE, *(str(name) for name in good)])
        (tmp_path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
        try:
            if refusal(HuggingFaceFolder, tmp_path) is None:
                config = HuggingFaceFolder(tmp_path).config
                use(config)
                if used % CHECKED == 0:
                    refusal(check_tensors, config, tensors, variant)
                used += 1
        except Exception as error:
            error.add_note(f"mutation {index}: {fields}")
            raise
    assert 0.1 * MUTATIONS < used < 0.7 * MUTATIONS


ABSURD = [
    ("num_hidden_layers", 10_000),
    ("num_attention_heads", 2**30),
    ("num_key_value_heads", 1),
    ("head_dim", 2**30),
    ("hidden_size", 2**31 - 1),
    ("intermediate_size", 2**31 - 1),
    ("vocab_size", 2**31 - 1),
]


@pytest.mark.timeout(10)
@pytest.mark.parametrize(("name", "value"), [*ABSURD, ("all", None)])
def test_sizes_beyond_any_machine_are_held_against_the_tensors_first(tmp_path, name, value):
    source = GOLDEN / "llama_gqa_llama3"
    fields = Folder.read(source).fields | ({name: value} if value else dict(ABSURD))
    (tmp_path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    found = refusal(check_tensors, HuggingFaceFolder(tmp_path).config, Shards(source), "tensors")
    assert found is not None
    assert found.startswith("tensors: the tensors do not fit")


def read_all(folder: pathlib.Path, config: ModelConfig) -> dict[str, bytes]:
    shards = Shards(folder)
    check_tensors(config, shards, str(folder))
    return {name: shards.rows(name, 0, shape[0]).tobytes() for name, shape in shards.shapes.items()}


def test_mutated_index(tmp_path):
    """Whatever loads, loads the same numbers."""
    folder, rng = shutil.copytree(SHARDED, tmp_path / "folder"), random.Random(0)
    config, path = HuggingFaceFolder(folder).config, folder / "model.safetensors.index.json"
    good, expected = json.loads(path.read_text(encoding="utf-8")), read_all(folder, config)
    strings = [*good["weight_map"].values(), *good["weight_map"], "..", ".", "/", "config.json", "a/b", "x" * 300]
    refused = 0
    for index in range(MUTATIONS):
        fields = mutated(good, rng, strings)
        path.write_text(json.dumps(fields), encoding="utf-8")
        try:
            if refusal(read_all, folder, config) is None:
                assert read_all(folder, config) == expected
            else:
                refused += 1
        except Exception as error:
            error.add_note(f"mutation {index}: {fields}")
            raise
    assert 0.5 * MUTATIONS < refused < MUTATIONS


# GGUF metadata. Values are written as bytes, to say what no writer would.

SCALARS = {
    Value.UINT8: "<B", Value.INT8: "<b", Value.UINT16: "<H", Value.INT16: "<h", Value.UINT32: "<I", Value.INT32: "<i",
    Value.UINT64: "<Q", Value.INT64: "<q", Value.FLOAT32: "<f", Value.FLOAT64: "<d", Value.BOOL: "<?",
}  # fmt: skip


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def some_scalar(rng: random.Random, kind: Value) -> bytes:
    if kind == Value.BOOL:
        number = rng.random() < 0.5
    elif kind in (Value.FLOAT32, Value.FLOAT64):
        number = rng.choice([float("nan"), float("inf"), -1.0, 0.0, 1e-40, 1e-6, 0.5, 1.0, 2.0, 1e38])
    else:
        bits = 8 * struct.calcsize(SCALARS[kind])
        unsigned = "U" in kind.name
        low, high = (0, 2**bits - 1) if unsigned else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        number = rng.choice([low, high, *(n for n in (-1, 0, 1, 2, 3, 8, 100, 10**4, 10**9) if low <= n <= high)])
    return struct.pack(SCALARS[kind], number)


def some_value(rng: random.Random) -> bytes:
    """A type and a value of it."""
    kind = rng.choice([*SCALARS, Value.UINT32, Value.UINT32, Value.FLOAT32, Value.STRING, Value.ARRAY])
    if kind == Value.STRING:
        return struct.pack("<I", kind) + text(rng.choice(["", "8", "two\nlines", *ROPE, *gguf_files.ARCHITECTURES]))
    if kind == Value.ARRAY:
        entry, count = rng.choice(list(SCALARS)), rng.choice([0, 1, 3])
        entries = b"".join(some_scalar(rng, entry) for _ in range(count))
        return struct.pack("<IIQ", kind, entry, count) + entries
    return struct.pack("<I", kind) + some_scalar(rng, kind)


class Parts:
    """A GGUF file taken apart: its metadata, each a type and a value in bytes, and all that follows."""

    def __init__(self, path: pathlib.Path):
        reader, content = gguf.GGUFReader(path), path.read_bytes()
        fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
        self.metadata = {}
        for name, field in fields.items():
            stop = end = field.offset + sum(part.nbytes for part in field.parts)
            self.metadata[name] = content[field.offset + len(text(name)) : stop]
        self.infos = content[end : end + sum(part.nbytes for t in reader.tensors for part in t.field.parts)]
        self.count, self.data = len(reader.tensors), content[reader.data_offset :]

    def write(self, path: pathlib.Path, metadata: dict[str, bytes]) -> pathlib.Path:
        header = b"GGUF" + struct.pack("<IQQ", 3, self.count, len(metadata))
        header += b"".join(text(name) + value for name, value in metadata.items()) + self.infos
        path.write_bytes(header + bytes(-len(header) % 32) + self.data)
        return path


def gguf_mutations(good: dict[str, bytes], rng: random.Random) -> Iterator[dict[str, bytes]]:
    of_model = [name for name in good if not name.startswith("tokenizer.")]
    known = [name for name in vars(gguf.Keys.Rope).values() if isinstance(name, str) and name.startswith("{arch}")]
    known += [name for name in vars(gguf.Keys.Attention).values() if isinstance(name, str) and "{arch}" in name]
    architecture = good["general.architecture"][12:].decode()
    while True:
        metadata = dict(good)
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            match rng.randrange(10):
                case 0:
                    metadata.pop(rng.choice(of_model), None)
                case 1:
                    metadata[rng.choice(known).format(arch=architecture)] = some_value(rng)
                case _:
                    metadata[rng.choice(of_model)] = some_value(rng)
        yield metadata


@pytest.mark.parametrize("variant", IN_GGUF)
def test_mutated_gguf_metadata(tmp_path, variant):
    rng, path, used = random.Random(variant), tmp_path / "mutated.gguf", 0
    good = gguf_files.write(tmp_path / "good.gguf", Folder.read(GOLDEN / variant))
    parts = Parts(good)
    assert parts.write(path, parts.metadata).read_bytes() == good.read_bytes()
    for index, metadata in enumerate(itertools.islice(gguf_mutations(parts.metadata, rng), MUTATIONS)):
        parts.write(path, metadata)
        try:
            if refusal(GGUFFile, path) is None:
                file = GGUFFile(path)
                use(file.config)
                if used % CHECKED == 0:
                    refusal(check_tensors, file.config, file.tensors(), variant)
                used += 1
        except Exception as error:
            changed = {name: value for name, value in metadata.items() if parts.metadata.get(name) != value}
            error.add_note(f"mutation {index}: {changed}")
            raise
    assert 0.1 * MUTATIONS < used < 0.7 * MUTATIONS
