"""What hangs together in a graph: `couple` traces every axis and sorts the elements into groups."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ...graph.model import Model
from ..cost import concrete_shape, node_macs
from . import rules_layers, rules_layout, rules_norms, rules_pointwise, rules_reshape
from .report import Kind
from .spaces import Classes, Frozen
from .tracer import Adjustment, Rule, Tracer, WeightUse

_STANDARD = {
    **dict.fromkeys(rules_pointwise.UNARY, rules_pointwise.unary),
    **dict.fromkeys(rules_pointwise.BROADCAST, rules_pointwise.broadcast),
    **dict.fromkeys(rules_pointwise.REDUCTIONS, rules_pointwise.reduction),
    **dict.fromkeys(rules_pointwise.POOLS, rules_pointwise.pooling),
    **dict.fromkeys(rules_pointwise.ALONG, rules_pointwise.along),
    **dict.fromkeys(("ArgMax", "ArgMin"), rules_pointwise.arg_extreme),
    **dict.fromkeys(("LSTM", "GRU", "RNN"), rules_layers.recurrent),
    **dict.fromkeys(("BatchNormalization", "InstanceNormalization"), rules_norms.per_channel),
    **dict.fromkeys(
        ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"),
        rules_norms.layer_normalisation,
    ),
    "Attention": rules_norms.attention,
    "CastLike": rules_pointwise.first_input,
    "Concat": rules_layout.concat,
    "Conv": rules_layers.convolution,
    "ConvTranspose": rules_layers.transposed_convolution,
    "DepthToSpace": rules_layout.depth_to_space,
    "Einsum": rules_layers.einsum,
    "Expand": rules_layout.expand,
    "Flatten": rules_reshape.flatten,
    "Gather": rules_pointwise.gather,
    "GatherElements": rules_pointwise.gather_elements,
    "GatherND": rules_pointwise.gather_nd,
    "Gemm": rules_layers.gemm,
    "GridSample": rules_pointwise.sampled,
    "GroupNormalization": rules_norms.group_normalisation,
    "LRN": rules_pointwise.neighbours,
    "MatMul": rules_layers.matmul,
    "Pad": rules_layout.pad,
    "Reshape": rules_reshape.reshape,
    "Resize": rules_layout.resize,
    "RotaryEmbedding": rules_norms.rotary,
    "Shape": rules_pointwise.shape,
    "Slice": rules_layout.slice_,
    "SpaceToDepth": rules_layout.space_to_depth,
    "Split": rules_layout.split,
    "Squeeze": rules_layout.squeeze,
    "Tile": rules_layout.tile,
    "Transpose": rules_layout.transpose,
    "Trilu": rules_pointwise.first_input,
    "Unsqueeze": rules_layout.unsqueeze,
}
_CONTRIB = {
    **dict.fromkeys(("Gelu", "QuickGelu"), rules_pointwise.unary),
    **dict.fromkeys(("BiasGelu", "FastGelu"), rules_pointwise.broadcast),
    **dict.fromkeys(
        ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization"), rules_norms.skip_normalisation
    ),
    "MultiHeadAttention": rules_norms.multi_head_attention,
}
RULES: dict[tuple[str, str], Rule] = {
    **{("", name): rule for name, rule in _STANDARD.items()},
    **{("com.microsoft", name): rule for name, rule in _CONTRIB.items()},
}
"""(domain, operator) -> how its axes hang together."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Elements that any cut treats alike: the outputs of a layer, the heads of an attention.

    Attributes:
        name: of the weight that makes them, "" where none does.
        kind: channels of a convolution, neurons of a product, heads, or the stream that layers add to.
        units: the classes that go or stay one by one, in the order of the first axis that has them.
        width: elements of a unit on that axis (the size of a head).
        makers: weights with an axis that makes these elements.
        readers: weights with an axis that sums over them.
        blocked: why none of the units may go; None if they may.
        normalised: a LayerNormalization runs over them, so a cut changes its mean.
    """

    name: str
    kind: Kind
    units: tuple[int, ...]
    width: int
    makers: tuple[WeightUse, ...]
    readers: tuple[WeightUse, ...]
    blocked: Frozen | None
    normalised: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coupling:
    """All that is known of how the axes of one model hang together.

    Attributes:
        model: the model that was traced; a cut is made on a fork of it.
        tracer: spaces of axes, uses of weights, adjustments, work.
        classes: the solved relation.
        groups: every group that some weight makes or reads, prunable or not.
    """

    model: Model
    tracer: Tracer
    classes: Classes
    groups: tuple[Group, ...]

    @property
    def prunable(self) -> tuple[Group, ...]:
        """The groups whose units may go without changing what a mean runs over."""
        return tuple(group for group in self.groups if group.blocked is None and not group.normalised)

    @property
    def adjustments(self) -> list[Adjustment]:
        """See `Tracer.adjustments`."""
        return self.tracer.adjustments


def couple(model: Model) -> Coupling:
    """Trace a graph and sort the elements of its axes into groups.

    Args:
        model: cleaned up, with shapes inferred; not changed. Time and memory are linear in its axes.

    Source: dependency between layers as Fang et al. 2023, arXiv:2301.12900, here on axes of the graph.
    """
    tracer = Tracer(model, RULES)
    tracer.run()
    classes = tracer.spaces.solve()
    return Coupling(model=model, tracer=tracer, classes=classes, groups=_groups(tracer, classes))


def _groups(tracer: Tracer, classes: Classes) -> tuple[Group, ...]:
    """Group classes by the set of spaces in which they occur."""
    signature = _signatures(classes)
    makers: defaultdict[int, list[WeightUse]] = defaultdict(list)
    readers: defaultdict[int, list[WeightUse]] = defaultdict(list)
    members: defaultdict[int, set[int]] = defaultdict(set)
    widths: dict[int, int] = {}
    for use in tracer.uses.values():
        for axis, role in zip(use.axes, use.roles, strict=True):
            if axis is None or role not in ("out", "in"):
                continue
            labels, counts = np.unique(classes.of(axis), return_counts=True)
            keys = signature[labels]
            for key in np.unique(keys).tolist():
                side = (makers if role == "out" else readers)[key]
                if not side or side[-1] is not use:
                    side.append(use)
                here = keys == key
                members[key].update(labels[here].tolist())
                widths.setdefault(key, int(counts[here].max()))
    normalised = _marked(classes, [axis for axis, _ in tracer.normalised])
    summed = _marked(classes, tracer.sums) | normalised
    heads = _marked(classes, tracer.heads)
    found = []
    for key, labels_here in sorted(members.items(), key=lambda item: min(item[1])):
        units = tuple(sorted(classes.removable(labels_here)))
        blocked = None if units else classes.frozen[min(labels_here)]
        for users, what in ((makers, "makes"), (readers, "sums over")):
            if blocked is None and not users[key]:
                blocked = Frozen("", "", f"no weight {what} these elements")
        units = units or tuple(sorted(labels_here))
        group = Group(
            name=_name(makers[key] or readers[key]),
            kind=_kind(units, makers[key] + readers[key], heads, summed),
            units=units,
            width=widths[key],
            makers=tuple(makers[key]),
            readers=tuple(readers[key]),
            blocked=blocked,
            normalised=bool(normalised & set(units)),
        )
        found.append(group)
    return tuple(found)


def _name(uses: list[WeightUse]) -> str:
    return uses[0].value.name or uses[0].node.name or ""


def _kind(units: tuple[int, ...], uses: list[WeightUse], heads: set[int], summed: set[int]) -> Kind:
    if units[0] in heads:
        return "heads"
    if units[0] in summed:
        return "stream"
    convolves = any(use.node.op_type in ("Conv", "ConvTranspose") for use in uses)
    return "channels" if convolves else "neurons"


def _marked(classes: Classes, spaces: Iterable[int]) -> set[int]:
    """The classes that occur in some of these spaces."""
    found: set[int] = set()
    for root in {classes.roots[space] for space in spaces}:
        found.update(classes.of(root).tolist())
    return found


def _signatures(classes: Classes) -> npt.NDArray[np.uint64]:
    """For each class a number that says in which spaces it occurs; equal sets give equal numbers."""
    roots = sorted(set(classes.roots))
    sizes = [int(classes.starts[root + 1] - classes.starts[root]) for root in roots]
    owner = np.repeat(np.arange(len(roots)), sizes)
    pairs = np.unique(owner * max(classes.count, 1) + classes.labels)
    numbers = np.random.default_rng(0).integers(1, 1 << 63, len(roots), dtype=np.uint64)
    result = np.zeros(classes.count, np.uint64)
    np.add.at(result, pairs % max(classes.count, 1), numbers[pairs // max(classes.count, 1)])
    return result


def work_macs(coupling: Coupling, sizes: Mapping[str, int]) -> list[float]:
    """Multiply-accumulates of each of `tracer.works` as it stands, 0 where a shape stays unknown.

    Args:
        coupling: the traced graph.
        sizes: named dynamic axis -> its size (see `compress.cost.bind_axes`).
    """
    return [float(_macs(work.node, sizes) or 0) for work in coupling.tracer.works]


def _macs(node: ir.Node, sizes: Mapping[str, int]) -> float | None:
    if node.op_type not in ("Attention", "MultiHeadAttention", "Einsum"):
        return node_macs(node, sizes)
    shapes = [concrete_shape(value, sizes) for value in (*node.inputs[:3], node.outputs[0])]
    known = [shape for shape in shapes if shape is not None]
    if len(known) < len(shapes):
        return None
    if node.op_type == "Einsum":
        return _einsum_macs(node, known)
    # Scores and their product with the values: both sum over lengths and the size of a head.
    queries, keys = known[0], known[1]
    return 2.0 * math.prod(queries) * keys[-2]


def _einsum_macs(node: ir.Node, shapes: Sequence[tuple[int, ...]]) -> float:
    terms = node.attributes["equation"].as_string().replace(" ", "").split("->")[0].split(",")
    size = dict[str, int]()
    for letters, shape in zip(terms, shapes, strict=False):
        size.update(zip(letters, shape, strict=False))
    return float(math.prod(size.values()))


def cut_macs(coupling: Coupling, macs: Sequence[float], removed: npt.NDArray[np.bool_]) -> float:
    """Multiply-accumulates that are left when the classes marked in `removed` (one flag each) go."""
    left = dict[int, float]()
    total = 0.0
    for work, whole in zip(coupling.tracer.works, macs, strict=True):
        own = whole
        for space in work.spaces:
            root = coupling.classes.roots[space]
            if root not in left:
                labels = coupling.classes.of(root)
                left[root] = 1.0 - float(removed[labels].mean())
            own *= left[root]
        total += own
    return total


def group_macs(coupling: Coupling, macs: Sequence[float]) -> list[float]:
    """For each group the multiply-accumulates that go with all of its units; shared work counts for each.

    Args:
        coupling: the traced graph.
        macs: of each of `tracer.works` (see `work_macs`).
    """
    owner = np.full(coupling.classes.count, -1, np.int64)
    for place, group in enumerate(coupling.groups):
        owner[list(group.units)] = place
    result = [0.0] * len(coupling.groups)
    for work, whole in zip(coupling.tracer.works, macs, strict=True):
        left = defaultdict[int, float](lambda: 1.0)
        for space in work.spaces:
            owners = owner[coupling.classes.of(space)]
            for place, count in zip(*np.unique(owners[owners >= 0], return_counts=True), strict=True):
                left[int(place)] *= 1.0 - float(count) / len(owners)
        for place, fraction in left.items():
            result[place] += whole * (1.0 - fraction)
    return result


def why_kept(coupling: Coupling) -> list[Frozen | None]:
    """For each group why it is not in `Coupling.prunable`; None if it is."""
    means = dict[int, Frozen]()
    for axis, why in coupling.tracer.normalised:
        for label in coupling.classes.of(axis).tolist():
            means.setdefault(label, why)
    return [
        means[next(unit for unit in group.units if unit in means)]
        if group.blocked is None and group.normalised
        else group.blocked
        for group in coupling.groups
    ]
