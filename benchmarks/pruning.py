"""Structured pruning without labels or training: two CIFAR-10 ResNets and all-MiniLM-L6-v2.

ResNets: from the .onnx alone, 1,024 unlabelled training images; accuracy on the 10,000 test images, which are
decoded from JPEG copies, so that absolute accuracies are below the published ones: compare before with after.
Beside it Torch-Pruning on the checkpoint of the same net and the same images, without fine-tuning, in an
environment of its own.

MiniLM: from sentences of a text (Wikitext-2); Spearman on the STS-B test sentences, which pruning never saw.
The speed counts against the same float form unpruned, at 1x128 tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from typing import Any

import numpy as np
import numpy.typing as npt
from edgepress.benchmarks import cnn_int8, peer_environments, places
from edgepress.benchmarks.pruned_forms import (
    BASELINE,
    PRUNED,
    ROWS,
    SKIPPED,
    THOROUGH,
    compiled,
    parameters,
    variants,
    without_forms,
)
from edgepress.benchmarks.pruning_minilm import MiniLMRun
from edgepress.benchmarks.report import Report, parser
from edgepress.benchmarks.sessions import Form, speed_rows, time_forms
from edgepress.graph.errors import RuntimeUnavailable

Array = npt.NDArray[Any]
_TRAIN, _TEST = (
    f"cifar10-jpeg/cifar10_{part}_jpegdecoded_{count}.npz"
    for part, count in (("train", 20000), ("test", 10000))
)
_HELD_OUT = 500
_PEER = peer_environments.Peer(
    name="torch-pruning",
    program="torch_pruning_resnet.py",
    requirements=("torch-pruning==1.6.1", "torch==2.13.0", "onnx==1.23.2", "numpy==2.4.6"),
    calibrated=True,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A ResNet: its files, how far it is cut, and what is claimed.

    Attributes:
        ratio: times fewer multiply-accumulates, at least.
        most_lost: accuracy that may be lost, as a fraction.
    """

    depth: int
    file: str
    checkpoint: str
    ratio: float
    most_lost: float


CASES = {
    "resnet56": Case(
        depth=56,
        file="cifar10-resnet/resnet56.onnx",
        checkpoint="cifar10-resnet/resnet56-4bfd9763.th",
        ratio=2.11,
        most_lost=0.041,
    ),
    "resnet20": Case(
        depth=20,
        file="cifar10-resnet/resnet20.onnx",
        checkpoint="cifar10-resnet/resnet20-12fca82f.th",
        ratio=1.37,
        most_lost=0.02,
    ),
}


def options_of_script() -> argparse.ArgumentParser:
    """The command line."""
    made = parser(__doc__)
    places.add_model(made)
    places.add_workdir(made)
    models = [*CASES, "minilm"]
    made.add_argument("--models", nargs="+", choices=models, default=models, metavar="NAME")
    made.add_argument(
        "--without", action="append", choices=ROWS, default=[], help="leave rows out; may be repeated"
    )
    made.add_argument(
        "--calibration", type=int, default=1024, help="unlabelled images of a ResNet (default: 1024)"
    )
    made.add_argument("--images", type=int, default=10_000, help="test images (default: 10000)")
    made.add_argument("--sentences", type=int, default=1000, help="unlabelled sentences (default: 1000)")
    made.add_argument(
        "--prune-minilm",
        type=float,
        default=0.42,
        metavar="PART",
        help="part of MiniLM's multiply-accumulates that goes (default: 0.42)",
    )
    made.add_argument(
        "--compile-threads", type=int, default=1, help="threads of the compiles and of the peer (default: 1)"
    )
    made.add_argument("--pairs", type=int, default=6, help="rounds of fresh sessions (default: 6)")
    made.add_argument("--runs", type=int, default=30, help="timed runs a round (default: 30)")
    made.add_argument("--seed", type=int, default=0, help="seed of the shuffles (default: 0)")
    made.add_argument(
        "--torch-index", metavar="URL", help="a further package index, for a CPU build of torch"
    )
    return made


def images_of(name: str, first: int, count: int, seed: int) -> tuple[Array, npt.NDArray[np.int64]]:
    """Normalised images of a shuffled file, shape (count, 3, 32, 32), and their classes, shape (count,)."""
    with np.load(places.data(name)) as stored:
        images, labels = stored["images"], stored["labels"]
    chosen = np.random.default_rng(seed).permutation(len(images))[first : first + count]
    net = cnn_int8.NETS["resnet20"]
    scaled = images[chosen].astype(np.float32) / np.float32(255)
    scaled = (scaled - np.asarray(net.mean, np.float32)) / np.asarray(net.std, np.float32)
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2)), labels[chosen].astype(np.int64)


