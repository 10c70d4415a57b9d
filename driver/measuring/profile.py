"""What was timed on this machine or a device, for people and as the kernels of a profile."""

from __future__ import annotations

import dataclasses
import statistics
from typing import TYPE_CHECKING

import msgspec

from .operator_models import FLOAT16, WITH_CONVERSIONS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ...runtimes.device import DeviceFeatures
    from ...runtimes.timing_cache import OperatorTiming
    from ...targets.profile import Kernel, TargetProfile

_STATIC = "static-"
_SAME_FRACTION = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelSpeed:
    """What the timings of one kernel, at several sizes, come to.

    Attributes:
        ratio: how many times as fast as float it is, the median over the sizes.
        low, high: the median ends of the sizes' 95 % intervals.
        text: of sizes, noise and day, for the profile's `source`.
    """

    ratio: float
    low: float
    high: float
    text: str

    @property
    def decided(self) -> bool:
        """Whether it is known to be faster, slower, or the same within 5 %."""
        return not self.low < 1 < self.high or max(1 - self.low, self.high - 1) <= _SAME_FRACTION


def kernel_speeds(profile: TargetProfile, timings: Iterable[OperatorTiming]) -> dict[str, KernelSpeed]:
    """The speed of every kernel of a profile that was timed, by the kernel's name."""
    found: dict[str, list[OperatorTiming]] = {}
    for timing in timings:
        kernel = _kernel_of(profile, timing)
        if kernel is not None:
            found.setdefault(kernel.name, []).append(timing)
    return {name: _speed(items) for name, items in found.items()}


def measured_profile(
    profile: TargetProfile, timings: Iterable[OperatorTiming], device: DeviceFeatures, *, name: str
) -> TargetProfile:
    """A machine's profile as one for a file: each kernel that was timed gets its speed, measured on target.

    A kernel's speed is the median over the sizes that were timed, static ones between integer tensors; the
    source names the range, the noise and the day. What was not timed, or not decided, keeps the figures and
    evidence that it had.

    Args:
        profile: the host's, or the device's.
        timings: of this device.
        device: the processor and runtime that they were made on.
        name: of the new profile.
    """
    speeds = {key: item for key, item in kernel_speeds(profile, timings).items() if item.decided}
    kernels = tuple(
        msgspec.structs.replace(
            kernel,
            speedup_over_float=round(speeds[kernel.name].ratio, 2),
            evidence="measured-on-target",
            source=f"timed operator by operator on {device.board or device.core}, {device.runtime} "
            f"{device.runtime_version}, {speeds[kernel.name].text}",
        )
        if kernel.name in speeds
        else kernel
        for kernel in profile.kernels
    )
    return msgspec.structs.replace(
        profile,
        name=name,
        kind="cpu-class" if profile.kind == "host" else profile.kind,
        aliases=(),
        description=f"{device.board or device.core}: {len(speeds)} kernels timed on it, "
        f"{device.runtime} {device.runtime_version}",
        kernels=kernels,
        derived_from=(),
    )


def _kernel_of(profile: TargetProfile, timing: OperatorTiming) -> Kernel | None:
    """The profile's kernel that a timing is of; None where it has none, or conversions are in the timing."""
    key = timing.key
    op = key.operator.split()[-1]  # "3 MatMul": products that read one tensor
    if key.form.endswith(WITH_CONVERSIONS):
        return None
    if key.form.startswith(_STATIC):
        wanted = key.form.removeprefix(_STATIC)
        kernels = profile.candidates(op, forms=("static",))
        return next((item for item in kernels if (item.activation, item.weight) == (wanted, "int8")), None)
    if key.form == FLOAT16:
        kernels = profile.candidates(op, forms=("float",))
        return next((item for item in kernels if item.activation == "float16"), None)
    if key.form == "dynamic":
        return profile.kernel(op, "dynamic", weight="int8")
    if key.form == "weight-only":
        return profile.kernel(op, "weight-only", weight="uint8", granularity="block")
    return None


def _speed(timings: Sequence[OperatorTiming]) -> KernelSpeed:
    ordered = sorted(timings, key=lambda item: item.comparison.ratio)
    middle = statistics.median(item.comparison.ratio for item in ordered)
    bounds = [_interval(item) for item in ordered]
    low, high = (statistics.median(pair[place] for pair in bounds) for place in (0, 1))
    threads = sorted({item.key.threads for item in timings})
    ends = [f"{item.comparison.ratio:.2f} ({_size(item)})" for item in (ordered[0], ordered[-1])]
    sizes = ends[0] if len(timings) == 1 else f"{len(timings)} sizes, from {ends[0]} to {ends[1]}"
    days = sorted({item.date for item in timings if item.date})
    day = "" if not days else f", {days[0]}" if len(days) == 1 else f", {days[0]} to {days[-1]}"
    noise = max(high - middle, middle - low) / middle
    text = f"threads {', '.join(map(str, threads))}: {sizes}; noise {noise:.0%}{day}"
    return KernelSpeed(ratio=middle, low=low, high=high, text=text)


def _interval(timing: OperatorTiming) -> tuple[float, float]:
    """The 95 % interval of a ratio; of too few pairs for one their range."""
    found = timing.comparison
    return found.interval or (found.low, found.high)


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
