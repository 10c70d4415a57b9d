"""Choosing forms by time on the target itself: each kind of operator once, in every form it could take."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from ...compress.choice import Verdict
from ...compress.cost import bind_axes
from ...compress.propose import Request, alternatives
from ...runtimes.device import Device
from ...runtimes.timing import Comparison
from ...runtimes.timing_cache import OperatorTiming, TimingCache, ratio_of
from ...targets.profile import Evidence
from .operator_models import WITH_CONVERSIONS, Trial, form_name, trial_of, with_activation
from .operator_times import Choices, TimedKind, place_word, time_kinds

if TYPE_CHECKING:
    import onnx_ir as ir

    from ...compress.plan import Decision
    from ...graph.model import Model
    from ...graph.scheme import IntegerType
    from ...targets.profile import Form, TargetProfile
    from ..reporter import Reporter

MARGIN_FRACTION = 0.02
_SIGNS: tuple[IntegerType, ...] = ("uint8", "int8")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """What timing operators on the target came to.

    Attributes:
        verdicts: node name -> its form and why, for all that were timed.
        in_context: nodes that pay only where their neighbours compute in integers, too: the first to go
            should the whole model turn out slower.
        ratios: node name -> how many times as fast as float it is by itself, conversions counted.
        static_activation: the type of static activations, where another than the profile's was faster.
        operators: how many different operators there are; `timed` of them now, `known` from the cache.
        where: they were timed, in words.
    """

    verdicts: Mapping[str, Verdict] = dataclasses.field(default_factory=dict)
    in_context: frozenset[str] = frozenset()
    ratios: Mapping[str, float] = dataclasses.field(default_factory=dict)
    static_activation: IntegerType | None = None
    operators: int = 0
    timed: int = 0
    known: int = 0
    where: str = "here"

    @property
    def note(self) -> str | None:
        """One line for people, or None if there was nothing to time."""
        if not self.operators:
            return None
        forms = Counter(verdict.form for verdict in self.verdicts.values())
        chosen = ", ".join(f"{count} {form}" for form, count in sorted(forms.items())) or "nothing decided"
        left = self.operators - self.timed - self.known
        skipped = f", {left} left to the profile (out of time, or of unknown size)" if left else ""
        return (
            f"{self.operators} different operators: {self.timed} timed {self.where}, {self.known} known from "
            f"earlier{skipped}; by time {chosen} nodes"
        )


def measure_forms(
    model: Model,
    profile: TargetProfile,
    request: Request,
    *,
    device: Device,
    cache: TimingCache,
    threads: int,
    budget_s: float,
    reporter: Reporter,
    evidence: Evidence = "measured-on-target",
) -> Measured:
    """Time what a plan would quantize, operator by operator, in every form that it could take.

    Each kind (operator, shapes, attributes) is timed once, in a model of its own, in float and in the
    other forms in turn; what the cache knows costs nothing. First come those that the profile has no
    evidence about, then the cheapest: with little time the large ones, which profiles were made from, are
    left out.

    Args:
        model: the float graph that the plan is made for.
        profile: the device's profile.
        request: as for `propose`.
        device: where to time.
        cache: timings of that device.
        threads: of every session.
        budget_s: stop beginning new ones after so many seconds; 0 times nothing and asks the cache only.
        reporter: shows how far it is.
        evidence: the grade of these times for the target.

    Raises:
        RuntimeUnavailable: if the device goes away; what was timed until then is in the cache.
    """
    offered = alternatives(model, profile, request)
    trials = _trials(model, offered, bind_axes(model, request.shapes))
    sign_choices = _sign_choices(profile, request)
    choices = [[*usual, *_other_signs(usual, sign_choices)] for _, usual in trials]
    kinds = [TimedKind(trial=trial, choices=item) for (trial, _), item in zip(trials, choices, strict=True)]
    found, known = time_kinds(
        kinds, device=device, cache=cache, threads=threads, budget_s=budget_s, reporter=reporter
    )
    timed = len(found) - known
    told = place_word(device)
    activation = _faster_sign(found, profile, trials)
    verdicts: dict[str, Verdict] = {}
    alone: dict[str, Comparison] = {}
    for index, timings in found.items():
        trial, usual = trials[index]
        made = _verdict(trial, usual, timings, activation, where=told, evidence=evidence)
        if made is not None:
            verdicts |= dict.fromkeys(trial.nodes, made[0])
            alone |= dict.fromkeys(trial.nodes, made[1])
    quantized = {name: item for name, item in alone.items() if verdicts[name].form != "float"}
    return Measured(
        verdicts=verdicts,
        in_context=frozenset(
            name
            for name, item in quantized.items()
            if verdicts[name].form == "static" and not item.is_faster(MARGIN_FRACTION)
        ),
        ratios={name: item.ratio for name, item in quantized.items()},
        static_activation=activation,
        operators=len(trials),
        timed=timed,
        known=known,
        where=told,
    )


def _trials(
    model: Model, offered: Mapping[str, Sequence[Decision]], sizes: Mapping[str, int]
) -> list[tuple[Trial, Choices]]:
    """One trial per kind of operator, the most urgent first, with the decisions of each form."""
    nodes = {node.name: node for node in model.graph.all_nodes() if node.name in offered}
    groups: dict[str, list[str]] = {}
    for name, decisions in offered.items():
        groups.setdefault(decisions[0].group, []).append(name)
    kinds: dict[tuple[Any, ...], tuple[Trial, Choices]] = {}
    for names in groups.values():
        members: list[ir.Node] = [nodes[name] for name in names]
        firsts = [offered[name][0] for name in names]
        made = trial_of(members, firsts, sizes)
        if made is None:
            continue
        forms = [item.form for item in offered[names[0]]]
        choices = [[item for name in names for item in offered[name] if item.form == form] for form in forms]
        choices = [choice for choice in choices if len(choice) == len(names)]
        key = (made.operator, made.shapes, made.attributes, tuple(forms))
        if key in kinds:
            alike = kinds[key][0]
            made = dataclasses.replace(alike, nodes=(*alike.nodes, *made.nodes))
            kinds[key] = made, kinds[key][1]
        else:
            kinds[key] = made, choices
    return sorted(kinds.values(), key=_urgency)


def _urgency(item: tuple[Trial, Choices]) -> tuple[Any, ...]:
    """What nothing is known of first, then the cheapest."""
    trial = item[0]
    known = trial.decisions[0].evidence != "none"
    return known, trial.macs or 0, trial.operator, trial.shapes


def _sign_choices(profile: TargetProfile, request: Request) -> tuple[IntegerType, ...]:
    """Types of static activations other than the profile's first that it has kernels for."""
    if request.static_activation is not None:
        return ()
    usual = profile.static_activation_type
    others = []
    for sign in _SIGNS:
        kernels = [profile.kernel(op, "static", activation=sign, weight="int8") for op in ("Conv", "MatMul")]
        speeds = [kernel.speedup_over_float or 1.0 for kernel in kernels if kernel is not None]
        if sign != usual and len(speeds) == len(kernels) and min(speeds) >= 1.0:
            others.append(sign)
    return tuple(others)


