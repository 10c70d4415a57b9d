"""The command line as data: every command, argument and option with its help and examples.

Both the argparse parsers (`options.build_parser`) and docs/commands.md are made from it.
"""

from __future__ import annotations

from .command_parts import (
    COMMON,
    MAX_DRIFT,
    PRUNABLE,
    ROUNDS,
    SAMPLES,
    SEED,
    SET,
    SHAPE,
    TARGET,
    THREADS,
    TOKENIZER,
    TRUST_CODE,
    Argument,
    Command,
    Option,
)
from .compile_options import COMPILE
from .devices.emulator_options import EMULATOR
from .devices.kernel_options import KERNEL_OPTIONS
from .devices.options import DEVICE_OPTIONS, PROBE_OPTIONS
from .devices.scenario_options import MEASURING_OPTIONS
from .history.options import AFTER_RUN_OPTIONS, HISTORY, NO_HISTORY

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
        "differs by more than the tolerance that the manifest states. With --device it is copied to the "
        "device and checked there. With --kernels every integer kernel is compared by itself, too."
    ),
    arguments=(Argument(name="BUNDLE", help="a bundle's folder"),),
    options=(*KERNEL_OPTIONS, *DEVICE_OPTIONS, NO_HISTORY, *COMMON),
    examples=(
        "edgepress verify out",
        "edgepress verify out --device ssh://pi@raspberrypi",
        "edgepress verify out --kernels --device ssh://pi@raspberrypi --baseline model.onnx",
    ),
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
    summary="time bundles and models on this machine, or bundles on devices",
    description=(
        "Times every candidate and the baseline in interleaved rounds with fresh sessions: p50, p90, "
        "p99 and p99.9 with their 95 % intervals, throughput, load time, cold start and peak memory of the "
        "process itself. On devices, each bundle is copied there once, verified, and timed on the inputs "
        "that it carries; so it is here, where scenarios, sweeps, cores or energy are asked for."
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
        *MEASURING_OPTIONS,
        *DEVICE_OPTIONS,
        *AFTER_RUN_OPTIONS,
        *COMMON,
    ),
    examples=(
        "edgepress benchmark out --baseline model.onnx --shape input_ids:1x128 --shape attention_mask:1x128",
        "edgepress benchmark out-a out-b --threads 4 --json",
        "edgepress benchmark out --scenario SingleStream --scenario Server --qps 20 --bound-ms 100",
        "edgepress benchmark out --thread-sweep 1,2,4 --batch-sweep 1,8 --energy-seconds 10",
        "edgepress benchmark out --device ssh://pi@raspberrypi --baseline model.onnx",
        "edgepress benchmark out --devices lab.toml --group pi",
        "edgepress benchmark out --compare",
        "edgepress benchmark out --compare main --fail-if 'p90>+5%' --format junit --output report.xml",
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
            summary="the profile of this machine or of a device, as it is now",
            options=(*PROBE_OPTIONS, *DEVICE_OPTIONS, *COMMON),
            examples=(
                "edgepress targets probe > this-machine.toml",
                "edgepress targets probe --device ssh://pi@raspberrypi > my-pi.toml",
                "edgepress targets probe --measure --device ssh://pi@raspberrypi --export my-pi.toml",
            ),
        ),
    ),
)

DOCTOR = Command(
    name="doctor",
    summary="check this installation and say what is missing",
    description=(
        "Checks Python, the packages and extras, the CPU's features, whether the runtime loads and "
        "runs (in a process of its own), the cache folder and the disk. With --device it looks at the device "
        "instead, and installs nothing there."
    ),
    options=(*DEVICE_OPTIONS, *COMMON),
    examples=("edgepress doctor", "edgepress doctor --device ssh://pi@raspberrypi"),
)

COMMANDS = (COMPILE, INSPECT, VERIFY, RUN, DRIFT, BENCHMARK, HISTORY, TARGETS, EMULATOR, DOCTOR)
