"""A PyTorch text encoder to an ONNX file: exported, folded, run and compared before it counts."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
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

if TYPE_CHECKING:
    import torch

OPSETS = range(18, 24)
_EXAMPLE = (2, 8)
_CHECKED = ((1, 5), (3, 13))
_SEED = 20
_UNBOUNDED_TOKENS = 1 << 16
_TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exported:
    """How an export was made: the attention implementation and its measured error.

    `relative_error` is the largest absolute difference between onnxruntime and torch, divided by
    the largest absolute value of that output, over all outputs and checked shapes.
    """

    attention: str
    relative_error: float


def export_checkpoint(checkpoint: Checkpoint, path: Path, *, opset: int) -> Exported:
    """Export a checkpoint to `path` (weights in `path`.data) with dynamic batch and sequence.

    The file counts only after onnxruntime has run it at two other batch and sequence sizes, with
    padding, and agreed with torch (see `export_check`).

    Args:
        checkpoint: a folder that `read_checkpoint` accepted.
        path: the .onnx file to write.
        opset: the operator set, one of `OPSETS`.

    Raises:
        ModelError: if torch cannot load or export the model, or the export computes something else.
        NotSupported: if the model is no text encoder.
        RuntimeUnavailable: if torch or transformers is missing.
        OSError: as the file system reports it.
    """
    torch = _require_torch()
    with to_log(), torch.no_grad():
        module, attention = _load_module(checkpoint)
        example, *checked = _samples(checkpoint, module)
        names = _output_names(module, example)
        program = _export(module, example, names, checkpoint, opset)
        graph_model = _own_weights(program.model)
        del program
        model = Model(graph_model, origin=Origin(kind="huggingface", name=checkpoint.folder.name))
        run_passes(model, [FoldWeights(), FoldConstants(), RemoveUnused()])
        save_model(model, path, external_threshold_bytes=0)
        error = compare_with_torch(path, module, checked, names)
    return Exported(attention=attention, relative_error=error)


def _require_torch() -> Any:
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
def _reported(checkpoint: Checkpoint, what: str) -> Iterator[None]:
    """Turn the libraries' own exceptions into a `ModelError` that says what was being done."""
    try:
        yield
    except _LIBRARY_ERRORS as error:
        raise ModelError(
            what,
            where=f"{checkpoint.folder.name} ({checkpoint.architecture})",
            why=_first_cause(error),
            remedy="check config.json against the weights, or export the model to .onnx yourself",
        ) from error


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
    with _reported(checkpoint, "config.json does not describe a model that transformers knows"):
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
        kinds = {
            "embedding": transformers.AutoModel,
            "classification": transformers.AutoModelForSequenceClassification,
            "token-classification": transformers.AutoModelForTokenClassification,
        }
        return kinds[checkpoint.task.kind]
    found = getattr(transformers, checkpoint.architecture, None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise NotSupported(
            f"the architecture {checkpoint.architecture} is unknown",
            where="config.json",
            why=f"transformers {transformers.__version__} has no such model class",
            remedy="correct the name, install a newer transformers, or pass an .onnx file",
        )
    if found.main_input_name != "input_ids":
        raise NotSupported(
            f"{checkpoint.architecture} is not a text encoder",
            where="config.json",
            why=f"its main input is {found.main_input_name}",
            remedy="export the model to .onnx yourself and pass that file",
        )
    return found


def _with_attention(
    checkpoint: Checkpoint, loader: Any, options: dict[str, Any]
) -> tuple[torch.nn.Module, str]:
    """Load with eager attention (the plainest graph), else with the class's other one."""
    with _reported(checkpoint, "transformers cannot load the model"):
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


def _samples(checkpoint: Checkpoint, module: torch.nn.Module) -> list[Arrays]:
    """Inputs for the export and for the two checks: random tokens, the last row half padding."""
    accepted = inspect.signature(module.forward).parameters
    config = checkpoint.config
    vocabulary = config.get("vocab_size")
    vocabulary = vocabulary if isinstance(vocabulary, int) and vocabulary > 1 else 2
    padding = config.get("pad_token_id")
    padding = padding if isinstance(padding, int) and 0 <= padding < vocabulary else 0
    limit = _token_limit(checkpoint)
    generator = np.random.default_rng(_SEED)
    samples = []
    for batch, wanted in (_EXAMPLE, *_CHECKED):
        length = min(wanted, limit)
        tokens = generator.integers(0, vocabulary, (batch, length))
        mask = np.ones((batch, length), np.int64)
        mask[-1, (length + 1) // 2 :] = 0
        tokens[tokens == padding] = (padding + 1) % vocabulary
        tokens[mask == 0] = padding
        made = {"input_ids": tokens, "attention_mask": mask}
        # RoBERTa accepts token types but knows one only, and its tokenizer makes none.
        if _types(module) > 1:
            made["token_type_ids"] = np.where(np.arange(length) > length // 2, 1, 0) * np.ones_like(mask)
        samples.append({name: made[name] for name in _TEXT_INPUTS if name in made and name in accepted})
    return samples


def _token_limit(checkpoint: Checkpoint) -> int:
    return min(checkpoint.max_tokens or _UNBOUNDED_TOKENS, _UNBOUNDED_TOKENS)


def _types(module: torch.nn.Module) -> int:
    count = getattr(module.config, "type_vocab_size", 0)
    return count if isinstance(count, int) else 0


def _output_names(module: torch.nn.Module, example: Arrays) -> list[str]:
    try:
        return list(run_torch(module, example))
    except _LIBRARY_ERRORS as error:
        raise ModelError(
            "the model does not run in torch",
            where=type(module).__name__,
            why=_first_cause(error),
            remedy="check config.json (vocabulary, positions) against the weights",
        ) from error


def _export(
    module: torch.nn.Module, example: Arrays, names: list[str], checkpoint: Checkpoint, opset: int
) -> torch.onnx.ONNXProgram:
    import torch

    batch = torch.export.Dim("batch", min=1, max=_UNBOUNDED_TOKENS)
    sequence = torch.export.Dim("sequence", min=1, max=_token_limit(checkpoint))
    with _reported(checkpoint, f"torch cannot export the model at opset {opset}"):
        program = torch.onnx.export(
            module,
            (),
            kwargs={name: torch.from_numpy(array) for name, array in example.items()},
            dynamo=True,
            # torch's own optimiser renames every Linear weight; folding is done below.
            optimize=False,
            opset_version=opset,
            dynamic_shapes={name: {0: batch, 1: sequence} for name in example},
            output_names=names,
            verbose=False,
        )
    if program is None:
        raise ModelError("torch made no ONNX program", where=checkpoint.architecture)
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
