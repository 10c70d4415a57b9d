"""What stands behind a convolution and folds into its weights: batch normalization, a bias."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from ...graph.edit import (
    Editor,
    constant,
    float_attribute,
    int_attribute,
    is_constant,
    only_use,
    producer,
    rank,
    split_constant,
    static_dim,
)
from ...graph.rewrite import Refused, Verdict


class FoldBatchNorm(NamedTuple):
    """Conv + BatchNormalization -> Conv with scaled weights and a shifted bias.

    With s = gamma / sqrt(variance + epsilon): W' = W * s per output channel and
    b' = (b - mean) * s + beta, computed in float64.
    Source: Jacob et al. 2018, arXiv:1712.05877, equation 14.
    """

    name: str = "conv-batch-norm"
    roots: frozenset[str] = frozenset({"BatchNormalization"})

    def apply(self, node: ir.Node, editor: Editor) -> Verdict:
        """See `Rule`."""
        before = producer(node.inputs[0], "Conv", "ConvTranspose", "Gemm")
        if before is None or before.graph is not node.graph:
            return Refused("there is no convolution in front of it")
        if _is_training(node, editor.model.opset):
            return Refused("it runs in training mode")
        if only_use(before.outputs[0]) is not node:
            return Refused("the convolution's result has other readers")
        weight_value = before.inputs[1]
        bias_value = before.inputs[2] if len(before.inputs) > 2 else None
        if not is_constant(weight_value) or (bias_value is not None and not is_constant(bias_value)):
            return Refused("the convolution's weights are computed")
        if before.op_type == "ConvTranspose" and int_attribute(before, "group", 1) != 1:
            return Refused("grouped transposed convolutions keep their channels in two axes")
        if before.op_type == "Gemm" and float_attribute(before, "beta", 1.0) != 1.0:
            return Refused("the Gemm scales its bias")
        numbers = [constant(value) for value in node.inputs[1:5]]
        if any(array is None for array in numbers) or before.graph is None:
            return Refused("its statistics are computed")
        gamma, beta, mean, variance = (np.asarray(array, np.float64) for array in numbers)
        with np.errstate(invalid="ignore", divide="ignore"):
            factor = gamma / np.sqrt(variance + float_attribute(node, "epsilon", 1e-5))
        if not np.isfinite(factor).all():
            return Refused("its variance is not positive")
        weight = constant(weight_value)
        assert weight is not None
        assert weight_value is not None
        axis = _output_axis(before)
        if factor.shape != (weight.shape[axis],):
            return Refused("it has not one factor per output channel")
        shape = [1] * weight.ndim
        shape[axis] = -1
        scaled = (weight.astype(np.float64) * factor.reshape(shape)).astype(weight.dtype)
        bias = np.asarray(constant(bias_value), np.float64) if bias_value is not None else np.zeros_like(mean)
        shifted = ((bias - mean) * factor + beta).astype(weight.dtype)
        graph = before.graph if isinstance(before.graph, ir.Graph) else editor.model.graph
        new_weight = editor.tensor(ir.tensor(scaled), weight_value.name or "weight", graph)
        stem = (bias_value.name if bias_value is not None else None) or f"{weight_value.name}.bias"
        new_bias = editor.tensor(ir.tensor(shifted), stem, graph)
        fused = editor.node(
            before.op_type,
            [before.inputs[0], new_weight, new_bias],
            before=node,
            stem=node.outputs[0].name or "convolved",
            like=node.outputs[0],
        )
        for attribute in before.attributes.values():
            fused.attributes.add(attribute)
        editor.replace(node.outputs[0], fused.outputs[0])
        return True


class FoldBias(NamedTuple):
    """Conv without bias + Add of one number per channel -> Conv with bias."""

    name: str = "conv-bias"
    roots: frozenset[str] = frozenset({"Add"})

    def apply(self, node: ir.Node, editor: Editor) -> Verdict:
        """See `Rule`."""
        pair = split_constant(node)
        convolved = producer(pair[0], "Conv", "ConvTranspose") if pair is not None else None
        if pair is None or convolved is None or convolved.graph is not node.graph:
            return False
        if len(convolved.inputs) > 2 and convolved.inputs[2] is not None:
            return Refused("the convolution has a bias already")
        if only_use(pair[0]) is not node:
            return Refused("the convolution's result has other readers")
        values, size = constant(pair[1]), rank(convolved.inputs[1])
        channels = _channels(convolved)
        if values is None or size is None or channels is None or values.ndim > size:
            return Refused("the shapes are not known")
        full = (1,) * (size - values.ndim) + values.shape
        if full != (1, channels) + (1,) * (size - 2):
            return Refused("it does not add one number per channel")
        graph = convolved.graph if isinstance(convolved.graph, ir.Graph) else editor.model.graph
        bias = editor.tensor(ir.tensor(values.reshape(channels)), pair[1].name or "bias", graph)
        fused = editor.node(
            convolved.op_type,
            [convolved.inputs[0], convolved.inputs[1], bias],
            before=node,
            stem=node.outputs[0].name or "convolved",
            like=node.outputs[0],
        )
        for attribute in convolved.attributes.values():
            fused.attributes.add(attribute)
        editor.replace(node.outputs[0], fused.outputs[0])
        return True


def _is_training(node: ir.Node, opset: int) -> bool:
    """Whether a BatchNormalization normalises by the batch: said in three ways over the years."""
    if opset >= 14:
        return int_attribute(node, "training_mode", 0) != 0
    if opset < 7:
        return int_attribute(node, "is_test", 0) == 0
    return any(value.uses() or value.is_graph_output() for value in node.outputs[1:])


def _channels(node: ir.Node) -> int | None:
    """The number of output channels of a convolution."""
    if node.op_type == "Conv":
        return static_dim(node.inputs[1], 0)
    width = static_dim(node.inputs[1], 1)
    return None if width is None else width * int_attribute(node, "group", 1)


def _output_axis(node: ir.Node) -> int:
    """The axis of the weight that runs over output channels."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1
    return 0 if int_attribute(node, "transB", 0) else 1
