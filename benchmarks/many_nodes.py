"""Time and open files of the exact clean-up on graphs of thousands of nodes with work for the rules."""

from __future__ import annotations

import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from edgepress.benchmarks.report import Report, parser
from edgepress.graph.cleanup import exact_cleanup
from edgepress.graph.load import load_model
from edgepress.graph.passes import run_passes
from edgepress.graph.save import save_model
from onnx import TensorProto, helper, numpy_helper

CLAIMED_OPEN_FILES = 64
_DESCRIPTORS = Path("/proc/self/fd")


def chain(count: int) -> onnx.ModelProto:
    """Nodes that add zero, transpose twice, unsqueeze twice and reshape to the shape there is."""
    nodes: list[onnx.NodeProto] = []

    def add(kind: str, *inputs: str, **attributes: Any) -> str:
        name = f"v{len(nodes)}"
        nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    weights = [
        numpy_helper.from_array(np.zeros(1, np.float32), "zero"),
        numpy_helper.from_array(np.zeros(1, np.int64), "first"),
    ]
    current = "x"
    while len(nodes) < count:
        current = add("Relu", add("Transpose", add("Add", current, "zero"), perm=[0, 1]))
        current = add("Transpose", add("Transpose", current, perm=[1, 0]), perm=[1, 0])
        wide = add("Unsqueeze", add("Unsqueeze", current, "first"), "first")
        current = add("ReduceMax", wide, axes=[0, 1], keepdims=0)
        current = add("Reshape", current, add("Shape", current))
    nodes.append(helper.make_node("Identity", [current], ["y"]))
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 4]) for name in "xy")
    graph = helper.make_graph(nodes, "chain", [x], [y], weights)
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


def main() -> int:
    """Measure and print."""
    options_of = parser(__doc__)
    options_of.add_argument("--nodes", type=int, nargs="+", default=[5_000, 10_000, 20_000])
    options = options_of.parse_args()
    report = Report("many_nodes", options)
    rows = []
    for count in options.nodes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            path.write_bytes(chain(count).SerializeToString())
            marks = [time.perf_counter()]
            model = load_model(path)
            marks.append(time.perf_counter())
            run_passes(model, exact_cleanup())
            marks.append(time.perf_counter())
            save_model(model, Path(folder) / "clean.onnx")
            marks.append(time.perf_counter())
        spent = [after - before for before, after in itertools.pairwise(marks)]
        opened = len(list(_DESCRIPTORS.iterdir())) if _DESCRIPTORS.is_dir() else 0
        report.add(
            str(count), {"load_s": spent[0], "clean_s": spent[1], "save_s": spent[2], "open_files": opened}
        )
        left = sum(1 for _ in model.graph)
        rows.append((f"{count}", f"{left}", *(f"{value:.2f}" for value in spent), f"{opened}"))
    report.table(
        "load, exact clean-up, save",
        ("nodes", "left", "load s", "clean-up s", "save s", "open files"),
        rows,
    )
    report.text(f"claimed: seconds, linear, fewer than {CLAIMED_OPEN_FILES} open files")
    report.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
