"""A torch.export program, or a module with example inputs, to a `Model`: exported and compared."""

from __future__ import annotations

import dataclasses
import io
import pickle
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ..graph.errors import ModelError, NotSupported, RuntimeUnavailable
from ..graph.load import file_digest
from ..graph.model import Model, Origin
from .archive import unsafe_archive, write_checked_copy
from .export_cache import cached_export
from .export_check import Arrays
from .imports import USER_FAILURES, import_module
from .quiet import to_log
from .task import guess_task, refuse_cache
from .torch_export import finish_export, reported, require_opset

_CHECKS = 2
_SEED = 20
_VERSIONED = ("torch", "onnx-ir", "onnxscript")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Program:
    """An exported program with what it is run and compared with.

    `names` are the inputs in the program's order; the first `positional` of them are passed by place.
    """

    exported: Any
    run: Callable[..., Any]
    names: tuple[str, ...]
    positional: int
    example: Arrays

    def __call__(self, **inputs: Any) -> dict[str, Any]:
        """The outputs by name for tensors by input name."""
        ordered = [inputs[name] for name in self.names]
        by_name = dict(zip(self.names[self.positional :], ordered[self.positional :], strict=True))
        return _named(self.run(*ordered[: self.positional], **by_name))


def load_archive(
    file: Path,
    *,
    trust_code: bool,
    opset: int,
    cache_folder: Path | None = None,
    starting: Callable[[], None] = lambda: None,
) -> tuple[Model, str]:
    """The FP32 baseline of a .pt2 file and a note on how it was made.

    Without `trust_code` nothing in the file is unpickled or evaluated (see `archive`).

    Args:
        file: the archive.
        trust_code: run code that is in it.
        opset: the operator set, one of `torch_export.OPSETS`.
        cache_folder: where exports are kept, by the file's digest; None keeps nothing.
        starting: called before something is exported.

    Raises:
        ModelError: if the file is damaged, or its program cannot be exported or computes something else.
        NotSupported: if it holds what only running its code can read, or takes no plain tensors.
        RuntimeUnavailable: if torch is missing.
        OutputError: if there is no room for the export.
    """
    files = {file.name: file_digest(file)}
    origin = Origin(kind="torch", name=file.name, files=files, exporter=_versions())

    def read(folder: Path) -> _Program:
        exported, (args, kwargs) = _read_archive(file, folder, trust_code=trust_code)
        return _program(exported, exported.module(), args, kwargs, file.name)

    # What is refused without --trust-code must not come from the cache without it, either.
    sources = files | {"--trust-code": str(trust_code)}
    return _to_model(
        read, origin, opset, folder=file.parent, sources=sources, cache_folder=cache_folder, starting=starting
    )


def load_factory(reference: str, *, opset: int) -> tuple[Model, str]:
    """The FP32 baseline of the module that a user's function makes, and a note on how it was made.

    Exported anew each time: what a function gives depends on more than its file, so nothing could say
    that an export is still of what it would give now.

    The function gives `(module, example)` or `(module, example, dynamic_shapes)`: example inputs as
    a tuple or a dict of tensors, and dynamic shapes as `torch.export.export` takes them; without
    them, the example's shapes are fixed.

    Raises:
        ModelError: if the function fails or gives something else, or the export does.
        NotSupported: if the module takes or gives anything but tensors.
        RuntimeUnavailable: if torch is missing.
        OutputError: if there is no room for the export.
    """
    module_name, _, function = reference.partition(":")
    _require_torch()
    with to_log(), _user_code(reference):
        imported = import_module(module_name)
        made = getattr(imported, function)()
    source = getattr(imported, "__file__", None)
    files = {Path(source).name: file_digest(Path(source))} if source else {}
    origin = Origin(kind="torch", name=reference, files=files, exporter=_versions())
    return _to_model(lambda _: _from_made(made, reference), origin, opset)


def _to_model(
    read: Callable[[Path], _Program],
    origin: Origin,
    opset: int,
    *,
    folder: Path | None = None,
    sources: Mapping[str, str] | None = None,
    cache_folder: Path | None = None,
    starting: Callable[[], None] = lambda: None,
) -> tuple[Model, str]:
    """The export, from the cache where `sources` say what it is of; `folder` may hold a list of classes."""
    torch = _require_torch()
    require_opset(opset)

    def export(path: Path) -> tuple[str, float]:
        with to_log(), torch.no_grad():
            return "", _export(read(path.parent), path, opset, origin.name)

    loaded, note = cached_export(
        export,
        None if sources is None else cache_folder,
        sources=sources or {},
        opset=opset,
        packages=_VERSIONED,
        starting=starting,
    )
    model = Model(loaded.ir, origin=origin)
    refuse_cache(model)
    with tempfile.TemporaryDirectory(prefix="edgepress-empty-") as empty:
        model.task = guess_task(model, folder or Path(empty))
    how = f"torch.export (dynamo), opset {opset}, {origin.exporter}"
    return model, f"{how}; within {note.relative_error:.1e} of torch"


