"""GGUF headers: what the gguf package's own reader reads, and one clear line for everything that is no good file."""

import itertools
import pathlib
import random
import struct
import tracemalloc
from collections.abc import Callable, Iterator

import gguf
import gguf_files
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFValueType as Value
from model_files import GOLDEN, Folder

from gemfilter_jax.checkpoints import embedded
from gemfilter_jax.checkpoints.gguf_header import Header, Tensor, read_header, read_rows
from gemfilter_jax.errors import UserError

MUTATIONS = 1000  # per seed
HUGE = [1 << 20, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 60, 1 << 61, 1 << 63, (1 << 64) - 1]


def write_sample(path: pathlib.Path) -> pathlib.Path:
    """A few KB with every type of metadata, every rank and many types of tensor."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(64)
    for value in Value:
        if value not in (Value.STRING, Value.ARRAY):
            writer.add_key_value(f"scalar.{value.name}", 1, value)
            extremes = np.iinfo(value.name.lower()) if "INT" in value.name else None
            entries = [int(extremes.min), int(extremes.max), 5] if extremes else [1, 0, 1]
            writer.add_key_value(f"array.{value.name}", entries, Value.ARRAY, value)
    writer.add_string("text", "Ġ und Grüße")
    writer.add_string("empty", "")
    writer.add_float64("negative", -1.5)
    writer.add_array("tokens", ["<s>", "Ġ", "", "ab"])
    writer.add_array("nested", [[1, 2], [3]])
    for kind in (Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_1):
        stored = gguf.quants.quantize(rng.normal(size=(3, 64)).astype(np.float32), kind)
        writer.add_tensor(f"matrix.{kind.name}", stored, raw_dtype=kind)
    for kind in (Kind.Q4_K, Kind.Q6_K):  # the package dequantises these but does not quantise
        stored = rng.integers(0, 60, (2, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
        writer.add_tensor(f"matrix.{kind.name}", stored, raw_dtype=kind)
    writer.add_tensor("vector", np.arange(7, dtype=np.float32))
    vector = gguf.quants.quantize(rng.normal(size=(1, 96)).astype(np.float32), Kind.Q8_0)
    writer.add_tensor("vector.Q8_0", vector[0], raw_dtype=Kind.Q8_0)
    writer.add_tensor("cube", rng.normal(size=(2, 3, 5)).astype(np.float16))
    writer.add_tensor("four", rng.normal(size=(2, 1, 3, 2)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> pathlib.Path:
    return write_sample(tmp_path_factory.mktemp("gguf") / "sample.gguf")


def all_rows(path: pathlib.Path, tensor: Tensor) -> np.ndarray:
    return read_rows(path, tensor, 0, tensor.shape[0])


def flat(value):
    """Arrays of arrays as the reference gives them."""
    nested = isinstance(value, list) and value and isinstance(value[0], list)
    return flat([entry for part in value for entry in part]) if nested else value


def assert_as_reference(path: pathlib.Path, rows_of_every: int = 1) -> None:
    """All of the header is compared; the numbers of every n-th tensor."""
    header, reference = read_header(path), gguf.GGUFReader(path)
    metadata = {name: field.contents() for name, field in reference.fields.items() if not name.startswith("GGUF.")}
    # repr tells 1 from True and 1.0, and equals itself for NaN
    assert repr({name: flat(value) for name, value in header.metadata.items()}) == repr(metadata)
    assert list(header.tensors) == [tensor.name for tensor in reference.tensors]
    for theirs in reference.tensors:
        ours = header.tensors[theirs.name]
        assert (ours.name, ours.kind, ours.offset, ours.size) == (
            theirs.name, theirs.tensor_type, theirs.data_offset, theirs.n_bytes,
        )  # fmt: skip
        assert ours.shape == tuple(theirs.shape[::-1].tolist())
    for theirs in reference.tensors[::rows_of_every]:
        ours = all_rows(path, header.tensors[theirs.name])
        expected = gguf.quants.dequantize(theirs.data, theirs.tensor_type)
        assert ours.dtype == np.float32
        assert ours.shape == expected.shape
        assert ours.tobytes() == expected.tobytes()


def test_sample_reads_as_the_reference_does(sample):
    assert_as_reference(sample)
    assert len(read_header(sample).tensors) == 13
    assert read_header(sample).metadata["nested"] == [[1, 2], [3]]


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1], ids=lambda k: k.name)
def test_model_reads_as_the_reference_does(tmp_path, kind):
    folder = Folder.read(GOLDEN / "llama_gqa_tied")
    assert_as_reference(gguf_files.write(tmp_path / "model.gguf", folder, kind))


def test_default_model_reads_as_the_reference_does():
    assert_as_reference(embedded.locate(), rows_of_every=30)


def test_version_2(tmp_path, sample):
    path = tmp_path / "old.gguf"
    path.write_bytes(sample.read_bytes()[:4] + struct.pack("<I", 2) + sample.read_bytes()[8:])
    assert_as_reference(path)


@pytest.mark.parametrize("name", ["matrix.F32", "matrix.Q4_1", "matrix.Q6_K", "vector", "vector.Q8_0", "cube", "four"])
def test_some_rows(sample, name):
    tensor = read_header(sample).tensors[name]
    whole = all_rows(sample, tensor)
    for start in range(len(whole)):
        for stop in range(start + 1, len(whole) + 1, 5):
            np.testing.assert_array_equal(read_rows(sample, tensor, start, stop), whole[start:stop])


@pytest.mark.parametrize(("start", "stop"), [(-1, 1), (0, 4), (1, 1), (2, 1)])
def test_rows_must_exist(sample, start, stop):
    with pytest.raises(IndexError, match=r"matrix\.F16"):
        read_rows(sample, read_header(sample).tensors["matrix.F16"], start, stop)


def test_file_cut_after_its_header_was_read(tmp_path, sample):
    path = tmp_path / "cut.gguf"
    path.write_bytes(sample.read_bytes())
    tensors = read_header(path).tensors
    path.write_bytes(sample.read_bytes()[: tensors["four"].offset + 1])
    np.testing.assert_array_equal(all_rows(path, tensors["cube"]), all_rows(sample, tensors["cube"]))
    with pytest.raises(UserError, match=r"damaged or truncated GGUF file .*within tensor 'four'"):
        all_rows(path, tensors["four"])


# Files made byte by byte, to say what no writer would.


def u32(number: int) -> bytes:
    return struct.pack("<I", number)


def u64(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}Q", *numbers)


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return u64(len(data)) + data


def field(name: str | bytes, kind: int, value: bytes) -> bytes:
    return text(name) + u32(kind) + value


def array(kind: int, count: int, entries: bytes = b"") -> bytes:
    return u32(kind) + u64(count) + entries


def tensor(name: str, offset: int = 0, *, dims: tuple[int, ...] = (32, 2), kind: int = Kind.F32) -> bytes:
    return text(name) + u32(len(dims)) + u64(*dims) + u32(kind) + u64(offset)


def build(
    *entries: bytes, fields: int = 0, tensors: int = 0, start: bytes = b"GGUF" + u32(3), data: int | None = None
) -> bytes:
    """The counts are what the file claims; `data` is the size of its tensors' bytes, by default of two `tensor`s."""
    header = start + u64(tensors, fields) + b"".join(entries)
    return header + bytes(-len(header) % 32) + bytes(512 if data is None else data)


