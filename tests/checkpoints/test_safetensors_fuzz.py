"""Damaged safetensors files: refused in one line, or read exactly as safetensors' own loader reads the same bytes."""

import itertools
import json
import pathlib
import random
import re
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import safetensors

from gemfilter_jax.checkpoints.hf_folder import Shards
from gemfilter_jax.checkpoints.weights import check_tensors
from gemfilter_jax.config import ModelConfig
from gemfilter_jax.errors import UserError
from gemfilter_jax.models.families import is_leftover

MUTATIONS = 2000  # per seed
CONFIG = ModelConfig(
    family="llama", layers=1, width=8, heads=2, kv_heads=1, head_width=4, mlp_width=12, vocab=6, context=64,
    rms_eps=1e-5, rope_theta=10000.0,
)  # fmt: skip
LAYER = {
    "input_layernorm": (8,),
    "post_attention_layernorm": (8,),
    "self_attn.q_proj": (8, 8),
    "self_attn.k_proj": (4, 8),
    "self_attn.v_proj": (4, 8),
    "self_attn.o_proj": (8, 8),
    "mlp.gate_proj": (12, 8),
    "mlp.up_proj": (12, 8),
    "mlp.down_proj": (8, 12),
}
SHAPES = {"model.embed_tokens.weight": (6, 8), "model.norm.weight": (8,), "lm_head.weight": (6, 8)}
SHAPES |= {f"model.layers.0.{name}.weight": shape for name, shape in LAYER.items()}
BYTES = {"F32": 4, "BF16": 2, "F16": 2, "F64": 8}
DTYPES = [*BYTES, "I32", "U16", "I64", "BOOL", "F8_E4M3", "F8_E5M2", "F4", "C64", "f32", "", "F128", 32, None, ["F32"]]
NUMBERS = [-1, 0, 1, 2, 8, 1 << 16, (1 << 31) - 1, 1 << 31, 1 << 32, 1 << 61, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]
NUMBERS += [1 << 64, 10**30, 1.5, 1e300, "8", None, True, [8]]


def sample() -> tuple[dict, bytes]:
    """The header and the tensors' bytes of a good file, of all dtypes that weights may have."""
    rng, header, offset = np.random.default_rng(0), {"__metadata__": {"format": "pt"}}, 0
    for (name, shape), dtype in zip(SHAPES.items(), itertools.cycle(BYTES), strict=False):
        end = offset + int(np.prod(shape)) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    return header, rng.bytes(offset)


