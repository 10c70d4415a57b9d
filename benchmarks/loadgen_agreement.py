"""The official LoadGen and the device runner's light implementation, on the same latencies.

LoadGen runs each scenario on a made-up system that takes simulated times to answer, and logs every latency in
its trace. From those very latencies the light implementation computes its percentiles, its early-stopping
estimate and whether the run is valid; both stand beside each other with LoadGen's summary. Needs
`mlcommons-loadgen` (`edgepress[mlperf]`).
"""

from __future__ import annotations

import dataclasses
import importlib
import random
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgepress.benchmarks.report import Report, parser
from edgepress.runtimes import device_runner as runner

# LoadGen gives a rate to six digits.
_RATE_TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One run: a scenario, its plan, and the simulated answering times."""

    title: str
    scenario: str
    plan: runner.ScenarioPlan
    typical_ms: float = 0.3
    spread: float = 0.5


def cases(queries: int) -> tuple[Case, ...]:
    """Runs of all scenarios: enough and too few queries, bounds that hold and that do not."""
    short = runner.ScenarioPlan(seconds=0.01, queries=queries, qps=800.0)
    return (
        Case(title="SingleStream", scenario="SingleStream", plan=short),
        Case(title="SingleStream, few", scenario="SingleStream", plan=dataclasses.replace(short, queries=0)),
        Case(title="MultiStream", scenario="MultiStream", plan=short),
        Case(
            title="Offline", scenario="Offline", plan=dataclasses.replace(short, seconds=0.2), typical_ms=2.0
        ),
        Case(title="Server", scenario="Server", plan=dataclasses.replace(short, bound_ms=50.0)),
        Case(title="Server, tight", scenario="Server", plan=dataclasses.replace(short, bound_ms=1.0)),
    )


def simulated(case: Case, seed: int) -> Callable[[], None]:
    """What answers a query after a log-normal time, some of which are much longer."""
    draw = random.Random(seed)

    def answer() -> None:
        slow = 8.0 if draw.random() < 0.01 else 1.0
        end = time.perf_counter() + 1e-3 * slow * case.typical_ms * draw.lognormvariate(0.0, case.spread)
        while time.perf_counter() < end:
            time.sleep(0)

    return answer


def official(lg: Any, case: Case, seed: int) -> tuple[dict[str, Any], list[int], str]:
    """LoadGen's own result, every query's latency in ns by its trace, and its summary."""
    with tempfile.TemporaryDirectory(prefix="edgepress-agreement-") as folder:
        logs = Path(folder)
        samples = runner.run_loadgen(
            lg,
            case.scenario,
            simulated(case, seed),
            case.plan,
            logs,
            query_ns=round(case.typical_ms * 1e6),
            trace=True,
        )
        texts = {
            name: (logs / f"mlperf_log_{name}").read_text(encoding="utf-8")
            for name in ("summary.txt", "detail.txt", "trace.json")
        }
    latencies: dict[str, int] = {}
    for line in texts["trace.json"].splitlines():
        match = re.search(r'"query_seq":(\d+).*"complete_ns":(\d+)', line)
        if match:
            # A query is done when its last sample is.
            latencies[match[1]] = max(latencies.get(match[1], 0), int(match[2]))
    found = runner.parse_loadgen(texts["summary.txt"], texts["detail.txt"], samples)
    return found, list(latencies.values()), texts["summary.txt"]


def light(case: Case, latencies_ns: list[int], samples: int) -> dict[str, Any]:
    """What the light implementation makes of the same latencies."""
    if case.scenario == "Server":
        return runner.server_result(latencies_ns, case.plan, len(latencies_ns))
    if case.scenario == "Offline":
        rate = samples / (max(latencies_ns) / 1e9)
        return {"throughput_per_s": rate, "valid": max(latencies_ns) / 1e9 >= case.plan.seconds}
    return runner.stream_result(case.scenario, latencies_ns)


def compared(ours: dict[str, Any], theirs: dict[str, Any]) -> list[tuple[str, Any, Any, bool]]:
    """(figure, light, LoadGen, whether they agree) of everything that both give."""
    rows = [("valid", ours["valid"], theirs["valid"], ours["valid"] == theirs["valid"])]
    if "throughput_per_s" in theirs:
        mine, other = ours["throughput_per_s"], theirs["throughput_per_s"]
        return [*rows, ("samples/s", mine, other, abs(mine / other - 1) <= _RATE_TOLERANCE)]
    pairs = [("percentile", ours["percentile_ms"], theirs["percentile_ms"])]
    for name, _ in runner.QUANTILES:
        pairs.append((name, ours["latency"][f"{name}_ms"], theirs["latency"][f"{name}_ms"]))
    for name, value in theirs["early_stopping"].items():
        if value is not None:
            pairs.append((f"early stopping: {name}", ours["early_stopping"].get(name), value))
    return rows + [(name, mine, other, mine == other) for name, mine, other in pairs]


def main() -> int:
    """Run, compare and print; 1 if anything differs."""
    options_of = parser(__doc__)
    options_of.add_argument("--queries", type=int, default=1500, help="of each scenario (default: 1500)")
    options_of.add_argument("--seed", type=int, default=0, help="of the simulated latencies (default: 0)")
    options = options_of.parse_args()
    try:
        lg = importlib.import_module(runner.LOADGEN_MODULE)
    except ModuleNotFoundError:
        raise SystemExit(f"LoadGen is not installed: pip install {runner.LOADGEN_PACKAGE}") from None
    report = Report("loadgen_agreement", options)
    rows, figures, differ = [], [], 0
    for case in cases(options.queries):
        report.progress(case.title)
        theirs, latencies, summary = official(lg, case, options.seed)
        samples = theirs.get("samples", len(latencies))
        for name, mine, other, same in compared(light(case, latencies, samples), theirs):
            differ += not same
            rows.append((case.title, name, _shown(mine), _shown(other), "yes" if same else "NO"))
            figures.append(
                {"case": case.title, "figure": name, "light": mine, "loadgen": other, "same": same}
            )
        if differ:
            report.progress(summary)
    report.add("agreement", figures)
    title = f"LoadGen {theirs['loadgen_version']} and the light implementation on the same latencies (ms)"
    report.table(title, ("scenario", "figure", "light", "LoadGen", "same"), rows)
    report.close()
    report.text(f"\n{len(rows)} figures, {differ} differ")
    return 1 if differ else 0


def _shown(value: Any) -> str:
    return f"{value:.6f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    raise SystemExit(main())
