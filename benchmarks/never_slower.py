"""Is anything slower after `edgepress compile --target host` than before? It must not be.

Every ONNX model of the measuring data, and the architectures of benchmarks/zoo.py with random weights (tiny;
with --full those that an earlier `architectures.py --full` has exported into the workdir), is compiled for
this machine with everything on auto, calibrated on generated inputs, without a drift limit: what is asked is
whether the choices are fast, not whether they are close. Then bundle and source are timed against each other.

The rule: a model is slower if the median of the ratios source / bundle over at least 5 pairs of fresh
sessions, opened in alternating order, is below 0.98. So that the noise of a net of 40 microseconds decides
nothing, each pair runs for at least 0.2 s, and a model found slower is timed again with three times as many
pairs: it is a violation if the median of all pairs of both series is below 0.98. Likewise a model is faster
only if the median is above 1.02 and every pair above 1. Where the compile gave back the very graph that went
in, that is told and counts as no win, whatever the clock says.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from edgepress.benchmarks import places
from edgepress.benchmarks.architectures import Net
from edgepress.benchmarks.compiling import compile_bundle
from edgepress.benchmarks.report import Report, parser
from edgepress.benchmarks.sessions import Array, Form, time_forms
from edgepress.benchmarks.zoo import ARCHITECTURES
from edgepress.compress.recipe import DriftLimit, Recipe, write_recipe
from edgepress.driver.measuring.local_benchmark import timing_inputs
from edgepress.frontends.source import load_source
from edgepress.runtimes.timing import Schedule

SLOWER, FASTER = 0.98, 1.02
LEAST_PAIRS, AGAIN = 5, 3
_NO_LIMIT = (DriftLimit(metric="l2", limit=1e9),)
_COLUMNS = ("model", "plan", "source ms", "bundle ms", "speed", "pairs", "file", "verdict")
Row = dict[str, Any]


def options_of_script() -> argparse.ArgumentParser:
    """The command line."""
    made = parser(__doc__)
    places.add_workdir(made)
    made.add_argument("--only", nargs="+", metavar="NAME", help="models whose name contains one of these")
    made.add_argument("--full", action="store_true", help="the full-size exports of an earlier run")
    made.add_argument("--no-zoo", action="store_true", help="only the models of the measuring data")
    made.add_argument("--pairs", type=int, default=LEAST_PAIRS, help="pairs of sessions (default: 5)")
    made.add_argument("--threads", type=int, default=1, help="threads of every session (default: 1)")
    made.add_argument("--measure-seconds", type=int, default=10, help="as for compile (default: 10)")
    return made


def models(options: argparse.Namespace, report: Report) -> Iterator[tuple[str, Path, dict[str, Any]]]:
    """(name, file, recipe fields) of each model: those of the data first."""
    root = places.data(".")
    for path in sorted(root.rglob("*.onnx")):
        yield str(path.relative_to(root)), path, {"data_free": True}
    if options.no_zoo:
        return
    for item in ARCHITECTURES:
        if not _wanted(item.name, options.only):
            continue
        size = "full" if options.full else "tiny"
        folder = Path(options.workdir) / f"architectures-{size}" / item.name.replace(" ", "-").lower()
        file, data = folder / "model.onnx", folder / "calibration.npz"
        if not (file.is_file() and data.is_file()):
            if options.full:
                report.progress(f"{item.name}: not exported (run architectures.py --full first): left out")
                continue
            report.progress(f"exporting {item.name}")
            try:
                Net(item, folder, full=False)
            except Exception as error:  # noqa: BLE001 the exporter may raise anything: its row says so
                report.text(f"{item.name} cannot be exported: {str(error).splitlines()[0]}")
                continue
        with np.load(data, allow_pickle=False) as stored:
            shapes = {name: (1, *stored[name].shape[1:]) for name in stored.files}
        yield item.name, file, {"shapes": shapes, "calib": str(data)}


def _wanted(name: str, only: Sequence[str] | None) -> bool:
    return only is None or any(part.lower() in name.lower() for part in only)


def compiled(file: Path, fields: dict[str, Any], folder: Path, options: argparse.Namespace) -> Row:
    """The document of a compile of `file` for this machine, the bundle in `folder`."""
    calib = fields.pop("calib", None)
    recipe = Recipe(
        target="host",
        max_drift=_NO_LIMIT,
        threads=options.threads,
        measure_seconds=options.measure_seconds,
        **fields,
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    written = folder.with_suffix(".toml")
    write_recipe(recipe, written)
    words = ["--recipe", str(written), *(() if calib is None else ("--calib", calib))]
    return compile_bundle(file, folder, "host", *words)


def pairs_of(
    file: Path, bundle: Path, feeds: Mapping[str, Array], threads: int, pairs: int
) -> tuple[list[float], float, float]:
    """Ratios source / bundle of fresh pairs of sessions, and both median latencies in ms."""
    schedule = Schedule(
        pairs=pairs, runs=16, least_pair_s=0.2, most_pair_s=20.0, warm_up_limit_s=2.0, limit_s=1e9
    )
    forms = [Form("source", file), Form.of_bundle("bundle", bundle)]
    result = time_forms(forms, feeds, threads=threads, schedule=schedule)
    return (
        list(result.comparisons[0].pair_ratios),
        result.timing("source").p50_ms,
        result.timing("bundle").p50_ms,
    )


def verdict_of(ratios: Sequence[float], *, unchanged: bool) -> str:
    """What the pairs say of a model (see the rule above)."""
    middle = statistics.median(ratios)
    if middle < SLOWER:
        return "SLOWER"
    if unchanged:
        return "as it came"
    return "faster" if middle > FASTER and min(ratios) > 1 else "same"


def measure(name: str, file: Path, fields: dict[str, Any], options: argparse.Namespace) -> Row:
    """Compile a model and time its bundle against it; a slow one again, three times as long."""
    place = Path(options.workdir) / "never-slower" / name.replace("/", "-").replace(" ", "-").lower()
    shapes = dict(fields.get("shapes", {}))
    document = compiled(file, fields, place, options)
    source = load_source(str(file), tokenizer=None, preprocessor=None)
    feeds = timing_inputs(source, Recipe(target="host", shapes=shapes))
    ratios, before_ms, after_ms = pairs_of(file, place, feeds, options.threads, options.pairs)
    first = statistics.median(ratios)
    if first < SLOWER:
        more, *_ = pairs_of(file, place, feeds, options.threads, AGAIN * options.pairs)
        ratios += more
    pins = document["recipe"]["pins"]
    unchanged = "fusions" in pins["rolled_back"]
    return {
        "name": name,
        "quantization": document["plan"]["quantization"],
        "rolled_back": pins["rolled_back"],
        "forms": len(pins.get("forms", {})),
        "notes": document["notes"],
        "source_ms": before_ms,
        "bundle_ms": after_ms,
        "ratios": ratios,
        "first_ratio": first,
        "ratio": statistics.median(ratios),
        "size_fraction": document["size_fraction"],
        "verdict": verdict_of(ratios, unchanged=unchanged),
    }


def cells(row: Row) -> tuple[str, ...]:
    """A row in words."""
    plan = row["quantization"] if row["quantization"] != "none" else "float"
    return (
        row["name"],
        plan,
        f"{row['source_ms']:.3f}",
        f"{row['bundle_ms']:.3f}",
        f"{row['ratio']:.2f}x ({min(row['ratios']):.2f} to {max(row['ratios']):.2f})",
        str(len(row["ratios"])),
        f"{row['size_fraction']:.0%}",
        row["verdict"],
    )


def main() -> int:
    """Measure and print; 1 if anything is slower."""
    options = options_of_script().parse_args()
    if options.pairs < LEAST_PAIRS:
        raise SystemExit(f"--pairs: the rule wants at least {LEAST_PAIRS}")
    report = Report("never_slower", options)
    rows: list[Row] = []
    for name, file, fields in models(options, report):
        if not _wanted(name, options.only):
            continue
        report.progress(name)
        rows.append(measure(name, file, fields, options))
        report.text("  ".join(cells(rows[-1])))
        report.add("rows", rows)
    report.table("bundle against source", _COLUMNS, [cells(row) for row in rows])
    verdicts = [row["verdict"] for row in rows]
    faster = [row["ratio"] for row in rows if row["verdict"] == "faster"]
    gain = f", by {statistics.median(faster):.2f}x in the middle (up to {max(faster):.2f}x)" if faster else ""
    report.text(
        f"{len(rows)} models: {verdicts.count('SLOWER')} slower, {len(faster)} faster{gain}, "
        f"{verdicts.count('same')} the same, {verdicts.count('as it came')} left as they came"
    )
    report.close()
    return 1 if "SLOWER" in verdicts else 0


if __name__ == "__main__":
    raise SystemExit(main())
