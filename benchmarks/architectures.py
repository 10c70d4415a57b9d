"""Common architectures with random weights through the whole product: export, clean-up, fusion, INT8.

Every net is built from its transformers config (tiny, or near the published size with --full), exported
with a dynamic batch (and length, where it has one), and compared with torch at three shapes before and after
edgepress has cleaned it up and fused it. Beside it stand what onnxruntime fuses when it loads the export,
onnxruntime.transformers' optimizer, and onnxscript's ort_fusions: nodes (attention/norm/gelu operators).
Attention of edgepress counts the blocks that it recognises; they stay product, softmax, product, as one
operator is no faster here.

Then INT8 for host and raspberry-pi-5, and by onnxruntime's quantizer (static per-channel U8S8 where edgepress
chose static, else dynamic per-channel), all calibrated and compared with float on the same random inputs. The
weights are random: the drift tells whether the arithmetic is right, not what a trained model would lose.
Speeds are those of one thread against the exported float model, run as it is with onnxruntime's defaults.

A row is kept in the workdir as soon as it is measured; --resume takes kept rows over.
"""

from __future__ import annotations

import argparse
import collections
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from edgepress.benchmarks import peers, places
from edgepress.benchmarks.fusion_counts import (
    Counts,
    by_onnxscript,
    by_runtime,
    by_transformers,
    counted,
    counts_of,
    innermost,
)
from edgepress.benchmarks.report import Report, parser
from edgepress.benchmarks.sessions import Form, PlainSession, time_forms
from edgepress.benchmarks.zoo import ARCHITECTURES, Architecture, vocabulary_of
from edgepress.compress.fuse.multihead import count_attention
from edgepress.compress.lower import fusion_passes
from edgepress.compress.recipe import DriftLimit, Recipe
from edgepress.driver.compile import compile_model
from edgepress.graph.cleanup import exact_cleanup
from edgepress.graph.errors import EdgepressError
from edgepress.graph.load import load_model
from edgepress.graph.passes import run_passes
from edgepress.graph.save import save_model
from edgepress.runtimes.timing import Schedule
from edgepress.targets.registry import load_target

Array = npt.NDArray[Any]
Row = dict[str, Any]
TARGETS = ("host", "raspberry-pi-5")
CALIBRATION_SAMPLES, EVALUATION_SAMPLES = 8, 4
_NO_LIMIT = (DriftLimit(metric="l2", limit=1e9),)
FUSION_COLUMNS = (
    "architecture", "exported", "edgepress", "onnxruntime", "ORT transformers", "onnxscript",
    "error of export", "error of edgepress", "FP32 speed",
)  # fmt: skip
INT8_COLUMNS = (
    "architecture", "form", "MACs in INT8", "silent floats", "l2", "l2 of ORT", "file", "speed",
    "speed of ORT", "pi-5: form", "MACs in INT8", "l2",
)  # fmt: skip


def options_of_script() -> argparse.ArgumentParser:
    """The command line."""
    made = parser(__doc__)
    places.add_workdir(made)
    names = [item.name for item in ARCHITECTURES]
    made.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME")
    made.add_argument("--full", action="store_true", help="sizes near the published ones (hours, gigabytes)")
    made.add_argument("--pairs", type=int, default=3, help="rounds of fresh sessions (default: 3)")
    made.add_argument("--runs", type=int, default=8, help="timed runs a round (default: 8)")
    made.add_argument("--no-speed", action="store_true", help="time nothing")
    made.add_argument("--resume", action="store_true", help="take over rows that an earlier run measured")
    made.add_argument("--markdown", type=Path, metavar="OUT", help="write the tables to this file, too")
    return made


