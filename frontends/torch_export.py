"""A PyTorch model to an ONNX file: exported, folded, run and compared before it counts."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from ..graph.cleanup import FoldConstants, FoldWeights, RemoveUnused
from ..graph.errors import ModelError, NotSupported, RuntimeUnavailable
from ..graph.metadata import drop_metadata
from ..graph.model import Model, Origin
from ..graph.passes import run_passes
from ..graph.save import save_model
from .checkpoint import Checkpoint
from .export_check import Arrays, compare_with_torch, run_torch
from .quiet import to_log
from .samples import Samples, samples_for

if TYPE_CHECKING:
    import torch

OPSETS = range(18, 24)
# What transformers and torch raise for a config, weights or graph that they cannot handle.
_LIBRARY_ERRORS = (
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    OSError,
    ImportError,
    AssertionError,
    NotImplementedError,
    MemoryError,
)


# For architectures that are code in the folder: the loader that finds it.
_AUTO_CLASSES = (
    ("ForSequenceClassification", "AutoModelForSequenceClassification"),
    ("ForTokenClassification", "AutoModelForTokenClassification"),
    ("ForQuestionAnswering", "AutoModelForQuestionAnswering"),
    ("ForMaskedLM", "AutoModelForMaskedLM"),
    ("ForCausalLM", "AutoModelForCausalLM"),
    ("LMHeadModel", "AutoModelForCausalLM"),
    ("ForImageClassification", "AutoModelForImageClassification"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exported:
    """How an export was made: the attention implementation and its measured error.

    `relative_error` is the largest absolute difference between onnxruntime and torch, divided by
    the largest absolute value of that output, over all outputs and checked shapes.
    """

    attention: str
    relative_error: float


def export_checkpoint(checkpoint: Checkpoint, path: Path, *, opset: int) -> Exported:
    """Export a checkpoint to `path` (weights in `path`.data), batch and (where free) length dynamic.

    The file counts only after onnxruntime has run it at two other sizes (texts with padding) and
    agreed with torch (see `export_check`).

    Args:
        checkpoint: a folder that `read_checkpoint` accepted.
        path: the .onnx file to write.
        opset: the operator set, one of `OPSETS`.

    Raises:
        ModelError: if torch cannot load or export the model, or the export computes something else.
        NotSupported: if the model takes or gives what is not supported (several inputs, a KV cache).
        RuntimeUnavailable: if torch or transformers is missing.
        OSError: as the file system reports it.
    """
    torch = require_torch()
    where = f"{checkpoint.folder.name} ({checkpoint.architecture})"
    with to_log(), torch.no_grad():
        module, attention = _load_module(checkpoint)
        error = export_module(module, samples_for(checkpoint, module), path, opset=opset, where=where)
    return Exported(attention=attention, relative_error=error)


def export_module(module: torch.nn.Module, samples: Samples, path: Path, *, opset: int, where: str) -> float:
    """Export a module in evaluation mode and compare; call under `torch.no_grad`.

    Args:
        module: takes its inputs by name and returns tensors by name (see `run_torch`).
        samples: the first is exported with, the others are compared.
        path: the .onnx file to write.
        opset: the operator set, one of `OPSETS`.
        where: what messages name.

    Returns:
        The relative error (see `Exported`).

    Raises:
        ModelError: if torch cannot run or export the module, or the export computes something else.
        NotSupported: if it gives a KV cache.
        OSError: as the file system reports it.
    """
    example, *checked = samples.inputs
    names = _output_names(module, example)
    program = _export(module, samples, names, opset, where)
    return finish_export(program.model, module, checked, names, path)


def finish_export(
    exported: ir.Model,
    module: Callable[..., Any],
    checked: Sequence[Arrays],
    names: list[str],
    path: Path,
) -> float:
    """Fold and save what torch exported, then compare it with `module` on the `checked` inputs.

    Returns:
        The relative error (see `Exported`).

    Raises:
        ModelError: if onnxruntime cannot run it, or it computes something else.
        OSError: as the file system reports it.
    """
    model = Model(_own_weights(exported), origin=Origin(kind="memory", name=path.stem))
    run_passes(model, [FoldWeights(), FoldConstants(), RemoveUnused()])
    save_model(model, path, external_threshold_bytes=0)
    return compare_with_torch(path, module, checked, names)


def require_opset(opset: int) -> None:
    """Refuse an operator set that torch does not write.

    Raises:
        NotSupported: if it is none of `OPSETS`.
    """
    if opset not in OPSETS:
        raise NotSupported(
            f"exporting at opset {opset} is not supported",
            where="opset",
            why=f"torch.export writes opsets {OPSETS.start} to {OPSETS.stop - 1}",
            remedy="leave the opset out, or pass an .onnx file of that opset",
        )


def require_torch() -> Any:
    """torch, with transformers present.

    Raises:
        RuntimeUnavailable: if one of them is missing.
    """
    try:
        import torch
        import transformers  # noqa: F401 - only its presence is asked for
    except ImportError as error:
        raise RuntimeUnavailable(
            f"the {error.name} package is not installed",
            why="a Hugging Face model is exported to ONNX with torch and transformers",
            remedy="pip install 'edgepress[hf]', or pass an .onnx file, which needs neither",
        ) from error
    return torch


@contextmanager
def reported(where: str, what: str) -> Iterator[None]:
    """Turn the libraries' own exceptions into a `ModelError` that says what was being done."""
    try:
        yield
    except _LIBRARY_ERRORS as error:
        raise ModelError(
            what,
            where=where,
            why=_first_cause(error),
            remedy="check the config against the weights, or export the model to .onnx yourself",
        ) from error


