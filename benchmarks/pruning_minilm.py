"""all-MiniLM-L6-v2 pruned: speed at 1x128 tokens against the same float form, Spearman on STS-B."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from edgepress.benchmarks import places, sentence_accuracy
from edgepress.benchmarks.pruned_forms import BASELINE, PRUNED, SKIPPED, compiled, variants
from edgepress.benchmarks.report import Report
from edgepress.benchmarks.sessions import speed_rows, time_forms, token_feeds

MINILM_SPEED, MINILM_LOST = 1.5, 0.02
"""What is claimed: times the speed of the float form, and Spearman that may be lost, as a fraction."""
_HELD_OUT_SENTENCES = 200
_HELD_OUT_TEXT = "calib-text/calib_sentences_wikitext2_test.txt"


class MiniLMRun:
    """all-MiniLM-L6-v2: the float bundle, pruned, and pruned in INT8."""

    def __init__(self, options: argparse.Namespace, report: Report) -> None:
        self.options, self.report = options, report
        self.model = places.minilm(options.model)
        self.found: dict[str, dict[str, Any]] = {}

    def compile(self) -> None:
        """The float form unpruned, and what pruning makes of it; sentences for its own drift are others."""
        options, workdir = self.options, self.options.workdir
        workdir.mkdir(parents=True, exist_ok=True)
        held_out: Path = workdir / "minilm-prune-eval.txt"
        lines = places.data(_HELD_OUT_TEXT).read_text(encoding="utf-8").splitlines()
        held_out.write_text("\n".join(lines[:_HELD_OUT_SENTENCES]) + "\n", encoding="utf-8")
        asked: dict[str, tuple[str, ...]] = {BASELINE: ("--precision", "fp32", "--skip", f"drift,{SKIPPED}")}
        given = (
            *("--calib", str(places.data(places.CALIBRATION_TEXT)), "--eval", str(held_out)),
            *("--samples", str(options.sentences), "--prune", str(options.prune_minilm)),
            *("--skip", SKIPPED),
        )
        asked |= {label: (*given, *words) for label, words in variants(options).items()}
        for label, words in asked.items():
            self.found[label] = compiled(
                label,
                self.model,
                workdir / f"minilm-{label.replace(', ', '-').replace(' ', '-')}",
                words=words,
                threads=options.compile_threads,
                report=self.report,
            )
        self.found[BASELINE]["macs"] = self.found[PRUNED]["macs_before"]

    def measure(self) -> None:
        """Spearman, drift and latency of every form."""
        from edgepress.runtimes.timing import Schedule

        pairs = sentence_accuracy.read_sts(places.data(places.STS_TEST))
        feeds = sentence_accuracy.tokenize(pairs.sentences, self.model)
        reference = None
        for label, item in self.found.items():
            self.report.progress(f"minilm: {label} on {len(feeds)} sentences")
            session = item["form"].open()
            run = lambda inputs, session=session: session.run(inputs)["last_hidden_state"]  # noqa: E731
            embedded = sentence_accuracy.embed(run, feeds, session.input_names)
            reference = embedded if reference is None else reference
            item["drift"] = sentence_accuracy.compare(reference, embedded, pairs)
        self.report.progress("minilm: timing")
        forms = [item["form"] for item in self.found.values()]
        inputs = token_feeds(forms[0].open().input_names, 1, 128)
        schedule = Schedule(pairs=self.options.pairs, runs=self.options.runs, limit_s=300)
        speeds = speed_rows(time_forms(forms, inputs, threads=1, schedule=schedule))
        for label, item in self.found.items():
            item["speed"] = speeds[label]

    def show(self) -> None:
        """One row a form."""
        whole = self.found[BASELINE]
        rows = [
            (
                label,
                f"{whole['macs'] / item['macs']:.2f}x",
                f"{item['form'].size_bytes / whole['form'].size_bytes:.1%}",
                f"{item['drift']['spearman'] * 100:.2f}",
                f"{(item['drift']['spearman'] - whole['drift']['spearman']) * 100:+.2f}",
                f"{item['drift']['l2']:.3f}",
                f"{item['drift']['neighbour']:.1%}",
                f"{item['speed']['p50_ms']:.2f}",
                f"{item['speed']['ratio']:.2f}x ({item['speed']['ratio_low']:.2f}-"
                f"{item['speed']['ratio_high']:.2f})",
                f"{item['compile_s']:.0f}",
            )
            for label, item in self.found.items()
        ]
        self.report.table(
            "all-MiniLM-L6-v2: STS-B test sentences; 1x128 tokens, 1 thread",
            (
                *("form", "fewer MACs", "file", "Spearman", "points", "rel. L2", "neighbours"),
                *("ms", "x FP32", "compile s"),
            ),
            rows,
        )
        item = self.found[PRUNED]
        self.report.text(
            f"claimed: at most {MINILM_LOST * 100:.1f} points lost at {MINILM_SPEED}x the speed; here "
            f"{(whole['drift']['spearman'] - item['drift']['spearman']) * 100:.2f} at "
            f"{item['speed']['ratio']:.2f}x"
        )
