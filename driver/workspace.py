"""The temporary folder of one compile, and the sweeping of those that killed processes left."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_OWNED = re.compile(r"edgepress-(?P<pid>\d+)-")


@contextmanager
def workspace() -> Iterator[Path]:
    """A temporary folder that is gone afterwards; folders of processes that were killed go first."""
    sweep(Path(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(prefix=f"edgepress-{os.getpid()}-") as folder:
        yield Path(folder)


def sweep(place: Path) -> list[Path]:
    """Remove this user's edgepress folders in `place` whose process is gone; returns them."""
    removed = []
    for folder in sorted(place.glob("edgepress-*")):
        owner = _OWNED.match(folder.name)
        if owner is None or folder.is_symlink() or not folder.is_dir() or _is_alive(int(owner["pid"])):
            continue
        if hasattr(os, "getuid") and folder.stat().st_uid != os.getuid():
            continue
        shutil.rmtree(folder, ignore_errors=True)
        removed.append(folder)
    return removed


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