def _where(checkpoint: Checkpoint) -> str:
    return f"{checkpoint.folder.name} ({checkpoint.architecture})"


def _first_cause(error: BaseException) -> str:
    """The innermost exception's type and first line (torch wraps errors in pages of advice)."""
    while error.__cause__ is not None:
        error = error.__cause__
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    first = next((line.strip() for line in plain.splitlines() if line.strip()), "no message")
    return f"{type(error).__name__}: {first[:300]}"


def _load_module(checkpoint: Checkpoint) -> tuple[torch.nn.Module, str]:
    """The float32 module in evaluation mode, with eager attention where it has that."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": checkpoint.remote_code}
    with reported(_where(checkpoint), "config.json does not describe a model that transformers knows"):
        try:
            config = AutoConfig.from_pretrained(checkpoint.folder, **options)
        except StrictDataclassError as error:
            raise ValueError(str(error)) from error
    config.use_cache = False
    config.output_attentions = False
    config.output_hidden_states = False
    config.return_dict = True
    loader = _model_class(checkpoint)
    module, attention = _with_attention(checkpoint, loader, options | {"config": config})
    return module.eval(), attention


def _model_class(checkpoint: Checkpoint) -> Any:
    import transformers

    if checkpoint.remote_code:
        matching = (name for end, name in _AUTO_CLASSES if checkpoint.architecture.endswith(end))
        return getattr(transformers, next(matching, "AutoModel"))
    if checkpoint.architecture == "WhisperEncoder":  # not among transformers' own exports
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        return WhisperEncoder
    found = getattr(transformers, checkpoint.architecture, None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise NotSupported(
            f"the architecture {checkpoint.architecture} is unknown",
            where="config.json",
            why=f"transformers {transformers.__version__} has no such model class",
            remedy="correct the name, install a newer transformers, or pass an .onnx file",
        )
    return found


def _with_attention(
    checkpoint: Checkpoint, loader: Any, options: dict[str, Any]
) -> tuple[torch.nn.Module, str]:
    """Load with eager attention (the plainest graph), else with the class's other one."""
    with reported(_where(checkpoint), "transformers cannot load the model"):
        try:
            return _load_complete(checkpoint, loader, options | {"attn_implementation": "eager"}), "eager"
        except ValueError as error:
            if "attn" not in str(error).lower() and "attention" not in str(error).lower():
                raise
        return _load_complete(checkpoint, loader, options | {"attn_implementation": "sdpa"}), "sdpa"


def _load_complete(checkpoint: Checkpoint, loader: Any, options: dict[str, Any]) -> torch.nn.Module:
    """Load weights, refusing a model of which parts would stay at random values.

    A pooler without weights (usual for sentence encoders, which do not use it) is left out.
    """
    module, missing = _load_once(checkpoint, loader, options)
    if missing and all(name.startswith("pooler.") for name in missing):
        module, missing = _load_once(checkpoint, loader, options | {"add_pooling_layer": False})
    if missing:
        raise ModelError(
            "the weights are incomplete",
            where=f"{checkpoint.folder.name} ({checkpoint.architecture})",
            why=f"{len(missing)} parameters are not in the file, among them {missing[0]}",
            remedy="check that config.json's architecture is the one that was trained",
        )
    return module


def _load_once(
    checkpoint: Checkpoint, loader: Any, options: dict[str, Any]
) -> tuple[torch.nn.Module, list[str]]:
    """The module in float32, and its parameters that the files do not hold."""
    import torch
    from safetensors import SafetensorError
    from transformers.utils import logging

    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        module, info = loader.from_pretrained(
            checkpoint.folder,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    finally:
        if bar:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
    return module, sorted(info["missing_keys"])


def _output_names(module: torch.nn.Module, example: Arrays) -> list[str]:
    try:
        return list(run_torch(module, example))
    except _LIBRARY_ERRORS as error:
        raise ModelError(
            "the model does not run in torch",
            where=type(module).__name__,
            why=_first_cause(error),
            remedy="check the config (vocabulary, positions, image size) against the weights",
        ) from error


def _export(
    module: torch.nn.Module, samples: Samples, names: list[str], opset: int, where: str
) -> torch.onnx.ONNXProgram:
    import torch

    dims = {
        (name, least, most): torch.export.Dim(name, min=least, max=most)
        for axes in samples.axes.values()
        for name, least, most in axes.values()
    }
    example = samples.inputs[0]
    shapes = {
        name: {axis: dims[free] for axis, free in samples.axes.get(name, {}).items()} for name in example
    }
    with reported(where, f"torch cannot export the model at opset {opset}"):
        program = torch.onnx.export(
            module,
            (),
            kwargs={name: torch.from_numpy(array) for name, array in example.items()},
            dynamo=True,
            # torch's own optimiser renames every Linear weight; folding is done below.
            optimize=False,
            opset_version=opset,
            dynamic_shapes=shapes,
            output_names=names,
            verbose=False,
        )
    if program is None:
        raise ModelError("torch made no ONNX program", where=where)
    return program


def _own_weights(model: ir.Model) -> ir.Model:
    """Make constants initializers, and weights plain tensors over the module's own memory."""
    from onnx_ir.passes import common as stock

    stock.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    for graph in (model.graph, *model.graph.subgraphs()):
        for name, value in graph.initializers.items():
            if value.const_value is not None:
                value.const_value = ir.tensor(value.const_value.numpy(), name=name)
    drop_metadata(model)
    return model