def relative_error(expected: Sequence[Array], found: Sequence[Array]) -> float:
    """Largest difference over the largest expected number, of the worst output."""
    if len(expected) != len(found):
        return float("inf")
    worst = 0.0
    for wanted, got in zip(expected, found, strict=True):
        if wanted.shape != got.shape:
            return float("inf")
        scale = max(float(np.abs(wanted).max(initial=0.0)), 1e-12)
        worst = max(worst, float(np.abs(wanted.astype(np.float64) - got).max(initial=0.0)) / scale)
    return worst


class Net:
    """An exported architecture, what torch gives for inputs of three shapes, and data for INT8."""

    def __init__(self, item: Architecture, folder: Path, *, full: bool) -> None:
        """Build, run in torch and export.

        Raises:
            Exception: whatever torch's exporter raises.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.item = item
        self.file = folder / "model.onnx"
        module = item.build(full=full)
        ids = vocabulary_of(module)
        shapes = item.shapes(full=full)
        self.samples = [
            item.feeds(batch, size, vocabulary=ids, seed=seed) for seed, (batch, size) in enumerate(shapes)
        ]
        self.expected = [item.run(module, feeds) for feeds in self.samples]
        item.export(module, self.file, full=full)
        self.inputs = PlainSession(self.file, 1, {}, None).input_names
        count = CALIBRATION_SAMPLES + EVALUATION_SAMPLES
        data = [item.feeds(1, shapes[0][1], vocabulary=ids, seed=100 + index) for index in range(count)]
        self.calibration = _stacked(data[:CALIBRATION_SAMPLES], self.inputs)
        self.evaluation = _stacked(data[CALIBRATION_SAMPLES:], self.inputs)
        np.savez(folder / "calibration.npz", allow_pickle=False, **self.calibration)
        np.savez(folder / "evaluation.npz", allow_pickle=False, **self.evaluation)

    def error(self, file: Path) -> float:
        """The worst relative error of a file against torch over the three shapes."""
        session = PlainSession(file, 1, {}, None)
        return max(
            relative_error(wanted, list(session.run(self.taken(feeds)).values()))
            for feeds, wanted in zip(self.samples, self.expected, strict=True)
        )

    def taken(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Those of the inputs that the exported graph still has."""
        return {name: feeds[name] for name in self.inputs}

    def l2(self, file: Path) -> float:
        """Relative L2 of a file's outputs against the exported model's on the evaluation data."""
        sessions = [PlainSession(path, 1, {}, None) for path in (self.file, file)]
        difference = norm = 0.0
        for feeds in peers.stacked(self.evaluation):
            for wanted, found in zip(
                *(list(session.run(feeds).values()) for session in sessions), strict=True
            ):
                difference += float(np.square(wanted.astype(np.float64) - found).sum())
                norm += float(np.square(wanted.astype(np.float64)).sum())
        return float(np.sqrt(difference / max(norm, 1e-300)))


def _stacked(data: Sequence[Mapping[str, Array]], names: Sequence[str]) -> dict[str, Array]:
    return {name: np.concatenate([feeds[name] for feeds in data]) for name in names}


def in_float(net: Net, row: Row) -> Path:
    """Clean up and fuse; counts and errors go into the row, the peers' as well."""
    model = load_model(net.file)
    done = run_passes(model, exact_cleanup())
    done += run_passes(model, fusion_passes(model, load_target("host"), {}))
    applied: collections.Counter[str] = collections.Counter()
    for record in done:
        applied.update(record.applied)
    row["applied"] = dict(applied)
    row["refused"] = [f"{item.rule}: {item.reason}" for record in done for item in record.refused]
    fused = net.file.with_name("fused.onnx")
    save_model(model, fused)
    own = msgspec.structs.replace(counts_of(fused), attention=count_attention(model), error=net.error(fused))
    exported = msgspec.structs.replace(counts_of(net.file), error=net.error(net.file))
    counts = {"exported": exported, "edgepress": own}
    for name, fuse in (
        ("onnxruntime", by_runtime),
        ("transformers", by_transformers(net.item.name)),
        ("onnxscript", by_onnxscript),
    ):
        counts[name] = counted(fuse, net.file, net.file.with_name(f"{name}.onnx"), net.error)
        net.file.with_name(f"{name}.onnx.data").unlink(missing_ok=True)
    row["counts"] = {name: msgspec.to_builtins(item) for name, item in counts.items()}
    return fused


