"""onnxruntime on the CPU: sessions that check what they are fed and explain what fails."""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import onnx_ir as ir

from ..graph.errors import DataError, EdgepressError, ModelError, NotSupported, RuntimeUnavailable
from ..graph.model import Model, TensorSpec
from ..graph.save import INLINE_LIMIT_BYTES, save_model, to_bytes
from .base import Array, SessionOptions
from .feeds import check_feeds

if TYPE_CHECKING:
    import onnxruntime

_PROVIDER = "CPUExecutionProvider"
_SILENT = 4  # severities run from 0 (verbose) to 4 (fatal)
_NUMPY_NAMES = {"float": "float32", "double": "float64"}
# Constants above this size carry their type and shape only in an optimised graph.
_KEPT_CONSTANT_BYTES = 4096
_NODE = re.compile(r"running (?P<op>\S+) node\. Name:'(?P<name>[^']*)'")
_NO_KERNEL = re.compile(r"implementation for (?P<op>\S+) node with name '(?P<name>[^']*)'")
_BAD_NODE = re.compile(r"In Node, \(\"(?P<name>[^\"]*)\", (?P<op>[^,]+),")


class OrtSession:
    """A model opened in onnxruntime's CPU provider; implements `Runner`.

    Args:
        model: the path of an .onnx file, or a serialised model (without external data).
        options: threads, optimization level and config entries.
        name: what error messages call the model; the file's name by default.

    Raises:
        ModelError: if the file is missing or onnxruntime refuses the model.
        RuntimeUnavailable: if onnxruntime is missing, has no kernel for an operator, or memory
            runs out.
    """

    def __init__(
        self, model: Path | bytes, options: SessionOptions | None = None, *, name: str | None = None
    ) -> None:
        self.options = options or SessionOptions()
        self._where = name or _name_of(model)
        started = time.perf_counter_ns()
        self._session = _open(model, self.options, self._where)
        self._load_ms = (time.perf_counter_ns() - started) / 1e6
        self._inputs = tuple(_spec(item) for item in self._session.get_inputs())
        self._outputs = tuple(_spec(item) for item in self._session.get_outputs())

    @classmethod
    def from_model(cls, model: Model, options: SessionOptions | None = None) -> OrtSession:
        """Open a graph that is in memory.

        Weights up to 1 GiB go over as bytes; larger ones through a temporary folder, which is
        removed as soon as the session has read or mapped it, and stay mapped (`for_answers`).

        Raises:
            ModelError: if onnxruntime refuses the model.
            RuntimeUnavailable: as `OrtSession`.
        """
        if model.weight_bytes <= INLINE_LIMIT_BYTES:
            session = cls(to_bytes(model), options, name=model.origin.name)
        else:
            with tempfile.TemporaryDirectory(prefix="edgepress-session-") as folder:
                path = Path(folder) / "model.onnx"
                save_model(model, path)
                sparing = (options or SessionOptions()).for_answers(model.weight_bytes)
                session = cls(path, sparing, name=model.origin.name)
        # onnxruntime reports an unknown rank and a scalar alike: the graph knows which it is.
        session._inputs = tuple(_with_known_rank(spec, model.inputs) for spec in session._inputs)
        return session

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What `run` has to be fed, in the model's order."""
        return self._inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What `run` gives, in the model's order."""
        return self._outputs

    @property
    def load_ms(self) -> float:
        """How long opening the session took, in milliseconds."""
        return self._load_ms

    def run(self, feeds: Mapping[str, Array], output_names: Sequence[str] | None = None) -> dict[str, Array]:
        """Outputs by name for one set of inputs by name.

        Args:
            feeds: one array per input, of the declared type and shape.
            output_names: which outputs; None gives all.

        Raises:
            DataError: if an input is missing, unknown, of the wrong type or shape, or an output
                is not the model's.
            ModelError: if an operator fails while running.
            RuntimeUnavailable: if memory runs out.
        """
        checked = check_feeds(self._inputs, feeds)
        known = [spec.name for spec in self._outputs]
        names = known if output_names is None else list(output_names)
        for name in names:
            if name not in known:
                raise DataError(
                    f"the model has no output {name!r}",
                    where=self._where,
                    remedy=f"its outputs are: {', '.join(known)}",
                )
        try:
            results = self._session.run(names, checked)
        except _failures() as error:
            raise _run_error(str(error), self._where) from error
        return {name: np.asarray(value) for name, value in zip(names, results, strict=True)}

    def repeated(self, feeds: Mapping[str, Array]) -> Callable[[], object]:
        """What runs the model on these inputs, which are checked here and not each time: to be timed.

        Raises:
            DataError: if an input is missing, unknown, or of the wrong type or shape.
        """
        checked = check_feeds(self._inputs, feeds)
        session, where = self._session, self._where

        def once() -> object:
            try:
                return session.run(None, checked)
            except _failures() as error:
                raise _run_error(str(error), where) from error

        return once


