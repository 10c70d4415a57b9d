"""`edgepress inspect`: what is in a model or a bundle, and what a compile would do with it."""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from pathlib import Path

import msgspec

from ..compress.plan import Plan
from ..compress.recipe import Recipe
from ..export.checksums import bundle_digest
from ..export.manifest import Manifest
from ..export.runs import read_runs
from ..export.verify import read_manifest
from ..frontends.source import load_source
from ..graph.errors import ModelError
from ..graph.model import Model, TensorSpec, type_name
from ..targets.registry import load_target
from ..targets.tensorrt import check_operators
from .cache import cache_folder
from .compile import compile_model
from .opened import is_bundle
from .operator_tables import operator_check_blocks
from .options import overrides_from
from .output import Answer, Block, Table, format_bytes
from .pareto import RUN_NAME, pareto_blocks, read_pareto
from .plan_tables import plan_blocks, plan_summary
from .prunable_tables import find_prunable, prunable_blocks
from .reporter import Reporter


def run(arguments: argparse.Namespace, reporter: Reporter) -> Answer:
    """Describe a bundle where the argument is one, else a model.

    Raises:
        ModelError: if it is neither, or is damaged.
        TargetError: if --target names no target.
    """
    named = arguments.model_or_bundle
    if is_bundle(Path(named)):
        return _bundle(Path(named))
    return _model(named, arguments, reporter)


def _model(named: str, arguments: argparse.Namespace, reporter: Reporter) -> Answer:
    with reporter.stage("load"):
        source = load_source(
            named, trust_code=arguments.trust_code, cache_folder=cache_folder(), progress=reporter.note
        )
    model = source.model
    operators = _operators(model)
    weights = _weights(model)
    document: dict[str, object] = {
        "model": {
            "origin": model.origin,
            "baseline": source.baseline_note,
            "opset": model.opset,
            "ir_version": model.ir.ir_version,
            "task": model.task,
            "inputs": model.inputs,
            "outputs": model.outputs,
            "nodes": sum(operators.values()),
            "operators": operators,
            "weights": weights,
            "weight_bytes": model.weight_bytes,
        }
    }
    blocks: list[Block] = [
        f"{model.origin.name}: {source.baseline_note}; opset {model.opset}, IR {model.ir.ir_version}, "
        f"{sum(operators.values())} nodes, {format_bytes(model.weight_bytes)} of weights, {model.task.kind}.",
        _interface(model.inputs, model.outputs),
        _operator_table(operators),
        _weight_table(weights),
    ]
    if arguments.prunable:
        with reporter.stage("coupling"):
            found_groups = find_prunable(model)
        document["prunable"] = found_groups
        blocks += prunable_blocks(found_groups)
    if arguments.target is not None:
        # Planning needs shapes, not data: nothing is calibrated or measured in a dry run.
        recipe = Recipe(
            target=arguments.target,
            target_overrides=overrides_from(arguments.set),
            data_free=True,
            trust_code=arguments.trust_code,
        )
        profile = load_target(recipe.target, recipe.override_texts)
        if profile.runtime.name == "tensorrt":
            found = check_operators(model, profile)
            document["operator_check"] = found
            blocks += operator_check_blocks(found)
        else:
            result = compile_model(
                named, target=arguments.target, recipe=recipe, dry_run=True, reporter=reporter
            )
            document["plan"] = result.plan
            document["plan_summary"] = plan_summary(result.plan)
            blocks += plan_blocks(result.plan, every_node=True)
    elif not arguments.prunable:
        blocks.append("What a compile would do with each node: add --target NAME.")
    return Answer(document=document, blocks=blocks)


def _bundle(path: Path) -> Answer:
    manifest = read_manifest(path)
    plan = _read_plan(path / "plan.json")
    runs, problems = read_runs(path)
    measured = runs.get(f"{RUN_NAME}.json")
    pareto = None if measured is None else read_pareto(measured.payload, f"{path}/runs/{RUN_NAME}.json")
    document = {
        "bundle": {
            "path": path,
            "digest": bundle_digest(path),
            "manifest": manifest,
            "model_bytes": _model_bytes(path, manifest),
            "golden_samples": len(manifest.golden.samples) if manifest.golden else 0,
            "plan": plan,
            "plan_summary": plan_summary(plan),
            "pareto": pareto,
            "runs": runs,
            "problems": problems,
        }
    }
    blocks: list[Block] = [
        _facts(path, manifest),
        _interface(manifest.model.inputs, manifest.model.outputs),
        *plan_blocks(plan, every_node=True),
    ]
    if pareto is not None:
        blocks += pareto_blocks(pareto, whole=True)
    if runs:
        blocks.append("Measured later: " + ", ".join(runs))
    blocks.append(f"Digests and golden samples are checked by: edgepress verify {path}")
    return Answer(document=document, blocks=blocks)


