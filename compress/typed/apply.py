"""The passes that carry out what a plan says about 16-bit floats."""

from __future__ import annotations

from collections.abc import Iterable

from ...graph.cleanup import LiftOpset
from ...graph.model import Model
from ...graph.passes import Pass
from ...graph.shapes import InferShapes
from ..operands import FORM_OPSETS
from ..plan import Decision
from ..recipe import IoDtype
from .biases import JoinBiases
from .convert import ConvertFloats
from .formats import TYPES
from .interface import ConvertInterface
from .storage import STORAGE_FORMATS, StoreWeights


def interface_passes(model: Model, io_dtype: IoDtype) -> list[Pass]:
    """The passes that give a graph's float32 inputs and outputs another type; none for fp32."""
    if io_dtype == "fp32":
        return []
    needed = FORM_OPSETS[io_dtype]
    lift: list[Pass] = [LiftOpset(minimum=needed)] if model.opset < needed else []
    return [*lift, ConvertInterface(kind=io_dtype)]


def typed_passes(decisions: Iterable[Decision]) -> list[Pass]:
    """The passes for the decisions in 16-bit forms, in order; none if there are none."""
    made = tuple(decisions)
    forms = {item.form for item in made}
    passes: list[Pass] = [StoreWeights(decisions=made)] if forms & set(STORAGE_FORMATS) else []
    for kind in TYPES:
        if kind in forms:
            passes += [InferShapes(), ConvertFloats(decisions=made, kind=kind)]
            passes += [JoinBiases(decisions=made, kind=kind)]
    return passes
