"""What was cut out of a model, as tables."""

from __future__ import annotations

from ..compress.prune.report import Pruning
from .drift_tables import format_metric
from .output import Block, Table, format_bytes, format_percent

Row = tuple[str, str, str, str]


def pruning_rows(pruning: Pruning | None) -> list[Row]:
    """Rows for the closing table of a compile: before, after, change; the cut's own drift."""
    if pruning is None:
        return []
    rows: list[Row] = [
        (
            "multiply-accumulates",
            f"{pruning.macs_before:,}",
            f"{pruning.macs_after:,}",
            f"{pruning.macs_ratio:.2f}x fewer",
        )
    ]
    for metric, value in pruning.drift.items():
        if metric in ("cosine", "l2", "kl", "flips"):
            rows.append((f"drift of the cut alone, {metric}", "", format_metric(metric, value), ""))
        else:
            rows.append((f"{metric}, by the cut alone", "", "", f"{value * 100:+.2f} points"))
    return rows


def pruning_blocks(pruning: Pruning) -> list[Block]:
    """The cut for people: totals, then every group that got narrower, then the repaired layers."""
    samples = f"repaired on {pruning.samples} samples" if pruning.repaired else "not repaired"
    headline = (
        f"Pruned ({pruning.importance}, {samples}): {pruning.macs_before:,} to "
        f"{pruning.macs_after:,} multiply-accumulates ({pruning.macs_ratio:.2f}x fewer), "
        f"{format_bytes(pruning.weight_bytes_before)} to "
        f"{format_bytes(pruning.weight_bytes_after)} of float weights."
    )
    if pruning.unrepaired:
        headline += f" Not fitted after they lost inputs: {', '.join(pruning.unrepaired)}."
    narrower = tuple(
        (item.name, item.kind, str(item.units), str(item.left), format_percent(item.loss))
        for item in pruning.groups
        if item.left < item.units
    )
    blocks: list[Block] = [
        headline,
        Table(
            title="Cut groups",
            columns=("group", "kind", "units", "left", "predicted loss"),
            rows=narrower,
            numeric=frozenset({"units", "left", "predicted loss"}),
        ),
    ]
    if pruning.repaired:
        rows = tuple(
            (item.node, format_percent(item.before), format_percent(item.after)) for item in pruning.repaired
        )
        blocks.append(
            Table(
                title="Repaired layers (squared error of the result in parts of its energy)",
                columns=("layer", "cut", "repaired"),
                rows=rows,
                numeric=frozenset({"cut", "repaired"}),
            )
        )
    return blocks
