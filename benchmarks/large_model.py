"""Memory of quantizing a synthetic transformer of several gigabytes: load, plan, quantize, write.

It runs in a process of its own, which reads its own VmHWM (mapped pages counted) as its last act. The base is
the same process after its imports. Beside it: onnxruntime's quantize_dynamic, if asked for.

Then the commands that run the model: compile with its drift and golden samples, drift, verify. Above 0.5 GiB
of weights they open sessions without prepacking, so that weights stay mapped: such pages count as resident
while they are used, and the system takes them back when it needs them. The process's own memory (RssAnon,
looked at every 10 ms) stands beside it, and below it the same two sessions with the runtime's defaults.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
from edgepress.benchmarks.places import add_workdir
from edgepress.benchmarks.report import Report, parser
from onnx import TensorProto, helper

CLAIMED_ABOVE_BASE_MB = 300
_WIDTH, _INNER = 2048, 8192
_BYTES_PER_LAYER = 4 * (4 * _WIDTH * _WIDTH + 2 * _WIDTH * _INNER)
_CHILD = """
import json, sys, time
from pathlib import Path
from edgepress.compress.lower import apply_plan
from edgepress.compress.propose import Request, propose
from edgepress.graph.cleanup import exact_cleanup
from edgepress.graph.load import load_model, require_no_nan
from edgepress.graph.passes import run_passes
from edgepress.graph.save import save_model
from edgepress.runtimes.cpu import peak_memory_bytes
from edgepress.targets.registry import load_target
source, out = map(Path, sys.argv[1:3])
profile = load_target("x86-64-avx512-vnni")
base, started, marks = peak_memory_bytes(), time.perf_counter(), {}
model = load_model(source)
marks["load"] = time.perf_counter() - started
require_no_nan(model)
marks["NaN check"] = time.perf_counter() - started
run_passes(model, exact_cleanup())
marks["clean-up"] = time.perf_counter() - started
plan = propose(model, profile, Request())
lowered, _ = apply_plan(model, plan)
marks["plan and apply"] = time.perf_counter() - started
files = save_model(lowered, out / "model.onnx", with_shapes=False)
marks["write"] = time.perf_counter() - started
print(json.dumps({"base": base, "peak": peak_memory_bytes(), "seconds": marks,
                  "quantized": len(plan.quantized()), "bytes": sum(f.stat().st_size for f in files)}))
"""
_PEER = """
import json, sys, time
from onnxruntime.quantization import QuantType, quantize_dynamic
from edgepress.runtimes.cpu import peak_memory_bytes
base, started = peak_memory_bytes(), time.perf_counter()
quantize_dynamic(sys.argv[1], sys.argv[2] + "/model.onnx", weight_type=QuantType.QInt8, per_channel=True,
                 use_external_data_format=True)
seconds = {"all": time.perf_counter() - started}
print(json.dumps({"base": base, "peak": peak_memory_bytes(), "seconds": seconds}))
"""

_WATCHED = """
import json, sys, threading, time
from pathlib import Path
from edgepress.runtimes.cpu import peak_memory_bytes
import numpy, onnx, onnx_ir, onnxruntime
import edgepress.driver.compile, edgepress.driver.drift_command, edgepress.driver.verify_command
def own():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
base, base_own, peak_own, done = peak_memory_bytes(), own(), 0, threading.Event()
def watch():
    global peak_own
    while not done.wait(0.01):
        peak_own = max(peak_own, own())
watcher = threading.Thread(target=watch)
watcher.start()
try:
    code = RUN
finally:
    done.set()
    watcher.join()
print(json.dumps({"base": base, "peak": peak_memory_bytes(), "own": peak_own - base_own}))
sys.exit(code)
"""
_COMMAND = _WATCHED.replace("RUN", "edgepress.driver.cli.main(sys.argv[3:])").replace(
    "import numpy", "import edgepress.driver.cli, numpy", 1
)
_SESSIONS = _WATCHED.replace("RUN", "sessions()").replace(
    "def own", """def sessions():
    feeds = {"x": numpy.ones((1, 16, 2048), numpy.float32)}
    opened = [onnxruntime.InferenceSession(path) for path in sys.argv[3:]]
    for session in opened:
        session.run(None, feeds)
    return 0