def in_int8(net: Net, target: str) -> Row:
    """Compile to INT8 for a target; what became of the work."""
    place = net.file.parent / target
    recipe = Recipe(target=target, precision="int8", max_drift=_NO_LIMIT, skip=("benchmark", "golden"))
    try:
        result = compile_model(
            net.file,
            target=target,
            output=place,
            calib=str(net.file.with_name("calibration.npz")),
            eval_data=str(net.file.with_name("evaluation.npz")),
            recipe=recipe,
            overwrite=True,
        )
    except EdgepressError as error:
        return {"refused": str(error).splitlines()[0]}
    floats = collections.Counter(
        f"{item.op}: {item.reason}" for item in result.plan.decisions if item.form == "float"
    )
    silent = [text for text in floats if "the runtime does not turn it" in text]
    assert result.sizes.bundle_model_bytes is not None
    return {
        "bundle": str(place),
        "quantization": result.plan.quantization,
        "l2": result.drift.l2 if result.drift else None,
        "integer_share": result.plan.integer_share(),
        "size_fraction": result.sizes.bundle_model_bytes / result.sizes.source_bytes,
        "forms": dict(collections.Counter(item.form for item in result.plan.decisions)),
        "floats": dict(floats),
        "silent_floats": sum(floats[text] for text in silent),
        "notes": [note for note in result.notes if "left out" in note],
    }


def by_peer(net: Net, row: Row) -> Path | None:
    """onnxruntime's quantizer in the same form; None where it fails."""
    output = net.file.with_name("onnxruntime_int8.onnx")
    try:
        if row["int8"]["host"].get("quantization") == "static":
            samples = peers.stacked(net.calibration)
            peers.quantize_static(net.file, output, samples, unsigned_activations=True, per_channel=True)
        else:
            peers.quantize_dynamic(net.file, output)
        row["peer_l2"] = net.l2(output)
    except Exception as error:  # noqa: BLE001 a peer may raise anything: its row says so
        row["peer_error"] = innermost(error)
        return None
    return output


def speed(net: Net, fused: Path, peer: Path | None, row: Row, schedule: Schedule) -> None:
    """FP32 as edgepress makes it and the INT8 forms, beside the export, all with one thread."""
    forms = [Form("exported", net.file), Form("fused", fused)]
    if "bundle" in row["int8"]["host"]:
        forms.append(Form.of_bundle("int8", Path(row["int8"]["host"]["bundle"])))
    if peer is not None:
        forms.append(Form("peer", peer))
    result = time_forms(forms, net.taken(net.samples[0]), threads=1, schedule=schedule)
    row["speed"] = {
        item.candidate: {"ratio": item.ratio, "low": item.low, "high": item.high}
        for item in result.comparisons
    }


def measure(item: Architecture, folder: Path, options: argparse.Namespace) -> Row:
    """One row of the tables."""
    row: Row = {"name": item.name}
    try:
        net = Net(item, folder, full=options.full)
    except Exception as error:  # noqa: BLE001 the exporter may raise anything: its row says so
        row["failure"] = innermost(error)
        return row
    try:
        fused = in_float(net, row)
    except EdgepressError as error:
        row["failure"] = str(error).splitlines()[0]
        return row
    row["int8"] = {target: in_int8(net, target) for target in TARGETS}
    peer = by_peer(net, row)
    if not options.no_speed:
        speed(net, fused, peer, row, Schedule(pairs=options.pairs, runs=options.runs))
    return row


