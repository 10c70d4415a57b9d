"""What was timed on this machine, for people and as the kernels of a profile."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

import msgspec

from ..targets.profile import Kernel, TargetProfile
from .measured_models import WITH_CONVERSIONS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ..runtimes.device import DeviceFeatures
    from ..runtimes.timing_cache import OperatorTiming

_STATIC = "static-"


def measured_profile(
    profile: TargetProfile, timings: Iterable[OperatorTiming], device: DeviceFeatures, *, name: str
) -> TargetProfile:
    """The host's profile as one for a file: each kernel that was timed gets its speed, measured on target.

    A kernel's speed is the median over the sizes that were timed, static ones between integer tensors;
    the source names the range. What was not timed keeps the figures and evidence that it had.

    Args:
        profile: the host's.
        timings: of this device.
        device: the processor and runtime that they were made on.
        name: of the new profile.
    """
    found: dict[str, list[OperatorTiming]] = {}
    for timing in timings:
        kernel = _kernel_of(profile, timing)
        if kernel is not None:
            found.setdefault(kernel.name, []).append(timing)
    kernels = tuple(
        _with_speed(kernel, found[kernel.name], device) if kernel.name in found else kernel
        for kernel in profile.kernels
    )
    return msgspec.structs.replace(
        profile,
        name=name,
        kind="cpu-class",
        aliases=(),
        description=f"{device.core}: {len(found)} kernels timed on it, "
        f"{device.runtime} {device.runtime_version}",
        kernels=kernels,
        derived_from=(),
    )


def _kernel_of(profile: TargetProfile, timing: OperatorTiming) -> Kernel | None:
    """The profile's kernel that a timing is of, None where it has none or the timing is with conversions."""
    key = timing.key
    op = key.operator.split()[-1]  # "3 MatMul": products that read one tensor
    if key.form.endswith(WITH_CONVERSIONS):
        return None
    if key.form.startswith(_STATIC):
        wanted = key.form.removeprefix(_STATIC)
        kernels = profile.candidates(op, forms=("static",))
        return next((item for item in kernels if (item.activation, item.weight) == (wanted, "int8")), None)
    if key.form == "dynamic":
        return profile.kernel(op, "dynamic", weight="int8")
    if key.form == "weight-only":
        return profile.kernel(op, "weight-only", weight="uint8", granularity="block")
    return None


def _with_speed(kernel: Kernel, timings: Sequence[OperatorTiming], device: DeviceFeatures) -> Kernel:
    ordered = sorted(timings, key=lambda item: item.comparison.ratio)
    ratios = [item.comparison.ratio for item in ordered]
    threads = sorted({item.key.threads for item in timings})
    ends = [f"{item.comparison.ratio:.2f} ({_size(item)})" for item in (ordered[0], ordered[-1])]
    sizes = ends[0] if len(timings) == 1 else f"{len(timings)} sizes, from {ends[0]} to {ends[1]}"
    return msgspec.structs.replace(
        kernel,
        speedup_over_float=round(statistics.median(ratios), 2),
        evidence="measured-on-target",
        source=f"timed operator by operator on {device.core}, {device.runtime} {device.runtime_version}, "
        f"threads {', '.join(map(str, threads))}: {sizes}",
    )


def _size(timing: OperatorTiming) -> str:
    return " * ".join("x".join(map(str, shape)) for shape in timing.key.shapes if shape)


COLUMNS = ("operator", "form", "shapes", "attributes", "threads", "ms", "float ms", "speed", "range")


def timing_rows(timings: Iterable[OperatorTiming]) -> list[tuple[str, ...]]:
    """One row of text per timing, of one operator and size together."""
    rows: list[tuple[str, ...]] = []
    for item in sorted(timings, key=lambda item: (item.key.operator, item.key.shapes, item.key.form)):
        against = item.comparison
        rows.append(
            (
                item.key.operator,
                item.key.form,
                _size(item),
                item.key.attributes,
                str(item.key.threads),
                f"{item.p50_ms:.4f}",
                f"{item.float_p50_ms:.4f}",
                f"{against.ratio:.2f}x",
                f"{against.low:.2f} to {against.high:.2f}",
            )
        )
    return rows


def comment_lines(rows: Sequence[tuple[str, ...]], columns: Sequence[str] = COLUMNS) -> str:
    """A table as comments of TOML, so that what `targets show` prints stays a profile."""
    table = [tuple(columns), *rows]
    widths = [max(len(row[place]) for row in table) for place in range(len(columns))]
    return "\n".join(
        ("# " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))).rstrip()
        for row in table
    )
