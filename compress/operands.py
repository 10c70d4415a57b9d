"""What a node's operands allow: which integer forms it can take at all, whatever the target."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from ..graph.cleanup import LiftOpset
from ..graph.edit import (
    constant,
    float_attribute,
    int_attribute,
    integers,
    is_constant,
    only_use,
    operand,
    rank,
    scalar,
    static_dim,
)
from ..graph.errors import ModelError
from ..graph.model import Model
from ..graph.passes import run_passes
from ..graph.scheme import Scheme
from ..targets.profile import Form

COMPUTE_OPS = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose"})
CONVOLUTIONS = frozenset({"Conv", "ConvTranspose"})
RECURRENT_OPS = frozenset({"LSTM", "GRU", "RNN"})
ABSORBED_OPS = frozenset({"Relu", "Clip"})
CARRIED_OPS = frozenset(
    {
        "Add", "AveragePool", "Concat", "Div", "GlobalAveragePool", "HardSigmoid", "HardSwish", "LeakyRelu",
        "Mul", "Relu", "Sigmoid", "Sub", "Where",
    }
)  # fmt: skip
"""Operators without a weight that compute in integers between integer operators."""
ISLAND_OPS = frozenset(
    {
        "Abs", "BatchNormalization", "Celu", "Elu", "Erf", "Exp", "Gelu", "GlobalMaxPool",
        "InstanceNormalization", "LRN", "LayerNormalization", "Max", "Min", "Mish", "Neg", "PRelu", "Pad",
        "Pow", "ReduceMean", "Resize", "Selu", "Softmax", "Softplus", "Softsign", "Sqrt", "Tanh",
    }
)  # fmt: skip
"""Operators that compute in float between integer operators: each gets a decision that says why."""
INTEGER_BY_ITSELF_OPS = frozenset(
    {
        "Add", "AveragePool", "Concat", "Conv", "Gemm", "GlobalAveragePool", "LeakyRelu", "MatMul", "Mul",
        "Sigmoid", "Softmax", "Where",
    }
)  # fmt: skip
"""Operators of which onnxruntime makes integer kernels wherever they stand between Q/DQ pairs."""
_MOVES = frozenset(
    {
        "DepthToSpace", "Expand", "Flatten", "Gather", "Identity", "MaxPool", "Pad", "Reshape", "Resize",
        "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze",
    }
)  # fmt: skip
TABLE_OPS = frozenset({"Gather", "Slice"})
"""Operators that take rows out of an embedding table (Slice: of positions from 0 on)."""
FLOAT_OUTPUT_OPS = frozenset({"MatMul"})
"""Operators whose integer kernels scale their result back to float at no cost."""

FORM_OPSETS: Mapping[Form, int] = {
    "float": 0,
    "weight-only": 0,
    "dynamic": 11,
    "static": 13,
    "fp16": 7,
    "bf16": 13,
    "fp16-storage": 6,
    "bf16-storage": 13,
}
"""The operator set that a form needs: DynamicQuantizeLinear came with 11, scales per axis with 13, as
did Casts of bfloat16; Casts are told their type by number since 6."""

_QUANTIZED_OPS = frozenset(
    {
        "ConvInteger", "DequantizeLinear", "DynamicQuantizeLSTM", "DynamicQuantizeLinear",
        "DynamicQuantizeMatMul", "GatherBlockQuantized", "MatMulBnb4", "MatMulInteger",
        "MatMulInteger16", "MatMulIntegerToFloat", "MatMulNBits", "QAttention",
        "QEmbedLayerNormalization", "QGemm", "QMoE", "QuantizeLinear",
    }
)  # fmt: skip
_QUANTIZED_PREFIXES = ("QLinear", "QOrdered")
_SMALL_WEIGHT_ELEMENTS = 1024
_SMALL_RECURRENT_ELEMENTS = 4 * 128 * (64 + 128)
"""Weights of an LSTM below which quantizing its state at every step eats what is saved (measured:
0.97x of float at 96 inputs and 96 cells, 1.19x at 64 and 128; onnxruntime 1.31.1, AVX512-VNNI)."""
_RANDOM_OPS = frozenset({"Bernoulli", "Dropout", "Multinomial", "RandomNormalLike", "RandomUniformLike"})
_BODIES = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
_SCORE_OPS = ("Add", "Softmax", "LogSoftmax", "Sigmoid", "Identity")


def weight_name(node: ir.Node) -> str | None:
    """The name of the constant weight or table that a node reads, or None."""
    place = 0 if node.op_type in TABLE_OPS else 1
    if node.op_type not in COMPUTE_OPS | TABLE_OPS | RECURRENT_OPS or len(node.inputs) <= place:
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


def moves_data(node: ir.Node) -> bool:
    """Whether a node's outputs hold only values of its first input, and zeros: one scale serves both."""
    if node.op_type not in _MOVES or node.domain or not node.inputs or is_constant(node.inputs[0]):
        return False
    if node.op_type == "MaxPool":
        return len(node.outputs) == 1 or not node.outputs[1].uses()
    if node.op_type == "Resize":
        return resize_mode(node) == "nearest"
    if node.op_type == "Pad":
        mode = node.attributes["mode"].as_string() if "mode" in node.attributes else "constant"
        filler = operand(node, 2)
        zero = (filler is None or scalar(filler) == 0) and float_attribute(node, "value", 0.0) == 0
        return mode in ("edge", "reflect") or (mode == "constant" and zero)
    return True


