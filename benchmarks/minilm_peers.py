"""all-MiniLM-L6-v2 in INT8: edgepress's bundle beside peers that are installed in environments of their own.

Baseline: the Hugging Face model as exported by torch (eager attention, dynamo exporter, opset 20), run with
onnxruntime's defaults. Every form, edgepress's too, runs in a worker process of its own and is timed there;
the workers take turns, one at a time, in alternating order, with fresh sessions each round. Peers are what
their makers' documentation makes of the model: optimum (dynamic, for AVX512-VNNI) on its own export;
onnxruntime's dynamic quantization of torch's legacy export, with and without the SkipLayerNormalization
fusion; NNCF run by onnxruntime; NNCF run by OpenVINO. Their environments are made at the first run and kept.

All that is calibrated is calibrated on the same 128 sentences: of a text (Wikitext-2), and in a second table
of the STS-B training set without its test sentences. edgepress measures drift on 128 others as it compiles.
Accuracy: the STS-B test sentences, mean-pooled, not normalised, in plain NumPy.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgepress.benchmarks import amx, peer_environments, places, sentence_accuracy, sentence_batches
from edgepress.benchmarks.compiling import compile_bundle
from edgepress.benchmarks.export_minilm import exported
from edgepress.benchmarks.peer_environments import PEERS, PeerForm
from edgepress.benchmarks.peer_workers import (
    Rounds,
    WorkerProcess,
    against_form,
    hidden_states,
    speed_of,
    time_workers,
    write_feeds,
)
from edgepress.benchmarks.report import Report, parser
from edgepress.benchmarks.sessions import Form, token_feeds
from edgepress.graph.errors import RuntimeUnavailable

BASELINE = "FP32 baseline"
BUNDLE = "edgepress INT8"
_SENTENCES = 128
_BATCH = 32
_CALIBRATIONS = ("calib-text", "stsb-train")
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_OUTPUT = "last_hidden_state"


def options_of_script() -> argparse.ArgumentParser:
    """The command line."""
    made = parser(__doc__)
    places.add_model(made)
    places.add_workdir(made)
    made.add_argument("--target", default="host", help="target of the bundle (default: host)")
    made.add_argument("--peers", choices=tuple(PEERS), nargs="+", default=list(PEERS))
    made.add_argument(
        "--torch-index", metavar="URL", help="a further package index, for a CPU build of torch"
    )
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
        choices=_CALIBRATIONS,
        nargs="+",
        default=list(_CALIBRATIONS),
        help="sentences that all forms are calibrated on, a table each (default: both)",
    )
    made.add_argument("--skip", choices=("speed", "accuracy", "batches"), action="append", default=[])
    return made


def _shape(text: str) -> str:
    if not re.fullmatch(r"[1-9][0-9]{0,3}x[1-9][0-9]{0,3}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 8x128")
    return text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sentences:
    """Disjoint sentences: all forms are calibrated on `calibrate`; edgepress measures drift on `held_out`."""

    calibrate: tuple[str, ...]
    held_out: tuple[str, ...]


def sentences_of(calibration: str) -> Sentences:
    """Evenly spread sentences of a source, none of them in the STS-B test set."""
    if calibration == "calib-text":
        lines = places.data(places.CALIBRATION_TEXT).read_text(encoding="utf-8").splitlines()
    else:
        lines = list(sentence_accuracy.read_sts(places.data(sentence_batches.STS_TRAIN)).sentences)
    tested = set(sentence_accuracy.read_sts(places.data(places.STS_TEST)).sentences)
    return spread(list(dict.fromkeys(line for line in lines if line.strip() and line not in tested)))


def spread(lines: Sequence[str]) -> Sentences:
    """Twice 128 of different lines, in turn, evenly spread.

    Raises:
        SystemExit: if there are not so many.
    """
    stride = len(lines) // (2 * _SENTENCES)
    if stride == 0:
        raise SystemExit(f"{len(lines)} sentences are too few: {2 * _SENTENCES} are needed")
    chosen = lines[::stride][: 2 * _SENTENCES]
    return Sentences(calibrate=tuple(chosen[::2]), held_out=tuple(chosen[1::2]))


class Forms:
    """The forms that are compared, the baseline first, and why some peers have none."""

    def __init__(self, options: argparse.Namespace, model: Path, report: Report) -> None:
        self._options = options
        self._model = model
        self._report = report
        self._uncalibrated: dict[str, list[PeerForm]] = {}
        report.progress("exporting the baseline")
        self.baseline = exported(model, options.workdir)

    def make(self, calibration: str, sentences: Sentences) -> tuple[list[PeerForm], dict[str, str]]:
        """All forms for one set of calibration sentences; and the reasons of the peers that fail."""
        workdir = self._options.workdir
        calibrating = write_feeds(
            workdir / f"peers-{calibration}.npz", sentence_accuracy.tokenize(sentences.calibrate, self._model)
        )
        forms = [_onnxruntime_form(Form(BASELINE, self.baseline)), self._bundle(calibration, sentences)]
        failures: dict[str, str] = {}
        for name in self._options.peers:
            try:
                forms += self._of_peer(name, calibration, calibrating)
            except RuntimeUnavailable as error:
                failures[name] = f"{error.where}: {error.why}"
        return forms, failures

    def _bundle(self, calibration: str, sentences: Sentences) -> PeerForm:
        self._report.progress(f"compiling the INT8 bundle ({calibration})")
        workdir: Path = self._options.workdir
        files = {}
        for side, lines in dataclasses.asdict(sentences).items():
            files[side] = workdir / f"peers-{calibration}-{side}.txt"
            files[side].write_text("\n".join(lines) + "\n", encoding="utf-8")
        suffix = f"-{calibration}{'-no-amx' if self._options.no_amx else ''}"
        bundle = workdir / f"minilm-peers-{self._options.target}-int8{suffix}"
        document = compile_bundle(
            self._model,
            bundle,
            self._options.target,
            *("--calib", str(files["calibrate"]), "--eval", str(files["held_out"])),
        )
        self._report.add(f"compile_notes, {calibration}", document.get("notes"))
        return _onnxruntime_form(Form.of_bundle(BUNDLE, bundle))

    def _of_peer(self, name: str, calibration: str, calibrating: Path) -> list[PeerForm]:
        if name in self._uncalibrated:
            return self._uncalibrated[name]
        peer, workdir = PEERS[name], self._options.workdir
        self._report.progress(f"the environment of {name}")
        python = peer_environments.make_environment(peer, workdir / "environments", self._options.torch_index)
        self._report.add(f"packages of {name}", peer_environments.packages_of(python))
        self._report.progress(f"quantizing with {name}")
        output = workdir / "peers" / (f"{name}-{calibration}" if peer.calibrated else name)
        request = {"model": self._model, "baseline": self.baseline, "calibration": calibrating}
        forms = peer_environments.prepare(peer, python, output, request)
        if not peer.calibrated:
            self._uncalibrated[name] = forms
        return forms


def _onnxruntime_form(form: Form) -> PeerForm:
    """A form that this environment's onnxruntime serves."""
    data = form.file.with_name(form.file.name + ".data")
    return PeerForm(
        name=form.name,
        python=Path(sys.executable),
        program="onnxruntime_file.py",
        files=(form.file, data) if data.is_file() else (form.file,),
        options={"config": form.config, "level": form.level},
    )


