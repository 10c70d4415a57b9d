"""What every runtime offers: the `Runner` protocol and the options a session is opened with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from ..graph.model import TensorSpec

Array = npt.NDArray[np.generic]

OptimizationLevel = Literal[
    "disable_all",
    "basic",
    "extended",
    "layout",
    "all",
    "ORT_DISABLE_ALL",
    "ORT_ENABLE_BASIC",
    "ORT_ENABLE_EXTENDED",
    "ORT_ENABLE_LAYOUT",
    "ORT_ENABLE_ALL",
]

_LEVEL_NAMES = {
    "disable_all": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "layout": "ORT_ENABLE_LAYOUT",
    "all": "ORT_ENABLE_ALL",
}


MAPPED_ABOVE_BYTES = 1 << 29
"""Weights beyond this stay mapped from their file in sessions that are run for their answers only."""


class SessionOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a session runs.

    Attributes:
        threads: threads inside one operator, at least 1; operators run one after another.
        graph_optimization_level: the runtime's own rewriting, by short name or by its enum's
            name; None leaves the runtime's default ("all").
        config: config entries of the runtime, key to text.
    """

    threads: int = 1
    graph_optimization_level: OptimizationLevel | None = None
    config: dict[str, str] = {}

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ValueError(f"threads must be at least 1, not {self.threads}")

    @property
    def level_name(self) -> str | None:
        """The optimization level by the name of onnxruntime's enum; None is the default."""
        level = self.graph_optimization_level
        return None if level is None else _LEVEL_NAMES.get(level, level)

    def for_answers(self, weight_bytes: int) -> SessionOptions:
        """These options for a session whose answers count and whose speed does not.

        Above `MAPPED_ABOVE_BYTES` of weights the runtime makes no packed copies of them: they stay
        mapped from their file, which the system can take back at any time. An entry that is there
        already is kept.
        """
        if weight_bytes <= MAPPED_ABOVE_BYTES:
            return self
        config = {"session.disable_prepacking": "1", **self.config}
        return msgspec.structs.replace(self, config=config)


class Runner(Protocol):
    """A loaded model that runs."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What `run` has to be fed, in the model's order."""

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What `run` gives, in the model's order."""

    @property
    def load_ms(self) -> float:
        """How long opening took, in milliseconds."""

    def run(self, feeds: Mapping[str, Array], output_names: Sequence[str] | None = None) -> dict[str, Array]:
        """Outputs by name for one set of inputs by name.

        Raises:
            DataError: if an input is missing, unknown, or of the wrong type or shape.
            ModelError: if the model fails while running.
        """
