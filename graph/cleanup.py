"""Exact clean-up: passes that change how a result is computed, never what it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir

from .cleanup_rules import EXACT_RULES
from .duplicates import MergeDuplicates
from .edit import Array, Editor, is_constant, name_nodes, permutation, remove_dead
from .errors import ModelError
from .fold import FoldConstants
from .model import Model
from .moved_weights import FoldMovedWeights
from .passes import Outcome, Pass
from .rewrite import Rewrite
from .shapes import InferShapes, is_consistent, kept_interface, quiet
from .weights import MappedTensor

__all__ = [
    "FoldConstants",
    "FoldMovedWeights",
    "FoldWeights",
    "InferShapes",
    "LiftOpset",
    "MergeDuplicates",
    "RemoveUnused",
    "exact_cleanup",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RemoveUnused(Pass):
    """Remove nodes, initializers and optional trailing outputs that no graph output depends on."""

    def run(self, model: Model) -> Outcome:
        """See `Pass.run`."""
        outcome = Outcome()
        before = _count_initializers(model)
        outcome.count("dead-node", remove_dead(model))
        outcome.count("unused-initializer", before - _count_initializers(model))
        outcome.count("unused-output", sum(_trim_outputs(node, model) for node in model.graph.all_nodes()))
        return outcome


def _count_initializers(model: Model) -> int:
    return sum(len(graph.initializers) for graph in model.all_graphs())


def _trim_outputs(node: ir.Node, model: Model) -> int:
    """Cut optional trailing outputs that nobody reads (a pool's indices, a dropout's mask)."""
    size = len(node.outputs)
    while size > 1 and not (node.outputs[size - 1].uses() or node.outputs[size - 1].is_graph_output()):
        size -= 1
    if size == len(node.outputs) or node.domain or not onnx.defs.has(node.op_type):
        return 0
    schema = onnx.defs.get_schema(node.op_type, model.opset)
    # The number of outputs of old batch norms says whether they train; Split's is how it splits.
    optional = onnx.defs.OpSchema.FormalParameterOption.Optional
    if node.op_type == "BatchNormalization" or any(
        place >= len(schema.outputs) or schema.outputs[place].option != optional
        for place in range(size, len(node.outputs))
    ):
        return 0
    cut = len(node.outputs) - size
    node.resize_outputs(size)
    return cut


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

        before, consistent = model.opset, is_consistent(model)
        try:
            with quiet("onnxscript"), kept_interface(model):
                version_converter.convert_version(model.ir, self.minimum, fallback=True)
        except (RuntimeError, ValueError) as error:
            raise self._too_old(model, str(error).strip().splitlines()[0]) from error
        if consistent and not is_consistent(model):  # the converter does not know every operator's changes
            raise self._too_old(model, f"the conversion from operator set {before} gives an invalid graph")
        if model.opset >= self.minimum:
            name_nodes(model.ir)
            outcome.count("opset")
        else:
            outcome.refuse("graph", "opset", f"operator set {before} could not be lifted to {self.minimum}")
        return outcome

    def ensures(self, model: Model) -> None:
        """See `Pass.ensures`."""
        if model.opset < self.minimum:
            raise self._too_old(model, f"the conversion to operator set {self.minimum} failed")

    def _too_old(self, model: Model, why: str) -> ModelError:
        return ModelError(
            "the model's operator set is too old",
            where=model.origin.name,
            why=why,
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
        if outcome.applied:
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
        perm = permutation(node)
        if perm is None or len(perm) != len(tensor.shape):
            return False
        shape = ir.Shape([tensor.shape.numpy()[axis] for axis in perm])
        folded = _lazy(tensor, lambda array: array.transpose(perm), tensor.dtype, shape)
    else:
        target = ir.DataType.FLOAT
        if not tensor.dtype.is_floating_point() or node.attributes["to"].as_int() != target:
            return False
        folded = _lazy(tensor, lambda array: array.astype(np.float32), target, ir.Shape(tensor.shape.numpy()))
    node.replace_input_with(0, None)
    if not source.uses() and not source.is_graph_output():
        source.const_value = folded
        folded.name = source.name
        source.shape = ir.Shape(folded.shape.numpy())
        source.type = ir.TensorType(folded.dtype)
        ir.convenience.replace_all_uses_with(result, source)
    else:
        ir.convenience.replace_all_uses_with(
            result, editor.tensor(folded, f"{source.name}/{node.op_type}", graph)
        )
    graph.remove(node, safe=True)
    return True


def _lazy(
    tensor: ir.TensorProtocol, change: Callable[[Array], Array], dtype: ir.DataType, shape: ir.Shape
) -> ir.TensorProtocol:
    """The changed tensor: computed now if it is in memory already, at each use if it is mapped."""

    def compute() -> ir.TensorProtocol:
        array = change(tensor.numpy())
        array = np.ascontiguousarray(array) if array.ndim else array
        if isinstance(tensor, MappedTensor):
            tensor.release()
        return ir.Tensor(array, dtype=dtype)

    lazy = isinstance(tensor, (MappedTensor, ir.LazyTensor))
    return ir.LazyTensor(compute, dtype=dtype, shape=shape) if lazy else compute()


def exact_cleanup() -> list[Pass]:
    """The passes that every model goes through first; none changes a result beyond float noise."""
    return [
        RemoveUnused(),
        InferShapes(),
        FoldWeights(),
        FoldConstants(),
        MergeDuplicates(),
        Rewrite(rules=EXACT_RULES),
        InferShapes(),
        FoldConstants(),
        FoldMovedWeights(),
        MergeDuplicates(),
        Rewrite(rules=EXACT_RULES),
        MergeDuplicates(),
    ]
