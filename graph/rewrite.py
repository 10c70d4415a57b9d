"""The application loop for rewrite rules, indexed by the root's operator."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import onnx_ir as ir

from .edit import Editor, remove_dead
from .model import Model
from .passes import Outcome, Pass

_SWEEPS = 8


class Refused(NamedTuple):
    """A rule recognised its pattern but must leave it; the reason is shown to the user."""

    reason: str


Verdict = bool | Refused


class Rule(Protocol):
    """One local rewrite: a root operator, a match written as plain reading of the graph, a change.

    `apply` returns False when the node is not its pattern at all, `Refused(reason)` when it is but
    the rewrite would be wrong or useless, and True after changing the graph through the editor.
    """

    @property
    def name(self) -> str:
        """The name in records."""
        ...

    @property
    def roots(self) -> frozenset[str]:
        """Operators at which the rule starts (the last node of its pattern)."""
        ...

    def apply(self, node: ir.Node, editor: Editor) -> Verdict:
        """Try the rule at `node`."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rewrite(Pass):
    """Apply rules to every graph and subgraph until none fires; dead nodes are removed."""

    rules: tuple[Rule, ...]

    def run(self, model: Model) -> Outcome:
        """See `Pass.run`."""
        outcome = Outcome()
        editor = Editor(model)
        index = _index(self.rules)
        for _ in range(_SWEEPS):
            refusals: dict[tuple[str, str], str] = {}
            fired = sum(
                _sweep(graph, index, editor, outcome, refusals) for graph in tuple(model.all_graphs())
            )
            if not fired:
                break
            remove_dead(model)
        else:
            outcome.refuse("graph", self.name, f"rules still fire after {_SWEEPS} sweeps: stopped there")
        for (node, rule), reason in refusals.items():
            outcome.refuse(node, rule, reason)
        return outcome


def _index(rules: Sequence[Rule]) -> dict[str, list[Rule]]:
    index: dict[str, list[Rule]] = {}
    for rule in rules:
        for root in sorted(rule.roots):
            index.setdefault(root, []).append(rule)
    return index


def _sweep(
    graph: ir.Graph,
    index: dict[str, list[Rule]],
    editor: Editor,
    outcome: Outcome,
    refusals: dict[tuple[str, str], str],
) -> int:
    fired = 0
    for node in tuple(graph):
        if node.graph is None or node.domain not in ("", "ai.onnx"):
            continue
        for rule in index.get(node.op_type, ()):
            if not any(value.uses() or value.is_graph_output() for value in node.outputs):
                break
            verdict = rule.apply(node, editor)
            if isinstance(verdict, Refused):
                refusals[node.name or str(node.outputs[0].name), rule.name] = verdict.reason
            elif verdict:
                outcome.count(rule.name)
                fired += 1
    return fired
