"""The device runner comparing an artifact with itself: how often its 95 % intervals hold the truth, 1.0.

Each comparison is a process of its own: `device_runner.py benchmark`, the bundle against the same bundle. A
good interval holds 1.0 in about 95 of 100; of 40 in 36 to 40, for fewer would come by chance in 5 of 100
only. And it is narrow enough to be of use: a median half-width of at most 2 %.

Every comparison is a line of --record; a run that was interrupted goes on there.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from edgepress.benchmarks.compiling import compile_bundle
from edgepress.benchmarks.float_chain import model_of_about
from edgepress.benchmarks.places import add_workdir
from edgepress.benchmarks.report import Report, parser
from edgepress.runtimes import device_runner as runner

ASKED_HALF_WIDTH = 0.02
_CHANCE = 0.05


def made_bundle(workdir: Path, milliseconds: float) -> Path:
    """A bundle of a made-up float model of about so many milliseconds; the one of an earlier run stays."""
    folder = workdir / f"self-comparison-{milliseconds:g}ms"
    bundle = folder / "bundle"
    if not (bundle / runner.SUMS_NAME).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        model_of_about(folder / "model.onnx", milliseconds)
        words = ("--precision", "fp32", "--measure-seconds", "0", "--data-free")
        compile_bundle(folder / "model.onnx", bundle, "host", *words)
    return bundle


def compare_once(bundle: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One comparison in a fresh process: the ratio with its interval, the pairs, and both medians."""
    with tempfile.TemporaryDirectory(prefix="edgepress-self-") as folder:
        out = Path(folder) / "result.json"
        words = [sys.executable, str(Path(runner.__file__)), "benchmark", "--bundle", str(bundle)]
        words += ["--baseline", str(bundle), "--cold-starts", "0", "--energy-seconds", "0"]
        words += ["--pairs", str(options.pairs), "--runs", str(options.runs), "--out", str(out)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if not out.is_file():
            raise SystemExit(f"the device runner ended with {done.returncode}:\n{done.stderr}")
        result = json.loads(out.read_text(encoding="utf-8"))
    if result["benchmark"] is None:
        raise SystemExit(f"nothing was timed: {result['error']}")
    latency = result["benchmark"]["latency"]
    return {
        "started": result["started"],
        "void": result["void"],
        "load_1min": result["device"]["load_1min"],
        **result["benchmark"]["comparisons"]["baseline"],
        "p50_ms": {name: item["p50_ms"] for name, item in latency.items()},
        "runs": latency["bundle"]["runs"],
    }


def method_digest() -> str:
    """What stands for the way of measuring: comparisons made in another way are not counted together."""
    parts: tuple[Any, ...] = (runner.pair_ratio, runner.balanced_interval, runner.Plan)
    parts += (runner.time_entries, runner.warm_up, runner.timed_runs)
    text = "".join(map(inspect.getsource, parts)) + str(runner._PROCESS_SPREAD)
    return hashlib.sha256(text.encode()).hexdigest()


def recorded(path: Path, key: str) -> list[dict[str, Any]]:
    """The comparisons of a record that were made of the same thing in the same way."""
    if not path.is_file():
        return []
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [line for line in lines if line["key"] == key]


def least_hits(count: int) -> int:
    """The least number of intervals of `count` that hold the truth, but for a chance of 5 in 100."""
    hits = 0
    while runner.binomial_cdf(hits, count, 0.95) <= _CHANCE:
        hits += 1
    return hits


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """What the comparisons say of the intervals and of the noise."""
    medians = [line["p50_ms"]["bundle"] for line in found]
    both = [value for line in found for value in line["p50_ms"].values()]
    return {
        "comparisons": len(found),
        "intervals_with_1": sum(line["low"] <= 1.0 <= line["high"] for line in found),
        "asked": [least_hits(len(found)), len(found)],
        "median_half_width": statistics.median(
            (line["high"] - line["low"]) / 2 / line["ratio"] for line in found
        ),
        "largest_deviation": max(abs(line["ratio"] - 1) for line in found),
        "p50_ms": {"median": statistics.median(both), "low": min(both), "high": max(both)},
        "p50_spread": statistics.stdev(medians) / statistics.fmean(medians) if len(medians) > 1 else None,
        "void": sum(line["void"] for line in found),
    }


def main() -> int:
    """Compare, record and sum up; 1 if the intervals are not as good as asked."""
    options_of = parser(__doc__)
    options_of.add_argument("bundle", nargs="?", type=Path, help="default: a made-up float model")
    options_of.add_argument("--milliseconds", type=float, default=5.0, help="of that model (default: 5)")
    options_of.add_argument("--repeats", type=int, default=40, help="comparisons in all (default: 40)")
    options_of.add_argument("--pairs", type=int, default=8, help="of each comparison (default: 8)")
    options_of.add_argument("--runs", type=int, default=30, help="of each session, at least (default: 30)")
    options_of.add_argument("--record", type=Path, help="JSON lines to go on with (default: in the workdir)")
    add_workdir(options_of)
    options = options_of.parse_args()
    report = Report("self_comparison", options)
    bundle = options.bundle or made_bundle(options.workdir, options.milliseconds)
    record = options.record or options.workdir / "self-comparison.jsonl"
    record.parent.mkdir(parents=True, exist_ok=True)
    digest = runner.file_digest(bundle / runner.SUMS_NAME)
    key = f"{digest[:16]} {method_digest()[:16]} {options.pairs}x{options.runs}"
    found = recorded(record, key)
    while len(found) < options.repeats:
        started = time.monotonic()
        line = {"key": key, **compare_once(bundle, options)}
        with record.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        found.append(line)
        report.progress(
            f"{len(found)} of {options.repeats}: {line['ratio']:.4f} [{line['low']:.4f}, {line['high']:.4f}] "
            f"in {time.monotonic() - started:.0f} s"
        )
    figures = summary(found[: options.repeats])
    report.add("self_comparison", figures)
    return _told(report, figures)


def _told(report: Report, figures: dict[str, Any]) -> int:
    hits, (least, count) = figures["intervals_with_1"], figures["asked"]
    half = figures["median_half_width"]
    noise = figures["p50_spread"]
    rows = [
        ("95 % intervals that hold 1.0", f"{hits} of {count}", f"{least} to {count}"),
        ("median half-width", f"{100 * half:.2f} %", f"at most {100 * ASKED_HALF_WIDTH:g} %"),
        ("largest deviation of a ratio", f"{100 * figures['largest_deviation']:.2f} %", ""),
        ("median latency", f"{figures['p50_ms']['median']:.3f} ms", ""),
        ("… of a run, lowest to highest", "{low:.3f} to {high:.3f} ms".format(**figures["p50_ms"]), ""),
        ("noise: spread of p50 from run to run", "" if noise is None else f"{100 * noise:.2f} %", ""),
        ("runs that are void", str(figures["void"]), ""),
    ]
    report.table("an artifact against itself, fresh processes", ("", "found", "asked"), rows)
    report.close()
    met = least <= hits and half <= ASKED_HALF_WIDTH
    report.text(f"\nasked: {'met' if met else 'NOT met'}")
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
