"""Strided shortcuts as convolutions: one integer kernel in place of several that copy."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ...graph.edit import (
    Editor,
    constant,
    int_attribute,
    integers,
    only_use,
    operand,
    remove_dead,
    scalar,
    static_dim,
)
from ...graph.model import Model
from ...graph.passes import Outcome, Pass
from ..plan import Plan
from ..quantize.constants import graph_of
from ..quantize.static import Ranges, static_layout

SHORTCUT = "strided-shortcut"
"""The name under which a recipe's `fusions` switches it."""

_MOST_CHANNELS = 512
_ENDLESS = (1 << 31) - 1
_MARK = "shortcut"


class _Chain(NamedTuple):
    """What some Slices and Pads take together: every so many positions, between new channels of zeros."""

    source: ir.Value
    result: ir.Value
    nodes: tuple[ir.Node, ...]
    strides: tuple[int, int]
    padding: tuple[int, int]


def copied_channels(node: ir.Node) -> npt.NDArray[np.int64] | None:
    """Which channel each output of a 1x1 convolution copies, shape (outputs,), -1 where it is zero.

    None unless every row of its weight is zero but for at most one 1, and it has neither groups, padding nor
    a bias.
    """
    weight = constant(node.inputs[1]) if node.op_type == "Conv" and not node.domain else None
    pads = node.attributes.get("pads")
    if weight is None or operand(node, 2) is not None or int_attribute(node, "group", 1) != 1:
        return None
    padded = (pads is not None and any(pads.as_ints())) or "auto_pad" in node.attributes
    if padded or any(size != 1 for size in weight.shape[2:]):
        return None
    rows = weight.reshape(weight.shape[:2])
    ones = rows == 1.0
    if not ((rows == 0.0) | ones).all() or (ones.sum(axis=1) > 1).any():
        return None
    return np.where(ones.any(axis=1), ones.argmax(axis=1), -1)


