"""Static INT8 of CNNs: ResNet-20 and -56 on CIFAR-10 and two MNIST nets, for host, raspberry-pi-4 and -5.

Calibration and the compile's own drift check see training images only; the test images are looked at
once, at the end. CIFAR-10's test images here are decoded from JPEG copies, so that absolute accuracies are
below the published ones: compare before with after. The files are sorted by class and are shuffled with a
fixed seed. INT8 is asked for outright (--precision int8): "auto" rolls it back on host where it is slower.

Speed counts for host only: the boards' figures are of this machine, not of the board. Graphs with signed
activations are slow on x86 and are therefore evaluated on fewer images by default.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from edgepress.benchmarks import amx, peers, places
from edgepress.benchmarks.compiling import compile_bundle
from edgepress.benchmarks.report import Report, parser
from edgepress.benchmarks.sessions import Form, manifest_of, speed_rows, time_forms

Array = npt.NDArray[Any]
PEER, PEER_PER_TENSOR = "ORT static U8S8, per channel", "ORT static U8S8, per tensor"
_CIFAR_MEAN, _CIFAR_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CALIBRATION, _HELD_OUT = 512, 500


@dataclasses.dataclass(frozen=True, kw_only=True)
class Net:
    """A trained net: its file, and which images it takes how."""

    file: str
    images: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


NETS = {
    "resnet20": Net(file="cifar10-resnet/resnet20.onnx", images="cifar10", mean=_CIFAR_MEAN, std=_CIFAR_STD),
    "resnet56": Net(file="cifar10-resnet/resnet56.onnx", images="cifar10", mean=_CIFAR_MEAN, std=_CIFAR_STD),
    "mnist-cntk": Net(file="mnist/mnist_cntk_zoo.onnx", images="mnist", mean=(0.0,), std=(1.0,)),
    "mnist-pytorch": Net(file="mnist/cnn_mnist_pytorch.onnx", images="mnist", mean=(0.1307,), std=(0.3081,)),
}
TARGETS = ("host", "raspberry-pi-4", "raspberry-pi-5")


def options_of_script() -> argparse.ArgumentParser:
    """The command line."""
    made = parser(__doc__)
    places.add_workdir(made)
    made.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS), metavar="NET")
    made.add_argument("--targets", nargs="+", default=list(TARGETS), metavar="TARGET")
    made.add_argument("--images", type=int, default=10_000, help="test images for host (default: 10000)")
    made.add_argument(
        "--board-images", type=int, default=2_000, help="test images for the other targets (default: 2000)"
    )
    made.add_argument("--pairs", type=int, default=6, help="rounds of fresh sessions (default: 6)")
    made.add_argument("--runs", type=int, default=30, help="timed runs a round (default: 30)")
    made.add_argument(
        "--batch", type=int, nargs="+", default=[1, 16], help="batch sizes timed (default: 1 16)"
    )
    made.add_argument("--seed", type=int, default=0, help="seed of the shuffles (default: 0)")
    made.add_argument(
        "--no-amx", action="store_true", help="deny AMX to this process and its children (x86-64 Linux)"
    )
    return made


def images_of(net: Net, part: str, count: int, seed: int) -> tuple[Array, npt.NDArray[np.int64]]:
    """Normalised images, shape (count, channels, height, width), and their classes, shape (count,).

    Args:
        net: says which images, and how they are normalised.
        part: "calibrate", "held-out" (both of the training images, disjoint) or "test".
        count: how many, at most.
        seed: of the shuffle.
    """
    if net.images == "cifar10":
        name = "cifar10-jpeg/cifar10_test_jpegdecoded_10000.npz"
        if part != "test":
            name = "cifar10-lossless/cifar10_train_lossless_4000.npz"
        with np.load(places.data(name)) as stored:
            images, labels = stored["images"], stored["labels"]
    else:
        prefix = "test" if part == "test" else "train"
        with np.load(places.data("mnist/mnist.npz")) as stored:
            images, labels = stored[f"{prefix}_images"][..., None], stored[f"{prefix}_labels"]
    order = np.random.default_rng(seed).permutation(len(images))
    start = _CALIBRATION if part == "held-out" else 0
    chosen = order[start : start + count]
    scaled = images[chosen].astype(np.float32) / np.float32(255)
    scaled = (scaled - np.asarray(net.mean, np.float32)) / np.asarray(net.std, np.float32)
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2)), labels[chosen].astype(np.int64)


def write_images(net: Net, name: str, part: str, count: int, options: argparse.Namespace) -> Path:
    """An .npz of images (under the model's input name) and labels, as edgepress reads it."""
    images, labels = images_of(net, part, count, options.seed)
    path: Path = options.workdir / f"{name}-{part}-{len(images)}-seed{options.seed}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    (input_name,) = Form("", places.data(net.file)).open().input_names
    np.savez(path, allow_pickle=False, **{input_name: images, "labels": labels})
    return path


def classes(form: Form, images: Array, batch: int) -> npt.NDArray[np.int64]:
    """The class that a form gives each image, shape (images,)."""
    session = form.open()
    (name,) = session.input_names
    found = []
    for start in range(0, len(images), batch):
        scores = next(iter(session.run({name: images[start : start + batch]}).values()))
        found.append(scores.argmax(axis=-1))
    return np.concatenate(found)


def change(labels: Array, before: Array, after: Array) -> dict[str, float]:
    """Accuracy before and after with the paired 95 % interval of the change, and flips; plain NumPy.

    Source of the interval: Agresti and Min 2005, Statistics in Medicine 24, 729-740.
    """
    lost = int(((before == labels) & (after != labels)).sum())
    won = int(((before != labels) & (after == labels)).sum())
    b, c, n = lost + 0.5, won + 0.5, len(labels) + 2.0
    half = 1.959963984540054 * float(np.sqrt(b + c - (c - b) ** 2 / n)) / n
    return {
        "images": len(labels),
        "before": float((before == labels).mean()),
        "after": float((after == labels).mean()),
        "change": (won - lost) / len(labels),
        "low": (c - b) / n - half,
        "high": (c - b) / n + half,
        "flips": float((before != after).mean()),
    }


def drift_by_edgepress(form: Form, net: Net, bundle: Path, data: Path, batch: int) -> dict[str, float]:
    """The same quantities by edgepress's own code."""
    from edgepress.calibration.data import open_data
    from edgepress.calibration.drift import measure_drift
    from edgepress.runtimes.base import SessionOptions
    from edgepress.runtimes.ort_runtime import OrtSession

    manifest = manifest_of(bundle)
    baseline = OrtSession(places.data(net.file))
    settings = manifest.session_options.options(threads=1) if form.has_options else SessionOptions()
    drift = measure_drift(
        baseline,
        OrtSession(form.file, settings),
        open_data(str(data), baseline.inputs),
        manifest.task,
        batch_size=batch,
    )
    (accuracy,) = (item for item in drift.task_metrics if item.name == "accuracy")
    low, high = accuracy.change_interval or (float("nan"), float("nan"))
    return {
        "before": accuracy.baseline,
        "after": accuracy.candidate,
        "change": accuracy.change,
        "low": low,
        "high": high,
        "flips": float("nan") if drift.flips is None else drift.flips,
    }


def kernels(file: Path, config: Mapping[str, str]) -> tuple[dict[str, int], dict[str, int]]:
    """Operators of the runtime's optimised graph that compute in integers, and products left in float.

    Args:
        file: the model.
        config: entries under which this machine's runtime optimises as the target's would.
    """
    from edgepress.compress.audit import INTEGER_OPS
    from edgepress.runtimes.base import SessionOptions
    from edgepress.runtimes.ort_runtime import optimised_graph

    graph = optimised_graph(file, SessionOptions(config=dict(config))).graph
    count = collections.Counter(node.op_type for node in graph.all_nodes())
    integer = {op: count[op] for op in sorted(count) if op in INTEGER_OPS - {"Gather"}}
    floats = {op: count[op] for op in ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul") if count[op]}
    return integer, floats


def _listed(count: Mapping[str, int]) -> str:
    return " ".join(f"{op} {number}" for op, number in count.items()) or "none"


class NetRun:
    """One net: its test images, and what the untouched model makes of them."""

    def __init__(self, name: str, options: argparse.Namespace, report: Report) -> None:
        self.name, self.net, self.options, self.report = name, NETS[name], options, report
        self.baseline = Form("FP32", places.data(self.net.file))
        self.calibration = write_images(self.net, name, "calibrate", _CALIBRATION, options)
        self.held_out = write_images(self.net, name, "held-out", _HELD_OUT, options)
        self.images, self.labels = images_of(self.net, "test", options.images, options.seed)
        self.fixed_batch = self.net.images == "mnist"
        self.batch = 1 if self.fixed_batch else 50
        report.progress(f"{name}: FP32 on {len(self.images)} test images")
        self.before = classes(self.baseline, self.images, self.batch)

    def compile(self, target: str) -> dict[str, Any]:
        """Compile for a target, and measure what came out."""
        from edgepress.targets.registry import load_target

        bundle = self.options.workdir / f"{self.name}-{target}"
        self.report.progress(f"{self.name}: compiling for {target}")
        document = compile_bundle(
            self.baseline.file,
            bundle,
            target,
            *("--calib", str(self.calibration), "--eval", str(self.held_out)),
            *("--quantization", "static", "--precision", "int8"),
        )
        form = Form.of_bundle(f"edgepress, {target}", bundle)
        figures = self._measure(form, target == "host", load_target(target).audit_config)
        figures["quantization"] = document["plan"]["quantization"]
        figures["reverted"] = document["recipe"]["pins"]["reverted"]
        few = write_images(self.net, self.name, "test", int(figures["accuracy"]["images"]), self.options)
        figures["edgepress_drift"] = theirs = drift_by_edgepress(form, self.net, bundle, few, self.batch)
        apart = {key: abs(theirs[key] - figures["accuracy"][key]) for key in theirs}
        figures["drift_agrees"] = max(apart.values()) < 1e-3
        if not figures["drift_agrees"]:
            self.report.text(f"DISAGREEMENT: {form.name}: NumPy and edgepress drift differ: {apart}")
        return figures

    def peer(self) -> tuple[str, dict[str, Any]]:
        """onnxruntime's own static quantization on the same images: per channel, or else per tensor."""
        images, _ = images_of(self.net, "calibrate", _CALIBRATION, self.options.seed)
        (name,) = self.baseline.open().input_names
        failure = None
        for label, per_channel in ((PEER, True), (PEER_PER_TENSOR, False)):
            self.report.progress(f"{self.name}: {label}")
            try:
                file = peers.quantize_static(
                    self.baseline.file,
                    self.options.workdir / f"{self.name}-ort-static.onnx",
                    peers.stacked({name: images}),
                    unsigned_activations=True,
                    per_channel=per_channel,
                )
            except (ValueError, TypeError, AttributeError, RuntimeError) as error:
                failure = f"{type(error).__name__}: {error}"
                self.report.text(f"\n{self.name}: {label} fails: {failure}")
                continue
            return label, self._measure(Form(label, file), True, {}) | {"per_channel_failure": failure}
        raise SystemExit(f"onnxruntime quantizes {self.name} in neither form: {failure}")

    def _measure(self, form: Form, whole: bool, config: Mapping[str, str]) -> dict[str, Any]:
        count = len(self.images) if whole else min(len(self.images), self.options.board_images)
        self.report.progress(f"{self.name}: {form.name} on {count} test images")
        after = classes(form, self.images[:count], self.batch)
        integer, floats = kernels(form.file, config)
        return {
            "form": form,
            "accuracy": change(self.labels[:count], self.before[:count], after),
            "size_fraction": form.size_bytes / self.baseline.size_bytes,
            "integer_kernels": integer,
            "float_products": floats,
        }

    def time(self, found: Mapping[str, dict[str, Any]]) -> None:
        """Time every form against the untouched model, interleaved; the results go into `found`."""
        from edgepress.runtimes.timing import Schedule

        (name,) = self.baseline.open().input_names
        for batch in [1] if self.fixed_batch else self.options.batch:
            self.report.progress(f"{self.name}: timing batch {batch}")
            result = time_forms(
                [self.baseline, *(figures["form"] for figures in found.values())],
                {name: self.images[:batch]},
                threads=1,
                schedule=Schedule(
                    pairs=self.options.pairs, runs=max(5, self.options.runs // batch), limit_s=120
                ),
            )
            speeds = speed_rows(result)
            for figures in found.values():
                figures.setdefault("speed", {})[f"batch {batch}"] = speeds[figures["form"].name]


def print_net(run: NetRun, found: Mapping[str, dict[str, Any]]) -> None:
    """Two tables: accuracy and size, then speed and kernels."""
    rows: list[tuple[str, ...]] = []
    for name, item in found.items():
        part = item["accuracy"]
        rows.append(
            (
                name,
                f"{part['images']}",
                f"{part['before']:.2%}",
                f"{part['after']:.2%}",
                f"{part['change'] * 100:+.2f}",
                f"{part['low'] * 100:+.2f} to {part['high'] * 100:+.2f}",
                f"{part['flips']:.2%}",
                f"{item['size_fraction']:.1%}",
            )
        )
    run.report.table(
        f"{run.name}: accuracy on test images, file",
        ("form", "images", "before", "after", "points", "95 % paired", "flips", "file"),
        rows,
    )
    batches = list(next(iter(found.values()))["speed"])
    rows = []
    for name, item in found.items():
        speeds = [
            f"{item['speed'][batch]['ratio']:.2f}x ({item['speed'][batch]['ratio_low']:.2f}-"
            f"{item['speed'][batch]['ratio_high']:.2f})"
            for batch in batches
        ]
        counts = "yes" if name in ("host", PEER, PEER_PER_TENSOR) else "this machine, not the board"
        rows.append(
            (name, *speeds, counts, _listed(item["integer_kernels"]), _listed(item["float_products"]))
        )
    run.report.table(
        f"{run.name}: speed against FP32 (1 thread), kernels of the runtime's optimised graph",
        ("form", *batches, "speed counts", "integer kernels", "float products"),
        rows,
    )


def main() -> int:
    """Every net for every target, and the peer beside."""
    options = options_of_script().parse_args()
    if options.no_amx:
        amx.deny()
    report = Report("cnn_int8", options)
    everything = {}
    for name in options.nets:
        run = NetRun(name, options, report)
        found = {target: run.compile(target) for target in options.targets}
        label, figures = run.peer()
        found[label] = figures
        run.time(found)
        print_net(run, found)
        everything[name] = {
            target: {key: value for key, value in figures.items() if key != "form"}
            for target, figures in found.items()
        }
    report.add("nets", everything)
    report.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
