"""From the document of a run, in any of the forms that edgepress writes, to rows of the history."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from ...export.checksums import bundle_digest
from ...export.verify import read_manifest
from ...graph.errors import DataError, EdgepressError
from ...runtimes.device_runner import FORMAT as DEVICE_FORMAT
from .rows import Measurement, RecordedRun, run_id

Document = dict[str, Any]
VERIFY_FORMAT = "edgepress-verify"
EXPORT_FORMAT = "edgepress-history"
# Keys that a command's answer adds to the document that was kept.
ANSWER_KEYS = ("run", "comparison", "gates")
_QUANTILES = ("p50", "p90", "p99", "p99_9")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BundleFacts:
    """What a row says of the bundle that was measured."""

    digest: str | None = None
    path: str | None = None
    model: str | None = None
    target: str | None = None
    file_bytes: int | None = None
    drift_cosine: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Where a document comes from: what it does not say itself.

    Attributes:
        where: for errors.
        bundle: the bundle in whose runs/ it lies, or that was named.
        device, url: of the device, as the command had them.
        started: when, UTC, for documents that carry no time: a file's own.
    """

    where: str
    bundle: BundleFacts = BundleFacts()
    device: str | None = None
    url: str | None = None
    started: str = "1970-01-01T00:00:00Z"


def bundle_facts(path: Path) -> BundleFacts:
    """Digest, model, target, size and drift of a bundle's folder; the digest is None where it has no sums.

    Raises:
        ModelError: if it is no bundle.
    """
    manifest = read_manifest(path)
    digest = None
    with contextlib.suppress(OSError):
        digest = bundle_digest(path)
    files = [path / name for name in manifest.model.files]
    return BundleFacts(
        digest=digest,
        path=str(path.resolve()).encode("utf-8", "backslashreplace").decode(),
        model=manifest.model.name,
        target=manifest.target.name,
        file_bytes=sum(file.stat().st_size for file in files if file.is_file()),
        drift_cosine=_drift(path / "drift.json"),
    )


def _drift(path: Path) -> float | None:
    try:
        cosine = msgspec.json.decode(path.read_bytes(), type=dict[str, Any]).get("cosine")
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return None  # skipped, or damaged: verify says so
    return _number(cosine)


def read_document(document: object, source: Source) -> list[RecordedRun]:
    """The runs that a JSON document holds: mostly one, several of a fleet's answer or of an export.

    Raises:
        DataError: if it is none of the forms that edgepress writes.
    """
    if not isinstance(document, dict):
        raise _unknown(source, "it is no JSON object")
    try:
        if document.get("format") == EXPORT_FORMAT:
            return [_exported(item) for item in document["runs"]]
        if "payload" in document and "sha256" in document:
            return read_document(document["payload"], source)
        if isinstance(document.get("devices"), list):
            return list(_fleet(document["devices"], source))
        kept = {key: value for key, value in document.items() if key not in ANSWER_KEYS}
        for fits, rows in _FORMS:
            if fits(kept):
                return [recorded(kept, rows, source)]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise _unknown(source, f"{type(error).__name__}: {error}") from error
    raise _unknown(source, "it has none of the keys of a benchmark, a device run or a history")


def _unknown(source: Source, why: str) -> DataError:
    return DataError(
        "this is not the result of a run",
        where=source.where,
        why=why,
        remedy="name what `edgepress benchmark --json`, device_runner.py --out or `edgepress history export` "
        "wrote",
    )


Rows = Callable[[Document, Source], Iterator[dict[str, Any]]]


def recorded(document: Mapping[str, Any], rows: Rows, source: Source) -> RecordedRun:
    """One run: the document as plain JSON, its id, and its rows.

    Raises:
        ValueError: if a value has another type than it should.
    """
    plain: Document = msgspec.json.decode(msgspec.json.encode(document))
    identity = run_id(plain)
    found = [{"run": identity, **row} for row in rows(plain, source)]
    return RecordedRun(id=identity, document=plain, measurements=_checked(_told_apart(found)))


