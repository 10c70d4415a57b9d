"""Two graphs for sensitivity: one that records and disturbs groups, one that replays them quantized."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import msgspec
import onnx_ir as ir

from ..graph.edit import Editor, is_constant, only_use
from ..graph.model import Model
from .lower import apply_plan
from .operands import has_float_output, moves_data, output_tail
from .plan import Decision, Plan
from .quantize.constants import Rounded, Rounding
from .quantize.static import Ranges, static_layout

_UNIT = "edgepress.delta/"
_VISIBLE = frozenset({ir.DataType.FLOAT})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """The nodes of one group, with what they read from outside and what they give.

    Attributes:
        group: the group's name in its plan.
        nodes: names of the nodes in graph order, the Relu or Clip that a kernel absorbs among them.
        inputs: names of computed or fed tensors that the nodes read and do not make.
        outputs: names of float tensors that others read, or that leave the graph.
    """

    group: str
    nodes: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def parts_of(model: Model, plan: Plan) -> tuple[tuple[Part, ...], tuple[str, ...]]:
    """The parts of a plan's quantized groups, and the groups that cannot be taken out of the graph.

    Not taken out are groups with a node in an If, Loop or Scan body, those whose results are not
    float32, and those in another form than integers.

    Args:
        model: the float graph that the plan was made for.
        plan: decisions by node name.
    """
    nodes = {node.name: node for node in model.graph if node.name}
    order = {id(node): place for place, node in enumerate(model.graph)}
    members: dict[str, list[Decision]] = {}
    for decision in plan.quantized():
        members.setdefault(decision.group, []).append(decision)
    parts: list[Part] = []
    for group, decisions in members.items():
        inside = {id(nodes[item.node]): nodes[item.node] for item in decisions if item.node in nodes}
        if len(inside) < len(decisions):
            continue
        for item in decisions:
            inside |= {id(node): node for node in _behind(nodes[item.node], item)}
        part = _part(group, sorted(inside.values(), key=lambda node: order[id(node)]))
        if part is not None:
            parts.append(part)
    known = {part.group for part in parts}
    return tuple(parts), tuple(group for group in plan.groups if group not in known)


def _behind(node: ir.Node, decision: Decision) -> list[ir.Node]:
    """What a static kernel computes together with its node: an absorbed Relu, the bias of a product."""
    if decision.form != "static":
        return []
    tail = output_tail(node)
    if tail is not node.outputs[0]:
        maker = tail.producer()
        return [maker] if maker is not None else []
    reader = only_use(tail)
    if node.op_type == "MatMul" and reader is not None and not has_float_output(node):
        return [reader] if reader.op_type == "Add" else []
    return []


def _part(group: str, nodes: Sequence[ir.Node]) -> Part | None:
    inside = {id(node) for node in nodes}
    made = {id(value) for node in nodes for value in node.outputs}
    inputs: dict[str, None] = {}
    outputs: dict[str, None] = {}
    for node in nodes:
        for value in node.inputs:
            if value is not None and id(value) not in made and not is_constant(value):
                inputs[str(value.name)] = None
        for value in node.outputs:
            if value.is_graph_output() or any(id(use.node) not in inside for use in value.uses()):
                if value.dtype is not None and value.dtype not in _VISIBLE:
                    return None
                outputs[str(value.name)] = None
    if not outputs:
        return None
    return Part(
        group=group,
        nodes=tuple(str(node.name) for node in nodes),
        inputs=tuple(inputs),
        outputs=tuple(outputs),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recorder:
    """The float graph that gives the tensors of parts, and adds an error to any of their results.

    Attributes:
        model: the graph; its own inputs and outputs come first, under their own names.
        outputs: the model's own outputs.
        recorded: tensor -> the output that gives it (before an error is added); inputs of the
            model are not among them.
        deltas: result of a part -> the input that is added to it; zero, of shape (), leaves it.
    """

    model: Model
    outputs: tuple[str, ...]
    recorded: Mapping[str, str]
    deltas: Mapping[str, str]


def recorder(model: Model, parts: Iterable[Part]) -> Recorder:
    """A fork of a float graph that records the tensors of parts, and takes errors to add to them.

    An error that is added to a group's results on float operands is what the group alone causes:
    everything behind it computes as in a model in which only this group is quantized.
    """
    parts = tuple(parts)
    fork = model.fork()
    editor, graph = Editor(fork), fork.graph
    own = tuple(str(value.name) for value in graph.outputs)
    values = {value.name: value for node in graph for value in node.outputs}
    deltas: dict[str, str] = {}
    recorded: dict[str, str] = {}
    wanted = dict.fromkeys(name for part in parts for name in (*part.inputs, *part.outputs))
    # Values first: what is behind an error is named anew, and the names would be taken by then.
    seen = {name: values[name] for name in wanted if name in values}
    for name in dict.fromkeys(name for part in parts for name in part.outputs):
        value = values[name]
        delta = ir.Value(name=f"{_UNIT}{name}", type=ir.TensorType(ir.DataType.FLOAT))
        graph.inputs.append(delta)
        deltas[name] = str(delta.name)
        readers, is_output = tuple(value.uses()), value.is_graph_output()
        moved = editor.value("Add", [value, delta], after=value.producer(), stem=f"{name}/moved", like=value)
        for use in readers:
            use.node.replace_input_with(use.idx, moved)
        if is_output:
            for place, output in enumerate(graph.outputs):
                if output is value:
                    graph.outputs[place] = moved
            value.name = editor.fresh_name(f"{name}/kept")
            moved.name = name
    for name, value in seen.items():
        if not value.is_graph_output():
            graph.outputs.append(value)
        recorded[name] = str(value.name)
    return Recorder(model=fork, outputs=own, recorded=recorded, deltas=deltas)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replay:
    """All parts of a plan, quantized, as one graph of separate pieces.

    Attributes:
        model: the graph.
        feeds: input of it -> the recorded tensor to feed.
        results: for each part, output of the graph -> the tensor whose quantized form it is.
    """

    model: Model
    feeds: Mapping[str, str]
    results: tuple[Mapping[str, str], ...]


def replay(
    model: Model, plan: Plan, parts: Sequence[Part], ranges: Ranges, rounding: Rounding | None = None
) -> Replay:
    """The parts of a plan, cut out and lowered by the passes that lower the whole model.

    Args:
        model: the float graph that the plan was made for.
        plan: the decisions.
        parts: of this plan.
        ranges: tensor name -> (minimum, maximum), for what is static.
        rounding: node name -> the integers of its weight, where they are not the nearest.
    """
    sources = {node.name: node for node in model.graph}
    decisions = {item.node: item for item in plan.quantized()}
    graph = ir.Graph([], [], nodes=[], name="replay", opset_imports=dict(model.graph.opset_imports))
    cut = _Cut(graph)
    made: list[Decision] = []
    rounded: dict[str, Rounded] = {}
    for place, part in enumerate(parts):
        for name in part.nodes:
            node = cut.node(sources[name], place)
            decision = decisions.get(name)
            if decision is not None and decision.group == part.group:
                made.append(msgspec.structs.replace(decision, node=str(node.name)))
                if rounding and name in rounding:
                    rounded[str(node.name)] = rounding[name]
        for name in part.outputs:
            graph.outputs.append(cut.values[place, name])
    pieces = Model(
        ir.Model(graph, ir_version=model.ir.ir_version, functions=()), origin=model.origin, task=model.task
    )
    own = {str(value.name): name for (_, name), value in cut.values.items()}
    wanted = {name: own[name] for name in static_layout(pieces, made).observed}
    known = {**ranges, **missing_ranges(model, wanted.values(), ranges)}
    own_ranges = {copied: known[name] for copied, name in wanted.items()}
    lowered, _ = apply_plan(pieces, plan.with_decisions(made), own_ranges, rounded)
    results: list[dict[str, str]] = [{} for _ in parts]
    places = ((place, name) for place, part in enumerate(parts) for name in part.outputs)
    for output, (place, name) in zip(lowered.outputs, places, strict=True):
        results[place][output.name] = name
    return Replay(model=lowered, feeds=dict(cut.feeds), results=tuple(results))


class _Cut:
    """Copies of nodes in a graph of their own; every part has its own copies, weights are shared."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.values: dict[tuple[int, str], ir.Value] = {}
        self.feeds: dict[str, str] = {}

    def node(self, source: ir.Node, place: int) -> ir.Node:
        """A copy of a node in the part at `place`."""
        made = ir.Node(
            source.domain,
            source.op_type,
            [None if value is None else self._value(value, place) for value in source.inputs],
            list(source.attributes.values()),
            overload=source.overload,
            num_outputs=len(source.outputs),
            version=source.version,
            name=f"{place}/{source.name}",
        )
        for value, copied in zip(source.outputs, made.outputs, strict=True):
            self._like(value, copied, f"{place}/{value.name}")
            self.values[place, str(value.name)] = copied
        self.graph.append(made)
        return made

    def _value(self, source: ir.Value, place: int) -> ir.Value:
        name = str(source.name)
        if (place, name) in self.values:
            return self.values[place, name]
        if is_constant(source):
            if name not in self.graph.initializers:
                weight = ir.Value(name=name, const_value=source.const_value)
                self._like(source, weight, name)
                self.graph.register_initializer(weight)
            return self.graph.initializers[name]
        made = ir.Value()
        self._like(source, made, f"{place}/{name}")
        self.graph.inputs.append(made)
        self.values[place, name] = made
        self.feeds[str(made.name)] = name
        return made

    @staticmethod
    def _like(source: ir.Value, made: ir.Value, name: str) -> None:
        made.name = name
        made.type = copy.copy(source.type)
        made.shape = None if source.shape is None else source.shape.copy()


