"""Header and tensors of GGUF files as untrusted input: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md."""

import dataclasses
import functools
import math
import pathlib
import struct
from typing import Any, BinaryIO

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

from gemfilter_jax.errors import UserError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MOST_DIMENSIONS = 4
_DEEPEST_ARRAY = 3
_MOST_ENTRIES = 1 << 24  # per array: far above any vocabulary size, yet a list of this length fits in memory
_LONGEST_SHOWN = 100  # characters of a name shown in an error message

_ALIGNMENT = "general.alignment"
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_SCALARS: dict[int, np.dtype] = {
    GGUFValueType.UINT8: np.dtype("<u1"), GGUFValueType.INT8: np.dtype("<i1"),
    GGUFValueType.UINT16: np.dtype("<u2"), GGUFValueType.INT16: np.dtype("<i2"),
    GGUFValueType.UINT32: np.dtype("<u4"), GGUFValueType.INT32: np.dtype("<i4"),
    GGUFValueType.UINT64: np.dtype("<u8"), GGUFValueType.INT64: np.dtype("<i8"),
    GGUFValueType.FLOAT32: np.dtype("<f4"), GGUFValueType.FLOAT64: np.dtype("<f8"),
    GGUFValueType.BOOL: np.dtype("?"),
}  # fmt: skip
# The fewest bytes that each item takes. With the bytes left in the file, they bound the number of items.
_FEWEST: dict[int, int] = {kind: dtype.itemsize for kind, dtype in _SCALARS.items()}
_FEWEST |= {GGUFValueType.STRING: 8, GGUFValueType.ARRAY: 4 + 8}
_FEWEST_PER_FIELD = 8 + 4 + 1
_FEWEST_PER_TENSOR = 8 + 4 + 8 + 4 + 8


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor's bytes are.

    Attributes:
      shape: in numpy's order, matrices as [out, in].
      offset: position of its first byte in the file.
      size: in bytes.
    """

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    size: int


@dataclasses.dataclass(frozen=True)
class Header:
    """The contents of a GGUF file before its tensor data; metadata arrays are lists."""

    metadata: dict[str, Any]
    tensors: dict[str, Tensor]


def read_header(path: pathlib.Path) -> Header:
    """The header of a GGUF file of version 2 or 3, little-endian.

    The file's size bounds time and memory, whatever its contents.

    Raises:
      UserError: the file is not GGUF, is damaged or truncated, or holds a tensor that cannot be dequantised.
    """
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise UserError(f"{path}: not a GGUF file (it does not begin with {_MAGIC.decode()!r})")
        cursor = _Cursor(path, file)
        version = cursor.number(_U32)
        if version & 0xFFFF == 0 and version:
            raise UserError(f"{path}: big-endian GGUF is not supported; supported: little-endian")
        if version not in _VERSIONS:
            raise UserError(
                f"{path}: GGUF version {version} is not supported; supported: {', '.join(map(str, _VERSIONS))}"
            )
        tensor_count = cursor.count(_FEWEST_PER_TENSOR, "tensors")
        metadata = _read_metadata(cursor, cursor.count(_FEWEST_PER_FIELD, "metadata fields"))
        tensors = _read_tensors(cursor, tensor_count, metadata.get(_ALIGNMENT, gguf.GGUF_DEFAULT_ALIGNMENT))
    return Header(metadata, tensors)


def read_rows(path: pathlib.Path, tensor: Tensor, start: int, stop: int) -> np.ndarray:
    """Rows [start:stop] along the first axis of a tensor of the file, dequantised, float32.

    Raises:
      IndexError: there are no such rows.
      UserError: the file ends before these rows do.
    """
    if not 0 <= start < stop <= tensor.shape[0]:
        raise IndexError(f"rows [{start}:{stop}] of tensor {tensor.name!r} of shape {tensor.shape}")
    if len(tensor.shape) == 1:  # elements share quantisation blocks, so the tensor is one row
        return read_rows(path, dataclasses.replace(tensor, shape=(1, *tensor.shape)), 0, 1)[0, start:stop]
    row_size = tensor.size // tensor.shape[0]
    size, offset = (stop - start) * row_size, tensor.offset + start * row_size
    stored = np.fromfile(path, np.uint8, size, offset=offset)
    if stored.size < size:
        raise UserError(f"{path}: damaged or truncated GGUF file (it ends within tensor {tensor.name!r})")
    shape = (stop - start, *tensor.shape[1:])
    return gguf.quants.dequantize(stored.reshape(*shape[:-1], -1), tensor.kind).reshape(shape)


class _Cursor:
    """Reads a file forward; before each read it checks the size against the bytes left in the file."""

    def __init__(self, path: pathlib.Path, file: BinaryIO):
        self.path, self._file = path, file
        self.position, self.size = file.tell(), path.stat().st_size
        self.where = "header"

    def damaged(self, what: str) -> UserError:
        return UserError(f"{self.path}: damaged or truncated GGUF file ({self.where}: {what})")

    def read(self, size: int) -> bytes:
        left = self.size - self.position
        if size > left or len(data := self._file.read(size)) < size:
            raise self.damaged(f"{size:,} bytes expected, {left:,} left")
        self.position += size
        return data

    def number(self, form: struct.Struct) -> int:
        return form.unpack(self.read(form.size))[0]

    def count(self, fewest: int, what: str) -> int:
        """Read a count of items that take at least `fewest` bytes each."""
        count, left = self.number(_U64), self.size - self.position
        if count * fewest > left:
            raise self.damaged(f"{count:,} {what}, {left:,} bytes left")
        return count

    def text(self) -> str:
        data = self.read(self.number(_U64))
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise self.damaged(f"text that is not UTF-8 before byte {self.position:,} of the file") from error

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self._scalars(kind, 1)[0]
        if kind == GGUFValueType.STRING:
            return self.text()
        if kind != GGUFValueType.ARRAY:
            raise self.damaged(f"unknown value type {kind}")
        if depth == _DEEPEST_ARRAY:
            raise self.damaged(f"arrays nested deeper than {_DEEPEST_ARRAY}")
        entry = self.number(_U32)
        if entry not in _FEWEST:
            raise self.damaged(f"array of unknown value type {entry}")
        count = self.count(_FEWEST[entry], "array entries")
        if count > _MOST_ENTRIES:
            raise self.damaged(f"{count:,} array entries, at most {_MOST_ENTRIES:,} supported")
        if entry in _SCALARS:
            return self._scalars(entry, count)
        return [self.value(entry, depth + 1) for _ in range(count)]

    def _scalars(self, kind: int, count: int) -> list:
        dtype = _SCALARS[kind]
        return np.frombuffer(self.read(count * dtype.itemsize), dtype).tolist()


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata = {}
    for index in range(count):
        cursor.where = f"metadata field {index}"
        name = cursor.text()
        cursor.where = f"metadata {name[:_LONGEST_SHOWN]!r}"
        if name in metadata:
            raise cursor.damaged("duplicate")
        kind = cursor.number(_U32)
        metadata[name] = value = cursor.value(kind)
        if name == _ALIGNMENT and (kind != GGUFValueType.UINT32 or value.bit_count() != 1):
            raise cursor.damaged("not a uint32 that is a power of two")
    return metadata


def _read_tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, Tensor]:
    tensors = {}
    for index in range(count):
        cursor.where = f"tensor {index}"
        name = cursor.text()
        cursor.where = f"tensor {name[:_LONGEST_SHOWN]!r}"
        if name in tensors:
            raise cursor.damaged("duplicate")
        tensors[name] = _read_tensor(cursor, name)
    start = end = _aligned(cursor.position, alignment)
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
        cursor.where = f"tensor {name[:_LONGEST_SHOWN]!r}"
        begin, end = _aligned(end, alignment), start + tensor.offset + tensor.size
        if start + tensor.offset != begin:
            raise cursor.damaged(f"its bytes begin at {start + tensor.offset:,}, expected {begin:,}")
        if end > cursor.size:
            raise cursor.damaged(f"its bytes end at {end:,}, the file at {cursor.size:,}")
        tensors[name] = dataclasses.replace(tensor, offset=begin)
    return tensors


def _read_tensor(cursor: _Cursor, name: str) -> Tensor:
    """A tensor whose offset is still relative to the first tensor."""
    rank = cursor.number(_U32)
    if not 1 <= rank <= _MOST_DIMENSIONS:
        raise cursor.damaged(f"{rank:,} dimensions, expected 1 to {_MOST_DIMENSIONS}")
    shape = tuple(cursor.number(_U64) for _ in range(rank))[::-1]
    if 0 in shape:
        raise cursor.damaged(f"empty, of shape {list(shape)}")
    code = cursor.number(_U32)
    try:
        kind = GGMLQuantizationType(code)
    except ValueError as error:
        raise cursor.damaged(f"unknown tensor type {code}") from error
    if not _dequantises(kind):
        raise UserError(
            f"{cursor.path}: {cursor.where} is stored as {kind.name}, which the gguf package does not dequantise"
        )
    block, block_size = gguf.GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        raise cursor.damaged(f"rows of {shape[-1]:,}, not a multiple of {kind.name}'s block of {block}")
    return Tensor(name, shape, kind, cursor.number(_U64), math.prod(shape) // block * block_size)


@functools.cache
def _dequantises(kind: GGMLQuantizationType) -> bool:
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment
