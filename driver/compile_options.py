"""`edgepress compile` as data: its options with their help, and examples."""

from __future__ import annotations

from ..compress.presets import PRESETS, preset_line
from ..compress.prune.report import Importance, Repair
from ..compress.recipe import CalibMethod, GoldenSource, IoDtype, Precision, Quantization, choices
from .command_parts import (
    COMMON,
    MAX_DRIFT,
    OUTPUT_BUNDLE,
    PREPROCESSOR,
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
from .devices.options import DEVICE_OPTIONS

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
            help="for the host, or on --device: time fusions, operators in the forms that they could take, "
            "and plans, for about so long, and take what is faster there; 0 plans by the profile alone; "
            "default 10. Timings of operators are kept (`edgepress targets show host`, "
            "`edgepress targets probe --measure`)",
        ),
        Option(
            flags=("--allow-unmeasured",),
            kind="flag",
            help="also take lowerings of which nobody has measured, counted or timed whether they are "
            "faster on the target; without it such nodes stay float, and the plan says so. With --device "
            "also time on one that is not the target: its times then decide nothing",
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
            "and with --device it is measured, elsewhere predicted",
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
        *DEVICE_OPTIONS,
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
        "edgepress compile model.onnx --target raspberry-pi-5 --device ssh://pi@pi5 -o out --calib data.npz",
        "edgepress compile model.onnx --target host -o out --calib images/ --prune 0.5",
        "edgepress compile model.onnx --target host -o out --calib images/ --min-speedup 4x --max-size 2MB",
        "edgepress compile model.onnx --recipe out/recipe.toml -o again",
        "edgepress compile ./bert --target host -o out --calib hf:nyu-mll/glue:sst2:train --preset quick",
        "edgepress compile ./bert --target host -o out --shape input_ids:1x16:1x128:8x512 --calib text.txt",
        "edgepress compile model.onnx --target host -o out --calib data.npz --calib-cache ranges.json",
    ),
)
