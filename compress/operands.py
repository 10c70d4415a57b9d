"""What a node's operands allow: which integer forms it can take at all, whatever the target."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from ..graph.cleanup import LiftOpset
from ..graph.edit import float_attribute, int_attribute, integers, is_constant, only_use, rank, static_dim
from ..graph.errors import ModelError
from ..graph.model import Model
from ..graph.passes import run_passes
from ..targets.profile import Form

COMPUTE_OPS = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose"})
CONVOLUTIONS = frozenset({"Conv", "ConvTranspose"})
PASS_THROUGH_OPS = frozenset(
    {"MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity"}
)
ABSORBED_OPS = frozenset({"Relu", "Clip"})
MOVING_OPS = PASS_THROUGH_OPS | ABSORBED_OPS | {"Slice", "Pad", "Split", "Expand", "Gather"}
CARRIED_OPS = frozenset({"Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "LeakyRelu", "Sigmoid"})
TABLE_OPS = frozenset({"Gather", "Slice"})
"""Operators that take rows out of an embedding table (Slice: of positions from 0 on)."""
FLOAT_OUTPUT_OPS = frozenset({"MatMul"})
"""Operators whose integer kernels scale their result back to float at no cost."""

FORM_OPSETS: Mapping[Form, int] = {"float": 0, "weight-only": 0, "dynamic": 11, "static": 13}
"""The operator set that a form needs: DynamicQuantizeLinear came with 11, scales per axis with 13."""

_SMALL_WEIGHT_ELEMENTS = 1024
_RANDOM_OPS = frozenset({"Bernoulli", "Dropout", "Multinomial", "RandomNormalLike", "RandomUniformLike"})
_BODIES = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
_SCORE_OPS = ("Add", "Softmax", "LogSoftmax", "Sigmoid", "Identity")


def weight_name(node: ir.Node) -> str | None:
    """The name of the constant weight or table that a node reads, or None."""
    place = 0 if node.op_type in TABLE_OPS else 1
    if node.op_type not in COMPUTE_OPS | TABLE_OPS or len(node.inputs) <= place:
        return None
    value = node.inputs[place]
    return value.name if is_constant(value) and value is not None else None


def reads_rows(node: ir.Node, table: ir.Value) -> bool:
    """Whether a node only takes rows (axis 0) out of `table`."""
    if (
        node.op_type not in TABLE_OPS
        or node.domain
        or node.inputs[0] is not table
        or table in node.inputs[1:]
    ):
        return False
    if node.op_type == "Gather":
        return int_attribute(node, "axis", 0) == 0
    if len(node.inputs) < 3:
        return False
    axes = node.inputs[3] if len(node.inputs) > 3 else None
    return integers(axes) == [0] if axes is not None else static_dim(node.inputs[1], 0) == 1


def channel_axis(node: ir.Node) -> int:
    """The axis of the weight that runs over output channels."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "Gemm":
        return 0 if int_attribute(node, "transB", 0) else 1
    return 1


def output_tail(node: ir.Node) -> ir.Value:
    """The output of a node, or of the Relu or Clip behind it if nothing else reads it."""
    value = node.outputs[0]
    reader = only_use(value)
    if reader is None or reader.op_type not in ABSORBED_OPS or reader.domain or reader.inputs[0] is not value:
        return value
    return reader.outputs[0]


def has_float_output(node: ir.Node) -> bool:
    """Whether a static node's result stays float, because its integer kernel scales back at no cost.

    Not so in front of an Add where all sizes are fixed or the product is 2-D: there onnxruntime 1.31.1
    makes a float Gemm of MatMul + Add (0.55x of the float model), unless Q/DQ stand between them.
    """
    if node.op_type not in FLOAT_OUTPUT_OPS:
        return False
    reader, shape = only_use(node.outputs[0]), None if node.inputs[0] is None else node.inputs[0].shape
    if reader is None or reader.op_type != "Add" or shape is None:
        return True
    return len(shape) != 2 and not all(isinstance(size, int) for size in shape)


