"""Bundles on emulated boards, from a bare machine: setting up, one command for each bundle, kernels, counts.

The emulator is set up anew in the working folder, and checked. all-MiniLM-L6-v2 (static, dynamic, on a
Raspberry Pi 5 also FP16) and, with --images, ResNet-20 are compiled for each board. Then, for each bundle, as
a user would type them: `edgepress benchmark BUNDLE --device emulated:BOARD --baseline MODEL`, which copies it
over ssh, verifies it and counts the instructions of an inference, and `edgepress verify BUNDLE --kernels`,
which compares every integer kernel bit for bit. Nothing here is a time of a board.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from edgepress.benchmarks.compiling import compile_bundle
from edgepress.benchmarks.places import add_model, add_workdir, data, minilm
from edgepress.benchmarks.report import Report, parser

BOARDS = ("raspberry-pi-4", "raspberry-pi-5")
_FORMS = {"static": ("--quantization", "static"), "dynamic": ("--quantization", "dynamic")}
_FP16 = {"FP16": ("--precision", "fp16")}
Work = tuple[str, str, Path, Path]  # board, bundle's name, bundle, the model that went in
_WIDE = ("total", "dot", "widening", "fma")


def run_command(cache: Path, *words: str) -> tuple[dict[str, Any], float]:
    """One command of edgepress with an emulator of this script's own: its document, and its seconds.

    Raises:
        SystemExit: if it fails otherwise than by a check.
    """
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-P", "-m", "edgepress", *words, "--json", "-q"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "EDGEPRESS_CACHE": str(cache)},
    )
    if done.returncode not in (0, 3) or not done.stdout:
        raise SystemExit(f"edgepress {' '.join(words)}\nended with {done.returncode}:\n{done.stderr}")
    return {"exit_code": done.returncode, **json.loads(done.stdout)}, time.monotonic() - started


def set_up(report: Report, cache: Path, boards: list[str]) -> None:
    """Setting up from nothing, then the check on each board."""
    shutil.rmtree(cache / "emulator", ignore_errors=True)
    chosen = [word for board in boards for word in ("--board", board)]
    made, setup_s = run_command(cache, "emulator", "setup", *chosen)
    _, again_s = run_command(cache, "emulator", "setup", *chosen)
    checked, check_s = run_command(cache, "emulator", "check", *chosen)
    rows = [
        ("set up from nothing", f"{setup_s:.1f} s, {made['size_bytes'] / 1e6:.0f} MB"),
        ("a second time", f"{again_s:.1f} s"),
        ("check on each board", f"{check_s:.1f} s, {'ok' if checked['healthy'] else 'FAILED'}"),
    ]
    report.table("the emulator on this machine", ("", "found"), rows)
    report.add("emulator", {"setup": made, "setup_s": setup_s, "again_s": again_s, "check": checked})


def bundles_of(
    board: str, models: dict[str, tuple[Path, str]], options: argparse.Namespace
) -> dict[str, Path]:
    """The bundles for a board by name, compiled; those of an earlier run stay."""
    found = {}
    for model, (source, calibration) in models.items():
        forms = _FORMS | (_FP16 if board == "raspberry-pi-5" else {})
        for form, words in forms.items():
            if model != "MiniLM" and form == "dynamic":
                continue  # dynamic convolutions have no kernel that would pay
            place = options.workdir / "emulated-bundles" / f"{model}-{board}-{form}".lower()
            if not (place / "SHA256SUMS").is_file():
                more = ("--calib", calibration, "--samples", str(options.samples), "--preset", "quick")
                compile_bundle(source, place, board, *words, *more)
            found[f"{model} {form}"] = place
    return found


def count(report: Report, cache: Path, work: Work) -> list[Any]:
    """One command: copied, verified, counted beside the model that went in."""
    board, name, bundle, source = work
    report.progress(f"{name} on {board}: benchmark")
    words = (
        "benchmark",
        str(bundle),
        "--device",
        f"emulated:{board}",
        "--baseline",
        str(source),
        "--no-history",
    )
    document, took_s = run_command(cache, *words)
    [device] = document["devices"]
    if device["error"] is not None:
        raise SystemExit(f"{name} on {board}: {device['error']}")
    result = device["results"][0]["result"]
    found = result["benchmark"]["instructions"]
    report.add(f"{board}/{name}", result)
    outputs = "within" if result["outputs"]["within_tolerance"] else "OUT OF"
    plain = found["baseline"]["total"]
    cells, base = _millions(found["bundle"]), _millions(found["baseline"])
    shapes = " ".join("x".join(map(str, shape)) for shape in result["benchmark"]["shapes"].values())
    return [
        (board, name.partition(" ")[0], "FP32", shapes, *base, "100 %", "", ""),
        (
            *(board, *name.split(" "), shapes, *cells),
            f"{100 * found['bundle']['total'] / plain:.0f} %",
            f"{outputs} tolerance, {result['outputs']['max_abs_diff']:.2g}",
            f"{took_s:.0f} s",
        ),
    ]


def _millions(found: dict[str, Any]) -> list[str]:
    half = found["by_kind"].get("fmla_16", 0.0)
    return [*(f"{found[key] / 1e6:.2f}" for key in _WIDE), f"{half / 1e6:.2f}"]


def replay(report: Report, cache: Path, work: Work) -> Any:
    """Every integer kernel bit for bit, and the whole model beside this machine's own spread."""
    board, name, bundle, source = work
    report.progress(f"{name} on {board}: kernels")
    words = ("verify", str(bundle), "--kernels", "--device", f"emulated:{board}", "--baseline", str(source))
    document, took_s = run_command(cache, *words, "--no-history")
    report.add(f"{board}/{name}/kernels", document)
    return document, took_s


