"""The command line as data: every command, argument and option with its help and examples.

Both the argparse parsers (`options.build_parser`) and docs/commands.md are made from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..compress.presets import PRESETS, preset_line
from ..compress.prune.report import Importance, Repair
from ..compress.recipe import CalibMethod, GoldenSource, IoDtype, Precision, Quantization, choices

OptionKind = Literal["value", "integer", "flag", "append", "optional-list"]


@dataclass(frozen=True, kw_only=True)
class Argument:
    """A positional argument; `many` takes one or more."""

    name: str
    help: str
    many: bool = False


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option; its value is None (False for a flag) where it is not given.

    `least` is the smallest value of an integer.
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
    ("3", "a limit or check was not met: drift, verification"),
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

COMPILE = Command(
    name="compile",
    summary="make a verified bundle for a target from a model",
    description=(
        "Reads a model, fuses and quantizes it for the target, measures its drift against the "
        "untouched model, times both, and writes a bundle that carries all of that."
    ),
    arguments=(
        Argument(
            name="MODEL",
            help="an .onnx or .pt2 file, a Hugging Face folder, a hub id (owner/name) or module:function",
        ),
    ),
    options=(
        TARGET,
        OUTPUT_BUNDLE,
        Option(
            flags=("--calib",),
            metavar="DATA",
            help="calibration data: .npz, a folder of arrays or images, .txt/.jsonl/.csv text, "
            "hf:NAME[:CONFIG][:SPLIT][,ROLE=COLUMN…] of the Hugging Face hub, or module:function",
        ),
        Option(
            flags=("--eval",),
            metavar="DATA",
            help="data that drift is measured on; default: a fifth of --calib, kept apart",
        ),
        Option(
            flags=("--calib-cache",),
            metavar="FILE",
            help="calibrated ranges as JSON: written if there is none, used if it is of this model, data "
            "and method, refused otherwise; with it alone nothing needs data but drift, which is then "
            "not measured",
        ),
        Option(
            flags=("--preset",),
            choices=tuple(PRESETS),
            help="how much is looked at; resolved into the recipe, and options given beside it win. "
            + "; ".join(preset_line(name) for name in PRESETS),
        ),
        Option(flags=SAMPLES.flags, kind="integer", metavar="N", help="calibrate on at most N samples"),
        Option(
            flags=("--max-memory",),
            metavar="SIZE",
            help="bound of calibration's own memory (activations fetched at a time, and counts) for static "
            "ranges, such as 512MB: a smaller one takes more passes over the data",
        ),
        Option(
            flags=("--eval-samples",),
            kind="integer",
            metavar="N",
            help="measure drift on at most N samples",
        ),
        Option(
            flags=("--ranking-samples",),
            kind="integer",
            metavar="N",
            help="samples that ranking the layers may cost three forwards each, when a drift limit is "
            "exceeded; default 128",
        ),
        Option(flags=ROUNDS.flags, kind="integer", metavar="N", help=f"{ROUNDS.help}; default 5"),
        Option(
            flags=("--measure-seconds",),
            kind="integer",
            metavar="N",
            least=0,
            help="for the host: time fusions, operators in the forms that they could take, and plans, for "
            "about so long, and take what is faster here; 0 plans by the profile alone; default 10. "
            "Timings of operators are kept (`edgepress targets show host`)",
        ),
        Option(
            flags=("--allow-unmeasured",),
            kind="flag",
            help="also take lowerings of which nobody has measured, counted or timed whether they are "
            "faster on the target; without it such nodes stay float, and the plan says so",
        ),
        Option(
            flags=("--precision",),
            choices=choices(Precision),
            help="auto (default): the fastest plan inside the drift limit; bf16 and fp16 halve the file and "
            "compute in that type where the target does; bf16-compute insists on it; int8+fp16 and int8+bf16 "
            "do so with what INT8 leaves in float",
        ),
        Option(
            flags=("--io-dtype",),
            choices=choices(IoDtype),
            help="type of the artifact's float inputs and outputs: fp32 (default) leaves them as the model "
            "has them, fp16 or bf16 halves what goes in and out; drift still compares in float32",
        ),
        Option(
            flags=("--quantization",),
            choices=choices(Quantization),
            help="how INT8 activations get their scales; auto (default) lets the target decide",
        ),
        Option(
            flags=("--calib-method",),
            choices=choices(CalibMethod),
            help="the range estimator of static quantization; default auto",
        ),
        Option(
            flags=("--prune",),
            metavar="PART",
            help="cut out this part of the multiply-accumulates (0.5 or 50%): channels, neurons and heads "
            "that matter least go, what reads them is fitted anew to --calib data, without labels or "
            "training; `edgepress inspect --prunable` lists what can go",
        ),
        Option(
            flags=("--min-speedup",),
            metavar="TIMES",
            help="cut until the compiled model is so many times as fast as what went in (2x); on the host "
            "it is measured, elsewhere predicted",
        ),
        Option(
            flags=("--max-size",),
            metavar="SIZE",
            help="cut until the compiled model's files have at most this size (10MB)",
        ),
        Option(
            flags=("--prune-importance",),
            choices=choices(Importance),
            help="how units are ranked: obs (default: what is lost after the others took over), activation, "
            "magnitude or batchnorm",
        ),
        Option(
            flags=("--prune-repair",),
            choices=choices(Repair),
            help="how what reads the cut parts is fitted: least-squares (default: each layer by itself, in "
            "closed form), or thorough (then by gradients, together with the layer before it, wherever "
            "held-out samples agree: the repair takes several times as long and loses less accuracy)",
        ),
        Option(
            flags=MAX_DRIFT.flags,
            metavar=MAX_DRIFT.metavar,
            help=MAX_DRIFT.help + "; default 1% of the model's own metric, with --prune, --min-speedup and "
            "--max-size none",
        ),
        Option(
            flags=("--keep-float",),
            kind="append",
            metavar="REGEX",
            help="keep nodes whose own or whose weight's name matches in float; may be repeated",
        ),
        SHAPE,
        THREADS,
        TOKENIZER,
        PREPROCESSOR,
        Option(
            flags=("--recipe", "--config"),
            metavar="FILE",
            help="start from this recipe.toml; options given beside it win over it",
        ),
        SET,
        Option(
            flags=("--data-free",),
            kind="flag",
            help="calibrate and measure on generated inputs; every figure is stamped with it",
        ),
        TRUST_CODE,
        Option(
            flags=("--skip",),
            kind="optional-list",
            metavar="STAGE[,…]",
            help="leave out drift, benchmark or golden; the bundle says so",
        ),
        Option(
            flags=("--golden",),
            choices=choices(GoldenSource),
            help="golden samples in the bundle: generated from the seed (default) or your data",
        ),
        Option(
            flags=("--overwrite",),
            kind="flag",
            help="replace an existing bundle, once the new one is whole",
        ),
        SEED,
        Option(
            flags=("--dry-run",),
            kind="flag",
            help="print the plan and the resolved recipe, write nothing",
        ),
        *COMMON,
    ),
    examples=(
        "edgepress compile model.onnx --target host -o out --calib samples.npz",
        "edgepress compile ./minilm --target raspberry-pi-5 -o out --calib text.txt --max-drift cosine=2%",
        "edgepress compile model.onnx --target raspberry-pi-4 --data-free --dry-run",
        "edgepress compile model.onnx --target host -o out --calib images/ --prune 0.5",
        "edgepress compile model.onnx --target host -o out --calib images/ --min-speedup 4x --max-size 2MB",
        "edgepress compile model.onnx --recipe out/recipe.toml -o again",
        "edgepress compile ./bert --target host -o out --calib hf:nyu-mll/glue:sst2:train --preset quick",
        "edgepress compile ./bert --target host -o out --shape input_ids:1x16:1x128:8x512 --calib text.txt",
        "edgepress compile model.onnx --target host -o out --calib data.npz --calib-cache ranges.json",
    ),
)

INSPECT = Command(
    name="inspect",
    summary="show what is in a model or a bundle",
    description=(
        "Of a model: inputs, outputs, operators, weights, with --target what a compile would do "
        "and why each node stays float, with --prunable which channels, neurons and heads can be cut and "
        "why the others cannot. Of a bundle: its manifest and its plan."
    ),
    arguments=(Argument(name="MODEL|BUNDLE", help="a model as for compile, or a bundle's folder"),),
    options=(TARGET, SET, PRUNABLE, TRUST_CODE, *COMMON),
    examples=(
        "edgepress inspect model.onnx",
        "edgepress inspect model.onnx --prunable",
        "edgepress inspect model.onnx --target raspberry-pi-5",
        "edgepress inspect out --json",
    ),
)

VERIFY = Command(
    name="verify",
    summary="check a bundle's digests and golden samples",
    description=(
        "Recomputes every digest of SHA256SUMS and runs the golden samples; exit code 3 if anything "
        "differs by more than the tolerance that the manifest states."
    ),
    arguments=(Argument(name="BUNDLE", help="a bundle's folder"),),
    options=COMMON,
    examples=("edgepress verify out",),
)

RUN = Command(
    name="run",
    summary="run a bundle on inputs from a file",
    description="Feeds the arrays of an .npz file to the bundle, with the bundle's own session options.",
    arguments=(Argument(name="BUNDLE", help="a bundle's folder"),),
    options=(
        Option(flags=("--inputs",), metavar="FILE", help="an .npz file with one array for every input"),
        Option(
            flags=("-o", "--output"),
            metavar="FILE",
            help="write the outputs to this .npz file; default: print their shapes and ranges",
        ),
        Option(flags=("--overwrite",), kind="flag", help="replace an existing output file"),
        THREADS,
        *COMMON,
    ),
    examples=(
        "edgepress run out --inputs sample.npz",
        "edgepress run out --inputs sample.npz -o outputs.npz",
    ),
)

DRIFT = Command(
    name="drift",
    summary="measure how far a candidate's outputs are from a baseline's",
    description=(
        "Runs both on the same data and compares their outputs; task metrics are added where the "
        "data has labels. With --max-drift the exit code is 3 when a limit is exceeded."
    ),
    arguments=(
        Argument(name="BASELINE", help="the reference: a model or a bundle"),
        Argument(name="CANDIDATE", help="what is measured against it: a model or a bundle"),
    ),
    options=(
        Option(flags=("--data",), metavar="DATA", help="evaluation data, in the forms of compile --calib"),
        MAX_DRIFT,
        SAMPLES,
        SEED,
        THREADS,
        TOKENIZER,
        TRUST_CODE,
        *COMMON,
    ),
    examples=(
        "edgepress drift model.onnx out --data test.npz",
        "edgepress drift model.onnx out --data labelled.csv --max-drift cosine=1%,flips=2%",
        "edgepress drift ./bert out --data hf:stanfordnlp/imdb:test,text=text,label=label --samples 200",
    ),
)

BENCHMARK = Command(
    name="benchmark",
    summary="time bundles and models on this machine",
    description=(
        "Times every candidate and the baseline in interleaved rounds with fresh sessions: p50, p90, "
        "p99, throughput, load time and peak memory of the process itself."
    ),
    arguments=(Argument(name="BUNDLE|MODEL", help="one or more bundles or models", many=True),),
    options=(
        Option(
            flags=("--baseline",),
            metavar="MODEL",
            help="what the others are compared with; default: the first",
        ),
        THREADS,
        SHAPE,
        SEED,
        ROUNDS,
        *COMMON,
    ),
    examples=(
        "edgepress benchmark out --baseline model.onnx --shape input_ids:1x128 --shape attention_mask:1x128",
        "edgepress benchmark out-a out-b --threads 4 --json",
    ),
)

TARGETS = Command(
    name="targets",
    summary="list, show or probe targets",
    subcommands=(
        Command(
            name="list",
            summary="the targets that edgepress knows",
            options=COMMON,
            examples=("edgepress targets list",),
        ),
        Command(
            name="show",
            summary="one target's profile, as TOML; of the host also what was timed on it",
            arguments=(Argument(name="NAME", help="a target's name or the path of a profile"),),
            options=(
                SET,
                Option(
                    flags=("--export",),
                    metavar="FILE",
                    help="of the host: write its profile, with the speed of each kernel as it was timed here",
                ),
                Option(
                    flags=("--clear-timings",),
                    kind="flag",
                    help="of the host: forget the operators that were timed, on all processors and versions",
                ),
                *COMMON,
            ),
            examples=(
                "edgepress targets show raspberry-pi-5",
                "edgepress targets show raspberry-pi-5 > my-board.toml",
                "edgepress targets show host --export this-machine.toml",
            ),
        ),
        Command(
            name="probe",
            summary="the profile of this machine, measured now",
            options=COMMON,
            examples=("edgepress targets probe > this-machine.toml",),
        ),
    ),
)

DOCTOR = Command(
    name="doctor",
    summary="check this installation and say what is missing",
    description=(
        "Checks Python, the packages and extras, the CPU's features, whether the runtime loads and "
        "runs (in a process of its own), the cache folder and the disk."
    ),
    options=COMMON,
    examples=("edgepress doctor",),
)

COMMANDS = (COMPILE, INSPECT, VERIFY, RUN, DRIFT, BENCHMARK, TARGETS, DOCTOR)
