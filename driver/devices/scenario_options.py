"""What the device runner can do beside plain latency: MLPerf scenarios, sweeps, energy, cores."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from typing import Literal

from ...graph.errors import RecipeError
from ..command_parts import Option

# The device runner's own, which `--help` does not import.
SCENARIOS = ("SingleStream", "MultiStream", "Offline", "Server")
SCENARIO = Option(
    flags=("--scenario",),
    kind="append",
    choices=SCENARIOS,
    help="an MLPerf scenario, by the official LoadGen where it is installed (`edgepress[mlperf]`), else by a "
    "light implementation of the same rules; may be repeated; bundles only",
)
_VALUES = Literal["text", "seconds", "positive", "numbers", "cores"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunnerOption:
    """An option that goes on to the device runner as it is, and what its text has to be."""

    option: Option
    values: _VALUES = "text"
    of_scenarios: bool = False

    @property
    def name(self) -> str:
        """As argparse stores it."""
        return self.option.flags[0].removeprefix("--").replace("-", "_")


RUNNER_OPTIONS = (
    RunnerOption(option=SCENARIO, of_scenarios=True),
    RunnerOption(
        option=Option(
            flags=("--scenario-seconds",),
            metavar="S",
            help="least duration of each scenario; default 10, MLPerf itself asks for 600",
        ),
        values="seconds",
        of_scenarios=True,
    ),
    RunnerOption(
        option=Option(
            flags=("--queries",), kind="integer", metavar="N", help="least number of a scenario's queries"
        ),
        of_scenarios=True,
    ),
    RunnerOption(
        option=Option(
            flags=("--samples-per-query",),
            kind="integer",
            metavar="N",
            help="of MultiStream, and of a batch of Offline; default 8",
        ),
        of_scenarios=True,
    ),
    RunnerOption(
        option=Option(flags=("--qps",), metavar="RATE", help="queries a second that arrive in Server"),
        values="positive",
        of_scenarios=True,
    ),
    RunnerOption(
        option=Option(flags=("--bound-ms",), metavar="MS", help="the latency bound of Server"),
        values="positive",
        of_scenarios=True,
    ),
    RunnerOption(
        option=Option(
            flags=("--loadgen",),
            choices=("auto", "official", "light"),
            help="who runs the scenarios; default auto: the official LoadGen where it is installed",
        ),
        of_scenarios=True,
    ),
    RunnerOption(
        option=Option(
            flags=("--batch-sweep",), metavar="1,2,4", help="also time these batch sizes; bundles only"
        ),
        values="numbers",
    ),
    RunnerOption(
        option=Option(
            flags=("--thread-sweep",), metavar="1,2,4", help="also time these thread counts; bundles only"
        ),
        values="numbers",
    ),
    RunnerOption(
        option=Option(
            flags=("--affinity",), metavar="CORES", help="keep to these cores, such as 0-3; bundles only"
        ),
        values="cores",
    ),
    RunnerOption(
        option=Option(
            flags=("--affinity-sweep",),
            kind="append",
            metavar="CORES",
            help="also time on these cores; may be repeated; bundles only",
        ),
        values="cores",
    ),
    RunnerOption(
        option=Option(
            flags=("--energy-seconds",),
            metavar="S",
            help="run so long for joules per inference, where a meter is; 0 leaves it out; bundles only",
        ),
        values="seconds",
    ),
)
RUNS = Option(
    flags=("--runs",),
    kind="integer",
    metavar="N",
    help="timed runs of each in a round, at least; default 30 (p99 takes 100 runs in all rounds, p99.9 1000)",
)
MEASURING_OPTIONS = (RUNS, *(item.option for item in RUNNER_OPTIONS))
_LATENCY_OPTIONS = ("baseline", "rounds", "runs")
LEAST_LIMIT_S = 7200.0


def asks_for_runner(arguments: argparse.Namespace) -> bool:
    """Whether any option is given that only the device runner carries out."""
    return any(_given(arguments, item) for item in RUNNER_OPTIONS)


def _given(arguments: argparse.Namespace, item: RunnerOption) -> list[str]:
    value = getattr(arguments, item.name)
    if value is None:
        return []
    return [str(one) for one in value] if isinstance(value, list) else [str(value)]


def runner_commands(arguments: argparse.Namespace) -> tuple[str, ...]:
    """The device runner's commands: scenarios where they are asked for, latency unless they alone are."""
    if not arguments.scenario:
        return ("verify", "benchmark")
    others = any(_given(arguments, item) for item in RUNNER_OPTIONS if not item.of_scenarios)
    others = others or any(getattr(arguments, name) is not None for name in _LATENCY_OPTIONS)
    return ("verify", "benchmark", "scenario") if others else ("verify", "scenario")


def runner_words(arguments: argparse.Namespace) -> list[str]:
    """The options as words for the device runner.

    Raises:
        RecipeError: if one is not of its form, or needs another one.
    """
    words: list[str] = []
    for item in RUNNER_OPTIONS:
        flag = item.option.flags[0]
        for text in _given(arguments, item):
            _check(text, item.values, flag)
            if item.of_scenarios and not arguments.scenario:
                raise RecipeError(f"{flag} is about a scenario", where=flag, remedy="add --scenario")
            words += [flag, text]
    words += [] if arguments.rounds is None else ["--pairs", str(arguments.rounds)]
    words += [] if arguments.runs is None else ["--runs", str(arguments.runs)]
    if "Server" in (arguments.scenario or ()) and not (arguments.qps and arguments.bound_ms):
        raise RecipeError(
            "Server needs a rate and a latency bound",
            where="--scenario Server",
            remedy="add --qps and --bound-ms, for example --qps 20 --bound-ms 100",
        )
    return words


def about_time(arguments: argparse.Namespace) -> list[str]:
    """The options given that an emulated board cannot follow: it has no times, and counts one thread."""
    flags = [item.option.flags[0] for item in RUNNER_OPTIONS if _given(arguments, item)]
    flags += [f"--{name}" for name in ("rounds", "runs") if getattr(arguments, name) is not None]
    return flags + (["--threads"] if (arguments.threads or 1) > 1 else [])


def least_limit_s(arguments: argparse.Namespace) -> float:
    """How long the device runner may take before it counts as hung, in seconds."""
    each_s = float(arguments.scenario_seconds or 10)
    return LEAST_LIMIT_S + len(arguments.scenario or ()) * max(1800.0, 6 * each_s)


def _check(text: str, values: _VALUES, flag: str) -> None:
    if values == "text":
        return
    if values in ("seconds", "positive"):
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        fits = math.isfinite(number) and (number > 0 or (values == "seconds" and number == 0))
        wanted = "a number above 0" if values == "positive" else "a number of seconds"
    elif values == "numbers":
        fits, wanted = bool(re.fullmatch(r"[1-9]\d{0,5}(,[1-9]\d{0,5})*", text)), "numbers such as 1,2,4"
    else:
        part = r"\d{1,4}(-\d{1,4})?"
        fits, wanted = bool(re.fullmatch(f"{part}(,{part})*", text)), "cores such as 0,1 or 0-3"
    if not fits:
        raise RecipeError(f"{text!r} is not {wanted}", where=flag, remedy=f"give {wanted}")
