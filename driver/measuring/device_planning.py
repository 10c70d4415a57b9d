"""Choosing by time on a device: whether it is the target at all, and the finished bundle tried there."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import msgspec

from ...export.runs import append_run
from ...graph.errors import NotSupported, OutputError, RecipeError, RuntimeUnavailable, TargetError
from ...runtimes.device import DeviceFeatures
from ...targets.host import HostFacts, base_profile
from ...targets.profile import Evidence
from ...targets.registry import load_target

if TYPE_CHECKING:
    from ...compress.recipe import Recipe
    from ...runtimes.device import Device
    from ...runtimes.device_file import DeviceEntry
    from ...runtimes.ssh_jobs import SshTimer
    from ...targets.profile import TargetProfile
    from ..reporter import Reporter

_RUN_NAME = "device"
_EMULATED = "emulated:"
_SHOWN_FEATURES = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
    """Whether times of a device count for a target.

    Attributes:
        decides: whether choices are made by them.
        evidence: their grade for the target.
        notes: what a person should know about it.
    """

    decides: bool
    evidence: Evidence
    notes: tuple[str, ...] = ()


class DeviceRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The device that a compile timed on, and the grade of its times for the target."""

    name: str
    features: DeviceFeatures
    decides: bool
    evidence: Evidence


@runtime_checkable
class ProcessorReader(Protocol):
    """A device that tells its processor before a runtime is installed there."""

    def processor(self) -> DeviceFeatures:
        """As `Device.features`; `runtime_version` is empty where none is there yet."""


@runtime_checkable
class BundleRunner(Protocol):
    """A device that runs the device runner of a bundle."""

    @property
    def where(self) -> str:
        """How it is reached, to type in a command line."""

    def run_bundle(
        self, bundle: Path, commands: Sequence[str], options: Sequence[str] = ()
    ) -> dict[str, Any]:
        """See `SshDevice.run_bundle`."""


def fit_of(
    profile: TargetProfile, features: DeviceFeatures, *, where: str, allow_unmeasured: bool = False
) -> Fit:
    """Whether a device is the target that a compile is for.

    It is, where the board has the profile's name, or processor and instruction sets are the profile's own:
    `measured-on-target`. The same processor on another board, or a processor of the class that the profile
    stands for, is `measured-elsewhere`.

    Args:
        profile: the target's.
        features: of the device.
        where: what names the device, for errors.
        allow_unmeasured: time on any device, whose times then decide nothing.

    Raises:
        NotSupported: if the target's runtime is another one than what is timed.
        TargetError: if the device is not the target.
    """
    if profile.runtime.name != "onnxruntime":
        raise NotSupported(
            f"a compile for {profile.name} cannot be timed on a device",
            where=where,
            why=f"its runtime is {profile.runtime.name}; devices time onnxruntime on the processor",
            remedy="leave --device out",
        )
    doubt = _misfit(profile, features)
    if doubt is not None and not allow_unmeasured:
        near = base_profile(_facts(features, features.board))
        raise TargetError(
            f"the device does not fit the target {profile.name}",
            where=where,
            why=doubt,
            remedy=f"use --target {near}, or a profile of the device "
            f"(`edgepress targets probe {where} > mine.toml`, then --target ./mine.toml); with "
            "--allow-unmeasured the device is timed all the same, and its times decide nothing",
        )
    name = features.board or features.core
    if doubt is not None:
        note = f"{doubt}: its times are shown, and decide nothing"
        return Fit(decides=False, evidence="none", notes=(note,))
    notes = []
    if features.runtime_version not in ("", profile.runtime.version):
        notes.append(
            f"{name} runs onnxruntime {features.runtime_version}; the profile {profile.name} describes "
            f"{profile.runtime.version}"
        )
    if _is_itself(profile, features):
        return Fit(decides=True, evidence="measured-on-target", notes=tuple(notes))
    kind = "has its processor" if profile.device.board else "is one of its class"
    notes.append(f"timed on {name}, which {kind}: for {profile.name} that is measured elsewhere")
    return Fit(decides=True, evidence="measured-elsewhere", notes=tuple(notes))


def _misfit(profile: TargetProfile, features: DeviceFeatures) -> str | None:
    """Why times of the device say nothing about the target; None if they do."""
    wanted, name = profile.device, features.board or features.core
    if features.architecture != wanted.architecture:
        return f"{name} is {features.architecture}, {profile.name} is {wanted.architecture}"
    lacking = [item for item in wanted.isa_features if item not in features.isa_features]
    if lacking:
        core = f" ({features.core})" if features.board else ""
        return f"{name}{core} lacks {', '.join(lacking)}, which kernels on {profile.name} use"
    if _is_itself(profile, features) or _same_processor(profile, features) or _of_class(profile, features):
        return None
    more = [item for item in features.isa_features if item not in wanted.isa_features]
    if more:
        shown = ", ".join(more[:_SHOWN_FEATURES]) + (", …" if len(more) > _SHOWN_FEATURES else "")
        return f"{name} has {shown} beyond what {profile.name} has: other kernels run there"
    return f"{name} is another processor ({features.core}) than {profile.name}'s ({wanted.core})"


def _is_itself(profile: TargetProfile, features: DeviceFeatures) -> bool:
    if profile.device.board is not None:
        # "Raspberry Pi 5" is the "Raspberry Pi 5 Model B Rev 1.0", and not the "Raspberry Pi 500".
        return _board(features.board or "").startswith(_board(profile.device.board))
    return _same_processor(profile, features)