def _require_torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise RuntimeUnavailable(
            f"the {error.name} package is not installed",
            why="a PyTorch model is exported to ONNX with torch",
            remedy="pip install 'edgepress[torch]', or pass an .onnx file, which does not need it",
        ) from error
    return torch


def _versions() -> str:
    return ", ".join(f"{name} {metadata.version(name)}" for name in _VERSIONED if _installed(name))


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _read_archive(file: Path, folder: Path, *, trust_code: bool) -> tuple[Any, tuple[Any, Any]]:
    """The program, and its sample inputs as (positional, named)."""
    import torch

    what = "torch cannot load the .pt2 archive"
    if trust_code:
        with reported(file.name, what):
            exported = torch.export.load(file)
        return exported, _sample_inputs(exported.example_inputs, file.name)
    copy = folder / "checked.pt2"
    pickled = write_checked_copy(file, copy)
    try:
        samples = torch.load(io.BytesIO(pickled), weights_only=True) if pickled else None
    except pickle.UnpicklingError as error:
        raise unsafe_archive("sample inputs that are more than plain tensors", file.name) from error
    except (RuntimeError, EOFError, ValueError, TypeError, KeyError) as error:
        raise ModelError(what, where=file.name, why=f"its sample inputs are damaged: {error}") from error
    with reported(file.name, what):
        exported = torch.export.load(copy)
    copy.unlink()
    return exported, _sample_inputs(samples, file.name)


def _sample_inputs(samples: Any, where: str) -> tuple[Any, Any]:
    if isinstance(samples, tuple) and len(samples) == 2 and isinstance(samples[1], dict):
        return samples[0], samples[1]
    raise ModelError(
        "the .pt2 archive has no sample inputs",
        where=where,
        why="they are what the export is compared with torch on",
        remedy="save the program as torch.export.export made it, with its example inputs",
    )


@contextmanager
def _user_code(reference: str) -> Iterator[None]:
    try:
        yield
    except USER_FAILURES as error:
        raise ModelError(
            "the model's factory fails",
            where=reference,
            why=f"{type(error).__name__}: {error}",
            remedy="run the function on its own and repair it",
        ) from error


def _from_made(made: Any, reference: str) -> _Program:
    import torch

    good = isinstance(made, tuple) and len(made) in (2, 3) and isinstance(made[0], torch.nn.Module)
    if not good or not isinstance(made[1], (tuple, dict)):
        kinds = (
            ", ".join(type(item).__name__ for item in made)
            if isinstance(made, tuple)
            else type(made).__name__
        )
        raise ModelError(
            "the factory does not give a model with example inputs",
            where=reference,
            why=f"it gives {kinds}",
            remedy="return (module, example) or (module, example, dynamic_shapes), where example is a "
            "tuple or a dict of tensors",
        )
    module, example = made[0].eval(), made[1]
    args, kwargs = ((), example) if isinstance(example, dict) else (example, {})
    shapes = made[2] if len(made) == 3 else None
    with reported(reference, "torch.export cannot export the module"):
        exported = torch.export.export(module, args, kwargs, dynamic_shapes=shapes)
    return _program(exported, module, args, kwargs, reference)


def _program(exported: Any, run: Callable[..., Any], args: Any, kwargs: Any, where: str) -> _Program:
    import torch

    names = exported.graph_signature.user_inputs
    named = [str(name) for name in names[len(args) :]]
    values = [*args, *(kwargs[name] for name in (named if set(named) == set(kwargs) else kwargs))]
    if len(names) != len(values) or not all(isinstance(value, torch.Tensor) for value in values):
        raise NotSupported(
            "the model takes other inputs than tensors",
            where=where,
            why=f"its example inputs are {', '.join(type(value).__name__ for value in values)}",
            remedy="export a module whose forward takes tensors only",
        )
    with reported(where, "the example inputs are no arrays"):
        arrays = [value.detach().numpy() for value in values]
    example = dict(zip((str(name) for name in names), arrays, strict=True))
    return _Program(exported=exported, run=run, names=tuple(example), positional=len(args), example=example)


