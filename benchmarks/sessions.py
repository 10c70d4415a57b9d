"""Plain onnxruntime sessions, opened without any of edgepress's code, and their interleaved timing."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from edgepress.export.manifest import Manifest
from edgepress.export.verify import read_manifest
from edgepress.runtimes.timing import BenchmarkResult, Candidate, Schedule, benchmark

Array = npt.NDArray[Any]


class PlainSession:
    """An .onnx file in onnxruntime's CPU provider: defaults, but for the threads and what is given."""

    inputs = ()
    outputs = ()

    def __init__(self, file: Path, threads: int, config: Mapping[str, str], level: str | None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        if level is not None:
            options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
        for key, value in config.items():
            options.add_session_config_entry(key, value)
        started = time.perf_counter_ns()
        self._session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self.load_ms = (time.perf_counter_ns() - started) / 1e6
        self.input_names = [item.name for item in self._session.get_inputs()]
        self._output_names = [item.name for item in self._session.get_outputs()]

    def run(self, feeds: Mapping[str, Array], output_names: Sequence[str] | None = None) -> dict[str, Array]:
        """Outputs by name."""
        names = self._output_names if output_names is None else list(output_names)
        return dict(zip(names, self._session.run(names, dict(feeds)), strict=True))


class Form:
    """One form of a model: its file, and the session options that it is to be run with."""

    def __init__(
        self, name: str, file: Path, config: Mapping[str, str] | None = None, level: str | None = None
    ) -> None:
        self.name = name
        self.file = file
        self.config = dict(config or {})
        self.level = level

    @classmethod
    def of_bundle(cls, name: str, bundle: Path) -> Form:
        """A bundle's model with the session options of its manifest."""
        settings = read_manifest(bundle).session_options
        return cls(name, bundle / "model.onnx", settings.config, settings.graph_optimization_level)

    @property
    def has_options(self) -> bool:
        """Whether it is run with other options than the runtime's defaults."""
        return bool(self.config) or self.level is not None

    @property
    def size_bytes(self) -> int:
        """Bytes of the file, with external data beside it."""
        data = self.file.with_name(self.file.name + ".data")
        return self.file.stat().st_size + (data.stat().st_size if data.is_file() else 0)

    def open(self, threads: int = 1) -> PlainSession:
        """A fresh session."""
        return PlainSession(self.file, threads, self.config, self.level)


def manifest_of(bundle: Path) -> Manifest:
    """The manifest of a bundle."""
    return read_manifest(bundle)


def time_forms(
    forms: Sequence[Form], feeds: Mapping[str, Array], *, threads: int, schedule: Schedule
) -> BenchmarkResult:
    """Time forms of one model against the first, interleaved, in fresh sessions each round."""
    batch = len(next(iter(feeds.values())))
    candidates = [
        Candidate(
            name=form.name,
            open=lambda form=form: form.open(threads),  # type: ignore[misc]
            feeds=(feeds,),
            samples_per_run=batch,
        )
        for form in forms
    ]
    return benchmark(candidates, schedule)


def token_feeds(names: Sequence[str], batch: int, tokens: int) -> dict[str, Array]:
    """Fixed made-up sentences: arrays of shape (batch, tokens), nothing padded."""
    ids = np.random.default_rng(0).integers(1000, 30000, (batch, tokens), dtype=np.int64)
    known = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "token_type_ids": np.zeros_like(ids),
    }
    return {name: known[name] for name in names}


def speed_rows(result: BenchmarkResult) -> dict[str, dict[str, Any]]:
    """Of each form: latencies in ms, and its speed against the first."""
    found: dict[str, dict[str, Any]] = {}
    for timing in result.timings:
        found[timing.name] = {
            "p50_ms": timing.p50_ms,
            "p90_ms": timing.p90_ms,
            "min_ms": timing.min_ms,
            "p99_ms": timing.p99_ms,
            "load_ms": timing.load_ms,
            "runs": timing.runs,
            "ratio": 1.0,
            "ratio_low": 1.0,
            "ratio_high": 1.0,
        }
    for item in result.comparisons:
        found[item.candidate] |= {"ratio": item.ratio, "ratio_low": item.low, "ratio_high": item.high}
    return found
