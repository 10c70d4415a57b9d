"""A Hugging Face folder to a `Model`: exported once, optionally cached by the digest of its files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..graph.model import Model, Origin
from .checkpoint import Checkpoint
from .export_cache import ExportNote, cached_export

DEFAULT_OPSET = 20
_VERSIONED = ("torch", "transformers", "onnx-ir", "onnxscript")

Progress = Callable[[str], None]


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
    loaded, note = cached_export(
        lambda path: _export(checkpoint, path, opset),
        cache_folder,
        sources=digests,
        opset=opset,
        packages=_VERSIONED,
        starting=lambda: tell("exporting with torch and comparing the result"),
    )
    origin = Origin(kind="huggingface", name=name, files=digests, exporter=note.exporter)
    return Model(loaded.ir, origin=origin, task=checkpoint.task), note


def _export(checkpoint: Checkpoint, path: Path, opset: int) -> tuple[str, float]:
    from .torch_export import export_checkpoint

    exported = export_checkpoint(checkpoint, path, opset=opset)
    return exported.attention, exported.relative_error
