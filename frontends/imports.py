"""`package.module:function` of the user's own code: told from paths, and imported."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import util
from pathlib import Path
from types import ModuleType

_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
# What a user's module or function can be expected to raise.
USER_FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)


def is_import_path(reference: str) -> bool:
    """Whether an argument has the form `package.module:function`."""
    return _IMPORT_PATH.fullmatch(reference) is not None


def is_importable(reference: str) -> bool:
    """Whether the top package of an import path is found, from here too; nothing is run."""
    with _current_folder():
        try:
            return util.find_spec(reference.partition(":")[0].partition(".")[0]) is not None
        except ValueError:  # a module without a specification, as __main__ may be
            return False


def import_module(name: str) -> ModuleType:
    """Import a module, found beside the caller too; raises whatever importing it raises."""
    with _current_folder():
        return importlib.import_module(name)


@contextmanager
def _current_folder() -> Iterator[None]:
    """Like `python -m`: modules beside the caller are found, though a console script does not look there."""
    folder = str(Path.cwd())
    added = folder not in sys.path
    if added:
        sys.path.insert(0, folder)
    try:
        yield
    finally:
        if added:
            sys.path.remove(folder)
