"""The contract of a graph pass, and how passes are run and recorded."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import msgspec

from .errors import InternalError

if TYPE_CHECKING:
    from .model import Model, TensorSpec

    Interface = tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]


class Refusal(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One place that a pass looked at and left as it was, with the reason."""

    node: str
    rule: str
    reason: str


class PassRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one pass did to one model."""

    name: str
    options: dict[str, object]
    changed: bool
    applied: dict[str, int]
    refused: tuple[Refusal, ...] = ()


@dataclasses.dataclass(kw_only=True)
class Outcome:
    """What `Pass.run` reports: how often each rule was applied, and every refusal."""

    applied: dict[str, int] = dataclasses.field(default_factory=dict)
    refused: list[Refusal] = dataclasses.field(default_factory=list)

    def count(self, rule: str, times: int = 1) -> None:
        """Note that `rule` was applied `times` times."""
        if times:
            self.applied[rule] = self.applied.get(rule, 0) + times

    def refuse(self, node: str, rule: str, reason: str) -> None:
        """Note that `rule` left `node` alone, and why."""
        self.refused.append(Refusal(node=node, rule=rule, reason=reason))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pass:
    """One step that changes a model's graph in place; a subclass's fields are its options.

    `requires` runs before, `ensures` after; both raise an `EdgepressError` when the graph is not
    as the pass needs or promises. `run` may change only what its name says, keeps the graph's
    inputs and outputs (names, order, types, shapes) but for what `interface` announces, and reports
    what it did and refused. The
    smallest example is `graph/cleanup.py: RemoveUnused`.
    """

    @property
    def name(self) -> str:
        """The name in plans and records."""
        return type(self).__name__

    def requires(self, model: Model) -> None:
        """Raise if the pass cannot run on this model at all."""

    def run(self, model: Model) -> Outcome:
        """Change the model's graph in place and say what was done."""
        raise NotImplementedError

    def ensures(self, model: Model) -> None:
        """Raise if the graph is not what the pass promises."""

    def interface(self, before: Interface) -> Interface:
        """The inputs and outputs that the pass leaves, of those that it found: as a rule the same."""
        return before


def run_passes(model: Model, passes: Iterable[Pass]) -> list[PassRecord]:
    """Run passes in order on `model` (changed in place); returns one record per pass.

    Each pass's claim is checked: a graph whose structure changed while nothing was reported, or
    inputs and outputs that differ afterwards, is a bug of the pass.

    Raises:
        InternalError: if a pass breaks its contract.
        EdgepressError: whatever `requires` or `ensures` of a pass raises.
    """
    records = []
    for step in passes:
        step.requires(model)
        promised = step.interface((model.inputs, model.outputs))
        structure_before = model.structure_hash()
        outcome = step.run(model)
        step.ensures(model)
        changed = model.structure_hash() != structure_before
        if changed and not outcome.applied:
            raise InternalError(f"pass {step.name} changed the graph without saying so")
        if (model.inputs, model.outputs) != promised:
            raise InternalError(
                f"pass {step.name} changed the graph's inputs or outputs",
                why=f"promised: {promised}; after: {(model.inputs, model.outputs)}",
            )
        record = PassRecord(
            name=step.name,
            options={field.name: _plain(getattr(step, field.name)) for field in dataclasses.fields(step)},
            changed=changed,
            applied=dict(outcome.applied),
            refused=tuple(outcome.refused),
        )
        model.records.append(record)
        records.append(record)
    return records


def _plain(value: object) -> object:
    """A value as it can stand in JSON: sets sorted, rules and other objects by their name."""
    if isinstance(getattr(value, "name", None), str):  # first: rules are tuples, types are numbers
        return value.name  # type: ignore[attr-defined]
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    if isinstance(value, (frozenset, set)):
        return sorted(str(_plain(item)) for item in value)
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return type(value).__name__
