"""Check that a bundle is what it says: every byte, every file's form, and its golden samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import msgspec

from ..compress.plan import Plan
from ..compress.recipe import parse_recipe
from ..compress.typed.twin import open_session
from ..graph.errors import DataError, ModelError, UserError, VerifyFailed
from ..graph.model import TensorSpec
from .checksums import SUMS_NAME, bundle_digest, check_sums, list_files
from .environment import numeric_environment
from .golden import failures
from .manifest import GoldenRecord, Manifest, decode_manifest
from .npz import read_npz
from .runs import RunRecord, read_runs

# Told as (stage, steps done, steps in all): bytes of "checksums", samples of "golden samples".
Progress = Callable[[str, int, int], None]
_SHOWN_PROBLEMS = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What was checked of a bundle that passed.

    Attributes:
        bundle: its folder.
        digest: SHA-256 of its SHA256SUMS; what runs/*.json name.
        files: files whose digest was recomputed, and their bytes.
        size_bytes: the bytes of those files.
        golden_samples: samples run through the model; 0 where the bundle has none or they were
            not asked for.
        exact: whether the golden outputs had to be (and were) equal bit by bit.
        runs: files of runs/, all measured with this bundle.
    """

    bundle: Path
    digest: str
    files: int
    size_bytes: int
    golden_samples: int
    exact: bool
    runs: tuple[str, ...]


def verify_bundle(path: Path, *, run_golden: bool = True, progress: Progress | None = None) -> VerifyReport:
    """Recompute every digest, read every file's form, load the model and re-run its golden samples.

    The model is loaded only if all digests hold. Bit equality of the golden outputs is asked where
    a record in runs/ says that they were made by the same runtime version, CPU, options and threads.

    Args:
        path: the bundle's folder.
        run_golden: whether to load the model and run its samples.
        progress: told (stage, done, total) as the work goes on.

    Raises:
        ModelError: if the folder is not a bundle.
        VerifyFailed: with everything that is wrong with it.
        NotSupported: if the bundle is of a newer schema version.
        RuntimeUnavailable: if onnxruntime cannot be used here.
    """
    require_bundle(path)
    names = list_files(path)[0]
    size_bytes = sum((path / name).stat().st_size for name in names)
    read_bytes = 0

    def count(step_bytes: int) -> None:
        nonlocal read_bytes
        read_bytes += step_bytes
        if progress is not None:
            progress("checksums", read_bytes, size_bytes)

    _raise_if(check_sums(path, on_bytes=count), path)
    runs, problems = read_runs(path)
    manifest, form_problems = _check_forms(path)
    problems += form_problems
    _raise_if(problems, path)
    assert manifest is not None
    golden = manifest.golden if run_golden else None
    exact = golden is not None and _was_recorded_here(runs, manifest, golden)
    if run_golden:
        _raise_if(_check_model(path, manifest, exact=exact, progress=progress), path)
    return VerifyReport(
        bundle=path,
        digest=bundle_digest(path),
        files=len(names) - len(runs),
        size_bytes=size_bytes,
        golden_samples=len(golden.samples) if golden is not None else 0,
        exact=exact,
        runs=tuple(runs),
    )


def require_bundle(path: Path) -> None:
    """Refuse what is not a bundle's folder at all.

    Raises:
        ModelError: if it does not exist, is a file, or has neither manifest.json nor SHA256SUMS.
    """
    why = None
    if not path.exists():
        why = "it does not exist"
    elif not path.is_dir():
        why = "it is a file; a bundle is a folder"
    elif not any((path / name).exists() for name in (SUMS_NAME, "manifest.json")):
        why = f"it has neither manifest.json nor {SUMS_NAME}"
    if why is not None:
        raise ModelError(
            "not an edgepress bundle",
            where=str(path),
            why=why,
            remedy="name a folder that `edgepress compile … -o` wrote",
        )


def read_manifest(path: Path) -> Manifest:
    """The manifest of the bundle at `path`.

    Raises:
        ModelError: if the folder is not a bundle, or its manifest cannot be read or is not valid.
        NotSupported: if it is of a newer schema version.
    """
    require_bundle(path)
    file = path / "manifest.json"
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ModelError(
            "the bundle's manifest cannot be read",
            where=str(file),
            why=error.strerror,
            remedy="restore it from where the bundle came from, or compile the model again",
        ) from error
    return decode_manifest(data, where=str(file))


