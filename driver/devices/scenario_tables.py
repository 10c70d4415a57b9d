"""What the device runner measured beside plain latency, as tables: intervals, sweeps, energy, scenarios."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..output import Table, format_bytes
from ..timing_tables import INTERVALS_TITLE, PERCENTILES, format_interval, format_known_ms

Result = Mapping[str, Any]
Named = tuple[str, str, Result]
Row = tuple[str, ...]
_HEAD = ("device", "bundle")


def further_tables(results: Sequence[Named]) -> list[Table]:
    """The tables that have any row.

    Args:
        results: device, bundle, and what the device runner wrote, as benchmark.schema.json describes it.
    """
    shown = tuple(label for _, label in PERCENTILES)
    found = (
        _table(results, _interval_rows, ("timed", *shown), shown, INTERVALS_TITLE),
        _table(results, _speed_rows, ("compared with", "speed (95 % interval)"), (), "speed of the bundle"),
        _table(
            results,
            _cold_rows,
            _COLD_COLUMNS,
            _COLD_COLUMNS,
            "cold start: from a process to its first result",
        ),
        _table(
            results, _sweep_rows, ("timed", "p50", "p90", "samples/s"), ("p50", "p90", "samples/s"), "sweeps"
        ),
        _table(results, _energy_rows, ("meter", *_ENERGY_COLUMNS), _ENERGY_COLUMNS, "energy"),
        _table(results, _scenario_rows, _SCENARIO_COLUMNS, _SCENARIO_COLUMNS[2:5], "MLPerf scenarios"),
    )
    return [table for table in found if table.rows]


_COLD_COLUMNS = ("cold start", "imports", "load", "first run", "peak memory")
_ENERGY_COLUMNS = ("J per inference", "above idle", "W", "idle W")
_SCENARIO_COLUMNS = ("scenario", "percentile", "latency", "early stopping", "samples/s", "valid", "by")


def _table(
    results: Sequence[Named], rows: Any, columns: Sequence[str], numeric: Sequence[str], title: str
) -> Table:
    found = tuple((device, bundle, *row) for device, bundle, result in results for row in rows(result))
    return Table(columns=(*_HEAD, *columns), rows=found, numeric=frozenset(numeric), title=title)


def _benchmark(result: Result) -> Mapping[str, Any]:
    return result.get("benchmark") or {}


def _interval_rows(result: Result) -> Iterator[Row]:
    for name, item in (_benchmark(result).get("latency") or {}).items():
        bounds = item.get("intervals_ms") or {}
        yield (name, *(format_interval(bounds.get(key)) for key, _ in PERCENTILES))


def _speed_rows(result: Result) -> Iterator[Row]:
    for name, item in (_benchmark(result).get("comparisons") or {}).items():
        spread = "" if item["low"] is None else f" ({item['low']:.3f} to {item['high']:.3f})"
        yield name, f"{item['ratio']:.3f}x{spread}"


def _cold_rows(result: Result) -> Iterator[Row]:
    cold = _benchmark(result).get("cold_start")
    if cold:
        peak = cold.get("peak_memory_bytes")
        times = (
            format_known_ms(cold.get(f"{key}_ms")) for key in ("cold_start", "import", "load", "first_run")
        )
        yield (*times, "" if peak is None else format_bytes(peak))


def _sweep_rows(result: Result) -> Iterator[Row]:
    found = _benchmark(result)
    for kind, key in (("batch", "batch"), ("threads", "threads"), ("affinity", "cores")):
        for item in found.get(f"{kind.removesuffix('s')}_sweep") or ():
            value = item[kind]
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            latency = item["latency"]
            yield (
                f"{key} {text}",
                format_known_ms(latency["p50_ms"]),
                format_known_ms(latency["p90_ms"]),
                _per_s(latency),
            )


def _energy_rows(result: Result) -> Iterator[Row]:
    for item in _benchmark(result).get("energy") or ():
        if item.get("joules_per_inference") is None:
            yield item["meter"], item.get("why", "not measured"), "", "", ""
            continue
        keys = ("joules_per_inference", "joules_per_inference_above_idle", "watts", "idle_watts")
        yield (item["meter"], *("" if item.get(key) is None else f"{item[key]:.4g}" for key in keys))


def _scenario_rows(result: Result) -> Iterator[Row]:
    for item in result.get("scenarios") or ():
        by = (
            f"LoadGen {item.get('loadgen_version') or ''}".strip()
            if item["official"]
            else "light implementation"
        )
        valid = "yes" if item["valid"] else ", ".join(["no", *item.get("unmet", ())])
        if item["scenario"] == "Offline":
            yield "Offline", "", "", "", _per_s(item), valid, by
            continue
        estimate = format_known_ms((item.get("early_stopping") or {}).get("estimate_ms"))
        percentile = f"p{100 * item['percentile']:g}" if item.get("percentile") else ""
        reached = format_known_ms(item.get("percentile_ms"))
        yield item["scenario"], percentile, reached, estimate, "", valid, by


def _per_s(item: Result) -> str:
    value = item.get("throughput_per_s")
    return "" if value is None else f"{value:.1f}"
