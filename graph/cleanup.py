"""Exact clean-up: passes that change how a result is computed, never what it is."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as stock
from onnxscript.optimizer import fold_constants

from .cleanup_rules import EXACT_RULES
from .edit import Array, Editor, is_constant, only_use, permutation, remove_dead
from .errors import ModelError
from .model import Model
from .passes import Outcome, Pass
from .rewrite import Rewrite
from .weights import MappedTensor

_FOLD_INPUT_BYTES = 1 << 13
_FOLD_OUTPUT_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class RemoveUnused(Pass):
    """Remove nodes and initializers that no output depends on."""

    def run(self, model: Model) -> Outcome:
        """See `Pass.run`."""
        outcome = Outcome()
        before = len(model.graph.initializers)
        outcome.count("dead-node", remove_dead(model))
        outcome.count("unused-initializer", before - len(model.graph.initializers))
        return outcome


@dataclasses.dataclass(frozen=True, kw_only=True)
class InferShapes(Pass):
    """Let onnx's shape inference fill in missing types and shapes (weights are not copied)."""

    def run(self, model: Model) -> Outcome:
        """See `Pass.run`."""
        outcome = Outcome()
        before = _known_shapes(model)
        stock.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model.ir)
        outcome.count("shape", max(_known_shapes(model) - before, 0))
        return outcome


@dataclasses.dataclass(frozen=True, kw_only=True)
class LiftOpset(Pass):
    """Convert the graph to at least operator set `minimum`, for passes that need its operators."""

    minimum: int

    def run(self, model: Model) -> Outcome:
        """See `Pass.run`."""
        outcome = Outcome()
        if model.opset >= self.minimum:
            return outcome
        from onnxscript import version_converter

        before = model.opset
        converter_log = logging.getLogger("onnxscript.version_converter")
        level = converter_log.level
        converter_log.setLevel(logging.ERROR)  # it warns that it falls back to onnx's own converter
        try:
            version_converter.convert_version(model.ir, self.minimum, fallback=True)
        finally:
            converter_log.setLevel(level)
        if model.opset < self.minimum:
            outcome.refuse("graph", "opset", f"operator set {before} could not be lifted to {self.minimum}")
        else:
            outcome.count("opset")
        return outcome

    def ensures(self, model: Model) -> None:
        """See `Pass.ensures`."""
        if model.opset < self.minimum:
            raise ModelError(
                f"the model's operator set {model.opset} is too old",
                where=model.origin.name,
                why=f"operator set {self.minimum} is needed and the conversion failed",
                remedy=f"export the model with opset {self.minimum} or newer",
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FoldWeights(Pass):
    """Fold Transpose, Cast and Identity of a weight into the weight, which keeps its name.

    The tensor is computed when it is read, so that large models stay on disk.
    """

    def run(self, model: Model) -> Outcome:
        """See `Pass.run`."""
        outcome = Outcome()
        editor = Editor(model)
        for graph in model.all_graphs():
            for node in tuple(graph):
                if node.op_type in _WEIGHT_OPS and node.domain == "" and _fold_weight(node, graph, editor):
                    outcome.count(node.op_type)
        remove_dead(model)
        return outcome


_WEIGHT_OPS = ("Transpose", "Cast", "Identity")


def _fold_weight(node: ir.Node, graph: ir.Graph, editor: Editor) -> bool:
    source, result = node.inputs[0], node.outputs[0]
    if source is None or not is_constant(source) or source.const_value is None or source.graph is not graph:
        return False
    if source.name not in graph.initializers or result.is_graph_output():
        return False
    tensor = source.const_value
    if tensor.dtype == ir.DataType.STRING:
        return False
    folded: ir.TensorProtocol
    if node.op_type == "Identity":
        folded = tensor
    elif node.op_type == "Transpose":
        perm = permutation(node) or list(range(len(tensor.shape)))[::-1]
        shape = ir.Shape([tensor.shape.numpy()[axis] for axis in perm])
        folded = _lazy(tensor, lambda array: array.transpose(perm), tensor.dtype, shape)
    else:
        target = ir.DataType(node.attributes["to"].as_int())
        if not (tensor.dtype.is_floating_point() and target == ir.DataType.FLOAT):
            return False
        folded = _lazy(tensor, lambda array: array.astype(np.float32), target, ir.Shape(tensor.shape.numpy()))
    if only_use(source) is node:
        source.const_value = folded
        folded.name = source.name
        source.shape = ir.Shape(folded.shape.numpy())
        source.type = ir.TensorType(folded.dtype)
        ir.convenience.replace_all_uses_with(result, source)
    else:
        ir.convenience.replace_all_uses_with(
            result, editor.tensor(folded, f"{source.name}/{node.op_type}", graph)
        )
    return True


def _lazy(
    tensor: ir.TensorProtocol, change: Callable[[Array], Array], dtype: ir.DataType, shape: ir.Shape
) -> ir.TensorProtocol:
    """The changed tensor: computed now if it is in memory already, at each use if it is mapped."""
    if not isinstance(tensor, MappedTensor):
        return ir.tensor(np.ascontiguousarray(change(tensor.numpy())), dtype=dtype)

    def compute() -> ir.TensorProtocol:
        array = np.ascontiguousarray(change(tensor.numpy()))
        tensor.release()
        return ir.tensor(array, dtype=dtype)

    return ir.LazyTensor(compute, dtype=dtype, shape=shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FoldConstants(Pass):
    """Compute small constant sub-graphs now (onnxscript's folder, which also tracks shapes)."""

    def run(self, model: Model) -> Outcome:
        """See `Pass.run`."""
        outcome = Outcome()
        before = _count_nodes(model)
        hash_before = model.structure_hash()
        fold_constants(
            model.ir,
            onnx_shape_inference=True,
            input_size_limit=_FOLD_INPUT_BYTES,
            output_size_limit=_FOLD_OUTPUT_BYTES,
        )
        stock.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model.ir)
        remove_dead(model)
        if model.structure_hash() != hash_before:
            outcome.count("folded-node", max(before - _count_nodes(model), 1))
        return outcome


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeDuplicates(Pass):
    """Remove Identity nodes, merge equal constants and equal nodes."""

    def run(self, model: Model) -> Outcome:
        """See `Pass.run`."""
        outcome = Outcome()
        before, hash_before = _count_nodes(model), model.structure_hash()
        stock.IdentityEliminationPass()(model.ir)
        stock.DeduplicateInitializersPass(size_limit=1024)(model.ir)
        stock.CommonSubexpressionEliminationPass()(model.ir)
        remove_dead(model)
        if model.structure_hash() != hash_before:
            outcome.count("merged-node", max(before - _count_nodes(model), 1))
        return outcome


def _count_nodes(model: Model) -> int:
    return sum(1 for _ in model.graph.all_nodes())


def _known_shapes(model: Model) -> int:
    return sum(value.shape is not None for node in model.graph.all_nodes() for value in node.outputs)


def exact_cleanup() -> list[Pass]:
    """The passes that every model goes through first; none changes a result beyond float noise."""
    return [
        RemoveUnused(),
        InferShapes(),
        FoldWeights(),
        FoldConstants(),
        MergeDuplicates(),
        Rewrite(rules=EXACT_RULES),
        FoldConstants(),
        MergeDuplicates(),
        Rewrite(rules=EXACT_RULES),
        MergeDuplicates(),
    ]