def _check_forms(path: Path) -> tuple[Manifest | None, list[str]]:
    """The manifest, and what is wrong with the form of manifest, recipe and plan."""
    problems, manifest = [], None
    try:
        manifest = read_manifest(path)
    except ModelError as error:
        problems.append(f"manifest.json: {error.why or error.what}")
    for name, parse in (("recipe.toml", _parse_recipe), ("plan.json", _parse_plan)):
        try:
            parse((path / name).read_bytes())
        except FileNotFoundError:
            problems.append(f"{name}: missing")
        except UserError as error:
            problems.append(f"{name}: {error.what}" + (f" ({error.why})" if error.why else ""))
        except (msgspec.MsgspecError, ValueError) as error:
            problems.append(f"{name}: {error}")
    if manifest is not None:
        golden = manifest.golden.samples if manifest.golden is not None else ()
        named = [
            *manifest.model.files,
            *(f"assets/{name}" for name in manifest.assets),
            *(file for sample in golden for file in (sample.inputs, sample.outputs)),
        ]
        present = set(list_files(path)[0])
        problems += [f"{name}: named in manifest.json, but missing" for name in named if name not in present]
    return manifest, problems


def _parse_recipe(data: bytes) -> None:
    parse_recipe(data.decode("utf-8"), where="recipe.toml")


def _parse_plan(data: bytes) -> None:
    msgspec.json.decode(data, type=Plan)


def _was_recorded_here(runs: dict[str, RunRecord], manifest: Manifest, golden: GoldenRecord) -> bool:
    here = numeric_environment(manifest.session_options, golden.threads)
    return any(record.payload.get("environment") == here for record in runs.values())


def _check_model(path: Path, manifest: Manifest, *, exact: bool, progress: Progress | None) -> list[str]:
    """Load the model with the bundle's options, compare its interface, run the golden samples."""
    golden = manifest.golden
    options = manifest.session_options.options(threads=golden.threads if golden is not None else 1)
    try:
        weight_bytes = sum((path / name).stat().st_size for name in manifest.model.files)
        session = open_session(
            path / "model.onnx",
            options.for_answers(weight_bytes),
            manifest.precision.form,
            manifest.precision.io_dtype,
        )
    except UserError as error:
        return [f"model.onnx: {error.what}" + (f" ({error.why})" if error.why else "")]
    problems = [
        *_interface_problems("input", manifest.model.inputs, session.inputs),
        *_interface_problems("output", manifest.model.outputs, session.outputs),
    ]
    if problems or golden is None:
        return problems
    tolerances = {tolerance.name: tolerance for tolerance in golden.tolerances}
    for index, sample in enumerate(golden.samples):
        try:
            feeds = read_npz(path / sample.inputs, manifest.model.inputs)
            recorded = read_npz(path / sample.outputs, manifest.model.outputs)
            found = session.run(feeds)
        except UserError as error:
            where = error.where if isinstance(error, DataError) and error.where else sample.inputs
            problems.append(f"{where}: {error.what}" + (f" ({error.why})" if error.why else ""))
            continue
        for name, reference in recorded.items():
            wrong = failures(tolerances[name], reference, found[name], exact=exact)
            problems += [f"{sample.outputs}: output {name!r}: {text}" for text in wrong]
        if progress is not None:
            progress("golden samples", index + 1, len(golden.samples))
    return problems


def _interface_problems(kind: str, said: tuple[TensorSpec, ...], found: tuple[TensorSpec, ...]) -> list[str]:
    mine = [(spec.name, spec.dtype) for spec in said]
    own = [(spec.name, spec.dtype) for spec in found]
    return [] if mine == own else [f"manifest.json: {kind}s {mine} are not the model's {own}"]


def _raise_if(problems: list[str], path: Path) -> None:
    if not problems:
        return
    shown = problems[:_SHOWN_PROBLEMS]
    if len(problems) > len(shown):
        shown.append(f"and {len(problems) - len(shown)} more")
    raise VerifyFailed(
        "the bundle is not what it says it is",
        where=str(path),
        why="\n         ".join(shown),
        remedy="copy it again from where it came from, or compile the model again; do not use it as it is",
    )
