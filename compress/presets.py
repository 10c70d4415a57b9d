"""What `--preset` stands for: how much data is looked at, and how long is searched and timed.

A preset says nothing about what may be done to the model. It is resolved into the recipe's own fields,
so that a recipe file shows what was meant and stays the same when a preset changes.
"""

from __future__ import annotations

from collections.abc import Mapping

PRESETS: Mapping[str, Mapping[str, int | None]] = {
    "quick": {
        "samples": 128,
        "eval_samples": 128,
        "ranking_samples": 32,
        "benchmark_rounds": 2,
        "measure_seconds": 3,
    },
    "default": {
        "samples": None,
        "eval_samples": None,
        "ranking_samples": 128,
        "benchmark_rounds": 5,
        "measure_seconds": 10,
    },
    "extensive": {
        "samples": None,
        "eval_samples": None,
        "ranking_samples": 512,
        "benchmark_rounds": 15,
        "measure_seconds": 60,
    },
}


def preset_line(name: str) -> str:
    """One preset in words, for --help."""
    fields = PRESETS[name]

    def data(field: str) -> str:
        return "all" if fields[field] is None else f"at most {fields[field]}"

    return (
        f"{name}: {data('samples')} samples to calibrate on, {data('eval_samples')} to measure drift on, "
        f"{fields['ranking_samples']} to rank layers on, {fields['benchmark_rounds']} rounds of timing, "
        f"{fields['measure_seconds']} s of timing operators"
    )