def resize_mode(node: ir.Node) -> str:
    """The interpolation of a Resize; "crop" where it can look beyond the image."""
    looked_up = node.attributes.get("coordinate_transformation_mode")
    if looked_up is not None and looked_up.as_string() == "tf_crop_and_resize":
        return "crop"
    return node.attributes["mode"].as_string() if "mode" in node.attributes else "nearest"


def data_operands(node: ir.Node) -> list[ir.Value]:
    """The computed operands that a static node takes as integers, in order."""
    if node.op_type in COMPUTE_OPS:
        operands = node.inputs[:1]
    elif node.op_type == "Where":
        operands = node.inputs[1:]
    else:
        operands = node.inputs
    return [value for value in operands if value is not None and not is_constant(value)]


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
        return "both operands are computed, and there is no kernel for that", None
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
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and (not is_constant(bias) or bias.const_value is None):
        return "its bias is computed"
    if node.op_type == "ConvTranspose":
        return unfit_transposed(node) if form == "static" else None
    if bias is not None and bias.const_value is not None and node.op_type == "Gemm":
        return None if _is_per_channel(node, bias.const_value) else "its bias is not one number per output"
    return None


def unfit_transposed(node: ir.Node) -> str | None:
    """Why a ConvTranspose cannot be written as a convolution whose outputs are interleaved, or None."""
    window, axes = rank(node.inputs[1]), rank(node.inputs[0])
    if window is None or axes != window or window < 3:
        return "its shapes are not known"
    missing = "and onnxruntime has no integer ConvTranspose"
    if int_attribute(node, "group", 1) != 1:
        # Measured, onnxruntime 1.31.1, AVX512-VNNI: 0.28x of float depthwise, 1.0x with 4 groups.
        return f"it has groups, whose interleaving costs more than integers save, {missing}"
    if "output_shape" in node.attributes or any(step != 1 for step in _ints(node, "dilations", 1, window)):
        return f"it has dilations or output_shape, {missing}"
    automatic = node.attributes["auto_pad"].as_string() if "auto_pad" in node.attributes else "NOTSET"
    if automatic != "NOTSET":
        return f"it has auto_pad, {missing}"
    sizes = [static_dim(node.inputs[1], place) or 0 for place in range(2, window)]
    if any(max(pair) >= size for pair, size in zip(transposed_pads(node), sizes, strict=True)):
        return f"its padding is as wide as its window, {missing}"
    if sum(static_dim(node.inputs[0], place) is None for place in range(2, window)) > 1:
        return f"more than one side of its image is not fixed, {missing}"
    return None


def transposed_strides(node: ir.Node) -> list[int]:
    """The strides of a ConvTranspose, one per spatial axis."""
    return _ints(node, "strides", 1, rank(node.inputs[1]) or 2)


def transposed_pads(node: ir.Node) -> list[tuple[int, int]]:
    """The padding (begin, end) of a ConvTranspose, one pair per spatial axis."""
    axes = (rank(node.inputs[1]) or 2) - 2
    flat = list(node.attributes["pads"].as_ints()) if "pads" in node.attributes else [0] * (2 * axes)
    return list(zip(flat[:axes], flat[axes:], strict=True))


def transposed_surplus(node: ir.Node) -> list[int]:
    """Output size less stride times input size of a ConvTranspose, one per spatial axis."""
    axes = rank(node.inputs[1]) or 2
    kernel = [static_dim(node.inputs[1], place) or 0 for place in range(2, axes)]
    extra, strides, pads = (
        _ints(node, "output_padding", 0, axes),
        transposed_strides(node),
        transposed_pads(node),
    )
    return [
        size + more - begin - end - step
        for size, more, (begin, end), step in zip(kernel, extra, pads, strides, strict=True)
    ]


