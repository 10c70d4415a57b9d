"""What is known of devices by ssh: `doctor --device` and `targets probe --device`."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
import tomli_w

from ...graph.errors import EXIT_OK, EXIT_UNAVAILABLE, EdgepressError, RecipeError
from ...runtimes.device_file import DeviceEntry
from ...runtimes.ssh import SshDevice
from ...targets.host import base_profile, host_overlay
from ...targets.registry import load_target, to_toml
from ..doctor_command import Check
from ..output import Answer, Table, format_bytes
from ..reporter import Reporter
from .commands import open_entry
from .emulated import set_up
from .fleet import run_on_devices
from .running import Told

if TYPE_CHECKING:
    from ...targets.host import HostFacts
    from ...targets.profile import TargetProfile

_ENOUGH_DISK_BYTES = 500_000_000


class Probed(Protocol):
    """A device that tells what it is."""

    name: str

    def host_facts(self) -> HostFacts:
        """See `SshDevice.host_facts`."""


def doctor(entries: Sequence[DeviceEntry], reporter: Reporter) -> Answer:
    """Check every device: can it be reached, what is it, and does its runtime run; nothing is installed."""

    ready = set_up(entries, None, reporter)

    def work(entry: DeviceEntry, told: Told) -> tuple[Check, ...]:
        ready(entry)
        plain = msgspec.structs.replace(_reachable(entry), wheels=None)
        with open_entry(plain, reporter, None, told) as device:
            return _checks(device)

    with reporter.stage(f"checks on {', '.join(entry.name for entry in entries)}"):
        outcomes = run_on_devices(entries, work)
    found = [(outcome.entry, outcome.value or (_failed("reached", outcome.error),)) for outcome in outcomes]
    rows = tuple(
        (entry.name, check.name, check.state, check.detail) for entry, checks in found for check in checks
    )
    remedies = [
        f"{entry.name}, {check.name}: {check.remedy}"
        for entry, checks in found
        for check in checks
        if check.remedy
    ]
    healthy = all(check.state != "failed" for _, checks in found for check in checks)
    devices = [{"name": entry.name, "url": entry.url, "checks": checks} for entry, checks in found]
    return Answer(
        document={"healthy": healthy, "devices": devices},
        blocks=(
            Table(columns=("device", "check", "state", "found"), rows=rows),
            *(("What to do:\n" + "\n".join(f"  {line}" for line in remedies),) if remedies else ()),
        ),
        exit_code=EXIT_OK if healthy else EXIT_UNAVAILABLE,
    )


def probe(entries: Sequence[DeviceEntry], reporter: Reporter) -> Answer:
    """The profile of one device: the nearest built-in one, with what was read on the device over it.

    Raises:
        RecipeError: if several devices are named.
        RuntimeUnavailable: if it cannot be reached or has no Python.
    """
    if len(entries) != 1:
        raise RecipeError(
            "a profile is of one device",
            where="--device",
            remedy="name one: --device ssh://USER@HOST, or --devices FILE --group NAME",
        )
    entry = _reachable(entries[0])
    set_up([entry], None, reporter)
    with (
        reporter.stage(f"probe {entry.name}"),
        open_entry(entry, reporter, None, lambda _: None) as device,
    ):
        profile = device_profile(device)
    return Answer(document=profile, blocks=(to_toml(profile).rstrip("\n"),))


def device_profile(device: Probed, runtime_version: str | None = None) -> TargetProfile:
    """The profile of a device, as `targets probe` makes it of this machine.

    Args:
        device: what is probed.
        runtime_version: of the onnxruntime that is used there, where it is not the system's own.

    Raises:
        RuntimeUnavailable: if it cannot be reached or has no Python.
    """
    facts = device.host_facts()
    if runtime_version is not None:
        facts = dataclasses.replace(facts, runtime_version=runtime_version)
    base = base_profile(facts)
    tables = host_overlay(facts, msgspec.to_builtins(load_target(base)))
    name = "".join(char if char.isalnum() or char in "-_." else "-" for char in device.name)
    tables |= {"base": base, "name": name.strip("-._")}
    tables["description"] = f"{facts.board or facts.core}, probed over {base}"
    del tables["kind"]
    with tempfile.TemporaryDirectory(prefix="edgepress-device-") as folder:
        path = Path(folder) / "device.toml"
        path.write_text(tomli_w.dumps(tables), encoding="utf-8")
        return load_target(path)


def _reachable(entry: DeviceEntry) -> DeviceEntry:
    if entry.url == "local":
        raise RecipeError(
            "this machine stands among devices by ssh",
            where=entry.name,
            remedy="leave --device local out to look at this machine",
        )
    return entry


def _checks(device: SshDevice) -> tuple[Check, ...]:
    facts, host = device.facts(), device.host_facts()
    features = ", ".join(sorted(host.features)) or "no features known"
    processor = f"{host.board or host.core}, {host.cores} cores"
    memory = "unknown" if host.memory_bytes is None else format_bytes(host.memory_bytes)
    return (
        Check(name="reached", state="ok", detail=f"{facts['system']} {facts['machine']}, {facts['root']}"),
        Check(name="processor", state="ok", detail=f"{processor}: {features}"),
        Check(name="memory", state="ok", detail=memory),
        _disk(facts),
        _python(facts),
        _runtime(device, facts),
    )


def _disk(facts: Mapping[str, Any]) -> Check:
    free_bytes = int(facts["free_bytes"])
    detail = f"{format_bytes(free_bytes)} free in {facts['root']}"
    if free_bytes < _ENOUGH_DISK_BYTES:
        return Check(
            name="disk",
            state="missing",
            detail=detail,
            remedy="free some space there, or set XDG_CACHE_HOME there to another disk",
        )
    return Check(name="disk", state="ok", detail=detail)


def _python(facts: Mapping[str, Any]) -> Check:
    version = tuple(facts["python"])
    detail = f"{'.'.join(map(str, version))}, {', '.join(facts['modules']) or 'no pip, no ensurepip'}"
    if version < (3, 8):
        return Check(name="python", state="failed", detail=detail, remedy="install Python 3.8 or later there")
    return Check(name="python", state="ok", detail=detail)


def _runtime(device: SshDevice, facts: Mapping[str, Any]) -> Check:
    """The runtime that is there, tried; one that is not there yet is installed by the first benchmark."""
    if not facts["packages"].get("onnxruntime"):
        made = ", ".join(facts["environments"])
        return Check(
            name="onnxruntime",
            state="ok" if made else "missing",
            detail=f"made there before: {made}" if made else "not installed",
            remedy=None
            if made
            else "the first benchmark installs it; without a network there add --wheels DIR",
        )
    try:
        return Check(name="onnxruntime", state="ok", detail=device.try_runtime())
    except EdgepressError as error:
        return _failed("onnxruntime", error)


def _failed(name: str, error: EdgepressError | None) -> Check:
    assert error is not None
    detail = f"{error.what}: {error.why}" if error.why else error.what
    return Check(name=name, state="failed", detail=detail, remedy=error.remedy)
