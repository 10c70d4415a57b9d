"""What `--precision bf16` and `fp16` do on a CPU: file size, equality with rounded weights, speed, memory.

Each model is compiled for this machine in float32, bfloat16 and float16. The float32 bundle is also
written with the very weights rounded that the 16-bit bundle stores: where 16 bits are storage, both
must answer alike in every bit, at the same speed. Speed is interleaved, in plain onnxruntime sessions.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from edgepress.benchmarks import places
from edgepress.benchmarks.compiling import compile_bundle
from edgepress.benchmarks.export_minilm import exported
from edgepress.benchmarks.report import Report, parser
from edgepress.benchmarks.sessions import Array, Form, manifest_of, speed_rows, time_forms, token_feeds
from edgepress.runtimes.base import SessionOptions
from edgepress.runtimes.ort_runtime import optimised_graph
from edgepress.runtimes.peak_memory import measure_peak_memory
from edgepress.runtimes.timing import Schedule
from onnx import numpy_helper

_SIXTEEN_BITS = {"bf16": onnx.TensorProto.BFLOAT16, "fp16": onnx.TensorProto.FLOAT16}
_TOKENS = 128


def options_of_script() -> argparse.ArgumentParser:
    """The command line."""
    made = parser(__doc__)
    places.add_workdir(made)
    places.add_model(made)
    made.add_argument("--target", default="host", help="the target compiled for (default: host)")
    made.add_argument("--no-minilm", action="store_true", help="only the convolutional nets")
    made.add_argument("--onnx", action="append", default=[], help="a further .onnx file")
    made.add_argument("--rounds", type=int, default=8, help="interleaved rounds of sessions (default: 8)")
    return made


def compiled(model: Path, precision: str, options: argparse.Namespace) -> Path:
    """The bundle of a model in one precision; only the loop's own checks are run."""
    output: Path = options.workdir / f"{model.stem}-{options.target}-{precision}"
    words = ("--precision", precision, "--skip", "drift,benchmark,golden", "--data-free")
    compile_bundle(model, output, options.target, *words)
    return output


def stored_weights(file: Path, precision: str) -> set[str]:
    """The names of the weights that a bundle stores in 16 bits."""
    wanted = _SIXTEEN_BITS[precision]
    proto = onnx.load(file, load_external_data=False)
    suffix = f".{precision}"
    return {
        tensor.name.removesuffix(suffix) for tensor in proto.graph.initializer if tensor.data_type == wanted
    }


def with_rounded_weights(file: Path, names: set[str], precision: str, output: Path) -> Path:
    """A float32 model whose named weights are rounded to nearest even, by integer arithmetic for bfloat16."""
    proto = onnx.load(file)
    for tensor in proto.graph.initializer:
        if tensor.name not in names:
            continue
        values = numpy_helper.to_array(tensor)
        if precision == "bf16":
            bits = values.view(np.uint32)
            kept = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
            rounded = kept.astype(np.uint32).view(np.float32)
        else:
            rounded = values.astype(np.float16).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(rounded), tensor.name))
    onnx.save(proto, output)
    return output


def kernels(file: Path) -> dict[str, int]:
    """The operators of the runtime's optimised graph."""
    return dict(Counter(node.op_type for node in optimised_graph(file, SessionOptions()).graph.all_nodes()))


def feeds_of(form: Form, file: Path) -> dict[str, Array]:
    """One sentence of 128 tokens, or one normal-distributed sample."""
    names = form.open().input_names
    if "input_ids" in names:
        return token_feeds(names, 1, _TOKENS)
    rng, found = np.random.default_rng(0), {}
    for value in onnx.load(file, load_external_data=False).graph.input:
        if value.name in names:
            sizes = [dim.dim_value or 1 for dim in value.type.tensor_type.shape.dim]
            found[value.name] = rng.standard_normal(sizes).astype(np.float32)
    return found


