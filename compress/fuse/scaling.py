"""A constant factor behind a linear layer folds into its weight and bias."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from ...graph.edit import Editor, constant, is_constant, only_use, producer, rank, split_constant
from ...graph.rewrite import Refused, Verdict
from .linear_path import scaled_tensor


class FoldScale(NamedTuple):
    """(x W + b) * s with constant s, one number or one per output -> x (W s) + (b s), in float64.

    Layer scale (ConvNeXt, BEiT) and the scaling of queries. Source of the former: Touvron et al. 2021,
    arXiv:2103.17239, section 2.
    """

    name: str = "linear-scale"
    roots: frozenset[str] = frozenset({"Mul", "Div"})

    def apply(self, node: ir.Node, editor: Editor) -> Verdict:
        """See `Rule`."""
        pair = split_constant(node)
        if (
            pair is None
            or (rank(pair[1]) or 0) > 1
            or (node.op_type == "Div" and pair[1] is not node.inputs[1])
        ):
            return False
        biased = producer(pair[0], "Add")
        terms = split_constant(biased) if biased is not None else None
        product = producer(pair[0] if terms is None else terms[0], "MatMul")
        if product is None or not is_constant(product.inputs[1]) or rank(product.inputs[1]) != 2:
            return False
        scale, bias = constant(pair[1]), None if terms is None else constant(terms[1])
        weight_value = product.inputs[1]
        if any(only_use(value) is None for value in (pair[0], product.outputs[0])):
            return Refused("the unscaled result is also used elsewhere")
        if weight_value is None or len(weight_value.uses()) != 1:
            return Refused("its weight is also used elsewhere (tied weights)")
        if weight_value.dtype != ir.DataType.FLOAT or node.graph is None or scale is None:
            return Refused("its weight is not float32")
        assert weight_value.const_value is not None
        width = weight_value.const_value.shape.numpy()[1]
        scale = np.asarray(scale, np.float64).reshape(-1)
        with np.errstate(divide="ignore"):
            scale = 1.0 / scale if node.op_type == "Div" else scale
        if scale.size not in (1, width) or (
            bias is not None and (bias.ndim > 1 or bias.size not in (1, width))
        ):
            return Refused("factor or bias is not one number, or one per output")
        scaled = scaled_tensor(weight_value.const_value, scale)
        # A mapped weight is read when it is written, unless the factor may make it overflow.
        if not (np.abs(scale) <= 1.0).all() and not np.isfinite(scaled.numpy()).all():
            return Refused("the scaled weight is not finite")
        graph = node.graph if isinstance(node.graph, ir.Graph) else editor.model.graph
        result, name = node.outputs[0], weight_value.name or "weight"
        stem = result.name or "scaled"
        wide = editor.tensor(scaled, name, graph)
        value = editor.value(
            "MatMul", [product.inputs[0], wide], before=node, stem=f"{stem}/product", like=result
        )
        if bias is not None and terms is not None:
            moved = np.ascontiguousarray((bias.astype(np.float64) * scale).astype(np.float32))
            shift = editor.tensor(ir.tensor(moved), terms[1].name or f"{name}.bias", graph)
            value = editor.value("Add", [value, shift], before=node, stem=f"{stem}/biased", like=result)
        editor.replace(result, value)
        return True


class FoldShift(NamedTuple):
    """(y + a) + b with constant a and b of the last axis -> y + (a + b), in float64.

    MobileBERT's norm without statistics behind a linear layer, and biases that were added in steps.
    """

    name: str = "joint-shift"
    roots: frozenset[str] = frozenset({"Add"})

    def apply(self, node: ir.Node, editor: Editor) -> Verdict:
        """See `Rule`."""
        outer = split_constant(node)
        before = producer(outer[0], "Add") if outer is not None else None
        inner = split_constant(before) if before is not None else None
        if outer is None or inner is None or before is None or before.graph is not node.graph:
            return False
        numbers = [constant(pair[1]) for pair in (inner, outer)]
        first, second = numbers
        if first is None or second is None or first.ndim != 1 or second.ndim != 1:
            return False
        if node.outputs[0].dtype != ir.DataType.FLOAT or first.shape != second.shape:
            return False
        if only_use(before.outputs[0]) is not node:
            return Refused("the first sum is also used elsewhere")
        total = (first.astype(np.float64) + second.astype(np.float64)).astype(np.float32)
        graph = node.graph if isinstance(node.graph, ir.Graph) else editor.model.graph
        result, stem = node.outputs[0], node.outputs[0].name or "shifted"
        shift = editor.tensor(ir.tensor(total), inner[1].name or "shift", graph)
        value = editor.value("Add", [inner[0], shift], before=node, stem=stem, like=result)
        editor.replace(result, value)
        return True