def runtime_version() -> str:
    """onnxruntime's version, as the loaded library says it.

    Raises:
        RuntimeUnavailable: if onnxruntime cannot be imported.
    """
    return str(_onnxruntime().__version__)


def optimised_graph(model: Model | Path | bytes, options: SessionOptions | None = None) -> ir.Model:
    """The graph as onnxruntime runs it, after its own rewriting.

    Large constants are left out (type and shape stay), so that no weights stay in memory. The
    session is only opened, never run.

    Args:
        model: a graph in memory, an .onnx file, or a serialised model.
        options: as for a session; put a target's `audit_config` in to see what it would run.

    Raises:
        ModelError: if onnxruntime refuses the model.
        RuntimeUnavailable: as `OrtSession`.
    """
    # Packing comes after the rewriting: left out, large weights stay mapped and nothing else changes.
    wanted = options or SessionOptions()
    wanted = msgspec.structs.replace(wanted, config={**wanted.config, "session.disable_prepacking": "1"})
    with tempfile.TemporaryDirectory(prefix="edgepress-optimised-") as folder:
        target = Path(folder) / "optimised.onnx"
        source: Path | bytes
        if isinstance(model, Model):
            source = Path(folder) / "model.onnx"
            save_model(model, source)
            where = model.origin.name
        else:
            source = model
            where = _name_of(model)
        _open(source, wanted, where, save_to=target)
        optimised = ir.load(target)
        for graph in (optimised.graph, *optimised.graph.subgraphs()):
            for value in graph.initializers.values():
                _forget_large(value)
    return optimised


def measure_limits() -> tuple[int, int]:
    """The largest opset and the largest IR version that the installed onnxruntime loads, by trying.

    Raises:
        RuntimeUnavailable: if onnxruntime cannot be imported.
    """
    opset = _largest(lambda version: (version, 8), range(13, 64))
    ir_version = _largest(lambda version: (13, version), range(8, 64))
    return opset, ir_version


def _largest(make: Any, versions: range) -> int:
    best = versions.start
    for version in versions:
        opset, ir_version = make(version)
        value = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1]))
        node = ir.node("Identity", [value])
        node.outputs[0].name = "y"
        node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
        graph = ir.Graph([value], list(node.outputs), nodes=[node], opset_imports={"": opset})
        proto = ir.to_proto(ir.Model(graph, ir_version=ir_version))
        try:
            _open(proto.SerializeToString(), SessionOptions(), "trial")
        except EdgepressError:
            break
        best = version
    return best


def _name_of(model: Path | bytes) -> str:
    return model.name if isinstance(model, Path) else "the serialised model"


def _onnxruntime() -> Any:
    # onnxruntime reads this when it is first imported; switching telemetry off afterwards is too late.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError as error:
        raise RuntimeUnavailable(
            "onnxruntime cannot be imported",
            why=str(error),
            remedy="pip install onnxruntime (64-bit Python on x86-64 or aarch64)",
        ) from error
    return onnxruntime


