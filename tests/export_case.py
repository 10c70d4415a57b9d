"""Small real bundles for the tests of export/, made in process or by `python export_case.py …`."""

import argparse
import os
import sys
import time
from pathlib import Path

import numpy as np
import onnx
from edgepress.compress.plan import Plan
from edgepress.compress.recipe import Recipe
from edgepress.export import bundle as bundle_module
from edgepress.export.bundle import BundleContents, write_bundle
from edgepress.export.golden import measure_golden
from edgepress.export.manifest import (
    Manifest,
    ModelRecord,
    PrecisionSummary,
    TargetRecord,
    package_versions,
    session_settings,
)
from edgepress.graph.errors import EdgepressError
from edgepress.graph.load import load_model
from edgepress.graph.model import Model
from edgepress.graph.save import save_model
from edgepress.runtimes.base import SessionOptions
from onnx import TensorProto, helper, numpy_helper

ROWS, HIDDEN, OUT = 50, 16, 8


def text_model(folder, *, quantized=False, rows=ROWS):
    """ids [batch, sequence] and a mask → rows of a table times a matrix; INT8 in between on demand."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["ids"], to=TensorProto.INT32),
        helper.make_node("Gather", ["table", "ids"], ["rows"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["column"]),
        helper.make_node("Mul", ["rows", "column"], ["masked"]),
    ]
    if quantized:
        nodes += [
            helper.make_node("DynamicQuantizeLinear", ["masked"], ["q", "s", "z"]),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["x"]),
        ]
    nodes.append(helper.make_node("MatMul", ["x" if quantized else "masked", "w"], ["y"]))
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "text",
        [
            info("input_ids", TensorProto.INT64, ["batch", "sequence"]),
            info("attention_mask", TensorProto.INT64, ["batch", "sequence"]),
        ],
        [info("y", TensorProto.FLOAT, ["batch", "sequence", OUT])],
        [
            numpy_helper.from_array(rng.standard_normal((rows, HIDDEN)).astype(np.float32), "table"),
            numpy_helper.from_array(rng.standard_normal((HIDDEN, OUT)).astype(np.float32), "w"),
            numpy_helper.from_array(np.array([-1]), "last"),
        ],
    )
    return onnx_model(folder, graph)


def onnx_model(folder, graph) -> Model:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "source.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return load_model(path)


def contents_of(
    model, folder, *, golden=True, level=None, config=None, assets=None, external=False, seed=0
) -> BundleContents:
    """Save `model` below `folder`, run its golden samples, and put a bundle's contents together."""
    work = Path(folder) / "work"
    work.mkdir(exist_ok=True, parents=True)
    files = save_model(model, work / "model.onnx", **({"external_threshold_bytes": 0} if external else {}))
    settings = session_settings(SessionOptions(graph_optimization_level=level, config=config or {}))
    samples = measure_golden(model, files[0], settings, seed=seed) if golden else None
    manifest = Manifest(
        model=ModelRecord(
            name="tiny",
            files=tuple(path.name for path in files),
            fingerprint=model.fingerprint(),
            inputs=model.inputs,
            outputs=model.outputs,
            opset=model.opset,
            ir_version=model.ir.ir_version,
        ),
        source=model.origin,
        task=model.task,
        target=TargetRecord(name="host", profile_digest="0" * 64),
        evidence="none",
        precision=PrecisionSummary(requested="auto", quantization="none", operators={"float32": 1}),
        session_options=settings,
        golden=samples.record if samples else None,
        assets=tuple(sorted(assets or {})),
        versions=package_versions(),
    )
    return BundleContents(
        manifest=manifest,
        model_files=tuple(files),
        recipe=Recipe(target="host"),
        plan=Plan(target="host", precision="fp32", quantization="none", decisions=()),
        drift={"cosine": 0.0},
        golden=samples,
        assets=assets or {},
    )


def make_bundle(folder, name="bundle", *, overwrite=False, quantized=False, **options) -> Path:
    folder = Path(folder)
    contents = contents_of(text_model(folder, quantized=quantized), folder, **options)
    return write_bundle(contents, folder / name, overwrite=overwrite)


def _pause_after(files, marker):
    """Let `_write` announce itself and hang once it has written `files` files."""
    genuine, written = bundle_module._write, []

    def write(target, source):
        digest = genuine(target, source)
        written.append(target)
        if len(written) == files:
            marker.touch()
            # In short steps: a signal that comes just before a sleep begins is seen when it ends.
            for _ in range(600):
                time.sleep(0.1)
        return digest

    bundle_module._write = write


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--pause-after", type=int)
    parser.add_argument("--file-limit-bytes", type=int)
    arguments = parser.parse_args()
    model = text_model(arguments.folder, quantized=True, rows=arguments.rows)
    contents = contents_of(model, arguments.folder)
    if arguments.pause_after is not None:
        _pause_after(arguments.pause_after, arguments.folder / "paused")
    if arguments.file_limit_bytes is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (arguments.file_limit_bytes, arguments.file_limit_bytes))
    try:
        write_bundle(contents, arguments.out, overwrite=arguments.overwrite)
    except EdgepressError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    os.umask(0o022)
    sys.exit(main())
