"""The passes that carry out what a plan says about 16-bit floats."""

from __future__ import annotations

from collections.abc import Iterable

from ...graph.passes import Pass
from ...graph.shapes import InferShapes
from ..plan import Decision
from .biases import JoinBiases
from .convert import ConvertFloats
from .formats import TYPES
from .storage import STORAGE_FORMATS, StoreWeights


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
