"""Runs on an emulated board: which processor it is, exact integer products, and what they execute.

Python 3.8 or later, numpy and onnxruntime. One line of JSON on stdout.
"""

from __future__ import annotations

import ctypes
import json
import platform
import sys
from typing import Any, Sequence, Union  # noqa: UP035 - Python 3.8

AT_HWCAP, AT_HWCAP2 = 16, 26
DOT, HALF, SVE, I8MM = 20, 10, 22, 13  # bits of AT_HWCAP, the last of AT_HWCAP2
TYPES = {"float32": 1, "uint8": 2, "int8": 3, "int32": 6}
PRODUCTS = (("MatMulInteger", "uint8"), ("MatMulInteger", "int8"), ("MatMul", "float32"))


def varint(number: int) -> bytes:
    """A number as protocol buffers write it."""
    data = b""
    while number > 127:
        data += bytes([number & 127 | 128])
        number >>= 7
    return data + bytes([number])


def number(field: int, value: int) -> bytes:
    """A field with a number."""
    return varint(field << 3) + varint(value)


def text(field: int, value: Union[str, bytes]) -> bytes:  # noqa: UP007 - Python 3.8
    """A field with bytes or text."""
    data = value if isinstance(value, bytes) else value.encode()
    return varint(field << 3 | 2) + varint(len(data)) + data


def value_info(name: str, kind: str, shape: Sequence[int]) -> bytes:
    """An input or output of the graph."""
    dimensions = b"".join(text(1, number(1, size)) for size in shape)
    return text(1, name) + text(2, text(1, number(1, TYPES[kind]) + text(2, dimensions)))


def tensor(name: str, array: Any) -> bytes:
    """A constant of the graph."""
    dimensions = b"".join(number(1, size) for size in array.shape)
    return dimensions + number(2, TYPES[array.dtype.name]) + text(8, name) + text(9, array.tobytes())


def product(operator: str, left: Any, right: Any, result: str) -> bytes:
    """An ONNX model of one product, written by hand: the board has no onnx package."""
    node = text(1, "x") + text(1, "w") + text(2, "y") + text(4, operator)
    graph = text(1, node) + text(2, "product") + text(5, tensor("w", right))
    graph += text(11, value_info("x", left.dtype.name, left.shape))
    graph += text(12, value_info("y", result, (left.shape[0], right.shape[1])))
    return number(1, 8) + text(8, number(2, 17)) + text(7, graph)


def main() -> None:
    """Say what the board is and whether its products are right."""
    import numpy as np
    import onnxruntime as ort

    library = ctypes.CDLL(None)
    library.getauxval.restype = ctypes.c_ulong
    library.getauxval.argtypes = [ctypes.c_ulong]
    first, second = library.getauxval(AT_HWCAP), library.getauxval(AT_HWCAP2)
    generator = np.random.default_rng(0)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    found = []
    for tag, (operator, kind) in enumerate(PRODUCTS):
        if kind == "float32":
            left = generator.standard_normal((48, 256)).astype(kind)
            right = generator.standard_normal((256, 96)).astype(kind)
            expected, result = left.astype("float64") @ right.astype("float64"), "float32"
        else:
            low, high = (0, 256) if kind == "uint8" else (-128, 128)
            left = generator.integers(low, high, (48, 256)).astype(kind)
            right = generator.integers(-128, 128, (256, 96)).astype("int8")
            expected, result = left.astype("int32") @ right.astype("int32"), "int32"
        session = ort.InferenceSession(product(operator, left, right, result), options)
        session.run(None, {"x": left})
        library.syscall(ctypes.c_long(0xC0DE), ctypes.c_long(1), ctypes.c_long(tag))
        output = session.run(None, {"x": left})[0]
        library.syscall(ctypes.c_long(0xC0DE), ctypes.c_long(2), ctypes.c_long(tag))
        found.append(
            {"operator": operator, "type": kind, "difference": float(np.abs(output - expected).max())}
        )
    document = {
        "machine": platform.machine(),
        "python": platform.python_version(),
        "onnxruntime": ort.__version__,
        "numpy": np.__version__,
        "features": {
            "dot_product": first >> DOT & 1,
            "float16": first >> HALF & 1,
            "int8_matrix": second >> I8MM & 1,
            "sve": first >> SVE & 1,
        },
        "products": found,
    }
    sys.stdout.write(json.dumps(document) + "\n")


if __name__ == "__main__":
    main()
