"""How many architectures can be pruned on their ONNX graph: the nets of coverage.toml, cut at random.

Every net has random weights, biases, norm scales and running statistics. It is exported, cleaned up and
analysed, and random units of every group (streams that several layers add to only where the rest is not
enough) are removed until at least 30 % of its multiply-accumulates are gone. Then the checker has to pass,
inputs and outputs have to be what they were, and onnxruntime's outputs have to equal those of the same model
with the units masked (to 1e-4 of the largest number) and to differ from those of the whole model. Where that
fails the operators that keep most elements are named. Claimed: at least 95 % of the list.

torchvision and timm are needed for their definitions alone; --site names a folder with both, installed with
`pip install --no-deps --target FOLDER torchvision==0.28.0 timm==1.0.31`. A row is kept in the workdir as soon
as it is measured; --resume takes kept rows over. --nodes times the analysis alone on chains of so many nodes.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from edgepress.benchmarks import coverage_nets, places
from edgepress.benchmarks.coverage_trial import try_cut
from edgepress.benchmarks.fusion_counts import innermost
from edgepress.benchmarks.report import Report, parser
from edgepress.compress.prune.coupling import couple
from edgepress.compress.prune.cut import cut, marked
from edgepress.graph.cleanup import exact_cleanup
from edgepress.graph.load import load_model
from edgepress.graph.passes import run_passes
from edgepress.graph.shapes import InferShapes
from onnx import TensorProto, helper, numpy_helper

Row = dict[str, Any]
CLAIMED_FRACTION = 0.95
COLUMNS = (
    "net", "nodes", "coupling s", "groups", "prunable", "MACs left", "from masked", "from whole", "verdict",
)  # fmt: skip


def options_of_script() -> argparse.ArgumentParser:
    """The command line."""
    made = parser(__doc__)
    places.add_workdir(made)
    names = [entry.name for entry in coverage_nets.entries()]
    made.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME")
    made.add_argument("--tiny", action="store_true", help="small images, tiny transformers")
    made.add_argument("--site", type=Path, metavar="FOLDER", help="where torchvision and timm are installed")
    made.add_argument("--resume", action="store_true", help="take over rows that an earlier run measured")
    made.add_argument(
        "--nodes", type=int, nargs="+", metavar="N", help="time the analysis of chains of N nodes instead"
    )
    return made


def measure(entry: coverage_nets.Entry, folder: Path, *, tiny: bool) -> Row:
    """One row of the table; the exported file is removed again."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "model.onnx"
    row: Row = {"name": entry.name}
    try:
        module = coverage_nets.build(entry, tiny=tiny)
        feeds = coverage_nets.sample_feeds(entry, module, tiny=tiny)
        coverage_nets.export(entry, module, file, tiny=tiny)
        del module
        model = load_model(file)
        run_passes(model, exact_cleanup())
        samples = [{spec.name: sample[spec.name] for spec in model.inputs} for sample in feeds]
        trial = try_cut(model, samples)
    except Exception as error:  # noqa: BLE001 builders, exporters and runtimes may raise anything
        row["failure"] = innermost(error)
        return row
    finally:
        for left in folder.glob("model.onnx*"):
            left.unlink()
    return row | {name: getattr(trial, name) for name in trial.__dataclass_fields__}


def cells(row: Row) -> tuple[str, ...]:
    """A row of the table in words."""
    if "nodes" not in row:
        return (row["name"], *["-"] * (len(COLUMNS) - 2), row["failure"])
    return (
        row["name"],
        str(row["nodes"]),
        f"{row['coupling_s']:.2f}",
        str(row["groups"]),
        str(row["prunable"]),
        f"{row['macs_left_fraction']:.0%}",
        f"{row['worst']:.0e}",
        f"{row['moved']:.2f}",
        row["failure"] or "ok",
    )


def chain(count: int) -> onnx.ModelProto:
    """Convolutions with residual connections and, every so often, a Concat with a narrow branch."""
    random = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = []
    weights: list[onnx.TensorProto] = []

    def conv(source: str, inputs: int, outputs: int) -> str:
        name = f"w{len(weights)}"
        array = random.standard_normal((outputs, inputs, 1, 1)).astype(np.float32) / inputs
        weights.append(numpy_helper.from_array(array, name))
        return add("Conv", source, name)

    def add(kind: str, *inputs: str, **attributes: Any) -> str:
        name = f"v{len(nodes)}"
        nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    current = conv("x", 3, 8)
    while len(nodes) < count:
        inner = add("Relu", conv(current, 8, 8))
        current = add("Add", current, conv(inner, 8, 8))
        joined = add("Concat", current, add("Relu", conv(current, 8, 2)), axis=1)
        current = add("Relu", conv(joined, 10, 8))
    nodes.append(helper.make_node("Conv", [current, "head"], ["y"]))
    weights.append(numpy_helper.from_array(random.standard_normal((3, 8, 1, 1)).astype(np.float32), "head"))
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 3, 4, 4]) for name in "xy")
    graph = helper.make_graph(nodes, "chain", [x], [y], weights)
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


def time_chain(count: int, folder: Path) -> dict[str, float]:
    """Seconds of the analysis of a chain of `count` nodes, and of a cut of half of every group."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"chain-{count}.onnx"
    file.write_bytes(chain(count).SerializeToString())
    model = load_model(file)
    run_passes(model, [InferShapes()])
    marks = [time.perf_counter()]
    coupling = couple(model)
    marks.append(time.perf_counter())
    units = [unit for group in coupling.prunable for unit in group.units[: len(group.units) // 2]]
    cut(coupling, marked(coupling, units))
    marks.append(time.perf_counter())
    file.unlink()
    return {
        "groups": len(coupling.groups),
        "coupling_s": marks[1] - marks[0],
        "cut_s": marks[2] - marks[1],
    }


def report_chains(options: argparse.Namespace, report: Report) -> None:
    """The table of --nodes."""
    rows = []
    for count in options.nodes:
        figures = time_chain(count, Path(options.workdir) / "coverage-chains")
        report.add(str(count), figures)
        seconds = (f"{figures[name]:.2f}" for name in ("coupling_s", "cut_s"))
        rows.append((str(count), str(figures["groups"]), *seconds))
    report.table("coupling analysis and cut", ("nodes", "groups", "coupling s", "cut s"), rows)
    report.text("claimed: seconds, linear in the nodes")


def main() -> int:
    """Measure and print."""
    options = options_of_script().parse_args()
    report = Report("coverage", options)
    if options.nodes:
        report_chains(options, report)
        report.close()
        return 0
    coverage_nets.use_site(options.site)
    rows = []
    size = "tiny" if options.tiny else "full"
    for entry in coverage_nets.entries():
        if entry.name not in options.only:
            continue
        folder = Path(options.workdir) / f"coverage-{size}" / entry.name.replace(" ", "-").lower()
        kept = folder / "row.json"
        if options.resume and kept.is_file():
            row = json.loads(kept.read_text(encoding="utf-8"))
        else:
            report.progress(entry.name)
            row = measure(entry, folder, tiny=options.tiny)
            kept.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
        rows.append(row)
        report.text("  ".join(cells(row)))
    report.add("rows", rows)
    report.table("pruned at random", COLUMNS, [cells(row) for row in rows])
    passed = sum(1 for row in rows if not row["failure"])
    report.text(
        f"{passed} of {len(rows)} nets pass ({passed / max(len(rows), 1):.0%}); "
        f"claimed: {CLAIMED_FRACTION:.0%} of the list"
    )
    report.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
