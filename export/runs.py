"""Measurements made with a bundle: runs/*.json, beside its sums, each bound to the bundle's digest."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from ..graph.errors import InternalError, ModelError
from .checksums import RUNS_NAME, SUMS_NAME, bundle_digest
from .manifest import to_json
from .place import disk_errors

_RUN_STEM = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class RunRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One measurement made with a bundle: runs/*.json.

    `bundle` is the digest of the bundle measured; `sha256` covers the record without that field.
    """

    schema_version: int = 1
    name: str
    bundle: str
    payload: dict[str, Any]
    sha256: str = ""


def append_run(bundle: Path, name: str, payload: Mapping[str, Any]) -> Path:
    """Add a measurement to a bundle's runs/, bound to the bundle's digest; returns the new file.

    Earlier runs of that name stay: the file is NAME.json, NAME-2.json, ….

    Args:
        bundle: the bundle's folder.
        name: letters, digits, dots, dashes and underscores ("benchmark").
        payload: what was measured, how and where; plain JSON values.

    Raises:
        ModelError: if the folder is not a bundle.
        OutputError: if the record cannot be written.
        InternalError: if `name` is not such a name.
    """
    if not _RUN_STEM.fullmatch(name):
        raise InternalError(f"{name!r} is not a name for a run")
    try:
        digest = bundle_digest(bundle)
    except OSError as error:
        raise ModelError(
            "not an edgepress bundle",
            where=str(bundle),
            why=f"it has no readable {SUMS_NAME}",
            remedy="name a folder that `edgepress compile … -o` wrote",
        ) from error
    data = encode_run(RunRecord(name=name, bundle=digest, payload=dict(payload)))
    runs = bundle / RUNS_NAME
    with disk_errors(runs):
        runs.mkdir(exist_ok=True)
        number = 1
        while True:
            path = runs / (f"{name}.json" if number == 1 else f"{name}-{number}.json")
            try:
                file = path.open("xb")
                break
            except FileExistsError:
                number += 1
        try:
            with file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            path.unlink()
            raise
    return path


def encode_run(record: RunRecord) -> bytes:
    """The record as JSON, with its own digest filled in."""
    bare = msgspec.structs.replace(record, sha256="")
    digest = hashlib.sha256(to_json(bare)).hexdigest()
    return to_json(msgspec.structs.replace(record, sha256=digest))


def _order(path: Path) -> tuple[str, int, str]:
    """benchmark.json before benchmark-2.json, and that before benchmark-10.json."""
    name, _, number = path.stem.rpartition("-")
    return (name, int(number), "") if name and number.isdecimal() else (path.stem, 1, path.name)


def read_runs(bundle: Path) -> tuple[dict[str, RunRecord], list[str]]:
    """The records of runs/ by file name, and what is wrong with the others, one line each.

    Those of one name come in the order they were written in.
    """
    found, problems = {}, []
    digest = bundle_digest(bundle)
    for path in sorted((bundle / RUNS_NAME).glob("*.json"), key=_order):
        name = f"{RUNS_NAME}/{path.name}"
        try:
            data = path.read_bytes()
            record = msgspec.json.decode(data, type=RunRecord)
        except OSError as error:
            problems.append(f"{name}: {error.strerror or 'cannot be read'}")
            continue
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            problems.append(f"{name}: not a record of a run ({error})")
            continue
        if encode_run(record) != data:
            problems.append(f"{name}: contents have changed (SHA-256 differs)")
        elif record.bundle != digest:
            problems.append(f"{name}: was measured with another bundle")
        else:
            found[path.name] = record
    return found, problems
