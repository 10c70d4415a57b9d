"""The channel shuffle between integer operators: one convolution that only permutes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from ...graph.edit import only_use, permutation, producer, rank, same_shape, static_dim

_MOST_CHANNELS = 256
"""A permuting 1 x 1 convolution costs channels squared, a transpose of bytes 2.9 ns each.

2.8x as fast with 64 channels, 2.4x with 232 (onnxruntime 1.31.1, AVX512-VNNI with AMX); other processors
draw level earlier.
"""


def channel_shuffle(node: ir.Node, source: Mapping[str, str]) -> tuple[ir.Value, ir.Node, list[int]] | None:
    """What a Transpose between two Reshapes does to the channels, if it only permutes them.

    Only where both ends are quantized at one scale. With its channels last, as the runtime's integer
    convolutions have them, such a transpose moves single bytes (2.9 ns each, onnxruntime 1.31.1).

    Args:
        node: any node.
        source: tensor name -> the tensor whose range it shares.

    Returns:
        The shuffled tensor, the last of the three nodes, and the channel that each output channel
        is; None where it is no shuffle.

    Source: Zhang et al. 2017, arXiv:1707.01083, section 3.1.
    """
    first = producer(node.inputs[0], "Reshape") if node.op_type == "Transpose" and not node.domain else None
    last = only_use(node.outputs[0])
    if first is None or last is None or last.op_type != "Reshape" or only_use(first.outputs[0]) is not node:
        return None
    data, apart, result = first.inputs[0], first.outputs[0], last.outputs[0]
    axes, channels = rank(data), static_dim(data, 1)
    if data is None or axes is None or axes < 3 or channels is None or channels > _MOST_CHANNELS:
        return None
    if rank(apart) != axes + 1 or not same_shape(data, result):
        return None
    outer, inner = static_dim(apart, 1), static_dim(apart, 2)
    if outer is None or inner is None or outer * inner != channels:
        return None
    if permutation(node) != [0, 2, 1, *range(3, axes + 1)] or not _same_sides(data, apart):
        return None
    owner = source.get(str(data.name))
    if owner is None or source.get(str(result.name)) != owner:
        return None
    return data, last, [int(place) for place in np.arange(channels).reshape(outer, inner).T.reshape(-1)]


def _same_sides(data: ir.Value, apart: ir.Value) -> bool:
    """Whether all axes behind the channels are the same before and after splitting the channels."""
    if data.shape is None or apart.shape is None:
        return False
    return list(data.shape)[2:] == list(apart.shape)[3:]
