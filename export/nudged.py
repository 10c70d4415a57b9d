"""A model whose float constants are a rounding away from its own: what another machine's kernels amount to.

Kernels of other processors sum in another order, or fuse a multiplication with an addition: their results
are a unit in the last place apart here and there. Where a network rounds to 8-bit integers at run time,
such a unit flips one of them now and then, and the difference grows from layer to layer. Moving constants
by a unit in the last place does the same, on this machine.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..graph.model import Model

_LARGEST = 1 << 16  # elements: biases, scales of normalisations, small tables; not weights of products
_SCALED = ("QuantizeLinear", "DequantizeLinear")


def nudged(model: Model, seed: int) -> Model | None:
    """A copy of a model with its small float32 constants moved by -1, 0 or 1 unit in the last place.

    Scales of QuantizeLinear and DequantizeLinear stay: they are the model's own, on every machine. So do
    zeros, single numbers, and what is infinite or would become so (masks of attention).

    Args:
        model: left as it is.
        seed: which of them move, and where to.

    Returns:
        None if there is nothing to move.
    """
    copy, generator, moved = model.fork(), np.random.default_rng(seed), False
    for graph in copy.all_graphs():
        for value in graph.initializers.values():
            if value.dtype != ir.DataType.FLOAT or value.const_value is None:
                continue
            if not 1 < value.const_value.size <= _LARGEST or not value.const_value.shape:
                continue
            if any(use.node.op_type in _SCALED for use in value.uses()):
                continue
            array = value.const_value.numpy()
            steps = generator.integers(-1, 2, array.shape).astype(np.float32)
            towards = np.where(steps > 0, np.inf, -np.inf).astype(np.float32)
            with np.errstate(over="ignore"):
                near = np.nextafter(array, towards)
            stays = (steps == 0) | (array == 0) | ~np.isfinite(array) | ~np.isfinite(near)
            there = np.where(stays, array, near)
            value.const_value = ir.Tensor(there.astype(np.float32), name=value.name)
            moved = True
    return copy if moved else None
