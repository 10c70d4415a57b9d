"""What a compile costs: wall time and peak memory of its own process, and how memory grows with samples.

1. all-MiniLM-L6-v2 from .onnx for one target, 128 texts, drift and benchmark included.
2. Static calibration at 128 and at 1,024 samples, one method after another: edgepress's peak must not
   grow. Beside it onnxruntime's own calibrators on the same arrays, ended where they pass a memory limit.

Peak memory is VmHWM of each process itself, read by that process as its last act (Linux only).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from edgepress.benchmarks import places, sentence_accuracy
from edgepress.benchmarks.export_minilm import exported
from edgepress.benchmarks.report import Report, parser

CLAIMED_WALL_S, CLAIMED_PEAK_BYTES, CLAIMED_GROWTH = 60, 1.5e9, 0.05
METHODS = ("minmax", "percentile", "entropy", "mse")
PEER_METHODS = ("MinMax", "Percentile", "Entropy")
_POLL_S = 0.05
_HELD_OUT = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """How one process ended; `peak_bytes` is None where it did not live to tell."""

    outcome: str
    wall_s: float
    peak_bytes: int | None
    cpu_s: float | None = None

    @property
    def peak(self) -> str:
        """The peak for a table, or why there is none."""
        return self.outcome if self.peak_bytes is None else f"{self.peak_bytes / 1e6:.0f} MB"


def options_of_script() -> argparse.ArgumentParser:
    """The command line."""
    made = parser(__doc__)
    places.add_model(made)
    places.add_workdir(made)
    made.add_argument("--target", default="host", help="target of the compiles (default: host)")
    made.add_argument(
        "--samples", type=int, nargs=2, default=[128, 1024], metavar="N", help="(default: 128 1024)"
    )
    made.add_argument("--tokens", type=int, default=128, help="length of the arrays of part 2 (default: 128)")
    made.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    made.add_argument("--peer-methods", nargs="*", choices=PEER_METHODS, default=list(PEER_METHODS))
    made.add_argument(
        "--peer-limit-gb", type=float, default=6.0, help="memory at which a peer is ended (default: 6)"
    )
    made.add_argument(
        "--timeout", type=float, default=600.0, help="seconds a process may take (default: 600)"
    )
    made.add_argument("--skip", choices=("compile", "calibration"), action="append", default=[])
    return made


def edgepress_in_child(words: Sequence[str]) -> int:
    """Inside the measured process: the command line, as `python -m edgepress` runs it."""
    from edgepress.driver.cli import main as edgepress_main

    return edgepress_main(list(words))


def peer_in_child(words: Sequence[str]) -> int:
    """Inside the measured process: onnxruntime's `quantize_static` on arrays, products only.

    With its default operators the histogram calibrators fail on this model's attention mask.
    """
    from edgepress.benchmarks import peers

    model, output, arrays, method = words
    with np.load(arrays) as stored:
        samples = peers.stacked({name: stored[name] for name in stored.files})
    peers.quantize_static(Path(model), Path(output), samples, method=method, op_types=["MatMul"])
    return 0


def measured(kind: str, words: Sequence[str], *, timeout_s: float, limit_bytes: float | None = None) -> Cost:
    """Run one process of this script and wait for it, ending it at a memory or time limit."""
    with tempfile.TemporaryDirectory(prefix="compile-cost-") as folder:
        told, said = Path(folder) / "told.json", Path(folder) / "said"
        started = time.perf_counter()
        with said.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-P", __file__, "--child", kind, str(told), *words],
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            ended = _watch(process, started + timeout_s, limit_bytes)
        wall_s = time.perf_counter() - started
        if ended is not None:
            return Cost(outcome=ended, wall_s=wall_s, peak_bytes=None)
        if process.returncode != 0 or not told.is_file():
            last = said.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-4:]
            print("\n".join(last), file=sys.stderr)
            return Cost(outcome=f"failed ({process.returncode})", wall_s=wall_s, peak_bytes=None)
        found = json.loads(told.read_text())
        return Cost(outcome="done", wall_s=wall_s, **found)


def _watch(process: subprocess.Popen[bytes], until: float, limit_bytes: float | None) -> str | None:
    """Wait for the end; why the process was ended before, or None."""
    while process.poll() is None:
        reason = None
        if time.perf_counter() > until:
            reason = "over the time limit"
        elif limit_bytes is not None and _resident_bytes(process.pid) > limit_bytes:
            reason = f"over {limit_bytes / 1e9:g} GB"
        if reason is not None:
            process.kill()
            process.wait()
            return reason
        time.sleep(_POLL_S)
    return None


def _resident_bytes(process_id: int) -> int:
    try:
        for line in Path(f"/proc/{process_id}/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def child(kind: str, told: Path, words: Sequence[str]) -> int:
    """The measured process: do the work, then say what memory it took."""
    from edgepress.runtimes.cpu import peak_memory_bytes

    code = {"edgepress": edgepress_in_child, "peer": peer_in_child}[kind](words)
    found = {"peak_bytes": peak_memory_bytes(), "cpu_s": time.process_time()}
    told.write_text(json.dumps(found), encoding="utf-8")
    return code


def whole_compile(options: argparse.Namespace, model: Path, onnx: Path, report: Report) -> None:
    """Part 1: the compile that a user runs."""
    report.progress("compiling from .onnx with 128 samples")
    cost = measured(
        "edgepress",
        [
            *("compile", str(onnx), "--target", options.target, "--tokenizer", str(model)),
            *("--calib", str(places.data(places.CALIBRATION_TEXT)), "--samples", "128"),
            *("-o", str(options.workdir / f"minilm-cost-{options.target}"), "--overwrite", "-q"),
        ],
        timeout_s=options.timeout,
    )
    report.add("compile", dataclasses.asdict(cost))
    report.table(
        "compile MiniLM from .onnx, 128 samples, drift and benchmark included",
        ("", "claimed", "here"),
        [
            ("wall time", f"under {CLAIMED_WALL_S} s", f"{cost.wall_s:.1f} s"),
            ("peak memory of the process itself", f"under {CLAIMED_PEAK_BYTES / 1e9} GB", cost.peak),
        ],
    )


def write_samples(options: argparse.Namespace, model: Path, start: int, count: int) -> Path:
    """Texts `start` onwards of one shuffle as arrays of shape (count, tokens), in an .npz.

    They are cut and padded to one length: the histogram calibrators take nothing else.
    """
    texts = places.data(places.CALIBRATION_TEXT).read_text(encoding="utf-8").splitlines()
    order = np.random.default_rng(0).permutation(len(texts))[start : start + count]
    encoded = sentence_accuracy.tokenize([texts[index] for index in order], model, options.tokens)
    arrays = {
        name: np.concatenate(
            [np.pad(item[name], ((0, 0), (0, options.tokens - item[name].shape[1]))) for item in encoded]
        )
        for name in encoded[0]
    }
    path: Path = options.workdir / f"texts-{start}-{count}x{options.tokens}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, allow_pickle=False, **arrays)
    return path


def calibration_growth(options: argparse.Namespace, model: Path, onnx: Path, report: Report) -> None:
    """Part 2: peak memory at few and at many samples."""
    data = [write_samples(options, model, 0, count) for count in options.samples]
    held_out = write_samples(options, model, max(options.samples), _HELD_OUT)
    rows, figures = [], {}

    def compare(name: str, costs: Sequence[Cost]) -> None:
        few, many = (cost.peak_bytes for cost in costs)
        growth = many / few - 1 if few and many else None
        figures[name] = {"costs": [dataclasses.asdict(cost) for cost in costs], "growth": growth}
        shown = "" if growth is None else f"{growth:+.1%}"
        times = " / ".join("" if cost.cpu_s is None else f"{cost.cpu_s:.0f}" for cost in costs)
        rows.append((name, *(cost.peak for cost in costs), shown, times))

    for method in options.methods:
        report.progress(f"edgepress, static, {method}")
        compare(
            f"edgepress {method}", [_edgepress_static(options, onnx, path, held_out, method) for path in data]
        )
    for method in options.peer_methods:
        report.progress(f"onnxruntime, static, {method}")
        compare(f"ORT {method}, MatMul only", [_peer_static(options, onnx, path, method) for path in data])
    report.add("calibration", figures)
    report.table(
        f"static calibration, samples of {options.tokens} tokens: peak memory of the process itself",
        ("", *(f"{count} samples" for count in options.samples), "growth", "CPU s"),
        rows,
    )
    report.text(f"claimed of edgepress: growth within {CLAIMED_GROWTH:.0%}")


def _edgepress_static(
    options: argparse.Namespace, onnx: Path, data: Path, held_out: Path, method: str
) -> Cost:
    # Ranges alone, which is what the peer does: what a compile does beyond calibrating is part 1's.
    recipe = options.workdir / "minilm-cost-ranges.toml"
    switches = "\n".join(f"{name} = false" for name in ("learned-rounding", "equalize-channels"))
    recipe.write_text(f'target = "{options.target}"\n[fusions]\n{switches}\n', encoding="utf-8")
    # With data of its own for the evaluation none of the samples is held out.
    words = [
        *("compile", str(onnx), "--recipe", str(recipe), "--calib-method", method),
        *("--calib", str(data), "--eval", str(held_out)),
        *("--quantization", "static", "--precision", "int8", "--skip", "drift,benchmark,golden"),
        *("-o", str(options.workdir / "minilm-cost-static"), "--overwrite", "-q"),
    ]
    return measured("edgepress", words, timeout_s=options.timeout)


def _peer_static(options: argparse.Namespace, onnx: Path, data: Path, method: str) -> Cost:
    output = options.workdir / "minilm-cost-ort.onnx"
    return measured(
        "peer",
        [str(onnx), str(output), str(data), method],
        timeout_s=options.timeout,
        limit_bytes=options.peer_limit_gb * 1e9,
    )


def main(words: list[str]) -> int:
    """Both parts; with --child (only this script uses it) one measured process."""
    if words[:1] == ["--child"]:
        return child(words[1], Path(words[2]), words[3:])
    options: Any = options_of_script().parse_args(words)
    if not Path("/proc/self/status").is_file():
        raise SystemExit("peak memory is read from /proc: this script runs on Linux only")
    model = places.minilm(options.model)
    report = Report("compile_cost", options)
    onnx = exported(model, options.workdir)
    if "compile" not in options.skip:
        whole_compile(options, model, onnx, report)
    if "calibration" not in options.skip:
        calibration_growth(options, model, onnx, report)
    report.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
