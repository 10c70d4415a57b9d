"""Options of the history, of comparisons with earlier runs, and of gates; and `edgepress history` itself."""

from __future__ import annotations

from ..command_parts import COMMON, Argument, Command, Option
from .formats import FORMAT_OPTIONS
from .rows import METRICS

_METRIC_NAMES = ", ".join(metric.name for metric in METRICS)
_REFERENCE = (
    "the beginning of a run's id, a baseline's name, a bundle (its latest run), or a JSON file that "
    "`benchmark --json`, device_runner.py --out or `history export` wrote"
)

COMPARE = Option(
    flags=("--compare",),
    kind="optional",
    metavar="REF",
    help="compare with an earlier run: without REF the last one of the same model, target, device, threads "
    f"and shapes that is not void; REF is {_REFERENCE}. Put it after the bundles",
)
FAIL_IF = Option(
    flags=("--fail-if",),
    kind="append",
    metavar="GATE",
    help="exit code 3 where a figure is beyond a limit, noise counted in: p90>+5% (growth against the run of "
    "--compare, else the --baseline of the same run, else the last run), or p90>12ms, peak_memory>50MB; "
    f"metrics: {_METRIC_NAMES}; may be repeated",
)
COMPARE_FAIL_IF = Option(
    flags=("--fail-if",),
    kind="append",
    metavar="GATE",
    help="exit code 3 where a figure of AFTER is beyond a limit, noise counted in: p90>+5%, p90>12ms, "
    f"peak_memory>50MB; metrics: {_METRIC_NAMES}; may be repeated",
)
STRICT_GATE = Option(
    flags=("--strict-gate",),
    kind="flag",
    help="a gate that the noise leaves undecided fails, too; without this it passes with a warning",
)
SAVE_BASELINE = Option(
    flags=("--save-baseline",),
    metavar="NAME",
    help="give this run a name for --compare NAME, over an older run of that name; not if it is void or a "
    "gate fails",
)
NO_HISTORY = Option(flags=("--no-history",), kind="flag", help="do not keep this run in the local history")
AFTER_RUN_OPTIONS = (COMPARE, FAIL_IF, STRICT_GATE, SAVE_BASELINE, NO_HISTORY, *FORMAT_OPTIONS)

MODEL = Option(flags=("--model",), metavar="NAME", help="only runs of the model of this name")
TARGET = Option(flags=("--target",), metavar="NAME", help="only runs of bundles for this target")
DEVICE = Option(
    flags=("--device",), metavar="NAME", help="only runs on the device of this name, URL or board"
)
BUNDLE = Option(flags=("--bundle",), metavar="DIR", help="only runs of this bundle, as it is now")
SINCE = Option(
    flags=("--since",), metavar="DATE", help="only runs since this day, 2026-01-31, or the last 30d or 12h"
)
KIND = Option(flags=("--kind",), choices=("benchmark", "verify", "compile"), help="only runs of this kind")
NO_VOID = Option(flags=("--no-void",), kind="flag", help="leave void runs out")
LIMIT = Option(flags=("--limit",), kind="integer", metavar="N", help="only the latest N rows; list shows 50")
FILTERS = (MODEL, TARGET, DEVICE, BUNDLE, SINCE, KIND, NO_VOID, LIMIT)

METRIC = Option(
    flags=("--metric",),
    kind="append",
    metavar="NAME",
    help=f"what to plot: {_METRIC_NAMES}; may be repeated; default: p50, p90, size and drift, and "
    "instructions of emulated boards",
)
PLOT_FILE = Option(
    flags=("--output",),
    metavar="FILE",
    help="write the plot to this .html or .svg file, over an old one; it needs no other file and no network. "
    "Without it small lines are drawn in the terminal",
)
KEEP = Option(flags=("--keep",), kind="integer", metavar="N", help="remove all but the latest N runs")
OLDER = Option(
    flags=("--older-than",),
    kind="integer",
    metavar="DAYS",
    help="remove runs that are older than so many days",
)
VOID = Option(flags=("--void",), kind="flag", help="remove void runs")
BASELINE_NAME = Option(
    flags=("--baseline",), metavar="NAME", help="forget this baseline's name; its runs stay"
)
DRY_RUN = Option(flags=("--dry-run",), kind="flag", help="only say what would be removed")

HISTORY = Command(
    name="history",
    summary="list, compare, plot or exchange the runs that were made here",
    subcommands=(
        Command(
            name="list",
            summary="the runs, the oldest first",
            description=(
                "Lists the latest runs of benchmark, verify and compile --device, the newest last. The "
                "history is one file in the user's data folder, or in the one that EDGEPRESS_HISTORY names."
            ),
            options=(*FILTERS, *FORMAT_OPTIONS, *COMMON),
            examples=(
                "edgepress history list",
                "edgepress history list --model resnet20 --device ssh://pi@raspberrypi --since 30d",
                "edgepress history list --format csv --output runs.csv",
            ),
        ),
        Command(
            name="show",
            summary="one run with all its figures; with --json its whole document",
            arguments=(Argument(name="RUN", help=_REFERENCE),),
            options=(*FORMAT_OPTIONS, *COMMON),
            examples=("edgepress history show 3f9a1c", "edgepress history show main --json"),
        ),
        Command(
            name="compare",
            summary="two runs against each other",
            description=(
                "Every figure of both runs, the change with its 95 % interval, and whether it is beyond the "
                "noise. With --fail-if the exit code is 3 where the later run is beyond a limit."
            ),
            arguments=(
                Argument(name="BEFORE", help=_REFERENCE),
                Argument(name="AFTER", help="likewise"),
            ),
            options=(COMPARE_FAIL_IF, STRICT_GATE, *FORMAT_OPTIONS, *COMMON),
            examples=(
                "edgepress history compare 3f9a1c 77b02e",
                "edgepress history compare main out --fail-if 'p90>+5%'",
                "edgepress history compare before.json after.json --format markdown",
            ),
        ),
        Command(
            name="plot",
            summary="latency, size and drift over the runs",
            options=(*FILTERS, METRIC, PLOT_FILE, *COMMON),
            examples=(
                "edgepress history plot --model resnet20",
                "edgepress history plot --model resnet20 --metric p90 --output p90.html",
            ),
        ),
        Command(
            name="export",
            summary="runs with their documents, for another machine's history",
            options=(*FILTERS, *FORMAT_OPTIONS, *COMMON),
            examples=(
                "edgepress history export --output runs.json",
                "edgepress history export --model resnet20 --format csv",
            ),
        ),
        Command(
            name="import",
            summary="add the runs of bundles or of JSON files; what is there already is left alone",
            arguments=(Argument(name="PATH", help="a bundle, or a JSON file with results", many=True),),
            options=COMMON,
            examples=("edgepress history import out", "edgepress history import runs.json result.json"),
        ),
        Command(
            name="prune",
            summary="remove runs; those of baselines stay",
            options=(KEEP, OLDER, VOID, BASELINE_NAME, DRY_RUN, *COMMON),
            examples=(
                "edgepress history prune --older-than 365",
                "edgepress history prune --keep 1000 --dry-run",
                "edgepress history prune --baseline feature/x",
            ),
        ),
    ),
)