def main() -> int:
    """Set up, compile, count and replay; 1 if a check fails."""
    options_of = parser(__doc__)
    options_of.add_argument("--boards", nargs="+", choices=BOARDS, default=list(BOARDS))
    options_of.add_argument("--samples", type=int, default=256, help="of calibration (default: 256)")
    options_of.add_argument("--skip", nargs="*", choices=("kernels", "resnet20"), default=[])
    options_of.add_argument(
        "--images", type=Path, help="an .npz of CIFAR-10 images to calibrate ResNet-20 with"
    )
    add_model(options_of)
    add_workdir(options_of)
    options = options_of.parse_args()
    report = Report("emulated_boards", options)
    cache = options.workdir / "emulated-cache"
    sentences = Path(__file__).resolve().parents[1] / "demo" / "sentences.txt"
    models = {"MiniLM": (minilm(options.model), str(sentences))}
    if options.images is not None and "resnet20" not in options.skip:
        models["ResNet-20"] = (data("cifar10-resnet/resnet20.onnx"), str(options.images))
    set_up(report, cache, options.boards)
    rows: list[Any] = []
    kernels: list[Any] = []
    for board in options.boards:
        for name, bundle in bundles_of(board, models, options).items():
            work = (board, name, bundle, models[name.partition(" ")[0]][0])
            counted = count(report, cache, work)
            rows += counted if not rows or rows[-1][:2] != counted[0][:2] else counted[1:]
            if "kernels" not in options.skip:
                kernels.append((board, name, *_kernel_cells(*replay(report, cache, work))))
    report.table(
        "instructions of one inference, millions, one thread, imports and loading not counted",
        (
            *("board", "model", "form", "inputs", *_WIDE, "of it FP16", "of FP32", "golden samples"),
            "one command",
        ),
        rows,
    )
    if kernels:
        columns = ("board", "bundle", "kernels", "identical", "rounds otherwise", "wrong", "board from host")
        more = ("with Arm's sums", "host's own spread", "drift host", "drift board", "one command")
        report.table("every integer kernel on what it was fed here; relative L2", (*columns, *more), kernels)
    report.close()
    return 0 if all(row[5] == "0" for row in kernels) else 1


def _kernel_cells(document: dict[str, Any], took_s: float) -> tuple[str, ...]:
    """One row of the kernels' table: pieces, what became of them, and the whole model's distances."""
    report = document["devices"][0]["report"]
    kinds, end = report["kernels"], report["end_to_end"]
    identical = sum(item["identical"] for item in kinds)
    otherwise = sum(item["rounds_otherwise"] for item in kinds)
    fine = ("identical", "rounds otherwise")
    wrong = [unit for unit in report["units"] if unit["integer"] and unit["state"] not in fine]

    def l2(difference: dict[str, Any] | None) -> str:
        if difference is None:
            return ""
        return "identical" if difference["identical"] else f"{difference['relative_l2']:.2g}"

    return (
        str(document["replayed"]),
        str(identical),
        str(otherwise),
        str(len(wrong)),
        l2(end["from_here"]),
        l2(end["from_arm"]),
        f"{end['widest']:.2g}" if end["widest"] is not None else "",
        l2(end["drift_here"]),
        l2(end["drift_there"]),
        f"{took_s:.0f} s",
    )


if __name__ == "__main__":
    raise SystemExit(main())
