"""Putting something behind a value: chosen readers, and the graph's output, move on to what is made of it."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from ...graph.edit import Editor


def read_instead(old: ir.Value, new: ir.Value, uses: Iterable[tuple[ir.Node, int]], editor: Editor) -> None:
    """Let `uses` of `old`, and the graph where it is an output, read `new`, which is computed from `old`.

    An output keeps its name, type and shape. (`Editor.replace` moves every reader, and would let
    `new` read itself.)
    """
    for node, place in tuple(uses):
        node.replace_input_with(place, new)
    if not old.is_graph_output():
        return
    outputs, name = editor.model.graph.outputs, old.name
    for place, value in enumerate(tuple(outputs)):
        if value is old:
            outputs[place] = new
    old.name = editor.fresh_name(f"{name}/before")
    new.name = name