def computed_once(model: Model) -> set[ir.Value]:
    """The values that follow from constants alone: a runtime computes them when it loads the model."""
    found: set[ir.Value] = set()
    for node in model.graph.all_nodes():
        if node.op_type in _RANDOM_OPS or any(a.type in _BODIES for a in node.attributes.values()):
            continue
        operands = [value for value in node.inputs if value is not None]
        if operands and all(value in found or is_constant(value) for value in operands):
            found.update(node.outputs)
    return found


def only_leaves_graph(value: ir.Value) -> bool:
    """Whether a value is a graph output, or becomes one through a bias, a Softmax or the like."""
    for _ in range(4):
        if value.is_graph_output():
            return True
        reader = only_use(value)
        if reader is None or reader.op_type not in _SCORE_OPS:
            return False
        value = reader.outputs[0]
    return False


def unfit_weight(node: ir.Node) -> tuple[str, str | None] | None:
    """(reason, remedy) why a node's weight cannot be quantized in any form, or None."""
    if len(node.inputs) < 2:
        return "it has no weight", None
    data, weight = node.inputs[0], node.inputs[1]
    if is_constant(data):
        reason = "its constant is the left operand: integer kernels want the weight on the right"
        return reason, "export the transposed product: A x = (x\u2019 A\u2019)\u2019"
    if weight is None or not is_constant(weight) or weight.const_value is None:
        if node.op_type != "MatMul":
            return "its weight is computed", None
        return (
            "both operands are computed (attention): quantizing both while running costs more than "
            "the integer product saves",
            None,
        )
    if weight.const_value.dtype != ir.DataType.FLOAT:
        return f"its weight is {weight.const_value.dtype.name}, not FLOAT", "export the model in float32"
    elements = weight.const_value.size
    if elements < _SMALL_WEIGHT_ELEMENTS and node.op_type in ("MatMul", "Gemm"):
        return f"its weight has {elements} elements: too small to pay for quantizing", None
    return None


def unfit(node: ir.Node, form: Form) -> str | None:
    """Why a node with a fit weight cannot take a form whatever the target, or None."""
    if node.op_type == "MatMul":
        axes = rank(node.inputs[1])
        if axes != 2:
            return f"its weight has {axes} axes; integer kernels want [K, N]"
        if form in ("dynamic", "static") and (rank(node.inputs[0]) or 0) < 2:
            return "its input has fewer than two axes or an unknown rank"
    if node.op_type == "Gemm":
        for name in ("alpha", "beta"):
            if float_attribute(node, name, 1.0) != 1.0:
                return f"{name} is not 1"
        if int_attribute(node, "transA", 0):
            return "its first operand is transposed"
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None:
        return None
    if not is_constant(bias) or bias.const_value is None:
        return "its bias is computed"
    if node.op_type == "Gemm" and not _is_per_channel(node, bias.const_value):
        return "its bias is not one number per output"
    return None


def unfit_carried(node: ir.Node) -> str | None:
    """Why the runtime's integer kernel of a connecting operator cannot do this one, or None.

    Both tried with onnxruntime 1.31.1: the first gave means up to 13 steps off and, for a window larger
    than the image, nearly nothing; the second a graph that does not load.
    """
    if node.op_type != "AveragePool":
        return None
    if int_attribute(node, "ceil_mode", 0) and int_attribute(node, "count_include_pad", 0):
        return "onnxruntime's integer kernel averages wrongly under ceil_mode with count_include_pad"
    if "dilations" in node.attributes and any(step != 1 for step in node.attributes["dilations"].as_ints()):
        return "onnxruntime's integer kernel knows no dilations"
    return None


def _is_per_channel(node: ir.Node, bias: ir.TensorProtocol) -> bool:
    """Whether a Gemm's bias is one number, or one per output channel."""
    weight = node.inputs[1]
    width = None if weight is None or weight.const_value is None else weight.const_value.shape
    if width is None:
        return False
    shape = tuple(int(size) for size in bias.shape.numpy())
    return bias.size == 1 or (shape[-1] == bias.size == width[channel_axis(node)])


def is_liftable(model: Model, minimum: int) -> bool:
    """Whether the model has at least operator set `minimum` or can be converted to it."""
    if model.opset >= minimum:
        return True
    try:
        run_passes(model.fork(), [LiftOpset(minimum=minimum)])
    except ModelError:
        return False
    return True
