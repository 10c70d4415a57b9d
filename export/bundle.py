"""Write a bundle: one folder with the model and all that is needed to run, check and remake it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import BinaryIO

from .. import runtimes
from ..compress.plan import Plan
from ..compress.recipe import Recipe, to_toml
from ..graph.errors import InternalError, OutputError
from .checksums import RUNS_NAME, SUMS_NAME, format_sums, is_safe_name
from .environment import GOLDEN_RUN
from .golden import GoldenSet
from .manifest import Manifest, encode_manifest, to_json
from .place import check_output, staged, sync_folder
from .programs import programs
from .readme import bundle_readme
from .runs import append_run

__all__ = ["BundleContents", "append_run", "check_output", "write_bundle"]

RUNNER_NAME = "device_runner.py"
# Hugging Face writes where a model was loaded from into its small JSON files.
_PATH_KEYS = frozenset({"_name_or_path", "name_or_path", "special_tokens_map_file", "tokenizer_file"})
_LOOKS_LIKE_PATH = re.compile(r"[/~\\]|[A-Za-z]:[\\/]|\.{1,2}[\\/]")
_CONFIG_LIMIT_BYTES = 4 << 20
_COPY_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class BundleContents:
    """What goes into a bundle.

    Attributes:
        manifest: with `golden` and `assets` that fit the two fields below.
        model_files: model.onnx and, for large models, model.onnx.data, as `save_model` wrote them
            and as they were measured; they are copied byte by byte.
        recipe: what was asked for, with the pins that replay it.
        plan: what was decided.
        drift: the drift report, any serialisable value; None if it was skipped.
        golden: the golden samples; None if they were skipped.
        assets: tokenizer and preprocessor files by their name below assets/: a file, or its bytes.
    """

    manifest: Manifest
    model_files: tuple[Path, ...]
    recipe: Recipe
    plan: Plan
    drift: object | None = None
    golden: GoldenSet | None = None
    assets: Mapping[str, Path | bytes] = dataclasses.field(default_factory=dict)


def write_bundle(contents: BundleContents, out: Path, *, overwrite: bool) -> Path:
    """Write a bundle to `out`, whole or not at all; returns its real path.

    Equal contents give equal bytes. Everything is made in a hidden folder beside `out` and moved
    in place at the end; with `overwrite` the old bundle stays until then.

    Raises:
        OutputError: if `out` cannot be written, exists (without `overwrite`), is something else
            than a bundle or an empty folder (with it), or the disk is full. Nothing is left behind.
        InternalError: if the manifest does not fit the contents.
    """
    _require_consistent(contents)
    place = check_output(out, overwrite)
    files: dict[str, Path | bytes] = {path.name: path for path in contents.model_files}
    files |= _small_files(contents)
    files["README.md"] = bundle_readme(contents.manifest, files).encode()
    with staged(place, overwrite=overwrite) as folder:
        digests = {name: _write(folder / name, source) for name, source in sorted(files.items())}
        _write(folder / SUMS_NAME, format_sums(digests))
        (folder / RUNS_NAME).mkdir()
        if contents.golden is not None:
            append_run(folder, GOLDEN_RUN, {"environment": contents.golden.environment})
        for inside in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
            sync_folder(inside)
    return place


def _small_files(contents: BundleContents) -> dict[str, Path | bytes]:
    files: dict[str, Path | bytes] = {
        "manifest.json": encode_manifest(contents.manifest),
        "recipe.toml": to_toml(contents.recipe).encode(),
        "plan.json": to_json(contents.plan),
    }
    if contents.drift is not None:
        files["drift.json"] = to_json(contents.drift)
    if contents.golden is not None:
        files |= contents.golden.files()
    for name, source in contents.assets.items():
        files[f"assets/{name}"] = _without_paths(source) if name.endswith(".json") else source
    files |= programs(contents.manifest)
    files[RUNNER_NAME] = resources.files(runtimes).joinpath(RUNNER_NAME).read_bytes()
    return files


def _without_paths(source: Path | bytes) -> Path | bytes:
    """A JSON asset without the entries that say where on the machine it was loaded from."""
    if isinstance(source, Path):
        with _opened(source) as stream:
            data = stream.read(_CONFIG_LIMIT_BYTES + 1)
        if len(data) > _CONFIG_LIMIT_BYTES:
            return source  # a vocabulary, not a configuration
    else:
        data = source
    try:
        values = json.loads(data)
    except ValueError:
        return data
    if not isinstance(values, dict):
        return data
    local = [
        key
        for key in _PATH_KEYS & set(values)
        if isinstance(values[key], str) and _LOOKS_LIKE_PATH.match(values[key])
    ]
    if not local:
        return data
    kept = {key: value for key, value in values.items() if key not in local}
    return json.dumps(kept, indent=2, ensure_ascii=False).encode() + b"\n"


def _write(target: Path, source: Path | bytes) -> str:
    """Write or copy a file durably; returns the SHA-256 of what was written."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with target.open("xb") as file:
        if isinstance(source, bytes):
            digest.update(source)
            file.write(source)
        else:
            _copy(source, file, digest)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _copy(source: Path, file: BinaryIO, digest: hashlib._Hash) -> None:
    with _opened(source) as stream:
        while block := stream.read(_COPY_BYTES):
            digest.update(block)
            file.write(block)


def _opened(source: Path) -> BinaryIO:
    try:
        return source.open("rb")
    except OSError as error:
        raise OutputError(
            "a file that belongs into the bundle cannot be read",
            where=str(source),
            why=error.strerror,
            remedy="leave the model's files alone while edgepress compiles",
        ) from error


def _require_consistent(contents: BundleContents) -> None:
    manifest = contents.manifest
    claims: list[tuple[str, object, object]] = [
        ("model files", manifest.model.files, tuple(path.name for path in contents.model_files)),
        ("golden record", manifest.golden, contents.golden.record if contents.golden else None),
        ("assets", manifest.assets, tuple(sorted(contents.assets))),
    ]
    for what, said, given in claims:
        if said != given:
            raise InternalError(f"the manifest's {what} do not fit the bundle", why=f"{said} against {given}")
    unsafe = [name for name in contents.assets if not is_safe_name(name)]
    if unsafe:
        raise InternalError(f"{unsafe[0]!r} is no name for a file below assets/")
