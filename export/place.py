"""A place to write a folder to: checked early, filled out of sight, swapped in whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from ..graph.errors import OutputError
from .checksums import RUNS_NAME, SUMS_NAME, list_files

if sys.platform != "win32":
    import fcntl

_NAME_LIMIT_BYTES = 200
_ORPHAN_AGE_S = 600.0
_LOCK_NAME = "lock"
_NEW_NAME = "new"
_OLD_NAME = "old"
_FULL = frozenset({errno.ENOSPC, errno.EFBIG, errno.EDQUOT})


def check_output(out: Path, overwrite: bool) -> Path:
    """Find out before any long work whether a bundle can be written to `out`; returns its real place.

    Leftovers of a killed run beside it are removed first (and the old bundle put back, should the
    run have died between moving it aside and moving the new one in).

    Raises:
        OutputError: if `out` exists (without `overwrite`), is not an edgepress bundle or an empty
            folder (with it), holds files that are not the bundle's, lies below a file, or its
            folder cannot be written.
    """
    place = _real_place(out)
    with disk_errors(place):
        sweep(place)
        if os.path.lexists(place):
            _require_replaceable(place, overwrite)
        _probe(place)
    return place


@contextlib.contextmanager
def staged(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """A new empty folder that becomes `out` when the block ends, or vanishes when it raises.

    Ctrl-C and SIGTERM count as raising. With `overwrite` the old folder stays until the new one
    is whole, and comes back if the swap fails.

    Raises:
        OutputError: as `check_output`, and when the disk is full or fails while writing.
    """
    place = check_output(out, overwrite)
    with _sigterm_raises(), disk_errors(place):
        created = _make_parents(place.parent)
        done = False
        try:
            with _staging_folder(place) as staging:
                yield staging / _NEW_NAME
                _swap_in(staging, place, overwrite)
                done = True
        finally:
            if not done:
                for folder in created:
                    with contextlib.suppress(OSError):
                        folder.rmdir()


def sweep(place: Path) -> None:
    """Remove what dead runs left beside `place`; put an old bundle back that one had moved aside.

    What cannot be removed (another user's, or another run is sweeping it) is left alone.
    """
    pattern = re.compile(re.escape(_staging_prefix(place)) + r"[0-9a-f]{16}")
    try:
        entries = list(os.scandir(place.parent))
    except OSError:
        return  # the probe that follows says what is wrong with the folder
    for entry in entries:
        if not pattern.fullmatch(entry.name) or not entry.is_dir(follow_symlinks=False):
            continue
        staging = Path(entry.path)
        with contextlib.suppress(OSError):
            if _owner_is_gone(staging, place):
                if (staging / _OLD_NAME).exists() and not os.path.lexists(place):
                    (staging / _OLD_NAME).rename(place)
                shutil.rmtree(staging)


@contextlib.contextmanager
def disk_errors(place: Path) -> Iterator[None]:
    """Turn the file system's refusals inside the block into an `OutputError` about `place`."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise OutputError(
                "the output does not fit on the disk",
                where=str(place),
                why=error.strerror,
                remedy="free some space, raise the file size limit, or choose another place with -o",
            ) from error
        raise OutputError(
            "the output cannot be written",
            where=str(place),
            why=f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""),
            remedy="choose a place that you may write to with -o",
        ) from error