def _ints(node: ir.Node, name: str, default: int, axes: int) -> list[int]:
    return list(node.attributes[name].as_ints()) if name in node.attributes else [default] * (axes - 2)


def unfit_recurrent(node: ir.Node) -> tuple[str, str | None] | None:
    """(reason, remedy) why an LSTM, GRU or RNN stays float whatever the target, or None."""
    if node.op_type != "LSTM":
        return f"onnxruntime has no integer kernel of {node.op_type}, only of LSTM", None
    weights = node.inputs[1:3]
    if any(value is None or not is_constant(value) or value.const_value is None for value in weights):
        return "its weights are computed", None
    tensors = [value.const_value for value in weights if value is not None and value.const_value is not None]
    if any(tensor.dtype != ir.DataType.FLOAT for tensor in tensors):
        return "its weights are not FLOAT", "export the model in float32"
    if int_attribute(node, "layout", 0):
        return "onnxruntime runs no LSTM with the batch first (layout 1)", "export it with layout 0"
    directions = static_dim(node.inputs[1], 0) or 1
    if sum(tensor.size for tensor in tensors) < _SMALL_RECURRENT_ELEMENTS * directions:
        return "its weights are too small to pay for quantizing the state at every step", None
    return None


def unfit_carried(node: ir.Node, activation: Scheme) -> str | None:
    """Why the runtime's integer kernels cannot compute a connecting operator, or not as fast, or None."""
    if node.op_type == "AveragePool":
        return _unfit_average(node)
    if node.op_type in ("Sub", "Div"):
        divisor = constant(operand(node, 1))
        if divisor is None:
            return f"onnxruntime has no integer {node.op_type}, and its second operand is no constant"
        if node.op_type == "Div" and not np.all(np.abs(divisor) > np.finfo(np.float32).tiny):
            return "it divides by zero"
    if node.op_type in ("HardSigmoid", "HardSwish"):
        if activation.symmetric:
            return "symmetric activations do not end at zero"
        if float_attribute(node, "alpha", 0.2) <= 0:
            return "its slope is not above zero"
    return None


def _unfit_average(node: ir.Node) -> str | None:
    """Why an AveragePool is no depthwise convolution with equal weights, or None.

    onnxruntime's own QLinearAveragePool is slower than the float operator and wrong under ceil_mode
    with count_include_pad (means up to 13 steps off).
    """
    slow = "onnxruntime's integer kernel is slower than float"
    if static_dim(node.inputs[0], 1) is None:
        return f"its number of channels is not fixed: {slow}"
    if int_attribute(node, "ceil_mode", 0) and not _windows_fit(node):
        return f"its windows reach beyond the image (ceil_mode): {slow}"
    automatic = node.attributes["auto_pad"].as_string() if "auto_pad" in node.attributes else "NOTSET"
    padded = automatic not in ("NOTSET", "VALID") or (
        "pads" in node.attributes and any(node.attributes["pads"].as_ints())
    )
    if padded and not int_attribute(node, "count_include_pad", 0):
        return f"its padding does not count, so that it is no convolution: {slow}"
    return None


def _windows_fit(node: ir.Node) -> bool:
    """Whether the windows of a pool end with the image, so that ceil_mode changes nothing."""
    window = list(node.attributes["kernel_shape"].as_ints())
    axes = len(window) + 2
    steps, spread = _ints(node, "strides", 1, axes), _ints(node, "dilations", 1, axes)
    pads = list(node.attributes["pads"].as_ints()) if "pads" in node.attributes else [0] * (2 * len(window))
    for axis, (size, step, gap) in enumerate(zip(window, steps, spread, strict=True)):
        length = static_dim(node.inputs[0], 2 + axis)
        if length is None or (length + pads[axis] + pads[axis + len(window)] - gap * (size - 1) - 1) % step:
            return False
    return True


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


def is_quantized(model: Model) -> bool:
    """Whether the graph already holds quantized operators, standard ones or onnxruntime's."""
    return any(
        node.domain in ("", "ai.onnx", "com.microsoft")
        and (node.op_type in _QUANTIZED_OPS or node.op_type.startswith(_QUANTIZED_PREFIXES))
        for node in model.graph.all_nodes()
    )
