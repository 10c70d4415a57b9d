"""Means over whole images in their many spellings -> GlobalAveragePool, which has an integer kernel."""

from __future__ import annotations

from typing import NamedTuple

import onnx_ir as ir

from ...graph.edit import Editor, axes_of, int_attribute, rank, static_dim
from ...graph.rewrite import Refused, Verdict

_IMAGE_AXES = 4


class GlobalPool(NamedTuple):
    """ReduceMean over height and width, or AveragePool with a window of the image -> GlobalAveragePool.

    Squeeze-and-excitation is exported as ReduceMean, which would send static INT8 through float.
    """

    name: str = "global-pool"
    roots: frozenset[str] = frozenset({"ReduceMean", "AveragePool"})

    def apply(self, node: ir.Node, editor: Editor) -> Verdict:
        """See `Rule`."""
        source, result = node.inputs[0], node.outputs[0]
        if source is None or rank(source) != _IMAGE_AXES:
            return False
        if source.dtype != ir.DataType.FLOAT:
            return Refused("x is not known to be float32")
        if node.op_type == "ReduceMean":
            axes = axes_of(node)
            if axes is None or sorted(axis % _IMAGE_AXES for axis in axes) != [2, 3]:
                return False
            if int_attribute(node, "keepdims", 1) != 1:
                return Refused("the axes of the image are dropped")
        elif not _covers_image(node, source):
            return False
        pooled = editor.value(
            "GlobalAveragePool", [source], before=node, stem=result.name or "pooled", like=result
        )
        editor.replace(result, pooled)
        return True


def _covers_image(node: ir.Node, source: ir.Value) -> bool:
    """Whether the one window of an AveragePool is the image, nothing but the image counted.

    A window beyond the image (EfficientNet's, with ceil_mode) is cut off at its edge, with and
    without count_include_pad: what lies outside is no padding.
    """
    window = node.attributes["kernel_shape"].as_ints()
    size = [static_dim(source, axis) for axis in (2, 3)]
    pads = node.attributes["pads"].as_ints() if "pads" in node.attributes else ()
    automatic = node.attributes["auto_pad"].as_string() if "auto_pad" in node.attributes else "NOTSET"
    dilations = node.attributes["dilations"].as_ints() if "dilations" in node.attributes else ()
    if any(pads) or automatic not in ("NOTSET", "VALID") or any(step != 1 for step in dilations):
        return False
    if [static_dim(node.outputs[0], axis) for axis in (2, 3)] != [1, 1]:
        return False
    return all(have is not None and want >= have for want, have in zip(window, size, strict=True))