def _named(outputs: Any) -> dict[str, Any]:
    """Outputs by name: a mapping's own names, "output" for one tensor, "output_0" and on for several."""
    import torch

    if isinstance(outputs, torch.Tensor):
        return {"output": outputs}
    if isinstance(outputs, (tuple, list)):
        outputs = {f"output_{index}": value for index, value in enumerate(outputs)}
    if isinstance(outputs, Mapping) or hasattr(outputs, "items"):
        named = {str(name): value for name, value in outputs.items() if value is not None}
        if named and all(isinstance(value, torch.Tensor) for value in named.values()):
            return named
    raise NotSupported(
        "the model gives other outputs than tensors",
        where=type(outputs).__name__,
        remedy="export a module whose forward returns a tensor, or a tuple or dict of tensors",
    )


def _export(program: _Program, path: Path, opset: int, where: str) -> float:
    import torch

    with reported(where, "the model does not run in torch on its own example inputs"):
        tensors = {name: torch.from_numpy(array) for name, array in program.example.items()}
        outputs = list(program(**tensors))
        checked = _check_inputs(program)
    with reported(where, f"torch cannot export the model at opset {opset}"):
        made = torch.onnx.export(
            program.exported,
            dynamo=True,
            optimize=False,
            opset_version=opset,
            input_names=list(program.names),
            output_names=outputs,
            verbose=False,
        )
    if made is None:
        raise ModelError("torch made no ONNX program", where=where)
    _name_axes(made.model)
    return finish_export(made.model, program, [program.example, *checked], outputs, path)


def _input_shapes(program: _Program) -> dict[str, Any]:
    """Input name -> its shape in the program, of ints and torch.SymInt."""
    found = {node.name: node.meta["val"] for node in program.exported.graph.nodes if node.op == "placeholder"}
    return {name: found[name].shape for name in program.names}


def _check_inputs(program: _Program) -> list[Arrays]:
    """Inputs at other sizes wherever a size is free, of the values that the example holds."""
    shapes = _input_shapes(program)
    sizes: dict[Any, int] = {}
    for name, shape in shapes.items():
        for dim, size in zip(shape, program.example[name].shape, strict=True):
            if not isinstance(dim, int) and dim.node.expr.is_Symbol:
                sizes[dim.node.expr] = size
    generator = np.random.default_rng(_SEED)
    made = []
    for turn in range(_CHECKS):
        chosen = {symbol: _other_size(program, symbol, size, turn) for symbol, size in sizes.items()}
        inputs = {}
        for name, shape in shapes.items():
            wanted = tuple(dim if isinstance(dim, int) else int(dim.node.expr.subs(chosen)) for dim in shape)
            inputs[name] = _values(program.example[name], wanted, generator)
        made.append(inputs)
    return made


def _other_size(program: _Program, symbol: Any, size: int, turn: int) -> int:
    """A smaller size than the example's, then a larger one, inside the program's range."""
    limits = program.exported.range_constraints.get(symbol)
    least = int(limits.lower) if limits is not None and limits.lower.is_Integer else 0
    most = int(limits.upper) if limits is not None and limits.upper.is_Integer else size + 3
    return max(least, 1, size - 1) if turn == 0 else min(size + 3, most)


def _values(example: Any, shape: tuple[int, ...], generator: np.random.Generator) -> Any:
    if example.dtype.kind == "f" and np.ptp(example) == 0:
        return generator.standard_normal(shape).astype(example.dtype)
    return generator.choice(example.ravel(), shape).astype(example.dtype)


def _name_axes(model: ir.Model) -> None:
    """Give torch's symbols names that say which axis they are: "batch", or "<input>_<axis>"."""
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        for axis, dim in enumerate(value.shape or ()):
            text = dim.value if isinstance(dim, ir.SymbolicDim) else None
            if text and re.fullmatch(r"s\d+", text) and text not in names:
                free = axis == 0 and "batch" not in names.values()
                names[text] = "batch" if free else f"{value.name}_{axis}"
    if not names:
        return
    pattern = re.compile(rf"\b({'|'.join(names)})\b")
    for value in _all_values(model):
        if value.shape is None:
            continue
        for axis, dim in enumerate(value.shape):
            if isinstance(dim, ir.SymbolicDim) and dim.value:
                renamed = pattern.sub(lambda found: names[found[0]], dim.value)
                if renamed != dim.value:
                    value.shape[axis] = ir.SymbolicDim(renamed)


def _all_values(model: ir.Model) -> Iterator[ir.Value]:
    yield from model.graph.inputs
    for node in model.graph.all_nodes():
        yield from node.outputs
