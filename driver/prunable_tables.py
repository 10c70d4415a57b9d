"""What `edgepress inspect --prunable` tells: which units of a model can be cut, and why the rest cannot."""

from __future__ import annotations

import msgspec

from ..compress.cost import bind_axes
from ..compress.prune.coupling import couple, group_macs, why_kept, work_macs
from ..compress.prune.spaces import Frozen
from ..compress.prune.tracer import WeightUse
from ..graph.cleanup import exact_cleanup
from ..graph.model import Model
from ..graph.passes import run_passes
from .output import Block, Table, format_percent


class Kept(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What stands in the way of a cut: a node ("" for none in particular), its operator, what it does."""

    node: str
    op: str
    reason: str


class PrunableGroup(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Units that go or stay one by one.

    Attributes:
        name: of the weight that makes them, or of one that reads them.
        kind: channels, neurons, heads, or the stream that several layers add to.
        units: how many there are.
        width: elements of a unit.
        macs_fraction: of the model's multiply-accumulates, those that depend on the units.
        makers: weights that make the units.
        readers: weights that sum over them.
        kept: why none of them can be cut; None if they can.
    """

    name: str
    kind: str
    units: int
    width: int
    macs_fraction: float
    makers: tuple[str, ...]
    readers: tuple[str, ...]
    kept: Kept | None


class Prunable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All groups of a model, and the sizes of dynamic axes at which work was counted."""

    macs: int
    sizes: dict[str, int]
    groups: tuple[PrunableGroup, ...]


def find_prunable(model: Model) -> Prunable:
    """Clean a fork of the model up, as a compile does first, and sort its axes into groups."""
    fork = model.fork()
    run_passes(fork, exact_cleanup())
    coupling = couple(fork)
    sizes = bind_axes(fork, {})
    macs = work_macs(coupling, sizes)
    total = sum(macs)
    shares = group_macs(coupling, macs)
    groups = tuple(
        PrunableGroup(
            name=group.name,
            kind=group.kind,
            units=len(group.units),
            width=group.width,
            macs_fraction=share / total if total else 0.0,
            makers=_names(group.makers),
            readers=_names(group.readers),
            kept=_kept(why),
        )
        for group, share, why in zip(coupling.groups, shares, why_kept(coupling), strict=True)
    )
    return Prunable(macs=round(total), sizes=sizes, groups=groups)


def _names(uses: tuple[WeightUse, ...]) -> tuple[str, ...]:
    """Each weight once, in the order of the graph."""
    return tuple(dict.fromkeys(use.value.name or use.node.name or "" for use in uses))


def _kept(why: Frozen | None) -> Kept | None:
    return None if why is None else Kept(node=why.node, op=why.op, reason=why.reason)


_COLUMNS = ("group", "kind", "units", "width", "MACs")


def prunable_blocks(found: Prunable) -> list[Block]:
    """The groups that can be cut, and the others with the node that stands in the way."""
    free = [group for group in found.groups if group.kept is None]
    kept = [(group, group.kept) for group in found.groups if group.kept is not None]
    numeric = frozenset(_COLUMNS[2:])
    blocks: list[Block] = []
    if free:
        counted = ("makers", "readers")
        blocks.append(
            Table(
                title="Can be cut",
                columns=(*_COLUMNS, *counted),
                rows=tuple((*_facts(item), str(len(item.makers)), str(len(item.readers))) for item in free),
                numeric=numeric | set(counted),
            )
        )
    if kept:
        blocks.append(
            Table(
                title="Cannot be cut",
                columns=(*_COLUMNS, "node", "op", "why"),
                rows=tuple((*_facts(item), why.node, why.op, why.reason) for item, why in kept),
                numeric=numeric,
            )
        )
    at = ", ".join(f"{name} = {size}" for name, size in found.sizes.items())
    blocks.append(
        f"{len(free)} of {len(found.groups)} groups can be cut. MACs: the share of {found.macs:,} "
        f"multiply-accumulates{f' at {at}' if at else ''} that depends on a group; work between two groups "
        "counts for both."
    )
    return blocks


def _facts(group: PrunableGroup) -> tuple[str, ...]:
    return (
        group.name,
        group.kind,
        str(group.units),
        str(group.width),
        format_percent(group.macs_fraction),
    )