def measure(model: Path, options: argparse.Namespace, report: Report) -> dict[str, Any]:
    """Every figure of one model."""
    report.progress(f"compiling {model.stem}")
    plain = compiled(model, "fp32", options)
    forms = [Form("FP32 bundle", plain / "model.onnx")]
    feeds = feeds_of(forms[0], model)
    found: dict[str, Any] = {}
    float_kernels = kernels(forms[0].file)
    for precision in _SIXTEEN_BITS:
        bundle = compiled(model, precision, options)
        form = Form(f"{precision} bundle", bundle / "model.onnx")
        forms.append(form)
        figures: dict[str, Any] = {"form": manifest_of(bundle).precision.form}
        names = stored_weights(form.file, precision)
        reference = with_rounded_weights(
            forms[0].file, names, precision, options.workdir / f"{model.stem}-{precision}-rounded.onnx"
        )
        expected = Form("rounded", reference).open().run(feeds)
        answers, exact = form.open().run(feeds), forms[0].open().run(feeds)
        figures["weights_stored"] = len(names)
        figures["equal_to_rounded_weights"] = all(
            np.array_equal(expected[name], answers[name]) for name in expected
        )
        figures["relative_l2_to_fp32"] = max(
            float(np.linalg.norm(answers[name] - exact[name]) / np.linalg.norm(exact[name])) for name in exact
        )
        own = kernels(form.file)
        figures["kernels_beyond_fp32"] = {
            op: own.get(op, 0) - float_kernels.get(op, 0)
            for op in sorted(own | float_kernels)
            if own.get(op, 0) != float_kernels.get(op, 0)
        }
        found[form.name] = figures
    report.progress(f"timing {model.stem}")
    timed = speed_rows(time_forms(forms, feeds, threads=1, schedule=Schedule(pairs=options.rounds)))
    for form in forms:
        entry = found.setdefault(form.name, {})
        entry |= {"file_bytes": form.size_bytes, **timed[form.name]}
        entry["peak_bytes"] = measure_peak_memory(form.file, feeds, SessionOptions())["peak_bytes"]
    return found


def print_model(name: str, found: dict[str, Any], report: Report) -> None:
    """The table of one model."""
    whole = found["FP32 bundle"]["file_bytes"]
    rows = []
    for form, item in found.items():
        equal = {True: "yes", False: "NO", None: ""}[item.get("equal_to_rounded_weights")]
        drift = item.get("relative_l2_to_fp32")
        rows.append(
            (
                form,
                item.get("form", "fp32"),
                f"{item['file_bytes'] / 1e6:.2f}",
                f"{item['file_bytes'] / whole:.1%}",
                equal,
                "" if drift is None else f"{drift:.2%}",
                f"{item['p50_ms']:.2f}",
                f"{item['ratio']:.3f} [{item['ratio_low']:.3f}, {item['ratio_high']:.3f}]",
                f"{item['load_ms']:.0f}",
                f"{item['peak_bytes'] / 1e6:.0f}",
            )
        )
    columns = (
        *("form", "is", "file MB", "of FP32", "= rounded", "rel. L2", "median ms", "speed", "load ms"),
        "peak MB",
    )
    report.table(name, columns, sorted(rows, key=lambda row: row[0] != "FP32 bundle"))
    for form, item in found.items():
        if item.get("kernels_beyond_fp32"):
            report.text(f"  {form}, operators beyond FP32's: {item['kernels_beyond_fp32']}")


def main() -> int:
    """Measure and print; 1 if a bundle that stores does not answer like rounded weights."""
    options = options_of_script().parse_args()
    options.workdir.mkdir(parents=True, exist_ok=True)
    report = Report("float_types", options)
    models = [places.data(f"cifar10-resnet/{name}.onnx") for name in ("resnet20", "resnet56")]
    if not options.no_minilm:
        models.insert(0, exported(places.minilm(options.model), options.workdir))
    wrong = 0
    for model in (*models, *map(Path, options.onnx)):
        found = measure(model, options, report)
        report.add(model.stem, found)
        print_model(model.stem, found, report)
        wrong += sum(
            not item["equal_to_rounded_weights"]
            for item in found.values()
            if item.get("form", "").endswith("storage")
        )
    report.close()
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
