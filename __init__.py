"""edgepress: a model-compression and edge-deployment compiler.

The public names are loaded on first use, so that importing the package (and `edgepress --help`)
stays cheap: see PEP 562.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .driver.compile import compile_model
    from .driver.result import CompileResult
    from .export.load import load

__version__ = "0.1.0"
__all__ = ["CompileResult", "__version__", "compile_model", "load"]

_HOMES = {
    "CompileResult": ".driver.result",
    "compile_model": ".driver.compile",
    "load": ".export.load",
}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
