"""all-MiniLM-L6-v2 on this machine: edgepress's INT8 bundle, its FP32 form, and onnxruntime's quantizers.

Baseline: the Hugging Face model as exported by torch (eager attention, dynamo exporter, opset 20), run
with onnxruntime's defaults. Speed: fresh session pairs, interleaved. Accuracy: the STS-B test sentences;
mean-pooled embeddings without normalisation. One at a time, unpadded: once by `edgepress drift`'s own code
and once in plain NumPy, which must agree. In padded batches of 32: in NumPy. All forms are calibrated on the
same sentences, of a text (Wikitext-2) or of the STS-B training set (`--calibration`).
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgepress.benchmarks import amx, peers, places, sentence_accuracy, sentence_batches
from edgepress.benchmarks.compiling import compile_bundle
from edgepress.benchmarks.export_minilm import exported
from edgepress.benchmarks.report import Report, parser
from edgepress.benchmarks.sessions import Form, PlainSession, manifest_of, speed_rows, time_forms, token_feeds

BASELINE = "FP32 baseline"
BUNDLE = "edgepress INT8"
FLOAT_BUNDLE = "edgepress FP32"
PLAIN_BUNDLE = "edgepress INT8, default options"
CLAIMED_SPEED = {"1x128": 3.1, "8x128": 3.2, "1x16": 2.7}
"""Shape -> times the baseline's speed, with 1 thread on a CPU with VNNI."""
_CALIBRATION_SAMPLES = 128
_BATCH = 32


def options_of_script() -> argparse.ArgumentParser:
    """The command line."""
    made = parser(__doc__)
    places.add_model(made)
    places.add_workdir(made)
    made.add_argument("--target", default="host", help="target of the bundles (default: host)")
    made.add_argument(
        "--no-amx", action="store_true", help="deny AMX to this process and its children (x86-64 Linux)"
    )
    made.add_argument(
        "--threads", type=int, nargs="+", default=[1, 2], help="thread counts (default: 1 and 2)"
    )
    made.add_argument(
        "--shapes", type=_shape, nargs="+", default=["1x128", "8x128", "1x16"], metavar="BATCHxTOKENS"
    )
    made.add_argument("--pairs", type=int, default=6, help="rounds of fresh sessions (default: 6)")
    made.add_argument("--runs", type=int, default=20, help="timed runs a round at 1x128 (default: 20)")
    made.add_argument(
        "--calibration",
        choices=("calib-text", "stsb-train"),
        default="calib-text",
        help="sentences that all forms are calibrated on (default: calib-text)",
    )
    made.add_argument("--skip", choices=("speed", "accuracy", "batches"), action="append", default=[])
    return made


def _shape(text: str) -> str:
    if not re.fullmatch(r"[1-9][0-9]{0,3}x[1-9][0-9]{0,3}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 8x128")
    return text


def make_forms(options: argparse.Namespace, model: Path, report: Report) -> list[Form]:
    """Export, compile and quantize: every form that is compared, the baseline first."""
    report.progress("exporting the baseline")
    baseline = exported(model, options.workdir)
    suffix = f"-{options.calibration}{'-no-amx' if options.no_amx else ''}"
    int8, fp32 = (options.workdir / f"minilm-{options.target}-{kind}{suffix}" for kind in ("int8", "fp32"))
    calibration = calibration_text(options)
    report.progress("compiling the INT8 bundle")
    document = compile_bundle(
        model, int8, options.target, "--calib", str(calibration), "--samples", str(_CALIBRATION_SAMPLES)
    )
    report.add("compile_notes", document.get("notes"))
    report.progress("compiling the FP32 bundle")
    compile_bundle(model, fp32, options.target, "--precision", "fp32", "--skip", "drift,benchmark,golden")
    bundle = Form.of_bundle(BUNDLE, int8)
    forms = [Form(BASELINE, baseline), bundle, Form.of_bundle(FLOAT_BUNDLE, fp32)]
    if bundle.has_options:
        forms.append(Form(PLAIN_BUNDLE, bundle.file))
    report.add("session_options", {"config": bundle.config, "level": bundle.level})
    return forms + _peer_forms(options.workdir, model, baseline, calibration, report)


def calibration_text(options: argparse.Namespace) -> Path:
    """The file of calibration sentences, one a line."""
    if options.calibration == "calib-text":
        return places.data(places.CALIBRATION_TEXT)
    pairs = sentence_accuracy.read_sts(places.data(sentence_batches.STS_TRAIN))
    file: Path = options.workdir / "stsb-train-sentences.txt"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(pairs.sentences) + "\n", encoding="utf-8")
    return file


