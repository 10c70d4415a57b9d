"""Gemm with a constant weight -> MatMul + Add, the form that has dynamic and block-wise kernels."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from ...graph.edit import Array, Editor, constant, float_attribute, int_attribute, is_constant, rank
from ...graph.rewrite import Refused, Verdict


class GemmToMatMul(NamedTuple):
    """Gemm(x, W, b) -> Add(MatMul(x, W), b), with a transposed weight turned ahead of time.

    The runtime makes a Gemm of it again where it stays float, so nothing is lost.
    """

    name: str = "gemm-to-matmul"
    roots: frozenset[str] = frozenset({"Gemm"})

    def apply(self, node: ir.Node, editor: Editor) -> Verdict:
        """See `Rule`."""
        source, weight = node.inputs[0], node.inputs[1]
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if not is_constant(weight) or weight is None or source is None or node.graph is None:
            return Refused("its weight is computed")
        if int_attribute(node, "transA", 0):
            return Refused("its first operand is transposed")
        if float_attribute(node, "alpha", 1.0) != 1.0 or float_attribute(node, "beta", 1.0) != 1.0:
            return Refused("it scales its operands")
        graph = node.graph if isinstance(node.graph, ir.Graph) else editor.model.graph
        if int_attribute(node, "transB", 0):
            values = constant(weight)
            if values is None or rank(weight) != 2:
                return Refused("its weight has no two axes")
            weight = _turned(weight.name or "weight", values.T, graph, editor)
        result = node.outputs[0]
        stem = result.name or "linear"
        product = editor.value("MatMul", [source, weight], before=node, stem=f"{stem}/product", like=result)
        if bias is not None:
            product = editor.value("Add", [product, bias], before=node, stem=f"{stem}/biased", like=result)
        editor.replace(result, product)
        return True


def _turned(name: str, values: Array, graph: ir.Graph, editor: Editor) -> ir.Value:
    """The transposed weight as an initializer; the one that another Gemm of a tied weight made is taken."""
    stem = f"{name}.transposed"
    known = graph.initializers.get(stem)
    contents = constant(known)
    if known is not None and contents is not None and np.array_equal(contents, values):
        return known
    return editor.tensor(ir.tensor(np.ascontiguousarray(values)), stem, graph)