def _board(name: str) -> str:
    """A board's name to be compared word by word; the 3 Model B+ calls itself a Plus."""
    return f"{name} ".replace(" Plus ", "+ ")


def _same_processor(profile: TargetProfile, features: DeviceFeatures) -> bool:
    same = set(profile.device.isa_features) == set(features.isa_features)
    return same and profile.device.core == features.core


def _of_class(profile: TargetProfile, features: DeviceFeatures) -> bool:
    """Whether the profile stands for a class of processors, and the device belongs to no higher one."""
    name = base_profile(_facts(features, None))
    if profile.device.board is not None or name not in (profile.name, *profile.derived_from):
        return False
    return load_target(name).device.core == profile.device.core


def _facts(features: DeviceFeatures, board: str | None) -> HostFacts:
    """What names a built-in profile of a processor or board."""
    return HostFacts(
        architecture="aarch64" if features.architecture == "aarch64" else "x86-64",
        core=features.core,
        board=board,
        features=frozenset(features.isa_features),
        cores=1,
        caches_bytes={},
        l2_shared=False,
        clock_hz=None,
        memory_bytes=None,
        feature_source="",
        runtime_version=None,
    )


def fit_device(device: Device, profile: TargetProfile, *, allow_unmeasured: bool) -> Fit:
    """`fit_of` a device; a processor that does not fit is told before anything is installed there.

    Raises:
        NotSupported, TargetError: as `fit_of`.
        RuntimeUnavailable: if the device or its runtime does not answer.
    """
    where = f"--device {device.where}" if isinstance(device, BundleRunner) else device.name
    if device.evidence != "measured-on-target":
        raise _emulated(where)
    if isinstance(device, ProcessorReader):
        fit_of(profile, device.processor(), where=where, allow_unmeasured=allow_unmeasured)
    return fit_of(profile, device.features(), where=where, allow_unmeasured=allow_unmeasured)


def record_of(device: Device, fit: Fit | None) -> DeviceRecord | None:
    """What is kept of the device that a compile timed on; None of this machine."""
    if fit is None:
        return None
    return DeviceRecord(
        name=device.name, features=device.features(), decides=fit.decides, evidence=fit.evidence
    )


def try_bundle(device: Device, bundle: Path, recipe: Recipe, reporter: Reporter) -> tuple[str, ...]:
    """Let the device itself check a finished bundle and measure it; the result into the bundle's runs/.

    Args:
        device: one that runs no bundles is left alone.
        bundle: its folder.
        recipe: `skip`, `benchmark_rounds` and `threads` count.
        reporter: progress.

    Returns:
        What to note about it.

    Raises:
        VerifyFailed: if its outputs there are not what it says.
        RuntimeUnavailable: if the device goes away; the bundle is whole all the same.
    """
    if not isinstance(device, BundleRunner):
        return ()
    commands = ("verify",) if "benchmark" in recipe.skip else ("verify", "benchmark")
    options = ["--threads", str(recipe.threads)]
    if len(commands) > 1:
        options += ["--pairs", str(recipe.benchmark_rounds)]
    with reporter.stage(f"{' and '.join(commands)} on {device.name}"):
        try:
            found = device.run_bundle(bundle, commands, options)
        except RuntimeUnavailable as error:
            raise RuntimeUnavailable(
                error.what,
                where=error.where,
                why=error.why,
                remedy=f"the bundle is whole: try it there with `edgepress verify {bundle} --device "
                f"{device.where}`",
            ) from error
    try:
        append_run(bundle, _RUN_NAME, found)
    except OutputError as error:
        reporter.warn(f"the device's result was not kept in {bundle}: {error.why or error.what}")
    notes = []
    if found["outputs"] is not None:
        notes.append(f"{found['outputs']['samples']} golden samples within tolerance on {device.name}")
    if found["void"]:
        reasons = "; ".join(found["void_reasons"])
        notes.append(f"the run on {device.name} does not count ({reasons}): measure again")
        reporter.warn(notes[-1])
    return tuple(notes)


@contextlib.contextmanager
def planning_device(
    arguments: argparse.Namespace, reporter: Reporter, *, version: str | None
) -> Iterator[tuple[SshTimer, DeviceEntry] | None]:
    """The one device that a command line names, ready to time on; None where that is this machine.

    Args:
        arguments: with the device options.
        reporter: told what a person should know.
        version: of onnxruntime that it shall have.

    Raises:
        RecipeError: if several devices are named, or options contradict each other.
        NotSupported: if it is an emulated one.
    """
    from ...runtimes.ssh_jobs import SshTimer
    from ..devices.commands import devices_of, open_entry

    for url in arguments.device or ():
        _refuse_emulated(url)
    entries = devices_of(arguments)
    if not entries:
        yield None
        return
    if len(entries) > 1:
        raise RecipeError(
            "times are of one device",
            where="--device",
            why=", ".join(entry.name for entry in entries),
            remedy="name one: --device ssh://USER@HOST, or --devices FILE --group NAME",
        )
    (entry,) = entries
    _refuse_emulated(entry.url)
    with open_entry(entry, reporter, version, lambda _: None) as board, SshTimer(board) as timer:
        yield timer, entry


def _refuse_emulated(url: str) -> None:
    if url.startswith(_EMULATED):
        raise _emulated(f"--device {url}")


def _emulated(where: str) -> NotSupported:
    return NotSupported(
        "an emulated board is not timed",
        where=where,
        why="the times of an emulator say nothing about the board",
        remedy=f"leave --device out: the profile plans; `edgepress benchmark BUNDLE {where}` counts the "
        "instructions of what came of it",
    )