def measure_speed(
    workers: Sequence[WorkerProcess], failures: Mapping[str, str], options: argparse.Namespace, report: Report
) -> dict[str, Any]:
    """Time all workers at every shape and thread count, and print them."""
    figures: dict[str, Any] = {}
    for threads in options.threads:
        for shape in options.shapes:
            batch, tokens = (int(part) for part in shape.split("x"))
            runs = max(4, min(3 * options.runs, options.runs * 128 // (batch * tokens)))
            label = f"{shape}, {threads} thread{'s' * (threads > 1)}"
            report.progress(f"timing {label}: {options.pairs} rounds of {runs} runs")
            feeds = write_feeds(options.workdir / f"peers-{shape}.npz", [token_feeds(_INPUTS, batch, tokens)])
            series, failed = time_workers(
                workers, feeds, threads=threads, rounds=Rounds(pairs=options.pairs, runs=runs)
            )
            if BASELINE in failed:
                raise SystemExit(f"the baseline cannot be timed: {failed[BASELINE]}")
            found = speed_of(series, BASELINE)
            for name, item in found.items():
                ours = against_form(series, name, BUNDLE) if BUNDLE in series else None
                item["edgepress_faster"] = float("nan") if ours is None else ours.ratio
            figures[label] = {"forms": found, "failures": {**failures, **failed}}
            _print_speed(
                f"{label}: {options.pairs} rounds of fresh sessions, {runs} runs each", figures[label], report
            )
    return figures


def _require_ours(failed: Mapping[str, str]) -> None:
    for name in (BASELINE, BUNDLE):
        if name in failed:
            raise SystemExit(f"{name} cannot be run: {failed[name]}")


def _print_speed(title: str, figures: Mapping[str, Any], report: Report) -> None:
    columns = (
        ("median ms", "p50_ms"),
        ("p90 ms", "p90_ms"),
        ("x baseline", "ratio"),
        ("lowest", "ratio_low"),
        ("highest", "ratio_high"),
        ("of least", "ratio_of_least"),
        ("edgepress is x faster", "edgepress_faster"),
    )
    rows = [
        (name, *(f"{item[key]:.2f}" for _, key in columns), "") for name, item in figures["forms"].items()
    ]
    rows += [(name, *("-",) * len(columns), why) for name, why in figures["failures"].items()]
    report.table(title, ("form", *(name for name, _ in columns), ""), rows)


def measure_accuracy(
    workers: Sequence[WorkerProcess],
    failures: Mapping[str, str],
    model: Path,
    options: argparse.Namespace,
    report: Report,
) -> dict[str, Any]:
    """Drift of every form from the baseline on the STS-B test sentences, in NumPy, and its file."""
    pairs = sentence_accuracy.read_sts(places.data(places.STS_TEST))
    singles = sentence_accuracy.tokenize(pairs.sentences, model)
    ways: dict[str, list[dict[str, sentence_accuracy.Array]]] = {}
    if "accuracy" not in options.skip:
        ways["one at a time"] = singles
    if "batches" not in options.skip:
        ways[f"batches of {_BATCH}"] = sentence_batches.padded(singles, _BATCH)
    files = {
        way: write_feeds(options.workdir / f"peers-sts-test-{index}.npz", sets)
        for index, (way, sets) in enumerate(ways.items())
    }
    found: dict[str, Any] = {}
    failed = dict(failures)
    references: dict[str, sentence_accuracy.Floats] = {}
    for worker in workers:
        name = worker.form.name
        figures: dict[str, Any] = {"size_bytes": worker.form.size_bytes}
        try:
            for way, sets in ways.items():
                report.progress(f"{len(pairs.sentences)} sentences through {name}, {way}")
                states = hidden_states(worker, files[way], options.workdir / "peers-hidden.npz", _OUTPUT)
                embedded = sentence_batches.embed(_each_of(states), sets, _INPUTS)
                reference = references.setdefault(way, embedded)
                figures[way] = sentence_accuracy.compare(reference, embedded, pairs)
        except RuntimeUnavailable as error:
            failed[name] = error.why or error.what
            continue
        found[name] = figures
    _require_ours(failed)
    for figures in found.values():
        figures["size_fraction"] = figures["size_bytes"] / found[BASELINE]["size_bytes"]
    _print_accuracy(found, tuple(ways), failed, report)
    return {"forms": found, "failures": failed}


def _each_of(states: Iterator[sentence_accuracy.Array]) -> sentence_accuracy.Run:
    """The outputs that are there already, in the order in which they are asked for."""

    def run(_inputs: Mapping[str, sentence_accuracy.Array]) -> sentence_accuracy.Array:
        return next(states)

    return run


def _print_accuracy(
    found: Mapping[str, Any], ways: Sequence[str], failures: Mapping[str, str], report: Report
) -> None:
    keys = ("rel. L2", "neighbours", "Spearman")
    rows = [
        (name, f"{item['size_fraction']:.2%}", *(cell for way in ways for cell in _cells(item[way])), "")
        for name, item in found.items()
    ]
    rows += [(name, *("-",) * (1 + len(keys) * len(ways)), why) for name, why in failures.items()]
    report.table(
        f"file of the baseline's, and drift on the STS-B test sentences: {' | '.join(ways)}",
        ("form", "file", *(f"| {key}" if key == keys[0] else key for _ in ways for key in keys), ""),
        rows,
    )


def _cells(figures: Mapping[str, float]) -> tuple[str, str, str]:
    return f"{figures['l2']:.4f}", f"{figures['neighbour']:.2%}", f"{figures['spearman'] * 100:.2f}"


def print_summary(
    calibration: str, speed: Mapping[str, Any], accuracy: Mapping[str, Any], report: Report
) -> None:
    """Where edgepress's bundle is not faster or not closer than a peer; or that it is, everywhere."""
    behind = []
    for label, figures in speed.items():
        behind += [
            f"{name} is {1 / item['edgepress_faster']:.2f} times as fast at {label}"
            for name, item in figures["forms"].items()
            if name not in (BASELINE, BUNDLE) and not item["edgepress_faster"] > 1
        ]
    forms = accuracy.get("forms", {})
    for name, figures in forms.items():
        behind += [
            f"{name} is as close or closer, {way}: {item['l2']:.4f}"
            for way, item in figures.items()
            if isinstance(item, dict)
            and name not in (BASELINE, BUNDLE)
            and not item["l2"] > forms[BUNDLE][way]["l2"]
        ]
    report.add(f"behind, {calibration}", behind)
    if behind:
        report.text(f"\n{BUNDLE} is behind a peer ({calibration}):\n  " + "\n  ".join(behind))
    else:
        report.text(f"\n{BUNDLE} is ahead of every peer that ran, in everything measured ({calibration}).")


def compare_with(
    calibration: str, forms: Forms, model: Path, options: argparse.Namespace, report: Report
) -> None:
    """Make all forms for one set of calibration sentences, measure them, print them."""
    made, failures = forms.make(calibration, sentences_of(calibration))
    report.text(f"\ncalibrated on {_SENTENCES} sentences of {calibration}")
    speed: dict[str, Any] = {}
    accuracy: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        workers = [
            stack.enter_context(WorkerProcess(form, options.workdir / "peers" / "workers")) for form in made
        ]
        if "speed" not in options.skip:
            speed = measure_speed(workers, failures, options, report)
        if not {"accuracy", "batches"} <= set(options.skip):
            accuracy = measure_accuracy(workers, failures, model, options, report)
    report.add(calibration, {"speed": speed, "accuracy": accuracy, "failures": failures})
    print_summary(calibration, speed, accuracy, report)


def main() -> int:
    """For each set of calibration sentences: make all forms, measure them, print them."""
    options = options_of_script().parse_args()
    if options.no_amx:
        amx.deny()
    model = places.minilm(options.model)
    report = Report("minilm_peers", options)
    forms = Forms(options, model, report)
    for calibration in options.calibration:
        compare_with(calibration, forms, model, options, report)
    report.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
