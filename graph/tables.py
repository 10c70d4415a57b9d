"""Which inputs are rows of a table, and how many rows it has: what may be fed to an integer input."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from .edit import int_attribute, static_dim
from .model import Model

# Operators that look rows up: {position of the indices: position of the table}, and the axis attribute.
_LOOKUPS: dict[tuple[str, str], tuple[dict[int, int], str]] = {
    ("", "Gather"): ({1: 0}, "axis"),
    ("com.microsoft", "GatherBlockQuantized"): ({1: 0}, "gather_axis"),
    ("com.microsoft", "EmbedLayerNormalization"): ({0: 2, 1: 4}, ""),
}
_TRANSPARENT = frozenset({"Cast", "Expand", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
_STORED_AS = frozenset({"DequantizeLinear", "Identity", "Cast"})


def index_bounds(model: Model) -> dict[str, int]:
    """For each input that indexes a table of known size: the number of its rows.

    Follows the input through casts and reshapes to Gather and the runtime's embedding operators;
    the smallest table counts. Inputs that index nothing are absent.
    """
    found = {}
    for value in model.graph.inputs:
        sizes = list(_table_sizes(value))
        if value.name and value.name not in model.graph.initializers and sizes:
            found[value.name] = min(sizes)
    return found


def _table_sizes(value: ir.Value) -> Iterator[int]:
    queue, seen = [value], set()
    while queue:
        current = queue.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        for node, position in current.uses():
            tables, axis = _LOOKUPS.get((node.domain, node.op_type), ({}, ""))
            if position in tables:
                size = _rows(node.inputs[tables[position]], int_attribute(node, axis, 0))
                if size is not None:
                    yield size
            elif node.op_type in _TRANSPARENT and position == 0:
                queue.append(node.outputs[0])


def _rows(table: ir.Value | None, axis: int) -> int | None:
    """The size of a table along `axis`, also where it is stored quantized."""
    while table is not None:
        size = static_dim(table, axis)
        maker = table.producer()
        if size is not None or maker is None or maker.op_type not in _STORED_AS:
            return size
        table = maker.inputs[0]
    return None
