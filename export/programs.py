"""The short generated programs of a bundle that run it from Python, C++ and C#, without edgepress."""

from __future__ import annotations

import json
import math
from importlib import resources

from ..compress.typed.twin import needs_twin
from ..graph.model import TensorSpec
from .manifest import Manifest

_DYNAMIC_SIZE = 16
_IMAGE_SIZE = 64
# NumPy type name → (C++ element type, C# element type).
_ELEMENTS = {
    "float32": ("float", "float"),
    "float64": ("double", "double"),
    "float16": ("Ort::Float16_t", "Float16"),
    "bfloat16": ("Ort::BFloat16_t", "BFloat16"),
    "int8": ("int8_t", "sbyte"),
    "uint8": ("uint8_t", "byte"),
    "int16": ("int16_t", "short"),
    "uint16": ("uint16_t", "ushort"),
    "int32": ("int32_t", "int"),
    "uint32": ("uint32_t", "uint"),
    "int64": ("int64_t", "long"),
    "uint64": ("uint64_t", "ulong"),
    "bool": ("bool", "bool"),
}
_NOT_IN_NUMPY = frozenset({"bfloat16"})


def programs(manifest: Manifest) -> dict[str, bytes]:
    """The snippets by their name in the bundle; a language that lacks an input's type is left out.

    Each loads model.onnx with the manifest's session options and runs it: the Python one on the
    first golden sample where there is one, the others on zeros.
    """
    types = {spec.dtype for spec in manifest.model.inputs}
    found: dict[str, str] = {}
    if needs_twin(manifest.precision.form, manifest.precision.io_dtype):
        return {}  # onnxruntime has no kernels for it
    if types <= (set(_ELEMENTS) | {"string"}) - _NOT_IN_NUMPY:
        found["snippets/run_python.py"] = _python(manifest)
    if types <= set(_ELEMENTS):
        found["snippets/run_cpp.cc"] = _cpp(manifest)
        found["snippets/RunCSharp.cs"] = _csharp(manifest)
    return {name: text.encode() for name, text in found.items()}


def _python(manifest: Manifest) -> str:
    if manifest.golden is not None:
        feeds = f'dict(np.load(bundle / "{manifest.golden.samples[0].inputs}"))'
    else:
        types = {spec.name: "U1" if spec.dtype == "string" else spec.dtype for spec in manifest.model.inputs}
        zeros = ", ".join(
            f'{spec.name!r}: np.zeros({_example_shape(spec)}, "{types[spec.name]}")'
            for spec in manifest.model.inputs
        )
        feeds = f"{{{zeros}}}  # zeros, of one possible shape: put your data here"
    return _fill("run_python.py.in", FEEDS=feeds)


def _cpp(manifest: Manifest) -> str:
    settings = manifest.session_options
    options = []
    if settings.graph_optimization_level is not None:
        options.append(f"options.SetGraphOptimizationLevel({settings.graph_optimization_level});")
    for key, value in settings.config.items():
        options.append(f"options.AddConfigEntry({_cpp_text(key)}, {_cpp_text(value)});")
    inputs = []
    for index, spec in enumerate(manifest.model.inputs):
        shape = _example_shape(spec)
        element = _ELEMENTS[spec.dtype][0]
        sizes = ", ".join(map(str, shape))
        inputs += [
            f"const std::vector<int64_t> shape{index} = {{{sizes}}};",
            f"inputs.push_back(Ort::Value::CreateTensor<{element}>"
            f"(allocator, shape{index}.data(), shape{index}.size()));",
            f"std::memset(inputs.back().GetTensorMutableData<{element}>(), 0, "
            f"{math.prod(shape)} * sizeof({element}));",
        ]
    return _fill(
        "run_cpp.cc.in",
        OPTIONS=_block(options, indent=2),
        INPUTS=_block(inputs, indent=2),
        INPUT_NAMES=", ".join(_cpp_text(spec.name) for spec in manifest.model.inputs),
        OUTPUT_NAMES=", ".join(_cpp_text(spec.name) for spec in manifest.model.outputs),
    )


def _csharp(manifest: Manifest) -> str:
    settings = manifest.session_options
    options = []
    if settings.graph_optimization_level is not None:
        level = settings.graph_optimization_level
        options.append(f"options.GraphOptimizationLevel = GraphOptimizationLevel.{level};")
    for key, value in settings.config.items():
        options.append(f"options.AddSessionConfigEntry({json.dumps(key)}, {json.dumps(value)});")
    inputs = []
    for spec in manifest.model.inputs:
        shape = _example_shape(spec)
        sizes = "{ " + ", ".join(map(str, shape)) + " }" if shape else "{ }"
        inputs.append(
            f"[{json.dumps(spec.name)}] = OrtValue.CreateTensorValueFromMemory("
            f"new {_ELEMENTS[spec.dtype][1]}[{math.prod(shape)}], new long[] {sizes}),"
        )
    return _fill("RunCSharp.cs.in", OPTIONS=_block(options, indent=0), INPUTS=_block(inputs, indent=4))


def _example_shape(spec: TensorSpec) -> tuple[int, ...]:
    """A shape that the input takes: batch 1, other dynamic axes 16 (64 for images)."""
    shape = spec.shape or ()
    dynamic = _IMAGE_SIZE if len(shape) >= 4 else _DYNAMIC_SIZE
    return tuple(
        size if isinstance(size, int) else 1 if axis == 0 else dynamic for axis, size in enumerate(shape)
    )


def _fill(template: str, **values: str) -> str:
    """A template of the folder snippets/ with @NAME@ replaced; lines left empty by it are dropped."""
    text = resources.files(__package__).joinpath("snippets", template).read_text(encoding="utf-8")
    lines = []
    for line in text.splitlines():
        filled = line
        for name, value in values.items():
            filled = filled.replace(f"@{name}@", value)
        if filled or not line:
            lines.append(filled)
    return "\n".join(lines) + "\n"


def _block(lines: list[str], *, indent: int) -> str:
    return "\n".join(" " * indent + line for line in lines)


def _cpp_text(text: str) -> str:
    """A C++ string literal; what is not plain ASCII stands as octal bytes of its UTF-8 form."""
    plain = "".join(
        chr(byte) if 32 <= byte < 127 and chr(byte) not in '"\\?' else f"\\{byte:03o}"
        for byte in text.encode()
    )
    return f'"{plain}"'