def _other_signs(choices: Choices, signs: Sequence[IntegerType]) -> Choices:
    static = [choice for choice in choices if choice[0].form == "static"]
    return [[with_activation(item, sign) for item in choice] for sign in signs for choice in static]


def _faster_sign(
    found: Mapping[int, Mapping[str, OperatorTiming]],
    profile: TargetProfile,
    trials: Sequence[tuple[Trial, Choices]],
) -> IntegerType | None:
    """The other type of static activations, if all operators together are faster with it by the margin."""
    usual = profile.static_activation_type
    best: tuple[float, IntegerType] | None = None
    for sign in _SIGNS:
        pairs = [
            (len(trials[index][0].nodes), timings[f"static-{usual}"], timings[f"static-{sign}"])
            for index, timings in found.items()
            if sign != usual and {f"static-{usual}", f"static-{sign}"} <= timings.keys()
        ]
        if not pairs:
            continue
        rounds = min(len(item.pair_ratios) for _, *both in pairs for item in both)
        ratios = [
            sum(count * one.float_p50_ms / one.pair_ratios[place] for count, one, _ in pairs)
            / sum(count * other.float_p50_ms / other.pair_ratios[place] for count, _, other in pairs)
            for place in range(rounds)
        ]
        against = ratio_of(ratios, f"static-{usual}", f"static-{sign}")
        if against.is_faster(MARGIN_FRACTION) and (best is None or against.ratio > best[0]):
            best = against.ratio, sign
    return None if best is None else best[1]


