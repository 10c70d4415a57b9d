"""Serve an .onnx file with the onnxruntime of the environment, on its CPU provider.

Options of a form: `config` (session config entries), `level` (name of a graph optimization level) and
`disabled` (names of graph optimizers that are not to run); none of them: the runtime's defaults.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

Feeds = dict[str, npt.NDArray[Any]]


class FileSession:
    """One fresh session of a file."""

    def __init__(self, file: str, threads: int, options: dict[str, Any]) -> None:
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = threads
        settings.inter_op_num_threads = 1
        settings.log_severity_level = 3
        if options.get("level") is not None:
            settings.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, options["level"])
        for key, value in options.get("config", {}).items():
            settings.add_session_config_entry(key, value)
        self._session = onnxruntime.InferenceSession(
            file,
            settings,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=options.get("disabled") or None,
        )
        self.input_names = [item.name for item in self._session.get_inputs()]
        self._output_names = [item.name for item in self._session.get_outputs()]

    def run(self, feeds: Feeds) -> Feeds:
        """Outputs by name."""
        outputs = self._session.run(self._output_names, feeds)
        return {name: np.asarray(value) for name, value in zip(self._output_names, outputs, strict=True)}


def load(file: str, threads: int, options: dict[str, Any]) -> FileSession:
    """A fresh session."""
    return FileSession(file, threads, options)
