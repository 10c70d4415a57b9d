"""Whatever the user names as MODEL (a file, a folder, a hub id, a function) to one `Source`."""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path

from ..graph.errors import ModelError, RuntimeUnavailable
from ..graph.load import load_model
from ..graph.model import Model
from .checkpoint import read_checkpoint
from .hub import fetch, is_hub_id, refuse_remote_code_of_hub
from .huggingface import DEFAULT_OPSET, Progress, export_model
from .imports import is_import_path, is_importable
from .sidecars import find_sidecars, optional_config, position_limit, read_config
from .task import guess_task, refuse_cache
from .text import TextEncoder

_PREPROCESSOR = "preprocessor_config.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A model as it came in, before anything was changed.

    Attributes:
        model: the FP32 baseline, with its origin and task.
        files: tokenizer, preprocessor and config files to copy into the bundle, by their name there.
        encoder: turns texts into inputs, where the model came with a tokenizer.
        baseline_note: how the baseline was made, for reports.
    """

    model: Model
    files: dict[str, Path]
    encoder: TextEncoder | None
    baseline_note: str


def load_source(
    reference: str,
    *,
    tokenizer: str | None = None,
    preprocessor: str | None = None,
    trust_code: bool = False,
    opset: int | None = None,
    cache_folder: Path | None = None,
    offline: bool = False,
    progress: Progress | None = None,
) -> Source:
    """Load an .onnx or .pt2 file, a Hugging Face folder, a hub id, or what a function makes.

    Args:
        reference: a path, "package.module:function" (see `program.load_factory`; it is run), or
            "owner/name" of the Hugging Face hub. A path that does not exist is
            reported at once; nothing that looks like a path is looked up over the network.
        tokenizer: a tokenizer.json or its folder; by default the one beside the model.
        preprocessor: a preprocessor_config.json or its folder; by default the one beside the model.
        trust_code: run code that comes with a local folder or in a .pt2 file. Code from the hub is
            never fetched.
        opset: operator set to export a PyTorch model at (20 by default); an .onnx file keeps its own.
        cache_folder: where exports and hub downloads are kept; None keeps no export, and leaves
            downloads to the hub's own cache.
        offline: use no network; a hub id must have been fetched before.
        progress: called with a line of text at every stage that takes time.

    Raises:
        ModelError: if the reference does not exist, or what it names is malformed.
        NotSupported: if the architecture, or code that comes with the model, is not supported.
        RuntimeUnavailable: if a package or the network is missing.
        OutputError: if there is no room for the export.
    """
    path = _expanded(reference)
    hub_id = None
    if not _exists(path):
        if is_import_path(reference) and is_importable(reference):
            model, note = _from_factory(reference, opset=opset, progress=progress)
            return _source(model, note, {}, tokenizer, preprocessor)
        if not is_hub_id(reference):
            raise _no_such_model(reference, path)
        if progress:
            progress(f"fetching {reference} from the Hugging Face hub")
        hub_cache = None if cache_folder is None else cache_folder / "hub"
        path, hub_id = fetch(reference, cache_folder=hub_cache, offline=offline), reference
    pt2 = path.is_file() and path.suffix.lower() == ".pt2"
    onnx_file = None if pt2 else _onnx_file(path)
    if pt2:
        model, note = _from_archive(
            path, trust_code=trust_code, opset=opset, cache_folder=cache_folder, progress=progress
        )
        folder = path.parent
    elif onnx_file is not None:
        model, note = _from_onnx(onnx_file)
        folder = onnx_file.parent
    else:
        model, note = _from_folder(
            path, hub_id, trust_code=trust_code, opset=opset, cache_folder=cache_folder, progress=progress
        )
        folder = path
    return _source(model, note, find_sidecars(folder), tokenizer, preprocessor)


def _source(
    model: Model, note: str, files: dict[str, Path], tokenizer: str | None, preprocessor: str | None
) -> Source:
    encoder, files = _tokenizer(files, tokenizer, model)
    if preprocessor is not None:
        files = files | {_PREPROCESSOR: _preprocessor(preprocessor)}
    return Source(model=model, files=dict(sorted(files.items())), encoder=encoder, baseline_note=note)


def _expanded(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:  # "~name" of a user who does not exist
        return Path(text)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long, or with a null byte
        return False


def _no_such_model(reference: str, path: Path) -> ModelError:
    near: list[str] = []
    if _exists(path.parent) and path.parent.is_dir() and path.name:
        near = difflib.get_close_matches(path.name, sorted(item.name for item in path.parent.iterdir()), n=3)
    hint = f"did you mean {' or '.join(str(path.parent / name) for name in near)}?" if near else ""
    return ModelError(
        "there is no such model",
        where=reference,
        why="no such file or folder, and not of the form owner/name of a hub model",
        remedy=hint or "pass an .onnx file, a Hugging Face folder, or owner/name of the hub",
    )


def _onnx_file(path: Path) -> Path | None:
    """The .onnx file that a path stands for: itself, or the only one in a folder without safetensors."""
    if path.is_file():
        if path.suffix.lower() == ".onnx":
            return path
        raise ModelError(
            "the file is not a model that edgepress reads",
            where=str(path),
            why=f"{path.suffix or 'a file without ending'} is not .onnx or .pt2",
            remedy="name the folder of a Hugging Face model, not a file in it"
            if path.name in ("model.safetensors", "config.json", "pytorch_model.bin")
            else "pass an .onnx file, a Hugging Face folder, or owner/name of the hub",
        )
    if any(path.glob("*.safetensors")) or any(path.glob("*.safetensors.index.json")):
        return None
    found = sorted(path.glob("*.onnx"))
    if len(found) > 1:
        raise ModelError(
            "the folder holds several .onnx files",
            where=str(path),
            why=", ".join(file.name for file in found[:5]),
            remedy="name one of them",
        )
    return found[0] if found else None


def _from_onnx(file: Path) -> tuple[Model, str]:
    model = load_model(file)
    refuse_cache(model)
    model.task = guess_task(model, file.parent)
    return model, f"the .onnx file as it came (opset {model.opset})"


def _from_archive(
    file: Path,
    *,
    trust_code: bool,
    opset: int | None,
    cache_folder: Path | None,
    progress: Progress | None,
) -> tuple[Model, str]:
    from .program import load_archive

    tell = progress or (lambda _: None)
    return load_archive(
        file,
        trust_code=trust_code,
        opset=opset or DEFAULT_OPSET,
        cache_folder=cache_folder,
        starting=lambda: tell("exporting with torch and comparing the result"),
    )


def _from_factory(reference: str, *, opset: int | None, progress: Progress | None) -> tuple[Model, str]:
    from .program import load_factory

    if progress:
        progress(f"running {reference}, exporting with torch and comparing the result")
    return load_factory(reference, opset=opset or DEFAULT_OPSET)


def _from_folder(
    folder: Path,
    hub_id: str | None,
    *,
    trust_code: bool,
    opset: int | None,
    cache_folder: Path | None,
    progress: Progress | None,
) -> tuple[Model, str]:
    if hub_id is not None and optional_config(folder, "config.json").get("auto_map"):
        raise refuse_remote_code_of_hub(hub_id)
    checkpoint = read_checkpoint(folder, trust_code=trust_code)
    model, export = export_model(
        checkpoint,
        name=hub_id or folder.resolve().name,
        opset=opset,
        cache_folder=cache_folder,
        progress=progress,
    )
    note = (
        f"torch.export (dynamo), {export.attention} attention, opset {export.opset}, {export.exporter}; "
        f"within {export.relative_error:.1e} of torch"
    )
    narrow = [dtype for dtype in checkpoint.dtypes if dtype in ("F16", "BF16")]
    return model, f"{note}; weights widened from {', '.join(narrow)} to F32" if narrow else note


def _tokenizer(
    files: dict[str, Path], asked: str | None, model: Model
) -> tuple[TextEncoder | None, dict[str, Path]]:
    """The encoder and the files with the tokenizer's own; only one that was asked for must load."""
    fixed = _fixed_length(model)
    if asked is not None:
        # The limit that the model's own config states holds for another tokenizer, too.
        most = position_limit(read_config(files["config.json"])) if "config.json" in files else None
        encoder = TextEncoder.load(_expanded(asked), most_tokens=most, fixed_length=fixed)
        kept = {name: path for name, path in files.items() if name not in _replaced(encoder)}
        return encoder, kept | {
            k: v for k, v in encoder.files.items() if k != "config.json" or k not in files
        }
    takes_text = any(value.name == "input_ids" for value in model.inputs)
    if "tokenizer.json" not in files or not takes_text:
        return None, files
    try:
        return TextEncoder.load(files["tokenizer.json"], fixed_length=fixed), files
    except RuntimeUnavailable:  # an .onnx file compiles without the tokenizers package
        return None, files


def _fixed_length(model: Model) -> int | None:
    """The number of tokens that a model exported without a dynamic sequence axis takes."""
    for value in model.inputs:
        if value.name == "input_ids" and value.shape is not None and len(value.shape) == 2:
            return value.shape[1] if isinstance(value.shape[1], int) else None
    return None


def _replaced(encoder: TextEncoder) -> set[str]:
    """Tokenizer files of the model's folder that must not stand beside another tokenizer."""
    own = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}
    return own | {"vocab.txt", "vocab.json", "merges.txt"} | (set(encoder.files) - {"config.json"})


def _preprocessor(asked: str) -> Path:
    path = _expanded(asked)
    file = path / _PREPROCESSOR if path.is_dir() else path
    if not file.is_file():
        raise ModelError(
            "the preprocessor does not exist",
            where=str(file),
            remedy=f"name a {_PREPROCESSOR} or the folder that holds it",
        )
    read_config(file)
    return file
