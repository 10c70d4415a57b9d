"""What `verify --kernels` answers: a table per device, and everything in one document."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...export.replay_record import Recording
from ...export.replay_results import UnitResult
from ...export.replay_units import is_integer_operator
from ...graph.errors import EXIT_CHECK
from ..output import Answer, Block, Table
from .end_to_end import Apart, EndToEnd
from .fleet import Outcome, exit_code_of

if TYPE_CHECKING:
    from .kernel_replay import KernelReport

_SHOWN = 3
_COLUMNS = ("kernel", "units", "bit-identical", "largest difference", "differ")


def kernel_answer(bundle: Path, recording: Recording, outcomes: Sequence[Outcome[KernelReport]]) -> Answer:
    """Tables for people, a document for programs; exit code 3 if a device computes an integer wrongly."""
    replayed = sum(len(item.places) for item in recording.models)
    blocks: list[Block] = [_coverage(recording, replayed)]
    failed = False
    devices: list[dict[str, Any]] = []
    for outcome in outcomes:
        name, found = outcome.entry.name, outcome.value
        document: dict[str, Any] = {"name": name, "url": outcome.entry.url, "error": None, "report": None}
        devices.append(document)
        if found is None:
            document["error"] = str(outcome.error)
            blocks.append(f"error: {outcome.error}")
            continue
        bad = any(unit.failed for unit in found.units) or found.whole.failed
        failed = failed or bad
        document["report"] = {
            "processor": found.processor,
            "runtime": found.runtime,
            "passed": not bad,
            "kernels": [_row_document(kernel, units) for kernel, units in _by_kernel(found.units).items()],
            "units": found.units,
            "end_to_end": found.whole,
            "notes": found.notes,
        }
        if found.units:
            blocks += [_kernel_table(name, found), *_unit_lines(found)]
        blocks += [_whole_table(name, found.whole), *_kernel_line(found.whole), *found.notes]
    return Answer(
        document={
            "bundle": str(bundle),
            "units": recording.units,
            "replayed": replayed,
            "samples": recording.samples,
            "left_out": dict(recording.left_out),
            "devices": devices,
        },
        blocks=blocks,
        exit_code=exit_code_of(outcomes) or (EXIT_CHECK if failed else 0),
    )


def _coverage(recording: Recording, replayed: int) -> str:
    if not recording.units:
        return "the graph has no integer kernel: only the whole model is compared"
    text = (
        f"{replayed} of {recording.units} kernels replayed ({len(recording.models)} different ones), each on "
        f"what it is fed in {recording.samples} golden samples"
    )
    left = "; ".join(f"{count} not: {reason}" for reason, count in recording.left_out.items())
    return f"{text}; {left}" if left else text


def _by_kernel(units: Sequence[UnitResult]) -> dict[str, list[UnitResult]]:
    found: dict[str, list[UnitResult]] = {}
    for unit in sorted(units, key=lambda item: (not item.integer, item.kernel)):
        found.setdefault(unit.kernel, []).append(unit)
    return found


def _kernel_table(name: str, found: KernelReport) -> Table:
    rows = []
    for kernel, units in _by_kernel(found.units).items():
        same = sum(unit.places for unit in units if unit.state == "identical")
        differ = [unit.unit for unit in units if unit.state != "identical"]
        shown = ", ".join(differ[:_SHOWN]) + (
            f" and {len(differ) - _SHOWN} more" if len(differ) > _SHOWN else ""
        )
        total = sum(unit.places for unit in units)
        rows.append((kernel, str(total), str(same), _largest(units), shown))
    return Table(
        title=f"{name}: {found.processor}",
        columns=_COLUMNS,
        rows=tuple(rows),
        numeric=frozenset({"units", "bit-identical"}),
    )


def _largest(units: Sequence[UnitResult]) -> str:
    found = [unit.difference for unit in units if unit.difference is not None]
    if any(not item.shapes for item in found):
        return "other shapes"
    steps, floats = (
        max((item.steps for item in found), default=0),
        max((item.max_abs for item in found), default=0.0),
    )
    parts = [f"{steps} step{'s' if steps > 1 else ''}"] if steps else []
    if floats:
        parts.append(f"{floats:.2g}")
    if any(unit.state == "not run" for unit in units):
        parts.append("not run")
    return ", ".join(parts) or ("none" if all(item.identical for item in found) else "not finite")


def _row_document(kernel: str, units: Sequence[UnitResult]) -> dict[str, Any]:
    found = [unit.difference for unit in units if unit.difference is not None]
    return {
        "kernel": kernel,
        "integer": all(unit.integer for unit in units),
        "units": sum(unit.places for unit in units),
        "identical": sum(unit.places for unit in units if unit.state == "identical"),
        "rounds_otherwise": sum(unit.places for unit in units if unit.state == "rounds otherwise"),
        "largest_steps": max((item.steps for item in found), default=0),
        "largest_max_abs": max((item.max_abs for item in found), default=0.0),
        "differ": [unit.unit for unit in units if unit.state != "identical"],
    }


def _unit_lines(found: KernelReport) -> list[str]:
    """Every reason once, with the units that it concerns."""
    reasons: dict[tuple[str, str], list[UnitResult]] = {}
    for unit in found.units:
        if unit.state != "identical":
            reasons.setdefault((unit.state, _why(unit)), []).append(unit)
    return [
        f"{state}: {sum(unit.places for unit in units)} of {_names(units)}{': ' + why if why else ''}"
        for (state, why), units in reasons.items()
    ]


def _names(units: Sequence[UnitResult]) -> str:
    return " and ".join(sorted({unit.kernel for unit in units}))


def _why(unit: UnitResult) -> str:
    parts = [unit.why] if unit.why else []
    judgement = unit.judgement
    if judgement is not None:
        kind = "steps" if unit.difference is not None and unit.difference.steps else "of the largest value"
        parts.append(
            f"from the operator's definition it is {judgement.device:.3g} {kind} there and "
            f"{judgement.host:.3g} here"
        )
    return "; ".join(parts)


def _whole_table(device: str, whole: EndToEnd) -> Table:
    rows: list[tuple[str, ...]] = []

    def add(name: str, item: Apart | None, remark: str = "") -> None:
        if item is not None:
            same = "yes" if item.identical else "no"
            rows.append(
                (
                    name,
                    same,
                    f"{item.max_abs:.3g}",
                    f"{item.relative_l2:.3g}",
                    f"{item.cosine_distance:.3g}",
                    remark,
                )
            )

    add(
        "the device from this machine", whole.from_here, "" if whole.from_arm is not None else _verdict(whole)
    )
    add("the device from this machine, summing integers as on Arm", whole.from_arm, _verdict(whole))
    tolerance = (
        "within the manifest's tolerance" if whole.within_tolerance else "beyond the manifest's tolerance"
    )
    add("the device from the recorded outputs", whole.from_record, tolerance)
    for name, item in whole.spread.items():
        add(f"this machine from itself: {name}", item)
    add("this machine from the baseline", whole.drift_here)
    add("the device from the baseline", whole.drift_there)
    if whole.error is not None:
        rows.append(("the device", "not run", "", "", "", whole.error))
    return Table(
        title=f"{device}: end to end, worst of {whole.samples} golden samples",
        columns=("outputs of", "bit-identical", "max abs", "relative L2", "cosine distance", ""),
        rows=tuple(rows),
        numeric=frozenset({"max abs", "relative L2", "cosine distance"}),
    )


def _kernel_line(whole: EndToEnd) -> list[str]:
    """The integer kernels that ran end to end, where there are any: those that were replayed, or others."""
    counts = [
        {name: count for name, count in kernels.items() if is_integer_operator(name)}
        for kernels in (whole.kernels, whole.kernels_here)
    ]
    if not any(counts):
        return []
    there, here = (
        ", ".join(f"{count} {name}" for name, count in found.items()) or "none" for found in counts
    )
    more = "the same as here" if counts[0] == counts[1] else f"here {here}"
    return [f"integer kernels end to end: {there} ({more})"]


def _verdict(whole: EndToEnd) -> str:
    found = whole.from_arm or whole.from_here
    if found is None or whole.verdict == "identical":
        return ""
    if whole.verdict == "within the spread":
        return f"within this machine's own spread ({whole.widest:.3g})"
    if not whole.widest:
        return "this machine has no spread of its own"
    return f"{found.far / whole.widest:.2g} times this machine's own spread ({whole.widest:.3g})"
