"""Run a program such as those beside this file in whichever environment its interpreter belongs to.

    python program.py PROGRAM.py prepare REQUEST.json ANSWER.json
    python program.py PROGRAM.py serve FORM.json

`prepare` hands the request to the program's `prepare` and writes the forms that it returns. `serve` is a
worker: it answers one JSON line on stdout for every JSON line on stdin (see `Worker`), and times with its own
clock, so that neither pipes nor the parent are part of a figure. Arrays travel in .npz files, named
`INDEX.INPUT`.

Nothing here needs more than Python and NumPy, because a peer's environment holds what the peer asks for.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np
import numpy.typing as npt

Feeds = dict[str, npt.NDArray[Any]]
_WINDOW = 5
_TOLERANCE = 0.05
_MOST_WARM_UPS_FOLD = 10


class Session(Protocol):
    """A loaded model, ready to run."""

    input_names: list[str]

    def run(self, feeds: Feeds) -> Feeds:
        """Outputs by name; they need not outlive the next run."""
        ...


class Program(Protocol):
    """What a program offers: `prepare`, `load`, or both."""

    def prepare(self, request: dict[str, str], samples: list[Feeds]) -> list[dict[str, Any]]:
        """Quantize; returns `{"name", "program", "files", "options"}` of every form that came of it."""
        ...

    def load(self, file: str, threads: int, options: dict[str, Any]) -> Session:
        """A fresh session of a form's first file."""
        ...


class Worker:
    """Answers requests about one form: the public methods are the commands, their arguments the fields."""

    def __init__(self, program: Program, file: str, options: dict[str, Any]) -> None:
        self._program = program
        self._file = file
        self._options = options
        self._session: Session | None = None
        self._feeds: list[Feeds] = []
        self._feeds_path: str | None = None

    def open(self, threads: int) -> dict[str, Any]:
        """Load a fresh session in place of the last; returns how long that took and the inputs' names."""
        self._session = None
        gc.collect()
        started = time.perf_counter_ns()
        self._session = self._program.load(self._file, threads, self._options)
        load_ms = (time.perf_counter_ns() - started) / 1e6
        return {"load_ms": load_ms, "inputs": list(self._session.input_names)}

    def warm(self, feeds: str, least_runs: int) -> dict[str, Any]:
        """Run untimed until two windows of runs have nearly the same median; returns how many runs."""
        series: list[int] = []
        while len(series) < _MOST_WARM_UPS_FOLD * least_runs:
            series.append(self._timed(self._load(feeds)[0]))
            if len(series) >= max(least_runs, 2 * _WINDOW):
                before = statistics.median(series[-2 * _WINDOW : -_WINDOW])
                after = statistics.median(series[-_WINDOW:])
                if abs(after - before) <= _TOLERANCE * before:
                    break
        return {"runs": len(series)}

    def time(self, feeds: str, runs: int) -> dict[str, Any]:
        """One run untimed, because others had the caches meanwhile; then `runs`; returns nanoseconds."""
        inputs = self._load(feeds)[0]
        self._timed(inputs)
        gc.disable()
        try:
            return {"ns": [self._timed(inputs) for _ in range(runs)]}
        finally:
            gc.enable()

    def embed(self, feeds: str, output: str, name: str) -> dict[str, Any]:
        """Write output `name` of every set of inputs to an .npz, as `0`, `1`, …; returns how many."""
        session = self._opened()
        found = {}
        for index, inputs in enumerate(self._load(feeds)):
            wanted = {key: inputs[key] for key in session.input_names}
            found[str(index)] = np.array(session.run(wanted)[name])
        np.savez(output, **found)  # type: ignore[arg-type]  # the stubs take the names for allow_pickle
        return {"count": len(found)}

    def _opened(self) -> Session:
        if self._session is None:
            raise RuntimeError("no session is open")
        return self._session

    def _load(self, path: str) -> list[Feeds]:
        if path != self._feeds_path:
            self._feeds, self._feeds_path = read_feeds(path), path
        return self._feeds

    def _timed(self, inputs: Feeds) -> int:
        session = self._opened()
        wanted = {key: inputs[key] for key in session.input_names}
        started = time.perf_counter_ns()
        session.run(wanted)
        return max(1, time.perf_counter_ns() - started)


def read_feeds(path: str) -> list[Feeds]:
    """The sets of inputs in an .npz, whose arrays are named `INDEX.INPUT`."""
    sets: dict[int, Feeds] = {}
    with np.load(path, allow_pickle=False) as archive:
        for key in archive.files:
            index, _, name = key.partition(".")
            sets.setdefault(int(index), {})[name] = archive[key]
    return [sets[index] for index in sorted(sets)]


def answer_requests(worker: Worker, requests: TextIO, answers: TextIO) -> None:
    """Answer until the requests end; whatever a command raises ends the process with its traceback."""
    for line in requests:
        request = json.loads(line)
        command = request.pop("command")
        if command not in ("open", "warm", "time", "embed"):
            raise ValueError(f"{command!r} is no command")
        answers.write(json.dumps(getattr(worker, command)(**request)) + "\n")
        answers.flush()


def main(words: list[str]) -> None:
    """Prepare or serve, as the words say."""
    # Libraries print to stdout as they like: it goes to stderr, and the answers to a copy of it.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    path, action, *files = words
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is no Python file")
    program: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    given = json.loads(Path(files[0]).read_text(encoding="utf-8"))
    if action == "prepare":
        forms = program.prepare(given, read_feeds(given["calibration"]))
        Path(files[1]).write_text(json.dumps(forms, indent=1) + "\n", encoding="utf-8")
    elif action == "serve":
        answer_requests(Worker(program, given["files"][0], given["options"]), sys.stdin, answers)
    else:
        raise ValueError(f"{action!r} is neither prepare nor serve")


if __name__ == "__main__":
    main(sys.argv[1:])