def nested(depth: int) -> bytes:
    return array(Value.ARRAY, 1) * depth + array(Value.UINT8, 1, b"\1")


REFUSED = {
    "magic": (build(start=b"GGML" + u32(3)), "not a GGUF file (it does not begin with 'GGUF')"),
    "nothing": (b"", "not a GGUF file"),
    "magic alone": (b"GGUF", "damaged or truncated GGUF file (header: 4 bytes expected, 0 left)"),
    "version 0": (build(start=b"GGUF" + u32(0)), "GGUF version 0 is not supported; supported: 2, 3"),
    "version 1": (build(start=b"GGUF" + u32(1)), "GGUF version 1 is not supported"),
    "version 4": (build(start=b"GGUF" + u32(4)), "GGUF version 4 is not supported"),
    "big-endian": (build(start=b"GGUF" + struct.pack(">I", 3)), "big-endian GGUF is not supported"),
    "many tensors": (build(tensors=1 << 60), "(header: 1,152,921,504,606,846,976 tensors, 528 bytes left)"),
    "many fields": (build(fields=1 << 63), "(header: 9,223,372,036,854,775,808 metadata fields, 520 bytes left)"),
    "more fields than there are": (build(field("x", Value.UINT8, b"\1"), fields=4), "duplicate"),
    "long name": (build(u64(1 << 62), fields=1), "(metadata field 0: 4,611,686,018,427,387,904 bytes expected, 512"),
    "long text": (build(field("x", Value.STRING, u64(700)), fields=1), "(metadata 'x': 700 bytes expected, 531 left"),
    "long array": (
        build(field("x", Value.ARRAY, array(Value.UINT32, 1 << 60)), fields=1),
        "(metadata 'x': 1,152,921,504,606,846,976 array entries, 527 bytes left)",
    ),
    "long array of texts": (build(field("x", Value.ARRAY, array(Value.STRING, 90)), fields=1), "90 array entries"),
    "array above any vocabulary": (
        build(field("x", Value.ARRAY, array(Value.UINT8, 1 << 25)), fields=1, data=1 << 25),
        "33,554,432 array entries, at most 16,777,216",
    ),
    "value type": (build(field("x", 13, b"\1"), fields=1), "(metadata 'x': unknown value type 13)"),
    "array type": (build(field("x", Value.ARRAY, array(99, 1)), fields=1), "array of unknown value type 99"),
    "deep arrays": (build(field("x", Value.ARRAY, nested(3)), fields=1), "nested deeper than 3"),
    "very deep arrays": (build(field("x", Value.ARRAY, nested(20000)), fields=1), "nested deeper than 3"),
    "duplicate field": (build(field("a\nb", Value.BOOL, b"\1") * 2, fields=2), r"(metadata 'a\nb': duplicate)"),
    "name not UTF-8": (build(field(b"\xff", Value.BOOL, b"\1"), fields=1), "(metadata field 0: text that is not UTF-8"),
    "text not UTF-8": (
        build(field("x", Value.ARRAY, array(Value.STRING, 1, text(b"a\xc4"))), fields=1),
        "(metadata 'x': text that is not UTF-8 before byte 59 of the file)",
    ),
    "alignment 48": (build(field("general.alignment", Value.UINT32, u32(48)), fields=1), "power of two"),
    "alignment 0": (build(field("general.alignment", Value.UINT32, u32(0)), fields=1), "power of two"),
    "alignment type": (build(field("general.alignment", Value.UINT64, u64(32)), fields=1), "not a uint32"),
    "alignment text": (build(field("general.alignment", Value.STRING, text("32")), fields=1), "not a uint32"),
    "large alignment": (
        build(field("general.alignment", Value.UINT32, u32(1 << 31)), tensor("a"), fields=1, tensors=1),
        "(tensor 'a': its bytes end at 2,147,483,904, the file at",
    ),
    "duplicate tensor": (build(tensor("a"), tensor("a", 256), tensors=2), "(tensor 'a': duplicate)"),
    "no dimensions": (build(tensor("a", dims=()), tensors=1), "(tensor 'a': 0 dimensions, expected 1 to 4)"),
    "five dimensions": (build(tensor("a", dims=(1,) * 5), tensors=1), "5 dimensions"),
    "many dimensions": (build(text("a") + u32((1 << 32) - 1), tensors=1), "4,294,967,295 dimensions"),
    "empty tensor": (build(tensor("a", dims=(32, 0)), tensors=1), "(tensor 'a': empty, of shape [0, 32])"),
    "overflowing tensor": (build(tensor("a", dims=(1 << 33, 1 << 33)), tensors=1), "(tensor 'a': its bytes end at"),
    "overflowing to nothing": (build(tensor("a", dims=(1 << 32, 1 << 32)), tensors=1), "(tensor 'a': its bytes end at"),
    "tensor type": (build(tensor("a", kind=4), tensors=1), "(tensor 'a': unknown tensor type 4)"),
    "large tensor type": (build(tensor("a", kind=(1 << 32) - 1), tensors=1), "unknown tensor type 4294967295"),
    "not dequantised": (
        build(tensor("a", kind=Kind.Q8_K, dims=(256,)), tensors=1),
        "tensor 'a' is stored as Q8_K, which the gguf package does not dequantise",
    ),
    "integers": (build(tensor("a", kind=Kind.I32), tensors=1), "stored as I32, which the gguf package"),
    "split block": (
        build(tensor("a", kind=Kind.Q4_0, dims=(48, 2)), tensors=1),
        "(tensor 'a': rows of 48, not a multiple of Q4_0's block of 32)",
    ),
    "data cut": (build(tensor("a"), tensor("b", 256), tensors=2, data=511), "(tensor 'b': its bytes end at"),
    "data far away": (build(tensor("a", (1 << 64) - 32), tensors=1), "(tensor 'a': its bytes begin at"),
    "first tensor late": (build(tensor("a", 32), tensors=1), "(tensor 'a': its bytes begin at 128, expected 96)"),
    "gap": (build(tensor("a"), tensor("b", 288), tensors=2, data=600), "(tensor 'b': its bytes begin at"),
    "overlap": (build(tensor("a"), tensor("b", 224), tensors=2), "(tensor 'b': its bytes begin at"),
    "same place": (build(tensor("a"), tensor("b"), tensors=2), "(tensor 'b': its bytes begin at"),
    "not aligned": (
        build(tensor("a", dims=(3,)), tensor("b", 12), tensors=2),
        "(tensor 'b': its bytes begin at 140, expected 160)",
    ),
    "no room for the tensor list": (build(tensor("a")[:-1], tensors=1, data=0)[:64], "left)"),
}


