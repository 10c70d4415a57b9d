"""Running a bfloat16 graph where the runtime has no bfloat16 kernels: float32 arithmetic, rounded results.

Every operator computes in float32 and its result is rounded to bfloat16 by a pair of Casts, so the twin
answers as a device that multiplies bfloat16 and accumulates in float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ...graph.edit import Editor, remove_dead
from ...graph.load import load_model
from ...graph.model import Model, TensorSpec
from ...graph.passes import Outcome, Pass, run_passes
from ...graph.shapes import InferShapes
from ...runtimes.base import SessionOptions
from ...runtimes.feeds import check_feeds
from ...runtimes.ort_runtime import OrtSession
from .propose import MOVING_OPS

if TYPE_CHECKING:
    from ...graph.passes import Interface

Array = npt.NDArray[Any]
_LOW, _REAL = ir.DataType.BFLOAT16, ir.DataType.FLOAT
_EXACT_OPS = MOVING_OPS | {"Relu", "MaxPool", "Max", "Min"}
"""What gives no numbers but those that it reads: nothing to round."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WidenBfloat16(Pass):
    """Let everything that computes in bfloat16 compute in float32 and round its results."""

    def interface(self, before: Interface) -> Interface:
        """Bfloat16 tensors of the interface as float32."""
        inputs, outputs = (tuple(_widened(spec) for spec in specs) for specs in before)
        return inputs, outputs

    def run(self, model: Model) -> Outcome:
        """See `Pass.run`."""
        outcome, editor = Outcome(), Editor(model)
        for value in model.graph.inputs:
            if value.dtype == _LOW:
                value.type = ir.TensorType(_REAL)
                outcome.count("input")
        for value in tuple(model.graph.initializers.values()):
            if value.dtype == _LOW:
                _read_as_float(value, tuple(value.uses()), editor, before=model.graph[0])
                outcome.count("weight")
        for node in tuple(model.graph):
            for value in node.outputs:
                if value.dtype == _LOW:
                    _round(value, node, editor)
                    outcome.count(f"{node.op_type}")
        remove_dead(model)
        return outcome


def _widened(spec: TensorSpec) -> TensorSpec:
    return msgspec.structs.replace(spec, dtype="float32") if spec.dtype == "bfloat16" else spec


def _read_as_float(
    value: ir.Value,
    uses: Collection[tuple[ir.Node, int]],
    editor: Editor,
    *,
    before: ir.Node | None = None,
    after: ir.Node | None = None,
) -> ir.Value:
    """Let some readers of a bfloat16 value read it as float32."""
    real = editor.value(
        "Cast", [value], {"to": int(_REAL)}, before=before, after=after, stem=f"{value.name}/wide",
        like=value, dtype=_REAL,
    )  # fmt: skip
    for reader, place in uses:
        reader.replace_input_with(place, real)
    return real


def _round(value: ir.Value, node: ir.Node, editor: Editor) -> None:
    """Type a result float32, and round it where the operator computed something."""
    readers = tuple(value.uses())
    if node.op_type in _EXACT_OPS:
        value.type = ir.TensorType(_REAL)
        return
    if node.op_type == "Cast":
        real = _read_as_float(value, readers, editor, after=node)
    else:
        value.type = ir.TensorType(_REAL)
        low = editor.value(
            "Cast",
            [value],
            {"to": int(_LOW)},
            after=node,
            stem=f"{value.name}/rounded",
            like=value,
            dtype=_LOW,
        )
        real = _read_as_float(low, readers, editor, after=low.producer())
    if value.is_graph_output():
        name = value.name
        for place, output in enumerate(editor.model.graph.outputs):
            if output is value:
                editor.model.graph.outputs[place] = real
        value.name, real.name = editor.fresh_name(f"{name}/exact"), name


class Bfloat16Session:
    """A bfloat16 graph behind the `Runner` protocol, run as its twin; inputs and outputs keep their types."""

    def __init__(self, model: Model, options: SessionOptions | None = None) -> None:
        self._inputs, self._outputs = model.inputs, model.outputs
        twin = model.fork()
        run_passes(twin, [InferShapes(), WidenBfloat16()])  # a file does not say what lies between
        self._session = OrtSession.from_model(twin, options)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """See `Runner.inputs`."""
        return self._inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """See `Runner.outputs`."""
        return self._outputs

    @property
    def load_ms(self) -> float:
        """See `Runner.load_ms`."""
        return self._session.load_ms

    def run(self, feeds: Mapping[str, Array], output_names: Sequence[str] | None = None) -> dict[str, Array]:
        """See `Runner.run`."""
        checked = check_feeds(self._inputs, feeds)
        low = {spec.name for spec in self._inputs if spec.dtype == "bfloat16"}
        given = {
            name: values.astype(np.float32) if name in low else values for name, values in checked.items()
        }
        found = self._session.run(given, output_names)
        dtypes = {spec.name: spec.dtype for spec in self._outputs}
        return {
            name: values.astype(_LOW.numpy()) if dtypes[name] == "bfloat16" else values
            for name, values in found.items()
        }


def needs_twin(form: str, io_dtype: str) -> bool:
    """Whether onnxruntime lacks what a plan's precision and its inputs and outputs ask for."""
    return form.rpartition("+")[2] == "bf16" or io_dtype == "bf16"


def open_session(
    file: Path, options: SessionOptions, form: str, io_dtype: str
) -> OrtSession | Bfloat16Session:
    """A session that answers as a bundle's model does: its twin where onnxruntime has no kernels for it.

    Args:
        file: the .onnx file.
        options: as for a session.
        form: the plan's precision.
        io_dtype: the plan's type of inputs and outputs.

    Raises:
        ModelError: if the file is missing or onnxruntime refuses the model.
        RuntimeUnavailable: as `OrtSession`.
    """
    if needs_twin(form, io_dtype):
        return Bfloat16Session(load_model(file), options)
    return OrtSession(file, options)


def open_graph(
    model: Model, options: SessionOptions, form: str, io_dtype: str
) -> OrtSession | Bfloat16Session:
    """The same of a graph in memory.

    Raises:
        ModelError: if onnxruntime refuses the model.
        RuntimeUnavailable: as `OrtSession`.
    """
    if needs_twin(form, io_dtype):
        return Bfloat16Session(model, options)
    return OrtSession.from_model(model, options)
