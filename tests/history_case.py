"""Runs and results of devices for the tests of the history, made up."""

from edgepress.driver.history.rows import Measurement, RecordedRun, run_id

LATENCY = {
    "runs": 100, "sessions": 2, "warm_up_runs": 10, "mean_ms": 10.5, "min_ms": 9.0, "max_ms": 14.0,
    "p50_ms": 10.0, "p90_ms": 12.0, "p99_ms": 13.0, "p99_9_ms": None,
    "intervals_ms": {"p50": [9.9, 10.1], "p90": [11.5, 12.5], "p99": [12.1, None], "p99_9": [None, None]},
    "load_ms": 5.0, "throughput_per_s": 95.2,
    "session_ms": {"p50": [9.9, 10.1], "load": [4.0, 6.0]},
}  # fmt: skip


def device_document(digest=None, **changes):
    """A device runner's result as docs/benchmark.schema.json describes it."""
    board = {
        "board": "Raspberry Pi 5 Model B", "cpu": {"machine": "aarch64", "name": "Cortex-A76"},
    }  # fmt: skip
    benchmark = {
        "threads": 4, "provider": "CPUExecutionProvider", "inputs": "golden", "batch": 1,
        "shapes": {"b": [1, 3], "a": [1]}, "file_bytes": 1234,
        "latency": {"baseline": {**LATENCY, "p50_ms": 20.0}, "bundle": LATENCY},
        "comparisons": {}, "states": [], "clock": {},
        "cold_start": {
            "import_ms": 90.0, "load_ms": 5.0, "first_run_ms": 12.0, "imports_bytes": 30_000_000,
            "cold_start_ms": 300.0, "peak_memory_bytes": 50_000_000, "processes": 2,
            "each_ms": [290.0, 300.0],
        },
        "batch_sweep": [{"batch": 4, "latency": LATENCY}],
        "thread_sweep": [{"threads": 2, "latency": LATENCY}],
        "affinity_sweep": [{"affinity": [0, 1], "latency": LATENCY}],
        "energy": [{"meter": "pmic", "covers": "rails", "readings": 9, "joules_per_inference": 0.05,
                    "joules_per_inference_above_idle": 0.04, "watts": 5.0, "idle_watts": 3.0}],
    }  # fmt: skip
    return {
        "format": "edgepress-device-run", "schema_version": 1, "commands": ["verify", "benchmark"],
        "started": "2026-01-31T12:00:00Z", "device": board, "emulated": False,
        "bundle": {"model": "net", "target": "raspberry-pi-5", "digest": digest, "problems": []},
        "runtime": {"name": "onnxruntime", "status": "ok", "version": "1.31.1", "known_good": {}},
        "outputs": {"samples": 3, "within_tolerance": True, "max_abs_diff": 0.01,
                    "worst": {}, "problems": []},
        "benchmark": benchmark, "instructions": None,
        "scenarios": [{"scenario": "SingleStream", "valid": True, "official": False, "latency": LATENCY}],
        "void": False, "void_reasons": [], "notes": [], "error": None, "exit_code": 0, **changes,
    }  # fmt: skip


def made(number, **fields):
    """A run with one row."""
    document = {"number": number}
    given_fields = {
        "thing": "bundle",
        "role": "bundle",
        "kind": "benchmark",
        "started": f"2026-01-{number % 28 + 1:02}T00:00:00Z",
        "device": "local",
        **fields,
    }
    identity = run_id(document)
    return RecordedRun(
        id=identity, document=document, measurements=(Measurement(run=identity, **given_fields),)
    )
