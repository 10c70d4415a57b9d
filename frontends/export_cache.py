"""Exports made once: kept by the digests of what they came from and the versions of what made them."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

import msgspec

from ..graph.errors import ModelError, OutputError
from ..graph.load import load_model
from ..graph.model import Model

_FORMAT = 3
_MODEL = "model.onnx"
_NOTE = "export.json"
_UNFINISHED = ".edgepress-export-"
_STALE_S = 24 * 3600

Export = Callable[[Path], tuple[str, float]]
"""Writes an .onnx file; returns the attention implementation ("" if none was chosen) and the error."""


class ExportNote(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is remembered beside a cached export.

    `files` maps the cached files to their SHA-256; `relative_error` is a fraction of the largest
    output.
    """

    attention: str
    opset: int
    relative_error: float
    versions: dict[str, str]
    files: dict[str, str]

    @property
    def exporter(self) -> str:
        """The tools that made the export, for the manifest."""
        return ", ".join(f"{name} {version}" for name, version in self.versions.items())


def cached_export(
    export: Export,
    cache_folder: Path | None,
    *,
    sources: Mapping[str, str],
    opset: int,
    packages: Sequence[str],
    starting: Callable[[], None],
) -> tuple[Model, ExportNote]:
    """A model from the cache, or newly exported; its weights are memory-mapped.

    Args:
        export: makes the model.
        cache_folder: where exports are kept; None keeps nothing.
        sources: the digest of everything that the export comes of, by name.
        opset: the operator set.
        packages: those whose versions decide what an export looks like.
        starting: called before something is exported.

    Raises:
        OutputError: if there is no room for the export.
    """
    versions = package_versions(packages)
    entry = None
    if cache_folder is not None:
        entry = cache_folder / "exports" / cache_key(sources, opset, versions)
        found = _from_cache(entry)
        if found is not None:
            return found
    starting()
    return _export(export, entry, opset, versions)


def cache_key(sources: Mapping[str, str], opset: int, versions: Mapping[str, str]) -> str:
    """The name of an export in the cache."""
    parts = (_FORMAT, opset, sorted(sources.items()), sorted(versions.items()))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _export(
    export: Export, entry: Path | None, opset: int, versions: dict[str, str]
) -> tuple[Model, ExportNote]:
    """Export into a temporary folder; it becomes the cache entry, or is unlinked once mapped."""
    parent = None if entry is None else entry.parent
    try:
        if parent is not None:
            parent.mkdir(parents=True, exist_ok=True)
            _sweep(parent)
        # A mapped file stays readable after it is unlinked, except on Windows, which keeps it.
        with tempfile.TemporaryDirectory(prefix=_UNFINISHED, dir=parent, ignore_cleanup_errors=True) as made:
            path = Path(made, _MODEL)
            attention, relative_error = export(path)
            gc.collect()  # the module and torch's graphs refer to each other in cycles
            model = load_model(path)
            note = ExportNote(
                attention=attention,
                opset=opset,
                relative_error=relative_error,
                versions=versions,
                files=model.origin.files,
            )
            if entry is not None:
                Path(made, _NOTE).write_bytes(msgspec.json.format(msgspec.json.encode(note)))
                _keep(Path(made), entry)
            return model, note
    except OSError as error:
        raise OutputError(
            "the exported model cannot be stored",
            where=str(parent or tempfile.gettempdir()),
            why=error.strerror or str(error),
            remedy="free some space, or set TMPDIR to a folder with room for the float weights",
        ) from error


def _sweep(parent: Path) -> None:
    """Remove what killed runs left in the cache, once no running export can be that old."""
    for left in parent.glob(f"{_UNFINISHED}*"):
        try:
            stale = time.time() - left.stat().st_mtime > _STALE_S
        except OSError:  # another process has just finished with it
            continue
        if stale:
            shutil.rmtree(left, ignore_errors=True)


def _keep(made: Path, entry: Path) -> None:
    """Move a finished export to its place in the cache; another process may have been first."""
    whole = made.with_name(f"{made.name}.whole")
    whole.mkdir()
    try:
        for path in sorted(made.iterdir()):
            path.rename(whole / path.name)
        whole.rename(entry)
    except OSError:
        if not (entry / _NOTE).is_file():
            raise
    finally:
        shutil.rmtree(whole, ignore_errors=True)


def _from_cache(entry: Path) -> tuple[Model, ExportNote] | None:
    """A cached export that is whole: its files have the digests noted when it was made."""
    if not (entry / _NOTE).is_file():
        return None
    try:
        note = msgspec.json.decode((entry / _NOTE).read_bytes(), type=ExportNote)
        model = load_model(entry / _MODEL)
    except (ModelError, msgspec.MsgspecError, OSError):
        _discard(entry)
        return None
    if model.origin.files != note.files:
        _discard(entry)
        return None
    return model, note


def _discard(entry: Path) -> None:
    """Take a damaged entry out of the cache; moved first, so that no reader sees half of it."""
    aside = entry.with_name(f".{entry.name}.{os.getpid()}.damaged")
    with contextlib.suppress(OSError):  # gone already, or not ours to change: it is exported anew
        entry.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def package_versions(packages: Sequence[str]) -> dict[str, str]:
    """The installed version of each package, "none" where it is missing."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "none"
    return found