def _peer_forms(workdir: Path, model: Path, baseline: Path, text: Path, report: Report) -> list[Form]:
    report.progress("quantizing with onnxruntime")
    texts = text.read_text(encoding="utf-8").splitlines()
    chosen = tuple(texts[:: max(1, len(texts) // _CALIBRATION_SAMPLES)][:_CALIBRATION_SAMPLES])
    samples = sentence_accuracy.tokenize(chosen, model)
    dynamic = peers.quantize_dynamic(baseline, workdir / "minilm-ort-dynamic.onnx")
    signed = peers.quantize_static(baseline, workdir / f"minilm-ort-static-{text.stem}.onnx", samples)
    unsigned = peers.quantize_static(
        baseline, workdir / f"minilm-ort-static-u8s8-{text.stem}.onnx", samples, unsigned_activations=True
    )
    return [
        Form("ORT dynamic, per channel", dynamic),
        Form("ORT static, its defaults (S8S8)", signed),
        Form("ORT static, U8S8", unsigned),
    ]


def measure_speed(forms: Sequence[Form], options: argparse.Namespace, report: Report) -> None:
    """Time all forms at every shape and thread count, and print them."""
    from edgepress.runtimes.timing import Schedule

    names = forms[0].open().input_names
    figures: dict[str, Any] = {}
    for threads in options.threads:
        for shape in options.shapes:
            batch, tokens = (int(part) for part in shape.split("x"))
            runs = max(4, min(3 * options.runs, options.runs * 128 // (batch * tokens)))
            report.progress(f"timing {shape}, {threads} threads: {options.pairs} rounds of {runs} runs")
            result = time_forms(
                forms,
                token_feeds(names, batch, tokens),
                threads=threads,
                schedule=Schedule(pairs=options.pairs, runs=runs, limit_s=300),
            )
            found = figures[f"{shape}, {threads} threads"] = speed_rows(result)
            fastest = found[FLOAT_BUNDLE]["p50_ms"]
            report.table(
                f"{shape}, {threads} thread{'s' * (threads > 1)}: {result.pairs} rounds of fresh sessions, "
                f"{runs} runs each",
                ("form", "median ms", "p90 ms", "x baseline", "lowest", "highest", "x edgepress FP32"),
                [
                    (
                        name,
                        f"{item['p50_ms']:.2f}",
                        f"{item['p90_ms']:.2f}",
                        f"{item['ratio']:.2f}",
                        f"{item['ratio_low']:.2f}",
                        f"{item['ratio_high']:.2f}",
                        f"{fastest / item['p50_ms']:.2f}",
                    )
                    for name, item in found.items()
                ],
            )
    report.add("speed", figures)


def measure_accuracy(forms: Sequence[Form], model: Path, bundle: Path, report: Report) -> None:
    """Drift of every form on the STS-B test sentences, by edgepress and by NumPy."""
    ours = _drift_by_edgepress(forms, model, bundle, report)
    plain = _drift_by_numpy(forms, model, report)
    whole = forms[0].size_bytes
    rows, figures = [], {}
    for form in forms:
        numpy_says, edgepress_says = plain[form.name], ours.get(form.name)
        figures[form.name] = {
            "size_fraction": form.size_bytes / whole,
            "size_bytes": form.size_bytes,
            "numpy": numpy_says,
            "edgepress": edgepress_says,
        }
        rows.append(
            (form.name, f"{form.size_bytes / whole:.2%}", *_cells(numpy_says), *_cells(edgepress_says))
        )
    report.add("accuracy", figures)
    report.table(
        "file, and drift on the STS-B test sentences (one at a time, unpadded): NumPy | edgepress drift",
        ("form", "file", *("rel. L2", "neighbours", "Spearman"), *("| rel. L2", "neighbours", "Spearman")),
        rows,
    )
    different = [
        (form.name, key, plain[form.name][key], ours[form.name][key])
        for form in forms[1:]
        for key, tolerance in (("l2", 1e-4), ("neighbour", 1e-3), ("spearman", 1e-4))
        if abs(plain[form.name][key] - ours[form.name][key]) > tolerance
    ]
    report.add("disagreements", different)
    for name, key, left, right in different:
        report.text(f"DISAGREEMENT: {name}, {key}: NumPy {left:.6f}, edgepress drift {right:.6f}")
    if not different:
        report.text("NumPy and edgepress drift agree.")


def _cells(figures: dict[str, float] | None) -> tuple[str, str, str]:
    if figures is None:
        return "", "", ""
    return f"{figures['l2']:.4f}", f"{figures['neighbour']:.2%}", f"{figures['spearman'] * 100:.2f}"


def _drift_by_numpy(forms: Sequence[Form], model: Path, report: Report) -> dict[str, dict[str, float]]:
    pairs = sentence_accuracy.read_sts(places.data(places.STS_TEST))
    feeds = sentence_accuracy.tokenize(pairs.sentences, model)
    found = {}
    reference = None
    for form in forms:
        report.progress(f"{len(feeds)} sentences through {form.name} (NumPy)")
        session = form.open()
        embedded = sentence_accuracy.embed(_hidden_state(session), feeds, session.input_names)
        reference = embedded if reference is None else reference
        found[form.name] = sentence_accuracy.compare(reference, embedded, pairs)
    return found


def _hidden_state(session: PlainSession) -> sentence_accuracy.Run:
    name = "last_hidden_state"
    return lambda inputs: session.run(inputs, [name])[name]


def _drift_by_edgepress(
    forms: Sequence[Form], model: Path, bundle: Path, report: Report
) -> dict[str, dict[str, float]]:
    from edgepress.calibration.data import open_data
    from edgepress.calibration.drift import measure_drift
    from edgepress.calibration.reference import ReferenceOutputs
    from edgepress.frontends.text import TextEncoder
    from edgepress.runtimes.base import SessionOptions
    from edgepress.runtimes.ort_runtime import OrtSession

    manifest = manifest_of(bundle)
    baseline = OrtSession(forms[0].file)
    data = open_data(str(places.data(places.STS_TEST)), baseline.inputs, encoder=TextEncoder.load(model))
    reference = ReferenceOutputs.collect(baseline, data, manifest.task)
    found: dict[str, dict[str, float]] = {}
    for form in forms[1:]:
        report.progress(f"{len(data)} sentences through {form.name} (edgepress drift)")
        session = OrtSession(
            form.file,
            manifest.session_options.options(threads=1) if form.has_options else SessionOptions(),
        )
        drift = measure_drift(baseline, session, data, manifest.task, reference_cache=reference)
        (spearman,) = (item for item in drift.task_metrics if item.name == "spearman")
        found.setdefault(forms[0].name, {"l2": 0.0, "neighbour": 1.0, "spearman": spearman.baseline})
        found[form.name] = {
            "l2": float("nan") if drift.l2 is None else drift.l2,
            "cosine": float("nan") if drift.cosine is None else drift.cosine,
            "neighbour": float("nan") if drift.top1 is None else drift.top1,
            "spearman": spearman.candidate,
        }
    return found


def measure_batches(forms: Sequence[Form], model: Path, report: Report) -> None:
    """Drift of every form on the same sentences in padded batches, from the baseline in such batches."""
    pairs = sentence_accuracy.read_sts(places.data(places.STS_TEST))
    batches = sentence_batches.padded(sentence_accuracy.tokenize(pairs.sentences, model), _BATCH)
    found: dict[str, dict[str, float]] = {}
    reference = None
    for form in forms:
        report.progress(f"{len(batches)} batches of {_BATCH} sentences through {form.name} (NumPy)")
        session = form.open()
        embedded = sentence_batches.embed(_hidden_state(session), batches, session.input_names)
        reference = embedded if reference is None else reference
        found[form.name] = sentence_accuracy.compare(reference, embedded, pairs)
    report.add("batches", found)
    report.table(
        f"drift on the STS-B test sentences in batches of {_BATCH}, padded: NumPy",
        ("form", "rel. L2", "neighbours", "Spearman"),
        [(name, *_cells(figures)) for name, figures in found.items()],
    )


def print_claims(report: Report) -> None:
    """What is claimed of the bundle, and what this run found."""
    rows = []
    speed, accuracy, batches = (report.figures(name) for name in ("speed", "accuracy", "batches"))
    for shape, times in CLAIMED_SPEED.items():
        timed = (speed or {}).get(f"{shape}, 1 threads")
        if timed:
            rows.append(
                (f"speed at {shape}, 1 thread", f"at least {times}x", f"{timed[BUNDLE]['ratio']:.2f}x")
            )
    if accuracy:
        rows.append(("file of FP32", "at most 26 %", f"{accuracy[BUNDLE]['size_fraction']:.2%}"))
    one_by_one = accuracy[BUNDLE]["numpy"] if accuracy else None
    for label, here in (("one at a time", one_by_one), (f"batches of {_BATCH}", (batches or {}).get(BUNDLE))):
        if here:
            rows += [
                (f"relative L2, {label}", "at most 0.068", f"{here['l2']:.4f}"),
                (f"nearest neighbour unchanged, {label}", "at least 97 %", f"{here['neighbour']:.2%}"),
                (f"Spearman x100, {label}", "at least 82.0", f"{here['spearman'] * 100:.2f}"),
            ]
    report.table(f"{BUNDLE}: claimed, and here", ("", "claimed", "here"), rows)


def main() -> int:
    """Make all forms, measure them, print them."""
    options = options_of_script().parse_args()
    if options.no_amx:
        amx.deny()
    model = places.minilm(options.model)
    report = Report("minilm_host", options)
    forms = make_forms(options, model, report)
    if "speed" not in options.skip:
        measure_speed(forms, options, report)
    if "accuracy" not in options.skip:
        measure_accuracy(forms, model, forms[1].file.parent, report)
    if "batches" not in options.skip:
        measure_batches(forms, model, report)
    print_claims(report)
    report.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
