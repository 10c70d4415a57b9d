"""What the command line is described with: commands, arguments, options, and options that several share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

OptionKind = Literal["value", "integer", "flag", "append", "optional", "optional-list"]


@dataclass(frozen=True, kw_only=True)
class Argument:
    """A positional argument; `many` takes one or more."""

    name: str
    help: str
    many: bool = False


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option; its value is None (False for a flag) where it is not given.

    An "optional" one may stand without a value, which then is "". `least` is the smallest value of an
    integer.
    """

    flags: tuple[str, ...]
    help: str
    kind: OptionKind = "value"
    metavar: str | None = None
    choices: tuple[str, ...] = ()
    least: int = 1


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command, or a group of them when it has `subcommands`."""

    name: str
    summary: str
    description: str = ""
    arguments: tuple[Argument, ...] = ()
    options: tuple[Option, ...] = ()
    examples: tuple[str, ...] = ()
    subcommands: tuple[Command, ...] = ()


EXIT_CODES = (
    ("0", "done"),
    ("1", "a bug in edgepress"),
    ("2", "something passed in is wrong: the model, the data, a target, an option, the output place"),
    ("3", "a limit or check was not met: drift, verification, a gate; or the run is void"),
    ("4", "a runtime, an extra or a device is missing, or what was asked for is not supported yet"),
    ("130", "interrupted (Ctrl-C or SIGTERM)"),
)

QUIET = Option(flags=("-q", "--quiet"), kind="flag", help="no progress and no notes, only warnings")
VERBOSE = Option(
    flags=("-v", "--verbose"), kind="flag", help="the time of every stage, and the trace of an error"
)
JSON = Option(flags=("--json",), kind="flag", help="one JSON document on stdout instead of tables")
TARGET = Option(
    flags=("--target",),
    metavar="NAME",
    help="a target's name (`edgepress targets list`) or the path of a profile of your own",
)
SET = Option(
    flags=("--set",),
    kind="append",
    metavar="target.FIELD=VALUE",
    help="change one field of the target's profile; may be repeated",
)
THREADS = Option(flags=("--threads",), kind="integer", metavar="N", help="threads that sessions run with")
TOKENIZER = Option(
    flags=("--tokenizer",),
    metavar="PATH",
    help="tokenizer.json or its folder, for text data; default: the one beside the model",
)
PREPROCESSOR = Option(
    flags=("--preprocessor",),
    metavar="PATH",
    help="preprocessor_config.json or its folder, carried into the bundle",
)
SHAPE = Option(
    flags=("--shape",),
    kind="append",
    metavar="NAME:1x128 | NAME:MIN:OPT:MAX",
    help="the shape of one input, or its range such as ids:1x16:1x128:8x512: OPT is what is counted and "
    "timed, compile also runs MIN and MAX, and data must lie inside; may be repeated",
)
ROUNDS = Option(flags=("--rounds",), kind="integer", metavar="N", help="interleaved rounds of fresh sessions")
SAMPLES = Option(flags=("--samples",), kind="integer", metavar="N", help="use at most N samples")
SEED = Option(
    flags=("--seed",),
    kind="integer",
    metavar="N",
    least=0,
    help="seed of everything that is drawn; default 0",
)
MAX_DRIFT = Option(
    flags=("--max-drift",),
    metavar="[METRIC=]LIMIT[,…]",
    help="drift limits, such as 1%, cosine=1%,flips=0.02, sqnr=30dB or accuracy=0.01abs; a task metric "
    "(accuracy, f1, spearman, or your own as module:function) may lose that part of the baseline's figure, "
    "with abs that much of the metric itself",
)
PRUNABLE = Option(
    flags=("--prunable",),
    kind="flag",
    help="list the groups of units that can be cut from a model, and why the others cannot",
)
TRUST_CODE = Option(
    flags=("--trust-code",),
    kind="flag",
    help="run Python code that comes with a local model folder; code from the hub is never fetched",
)
OUTPUT_BUNDLE = Option(
    flags=("-o", "--output"), metavar="OUT", help="the bundle's folder; it must not exist yet"
)
COMMON = (JSON, QUIET, VERBOSE)
