"""The README.md of a bundle: what it is and how to run it, for someone who has only the folder."""

from __future__ import annotations

from collections.abc import Iterable

from ..graph.model import TensorSpec
from .manifest import Manifest

_IO_NAMES = {"fp16": "float16", "bf16": "bfloat16"}
_FILES = {
    "model.onnx": "the model",
    "model.onnx.data": "its weights",
    "manifest.json": "what it is, what it was made from, how to set up the runtime",
    "recipe.toml": "what was asked for; `edgepress compile MODEL --recipe recipe.toml` replays it",
    "plan.json": "what was decided for every node, and why",
    "drift.json": "how far the outputs are from the original model's",
    "golden/": "inputs with the outputs they must give, within the manifest's tolerance",
    "assets/": "tokenizer and preprocessor",
    "device_runner.py": "checks and measures the bundle on the device, without edgepress",
    "snippets/": "short programs that run the model from Python, C++ and C#",
    "SHA256SUMS": "checks every file above: `sha256sum -c SHA256SUMS`",
    "runs/": "measurements made with this bundle; not part of it",
}


def bundle_readme(manifest: Manifest, files: Iterable[str]) -> str:
    """Markdown text made of the manifest and the names of the bundle's files."""
    names = set(files)
    parts = [
        f"# {_inline(manifest.model.name)} for {_inline(manifest.target.name)}",
        _summary(manifest),
        "## Run it",
        _how_to_run(manifest, names),
        "## Interface",
        _table("input", manifest.model.inputs) + "\n\n" + _table("output", manifest.model.outputs),
        "## Files",
        "\n".join(f"- `{name}`: {text}" for name, text in _FILES.items() if _is_there(name, names)),
    ]
    return "\n\n".join(parts) + "\n"


def _summary(manifest: Manifest) -> str:
    model, precision = manifest.model, manifest.precision
    counts = ", ".join(f"{count} in {name}" for name, count in sorted(precision.operators.items()))
    lines = [
        f"An ONNX model (opset {model.opset}) compiled by edgepress {manifest.versions.get('edgepress', '')} "
        f"from {_inline(manifest.source.name)}.",
        f"Precision: {precision.form or precision.requested}; quantization: {precision.quantization}; "
        f"operators: {counts or 'not counted'}; "
        f"evidence for the choices: {manifest.evidence}.",
    ]
    if precision.io_dtype != "fp32":
        lines.append(
            f"Float inputs and outputs are {_IO_NAMES[precision.io_dtype]} (see the interface below): "
            "convert arrays before they go in. Drift was measured with arrays rounded so, in float32."
        )
    if manifest.stamps:
        lines.append(
            f"**{', '.join(manifest.stamps)}**: see manifest.json for what this means for the figures."
        )
    return "\n".join(lines)


def _how_to_run(manifest: Manifest, names: set[str]) -> str:
    arguments = ", ".join(
        f"{spec.name}=…" if spec.name.isidentifier() else f"**{{{spec.name!r}: …}}"
        for spec in manifest.model.inputs
    )
    lines = [
        "With edgepress:",
        "",
        "```python",
        "import edgepress",
        "",
        'model = edgepress.load("PATH/OF/THIS/FOLDER")',
    ]
    if "assets/tokenizer.json" in names:
        lines.append('outputs = model(**model.encode(["a sentence"]))')
    else:
        lines.append(f"outputs = model({arguments})")
    lines += ["```", ""]
    if "snippets/run_python.py" in names:
        lines += ["Without it (numpy and onnxruntime only): `python snippets/run_python.py`.", ""]
    if manifest.target.runtime == "tensorrt":
        lines += [
            "This is the ONNX graph for TensorRT: build the engine on the device, "
            "`trtexec --onnx=model.onnx --stronglyTyped --saveEngine=model.plan` (TensorRT 8: `--fp16` "
            "instead of `--stronglyTyped`). Golden samples and drift were made with onnxruntime's CPU "
            "kernels, not with an engine.",
            "",
        ]
    settings = manifest.session_options
    if settings.graph_optimization_level is not None or settings.config:
        chosen = [f"`{key}` = `{value}`" for key, value in settings.config.items()]
        if settings.graph_optimization_level is not None:
            chosen.insert(0, f"graph optimization level `{settings.graph_optimization_level}`")
        lines += [f"Session options it was measured with: {', '.join(chosen)}.", ""]
    lines += [
        "Check it: `edgepress verify PATH/OF/THIS/FOLDER`.",
        "",
        "On the device (Python 3.8 or newer, numpy and the runtime; no network): `python device_runner.py`",
        "checks the hashes, runs the golden samples, measures latency, memory, energy; `--out FILE`: JSON.",
    ]
    return "\n".join(lines)


def _table(kind: str, specs: tuple[TensorSpec, ...]) -> str:
    rows = [f"| {kind} | type | shape |", "|---|---|---|"]
    for spec in specs:
        sizes = ["?" if size is None else str(size) for size in spec.shape or ()]
        shape = "unknown" if spec.shape is None else f"[{', '.join(sizes)}]"
        rows.append(f"| `{_inline(spec.name)}` | {spec.dtype} | {_inline(shape)} |")
    return "\n".join(rows)


def _is_there(name: str, names: set[str]) -> bool:
    if name in {"SHA256SUMS", "runs/"}:
        return True
    return any(item.startswith(name) for item in names) if name.endswith("/") else name in names


def _inline(text: str) -> str:
    """A name from a model file, harmless in a line of Markdown."""
    return "".join(char if char.isprintable() and char not in "`|<>" else "_" for char in text)
