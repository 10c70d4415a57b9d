"""Several devices at once: the same work on each, side by side; one that fails stops no other."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, Protocol, TypeVar

from ...graph.errors import EXIT_OK, EdgepressError
from ...runtimes.device_file import DeviceEntry

Found = TypeVar("Found")
_MOST_AT_ONCE = 32


class Closable(Protocol):
    """A device that is being worked with."""

    def close(self) -> None:
        """End what goes on there; may be called from another thread."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome(Generic[Found]):
    """What the work on one device came to: a value, or the error that ended it."""

    entry: DeviceEntry
    value: Found | None = None
    error: EdgepressError | None = None


Work = Callable[[DeviceEntry, Callable[[Closable], None]], Found]


def run_on_devices(entries: Sequence[DeviceEntry], work: Work[Found]) -> tuple[Outcome[Found], ...]:
    """Do the same work on every device, each in a thread of its own; outcomes in the devices' order.

    A single device is worked with in the calling thread. An interrupt ends the work on all of them.

    Args:
        entries: the devices, at least one.
        work: called with a device, and with what it has to tell the device that it opens.

    Raises:
        BaseException: what `work` raises that is not of the error tree.
    """
    opened: list[Closable] = []

    def attempt(entry: DeviceEntry) -> Outcome[Found]:
        try:
            return Outcome(entry=entry, value=work(entry, opened.append))
        except EdgepressError as error:
            return Outcome(entry=entry, error=error)

    if len(entries) == 1:
        return (attempt(entries[0]),)
    with ThreadPoolExecutor(max_workers=min(len(entries), _MOST_AT_ONCE)) as pool:
        try:
            return tuple(pool.map(attempt, entries))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for device in opened:
                with contextlib.suppress(EdgepressError, OSError):
                    device.close()
            raise


def exit_code_of(outcomes: Sequence[Outcome[Found]]) -> int:
    """The exit code of the first device that failed; 0 if none did."""
    return next((item.error.exit_code for item in outcomes if item.error is not None), EXIT_OK)


def only_error(outcomes: Sequence[Outcome[Found]]) -> None:
    """Raise the error of a single device: there is nothing to tabulate beside it.

    Raises:
        EdgepressError: the only device's error.
    """
    if len(outcomes) == 1 and outcomes[0].error is not None:
        raise outcomes[0].error