def _told_apart(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with a name of its own for each: a sweep may time one thing twice."""
    names: set[str] = set()
    found = []
    for row in rows:
        name, number = row["thing"], 1
        while name in names:
            number += 1
            name = f"{row['thing']} ({number})"
        names.add(name)
        found.append({**row, "thing": name})
    return found


def _checked(rows: list[dict[str, Any]]) -> tuple[Measurement, ...]:
    """Rows of the right types, with whole numbers that SQLite can hold.

    Raises:
        ValueError: if a value has another type, or is out of range.
    """
    for row in rows:
        if any(isinstance(value, int) and abs(value) >= 1 << 63 for value in row.values()):
            raise ValueError("a whole number is too large")
    return tuple(msgspec.convert(row, Measurement) for row in rows)


def _exported(item: Mapping[str, Any]) -> RecordedRun:
    document = item["document"]
    identity = run_id(document)
    measurements = _checked(item["measurements"])
    if any(row.run != identity for row in measurements):
        raise ValueError("a run's document is not the one that its rows were read from")
    if len({row.thing for row in measurements}) < len(measurements):
        raise ValueError("two rows of a run have one name")
    return RecordedRun(id=identity, document=dict(document), measurements=measurements)


def _fleet(devices: list[Any], source: Source) -> Iterator[RecordedRun]:
    for device in devices:
        for item in device["results"]:
            facts = source.bundle
            path = Path(str(item["bundle"]))
            if facts.digest is None and (path / "manifest.json").is_file():
                facts = _facts_if_same(path, item["result"])
            own = dataclasses.replace(source, device=device["name"], url=device["url"], bundle=facts)
            yield from read_document(item["result"], own)


def _facts_if_same(path: Path, result: Mapping[str, Any]) -> BundleFacts:
    """Those of the folder, unless another bundle lies there by now."""
    try:
        facts = bundle_facts(path)
    except (EdgepressError, OSError):
        return BundleFacts()
    return facts if facts.digest == result["bundle"]["digest"] else BundleFacts()


# --------------------------------------------------------------------------------- the device runner


def device_rows(document: Document, source: Source) -> Iterator[dict[str, Any]]:
    """Rows of the device runner's result (docs/benchmark.schema.json)."""
    found, bundle = document["benchmark"] or {}, document["bundle"]
    outputs, board = document["outputs"] or {}, document["device"]
    facts = source.bundle if source.bundle.digest in (None, bundle["digest"]) else BundleFacts()
    common = {
        "kind": "benchmark" if found or document["scenarios"] else "verify",
        "started": document["started"],
        "device": source.device or board["board"] or board["cpu"]["name"] or "unknown",
        "url": source.url,
        "board": board["board"],
        "cpu": board["cpu"]["name"] or None,
        "emulated": document["emulated"],
        "runtime": _runtime(document["runtime"]),
        "threads": found.get("threads"),
        "shapes": _shapes(found.get("shapes")),
        "model": bundle["model"] or facts.model,
        "target": bundle["target"] or facts.target,
        "outputs_ok": outputs.get("within_tolerance"),
        "max_abs_diff": _number(outputs.get("max_abs_diff")),
        "void": document["void"],
        "void_reasons": document["void_reasons"],
    }
    cold = found.get("cold_start") or {}
    own = {
        "bundle_digest": bundle["digest"],
        "bundle_path": facts.path,
        "file_bytes": found.get("file_bytes", facts.file_bytes),
        "drift_cosine": facts.drift_cosine,
        "cold_start_ms": _number(cold.get("cold_start_ms")),
        "peak_memory_bytes": cold.get("peak_memory_bytes"),
        "joules_per_inference": _energy(found.get("energy")),
        "instructions": _number((document["instructions"] or {}).get("total")),
    }
    starts = {"cold_start": cold["each_ms"]} if cold.get("each_ms") else {}
    latency = found.get("latency") or {}
    counts = found.get("instructions") or {}
    for name in dict.fromkeys(["bundle", *latency, *counts]):
        timed = _latency(latency[name], starts if name == "bundle" else None) if name in latency else {}
        if name == "bundle":
            yield {**common, **own, **timed, "thing": name, "role": name}
        else:
            count = _number((counts.get(name) or {}).get("total"))
            other = {"target": None, "outputs_ok": None, "max_abs_diff": None, "instructions": count}
            yield {**common, **timed, **other, "thing": name, "role": name}
    named = {key: own[key] for key in ("bundle_digest", "bundle_path", "file_bytes", "drift_cosine")}
    for name, item, conditions in _swept(found, document["scenarios"]):
        yield {**common, **named, **_latency(item), **conditions, "thing": name, "role": name}


def _swept(
    found: Mapping[str, Any], scenarios: list[dict[str, Any]]
) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Name, latency and own conditions of every point of a sweep, and of every scenario."""
    for item in found.get("batch_sweep") or ():
        yield f"batch {item['batch']}", item["latency"], {"shapes": None}
    for item in found.get("thread_sweep") or ():
        yield f"{item['threads']} threads", item["latency"], {"threads": item["threads"]}
    for item in found.get("affinity_sweep") or ():
        yield f"cores {','.join(map(str, item['affinity']))}", item["latency"], {}
    for item in scenarios:
        yield item["scenario"], item.get("latency") or {}, {}


def _runtime(runtime: Mapping[str, Any] | None) -> str | None:
    return f"{runtime['name']} {runtime['version']}" if runtime and runtime.get("version") else None


def _shapes(shapes: Mapping[str, list[int]] | None) -> str | None:
    if not shapes:
        return None
    return ", ".join(f"{name}:{'x'.join(map(str, shapes[name]))}" for name in sorted(shapes))


def _energy(meters: list[dict[str, Any]] | None) -> float | None:
    """The first meter's: the runner puts the one that covers the most first."""
    return next((_number(meter["joules_per_inference"]) for meter in meters or ()), None)


def _latency(item: Mapping[str, Any], more: Mapping[str, list[float]] | None = None) -> dict[str, Any]:
    """The figures of a latency, of the device runner's or of `Timing`, as fields of a row."""
    found: dict[str, Any] = {
        name: item.get(name) for name in ("runs", "mean_ms", "min_ms", "throughput_per_s", "load_ms")
    }
    intervals = item.get("intervals_ms") or {}
    for name in _QUANTILES:
        low, high = intervals.get(name) or (None, None)
        found |= {f"{name}_ms": item.get(f"{name}_ms"), f"{name}_low_ms": low, f"{name}_high_ms": high}
    found["sessions_ms"] = {**(item.get("session_ms") or {}), **(more or {})}
    return found


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


# ------------------------------------------------------------------------------------ this machine


def local_rows(document: Document, source: Source) -> Iterator[dict[str, Any]]:
    """Rows of `edgepress benchmark` on this machine; older documents do not say what was measured."""
    environment = document["environment"]
    about = {item["name"]: item for item in document.get("measured") or ()}
    common = {
        "kind": "benchmark",
        "started": document.get("started") or source.started,
        "device": source.device or "local",
        "url": source.url or "local",
        "cpu": environment.get("cpu"),
        "runtime": environment.get("runtime"),
        "threads": document["threads"],
        "shapes": ", ".join(sorted(document["inputs"])) or None,
        "edgepress": document.get("edgepress"),
    }
    timings = document["benchmark"]["timings"]
    for timing in timings:
        said = about.get(timing["name"], {})
        if not about and timing is timings[-1]:
            said = {**_said(source.bundle), "role": "bundle"}
        yield {
            **common,
            **_latency(timing),
            **{key: value for key, value in said.items() if key != "name"},
            "thing": timing["name"],
            "role": said.get("role", "model"),
            "cold_start_ms": timing.get("cold_start_ms"),
            "peak_memory_bytes": timing.get("peak_memory_bytes"),
        }


def _said(facts: BundleFacts) -> dict[str, Any]:
    return {
        "bundle_digest": facts.digest,
        "bundle_path": facts.path,
        "model": facts.model,
        "target": facts.target,
        "file_bytes": facts.file_bytes,
        "drift_cosine": facts.drift_cosine,
    }


def compile_rows(document: Document, source: Source) -> Iterator[dict[str, Any]]:
    """Rows of the timing that a compile puts into a bundle's runs/."""
    for timing in document["timings"]:
        ours = timing["name"].startswith("after")
        yield {
            "kind": "compile",
            "started": source.started,
            "device": document.get("where") or "local",
            "thing": timing["name"],
            "role": "bundle" if timing["name"] == "after" else timing["name"],
            **(_said(source.bundle) if ours else {"model": source.bundle.model}),
            **_latency(timing),
            "peak_memory_bytes": timing.get("peak_memory_bytes"),
        }


def verify_rows(document: Document, source: Source) -> Iterator[dict[str, Any]]:
    """The row of `edgepress verify` on this machine."""
    facts = source.bundle
    yield {
        "kind": "verify",
        "started": document["started"],
        "device": "local",
        "url": "local",
        "thing": "bundle",
        "role": "bundle",
        **_said(facts),
        "bundle_digest": document.get("digest") or facts.digest,
        "outputs_ok": document["verified"] if document.get("golden_samples") != 0 else None,
        "edgepress": document["edgepress"],
    }


_FORMS: tuple[tuple[Callable[[Document], bool], Rows], ...] = (
    (lambda document: document.get("format") == DEVICE_FORMAT, device_rows),
    (lambda document: document.get("format") == VERIFY_FORMAT, verify_rows),
    (lambda document: "timings" in (document.get("benchmark") or {}), local_rows),
    (lambda document: "timings" in document and "comparisons" in document, compile_rows),
)