def sync_folder(folder: Path) -> None:
    """Make a folder's entries durable, where the system can."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _real_place(out: Path) -> Path:
    try:
        # A link given as the output means the folder that it points to.
        place = out.resolve()
        if place.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        inside = Path.cwd().is_relative_to(place)
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: a loop of links, to 3.12
        raise OutputError(
            "the output path cannot be used",
            where=str(out),
            why=getattr(error, "strerror", None) or str(error),
            remedy="choose another path with -o",
        ) from error
    if inside:
        raise OutputError(
            "the output is the folder you are in, or one above it",
            where=str(out),
            remedy="name a new folder, such as -o bundle",
        )
    return place


def _require_replaceable(place: Path, overwrite: bool) -> None:
    if not overwrite:
        raise OutputError(
            "the output exists already",
            where=str(place),
            remedy="choose another path with -o, or pass --overwrite to replace a bundle",
        )
    if not place.is_dir():
        raise OutputError(
            "the output is a file, not a bundle",
            where=str(place),
            remedy="choose another path with -o; --overwrite replaces bundles only",
        )
    files, others = list_files(place)
    if not any(place.iterdir()):
        return
    if not {SUMS_NAME, "manifest.json"} <= set(files):
        raise OutputError(
            "the output is a folder that is not an edgepress bundle",
            where=str(place),
            why=f"it has no {SUMS_NAME} and manifest.json, and it is not empty",
            remedy="choose another path with -o; --overwrite never deletes other folders",
        )
    sums = (place / SUMS_NAME).read_text(encoding="utf-8", errors="replace")
    own = {line[66:] for line in sums.splitlines()} | {SUMS_NAME}
    foreign = [name for name in (*files, *others) if name not in own and not name.startswith(f"{RUNS_NAME}/")]
    if foreign:
        raise OutputError(
            "the bundle to overwrite holds files that are not part of it",
            where=str(place),
            why=", ".join(foreign[:5]) + (", …" if len(foreign) > 5 else ""),
            remedy="move them away, or choose another path with -o",
        )


def _probe(place: Path) -> None:
    """Create and remove a folder where the output will go (or in its nearest existing parent)."""
    parent = place.parent
    while not os.path.lexists(parent):
        parent = parent.parent
    if not parent.is_dir():
        raise OutputError(
            "the output lies below something that is not a folder",
            where=str(place),
            why=f"{parent} is a file",
            remedy="choose another path with -o",
        )
    # lstat of the full path tells whether the names themselves are acceptable (too long, …).
    with contextlib.suppress(FileNotFoundError):
        os.lstat(place)
    probe = parent / (_staging_prefix(place) + secrets.token_hex(8))
    probe.mkdir()
    probe.rmdir()


def _make_parents(folder: Path) -> list[Path]:
    """Create missing folders down to `folder`; returns those created, the deepest first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
    return missing


def _staging_prefix(place: Path) -> str:
    name = place.name.encode("utf-8", "surrogateescape")[:_NAME_LIMIT_BYTES].decode("utf-8", "ignore")
    return f".{name}.edgepress-"


@contextlib.contextmanager
def _staging_folder(place: Path) -> Iterator[Path]:
    """A hidden folder beside `place`, locked while its owner lives, removed at the end."""
    staging = place.parent / (_staging_prefix(place) + secrets.token_hex(8))
    try:
        staging.mkdir()
        with (staging / _LOCK_NAME).open("xb") as lock:
            if sys.platform != "win32":
                with contextlib.suppress(OSError):  # not every network file system has locks
                    fcntl.flock(lock, fcntl.LOCK_EX)
            owner = {"pid": os.getpid(), "started": _start_time(os.getpid()), "name": place.name}
            lock.write(json.dumps(owner).encode())
            lock.flush()
            (staging / _NEW_NAME).mkdir()
            yield staging
    finally:
        _remove(staging, place)


def _remove(staging: Path, place: Path) -> None:
    """Remove the staging folder, whatever state an interruption left it in."""
    if (staging / _OLD_NAME).exists() and not os.path.lexists(place):
        (staging / _OLD_NAME).rename(place)
    try:
        shutil.rmtree(staging, ignore_errors=True)
    except KeyboardInterrupt:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _swap_in(staging: Path, place: Path, overwrite: bool) -> None:
    new, old = staging / _NEW_NAME, staging / _OLD_NAME
    sync_folder(staging)
    if os.path.lexists(place):
        # It may have appeared, or changed, while the bundle was being made.
        _require_replaceable(place, overwrite)
        place.rename(old)
    try:
        new.rename(place)
    except OSError:
        if old.exists():
            old.rename(place)
        raise
    sync_folder(place.parent)


def _owner_is_gone(staging: Path, place: Path) -> bool:
    try:
        lock = (staging / _LOCK_NAME).open("rb")
    except FileNotFoundError:
        return _is_old(staging)
    with lock:
        if sys.platform != "win32":
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            except OSError:
                pass  # a file system without locks: the process number has to tell
        try:
            owner = json.loads(lock.read())
            pid, started, name = int(owner["pid"]), owner["started"], owner["name"]
        except (ValueError, KeyError, TypeError):
            return _is_old(staging)
    return name == place.name and not _is_running(pid, started)


def _is_old(staging: Path) -> bool:
    return time.time() - staging.stat().st_mtime > _ORPHAN_AGE_S


def _is_running(pid: int, started: object) -> bool:
    now = _start_time(pid)
    if now is not None or started is not None:
        return now is not None and now == started
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _start_time(pid: int) -> str | None:
    """When a process began, in clock ticks since boot; None where there is no /proc or no process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    # The command's name, in parentheses, may itself hold spaces and parentheses; field 22 counts on.
    return stat.rpartition(b")")[2].split()[19].decode()


class _Terminated(BaseException):
    """SIGTERM, as something that `finally` clauses see."""


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Let SIGTERM unwind the block before it ends the process; a caller's own handler is kept."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise _Terminated

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except _Terminated:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