def fusion_cells(row: Row) -> tuple[str, ...]:
    """A row of the first table in words."""
    if "failure" in row:
        return (row["name"], row["failure"], *[""] * (len(FUSION_COLUMNS) - 2))
    counts = {name: msgspec.convert(item, Counts) for name, item in row["counts"].items()}
    return (
        row["name"],
        str(counts["exported"].nodes),
        *(counts[name].text() for name in ("edgepress", "onnxruntime", "transformers", "onnxscript")),
        *(f"{counts[name].error or 0.0:.0e}" for name in ("exported", "edgepress")),
        _speed(row, "fused"),
    )


def int8_cells(row: Row) -> tuple[str, ...]:
    """A row of the second table in words."""
    if "failure" in row:
        return (row["name"], row["failure"], *[""] * (len(INT8_COLUMNS) - 2))
    host, board = (row["int8"][target] for target in TARGETS)
    refused = host.get("refused") or board.get("refused")
    if refused:
        return (row["name"], refused, *[""] * (len(INT8_COLUMNS) - 2))
    return (
        row["name"],
        host["quantization"],
        f"{host['integer_share']:.0%}",
        str(host["silent_floats"] + board["silent_floats"]),
        _number(host["l2"], "{:.3f}"),
        _number(row.get("peer_l2"), "{:.3f}") if "peer_error" not in row else "fails",
        f"{host['size_fraction']:.0%}",
        _speed(row, "int8"),
        _speed(row, "peer"),
        board["quantization"],
        f"{board['integer_share']:.0%}",
        _number(board["l2"], "{:.3f}"),
    )


def _speed(row: Row, name: str) -> str:
    found = row.get("speed", {}).get(name)
    return "-" if found is None else f"{found['ratio']:.2f}x"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def markdown(
    tables: Sequence[tuple[Sequence[str], Sequence[Sequence[str]]]], report: Report, *, full: bool
) -> str:
    """The tables as docs/ has them."""
    size = "near the published sizes" if full else "tiny"
    flags = "--full --markdown" if full else "--markdown"
    lines = ["# Architectures", "", *(__doc__ or "").strip().splitlines()[:-2], ""]
    lines += [
        f"Generated by `benchmarks/architectures.py {flags} docs/architectures.md`.",
        f"Sizes: {size}. Machine: {report.machine()}.",
    ]
    for columns, rows in tables:
        lines += ["", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        lines += ["| " + " | ".join(text.replace("|", "/") for text in cells) + " |" for cells in rows]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure and print."""
    options = options_of_script().parse_args()
    report = Report("architectures", options)
    rows = []
    for item in ARCHITECTURES:
        if item.name not in options.only:
            continue
        size = "full" if options.full else "tiny"
        folder = Path(options.workdir) / f"architectures-{size}" / item.name.replace(" ", "-").lower()
        kept = folder / "row.json"
        if options.resume and kept.is_file():
            row = json.loads(kept.read_text(encoding="utf-8"))
        else:
            report.progress(item.name)
            row = measure(item, folder, options)
            kept.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
        rows.append(row)
        report.text("  ".join((*fusion_cells(row), *int8_cells(row)[1:])))
    report.add("rows", rows)
    tables = [
        (FUSION_COLUMNS, [fusion_cells(row) for row in rows]),
        (INT8_COLUMNS, [int8_cells(row) for row in rows]),
    ]
    for title, (columns, cells) in zip(("float: nodes (attention/norm/gelu)", "INT8"), tables, strict=True):
        report.table(title, columns, cells)
    for name in ("fused", "int8", "peer"):
        speeds = [row["speed"][name]["ratio"] for row in rows if name in row.get("speed", {})]
        if speeds:
            middle, slowest = statistics.median(speeds), min(speeds)
            report.text(f"{name}: median {middle:.2f}x, slowest {slowest:.2f}x of {len(speeds)} nets")
    if options.markdown is not None:
        options.markdown.write_text(markdown(tables, report, full=options.full), encoding="utf-8")
    report.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
