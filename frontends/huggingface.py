"""A Hugging Face folder to a `Model`: exported once, optionally cached by the digest of its files."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import msgspec

from ..graph.errors import ModelError, OutputError
from ..graph.load import load_model
from ..graph.model import Model, Origin
from .checkpoint import Checkpoint

DEFAULT_OPSET = 20
_FORMAT = 2
_MODEL = "model.onnx"
_NOTE = "export.json"
_UNFINISHED = ".edgepress-export-"
_STALE_S = 24 * 3600
_VERSIONED = ("torch", "transformers", "onnx-ir", "onnxscript")

Progress = Callable[[str], None]


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


def export_model(
    checkpoint: Checkpoint,
    *,
    name: str,
    opset: int | None = None,
    cache_folder: Path | None = None,
    progress: Progress | None = None,
) -> tuple[Model, ExportNote]:
    """The FP32 baseline of a checkpoint, from the cache or newly exported and compared with torch.

    The weights of the returned model are memory-mapped; torch's own copy is let go.

    Args:
        checkpoint: a folder that `read_checkpoint` accepted.
        name: the name for `Origin.name` (folder name or hub id).
        opset: operator set of the export, 18 to 23; 20 by default.
        cache_folder: where exports are kept, keyed by the digests of the source files and the
            versions of the exporters; None keeps nothing.
        progress: called with a line of text at every stage.

    Raises:
        ModelError: if the model cannot be exported, or the export differs from the torch model.
        NotSupported: if the opset or the architecture is not supported.
        RuntimeUnavailable: if torch or transformers is missing.
        OutputError: if there is no room for the export.
    """
    from .torch_export import require_opset

    opset = DEFAULT_OPSET if opset is None else opset
    require_opset(opset)
    tell = progress or (lambda _: None)
    tell("reading the weights")
    digests = checkpoint.digests()
    entry = None if cache_folder is None else cache_folder / "exports" / _cache_key(digests, opset)
    found = _from_cache(entry) if entry is not None else None
    if found is None:
        tell("exporting with torch and comparing the result")
        found = _export(checkpoint, opset, entry)
    loaded, note = found
    origin = Origin(kind="huggingface", name=name, files=digests, exporter=note.exporter)
    return Model(loaded.ir, origin=origin, task=checkpoint.task), note


def _export(checkpoint: Checkpoint, opset: int, entry: Path | None) -> tuple[Model, ExportNote]:
    """Export into a temporary folder; it becomes the cache entry, or is unlinked once mapped."""
    from .torch_export import export_checkpoint

    parent = None if entry is None else entry.parent
    try:
        if parent is not None:
            parent.mkdir(parents=True, exist_ok=True)
            _sweep(parent)
        # A mapped file stays readable after it is unlinked, except on Windows, which keeps it.
        with tempfile.TemporaryDirectory(prefix=_UNFINISHED, dir=parent, ignore_cleanup_errors=True) as made:
            path = Path(made, _MODEL)
            exported = export_checkpoint(checkpoint, path, opset=opset)
            gc.collect()  # the module and torch's graphs refer to each other in cycles
            model = load_model(path)
            note = ExportNote(
                attention=exported.attention,
                opset=opset,
                relative_error=exported.relative_error,
                versions=_versions(),
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


def _cache_key(digests: dict[str, str], opset: int) -> str:
    parts = (_FORMAT, opset, sorted(digests.items()), sorted(_versions().items()))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _versions() -> dict[str, str]:
    found = {}
    for package in _VERSIONED:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "none"
    return found