def shortcuts(model: Model, plan: Plan) -> list[str]:
    """Names of the last nodes of the chains that a static plan runs in integers and a Conv can replace."""
    layout = static_layout(model, plan.decisions)
    return [
        str(chain.nodes[-1].name)
        for chain in _chains(model)
        if str(chain.result.name) in layout.source
        and layout.source[str(chain.result.name)] == layout.source.get(str(chain.source.name))
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvolveShortcuts(Pass):
    """Slices with steps and a Pad of channels -> one 1x1 convolution with strides that copies channels.

    Between Q/DQ of one scale it copies integers exactly. A residual net's shortcut of this kind is three
    passes over memory, and onnxruntime's Slice and Pad work element by element; its integer 1x1
    convolution over so few positions is cheaper.
    """

    nodes: tuple[str, ...]

    def run(self, model: Model) -> Outcome:
        """See `Pass.run`."""
        outcome, editor = Outcome(), Editor(model)
        for chain in list(_chains(model)):
            last = chain.nodes[-1]
            if last.name not in self.nodes:
                continue
            channels = static_dim(chain.source, 1) or 0
            before, after = chain.padding
            weight = np.zeros((before + channels + after, channels, 1, 1), np.float32)
            weight[before + np.arange(channels), np.arange(channels)] = 1.0
            stem = f"{last.name}/{_MARK}"
            made = editor.node(
                "Conv",
                [chain.source, editor.tensor(ir.tensor(weight), f"{stem}.weight", graph_of(last))],
                {"kernel_shape": [1, 1], "strides": list(chain.strides)},
                after=last,
                stem=stem,
                like=chain.result,
            )
            editor.replace(chain.result, made.outputs[0])
            outcome.count(SHORTCUT)
        if outcome.applied:
            remove_dead(model)
        return outcome


def convolved(plan: Plan, before: Model, after: Model, ranges: Ranges) -> tuple[Plan, Ranges]:
    """The plan and the ranges of a graph behind `ConvolveShortcuts`: what is copied keeps its range.

    Args:
        plan: for the graph `before`.
        before: the graph that the pass was given.
        after: the graph that it made.
        ranges: tensor name -> (minimum, maximum), of `before`.
    """
    pattern = next(item for item in plan.decisions if item.form == "static" and item.op == "Conv")
    known = {node.name for node in before.graph}
    made, added = dict(ranges), []
    layout = static_layout(before, plan.decisions)
    for node in after.graph:
        weight = node.inputs[1] if node.op_type == "Conv" else None
        if node.name in known or weight is None or copied_channels(node) is None:
            continue
        decision = msgspec.structs.replace(
            pattern,
            node=str(node.name),
            group=str(node.name),
            weight=weight.name,
            reason="copies integers in one kernel instead of several",
            macs=None,
        )
        added.append(decision)
        source = "" if node.inputs[0] is None else str(node.inputs[0].name)
        made[str(node.outputs[0].name)] = ranges[layout.source.get(source, source)]
    return plan.with_decisions([*plan.decisions, *added]), made


def copies(model: Model, names: Sequence[str]) -> dict[str, str]:
    """Tensors among `names` that a copying 1x1 convolution makes without a stride -> what it copies."""
    found = {}
    for node in model.graph:
        if node.op_type != "Conv" or str(node.outputs[0].name) not in names or node.inputs[0] is None:
            continue
        if copied_channels(node) is not None and str(node.inputs[0].name) in names:
            found[str(node.outputs[0].name)] = str(node.inputs[0].name)
    return found


def _chains(model: Model) -> list[_Chain]:
    """The longest chains of each kind, those first that come first in the graph."""
    found, inside = [], set[int]()
    for node in model.graph:
        if id(node) in inside or _strides(node) is None:
            continue
        chain = _chain_from(node)
        if chain is not None:
            found.append(chain)
            inside.update(id(member) for member in chain.nodes)
    return found


def _chain_from(first: ir.Node) -> _Chain | None:
    source, strides, padding = first.inputs[0], (1, 1), (0, 0)
    channels = static_dim(source, 1)
    if source is None or channels is None or channels > _MOST_CHANNELS:
        return None
    nodes: list[ir.Node] = []
    node: ir.Node | None = first
    while node is not None:
        steps, added = _strides(node), _padding(node)
        if steps is not None:
            strides = strides[0] * steps[0], strides[1] * steps[1]
        elif added is not None:
            padding = padding[0] + added[0], padding[1] + added[1]
        else:
            break
        nodes.append(node)
        if node.outputs[0].is_graph_output():
            break
        node = only_use(node.outputs[0])
    if len(nodes) < 2 or strides == (1, 1) or nodes[-1].outputs[0].is_graph_output():
        return None
    return _Chain(source, nodes[-1].outputs[0], tuple(nodes), strides, padding)


def _strides(node: ir.Node) -> tuple[int, int] | None:
    """The steps of a Slice that takes every so many rows and columns of images, from the first on."""
    if node.op_type != "Slice" or node.domain or _image_rank(node) != 4:
        return None
    starts, ends = integers(operand(node, 1)), integers(operand(node, 2))
    axes = integers(operand(node, 3))
    steps = integers(operand(node, 4))
    if starts is None or ends is None or axes is None or steps is None or any(starts):
        return None
    taken: Mapping[int, int] = dict(zip(axes, steps, strict=True))
    whole = all(
        end >= min(_ENDLESS, static_dim(node.inputs[0], axis) or _ENDLESS)
        for end, axis in zip(ends, axes, strict=True)
    )
    if not whole or not set(taken) <= {2, 3} or any(step < 1 for step in steps):
        return None
    return taken.get(2, 1), taken.get(3, 1)


def _padding(node: ir.Node) -> tuple[int, int] | None:
    """Channels of zeros that a Pad puts before and behind those of images; None if it does more."""
    if node.op_type != "Pad" or node.domain or _image_rank(node) != 4 or operand(node, 3) is not None:
        return None
    mode, amounts = node.attributes.get("mode"), integers(operand(node, 1))
    filler = operand(node, 2)
    plain = (mode is None or mode.as_string() == "constant") and (filler is None or scalar(filler) == 0.0)
    if not plain or amounts is None or len(amounts) != 8 or any(amount < 0 for amount in amounts):
        return None
    if any(amounts[place] for place in (0, 2, 3, 4, 6, 7)):
        return None
    return amounts[1], amounts[5]


def _image_rank(node: ir.Node) -> int | None:
    shape = None if not node.inputs or node.inputs[0] is None else node.inputs[0].shape
    return None if shape is None else len(shape)