class ResNetRun:
    """One ResNet: every form of it, its accuracy and its speed."""

    def __init__(self, name: str, options: argparse.Namespace, report: Report) -> None:
        self.name, self.case, self.options, self.report = name, CASES[name], options, report
        self.baseline = Form(BASELINE, places.data(self.case.file))
        self.images, self.labels = images_of(_TEST, 0, options.images, options.seed)
        self.training = images_of(_TRAIN, 0, options.calibration, options.seed)
        self.found: dict[str, dict[str, Any]] = {
            BASELINE: {"form": self.baseline, "parameters": parameters(self.baseline.file)}
        }

    def compile(self) -> None:
        """Every form that edgepress makes; the images have no labels, those for its own drift are others."""
        workdir = self.options.workdir
        workdir.mkdir(parents=True, exist_ok=True)
        calibration, held_out = (workdir / f"{self.name}-prune-{part}.npz" for part in ("calib", "eval"))
        (name,) = self.baseline.open().input_names
        others = images_of(_TRAIN, self.options.calibration, _HELD_OUT, self.options.seed)[0]
        for path, images in ((calibration, self.training[0]), (held_out, others)):
            np.savez(path, allow_pickle=False, **{name: images})
        given = (
            *("--calib", str(calibration), "--samples", str(self.options.calibration)),
            *("--eval", str(held_out), "--prune", f"{1 - 1 / self.case.ratio:.6f}", "--skip", SKIPPED),
        )
        for label, words in variants(self.options).items():
            self.found[label] = compiled(
                label,
                self.baseline.file,
                workdir / f"{self.name}-{label.replace(', ', '-').replace(' ', '-')}",
                words=(*given, *words),
                threads=self.options.compile_threads,
                report=self.report,
            )
        self.found[BASELINE]["macs"] = self.found[PRUNED]["macs_before"]

    def peer(self) -> None:
        """What Torch-Pruning makes of the checkpoint; a row with its reason where it cannot be used."""
        options, workdir = self.options, self.options.workdir
        calibration, settings = workdir / f"{self.name}-peer.npz", workdir / f"{self.name}-peer.json"
        np.savez(
            calibration, allow_pickle=False, **{"0.input": self.training[0], "0.labels": self.training[1]}
        )
        asked = {"depth": self.case.depth, "ratio": self.case.ratio, "threads": options.compile_threads}
        settings.write_text(json.dumps(asked), encoding="utf-8")
        self.report.progress(f"{self.name}: Torch-Pruning")
        started = time.monotonic()
        try:
            python = peer_environments.make_environment(_PEER, workdir / "environments", options.torch_index)
            started = time.monotonic()
            forms = peer_environments.prepare(
                _PEER,
                python,
                workdir / f"{self.name}-torch-pruning",
                {
                    "model": places.data(self.case.checkpoint),
                    "calibration": calibration,
                    "settings": settings,
                },
            )
        except RuntimeUnavailable as error:
            self.report.text(f"{self.name}: Torch-Pruning cannot be used: {error}")
            self.found[_PEER.name] = {"failure": str(error)}
            return
        for made in forms:
            form = Form(made.name, made.files[0])
            self.found[made.name] = {
                "form": form,
                "macs": made.options["macs"],
                "parameters": parameters(form.file),
                "all_compile_s": time.monotonic() - started,
            }

    def measure(self) -> None:
        """Accuracy and latency of every form."""
        from edgepress.runtimes.timing import Schedule

        usable = {label: item for label, item in self.found.items() if "form" in item}
        before = None
        for label, item in usable.items():
            self.report.progress(f"{self.name}: {label} on {len(self.images)} test images")
            after = cnn_int8.classes(item["form"], self.images, 50)
            before = after if before is None else before
            item["accuracy"] = cnn_int8.change(self.labels, before, after)
        self.report.progress(f"{self.name}: timing")
        (name,) = self.baseline.open().input_names
        schedule = Schedule(pairs=self.options.pairs, runs=self.options.runs, limit_s=120)
        forms = [item["form"] for item in usable.values()]
        speeds = speed_rows(time_forms(forms, {name: self.images[:1]}, threads=1, schedule=schedule))
        for label, item in usable.items():
            item["speed"] = speeds[label]

    def show(self) -> None:
        """One row a form."""
        rows = []
        for label, item in self.found.items():
            if "form" not in item:
                continue
            part, speed = item["accuracy"], item["speed"]
            whole = self.found[BASELINE]["macs"]
            seconds = item.get("compile_s")
            rows.append(
                (
                    label,
                    f"{item['macs'] / 1e6:.1f}",
                    f"{whole / item['macs']:.2f}x",
                    f"{item['parameters'] / 1e3:.0f}",
                    f"{part['after']:.2%}",
                    f"{part['change'] * 100:+.2f}",
                    f"{part['low'] * 100:+.2f} to {part['high'] * 100:+.2f}",
                    f"{part['flips']:.1%}",
                    f"{speed['p50_ms']:.3f}",
                    f"{speed['ratio']:.2f}x ({speed['ratio_low']:.2f}-{speed['ratio_high']:.2f})",
                    "" if seconds is None else f"{seconds:.0f}",
                )
            )
        self.report.table(
            f"{self.name}: {len(self.labels)} test images; batch 1, 1 thread",
            (
                *("form", "M MACs", "fewer", "k params", "accuracy", "points", "95 % paired", "flips"),
                *("ms", "x FP32", "compile s"),
            ),
            rows,
        )
        shown = self.found[THOROUGH if THOROUGH in self.found else PRUNED]
        lost = -shown["accuracy"]["change"]
        self.report.text(
            f"claimed: at most {self.case.most_lost * 100:.1f} points lost at {self.case.ratio}x; "
            f"here {lost * 100:.2f} at {self.found[BASELINE]['macs'] / shown['macs']:.2f}x"
        )


def main() -> int:
    """Every model and every form of it."""
    options = options_of_script().parse_args()
    report = Report("pruning", options)
    for name in options.models:
        run = MiniLMRun(options, report) if name == "minilm" else ResNetRun(name, options, report)
        run.compile()
        if isinstance(run, ResNetRun) and "peers" not in options.without:
            run.peer()
        run.measure()
        run.show()
        report.add(name, without_forms(run.found))
    report.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
