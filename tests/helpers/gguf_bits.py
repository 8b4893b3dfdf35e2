"""A GGUF file with fewer bits, by llama.cpp's own quantizer as `xllamacpp` brings it: what
`llama-quantize FILE OUT Q4_K_M` makes, where there is no such program.

    python -m tests.helpers.gguf_bits TARGET.gguf OUT.gguf

Most matrices are Q4_K. The table is Q6_K, and so are values and the products down in the first and
the last eighth of the layers and in every third between. Rows that are no multiple of 256 numbers
have no such form and become Q5_0 and Q8_0, as there.
"""

import ctypes
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

BLOCK = 256  # numbers of a row that Q4_K and Q6_K pack together
MOSTLY_Q4_K_M = 15
BETTER = re.compile(r"blk\.(\d+)\.(attn_v|ffn_down)\.weight")


def wanted_type(name: str, width: int, layers: int) -> str:
    """Name of the type of a matrix whose rows have so many numbers."""
    better = name in ("token_embd.weight", "output.weight")
    if found := BETTER.fullmatch(name):
        i, eighth = int(found[1]), layers // 8
        better = i < eighth or i >= 7 * layers // 8 or (i - eighth) % 3 == 2
    if width % BLOCK:
        return "Q8_0" if better else "Q5_0"
    return "Q6_K" if better else "Q4_K"


def quantized(rows: np.ndarray, kind: Any) -> np.ndarray:
    """[n, width] float32 -> [n, bytes of a row], by llama.cpp."""
    gguf: Any = import_module("gguf")
    found: Any = import_module("xllamacpp.xllamacpp")
    quantize = ctypes.CDLL(found.__file__).ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    quantize.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3,
                         ctypes.c_void_p]  # fmt: skip
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    count, width = rows.shape
    per_block, size = gguf.GGML_QUANT_SIZES[kind]
    out = np.zeros((count, width // per_block * size), dtype=np.uint8)
    given = rows.ctypes.data, out.ctypes.data, 0, count, width, None
    written = quantize(kind.value, *given)
    assert written == out.nbytes, f"{written} of {out.nbytes} bytes"
    return out


def write_q4_k_m(source: Path, out: Path) -> dict[str, int]:
    """Write the file; returns how many tensors there are of each type."""
    gguf: Any = import_module("gguf")
    reader = gguf.GGUFReader(source)
    fields = {name: field for name, field in reader.fields.items() if "GGUF." not in name}
    arch = fields.pop("general.architecture").contents()
    layers = fields[f"{arch}.block_count"].contents()
    writer = gguf.GGUFWriter(out, arch)
    for name, field in fields.items():
        value = MOSTLY_Q4_K_M if name == "general.file_type" else field.contents()
        inner = field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(name, value, field.types[0], sub_type=inner)
    counts: dict[str, int] = {}
    for tensor in reader.tensors:
        data, kind = tensor.data, tensor.tensor_type
        if len(tensor.shape) > 1:
            shape = tuple(int(n) for n in reversed(tensor.shape))
            numbers = gguf.quants.dequantize(data, kind).reshape(-1, shape[-1])
            kind = gguf.GGMLQuantizationType[wanted_type(tensor.name, shape[-1], layers)]
            data = quantized(numbers, kind).reshape(*shape[:-1], -1)
        counts[kind.name] = counts.get(kind.name, 0) + 1
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return counts


if __name__ == "__main__":
    print(write_q4_k_m(Path(sys.argv[1]), Path(sys.argv[2])))
