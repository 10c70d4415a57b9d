"""What a pruning did, as a bundle keeps it: budgets, widths, errors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import msgspec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .coupling import Coupling
    from .curves import Curve
    from .repair import Fitted


Kind = Literal["channels", "neurons", "heads", "stream"]
Importance = Literal["obs", "activation", "magnitude", "batchnorm"]
"""How units are ranked: what is lost after the others took over (optimal brain surgeon), what they put into
their readers, their weights, or their batch normalisation's scale."""
Repair = Literal["least-squares", "thorough"]
"""How a cut model is repaired: each layer in closed form, or then by gradients with the one before it too."""


class PrunedGroup(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One group of units that go or stay alike.

    Attributes:
        name: of the first weight that makes them.
        kind: channels, neurons, heads, or a stream that layers add to.
        units: how many there were; `left` how many there are.
        removed: places of the units that went, counted in the order of the first axis that has them.
        loss: what the model's outputs lose by this group alone, mean square in parts of their variance, as
            it was predicted before anything was cut.
    """

    name: str
    kind: Kind
    units: int
    left: int
    removed: tuple[int, ...] = ()
    loss: float = 0.0


class RepairedLayer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The error of one layer's result, in parts of its energy, before and after its weights were fitted.

    `together` says whether it was then fitted further, together with the layer that makes its inputs.
    """

    node: str
    before: float
    after: float
    together: bool = False


class Pruning(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was cut out of a model and how it was repaired.

    Attributes:
        importance: how units were ranked.
        macs_before, macs_after: multiply-accumulates of one sample at the planned shapes.
        weight_bytes_before, weight_bytes_after: of the float weights.
        groups: every group that could be cut.
        repaired: every layer that was fitted anew, in order.
        unrepaired: layers that lost inputs and keep their weights: least squares has no form for them.
        samples: calibration samples that it was fitted on.
        output_error: mean squared error of the repaired model's outputs in parts of their variance, on
            calibration samples; None without data.
        drift: of the repaired float model against the source on the evaluation data, metric by metric.
        kept: why the other elements of the graph stay, and how many groups for each reason.
    """

    importance: Importance
    macs_before: int
    macs_after: int
    weight_bytes_before: int
    weight_bytes_after: int
    groups: tuple[PrunedGroup, ...]
    repaired: tuple[RepairedLayer, ...] = ()
    unrepaired: tuple[str, ...] = ()
    samples: int = 0
    output_error: float | None = None
    drift: dict[str, float] = {}
    kept: dict[str, int] = {}

    @property
    def macs_ratio(self) -> float:
        """How many times fewer multiply-accumulates there are."""
        return self.macs_before / self.macs_after if self.macs_after else 1.0


def pruned_groups(curves: Sequence[Curve], widths: Sequence[int]) -> tuple[PrunedGroup, ...]:
    """What became of each group."""
    found = []
    for curve, left in zip(curves, widths, strict=True):
        places = {unit: place for place, unit in enumerate(curve.group.units)}
        found.append(
            PrunedGroup(
                name=curve.group.name,
                kind=curve.group.kind,
                units=len(curve.group.units),
                left=left,
                removed=tuple(sorted(places[unit] for unit in curve.removed(left))),
                loss=float(curve.losses()[left]),
            )
        )
    return tuple(found)


def repaired_layers(fitted: Sequence[Fitted]) -> tuple[RepairedLayer, ...]:
    """What the repair did, layer by layer."""
    return tuple(
        RepairedLayer(node=item.node, before=item.before, after=item.after, together=item.together)
        for item in fitted
    )


def reasons_kept(coupling: Coupling) -> dict[str, int]:
    """Why groups cannot be cut, and how many for each reason."""
    counts: dict[str, int] = {}
    for group in coupling.groups:
        reason = None if group.blocked is None else f"{group.blocked.op}: {group.blocked.reason}".lstrip(": ")
        if group.normalised and reason is None:
            reason = "a normalisation runs over it: a cut would change its mean"
        if reason is not None:
            counts[reason] = counts.get(reason, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))
