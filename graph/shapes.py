"""Types and shapes of all values, by onnx's own inference, without copying a weight."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator

import onnx
import onnx_ir as ir

from .model import Model
from .passes import Outcome, Pass
from .symbolic import reshape_terms

# Larger weights stand in the skeleton as inputs; smaller ones may be shapes, axes, sizes.
_SKELETON_TENSOR_BYTES = 1024
_ROUNDS = 4
_INFERENCE_ERRORS = (
    onnx.shape_inference.InferenceError,
    onnx.checker.ValidationError,
    RuntimeError,
    ValueError,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InferShapes(Pass):
    """Let onnx's shape inference fill in missing types and shapes of the values in between."""

    def run(self, model: Model) -> Outcome:
        """See `Pass.run`."""
        outcome = Outcome()
        for _ in range(_ROUNDS):
            try:
                inferred = onnx.shape_inference.infer_shapes(skeleton(model), data_prop=True)
            except _INFERENCE_ERRORS as error:
                outcome.refuse("graph", "shapes", str(error).strip().splitlines()[0])
                return outcome
            with kept_interface(model):
                pairs = zip(model.all_graphs(), _graphs_of(ir.from_proto(inferred).graph), strict=True)
                outcome.count("shape", sum(_adopt(own, found) for own, found in tuple(pairs)))
            if not _resolve_reshapes(model):
                break
            _forget_made_up_names(model)
        return outcome


def _resolve_reshapes(model: Model) -> bool:
    """Give Reshape outputs the axes that their shape arithmetic spells; whether any became known.

    onnx's inference does not follow Concat(Shape(x), ...) into a Reshape when axes only have names.
    """
    found = False
    for node in model.graph:
        output = node.outputs[0]
        if node.op_type != "Reshape" or node.domain or output.shape is None or output.is_graph_output():
            continue
        terms = reshape_terms(node)
        if terms is None or len(terms) != len(output.shape):
            continue
        dims = list(output.shape)
        for place, term in enumerate(terms):
            known = (isinstance(term, int) and term >= 0) or (isinstance(term, str) and not _made_up(term))
            if known and _is_unknown(dims[place]):
                dims[place] = term if isinstance(term, int) else ir.SymbolicDim(str(term))
                found = True
        output.shape = ir.Shape(dims)
    return found


def _forget_made_up_names(model: Model) -> None:
    """Let inference find again what it could only invent names for."""
    for node in model.graph:
        for value in node.outputs:
            if value.shape is not None and not value.is_graph_output():
                value.shape = ir.Shape([None if _is_unknown(dim) else dim for dim in value.shape])


def _is_unknown(dim: int | ir.SymbolicDim) -> bool:
    return not isinstance(dim, int) and (dim.value is None or _made_up(dim.value))


def _made_up(name: str) -> bool:
    return name.startswith("unk__")


@contextlib.contextmanager
def kept_interface(model: Model) -> Iterator[None]:
    """Restore the types and shapes of the graph's inputs and outputs after a stock pass.

    onnx's and onnxscript's passes write what they infer over what the model declares.
    """
    before = [(value.type, value.shape) for value in (*model.graph.inputs, *model.graph.outputs)]
    yield
    after = (*model.graph.inputs, *model.graph.outputs)
    for value, (kind, shape) in zip(after, before, strict=True):
        value.type, value.shape = kind, shape


@contextlib.contextmanager
def quiet(logger_name: str) -> Iterator[None]:
    """Keep a library's warnings off the user's screen; what matters is reported by the pass."""
    logger = logging.getLogger(logger_name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def is_consistent(model: Model) -> bool:
    """Whether every operator accepts the types and shapes of its operands."""
    try:
        onnx.shape_inference.infer_shapes(skeleton(model), check_type=True, strict_mode=True)
    except _INFERENCE_ERRORS:
        return False
    return True


def skeleton(model: Model) -> onnx.ModelProto:
    """The model as a protobuf in which large weights are inputs of the same type and shape."""
    with quiet("onnx_ir"):
        return _skeleton(model)


def _skeleton(model: Model) -> onnx.ModelProto:
    proto = onnx.ModelProto(ir_version=model.ir.ir_version)
    for domain, version in model.graph.opset_imports.items():
        proto.opset_import.add(domain=domain, version=version)
    graph = proto.graph
    graph.name = "skeleton"
    for value in model.graph.inputs:
        ir.serde.serialize_value_into(graph.input.add(), value)
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.nbytes <= _SKELETON_TENSOR_BYTES:
            if tensor is not None:
                tensor.name = name
                ir.serde.serialize_tensor_into(graph.initializer.add(), tensor)
        else:
            dims = tensor.shape.numpy()
            graph.input.append(onnx.helper.make_tensor_value_info(name, int(tensor.dtype), dims))
    for node in model.graph:
        ir.serde.serialize_node_into(graph.node.add(), node)
        for value in node.outputs:
            if value.name and value.type is not None and not value.is_graph_output():
                ir.serde.serialize_value_into(graph.value_info.add(), value)
    for value in model.graph.outputs:
        ir.serde.serialize_value_into(graph.output.add(), value)
    return proto


def _graphs_of(graph: ir.Graph) -> Iterator[ir.Graph]:
    yield graph
    yield from graph.subgraphs()


def _adopt(own: ir.Graph, found: ir.Graph) -> int:
    """Copy types and shapes from an equal graph; returns how many shapes are new.

    What the graph declares for its outputs stays.
    """
    new = 0
    for node, twin in zip(own, found, strict=True):
        for value, known in zip(node.outputs, twin.outputs, strict=True):
            if value.is_graph_output():
                continue
            if known.shape is not None and value.shape != known.shape:
                value.shape = known.shape
                new += 1
            if value.type is None:
                value.type = known.type
    return new
