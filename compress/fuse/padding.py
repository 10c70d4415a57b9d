"""Padding by nothing, which onnxruntime would copy the tensor for."""

from __future__ import annotations

from typing import NamedTuple

import onnx_ir as ir

from ...graph.edit import Editor, integers, operand
from ...graph.rewrite import Verdict


class EmptyPad(NamedTuple):
    """Pad by nothing on any side -> its input. Swin's windows are padded to fit even where they do."""

    name: str = "empty-pad"
    roots: frozenset[str] = frozenset({"Pad"})

    def apply(self, node: ir.Node, editor: Editor) -> Verdict:
        """See `Rule`."""
        pads = node.attributes["pads"].as_ints() if "pads" in node.attributes else integers(operand(node, 1))
        if node.inputs[0] is None or not pads or any(pads):
            return False
        editor.replace(node.outputs[0], node.inputs[0])
        return True