def missing_ranges(model: Model, names: Iterable[str], ranges: Ranges) -> dict[str, tuple[float, float]]:
    """Ranges of those tensors among `names` that were observed under another tensor's name.

    With every neighbour quantized, a tensor behind a MaxPool or a Reshape has the scale of the one
    in front of it; with the neighbour in float it needs its own, and the same range serves. What a
    Concat joins has the range of the result.
    """
    missing = [name for name in names if name not in ranges]
    if not missing:
        return {}
    values = {value.name: value for value in model.graph.inputs}
    values |= {value.name: value for node in model.graph for value in node.outputs}
    nearby = {name: _range_nearby(values[name], ranges) for name in missing if name in values}
    return {name: limits for name, limits in nearby.items() if limits is not None}


def _range_nearby(value: ir.Value, ranges: Ranges) -> tuple[float, float] | None:
    """The range of the nearest tensor that holds all values of this one."""
    above: ir.Value | None = value
    while above is not None:
        if str(above.name) in ranges:
            return ranges[str(above.name)]
        node = above.producer()
        above = node.inputs[0] if node is not None and moves_data(node) else None
    below = value
    while (reader := only_use(below)) is not None:
        if reader.op_type != "Concat" and not moves_data(reader):
            return None
        below = output_tail(reader) if reader.op_type == "Concat" else reader.outputs[0]
        if str(below.name) in ranges:
            return ranges[str(below.name)]
    return None
