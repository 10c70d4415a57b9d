"""How well the cheap ranking of layers agrees with the exhaustive one, for MiniLM and ResNet-20.

The truth: for every group of nodes and every form a whole model in which this group alone is quantized, run
on every sample; its relative L2 against the float graph. The ranking (compress/sensitivity.py) has at most
(forms + 2) forwards for each of the same samples. Printed are Spearman's correlation of the two, the
correlation of the truth on one half of the samples with the truth on the other (the mean over random
halves: what any other draw of samples would make of the truth), the forwards of both, and their time.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from edgepress.benchmarks import cnn_int8, places
from edgepress.benchmarks.report import Report, parser
from edgepress.calibration.data import CalibrationData, open_data
from edgepress.calibration.metrics import spearman
from edgepress.calibration.representation import Representation
from edgepress.compress.lower import apply_plan
from edgepress.compress.plan import Plan
from edgepress.compress.propose import Request, propose
from edgepress.compress.quantize.static import static_layout
from edgepress.compress.recipe import Recipe
from edgepress.compress.sensitivity import Sensitivities, measure_sensitivity
from edgepress.compress.sensitivity_graphs import missing_ranges
from edgepress.driver.candidate import check_samples, prepare
from edgepress.driver.observing import observe_ranges
from edgepress.driver.reporter import SilentReporter
from edgepress.frontends.source import load_source
from edgepress.graph.model import Model
from edgepress.runtimes.ort_runtime import OrtSession
from edgepress.targets.registry import load_target

Floats = npt.NDArray[np.float64]
_HALVES = 50


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A fused float graph, its plans by form, the ranges of static ones, and the samples."""

    model: Model
    plans: Mapping[str, Plan]
    ranges: Mapping[str, tuple[float, float]]
    data: CalibrationData


def options_of_script() -> argparse.ArgumentParser:
    """The command line."""
    made = parser(__doc__)
    places.add_model(made)
    places.add_workdir(made)
    made.add_argument("--target", default="host", help="target whose kernels are planned (default: host)")
    made.add_argument("--cases", nargs="+", choices=("minilm", "resnet20"), default=["resnet20", "minilm"])
    made.add_argument("--sentences", type=int, default=64, help="samples for MiniLM (default: 64)")
    made.add_argument("--images", type=int, default=512, help="samples for ResNet-20 (default: 512)")
    made.add_argument("--seed", type=int, default=0, help="seed of the samples (default: 0)")
    return made


def case_of(name: str, options: argparse.Namespace) -> Case:
    """Load, fuse, plan and calibrate one model."""
    forms: tuple[str, ...]
    if name == "minilm":
        reference, calib = str(places.minilm(options.model)), str(places.data(places.CALIBRATION_TEXT))
        forms, samples = ("dynamic", "static"), options.sentences
    else:
        net = cnn_int8.NETS["resnet20"]
        reference, samples = str(places.data(net.file)), options.images
        calib = str(cnn_int8.write_images(net, "resnet20", "calibrate", samples, options))
        forms = ("static",)
    source = load_source(reference)
    recipe = Recipe(target=options.target, seed=options.seed)
    profile = load_target(options.target)
    data = open_data(calib, source.model.inputs, encoder=source.encoder, samples=samples, seed=options.seed)
    baseline = OrtSession.from_model(source.model)
    feeds, expected = check_samples(source.model, data, recipe, baseline)
    model, _ = prepare(
        source.model, profile, recipe, samples=feeds, expected=expected, reporter=SilentReporter()
    )
    plans = {
        form: propose(model, profile, Request(quantization=form, calibrated=True))  # type: ignore[arg-type]
        for form in forms
    }
    ranges: dict[str, tuple[float, float]] = {}
    for plan in plans.values():
        ranges |= observe_ranges(model, plan, data, recipe, reporter=SilentReporter())[0]
    return Case(model=model, plans=plans, ranges=ranges, data=data)


