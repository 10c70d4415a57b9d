"""A bundle or a model, as the user named it, opened to be run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..compress.typed.twin import Bfloat16Session, open_session
from ..export.manifest import InputShapes, Manifest
from ..export.verify import read_manifest
from ..frontends.source import load_source
from ..frontends.text import TextEncoder
from ..graph.errors import RuntimeUnavailable
from ..graph.load import load_model
from ..graph.model import Model, Task, TensorSpec
from ..graph.save import save_model
from ..runtimes.base import SessionOptions
from ..runtimes.ort_runtime import OrtSession
from .cache import cache_folder
from .reporter import Reporter

_PREPROCESSOR = "preprocessor_config.json"


@dataclass(frozen=True, kw_only=True)
class Opened:
    """What is needed to run, compare and time something.

    Attributes:
        name: as the user gave it.
        bundle: its folder, where it is a bundle.
        file: what runs: a bundle's model.onnx, or the .onnx file itself; None for a model that had to
            be exported first.
        model: the graph in memory; None for a bundle.
        options: a bundle's own session options; the runtime's defaults for a model.
        weight_bytes: of its weights; of a bundle, of the model's files.
        inputs: what it takes.
        task: what its outputs mean.
        encoder: turns texts into inputs, where it carries a tokenizer.
        preprocessor: its preprocessor_config.json, where it carries one: turns images into inputs.
        shapes: a bundle's ranges of input shapes, where it was compiled for such.
        numerics: a bundle's precision and type of inputs and outputs, which say how it is run here.
    """

    name: str
    bundle: Path | None
    file: Path | None
    model: Model | None
    options: SessionOptions
    weight_bytes: int
    inputs: tuple[TensorSpec, ...]
    task: Task
    encoder: TextEncoder | None
    preprocessor: Path | None = None
    shapes: Mapping[str, InputShapes] = field(default_factory=dict)
    numerics: tuple[str, str] = ("", "fp32")

    def graph(self) -> Model:
        """The graph in memory.

        Raises:
            ModelError: if a bundle's model is damaged.
        """
        if self.model is not None:
            return self.model
        assert self.file is not None
        return load_model(self.file)

    def saved(self, folder: Path) -> Path:
        """The file that runs; an exported model is written to `folder` first."""
        if self.file is not None:
            return self.file
        path = folder / "model.onnx"
        save_model(self.graph(), path)
        return path

    def session(self) -> OrtSession | Bfloat16Session:
        """A new session to compare answers with; large weights stay mapped.

        Raises:
            ModelError: if the runtime refuses the model.
            RuntimeUnavailable: if the runtime cannot be used here.
        """
        if self.file is not None:
            options = self.options.for_answers(self.weight_bytes)
            return open_session(self.file, options, *self.numerics)
        return OrtSession.from_model(self.graph(), self.options)


def is_bundle(path: Path) -> bool:
    """Whether a path is a folder with a bundle's manifest."""
    return (path / "manifest.json").is_file()


def open_named(
    named: str,
    reporter: Reporter,
    *,
    threads: int,
    tokenizer: str | None = None,
    trust_code: bool = False,
) -> Opened:
    """Open a bundle's folder, or a model in any form that compile takes.

    Raises:
        ModelError: if it is neither, or is damaged.
        RuntimeUnavailable: if a package that it needs is missing.
    """
    path = Path(named)
    if is_bundle(path):
        return _open_bundle(path, named, threads)
    with reporter.stage(f"load {named}"):
        source = load_source(
            named,
            tokenizer=tokenizer,
            trust_code=trust_code,
            cache_folder=cache_folder(),
            progress=reporter.note,
        )
    return Opened(
        name=named,
        bundle=None,
        # Saving again would leave shapes out that decide which fusions the runtime makes.
        file=path if path.is_file() and source.model.origin.kind == "onnx" else None,
        model=source.model,
        options=SessionOptions(threads=threads),
        weight_bytes=source.model.weight_bytes,
        inputs=source.model.inputs,
        task=source.model.task,
        encoder=source.encoder,
        preprocessor=source.files.get(_PREPROCESSOR),
    )


def _open_bundle(path: Path, named: str, threads: int) -> Opened:
    manifest = read_manifest(path)
    settings = manifest.session_options
    return Opened(
        name=named,
        bundle=path,
        file=path / "model.onnx",
        model=None,
        options=SessionOptions(
            threads=threads,
            graph_optimization_level=settings.graph_optimization_level,
            config=dict(settings.config),
        ),
        # A file that is missing or not whole is said when it is opened, or by verify.
        weight_bytes=sum(file.stat().st_size for file in _model_files(path, manifest) if file.is_file()),
        inputs=manifest.model.inputs,
        task=manifest.task,
        encoder=_encoder(path) if "tokenizer.json" in manifest.assets else None,
        preprocessor=path / "assets" / _PREPROCESSOR if _PREPROCESSOR in manifest.assets else None,
        shapes=manifest.shapes,
        numerics=(manifest.precision.form, manifest.precision.io_dtype),
    )


def _model_files(path: Path, manifest: Manifest) -> list[Path]:
    return [path / name for name in manifest.model.files]


def _encoder(bundle: Path) -> TextEncoder | None:
    try:
        return TextEncoder.load(bundle / "assets")
    except RuntimeUnavailable:  # arrays need no tokenizer; texts are refused with the reason later
        return None