@pytest.mark.parametrize(("content", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_good_file_is_refused(tmp_path, content, words):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(UserError) as caught:
            read_header(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert words in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert peak < 1 << 18


GOOD = {
    "nothing in it": build(data=0),
    "tensors in another order": build(tensor("b", 256), tensor("a"), tensors=2),
    "last tensor not padded": build(tensor("a"), tensor("b", 256, dims=(3,)), tensors=2, data=256 + 12),
    "bytes after the last tensor": build(tensor("a"), tensors=1, data=1000),
    "empty arrays": build(*(field(f"x{i}", Value.ARRAY, array(i, 0)) for i in Value), fields=len(Value)),
    "arrays of arrays": build(field("x", Value.ARRAY, nested(2)), fields=1),
    "true that is not 1": build(field("x", Value.BOOL, b"\7"), fields=1),
    "nameless": build(field("", Value.BOOL, b"\0"), tensor(""), fields=1, tensors=1),
}


@pytest.mark.parametrize("content", GOOD.values(), ids=GOOD)
def test_unusual_but_good(tmp_path, content):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    assert_as_reference(path)


def number_positions(path: pathlib.Path) -> list[tuple[int, int]]:
    """Offset and size of every count, length, type, dimension and offset in the header, by the reference."""
    reference = gguf.GGUFReader(path)
    positions = []
    for part in (*reference.fields.values(), *(tensor.field for tensor in reference.tensors)):
        offset = part.offset
        for values in part.parts:
            if values.dtype in (np.uint32, np.uint64):
                positions += [(offset + i * values.itemsize, values.itemsize) for i in range(values.size)]
            offset += values.nbytes
    return positions


def mutations(path: pathlib.Path, seed: int) -> Iterator[bytes]:
    rng, whole, positions = random.Random(seed), path.read_bytes(), number_positions(path)
    end = min(tensor.offset for tensor in read_header(path).tensors.values())

    def span() -> tuple[int, int]:
        start = rng.randrange(end)
        return start, start + rng.choice([1, 2, 4, 8, 32, 64, rng.randrange(1, 300)])

    def change_bytes(data: bytearray) -> None:
        for _ in range(rng.choice([1, 1, 2, 4, 16])):
            data[rng.randrange(end)] = rng.randrange(256)

    def flip_bit(data: bytearray) -> None:
        data[rng.randrange(end)] ^= 1 << rng.randrange(8)

    def truncate(data: bytearray) -> None:
        del data[rng.randrange(rng.choice([end, len(data)])) :]

    def insert(data: bytearray) -> None:
        start, stop = span()
        data[start:start] = rng.choice([bytes(stop - start), rng.randbytes(stop - start)])

    def delete(data: bytearray) -> None:
        start, stop = span()
        del data[start:stop]

    def duplicate(data: bytearray) -> None:
        start, stop = span()
        target = rng.choice([start, stop, rng.randrange(end)])
        data[target : target + rng.choice([0, stop - start])] = data[start:stop]

    def change_number(data: bytearray) -> None:
        offset, size = rng.choice(positions)
        old = int.from_bytes(data[offset : offset + size], "little")
        new = rng.choice([*HUGE, 0, 1, 2, old + 1, old - 1, 2 * old, len(data), rng.randrange(64)])
        data[offset : offset + size] = (new % (1 << 8 * size)).to_bytes(size, "little")

    def change_numbers(data: bytearray) -> None:
        for _ in range(rng.randrange(2, 4)):
            change_number(data)

    kinds: list[Callable[[bytearray], None]] = [change_bytes, flip_bit, truncate, insert, delete, duplicate]
    kinds += [change_number, change_number, change_number, change_numbers]
    while True:
        data = bytearray(whole)
        rng.choice(kinds)(data)
        yield bytes(data)


def header_or_refusal(path: pathlib.Path) -> Header | str:
    try:
        return read_header(path)
    except UserError as error:
        return str(error)


@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # scales of mutated blocks are any float16
@pytest.mark.parametrize("seed", range(4))
def test_mutated_files_are_refused_or_read_as_the_reference_reads_them(tmp_path, sample, seed):
    path, refused = tmp_path / "mutated.gguf", 0
    for index, data in enumerate(itertools.islice(mutations(sample, seed), MUTATIONS)):
        path.write_bytes(data)
        found = header_or_refusal(path)
        if isinstance(found, str):
            assert "\n" not in found
            refused += 1
            continue
        assert sum(tensor.size for tensor in found.tensors.values()) < len(data)
        try:
            assert_as_reference(path)
        except Exception as error:
            error.add_note(f"mutation {index}")
            raise
    assert 0.6 * MUTATIONS < refused < 0.96 * MUTATIONS
