"""The restrictions of TensorRT's operator tables that can be read off a node."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..graph.edit import int_attribute, operand, producer, rank, static_dim
from .operator_table import OperatorEntry

QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
_FOLD = "export it with that input as a constant, or fold constants before (onnxruntime's basic optimisation)"
_REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
# The inputs that "must be an initializer" or "a constant" speaks of.
_CONSTANT_INPUTS: dict[str, tuple[int, ...]] = {
    "Conv": (1,),
    "ConvTranspose": (1,),
    "CumSum": (1,),
    "InstanceNormalization": (1, 2),
    "NonMaxSuppression": (2, 3, 4),
    "OneHot": (1,),
    "Pad": (3,),
    "Slice": (3,),
    "Squeeze": (1,),
    "TopK": (1,),
    "Unsqueeze": (1,),
    **{f"Reduce{name}": (1,) for name in _REDUCTIONS},
}
_UNKNOWN_QUANTIZED = (ir.DataType.UINT8, ir.DataType.UINT4, ir.DataType.INT16, ir.DataType.UINT16)
_TOP_K_LIMIT = 3840
_READ_ELEMENTS = 65536
_NUMBERS = ("value_int", "value_ints", "value_float", "value_floats")
_RESIZE_TRANSFORMS = (
    "half_pixel",
    "pytorch_half_pixel",
    "tf_half_pixel_for_nn",
    "asymmetric",
    "align_corners",
)
_RESIZE_NEAREST = ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil")


@dataclasses.dataclass(frozen=True)
class Breach:
    """One restriction that a node breaks, and what to do about it."""

    reason: str
    remedy: str


def breaches(node: ir.Node, entry: OperatorEntry) -> Iterator[Breach]:
    """Every restriction of the table that the node is seen to break."""
    text = entry.restrictions
    if "initializer" in text or "constant" in text:
        for position in _CONSTANT_INPUTS.get(node.op_type, ()):
            value = operand(node, position)
            if value is not None and not is_fixed(_behind_quantizers(value)):
                yield Breach(f"its input number {position + 1} is computed: {text}", _FOLD)
    rule = _RULES.get(node.op_type)
    if rule is not None:
        yield from rule(node, text)


def is_covered(op: str) -> bool:
    """Whether the restrictions of an operator are checked here, so that nothing is left to the reader."""
    return op in _RULES or op in _CONSTANT_INPUTS


def is_fixed(value: ir.Value | None) -> bool:
    """Whether a value is known when an engine is built: an initializer or a Constant node's output.

    An initializer that old files also list as an input counts: TensorRT never asks a caller for it.
    """
    if producer(value, "Constant") is not None:
        return True
    return value is not None and value.const_value is not None and value.producer() is None


def fixed(value: ir.Value | None) -> npt.NDArray[np.generic] | None:
    """The contents of a fixed value, or None where it is computed, is text or has over 65536 elements."""
    if not is_fixed(value):
        return None
    assert value is not None
    tensor = value.const_value
    if tensor is None:
        node = producer(value, "Constant")
        assert node is not None
        attribute = node.attributes.get("value")
        if attribute is None or attribute.type != ir.AttributeType.TENSOR:
            numbers = (node.attributes.get(name) for name in _NUMBERS)
            return next((np.asarray(item.value) for item in numbers if item is not None), None)
        tensor = attribute.as_tensor()
    readable = tensor.size <= _READ_ELEMENTS and tensor.dtype != ir.DataType.STRING
    return tensor.numpy() if readable else None


def _behind_quantizers(value: ir.Value | None) -> ir.Value | None:
    """The value that Q/DQ pairs carry: a quantized weight is still a weight."""
    while (node := producer(value, *QUANTIZERS)) is not None:
        value = node.inputs[0]
    return value


def quantized_type(node: ir.Node) -> ir.DataType | None:
    """The integer (or 8-bit float) type on the quantized side of a QuantizeLinear or DequantizeLinear."""
    zero_point = operand(node, 2)
    if zero_point is not None and zero_point.dtype is not None:
        return zero_point.dtype
    if node.op_type == "DequantizeLinear":
        return None if node.inputs[0] is None else node.inputs[0].dtype
    # Without a zero point and output_dtype ONNX quantizes to UINT8.
    return ir.DataType(int_attribute(node, "output_dtype", 0) or ir.DataType.UINT8)


def _text(node: ir.Node, name: str, default: str) -> str:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_string()


def _ints(node: ir.Node, name: str) -> list[int]:
    attribute = node.attributes.get(name)
    return [] if attribute is None else list(attribute.as_ints())


def _floats_differ(node: ir.Node, name: str, default: float) -> bool:
    attribute = node.attributes.get(name)
    return attribute is not None and attribute.as_float() != default


def _quantize(node: ir.Node, text: str) -> Iterator[Breach]:
    symmetric = "quantize symmetrically: signed INT8 with zero point 0 (S8S8), in Q/DQ pairs"
    scale, zero_point = operand(node, 1), operand(node, 2)
    if not is_fixed(scale):
        yield Breach("the scale is computed; it must be a constant when the engine is built", symmetric)
    if zero_point is not None and not is_fixed(zero_point):
        yield Breach("the zero point is computed; it must be a constant 0", symmetric)
    kind = quantized_type(node)
    if kind is not None and kind in _UNKNOWN_QUANTIZED:
        yield Breach(f"{kind.name} is no quantized type of TensorRT: INT8 is", symmetric)
    elif kind == ir.DataType.INT32:
        yield Breach("INT32 biases are not dequantized", "leave biases in float: the engine adds them itself")
    elif (values := fixed(zero_point)) is not None and np.any(values.astype(np.float32) != 0):
        yield Breach(f"the zero point is not 0: {text}", symmetric)
    channels = static_dim(scale, 0) if rank(scale) == 1 else None
    if node.op_type == "DequantizeLinear" or channels in (None, 1):
        return
    if not is_fixed(_behind_quantizers(node.inputs[0])):
        yield Breach("an activation has a scale per channel; only weights may", "quantize it per tensor")


def _pool(node: ir.Node, text: str) -> Iterator[Breach]:
    if len(_ints(node, "kernel_shape")) not in (0, 2, 3) and "2D or 3D" in text:
        yield Breach(f"the window has one axis: {text}", "write it in two dimensions, with an axis of size 1")
    if "dilations" in text and any(step != 1 for step in _ints(node, "dilations")):
        yield Breach(f"dilations are {_ints(node, 'dilations')}: {text}", "use a window without dilations")
    if node.op_type == "MaxPool" and len(node.outputs) > 1 and _used(node.outputs[1]):
        yield Breach(f"its second output is used: {text}", "compute without the indices of the maxima")


def _convolution(node: ir.Node, text: str) -> Iterator[Breach]:
    axes = rank(operand(node, 1))
    if "2D or 3D" in text and axes is not None and axes not in (4, 5):
        yield Breach(
            f"its weight has {axes - 2} spatial axes: {text}",
            "write it in two dimensions, with an axis of size 1",
        )


def _layer_normalization(node: ir.Node, text: str) -> Iterator[Breach]:
    if "first output" in text and any(_used(value) for value in node.outputs[1:]):
        yield Breach(f"mean or deviation is used: {text}", "compute them with ReduceMean beside it")


def _top_k(node: ir.Node, text: str) -> Iterator[Breach]:
    if "sorted" in text and int_attribute(node, "sorted", 1) != 1:
        yield Breach(f"sorted is 0: {text}", "export with sorted=True")
    count = fixed(operand(node, 1))
    if str(_TOP_K_LIMIT) in text and count is not None and int(count.reshape(-1)[0]) >= _TOP_K_LIMIT:
        yield Breach(f"K is {int(count.reshape(-1)[0])}: {text}", f"ask for fewer than {_TOP_K_LIMIT} values")


def _scatter(node: ir.Node, text: str) -> Iterator[Breach]:
    reduction = _text(node, "reduction", "none")
    if "reduction" in text and reduction != "none":
        yield Breach(f"reduction is {reduction!r}: {text}", "scatter without a reduction")


def _resize(node: ir.Node, text: str) -> Iterator[Breach]:
    mode = _text(node, "mode", "nearest")
    transform = _text(node, "coordinate_transformation_mode", "half_pixel")
    nearest = _text(node, "nearest_mode", "round_prefer_floor")
    known = "export with mode nearest or linear, half_pixel or align_corners, and no antialiasing"
    if mode not in ("nearest", "linear"):
        yield Breach(f"mode {mode!r}: {text}", known)
    if transform not in _RESIZE_TRANSFORMS:
        yield Breach(f"coordinate_transformation_mode {transform!r}: {text}", known)
    if mode == "nearest" and nearest not in _RESIZE_NEAREST:
        yield Breach(f"nearest_mode {nearest!r}: {text}", known)
    if int_attribute(node, "antialias", 0):
        yield Breach("antialiasing is not supported", known)
    if _text(node, "keep_aspect_ratio_policy", "stretch") != "stretch":
        yield Breach(f"keep_aspect_ratio_policy is not stretch: {text}", known)


def _recurrent(node: ir.Node, text: str) -> Iterator[Breach]:
    if "input_forget" in text and int_attribute(node, "input_forget", 0):
        yield Breach(f"input_forget is 1: {text}", "use separate input and forget gates")
    if "layout" in text and int_attribute(node, "layout", 0):
        yield Breach(f"layout is 1: {text}", "put the sequence axis first (layout 0)")
    attribute = node.attributes.get("activations")
    names = [] if attribute is None else list(attribute.as_strings())
    half = len(names) // 2
    if _text(node, "direction", "forward") == "bidirectional" and names[:half] != names[half:]:
        yield Breach(f"the two directions have different activations: {text}", "give both the same ones")


def _dropout(node: ir.Node, text: str) -> Iterator[Breach]:
    training = operand(node, 2)
    values = fixed(training)
    if training is not None and (values is None or bool(np.any(values))):
        yield Breach(f"it is in training mode: {text}", "export the model in evaluation mode (model.eval())")


def _instance_normalization(node: ir.Node, text: str) -> Iterator[Breach]:
    axes = rank(node.inputs[0])
    if "rank" in text and axes is not None and not 3 <= axes <= 5:
        yield Breach(f"its input has {axes} axes: {text}", "reshape to 3, 4 or 5 axes")


def _four_axes(node: ir.Node, text: str) -> Iterator[Breach]:
    axes = rank(node.inputs[0])
    if "4D" in text and axes is not None and axes != 4:
        yield Breach(f"its input has {axes} axes: {text}", "reshape to 4 axes")


def _attention(node: ir.Node, text: str) -> Iterator[Breach]:
    decomposed = "export attention as MatMul and Softmax (opset 22 or older)"
    for position in range(3):
        axes = rank(operand(node, position))
        if axes is not None and axes != 4:
            yield Breach(f"Q, K or V has {axes} axes: {text}", decomposed)
            break
    cached = any(operand(node, position) is not None for position in (4, 5, 6))
    if cached or any(_used(value) for value in node.outputs[1:]):
        yield Breach(f"it carries past keys or further outputs: {text}", decomposed)
    if _floats_differ(node, "softcap", 0.0) or int_attribute(node, "qk_matmul_output_mode", 0):
        yield Breach(f"softcap or qk_matmul_output_mode is set: {text}", decomposed)


def _einsum(node: ir.Node, text: str) -> Iterator[Breach]:
    equation = _text(node, "equation", "").replace(" ", "")
    terms = equation.partition("->")[0].split(",")
    if "Ellipsis" in text and ("..." in equation or any(len(set(term)) < len(term) for term in terms)):
        yield Breach(f"equation {equation!r}: {text}", "write it as MatMul, Transpose and ReduceSum")


def _used(value: ir.Value) -> bool:
    return bool(value.name) and (value.is_graph_output() or bool(value.uses()))


_RULES: dict[str, Callable[[ir.Node, str], Iterator[Breach]]] = {
    "Attention": _attention,
    "AveragePool": _pool,
    "Conv": _convolution,
    "ConvTranspose": _convolution,
    "DequantizeLinear": _quantize,
    "Dropout": _dropout,
    "Einsum": _einsum,
    "GRU": _recurrent,
    "GridSample": _four_axes,
    "InstanceNormalization": _instance_normalization,
    "LSTM": _recurrent,
    "LayerNormalization": _layer_normalization,
    "LpPool": _pool,
    "MaxPool": _pool,
    "QuantizeLinear": _quantize,
    "RNN": _recurrent,
    "Resize": _resize,
    "ScatterND": _scatter,
    "TopK": _top_k,
}