def _read_plan(file: Path) -> Plan:
    try:
        return msgspec.json.decode(file.read_bytes(), type=Plan)
    except (OSError, msgspec.MsgspecError) as error:
        raise ModelError(
            "the bundle's plan cannot be read",
            where=str(file),
            why=str(error),
            remedy="restore it from where the bundle came from, or compile the model again",
        ) from error


def _facts(path: Path, manifest: Manifest) -> Table:
    options = manifest.session_options
    settings = [f"{key}={value}" for key, value in options.config.items()]
    if options.graph_optimization_level is not None:
        settings.insert(0, options.graph_optimization_level)
    size_bytes = _model_bytes(path, manifest)
    rows = (
        ("model", f"{manifest.model.name}, {format_bytes(size_bytes)}, opset {manifest.model.opset}"),
        ("made from", f"{manifest.source.name} ({manifest.source.kind})"),
        ("task", manifest.task.kind),
        ("target", manifest.target.name),
        ("evidence", manifest.evidence),
        ("precision", _precision(manifest)),
        ("session options", ", ".join(settings) or "the runtime's defaults"),
        (
            "data",
            ", ".join(f"{item.name}: {item.samples} ({item.split})" for item in manifest.data) or "none",
        ),
        *(
            (f"shapes of {name}", f"{list(item.min)} to {list(item.max)}, usually {list(item.opt)}")
            for name, item in manifest.shapes.items()
        ),
        ("golden samples", str(len(manifest.golden.samples)) if manifest.golden else "none"),
        ("stamps", ", ".join(manifest.stamps) or "none"),
        ("versions", ", ".join(f"{name} {version}" for name, version in manifest.versions.items())),
    )
    return Table(title=str(path), columns=("what", "value"), rows=rows)


def _precision(manifest: Manifest) -> str:
    precision = manifest.precision
    done = precision.form if precision.quantization == "none" else precision.quantization
    return f"{done or precision.quantization} (asked for: {precision.requested})"


def _model_bytes(path: Path, manifest: Manifest) -> int:
    """Bytes of the model's files that are there."""
    return sum((path / name).stat().st_size for name in manifest.model.files if (path / name).is_file())


def _interface(inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> Table:
    rows = tuple(
        (kind, spec.name, spec.dtype, _shape(spec))
        for kind, specs in (("input", inputs), ("output", outputs))
        for spec in specs
    )
    return Table(title="Interface", columns=("", "name", "type", "shape"), rows=rows)


def _shape(spec: TensorSpec) -> str:
    if spec.shape is None:
        return "unknown"
    return "[" + ", ".join("?" if size is None else str(size) for size in spec.shape) + "]"


def _operators(model: Model) -> dict[str, int]:
    """How often each operator stands in the graph and its subgraphs; custom domains by full name."""
    counts: Counter[str] = Counter()
    for graph in model.all_graphs():
        for node in graph:
            counts[f"{node.domain}::{node.op_type}" if node.domain else node.op_type] += 1
    return dict(counts.most_common())


def _weights(model: Model) -> dict[str, dict[str, int]]:
    """Tensors, elements and bytes of the weights by type; a tensor that is shared counts once."""
    seen: set[int] = set()
    totals: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for graph in model.all_graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            totals[type_name(tensor.dtype)].update(tensors=1, elements=tensor.size, bytes=tensor.nbytes)
    return {name: dict(total) for name, total in sorted(totals.items())}


def _operator_table(operators: dict[str, int]) -> Table:
    rows = tuple((name, str(count)) for name, count in operators.items())
    return Table(title="Operators", columns=("op", "nodes"), rows=rows, numeric=frozenset({"nodes"}))


def _weight_table(weights: dict[str, dict[str, int]]) -> Table:
    rows = tuple(
        (name, str(total["tensors"]), f"{total['elements']:,}", format_bytes(total["bytes"]))
        for name, total in weights.items()
    )
    columns = ("type", "tensors", "elements", "size")
    return Table(title="Weights", columns=columns, rows=rows, numeric=frozenset(columns[1:]))