def own""", 1
)  # fmt: skip


def make_model(folder: Path, gigabytes: float) -> Path:
    """A stack of linear layers with residuals, FP32 weights in one external file of about this size."""
    path, layers = folder / "large.onnx", max(1, round(gigabytes * 1e9 / _BYTES_PER_LAYER))
    if path.exists() and onnx.load(path, load_external_data=False).producer_version == str(layers):
        return path
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    nodes, tensors, value = [], [], "x"
    with (folder / "large.onnx.data").open("wb") as data:
        for layer in range(layers):
            residual = value
            shapes = [(_WIDTH, _WIDTH)] * 4 + [(_WIDTH, _INNER), (_INNER, _WIDTH)]
            for index, shape in enumerate(shapes):
                name = f"layer{layer}.{index}.weight"
                tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape)
                tensor.data_location = TensorProto.EXTERNAL
                size = 4 * shape[0] * shape[1]
                for key, entry in (
                    ("location", "large.onnx.data"),
                    ("offset", data.tell()),
                    ("length", size),
                ):
                    tensor.external_data.add(key=key, value=str(entry))
                block = rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[0]))
                data.write(block.tobytes())
                tensors.append(tensor)
                nodes.append(helper.make_node("MatMul", [value, name], [f"{name}.y"], name=f"{name}.matmul"))
                value = f"{name}.y"
            nodes.append(helper.make_node("Add", [value, residual], [f"layer{layer}.sum"]))
            value = f"layer{layer}.sum"
    nodes.append(helper.make_node("Identity", [value], ["y"]))
    axes: list[str | int | None] = ["batch", "length", _WIDTH]
    graph = helper.make_graph(
        nodes,
        "large",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, axes)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, axes)],
        tensors,
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10, producer_version=str(layers)
    )
    path.write_bytes(model.SerializeToString())
    return path


def measured(script: str, source: Path, out: Path, *words: str) -> dict[str, object]:
    """Run a child process on the model and return what it measured of itself."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-P", "-c", script, str(source), str(out), *words],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        return {"failed": done.stderr.strip().splitlines()[-1:] or [f"exit {done.returncode}"]}
    document: dict[str, object] = json.loads(done.stdout.strip().splitlines()[-1])
    return {**document, "wall": time.perf_counter() - started}


def _seconds(marks: object) -> str:
    return ", ".join(f"{name} {second:.1f}" for name, second in dict(marks).items())  # type: ignore[call-overload]


def measured_commands(source: Path, folder: Path, report: Report) -> list[tuple[str, ...]]:
    """Rows of what the commands that run the model need, and two sessions with the runtime's defaults."""
    bundle = str(folder / "bundle")
    data = folder / "sample.npz"
    np.savez(data, x=np.random.default_rng(1).standard_normal((4, 16, _WIDTH), np.float32))
    compiling = (
        "compile", str(source), "--target", "x86-64-avx512-vnni", "--eval", str(data), "-o", bundle,
        "--overwrite", "--max-drift", "l2=1e9", "--skip", "benchmark",
    )  # fmt: skip
    rows: list[tuple[str, ...]] = []
    for name, script, words in (
        ("compile with drift and golden samples", _COMMAND, compiling),
        ("drift, 4 samples of 16 x 2048", _COMMAND, ("drift", str(source), bundle, "--data", str(data))),
        ("verify", _COMMAND, ("verify", bundle)),
        ("both sessions by default", _SESSIONS, (str(source), f"{bundle}/model.onnx")),
    ):
        report.progress(name)
        found = measured(script, source, folder / "out", *words)
        report.add(name, found)
        if "failed" in found:
            rows.append((name, "failed", str(found["failed"]), ""))
            continue
        above = (int(str(found["peak"])) - int(str(found["base"]))) / 1e6
        rows.append(
            (name, f"{int(str(found['own'])) / 1e6:.0f} MB", f"{above:.0f} MB", f"{found['wall']:.1f} s")
        )
    return rows


def main() -> int:
    """Measure and print."""
    options_of = parser(__doc__)
    add_workdir(options_of)
    options_of.add_argument("--gigabytes", type=float, default=3.0, help="FP32 weights (default: 3)")
    options_of.add_argument("--peer", action="store_true", help="onnxruntime's quantize_dynamic as well")
    options = options_of.parse_args()
    report = Report("large_model", options)
    folder = options.workdir / f"large-{options.gigabytes:g}"
    report.progress("making the model")
    source = make_model(folder, options.gigabytes)
    size = (folder / "large.onnx.data").stat().st_size
    rows = []
    for name, script in (
        ("edgepress", _CHILD),
        *((("onnxruntime quantize_dynamic", _PEER),) if options.peer else ()),
    ):
        report.progress(f"quantizing with {name}")
        found = measured(script, source, folder / "out")
        report.add(name, found)
        if "failed" in found:
            rows.append((name, "failed", str(found["failed"]), "", ""))
            continue
        above = (int(str(found["peak"])) - int(str(found["base"]))) / 1e6
        rows.append(
            (
                name,
                f"{above:.0f} MB",
                f"{above * 1e6 / size:.2f}",
                f"{found['wall']:.1f} s",
                _seconds(found["seconds"]),
            )
        )
    report.table(
        f"quantizing {size / 1e9:.2f} GB of FP32 weights",
        ("", "peak above base", "of the model", "wall", "seconds at the end of each step"),
        rows,
    )
    report.table(
        "commands that run it",
        ("", "own memory above base", "with mapped pages", "wall"),
        measured_commands(source, folder, report),
    )
    report.text(f"claimed of edgepress: quantizing takes at most {CLAIMED_ABOVE_BASE_MB} MB above base")
    report.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
