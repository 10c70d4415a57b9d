"""The folders of boards that are on: each is locked by its board's processes for as long as they live."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from ...graph.errors import OutputError

_OFF_S = 10.0


def new_folder(folder: Path) -> int:
    """Make a board's folder and take its lock; what dead boards left beside it goes.

    Args:
        folder: it must not exist.

    Returns:
        The lock's file descriptor: the folder is in use until all that have it have closed it.

    Raises:
        OSError: if the folder exists or cannot be made.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _alone(folder.parent):
        for other in folder.parent.glob("*/"):
            with contextlib.suppress(OSError):
                os.close(_lock(other))
                shutil.rmtree(other, ignore_errors=True)
        folder.mkdir()
        return _lock(folder)


def is_on(folder: Path) -> bool:
    """Whether the board of this folder is switched on."""
    if not folder.is_dir():
        return False
    with _alone(folder.parent):
        try:
            os.close(_lock(folder))
        except BlockingIOError:
            return True
        except OSError:
            return False
    return False


def switch_off(folder: Path) -> bool:
    """End a board that stays on, by its folder; whether it was on.

    Raises:
        OutputError: if it does not go off: something else than `stays` made it, or it is just being made.
    """
    if not is_on(folder):
        return False
    with contextlib.suppress(OSError, ValueError):
        number = int((folder / "pid").read_text(encoding="ascii"))
        # Not whoever got the number after the board's server ended, or in another container.
        if b"enter.py" in Path(f"/proc/{number}/cmdline").read_bytes():
            os.kill(number, signal.SIGTERM)
    deadline = time.monotonic() + _OFF_S
    while is_on(folder):
        if time.monotonic() > deadline:
            raise OutputError(
                "the emulated board does not go off",
                where=str(folder),
                why="another program has it, here or in another container",
                remedy="end that program; the board goes off with it",
            )
        time.sleep(0.05)
    shutil.rmtree(folder, ignore_errors=True)
    return True


@contextlib.contextmanager
def _alone(instances: Path) -> Iterator[None]:
    """One process at a time looks at locks, or takes one: a look is a lock, too."""
    with (instances / ".guard").open("w", encoding="ascii") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        yield


def _lock(folder: Path) -> int:
    number = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(number)
        raise
    return number
