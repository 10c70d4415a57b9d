"""Weight-only INT8: MatMul weights in blocks of int8 for onnxruntime's MatMulNBits."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ...graph.edit import Editor, remove_dead
from ...graph.errors import InternalError
from ...graph.model import Model
from ...graph.passes import Outcome, Pass
from ..plan import Decision
from .weights import require_finite

BLOCK_SIZE = 128
_MIDDLE = 128
_COMPUTE_IN_INT8 = 4


def quantize_blocks(
    weight: npt.NDArray[np.float32], block_size: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Integers and scales of a weight in blocks along K, with the middle 128 as zero point.

    Args:
        weight: float32 [K, N].
        block_size: rows per block, a power of two from 16; the last block is padded with zeros.

    Returns:
        integers: uint8 [N, blocks, block_size].
        scales: float32 [N, blocks], strictly positive.

    Source: onnxruntime contrib operator com.microsoft.MatMulNBits.
    """
    depth, width = weight.shape
    blocks = -(-depth // block_size)
    padded = np.zeros((width, blocks * block_size), np.float32)
    padded[:, :depth] = weight.T
    grouped = padded.reshape(width, blocks, block_size)
    largest = np.abs(grouped).max(axis=2)
    tiny = np.finfo(np.float32).tiny
    scales = np.where(largest > 127.0 * tiny, largest / 127.0, 1.0).astype(np.float32)
    steps = np.rint(grouped / scales[:, :, None])
    return (np.clip(steps, -127, 127) + _MIDDLE).astype(np.uint8), scales


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeBlocks(Pass):
    """Turn planned MatMul nodes into com.microsoft.MatMulNBits with 8 bits per weight."""

    decisions: tuple[Decision, ...]

    def run(self, model: Model) -> Outcome:
        """See `Pass.run`."""
        outcome = Outcome()
        editor = Editor(model)
        planned = {item.node for item in self.decisions if item.form == "weight-only" and item.op == "MatMul"}
        stored: dict[int, tuple[ir.Value, ir.Value]] = {}
        for graph in model.all_graphs():
            for node in tuple(graph):
                if node.name in planned:
                    _to_blocks(node, graph, editor, stored)
                    outcome.count("MatMul-blocks")
        if outcome.applied:
            remove_dead(model)
        return outcome


def _to_blocks(
    node: ir.Node, graph: ir.Graph, editor: Editor, stored: dict[int, tuple[ir.Value, ir.Value]]
) -> None:
    data, weight, result = node.inputs[0], node.inputs[1], node.outputs[0]
    if data is None or weight is None or weight.const_value is None:
        raise InternalError("a planned node has no constant weight", where=node.name)
    if id(weight) not in stored:
        values = np.asarray(weight.const_value.numpy(), np.float32)
        require_finite(values, weight.name)
        integers, scales = quantize_blocks(values, BLOCK_SIZE)
        stem, owner = weight.name or "weight", weight.graph if isinstance(weight.graph, ir.Graph) else graph
        stored[id(weight)] = (
            editor.tensor(ir.tensor(integers), f"{stem}.blocks", owner),
            editor.tensor(ir.tensor(scales.reshape(-1)), f"{stem}.blocks.scale", owner),
        )
    depth, width = weight.const_value.shape.numpy()
    attributes = {
        "K": int(depth),
        "N": int(width),
        "bits": 8,
        "block_size": BLOCK_SIZE,
        "accuracy_level": _COMPUTE_IN_INT8,
    }
    product = editor.value(
        "MatMulNBits",
        [data, *stored[id(weight)]],
        attributes,
        before=node,
        stem=result.name or "product",
        like=result,
        domain="com.microsoft",
    )
    editor.replace(result, product)
