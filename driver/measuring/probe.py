"""`edgepress targets probe --measure`: a standard set of operators timed, and put into a profile."""

from __future__ import annotations

import argparse
import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ...runtimes.device import LocalDevice
from ...runtimes.timing_cache import TimingCache
from ...targets.host import runtime_version
from ...targets.registry import load_target, to_toml
from ..cache import cache_folder
from ..output import Answer
from .device_planning import planning_device
from .operator_times import time_kinds
from .probe_models import probed_kinds
from .profile import KernelSpeed, comment_lines, kernel_speeds, measured_profile, timing_rows
from .profile_file import check_place, write_profile

if TYPE_CHECKING:
    from ...runtimes.device import Device
    from ...targets.profile import TargetProfile
    from ..reporter import Reporter

_HOST = "host"
MAX_TIME_S = 300


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probed:
    """What timing the standard set came to.

    Attributes:
        profile: the device's, with the kernels that were timed on it.
        cache: every timing of this device, also those of compiles.
        operators: how many operators there are in the set; `timed` of them now, `known` from earlier.
        undecided: kernels whose timings are too noisy to say more; the profile keeps what it had.
    """

    profile: TargetProfile
    cache: TimingCache
    operators: int
    timed: int
    known: int
    undecided: dict[str, KernelSpeed]

    @property
    def left(self) -> int:
        """How many were not begun."""
        return self.operators - self.timed - self.known


def run(arguments: argparse.Namespace, reporter: Reporter) -> Answer:
    """Time the standard set here or on the device that is named, and answer with the profile.

    Raises:
        RecipeError: if several devices are named.
        NotSupported: if the device is emulated.
        OutputError: if the profile cannot be exported.
        RuntimeUnavailable: if the device goes away; the next attempt goes on from what was timed.
    """
    export = None if arguments.export is None else check_place(Path(arguments.export))
    with planning_device(arguments, reporter, version=runtime_version()) as found:
        if found is None:
            device: Device = LocalDevice()
            profile = load_target(_HOST)
        else:
            from ..devices.checks import device_profile

            device = found[0]
            profile = device_profile(found[0].board, device.features().runtime_version)
        threads = arguments.threads or (found[1].threads if found is not None else None) or 1
        probed = probe(
            device,
            profile,
            cache=TimingCache(cache_folder(), device.features()),
            threads=threads,
            budget_s=MAX_TIME_S if arguments.max_time is None else arguments.max_time,
            name=_name(device) if export is None else export.stem,
            reporter=reporter,
        )
    if export is not None:
        write_profile(export, probed.profile)
        timed = sum(kernel.evidence == "measured-on-target" for kernel in probed.profile.kernels)
        reporter.note(f"{export}: {timed} kernels as timed on {device.name}; use it with --target {export}")
    return _answer(probed)


def probe(
    device: Device,
    profile: TargetProfile,
    *,
    cache: TimingCache,
    threads: int,
    budget_s: float,
    name: str,
    reporter: Reporter,
) -> Probed:
    """Time the standard set on a device, as far as its timings are not known yet.

    Args:
        device: where.
        profile: of that device; what is not timed keeps the figures that it has.
        cache: the device's timings; each is kept as soon as it is made.
        threads: of every session.
        budget_s: stop beginning new ones after so many seconds of timing.
        name: of the new profile.
        reporter: progress.

    Raises:
        RuntimeUnavailable: if the device goes away; what was timed until then is in the cache.
    """
    kinds = probed_kinds(profile)
    found, known = time_kinds(
        kinds, device=device, cache=cache, threads=threads, budget_s=budget_s, reporter=reporter
    )
    timings = cache.timings()
    speeds = kernel_speeds(profile, timings)
    probed = Probed(
        profile=measured_profile(profile, timings, device.features(), name=name),
        cache=cache,
        operators=len(kinds),
        timed=len(found) - known,
        known=known,
        undecided={key: speed for key, speed in speeds.items() if not speed.decided},
    )
    left = f", {probed.left} left for want of time (--max-time; the next run goes on)" if probed.left else ""
    reporter.note(f"{probed.operators} operators: {probed.timed} timed, {known} known from earlier{left}")
    for key, speed in probed.undecided.items():
        reporter.note(
            f"undecided: {key} runs at {speed.low:.2f} to {speed.high:.2f}x of float; the profile keeps what "
            "it had"
        )
    return probed


def _name(device: Device) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", device.name.lower()).strip("-.") if device.name else _HOST


def _answer(probed: Probed) -> Answer:
    timings = probed.cache.timings()
    document = {
        **msgspec.to_builtins(probed.profile),
        "timings": timings,
        "timings_file": str(probed.cache.path),
        "probe": {
            "operators": probed.operators,
            "timed": probed.timed,
            "known": probed.known,
            "left": probed.left,
            "undecided": {
                key: {"ratio": speed.ratio, "low": speed.low, "high": speed.high}
                for key, speed in probed.undecided.items()
            },
        },
    }
    blocks = [to_toml(probed.profile).rstrip("\n")]
    if timings:
        blocks.append(f"# Operators timed ({probed.cache.path}):\n{comment_lines(timing_rows(timings))}")
    return Answer(document=document, blocks=blocks)
