"""Running a float16 graph with the arithmetic of a core that has it, on any machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ...graph.edit import bodies, int_attribute
from ...graph.errors import NotSupported
from ...graph.model import Model, Origin
from ...runtimes.base import Array, SessionOptions
from ...runtimes.ort_runtime import OrtSession
from .half import conv_float16, matmul_float16

_PRODUCTS = frozenset({"MatMul", "Gemm", "Conv"})
_PLAIN = SessionOptions(graph_optimization_level="disable_all")


def run_float16(model: Model, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """The outputs of a typed graph with its float16 MatMul, Gemm and Conv accumulated in float16.

    All other nodes run one by one in onnxruntime, which computes them in float32 here and rounds the
    result: what a float16 kernel of one operation gives. A product and the Add behind it are not
    fused, so that a sum starts from zero where the core starts from the bias.

    Args:
        model: a graph with float16 operators (see `compress.typed.convert`).
        feeds: one set of inputs by name.

    Raises:
        NotSupported: if the graph holds an If, Loop or Scan.
    """
    values: dict[str, Array] = {str(name): np.asarray(array) for name, array in feeds.items()}
    for name, weight in model.graph.initializers.items():
        if weight.const_value is not None:
            values[name] = weight.const_value.numpy()
    for node in model.graph:
        if bodies(node):
            raise NotSupported(
                "float16 arithmetic is not emulated inside If, Loop and Scan",
                where=f"node {node.name!r} ({node.op_type})",
                remedy="check the artifact on the board itself",
            )
        operands = [None if value is None else values[str(value.name)] for value in node.inputs]
        found = _emulated(node, operands)
        results = [found] if found is not None else _run_alone(node, operands, model)
        named = [value for value in node.outputs if value.name]
        values |= {str(value.name): array for value, array in zip(named, results, strict=True)}
    return {str(value.name): values[str(value.name)] for value in model.graph.outputs}


def _emulated(node: ir.Node, operands: list[Array | None]) -> Array | None:
    """The result of a float16 product or 2-d convolution, or None for any other node."""
    first = operands[0] if operands else None
    if first is None or first.dtype != np.float16 or len(operands) < 2 or node.op_type not in _PRODUCTS:
        return None
    left, right = np.asarray(first, np.float16), np.asarray(operands[1], np.float16)
    bias = operands[2] if len(operands) > 2 else None
    half_bias = None if bias is None else np.asarray(bias, np.float16)
    if node.op_type == "MatMul" and left.ndim > 1 and right.ndim > 1:
        return matmul_float16(left, right)
    if node.op_type == "Gemm" and not {"alpha", "beta"} & set(node.attributes):
        left = left.T if int_attribute(node, "transA", 0) else left
        right = right.T if int_attribute(node, "transB", 0) else right
        return matmul_float16(left, right, half_bias)
    if node.op_type == "Conv" and left.ndim == 4 and "auto_pad" not in node.attributes:
        return conv_float16(
            left,
            right,
            half_bias,
            strides=_ints(node, "strides", (1, 1)),
            pads=_ints(node, "pads", (0, 0, 0, 0)),
            dilations=_ints(node, "dilations", (1, 1)),
            group=int_attribute(node, "group", 1),
        )
    return None


def _ints(node: ir.Node, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(node.attributes[name].as_ints()) if name in node.attributes else default


def _run_alone(node: ir.Node, operands: list[Array | None], model: Model) -> list[Array]:
    """One node as a model of its own."""
    fed: dict[str, Array] = {}
    inputs: dict[str, ir.Value] = {}
    for value, array in zip(node.inputs, operands, strict=True):
        if value is not None and array is not None and value.name not in inputs:
            fed[str(value.name)] = array
            inputs[str(value.name)] = ir.Value(
                name=value.name, type=ir.TensorType(_type(array)), shape=ir.Shape(array.shape)
            )
    alone = ir.Node(
        node.domain,
        node.op_type,
        [None if value is None else inputs[str(value.name)] for value in node.inputs],
        list(node.attributes.values()),
        num_outputs=len(node.outputs),
        name=node.name,
    )
    wanted = []
    for made, value in zip(alone.outputs, node.outputs, strict=True):
        made.name, made.type = value.name, value.type
        wanted += [made] if value.name else []
    graph = ir.Graph(
        list(inputs.values()),
        wanted,
        nodes=[alone],
        opset_imports=dict(model.graph.opset_imports),
        name="one node",
    )
    single = Model(
        ir.Model(graph, ir_version=model.ir.ir_version), origin=Origin(kind="memory", name=node.name or "")
    )
    results = OrtSession.from_model(single, _PLAIN).run(fed)
    return [results[str(value.name)] for value in wanted]


def _type(array: Array) -> ir.DataType:
    return ir.DataType.from_numpy(array.dtype)


class Float16Runner:
    """A typed graph behind the `Runner` protocol, with the arithmetic of `run_float16`."""

    load_ms = 0.0

    def __init__(self, model: Model) -> None:
        self.model = model
        self.inputs = model.inputs
        self.outputs = model.outputs

    def run(self, feeds: Mapping[str, Array], output_names: Sequence[str] | None = None) -> dict[str, Array]:
        """See `Runner.run`.

        Raises:
            NotSupported: as `run_float16`.
        """
        found = run_float16(self.model, feeds)
        return found if output_names is None else {name: found[name] for name in output_names}
