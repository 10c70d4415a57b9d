"""The one folder in which edgepress keeps what it can make again: downloads and exports."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """EDGEPRESS_CACHE where it is set, else the user's cache folder; it need not exist yet."""
    named = os.environ.get("EDGEPRESS_CACHE")
    if named:
        return Path(named).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("edgepress", appauthor=False))
