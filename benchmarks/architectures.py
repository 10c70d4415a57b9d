"""Common architectures with random weights through the whole product: export, clean-up, fusion, INT8.

Every net is built from its transformers config (tiny, or near the published size with --full), exported
with a dynamic batch (and length, where it has one), and compared with torch at three shapes before and after
edgepress has cleaned it up and fused it. Beside it stand onnxruntime's own optimiser (basic level) and
onnxscript's ort_fusions. Then INT8 for host and raspberry-pi-5: the drift is on made-up inputs of random
weights and tells whether the arithmetic is right, not what a trained model would lose.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from edgepress.benchmarks import places
from edgepress.benchmarks.report import Report, parser
from edgepress.benchmarks.sessions import Form, PlainSession, time_forms
from edgepress.benchmarks.zoo import ARCHITECTURES, Architecture, quiet, vocabulary_of
from edgepress.compress.fuse.linear import GemmToMatMul
from edgepress.compress.lower import STANDARD_RULES, fusion_passes
from edgepress.compress.recipe import DriftLimit, Recipe
from edgepress.driver.compile import compile_model
from edgepress.graph.cleanup import exact_cleanup
from edgepress.graph.errors import EdgepressError
from edgepress.graph.load import load_model
from edgepress.graph.passes import run_passes
from edgepress.graph.rewrite import Rule
from edgepress.graph.save import save_model
from edgepress.runtimes.timing import Schedule
from edgepress.targets.registry import load_target

Array = npt.NDArray[Any]
Row = dict[str, Any]
TARGETS = ("host", "raspberry-pi-5")
_FUSIONS: tuple[Rule, ...] = (*STANDARD_RULES, GemmToMatMul())
_NO_LIMIT = (DriftLimit(metric="l2", limit=1e9),)
COLUMNS = (
    "architecture", "exported", "edgepress", "ORT basic", "onnxscript", "rules", "error before",
    "error after", "INT8 host l2", "MACs", "silent", "speed", "FP32 speed", "pi-5 l2", "MACs", "silent",
)  # fmt: skip


def options_of_script() -> argparse.ArgumentParser:
    """The command line."""
    made = parser(__doc__)
    places.add_workdir(made)
    names = [item.name for item in ARCHITECTURES]
    made.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME")
    made.add_argument("--full", action="store_true", help="sizes near the published ones (hours, gigabytes)")
    made.add_argument("--pairs", type=int, default=3, help="rounds of fresh sessions (default: 3)")
    made.add_argument("--runs", type=int, default=20, help="timed runs a round (default: 20)")
    made.add_argument("--no-speed", action="store_true", help="time nothing")
    made.add_argument("--markdown", type=Path, metavar="OUT", help="write the table to this file, too")
    return made


def innermost(error: BaseException) -> str:
    """The first line of what is at the bottom of an error, without colours."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:120]


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


def nodes_of(file: Path) -> int:
    """Nodes of a file's graph, those of bodies too."""
    return sum(1 for _ in _nodes(onnx.load(str(file), load_external_data=False).graph))


def _nodes(graph: Any) -> Any:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)


def after_onnxruntime(file: Path, folder: Path) -> int:
    """Nodes after onnxruntime's own exact rewrites."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(folder / "ort_basic.onnx")
    onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return nodes_of(folder / "ort_basic.onnx")


def after_onnxscript(file: Path, row: Row, samples: list[Mapping[str, Array]], expected: list[Any]) -> str:
    """Nodes after onnxscript's fusions, with what is wrong with the result, if anything."""
    import onnx_ir
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    model = onnx_ir.load(str(file))
    try:
        with quiet():
            optimised, _ = optimize_for_ort(model)
        changed = file.with_name("onnxscript.onnx")
        onnx_ir.save(optimised, str(changed))
        session = PlainSession(changed, 1, {}, None)
        error = max(
            relative_error(wanted, list(session.run(_taken(session, feeds)).values()))
            for feeds, wanted in zip(samples, expected, strict=True)
        )
    except Exception as error_:  # noqa: BLE001 a peer may raise anything: its row says so
        row["onnxscript_error"] = innermost(error_)
        return "fails"
    row["onnxscript_difference"] = error
    return f"{nodes_of(changed)}{'' if error < 1e-4 else ' wrong'}"