def encoded(header: dict | str | bytes, data: bytes) -> bytes:
    text = json.dumps(header, separators=(",", ":")) if isinstance(header, dict) else header
    text = text.encode() if isinstance(text, str) else text
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def mutations(seed: int) -> Iterator[bytes]:
    rng = random.Random(seed)
    good_header, good_data = sample()
    whole = encoded(good_header, good_data)
    end = len(whole) - len(good_data)

    # Of the bytes.

    def span() -> tuple[int, int]:
        start = rng.randrange(end)
        return start, start + rng.choice([1, 2, 8, 40, rng.randrange(1, 200)])

    def change_header_bytes(data: bytearray) -> None:
        for _ in range(rng.choice([1, 1, 2, 5])):
            data[rng.randrange(8, end)] = rng.choice([rng.randrange(256), *b'"{}[],:0123456789 \n'])

    def flip_bit(data: bytearray) -> None:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)

    def change_tensor_bytes(data: bytearray) -> None:
        data[rng.randrange(end, len(data))] = rng.randrange(256)

    def lie_about_length(data: bytearray) -> None:
        true = end - 8
        lies = [0, 1, 2, true - 1, true + 1, true + 8, len(data), len(data) - 8, 100_000_000, 100_000_001, 1 << 32]
        data[:8] = rng.choice([*lies, 1 << 63, (1 << 64) - 1, rng.randrange(len(data))]).to_bytes(8, "little")

    def truncate(data: bytearray) -> None:
        del data[rng.randrange(rng.choice([10, end, len(data)])) :]

    def insert(data: bytearray) -> None:
        start, stop = span()
        start = rng.choice([start, len(data), rng.randrange(end, len(data))])
        data[start:start] = rng.choice([bytes(stop - start), b" " * 8, rng.randbytes(8)]) if stop > start else b"\0"

    def delete(data: bytearray) -> None:
        start, stop = span()
        del data[start:stop]

    # Of what the header says, with its length put right.

    def change_offsets(header: dict, name: str) -> None:
        offsets, other = header[name]["data_offsets"], header[rng.choice(list(SHAPES))]["data_offsets"]
        header[name]["data_offsets"] = rng.choice([
            offsets[::-1], [offsets[0]], [*offsets, 0], other, [offsets[0] + 4, offsets[1] + 4], [0, 0], {}, None,
            [offsets[0], rng.choice(NUMBERS)], [rng.choice(NUMBERS), offsets[1]],
            [offsets[0], offsets[1] + rng.choice([-8, -1, 1, 8])],
        ])  # fmt: skip

    def swap_places(header: dict, name: str) -> None:
        """Of the same size: a good file with the numbers elsewhere. Of others: overlaps and gaps."""
        other = rng.choice(list(SHAPES))
        header[name]["data_offsets"], header[other]["data_offsets"] = (
            header[other]["data_offsets"],
            header[name]["data_offsets"],
        )

    def change_shape(header: dict, name: str) -> None:
        shape = header[name]["shape"]
        header[name]["shape"] = rng.choice([
            shape[::-1], [*shape, 1], [1, *shape], [int(np.prod(shape))], [], [shape[0] * 2, *shape[1:]], 8, None,
            [rng.choice(NUMBERS), *shape[1:]], [1 << 32, 1 << 32], [1 << 63, 2], [0, *shape], [rng.choice(NUMBERS)] * 9,
        ])  # fmt: skip

    def change_dtype(header: dict, name: str) -> None:
        header[name]["dtype"] = rng.choice(DTYPES)

    def swap_dtypes(header: dict, name: str) -> None:
        """F16 and BF16 for each other: a good file with other numbers."""
        header[name]["dtype"] = {"F16": "BF16", "BF16": "F16"}.get(header[name]["dtype"], "F32")

    def rename(header: dict, name: str) -> None:
        others = ["", "a\nb", "x" * 5000, "\ud800", name + ".", name.upper(), rng.choice(list(SHAPES)), "__metadata__"]
        others += ["model.layers.00.mlp.up_proj.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"]
        header[rng.choice(others)] = header.pop(name)

    def drop(header: dict, name: str) -> None:
        part = rng.choice(["dtype", "shape", "data_offsets", None])
        if part is None:
            del header[name]
        else:
            del header[name][part]

    def add(header: dict, name: str) -> None:
        entry = {"dtype": "F32", "shape": [0], "data_offsets": [len(good_data)] * 2}
        entry |= {} if rng.random() < 0.5 else header[name]
        header[rng.choice(["new", f"new.{name}", "model.rotary_emb.inv_freq"])] = entry

    def change_metadata(header: dict, name: str) -> None:
        header["__metadata__"] = rng.choice([{}, None, {"format": 1}, {"format": "np"}, {"a": {"b": "c"}}, [], "pt"])
        header[name]["more"] = rng.choice([{}, 1, "x"]) if rng.random() < 0.3 else header[name]["shape"]

    def reorder(header: dict, name: str) -> None:
        entries = list(header.items())
        rng.shuffle(entries)
        header.clear()
        header.update(entries)

    # Of the header's text, with its length put right.

    def duplicate_key(text: str) -> str:
        name, other = rng.choice(list(SHAPES)), rng.choice(list(SHAPES))
        entry = json.dumps(good_header[rng.choice([name, name, other])])
        return rng.choice([f'{{"{name}":{entry},{text[1:]}', f'{text[:-1]},"{name}":{entry}}}'])

    def change_number(text: str) -> str:
        match = rng.choice(list(re.finditer(r"\d+", text)))
        return text[: match.start()] + json.dumps(rng.choice(NUMBERS)) + text[match.end() :]

    def nest(text: str) -> str:
        return rng.choice(
            ["[" * 5000, text + text, text[:-1], f"[{text}]", f'{{"a":{text}}}', "null", "{}", "", "1e999"]
        )

    of_bytes: list[Callable[[bytearray], None]] = [
        change_header_bytes, flip_bit, change_tensor_bytes, lie_about_length, truncate, insert, delete,
    ]  # fmt: skip
    of_header: list[Callable[[dict, str], None]] = [
        change_offsets, swap_places, change_shape, change_dtype, swap_dtypes, rename, drop, add, change_metadata,
        reorder,
    ]  # fmt: skip
    of_text: list[Callable[[str], str]] = [duplicate_key, change_number, nest]
    while True:
        kind = rng.choice([*of_bytes, *of_header, *of_text])
        if kind in of_bytes:
            data = bytearray(whole)
            kind(data)
            yield bytes(data)
        elif kind in of_header:
            header = json.loads(json.dumps(good_header))
            kind(header, rng.choice(list(SHAPES)))
            yield encoded(json.dumps(header, separators=(",", ":")), good_data)
        else:
            yield encoded(kind(json.dumps(good_header)), good_data)


def found_or_refusal(folder: pathlib.Path) -> dict[str, tuple[str, list[int], bytes]] | str:
    """What loading reads before it touches a device, each tensor as first rows and rest."""
    try:
        shards = Shards(folder)
        check_tensors(CONFIG, shards, str(folder))
    except UserError as error:
        return str(error)
    found = {}
    for name, shape in shards.shapes.items():
        if is_leftover(name, CONFIG):  # never read
            continue
        cut = shape[0] // 2
        rows = np.concatenate([shards.rows(name, 0, cut), shards.rows(name, cut, shape[0])])
        dtype = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}[rows.dtype.name]
        assert rows.nbytes == shards.sizes[name]
        found[name] = dtype, list(rows.shape), rows.tobytes()
    return found


def reference(data: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    return {
        name: (part["dtype"], part["shape"], bytes(part["data"]))
        for name, part in safetensors.deserialize(data)
        if not is_leftover(name, CONFIG)
    }


def assert_as_reference(found: dict[str, tuple[str, list[int], bytes]] | str, data: bytes) -> None:
    assert found == reference(data)
    assert {name: tuple(shape) for name, (_, shape, _) in found.items()} == SHAPES


def test_the_sample_is_good(tmp_path):
    data = encoded(*sample())
    (tmp_path / "model.safetensors").write_bytes(data)
    assert_as_reference(found_or_refusal(tmp_path), data)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("seed", range(3))
def test_mutated_files_are_refused_or_read_as_the_reference_reads_them(tmp_path, seed):
    path, refused = tmp_path / "model.safetensors", 0
    for index, data in enumerate(itertools.islice(mutations(seed), MUTATIONS)):
        path.write_bytes(data)
        try:
            found = found_or_refusal(tmp_path)
            if isinstance(found, str):
                assert found.isprintable()
                refused += 1
            else:
                assert_as_reference(found, data)
        except BaseException as error:  # Rust's panics are no Exception
            error.add_note(f"mutation {index}")
            raise
    assert 0.5 * MUTATIONS < refused < 0.9 * MUTATIONS
