"""How a size in bytes is written."""

from __future__ import annotations

import math
import re

from ..graph.errors import RecipeError

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_SIZE = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,6})?) ?([A-Za-z]*)")


def parse_size(text: str, *, option: str = "--max-memory") -> int:
    """Bytes of a size such as 512MB, 1.5GiB or 300000000; `option` is named in the error.

    Raises:
        RecipeError: if it is no such size, or nothing.
    """
    match = _SIZE.fullmatch(text.strip())
    unit = None if match is None else _UNITS.get(match[2].lower())
    size = 0 if match is None or unit is None else math.floor(float(match[1]) * unit)
    if size < 1:
        raise RecipeError(f"{text!r} is no size", where=option, remedy="write it as 512MB, 1.5GB or 256MiB")
    return size
