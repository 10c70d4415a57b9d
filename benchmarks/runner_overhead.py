"""What the device runner's loop costs beside a bare loop around onnxruntime, on a model of about 5 ms.

Both run the same session in short blocks in alternating order: the bare one calls `session.run` and
`perf_counter_ns` and nothing else, the other is the runner's own loop. Compared are the time that a run takes
all in all (with what the loop does between runs) and the latency that is reported, each by the median ratio
of neighbouring blocks, which share what else the machine does. Beside it stands what the loops cost where a
run does nothing.
"""

from __future__ import annotations

import functools
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from edgepress.benchmarks.float_chain import chain_feeds, model_of_about, open_session
from edgepress.benchmarks.report import Report, parser
from edgepress.runtimes import device_runner as runner

ASKED_FRACTION = 0.01


def bare_block(session: Any, feeds: Any, runs: int) -> tuple[float, float]:
    """(time of a run all in all, median latency) in ns of a loop that only runs and reads the clock."""
    clock, run = time.perf_counter_ns, session.run
    series = []
    started = clock()
    for _ in range(runs):
        before = clock()
        run(None, feeds)
        series.append(clock() - before)
    return (clock() - started) / runs, statistics.median(series)


def runner_block(session: Any, feeds: Any, runs: int) -> tuple[float, float]:
    """The same of the device runner's loop."""
    plan = runner.Plan(pairs=1, runs=runs, least_pair_s=0.0)
    step = functools.partial(session.run, None, feeds)
    started = time.perf_counter_ns()
    series = runner.timed_runs([("model", step)], plan)["model"]
    return (time.perf_counter_ns() - started) / runs, statistics.median(series)


def measure(session: Any, feeds: Any, blocks: int, runs: int) -> tuple[float, float]:
    """The runner's time over the bare loop's in one session: all in all, and as reported."""
    taken: dict[Any, list[tuple[float, float]]] = {bare_block: [], runner_block: []}
    for index in range(blocks):
        order = (bare_block, runner_block) if index % 2 == 0 else (runner_block, bare_block)
        for block in order:
            taken[block].append(block(session, feeds, runs))
    whole, reported = (
        runner.pair_ratio(
            [one[part] for one in taken[runner_block]], [one[part] for one in taken[bare_block]]
        )
        for part in (0, 1)
    )
    return whole, reported


class Idle:
    """A session that does nothing."""

    def run(self, _names: None, _feeds: Any) -> None:
        """Nothing."""


def loop_cost_ns(rounds: int = 30, runs: int = 1000) -> float:
    """What a run costs more in the runner's loop than in the bare one, where the run itself does nothing."""
    pairs = [(runner_block(Idle(), {}, runs)[0], bare_block(Idle(), {}, runs)[0]) for _ in range(rounds)]
    return min(ours for ours, _ in pairs) - min(bare for _, bare in pairs)


def main() -> int:
    """Print the overhead with its interval; 1 if it is above what is asked."""
    options_of = parser(__doc__)
    options_of.add_argument("--milliseconds", type=float, default=5.0, help="of the model (default: 5)")
    options_of.add_argument("--rounds", type=int, default=12, help="fresh sessions (default: 12)")
    options_of.add_argument("--blocks", type=int, default=60, help="pairs of blocks in each (default: 60)")
    options_of.add_argument("--runs", type=int, default=2, help="runs in a block (default: 2)")
    options = options_of.parse_args()
    report = Report("runner_overhead", options)
    whole, reported = [], []
    with tempfile.TemporaryDirectory(prefix="edgepress-overhead-") as folder:
        path = Path(folder) / "model.onnx"
        layers = model_of_about(path, options.milliseconds)
        feeds = chain_feeds()
        for number in range(1, options.rounds + 1):
            session = open_session(path)
            runner.warm_up(functools.partial(session.run, None, feeds), runner.Plan())
            pair = measure(session, feeds, options.blocks, options.runs)
            whole.append(pair[0])
            reported.append(pair[1])
            report.progress(f"round {number} of {options.rounds}: {100 * (whole[-1] - 1):+.2f} %")
        bare_ns, _ = bare_block(session, feeds, 50)
    rows: list[tuple[str, str, str]] = []
    figures: dict[str, Any] = {"model_ms": bare_ns / 1e6, "layers": layers}
    for name, ratios in (("time of a run, all in all", whole), ("reported latency", reported)):
        ratio, low, high = runner.ratio_interval(ratios)
        bounds = [100 * (side - 1) if side is not None else None for side in (low, high)]
        figures[name] = {"overhead_percent": 100 * (ratio - 1), "interval_percent": bounds}
        shown = "" if bounds[0] is None else f"{bounds[0]:+.2f} to {bounds[1]:+.2f} %"
        rows.append((name, f"{100 * (ratio - 1):+.2f} %", shown))
    compared = [figures[name] for name, _, _ in rows]
    report.text(f"a model of {bare_ns / 1e6:.2f} ms ({layers} layers), {options.rounds} sessions")
    cost_ns = loop_cost_ns()
    figures["loop_cost_ns"] = cost_ns
    cost = f"{100 * cost_ns / bare_ns:+.4f} %"
    rows.append((f"the loop alone: {cost_ns:+.0f} ns a run", cost, ""))
    report.table("the runner's loop against a bare one", ("", "overhead", "95 % interval"), rows)
    report.add("overhead", figures)
    met = all(item["overhead_percent"] <= 100 * ASKED_FRACTION for item in compared)
    report.text(f"asked: at most {100 * ASKED_FRACTION:g} %: {'met' if met else 'NOT met'}")
    report.close()
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
