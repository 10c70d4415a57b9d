"""`edgepress targets list|show|probe`: which targets there are and what is known about them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ..graph.errors import OutputError, RecipeError
from .cache import cache_folder
from .devices.options import on_devices
from .output import Answer, Table
from .reporter import Reporter

if TYPE_CHECKING:
    from ..runtimes.timing_cache import TimingCache
    from ..targets.profile import TargetProfile

_HOST = "host"


def run(arguments: argparse.Namespace, reporter: Reporter) -> Answer:
    """Answer the subcommand.

    Raises:
        TargetError: if the target or an override does not exist.
        RecipeError: if an option for the host's timings is given for another target.
        OutputError: if the profile cannot be exported, or timings cannot be removed.
    """
    if arguments.subcommand == "list":
        return _list()
    if arguments.subcommand == "probe":
        if arguments.measure:
            from .measuring import probe

            return probe.run(arguments, reporter)
        _refuse_without_measure(arguments)
        if on_devices(arguments):
            from .devices import checks as device_checks
            from .devices import commands as device_commands

            if entries := device_commands.devices_of(arguments):
                return device_checks.probe(entries, reporter)
        with reporter.stage("probe"):
            return _profile(_HOST, ())
    if arguments.name == _HOST:
        return _host(arguments, reporter)
    for option, given in (("--export", arguments.export), ("--clear-timings", arguments.clear_timings)):
        if given:
            raise RecipeError(
                f"{option} is about the timings of this machine",
                where=f"targets show {arguments.name}",
                remedy="use it with `edgepress targets show host`",
            )
    return _profile(arguments.name, tuple(arguments.set or ()))


def _refuse_without_measure(arguments: argparse.Namespace) -> None:
    for option in ("export", "max_time", "threads"):
        if getattr(arguments, option) is not None:
            flag = f"--{option.replace('_', '-')}"
            raise RecipeError(f"{flag} is about what is timed", where=flag, remedy="add --measure")


def _list() -> Answer:
    from ..targets.registry import list_targets

    targets = list_targets()
    rows = tuple((item.name, item.kind, ", ".join(item.aliases), item.description) for item in targets)
    return Answer(
        document={"targets": targets},
        blocks=(Table(columns=("target", "kind", "also called", "what it is"), rows=rows),),
    )


def _profile(name: str, overrides: tuple[str, ...]) -> Answer:
    from ..targets.registry import load_target, to_toml

    profile = load_target(name, overrides)
    return Answer(document=profile, blocks=(to_toml(profile).rstrip("\n"),))


def _host(arguments: argparse.Namespace, reporter: Reporter) -> Answer:
    """The host's profile with the timings of its operators."""
    from ..runtimes.device import LocalDevice
    from ..runtimes.timing_cache import TimingCache
    from ..targets.registry import load_target, to_toml
    from .measuring.profile import comment_lines, timing_rows

    if arguments.clear_timings:
        _clear(reporter)
    profile = load_target(_HOST, tuple(arguments.set or ()))
    cache = TimingCache(cache_folder(), LocalDevice().features())
    if arguments.export is not None:
        _export(Path(arguments.export), profile, cache, reporter)
    timings = cache.timings()
    document = {**msgspec.to_builtins(profile), "timings": timings, "timings_file": str(cache.path)}
    blocks = [to_toml(profile).rstrip("\n")]
    if timings:
        blocks.append(f"# Operators timed here ({cache.path}):\n{comment_lines(timing_rows(timings))}")
    else:
        blocks.append(
            "# No operator was timed here yet: `edgepress compile MODEL --target host` does, and "
            "`edgepress targets probe --measure`."
        )
    return Answer(document=document, blocks=blocks)


def _clear(reporter: Reporter) -> None:
    from ..runtimes.timing_cache import clear_timings

    try:
        removed = clear_timings(cache_folder())
    except OSError as error:
        raise OutputError(
            "timings cannot be removed",
            where=str(error.filename),
            why=error.strerror,
            remedy="remove the file yourself, or set EDGEPRESS_CACHE to a folder that you may write to",
        ) from error
    reporter.note(f"{len(removed)} files of timings removed")


def _export(path: Path, profile: TargetProfile, cache: TimingCache, reporter: Reporter) -> None:
    """Write the host's profile with its timed kernels, whole or not at all."""
    from .measuring.profile import measured_profile
    from .measuring.profile_file import check_place, write_profile

    made = measured_profile(profile, cache.timings(), cache.device, name=check_place(path).stem)
    write_profile(path, made)
    timed = sum(kernel.evidence == "measured-on-target" for kernel in made.kernels)
    reporter.note(f"{path}: {timed} kernels as timed here; use it with --target {path}")
