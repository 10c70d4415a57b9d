"""What fusing leaves of a graph: edgepress beside onnxruntime, onnxruntime.transformers and onnxscript."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import onnx
from edgepress.benchmarks import peers
from edgepress.benchmarks.zoo import quiet

_ATTENTION = ("Attention", "MultiHeadAttention", "GroupQueryAttention")
_NORM = (
    "LayerNormalization", "SkipLayerNormalization", "SimplifiedLayerNormalization",
    "SkipSimplifiedLayerNormalization", "EmbedLayerNormalization", "RMSNormalization",
)  # fmt: skip
_GELU = ("Gelu", "FastGelu", "BiasGelu", "QuickGelu")
_OPTIMIZER_TYPES = {
    "GPT-2": "gpt2", "T5 encoder": "t5", "ViT": "vit", "DeiT": "vit", "BEiT": "vit", "Swin": "swin",
    "CLIP text": "clip", "CLIP vision": "clip", "Whisper encoder": "bart",
}  # fmt: skip
"""`model_type` of onnxruntime.transformers; the others are "bert", its default."""


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """Nodes of a graph (those of bodies too), and fused operators among them by kind.

    Attributes:
        failure: what went wrong in making the graph, if anything; the counts are then zero.
        error: relative error of its results; None where they were not compared.
    """

    nodes: int = 0
    attention: int = 0
    norm: int = 0
    gelu: int = 0
    failure: str | None = None
    error: float | None = None

    def text(self, tolerance: float = 1e-4) -> str:
        """`nodes (attention/norm/gelu)`, with what is wrong."""
        if self.failure is not None:
            return "fails"
        wrong = self.error is not None and not self.error <= tolerance
        return f"{self.nodes} ({self.attention}/{self.norm}/{self.gelu})" + (" wrong" if wrong else "")


def counts_of(file: Path) -> Counts:
    """Count what a file's graph holds."""
    graph = onnx.load(str(file), load_external_data=False).graph
    ops = collections.Counter(node.op_type for node in _nodes(graph))
    attention, norm, gelu = (sum(ops[op] for op in names) for names in (_ATTENTION, _NORM, _GELU))
    return Counts(nodes=sum(ops.values()), attention=attention, norm=norm, gelu=gelu)


def _nodes(graph: Any) -> Iterator[Any]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)


def by_runtime(file: Path, output: Path) -> None:
    """The rewriting that onnxruntime does when it loads a file, without what is special to the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(output)
    options.add_session_config_entry("session.disable_prepacking", "1")
    onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def by_transformers(name: str) -> Callable[[Path, Path], None]:
    """onnxruntime.transformers' optimizer with the model type that its documentation names."""

    def fuse(file: Path, output: Path) -> None:
        from onnxruntime.transformers import optimizer

        with peers.quietly():
            made = optimizer.optimize_model(
                str(file),
                model_type=_OPTIMIZER_TYPES.get(name, "bert"),
                num_heads=0,
                hidden_size=0,
                opt_level=0,
            )
            made.save_model_to_file(str(output), use_external_data_format=True)

    return fuse


def by_onnxscript(file: Path, output: Path) -> None:
    """onnxscript's ort_fusions."""
    import onnx_ir
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    with quiet():
        optimised, _ = optimize_for_ort(onnx_ir.load(str(file)))
        onnx_ir.save(optimised, str(output), external_data=f"{output.name}.data")


def counted(
    fuse: Callable[[Path, Path], None], file: Path, output: Path, error_of: Callable[[Path], float]
) -> Counts:
    """Run a peer on a file, count what it left, and compare its results.

    Args:
        fuse: writes the fused form of its first argument to its second.
        file: the exported model.
        output: where the fused form goes; what an earlier run left there is removed first.
        error_of: relative error of a file's results.
    """
    for old in (output, output.with_name(f"{output.name}.data")):
        old.unlink(missing_ok=True)
    try:
        fuse(file, output)
        return msgspec.structs.replace(counts_of(output), error=error_of(output))
    except Exception as error:  # noqa: BLE001 a peer may raise anything: its row says so
        return Counts(failure=innermost(error))


def innermost(error: BaseException) -> str:
    """The first line of what is at the bottom of an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:120]
