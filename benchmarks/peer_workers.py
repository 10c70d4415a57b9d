"""Forms of one model in worker processes of their own, timed in turn.

Each worker loads one form in its environment's interpreter and times it with its own clock (see
`peer_programs/program.py`). Only one works at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from edgepress.benchmarks.peer_environments import (
    PeerForm,
    environment_variables,
    last_words,
    program_command,
)
from edgepress.benchmarks.sentence_accuracy import Array
from edgepress.graph.errors import RuntimeUnavailable
from edgepress.runtimes.timing import Comparison, comparison_of

_ANSWER_LIMIT_S = 900.0
# The threads of a runtime wait busily for a while after a run; meanwhile the next worker would lack a core.
_SETTLE_S = 0.1


class WorkerProcess:
    """One form in a process of its own; a context manager that ends it."""

    def __init__(self, form: PeerForm, folder: Path, limit_s: float = _ANSWER_LIMIT_S) -> None:
        """Start it.

        Args:
            form: what it serves.
            folder: for its log and what it is told.
            limit_s: how long one answer may take.
        """
        folder.mkdir(parents=True, exist_ok=True)
        name = "".join(letter if letter.isalnum() else "-" for letter in form.name)
        self.form = form
        self._limit_s = limit_s
        self._log = folder / f"{name}.log"
        told = folder / f"{name}.json"
        told.write_text(
            json.dumps({"files": [str(file) for file in form.files], "options": dict(form.options)}),
            encoding="utf-8",
        )
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*program_command(form.python, form.program), "serve", str(told)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment_variables(),
                text=True,
                encoding="utf-8",
            )

    def ask(self, command: str, **fields: Any) -> dict[str, Any]:
        """Send one request and wait for its answer.

        Raises:
            RuntimeUnavailable: if the worker ended or took too long, with what it said last.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        late = threading.Event()

        def give_up() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(self._limit_s, give_up)
        timer.start()
        try:
            self._process.stdin.write(json.dumps({"command": command, **fields}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if not line:
            raise self._failure(command, late.is_set())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _failure(self, command: str, late: bool) -> RuntimeUnavailable:
        code = self._process.wait()
        said = last_words(self._log.read_text(encoding="utf-8", errors="replace"), f"exit code {code}")
        return RuntimeUnavailable(
            "a peer cannot be used",
            where=f"{self.form.name}: {command}",
            why=f"no answer within {self._limit_s:g} s" if late else said,
        )

    def close(self) -> None:
        """End the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                # What was not flushed goes nowhere once the process has ended.
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rounds:
    """How much to measure.

    Attributes:
        pairs: how often every worker opens a fresh session.
        runs: timed runs of each in one of them.
        turn_runs: timed runs before the next worker has its turn.
        warm_up_runs: untimed runs at least.
    """

    pairs: int
    runs: int
    turn_runs: int = 5
    warm_up_runs: int = 5


def write_feeds(path: Path, sets: Sequence[Mapping[str, Array]]) -> Path:
    """Write sets of inputs for workers: an .npz of arrays named `INDEX.INPUT`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {f"{index}.{name}": array for index, feeds in enumerate(sets) for name, array in feeds.items()}
    np.savez(path, **arrays)  # type: ignore[arg-type]  # the stubs take the names for allow_pickle
    return path


class _Race:
    """Workers that take turns; one that fails is out, with its reason."""

    def __init__(self, workers: Sequence[WorkerProcess], feeds: Path, threads: int) -> None:
        self._running = list(workers)
        self._feeds = str(feeds)
        self._threads = threads
        self.series: dict[str, list[list[int]]] = {worker.form.name: [] for worker in workers}
        self.failures: dict[str, str] = {}

    def start_round(self, backwards: bool, warm_up_runs: int) -> None:
        """Fresh sessions, warmed up."""
        for worker in self._in_turn(backwards):
            self.series[worker.form.name].append([])
            if self._ask(worker, "open", threads=self._threads) is not None:
                self._ask(worker, "warm", feeds=self._feeds, least_runs=warm_up_runs)

    def take_turns(self, backwards: bool, runs: int) -> None:
        """So many timed runs of each."""
        for worker in self._in_turn(backwards):
            answer = self._ask(worker, "time", feeds=self._feeds, runs=runs)
            if answer is not None:
                self.series[worker.form.name][-1].extend(answer["ns"])

    def _in_turn(self, backwards: bool) -> Iterator[WorkerProcess]:
        for worker in self._running[:: -1 if backwards else 1]:
            yield worker
            if self._threads > 1:
                time.sleep(_SETTLE_S)

    def _ask(self, worker: WorkerProcess, command: str, **fields: Any) -> dict[str, Any] | None:
        try:
            return worker.ask(command, **fields)
        except RuntimeUnavailable as error:
            self.failures[worker.form.name] = error.why or error.what
            del self.series[worker.form.name]
            self._running.remove(worker)
            return None


def time_workers(
    workers: Sequence[WorkerProcess], feeds: Path, *, threads: int, rounds: Rounds
) -> tuple[dict[str, list[list[int]]], dict[str, str]]:
    """Time every worker on the first set of inputs in `feeds`, in turn and in alternating order.

    Returns:
        By form: nanoseconds of all runs, a list a round; and why a form failed (it then has no times).
    """
    race = _Race(workers, feeds, threads)
    for pair in range(rounds.pairs):
        race.start_round(pair % 2 == 1, rounds.warm_up_runs)
        for turn, done in enumerate(range(0, rounds.runs, rounds.turn_runs)):
            race.take_turns((pair + turn) % 2 == 1, min(rounds.turn_runs, rounds.runs - done))
    return race.series, race.failures


def speed_of(series: Mapping[str, Sequence[Sequence[int]]], baseline: str) -> dict[str, dict[str, float]]:
    """Of each form: latencies in ms over all rounds, and its speed against the baseline, round by round."""
    found = {}
    for name, rounds in series.items():
        values_ms = np.array([value for one in rounds for value in one], np.float64) / 1e6
        against = against_form(series, baseline, name)
        p50, p90 = (float(value) for value in np.percentile(values_ms, (50, 90)))
        found[name] = {
            "p50_ms": p50,
            "p90_ms": p90,
            "min_ms": float(values_ms.min()),
            "runs": len(values_ms),
            # What a busy machine leaves of the truth: the quickest run of each.
            "ratio_of_least": min(map(min, series[baseline])) / min(map(min, rounds)),
            "ratio": against.ratio,
            "ratio_low": against.low,
            "ratio_high": against.high,
        }
    return found


def against_form(series: Mapping[str, Sequence[Sequence[int]]], slower: str, name: str) -> Comparison:
    """How many times as fast form `name` is as form `slower`: ratios of medians, round by round.

    Runs come in turns of several, so that one has no neighbour of the other form.
    """
    rounds = zip(series[slower], series[name], strict=True)
    return comparison_of(
        slower, name, (statistics.median(before) / statistics.median(after) for before, after in rounds)
    )


def hidden_states(worker: WorkerProcess, feeds: Path, output: Path, name: str) -> Iterator[Array]:
    """Output `name` of every set of inputs in `feeds`, in order; shape (batch, tokens, hidden) each.

    Raises:
        RuntimeUnavailable: if the worker fails.
    """
    worker.ask("open", threads=1)
    count = worker.ask("embed", feeds=str(feeds), output=str(output), name=name)["count"]
    try:
        with np.load(output, allow_pickle=False) as archive:
            for index in range(count):
                yield archive[str(index)]
    finally:
        output.unlink()