def _taken(session: PlainSession, feeds: Mapping[str, Array]) -> dict[str, Array]:
    return {name: feeds[name] for name in session.input_names}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Net:
    """An exported architecture with inputs at three shapes and what torch gives for them."""

    item: Architecture
    file: Path
    samples: list[Mapping[str, Array]]
    expected: list[list[Array]]

    def error(self, file: Path) -> float:
        """The worst relative error of a file against torch over the three shapes."""
        session = PlainSession(file, 1, {}, None)
        return max(
            relative_error(wanted, list(session.run(_taken(session, feeds)).values()))
            for feeds, wanted in zip(self.samples, self.expected, strict=True)
        )


def exported(item: Architecture, folder: Path, *, full: bool) -> Net:
    """Build, export and run an architecture in torch.

    Raises:
        Exception: whatever torch's exporter raises.
    """
    folder.mkdir(parents=True, exist_ok=True)
    module = item.build(full=full)
    file = folder / "model.onnx"
    item.export(module, file, full=full)
    ids = vocabulary_of(module)
    samples: list[Mapping[str, Array]] = [
        item.feeds(batch, size, vocabulary=ids, seed=seed)
        for seed, (batch, size) in enumerate(item.shapes(full=full))
    ]
    return Net(item=item, file=file, samples=samples, expected=[item.run(module, feeds) for feeds in samples])


def in_float(net: Net, row: Row) -> Path:
    """Clean up and fuse; counts and errors go into the row."""
    model = load_model(net.file)
    row["nodes_before"] = model.graph.num_nodes()
    done = run_passes(model, exact_cleanup())
    row["nodes_cleaned"] = model.graph.num_nodes()
    done += run_passes(model, fusion_passes(model, load_target("host"), {}))
    row["nodes_after"] = model.graph.num_nodes()
    counts: collections.Counter[str] = collections.Counter()
    for record in done:
        counts.update(record.applied)
    row["applied"] = dict(counts)
    row["refused"] = [f"{item.rule}: {item.reason}" for record in done for item in record.refused]
    row["operators"] = dict(collections.Counter(node.op_type for node in model.graph.all_nodes()))
    fused = net.file.with_name("fused.onnx")
    save_model(model, fused)
    row["error_before"], row["error_after"] = net.error(net.file), net.error(fused)
    return fused


def in_int8(net: Net, target: str) -> Row:
    """Compile to INT8 for a target on made-up data; what became of the work."""
    shapes = {name: array.shape for name, array in net.samples[0].items()}
    recipe = Recipe(
        target=target,
        precision="int8",
        data_free=True,
        samples=10,
        max_drift=_NO_LIMIT,
        skip=("benchmark", "golden"),
        shapes={name: shapes[name] for name in PlainSession(net.file, 1, {}, None).input_names},
    )
    place = net.file.parent / target
    try:
        result = compile_model(net.file, target=target, output=place, recipe=recipe, overwrite=True)
    except EdgepressError as error:
        return {"refused": str(error).splitlines()[0]}
    floats = collections.Counter(
        f"{item.op}: {item.reason}" for item in result.plan.decisions if item.form == "float"
    )
    forms = collections.Counter(item.form for item in result.plan.decisions)
    silent = [text for text in floats if "the runtime does not turn it" in text]
    return {
        "bundle": str(place),
        "quantization": result.plan.quantization,
        "l2": result.drift.l2 if result.drift else None,
        "integer_share": result.plan.integer_share(),
        "forms": dict(forms),
        "floats": dict(floats),
        "silent_floats": sum(floats[text] for text in silent),
        "notes": [note for note in result.notes if "left out" in note],
    }


