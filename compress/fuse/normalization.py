"""Normalization spelled out in single operators -> LayerNormalization, or the form the runtime fuses."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ...graph.edit import (
    Editor,
    axes_of,
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
from .polynomial import number

_LAYER_NORM_OPSET = 17


class LayerNormFromParts(NamedTuple):
    """(x - mean) / sqrt(mean((x - mean)^2) + eps) * gamma + beta -> LayerNormalization.

    The Add of the residual in front is left alone: com.microsoft.SkipLayerNormalization, which
    takes both, costs MiniLM a third of its speed (onnxruntime 1.31.1, x86-64 with AMX, 1 thread).
    Source: Ba et al. 2016, arXiv:1607.06450, equation 4 (over the last axis).
    """

    name: str = "layer-norm"
    roots: frozenset[str] = frozenset({"Div", "Mul"})

    def apply(self, node: ir.Node, editor: Editor) -> Verdict:
        """See `Rule`."""
        parts = _normalized(node)
        if parts is None:
            return False
        source, epsilon = parts
        if source.dtype != ir.DataType.FLOAT:
            return Refused("x is not known to be float32")
        if editor.model.opset < _LAYER_NORM_OPSET:
            return Refused(
                f"LayerNormalization needs operator set {_LAYER_NORM_OPSET}, "
                f"the model has {editor.model.opset}"
            )
        gain = _affine_reader(node, "Mul")
        if gain is None:
            return Refused("no constant gain along the last axis follows")
        last, gamma = gain
        shift = _affine_reader(last, "Add")
        beta = None
        if shift is not None:
            last, beta = shift
        width = static_dim(source, -1)
        for weight in (gamma, beta):
            if weight is not None and (rank(weight) != 1 or static_dim(weight, 0) != width or width is None):
                return Refused("gain or shift is not one number per element of the last axis")
        inputs = [source, gamma] if beta is None else [source, gamma, beta]
        output = last.outputs[0]
        result = editor.value(
            "LayerNormalization",
            inputs,
            {"axis": -1, "epsilon": epsilon, "stash_type": 1},
            before=last,
            stem=output.name or "normalized",
            like=output,
        )
        editor.replace(output, result)
        return True


def _normalized(node: ir.Node) -> tuple[ir.Value, float] | None:
    """(x, epsilon) if `node` computes (x - mean) / sqrt(variance + epsilon) over the last axis."""
    for centred, biased_variance in _quotients(node):
        difference, biased = producer(centred, "Sub"), producer(biased_variance, "Add")
        pair = split_constant(biased) if biased is not None else None
        if difference is None or pair is None or centred is None:
            continue
        source, epsilon = difference.inputs[0], number(pair[1])
        if source is None or _last_axis_mean(difference.inputs[1]) is not source or epsilon is None:
            continue
        if _is_square_of(_last_axis_mean(pair[0]), centred):
            return source, epsilon
    return None


def _quotients(node: ir.Node) -> list[tuple[ir.Value | None, ir.Value]]:
    """The readings of `node` as a / sqrt(b): pairs (a, b)."""
    first, second = node.inputs
    if node.op_type == "Div":
        candidates = [(first, _under_root(second))]
    else:
        candidates = [(first, _under_inverse_root(second)), (second, _under_inverse_root(first))]
    return [(above, below) for above, below in candidates if below is not None]


def _under_root(value: ir.Value | None) -> ir.Value | None:
    """b if `value` is sqrt(b)."""
    node = producer(value, "Sqrt", "Pow")
    if node is None or (node.op_type == "Pow" and number(node.inputs[1]) != 0.5):
        return None
    return node.inputs[0]


def _under_inverse_root(value: ir.Value | None) -> ir.Value | None:
    """b if `value` is 1 / sqrt(b)."""
    node = producer(value, "Reciprocal", "Div", "Pow")
    if node is None:
        return None
    if node.op_type == "Pow":
        return node.inputs[0] if number(node.inputs[1]) == -0.5 else None
    if node.op_type == "Div" and number(node.inputs[0]) != 1.0:
        return None
    return _under_root(node.inputs[-1])


def _last_axis_mean(value: ir.Value | None) -> ir.Value | None:
    """What `value` is the mean of, over the last axis with the axis kept."""
    node = producer(value, "ReduceMean")
    if node is None or int_attribute(node, "keepdims", 1) != 1:
        return None
    size = rank(node.inputs[0])
    if axes_of(node) not in ([-1], [None if size is None else size - 1]):
        return None
    return node.inputs[0]


def _is_square_of(value: ir.Value | None, base: ir.Value) -> bool:
    node = producer(value, "Pow", "Mul")
    if node is None or node.inputs[0] is not base:
        return False
    return number(node.inputs[1]) == 2.0 if node.op_type == "Pow" else node.inputs[1] is base


def _affine_reader(node: ir.Node, op_type: str) -> tuple[ir.Node, ir.Value] | None:
    """(reader, its constant) if the only reader of `node` is `op_type` with a 1-D constant."""
    reader = only_use(node.outputs[0])
    if reader is None or reader.op_type != op_type or reader.domain:
        return None
    pair = split_constant(reader)
    if pair is None or not is_constant(pair[1]) or rank(pair[1]) != 1:
        return None
    return reader, pair[1]


class RmsNormAsQuotient(NamedTuple):
    """x * (1 / sqrt(mean(x^2) + eps)) * gain -> x / sqrt(mean(x^2) + eps) * gain.

    Operator sets below 23 have no root-mean-square norm. onnxruntime 1.31.1 makes one kernel of the
    quotient when it loads the model, and leaves torch's product with a reciprocal as seven: 2.0 times
    slower (128 x 768, x86-64, 1 thread). Source: Zhang & Sennrich 2019, arXiv:1910.07467, equation 4.
    """

    name: str = "rms-norm"
    roots: frozenset[str] = frozenset({"Mul"})

    def apply(self, node: ir.Node, editor: Editor) -> Verdict:
        """See `Rule`."""
        for source, inverse in (tuple(node.inputs), tuple(node.inputs)[::-1]):
            root = _under_inverse(inverse)
            if source is None or root is None or not _is_root_mean_square(root, source):
                continue
            if inverse is None or only_use(inverse) is None:
                return Refused("the reciprocal is also used elsewhere")
            gain = _affine_reader(node, "Mul")
            if gain is None or static_dim(gain[1], 0) != static_dim(source, -1):
                return Refused("no constant gain along the last axis follows")
            result = node.outputs[0]
            quotient = editor.value(
                "Div", [source, root.outputs[0]], before=node, stem=result.name or "normalized", like=result
            )
            editor.replace(result, quotient)
            return True
        return False


def _under_inverse(value: ir.Value | None) -> ir.Node | None:
    """The Sqrt that `value` is the reciprocal of."""
    inverse = producer(value, "Reciprocal", "Div")
    if inverse is None or (inverse.op_type == "Div" and number(inverse.inputs[0]) != 1.0):
        return None
    return producer(inverse.inputs[-1], "Sqrt")


def _is_root_mean_square(root: ir.Node, source: ir.Value) -> bool:
    """Whether a Sqrt is of the mean of the squares of `source` over the last axis, plus a number."""
    biased = producer(root.inputs[0], "Add")
    pair = split_constant(biased) if biased is not None else None
    if pair is None or number(pair[1]) is None:
        return False
    square = producer(_last_axis_mean(pair[0]), "Pow")
    return square is not None and square.inputs[0] is source and number(square.inputs[1]) == 2.0


class InstanceNormAffine(NamedTuple):
    """InstanceNormalization, then Mul and Add of one number per channel -> one InstanceNormalization.

    torch's GroupNorm of one channel per group (wav2vec2) is exported so: 3.2 times slower with
    onnxruntime 1.31.1 (512 x 3999, x86-64, 1 thread). GroupNormalization itself, which that version
    spells out when it loads the model, is 2.2 times slower than the Reshapes and InstanceNormalization
    that exports have for other groups; those stay. Source: Wu & He 2018, arXiv:1803.08494, section 3.
    """

    name: str = "instance-norm"
    roots: frozenset[str] = frozenset({"InstanceNormalization"})

    def apply(self, node: ir.Node, editor: Editor) -> Verdict:
        """See `Rule`."""
        weights = [constant(value) for value in node.inputs[1:3]]
        if weights[0] is None or weights[1] is None or node.outputs[0].dtype != ir.DataType.FLOAT:
            return False
        last, gain, shift = node, weights[0].astype(np.float64), weights[1].astype(np.float64)
        changed = False
        while True:
            reader = only_use(last.outputs[0])
            factor = None if reader is None else _per_channel(reader, last.outputs[0], gain.size)
            if reader is None or factor is None:
                break
            gain = gain * factor if reader.op_type == "Mul" else gain
            shift = shift * factor if reader.op_type == "Mul" else shift + factor
            last, changed = reader, True
        if not changed:
            return False
        with np.errstate(over="ignore"):
            numbers = [gain.astype(np.float32), shift.astype(np.float32)]
        if not np.isfinite(numbers).all():
            return Refused("the joint gain or shift is not finite")
        graph = node.graph if isinstance(node.graph, ir.Graph) else editor.model.graph
        names = [value.name if value is not None else None for value in node.inputs[1:3]]
        folded = [
            editor.tensor(ir.tensor(array), name or stem, graph)
            for array, name, stem in zip(numbers, names, ("gain", "shift"), strict=True)
        ]
        result = last.outputs[0]
        normalized = editor.value(
            "InstanceNormalization",
            [node.inputs[0], *folded],
            {"epsilon": float_attribute(node, "epsilon", 1e-5)},
            before=last,
            stem=result.name or "normalized",
            like=result,
        )
        editor.replace(result, normalized)
        return True


def _per_channel(reader: ir.Node, value: ir.Value, channels: int) -> npt.NDArray[np.float64] | None:
    """The numbers, one per channel (axis 1), that a Mul or Add applies to `value`; None if it is no such."""
    pair = split_constant(reader) if reader.op_type in ("Mul", "Add") and not reader.domain else None
    size = rank(value)
    if pair is None or pair[0] is not value or size is None or (rank(pair[1]) or 0) > size:
        return None
    numbers = constant(pair[1])
    if numbers is None or numbers.dtype != np.float32:
        return None
    axes = [1] * (size - numbers.ndim) + list(numbers.shape)
    if any(axis != 1 for place, axis in enumerate(axes) if place != 1) or axes[1] not in (1, channels):
        return None
    return np.broadcast_to(numbers.astype(np.float64).reshape(-1), (channels,))


class FoldWeightNorm(NamedTuple):
    """v * (g / |v|), all of it constant -> the weight.

    Weight normalization that was not removed before the export (wav2vec2's position convolution): a
    computed weight has no integer kernel. In float64. Source: Salimans & Kingma 2016,
    arXiv:1602.07868, equation 2.
    """

    name: str = "weight-norm"
    roots: frozenset[str] = frozenset({"Mul"})

    def apply(self, node: ir.Node, editor: Editor) -> Verdict:
        """See `Rule`."""
        for direction, quotient in (tuple(node.inputs), tuple(node.inputs)[::-1]):
            ratio = producer(quotient, "Div")
            norm = producer(ratio.inputs[1], "ReduceL2") if ratio is not None else None
            if ratio is None or norm is None or norm.inputs[0] is not direction:
                continue
            vectors, lengths, axes = constant(direction), constant(ratio.inputs[0]), axes_of(norm)
            if vectors is None or lengths is None or axes is None or direction is None:
                return Refused("the weight is not constant")
            if vectors.dtype != np.float32 or int_attribute(norm, "keepdims", 1) != 1:
                return Refused("the weight is not float32, or its axes are dropped")
            wide = vectors.astype(np.float64)
            sizes = np.sqrt(np.square(wide).sum(axis=tuple(axes), keepdims=True))
            with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
                weight = (wide * (lengths.astype(np.float64) / sizes)).astype(np.float32)
            if not np.isfinite(weight).all() or weight.shape != vectors.shape:
                return Refused("the weight is not finite, or a vector has length 0")
            graph = node.graph if isinstance(node.graph, ir.Graph) else editor.model.graph
            folded = editor.tensor(ir.tensor(weight), direction.name or "weight", graph)
            editor.replace(node.outputs[0], folded)
            return True
        return False
