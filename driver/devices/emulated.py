"""Emulated boards as devices of a command: set up beforehand, opened, and what they counted as a table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...graph.errors import EdgepressError, RecipeError
from ...runtimes.device_file import DeviceEntry
from ...runtimes.emulator.boards import EmulatedBoard, board_named
from ...runtimes.emulator.device import EmulatedDevice
from ...runtimes.emulator.install import Emulator
from ...runtimes.remote import parse_device_url
from ..cache import cache_folder
from ..output import Table
from ..reporter import Reporter

_PREFIX = "emulated:"
_COLUMNS = (
    *("device", "bundle", "counted", "inputs", "instructions", "dot", "widening", "fma", "of baseline"),
    "outputs",
)


def emulator() -> Emulator:
    """The emulated boards of this user."""
    return Emulator(cache_folder() / "emulator")


def is_emulated(entry: DeviceEntry) -> bool:
    """Whether the device is an emulated board."""
    return entry.url.startswith(_PREFIX)


def set_up(
    entries: Sequence[DeviceEntry], version: str | None, reporter: Reporter
) -> Callable[[DeviceEntry], None]:
    """Set up what the emulated boards among devices lack, before the devices work side by side.

    Args:
        entries: of any kind.
        version: of onnxruntime; None takes this machine's own.
        reporter: progress.

    Returns:
        What is called with a device before work on it begins; of an emulated board it raises what kept it
        from being set up, so that the other devices are worked with all the same.

    Raises:
        RecipeError: if a device has a key that emulated boards have no use for.
        RuntimeUnavailable: if all are emulated and cannot be set up here.
        OutputError: if all are emulated and the cache folder cannot be written.
    """
    boards = [board_named(entry.url.removeprefix(_PREFIX)) for entry in entries if is_emulated(entry)]
    for entry in filter(is_emulated, entries):
        refuse_unused(entry, "an emulated board has a Python, a runtime and ssh keys of its own")
    failure: EdgepressError | None = None
    try:
        _install(boards, version, reporter)
    except EdgepressError as error:
        if len(boards) == len(entries):
            raise
        failure = error

    def ready(entry: DeviceEntry) -> None:
        if failure is not None and is_emulated(entry):
            raise failure

    return ready


def _install(boards: Sequence[EmulatedBoard], version: str | None, reporter: Reporter) -> None:
    if boards:
        place = emulator()
        if not all(place.is_ready(board) for board in boards):
            reporter.note("setting up emulated boards, once: about 250 MB, half a minute")
        place.install(boards, reporter.stage)
        place.site(version, reporter.stage)


def open_emulated(entry: DeviceEntry, version: str | None, reporter: Reporter) -> EmulatedDevice:
    """An emulated board, switched on by `with`."""
    return EmulatedDevice(
        parse_device_url(entry.url),
        home=emulator().home,
        name=entry.name,
        version=version,
        log=reporter.note,
    )


def refuse_unused(entry: DeviceEntry, why: str) -> None:
    """Refuse what a devices file says of a device that is not reached by ssh.

    Raises:
        RecipeError: if there is any such key.
    """
    for key in ("wheels", "ssh_config", "python"):
        if getattr(entry, key) is not None:
            raise RecipeError(
                f"{key} is about devices by ssh",
                where=entry.name,
                why=why,
                remedy=f"leave {key} out for {entry.url}",
            )


def instruction_table(found: Iterable[tuple[str, Path, str, Mapping[str, Any]]]) -> Table | None:
    """What emulated boards counted, in millions of instructions for one inference; None if none did.

    Args:
        found: (device, bundle, how its outputs compare, the device runner's result) of each.
    """
    rows = []
    for device, bundle, outputs, result in found:
        counted = (result["benchmark"] or {}).get("instructions") or {}
        shapes = (result["benchmark"] or {}).get("shapes") or {}
        inputs = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())
        totals = [item["total"] for name, item in counted.items() if name != "bundle"]
        for name, item in counted.items():
            millions = [f"{item[key] / 1e6:.2f} M" for key in ("total", "dot", "widening", "fma")]
            share = f"{item['total'] / totals[0]:.0%}" if totals else ""
            told = outputs if name == "bundle" else ""
            rows.append((device, str(bundle), name, inputs, *millions, share, told))
    numeric = frozenset({"instructions", "dot", "widening", "fma", "of baseline"})
    return Table(columns=_COLUMNS, rows=tuple(rows), numeric=numeric) if rows else None