def speed(net: Net, fused: Path, row: Row, schedule: Schedule) -> None:
    """FP32 as edgepress makes it and the INT8 bundle, beside the export, all with one thread."""
    forms = [Form("exported", net.file), Form("fused", fused)]
    if "bundle" in row["int8"]["host"]:
        forms.append(Form.of_bundle("int8", Path(row["int8"]["host"]["bundle"])))
    session = PlainSession(net.file, 1, {}, None)
    result = time_forms(forms, _taken(session, net.samples[0]), threads=1, schedule=schedule)
    for comparison in result.comparisons:
        row[f"speed_{comparison.candidate}"] = comparison.ratio
        row[f"speed_{comparison.candidate}_range"] = (comparison.low, comparison.high)


def measure(item: Architecture, folder: Path, options: argparse.Namespace, report: Report) -> Row:
    """One row of the table."""
    row: Row = {"name": item.name}
    report.progress(item.name)
    try:
        net = exported(item, folder, full=options.full)
    except Exception as error:  # noqa: BLE001 the exporter may raise anything: its row says so
        row["export_error"] = innermost(error)
        return row
    try:
        fused = in_float(net, row)
    except EdgepressError as error:
        row["refused_model"] = str(error).splitlines()[0]
        return row
    row["nodes_onnxruntime"] = after_onnxruntime(net.file, folder)
    row["nodes_onnxscript"] = after_onnxscript(net.file, row, net.samples, net.expected)
    row["int8"] = {target: in_int8(net, target) for target in TARGETS}
    if not options.no_speed:
        speed(net, fused, row, Schedule(pairs=options.pairs, runs=options.runs))
    return row


def cells(row: Row) -> tuple[str, ...]:
    """A row in words."""
    trouble = row.get("export_error") or row.get("refused_model")
    if trouble:
        return (row["name"], trouble, *[""] * (len(COLUMNS) - 2))
    made = [
        row["name"], str(row["nodes_before"]), str(row["nodes_after"]), str(row["nodes_onnxruntime"]),
        row["nodes_onnxscript"], _rules(row["applied"]), f"{row['error_before']:.0e}",
        f"{row['error_after']:.0e}",
    ]  # fmt: skip
    for target in TARGETS:
        int8 = row["int8"][target]
        if "refused" in int8:
            made += ["refused", "", ""]
        else:
            share = int8["integer_share"]
            made += [
                _number(int8["l2"], "{:.3f}"), _number(share, "{:.0%}"), str(int8["silent_floats"]),
            ]  # fmt: skip
        if target == "host":
            made += [_number(row.get("speed_int8"), "{:.2f}x"), _number(row.get("speed_fused"), "{:.2f}x")]
    return tuple(made)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _rules(applied: Mapping[str, int]) -> str:
    return ", ".join(f"{rule.name} {applied[rule.name]}" for rule in _FUSIONS if rule.name in applied) or "-"


def markdown(rows: Sequence[Row], *, full: bool) -> str:
    """The table as docs/ has it."""
    lines = [
        f"{'Near the published sizes' if full else 'Tiny'}; generated by `benchmarks/architectures.py`.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---" * len(COLUMNS) + "|",
        *("| " + " | ".join(text.replace("|", "/") for text in cells(row)) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure and print."""
    options = options_of_script().parse_args()
    report = Report("architectures", options)
    rows = []
    for item in ARCHITECTURES:
        if item.name not in options.only:
            continue
        folder = Path(options.workdir) / "architectures" / item.name.replace(" ", "-").lower()
        row = measure(item, folder, options, report)
        rows.append(row)
        report.text("  ".join(cells(row)))
    report.add("rows", rows)
    report.table("architectures", COLUMNS, [cells(row) for row in rows])
    speeds = [row["speed_int8"] for row in rows if "speed_int8" in row]
    if speeds:
        report.text(f"\nmedian speed of INT8 over {len(speeds)} nets: {statistics.median(speeds):.2f}x")
    if options.markdown is not None:
        options.markdown.write_text(markdown(rows, full=options.full), encoding="utf-8")
    report.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