def _verdict(
    trial: Trial,
    choices: Choices,
    timings: Mapping[str, OperatorTiming],
    activation: IntegerType | None,
    *,
    where: str,
    evidence: Evidence,
) -> tuple[Verdict, Comparison] | None:
    """What the timings say of an operator, and how it stands against float by itself, with conversions.

    The form that the plan would take is kept unless another is faster by the margin and in every pair of
    sessions; float counts as another. A static form gives way to float only where float is faster even
    between integers, where it needs the conversions and the integer form does not.
    """
    usual, *others = [_signed(decisions[0], activation) for decisions in choices]
    if usual[0] not in timings:
        return None
    name, form = usual
    for other, other_form in others:
        if other in timings and _against(timings[name], timings[other]).is_faster(MARGIN_FRACTION):
            name, form = other, other_form
    chosen = timings[name].comparison
    told = f"timed {where}, {trial.operator} of this size: {_told(chosen, name)}"
    with_conversions = timings.get(f"{name}{WITH_CONVERSIONS}")
    if with_conversions is None:
        form = "float" if chosen.is_slower(MARGIN_FRACTION) else form
        return Verdict(form=form, reason=told, evidence=evidence), chosen
    outside = with_conversions.comparison
    told = f"{told}; {_told(outside, 'with its conversions')}"
    if _beside_integers(timings[name], with_conversions).is_slower(MARGIN_FRACTION):
        form = "float"
    return Verdict(form=form, reason=told, evidence=evidence), outside


def _beside_integers(inside: OperatorTiming, outside: OperatorTiming) -> Comparison:
    """The integer form against float with conversions around it (they cost what they cost the former)."""
    ratios = []
    for within, without in zip(inside.pair_ratios, outside.pair_ratios, strict=False):
        integer_ms, converted_ms = inside.float_p50_ms / within, outside.float_p50_ms / without
        ratios.append((inside.float_p50_ms + max(0.0, converted_ms - integer_ms)) / integer_ms)
    return ratio_of(ratios, "float with conversions", inside.key.form)


def _signed(decision: Decision, activation: IntegerType | None) -> tuple[str, Form]:
    signed = decision if activation is None else with_activation(decision, activation)
    return form_name(signed), decision.form


def _against(one: OperatorTiming, other: OperatorTiming) -> Comparison:
    """`other` against `one`, pair by pair, both known against float."""
    pairs = zip(one.pair_ratios, other.pair_ratios, strict=False)
    return ratio_of([second / first for first, second in pairs], one.key.form, other.key.form)


def _told(comparison: Comparison, what: str) -> str:
    return f"{what} {comparison.ratio:.2f}x of float ({comparison.low:.2f} to {comparison.high:.2f})"


def in_float(measured: Measured, nodes: frozenset[str], reason: str) -> dict[str, Verdict]:
    """The verdicts with some nodes in float, for `reason`."""
    floats = {
        name: msgspec.structs.replace(verdict, form="float", reason=f"{reason} ({verdict.reason})")
        for name, verdict in measured.verdicts.items()
        if name in nodes
    }
    return {**measured.verdicts, **floats}
