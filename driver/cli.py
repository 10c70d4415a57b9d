"""The command line: words in, library calls, an answer on stdout, an exit code out."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import platform
import shlex
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from types import FrameType
from typing import IO

from .. import __version__
from ..graph.errors import (
    EXIT_BUG,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EdgepressError,
    InternalError,
    OutputError,
    RuntimeUnavailable,
    Unavailable,
)
from .history.formats import check_format, deliver
from .options import parse_arguments
from .output import Answer, visible, write_answer
from .reporter import Reporter, Verbosity, console_reporter

# The module of each command is loaded only when the command runs: `--help` stays cheap.
_COMMAND_MODULES = {
    "compile": "compile_command",
    "inspect": "inspect_command",
    "verify": "verify_command",
    "run": "run_command",
    "drift": "drift_command",
    "benchmark": "benchmark_command",
    "history": "history.command",
    "targets": "targets_command",
    "emulator": "devices.emulator_command",
    "doctor": "doctor_command",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: the process's own) and return its exit code.

    Nothing is raised but what ends the process itself: every failure becomes lines on stderr and
    one of the documented exit codes.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    verbose = False
    # onnxruntime reads this when it is imported; without it, it reports its use to its maker and
    # leaves a session file in the folder for temporary files.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        with _terminate_like_interrupt():
            arguments = parse_arguments(words)
            verbose = arguments.verbose
            answer = _run(arguments)
            return _deliver(answer, arguments)
    except SystemExit as finished:
        # --help and --version have printed their text.
        return EXIT_OK if finished.code is None else int(finished.code)
    except KeyboardInterrupt:
        _say("interrupted; nothing was left half-written")
        return EXIT_INTERRUPTED
    except InternalError as error:
        return _report_bug(error, words, verbose)
    except EdgepressError as error:
        return _report(error, verbose)
    except MemoryError as error:
        return _report(_out_of_memory(error), verbose)
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "edgepress"):
            return _report_bug(error, words, verbose)
        return _report(_broken_package(package, error), verbose)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return _report_bug(error, words, verbose)
        return _report(_disk_full(error), verbose)
    except Exception as error:  # noqa: BLE001 - the outermost boundary: what nobody foresaw is a bug
        return _report_bug(error, words, verbose)


def _run(arguments: argparse.Namespace) -> Answer:
    if hasattr(arguments, "format"):
        check_format(arguments)
    module = import_module(f".{_COMMAND_MODULES[arguments.command]}", __package__)
    run: Callable[[argparse.Namespace, Reporter], Answer] = module.run
    reporter = console_reporter(sys.stderr, _verbosity(arguments))
    # Stdout carries the answer and nothing else, whatever a library underneath prints.
    with contextlib.redirect_stdout(sys.stderr), _third_party_warnings(shown=arguments.verbose):
        return run(arguments, reporter)


def _verbosity(arguments: argparse.Namespace) -> Verbosity:
    if arguments.verbose:
        return "verbose"
    return "quiet" if arguments.quiet else "normal"


@contextlib.contextmanager
def _third_party_warnings(*, shown: bool) -> Iterator[None]:
    """Keep other packages' Python warnings off the user's screen unless asked for (-v)."""
    with warnings.catch_warnings():
        if not shown:
            for category in (DeprecationWarning, FutureWarning, UserWarning):
                warnings.filterwarnings("ignore", category=category, module=r"(?!edgepress)")
        yield


@contextlib.contextmanager
def _terminate_like_interrupt() -> Iterator[None]:
    """Let SIGTERM clean up the way Ctrl-C does, and put the old handler back afterwards."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python allows signal handlers in the main thread only.
        return
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _deliver(answer: Answer, arguments: argparse.Namespace) -> int:
    try:
        if hasattr(arguments, "format"):
            deliver(answer, arguments, sys.stdout)
        else:
            write_answer(answer, as_json=arguments.json, stream=sys.stdout)
    except BrokenPipeError:
        # The reader (`head`, a closed pager) has seen enough. Python flushes stdout once more on
        # exit: give it a place to go.
        _point_at_nothing(sys.stdout)
    return answer.exit_code


def _point_at_nothing(stream: IO[str]) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def _report(error: EdgepressError, verbose: bool) -> int:
    if verbose:
        _say("".join(traceback.format_exception(error)).rstrip())
    _say(f"error: {error}")
    return error.exit_code


def _report_bug(error: BaseException, words: Sequence[str], verbose: bool) -> int:
    trace = traceback.format_exception(error)
    if verbose:
        _say("".join(trace).rstrip())
    what = f"{type(error).__name__}: {error}".rstrip(": ")
    _say(
        f"error: this is a bug in edgepress: {what}\n"
        f"  where: {_innermost(error)}\n"
        f"  why:   edgepress {__version__}, Python {platform.python_version()}, "
        f"{platform.system()} {platform.machine()}; command: edgepress {shlex.join(words)}\n"
        "  do:    report these lines"
        + (" and the trace above" if verbose else " and what the same command prints with -v")
    )
    return EXIT_BUG


def _innermost(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return "unknown"
    return f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno} in {frames[-1].name}"  # noqa: PTH119


def _out_of_memory(error: MemoryError) -> EdgepressError:
    return Unavailable(
        "there is not enough memory for this",
        why=str(error) or None,
        remedy="close other programs, lower --samples, or use a machine with more memory",
    )


def _broken_package(package: str, error: ImportError) -> EdgepressError:
    return RuntimeUnavailable(
        f"the package {package!r} is missing or cannot be loaded",
        why=str(error),
        remedy="run `edgepress doctor`, which says what to install",
    )


def _disk_full(error: OSError) -> EdgepressError:
    return OutputError(
        "the disk or quota is full",
        where=error.filename,
        why=error.strerror,
        remedy="free some space or choose another place with -o",
    )


def _say(text: str) -> None:
    encoding = sys.stderr.encoding or "utf-8"
    sys.stderr.write(visible(text).encode(encoding, "backslashreplace").decode(encoding) + "\n")
    sys.stderr.flush()
