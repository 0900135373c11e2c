"""The weights of a GGUF file in another type: what llama.cpp reads at other numbers of bits than those of the file."""

import pathlib

import gguf
import numpy as np


def convert(source: pathlib.Path, target: pathlib.Path, kind: str) -> None:
    """Write a file with all matrices of another in `kind`, such as F32, F16 or Q8_0, and all else as it is there."""
    read, stored = gguf.GGUFReader(source), gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(target, read.fields["general.architecture"].contents())
    for field in read.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue  # the writer's own, and what is no longer so
        part = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=part)
    for tensor in read.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if values.ndim == 1:
            writer.add_tensor(tensor.name, values)
        else:
            writer.add_tensor(tensor.name, gguf.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def bits(path: pathlib.Path) -> float:
    """Bits of a weight in a GGUF file, on average."""
    tensors = gguf.GGUFReader(path).tensors
    return 8 * sum(int(one.n_bytes) for one in tensors) / sum(int(one.n_elements) for one in tensors)