def truth_of(case: Case, report: Report) -> dict[tuple[str, str], Floats]:
    """(form, group) -> squared change of the answers of each sample, as a share of all samples' answers."""
    found: dict[tuple[str, str], Floats] = {}
    reference = _answers(OrtSession.from_model(case.model), case)
    signal = sum(float((values**2).sum()) for values in reference)
    for form, plan in case.plans.items():
        for group in plan.groups:
            report.progress(f"{form}: {group} alone")
            alone = plan.revert(frozenset(plan.groups) - {group}, "another group is measured")
            names = static_layout(case.model, alone.decisions).observed
            ranges = {**case.ranges, **missing_ranges(case.model, names, case.ranges)}
            session = OrtSession.from_model(apply_plan(case.model, alone, ranges)[0])
            pairs = zip(_answers(session, case), reference, strict=True)
            found[form, group] = np.array([float(((a - b) ** 2).sum()) for a, b in pairs]) / signal
    return found


def _answers(session: OrtSession, case: Case) -> list[Floats]:
    made, representation = [], None
    for feeds in case.data:
        outputs = session.run(feeds)
        representation = representation or Representation(case.model.task, outputs)
        (rows,) = representation.rows(outputs, feeds, 1)
        made.append(np.concatenate([values.ravel().astype(np.float64) for values in rows.values()]))
    return made


def split_half(parts: Floats, seed: int) -> float:
    """Mean correlation of the truth on random halves; `parts` of shape (groups, samples)."""
    random, count = np.random.default_rng(seed), parts.shape[1]
    found = []
    for _ in range(_HALVES):
        order = random.permutation(count)
        halves = (parts[:, order[: count // 2]], parts[:, order[count // 2 :]])
        found.append(spearman(*(half.sum(axis=1) for half in halves)))
    return float(np.mean(found))


def measure(name: str, options: argparse.Namespace, report: Report) -> None:
    """Both rankings of one model, compared."""
    case = case_of(name, options)
    started = time.perf_counter()
    ranked = measure_sensitivity(
        case.model, case.plans, case.ranges, case.data, open_session=OrtSession.from_model
    )
    cheap_s = time.perf_counter() - started
    started = time.perf_counter()
    truth = truth_of(case, report)
    truth_s = time.perf_counter() - started
    budget = (len(case.plans) + 2) * len(case.data)
    figures: dict[str, Any] = {
        "samples": len(case.data),
        "forwards": ranked.forwards,
        "allowed_forwards": budget,
        "truth_forwards": (len(truth) + 1) * len(case.data),
        "seconds": cheap_s,
        "truth_seconds": truth_s,
        "forms": {},
    }
    rows = []
    for form, plan in case.plans.items():
        line = _compared(form, plan, ranked, truth, options.seed)
        figures["forms"][form] = line
        rows.append(
            (form, str(line["groups"]), f"{line['rank_correlation']:.3f}", f"{line['split_half']:.3f}",
             f"{line['sum_of_squares']:.4f}", f"{line['true_sum_of_squares']:.4f}")
        )  # fmt: skip
    report.table(
        f"{name}: {len(case.data)} samples; {ranked.forwards} forwards (of {budget}) in {cheap_s:.1f} s, "
        f"exhaustive {figures['truth_forwards']} in {truth_s:.1f} s",
        ("form", "groups", "rank correlation", "truth's split-half", "root of sum", "true root of sum"),
        rows,
    )
    report.add(name, figures)


def _compared(
    form: str, plan: Plan, ranked: Sensitivities, truth: Mapping[tuple[str, str], Floats], seed: int
) -> dict[str, Any]:
    cheap = ranked.of(form)
    parts = np.array([truth[form, group] for group in plan.groups])
    told = np.array([cheap[group] for group in plan.groups])
    return {
        "groups": len(plan.groups),
        "rank_correlation": spearman(told, parts.sum(axis=1)),
        "split_half": split_half(parts, seed),
        "sum_of_squares": float(np.sqrt((told**2).sum())),
        "true_sum_of_squares": float(np.sqrt(parts.sum())),
        "l2": {
            group: {"ranked": float(cheap[group]), "true": float(np.sqrt(row.sum()))}
            for group, row in zip(plan.groups, parts, strict=True)
        },
    }


def main() -> None:
    """Run the benchmark."""
    options = options_of_script().parse_args()
    report = Report("sensitivity", options)
    for name in options.cases:
        measure(name, options, report)
    report.close()


if __name__ == "__main__":
    main()