def _failures() -> tuple[type[Exception], ...]:
    """The exception types that onnxruntime raises; none derives from another."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    own = [item for item in vars(state).values() if isinstance(item, type) and issubclass(item, Exception)]
    return (*own, RuntimeError, ValueError, MemoryError)


def _open(
    model: Path | bytes, options: SessionOptions, where: str, *, save_to: Path | None = None
) -> onnxruntime.InferenceSession:
    ort = _onnxruntime()
    ort.disable_telemetry_events()
    if isinstance(model, Path) and not model.is_file():
        raise ModelError("the model file does not exist", where=str(model), remedy="check the path")
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = options.threads
    settings.inter_op_num_threads = 1
    settings.log_severity_level = _SILENT
    if options.level_name is not None:
        settings.graph_optimization_level = getattr(ort.GraphOptimizationLevel, options.level_name)
    if save_to is not None:
        settings.optimized_model_filepath = str(save_to)
        settings.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", f"{save_to.name}.data"
        )
        settings.add_session_config_entry(
            "session.optimized_model_external_initializers_min_size_in_bytes", str(_KEPT_CONSTANT_BYTES)
        )
    try:
        for key, value in options.config.items():
            settings.add_session_config_entry(key, value)
        return ort.InferenceSession(
            str(model) if isinstance(model, Path) else model,
            settings,
            providers=[_PROVIDER],
            enable_fallback=0,
        )
    except _failures() as error:
        raise _open_error(str(error), where) from error


def _spec(item: Any) -> TensorSpec:
    match = re.fullmatch(r"tensor\((\w+)\)", item.type)
    if match is None:
        raise NotSupported(
            f"{item.name!r} is not a tensor but {item.type}",
            where=item.name,
            remedy="export the model with tensors only as inputs and outputs",
        )
    dtype = _NUMPY_NAMES.get(match[1], match[1])
    # An unknown rank is reported as an empty shape, just as a scalar is: accept both.
    shape = tuple(item.shape) if item.shape else None
    return TensorSpec(name=item.name, dtype=dtype, shape=shape)


def _with_known_rank(spec: TensorSpec, graph_inputs: tuple[TensorSpec, ...]) -> TensorSpec:
    if spec.shape is None:
        for known in graph_inputs:
            if known.name == spec.name and known.shape is not None:
                return known
    return spec


def _forget_large(value: ir.Value) -> None:
    tensor = value.const_value
    if tensor is not None and tensor.nbytes > _KEPT_CONSTANT_BYTES:
        value.type, value.shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())
        value.const_value = None
    elif isinstance(tensor, ir.ExternalTensor):
        value.const_value = ir.Tensor(tensor.numpy().copy(), name=tensor.name)


def _tidy(message: str) -> str:
    """onnxruntime's message without its prefix and its source files' paths."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : (\w+) : ", r"\1: ", message.strip())
    text = re.sub(r"/\S*/(\w+\.(?:h|cc|cpp)):\d+ ", "", text)
    return text.split("\n\n")[0][:600]


def _node_place(message: str, where: str) -> str:
    for pattern in (_NODE, _NO_KERNEL, _BAD_NODE):
        match = pattern.search(message)
        if match:
            return f"{where}: node {match['name']!r} ({match['op'].strip()})"
    return where


def _open_error(message: str, where: str) -> EdgepressError:
    place, why = _node_place(message, where), _tidy(message)
    if _NO_KERNEL.search(message):
        return RuntimeUnavailable(
            "onnxruntime has no CPU kernel for an operator of the model in this type",
            where=place,
            why=why,
            remedy="keep this operator in float32, or convert the model's opset",
        )
    if _out_of_memory(message):
        return _memory_error(where, why)
    if "INVALID_PROTOBUF" in message or "No graph was found" in message:
        return ModelError(
            "the model is not an ONNX file, or it is truncated",
            where=where,
            why=why,
            remedy="check that the file was copied whole; compare its size with the source's",
        )
    return ModelError(
        "onnxruntime refuses the model",
        where=place,
        why=why,
        remedy="check the model with `edgepress inspect`; operators of other domains need their own runtime",
    )


def _run_error(message: str, where: str) -> EdgepressError:
    place, why = _node_place(message, where), _tidy(message)
    if _out_of_memory(message):
        return _memory_error(place, why)
    if "INVALID_ARGUMENT" in message and not _NODE.search(message):
        return DataError(
            "onnxruntime refuses the inputs",
            where=where,
            why=why,
            remedy="compare the arrays with the model's inputs: `edgepress inspect`",
        )
    return ModelError(
        "the model failed while running",
        where=place,
        why=why,
        remedy="check that the sizes of the inputs fit each other and the model",
    )


def _out_of_memory(message: str) -> bool:
    lowered = message.lower()
    return any(text in lowered for text in ("bad_alloc", "bad allocation", "failed to allocate memory"))


def _memory_error(where: str, why: str) -> RuntimeUnavailable:
    return RuntimeUnavailable(
        "there is not enough memory to run the model",
        where=where,
        why=why,
        remedy="use a smaller batch or shorter inputs, or a machine with more memory",
    )
