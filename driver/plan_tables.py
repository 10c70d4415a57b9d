"""A plan as tables: what each node becomes, why it stays float, and what was refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from ..compress.operands import COMPUTE_OPS, RECURRENT_OPS
from ..compress.plan import Decision, Plan
from ..graph.passes import Refusal
from .output import Block, Table, format_percent
from .pruning_tables import pruning_blocks


def plan_blocks(plan: Plan, *, every_node: bool) -> list[Block]:
    """The plan for people: totals, then nodes (each, or those alike together), then refusals."""
    blocks: list[Block] = [] if plan.pruning is None else pruning_blocks(plan.pruning)
    blocks.append(plan_headline(plan))
    blocks.append(_node_table(plan.decisions) if every_node else _grouped_table(plan.decisions))
    remedies = _remedies(plan.decisions)
    if remedies:
        blocks.append(
            "What could be done about nodes in float:\n"
            + "\n".join(f"  {remedy} ({count} nodes)" for remedy, count in remedies)
        )
    if plan.refusals:
        blocks.append(refusal_table(plan.refusals))
    if plan.notes:
        blocks.append("Notes:\n" + "\n".join(f"  {note}" for note in plan.notes))
    return blocks


def plan_headline(plan: Plan) -> str:
    """One line: how many nodes run in which form, and the share of integer arithmetic."""
    forms = Counter(decision.form for decision in plan.decisions)
    counts = ", ".join(f"{count} {form}" for form, count in sorted(forms.items())) or "no nodes"
    how = "no quantization" if plan.quantization == "none" else f"{plan.quantization} quantization"
    return f"Plan for {plan.target}: {plan.precision}, {how} ({counts}){_integer_share(plan)}."


def _integer_share(plan: Plan) -> str:
    """The share of integer arithmetic, and of how many nodes where not all could be counted."""
    share = plan.integer_share()
    if share is None:
        return ""
    working = [decision for decision in plan.decisions if decision.op in COMPUTE_OPS | RECURRENT_OPS]
    counted = sum(decision.macs is not None for decision in working)
    partial = "" if counted == len(working) else f" of the {counted} nodes whose shapes are known"
    return f"; {format_percent(share)} of the multiply-accumulates{partial} in integers"


def plan_summary(plan: Plan) -> dict[str, object]:
    """What the tables say beyond the plan's own entries: nodes alike together, counted; for --json."""
    return {
        "forms": dict(sorted(Counter(item.form for item in plan.decisions).items())),
        "integer_share_fraction": plan.integer_share(),
        "macs_ratio": None if plan.pruning is None else plan.pruning.macs_ratio,
        "nodes": [
            {"nodes": count, "op": op, "form": form, "reason": reason}
            for (op, form, reason), count in _alike(plan.decisions)
        ],
        "refusals": [
            {"places": count, "rule": rule, "reason": reason}
            for (rule, reason), count in _alike_refusals(plan.refusals)
        ],
        "remedies": [{"nodes": count, "remedy": remedy} for remedy, count in _remedies(plan.decisions)],
    }


def refusal_table(refusals: Iterable[Refusal]) -> Table:
    """Refusals with the same rule and reason together, the most frequent first."""
    rows = tuple((str(count), rule, reason) for (rule, reason), count in _alike_refusals(refusals))
    return Table(
        title="Refused", columns=("places", "rule", "reason"), rows=rows, numeric=frozenset({"places"})
    )


def _alike_refusals(refusals: Iterable[Refusal]) -> list[tuple[tuple[str, str], int]]:
    return Counter((item.rule, item.reason) for item in refusals).most_common()


def _alike(decisions: Iterable[Decision]) -> list[tuple[tuple[str, str, str], int]]:
    return Counter((item.op, str(item.form), item.reason) for item in decisions).most_common()


def _node_table(decisions: Iterable[Decision]) -> Table:
    rows = tuple(
        (
            item.node,
            item.weight or "",
            item.op,
            item.form,
            "" if item.macs is None else f"{item.macs:,}",
            item.evidence,
            item.reason,
        )
        for item in decisions
    )
    columns = ("node", "weight", "op", "form", "MACs", "evidence", "reason")
    return Table(title="Nodes", columns=columns, rows=rows, numeric=frozenset({"MACs"}))


def _grouped_table(decisions: Iterable[Decision]) -> Table:
    rows = tuple((str(count), op, form, reason) for (op, form, reason), count in _alike(decisions))
    return Table(
        title="Nodes", columns=("nodes", "op", "form", "reason"), rows=rows, numeric=frozenset({"nodes"})
    )


def _remedies(decisions: Iterable[Decision]) -> list[tuple[str, int]]:
    return Counter(item.remedy for item in decisions if item.form == "float" and item.remedy).most_common()
