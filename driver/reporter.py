"""Progress and notes while a command works: nothing (library), plain lines, or a live display."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import IO, TYPE_CHECKING, Literal, Protocol

from .output import visible

if TYPE_CHECKING:
    from rich.console import Console

Verbosity = Literal["quiet", "normal", "verbose"]

# A stage shorter than this is not worth a line of its own.
_WORTH_A_LINE_S = 2.0
_LINE_EVERY_S = 10.0


class Stage(Protocol):
    """One stage under way."""

    def advance(self, steps: int = 1) -> None:
        """Note that `steps` more of the stage's total are done."""


class Reporter(Protocol):
    """Where a library function tells what it is doing; it decides nothing and may be silent."""

    def stage(self, name: str, total: int | None = None) -> AbstractContextManager[Stage]:
        """Begin a stage of `total` steps (None: not known); it ends with the context."""

    def note(self, text: str) -> None:
        """Tell something worth knowing."""

    def warn(self, text: str) -> None:
        """Tell something that the user should act upon, though the work goes on."""


class _SilentStage:
    def advance(self, steps: int = 1) -> None:
        pass


def absolute_progress(stage: Stage) -> Callable[[int, int], None]:
    """A callback for functions that tell (done, total); a count that falls begins another round."""
    last = 0

    def tell(done: int, _total: int) -> None:
        nonlocal last
        stage.advance(done - last if done >= last else done)
        last = done

    return tell


class SilentReporter:
    """Says nothing: what a library call uses unless told otherwise."""

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Stage]:  # noqa: ARG002
        """A stage that shows nothing."""
        yield _SilentStage()

    def note(self, text: str) -> None:
        """Nothing."""

    def warn(self, text: str) -> None:
        """Nothing."""


class _PlainStage:
    """Counts steps and writes a line with the time left every ten seconds."""

    def __init__(self, reporter: PlainReporter, name: str, total: int | None) -> None:
        self._reporter = reporter
        self._name = name
        self._total = total
        self._done = 0
        self.started_s = reporter.clock()
        self._last_line_s = self.started_s

    def advance(self, steps: int = 1) -> None:
        self._done += steps
        now_s = self._reporter.clock()
        if now_s - self._last_line_s < _LINE_EVERY_S or self._reporter.verbosity == "quiet":
            return
        self._last_line_s = now_s
        if self._total is None:
            self._reporter.write(f"{self._name}: {self._done} done")
            return
        left_s = (now_s - self.started_s) / max(self._done, 1) * max(self._total - self._done, 0)
        self._reporter.write(f"{self._name}: {self._done} of {self._total}, about {left_s:.0f} s left")


class PlainReporter:
    """Writes lines to a stream that is not a terminal: a log file, a CI job, a pipe."""

    def __init__(
        self, stream: IO[str], verbosity: Verbosity, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = stream
        self.verbosity = verbosity
        self.clock = clock

    def write(self, line: str) -> None:
        """Write one line at once."""
        self._stream.write(visible(line) + "\n")
        self._stream.flush()

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Stage]:
        """A stage that tells when it ends (if it took long) and, every ten seconds, how far it is."""
        stage = _PlainStage(self, name, total)
        yield stage
        took_s = self.clock() - stage.started_s
        if self.verbosity == "verbose" or (self.verbosity == "normal" and took_s >= _WORTH_A_LINE_S):
            self.write(f"{name}: {took_s:.1f} s")

    def note(self, text: str) -> None:
        """A line, unless quiet."""
        if self.verbosity != "quiet":
            self.write(text)

    def warn(self, text: str) -> None:
        """A line, always."""
        self.write(f"warning: {text}")


class _LiveStage:
    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance = advance

    def advance(self, steps: int = 1) -> None:
        self._advance(steps)


class LiveReporter:
    """A live bar with the time left on a terminal; finished stages leave a line if they took long."""

    def __init__(self, console: Console, verbosity: Verbosity) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._console = console
        self._verbosity = verbosity
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            disable=verbosity == "quiet",
        )
        self._depth = 0

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Stage]:
        """A bar while it lasts; stages may be nested."""
        started_s = time.monotonic()
        task = self._progress.add_task(name, total=total)
        if self._depth == 0:
            self._progress.start()
        self._depth += 1
        try:
            yield _LiveStage(lambda steps: self._progress.advance(task, steps))
        finally:
            self._depth -= 1
            self._progress.remove_task(task)
            if self._depth == 0:
                self._progress.stop()
        took_s = time.monotonic() - started_s
        if self._verbosity == "verbose" or (self._verbosity == "normal" and took_s >= _WORTH_A_LINE_S):
            self._print(f"{name}: {took_s:.1f} s", "dim")

    def note(self, text: str) -> None:
        """A line, unless quiet."""
        if self._verbosity != "quiet":
            self._print(text, None)

    def warn(self, text: str) -> None:
        """A yellow line, always."""
        self._print(f"warning: {text}", "yellow")

    def _print(self, text: str, style: str | None) -> None:
        self._console.print(visible(text), style=style, markup=False, highlight=False, soft_wrap=True)


def console_reporter(stream: IO[str], verbosity: Verbosity) -> Reporter:
    """The reporter that suits `stream`: live on a terminal, plain lines elsewhere."""
    if not stream.isatty():
        return PlainReporter(stream, verbosity)
    from rich.console import Console

    console = Console(file=stream)
    # A terminal that cannot move its cursor (TERM=dumb) gets the plain lines too.
    return PlainReporter(stream, verbosity) if console.is_dumb_terminal else LiveReporter(console, verbosity)
