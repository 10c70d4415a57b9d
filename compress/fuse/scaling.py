"""A constant factor behind a linear layer folds into its weight and bias."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from ...graph.edit import Array, Editor, constant, is_constant, only_use, producer, rank, split_constant
from ...graph.rewrite import Refused, Verdict


class FoldScale(NamedTuple):
    """(x W + b) * s with constant s, one number or one per output -> x (W s) + (b s), in float64.

    Layer scale (ConvNeXt, BEiT) and the scaling of queries. Source of the former: Touvron et al. 2021,
    arXiv:2103.17239, section 2.
    """

    name: str = "linear-scale"
    roots: frozenset[str] = frozenset({"Mul"})

    def apply(self, node: ir.Node, editor: Editor) -> Verdict:
        """See `Rule`."""
        pair = split_constant(node)
        if pair is None or (rank(pair[1]) or 0) > 1:
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
        weight = constant(weight_value)
        assert weight is not None
        width = weight.shape[1]
        if scale.size not in (1, width) or (
            bias is not None and (bias.ndim > 1 or bias.size not in (1, width))
        ):
            return Refused("factor or bias is not one number, or one per output")
        scaled = _scaled(weight, scale)
        if not np.isfinite(scaled).all():
            return Refused("the scaled weight is not finite")
        graph = node.graph if isinstance(node.graph, ir.Graph) else editor.model.graph
        result, name = node.outputs[0], weight_value.name or "weight"
        stem = result.name or "scaled"
        wide = editor.tensor(ir.tensor(scaled), name, graph)
        value = editor.value(
            "MatMul", [product.inputs[0], wide], before=node, stem=f"{stem}/product", like=result
        )
        if bias is not None and terms is not None:
            shift = editor.tensor(ir.tensor(_scaled(bias, scale)), terms[1].name or f"{name}.bias", graph)
            value = editor.value("Add", [value, shift], before=node, stem=f"{stem}/biased", like=result)
        editor.replace(result, value)
        return True


def _scaled(values: Array, scale: Array) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):
        product = np.asarray(values, np.float64) * np.asarray(scale, np.float64).reshape(-1)
        return np.ascontiguousarray(product.astype(np.float32))
