"""How long `edgepress --help` takes, and that it loads none of the heavy packages.

Fresh processes, interleaved: the bare interpreter, `edgepress --help`, and what importing onnxruntime
alone would cost.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

from edgepress.benchmarks.report import Report, parser, spread

CLAIMED_S = 0.3
HEAVY = ("torch", "onnxruntime", "transformers")
FORMS = {
    "python -c pass": ("-c", "pass"),
    "edgepress --help": ("-P", "-m", "edgepress", "--help"),
    "edgepress compile --help": ("-P", "-m", "edgepress", "compile", "--help"),
    "import onnxruntime": ("-c", "import onnxruntime"),
}
# Runs the command line in a fresh interpreter and then tells which packages it loaded.
_PROBE = """
import contextlib, io, json, sys
from edgepress.driver.cli import main
with contextlib.redirect_stdout(io.StringIO()):
    try:
        main(["--help"])
    except SystemExit:
        pass
print(json.dumps([sorted({name.partition(".")[0] for name in sys.modules}), len(sys.modules)]))
"""


def wall_s(words: tuple[str, ...]) -> float:
    """Wall time of one fresh interpreter with these arguments, in seconds."""
    started = time.perf_counter()
    subprocess.run([sys.executable, *words], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started


def loaded_packages() -> tuple[list[str], int]:
    """The heavy packages that `edgepress --help` loads, and how many modules it loads in all."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSTARTUP"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", _PROBE], stdout=subprocess.PIPE, text=True, check=True, env=environment
    )
    names, modules = json.loads(done.stdout)
    return [name for name in HEAVY if name in names], modules


def main() -> int:
    """Measure and print."""
    options_of = parser(__doc__)
    options_of.add_argument("--processes", type=int, default=20, help="processes of each form (default: 20)")
    options = options_of.parse_args()
    report = Report("startup", options)
    heavy, modules = loaded_packages()
    for words in FORMS.values():
        wall_s(words)
    times: dict[str, list[float]] = {name: [] for name in FORMS}
    for _ in range(options.processes):
        for name, words in FORMS.items():
            times[name].append(wall_s(words))
    figures = {name: spread(values) for name, values in times.items()}
    report.add("wall_s", figures)
    report.add("heavy_packages_loaded", heavy)
    report.add("modules_loaded", modules)
    report.table(
        f"wall time of a fresh process, {options.processes} each, interleaved",
        ("process", "median s", "lowest", "highest"),
        [
            (name, f"{item['median']:.3f}", f"{item['low']:.3f}", f"{item['high']:.3f}")
            for name, item in figures.items()
        ],
    )
    median_s = figures["edgepress --help"]["median"]
    report.text(
        f"\nedgepress --help: {median_s:.3f} s (claimed: under {CLAIMED_S} s), {modules} modules; "
        f"of {', '.join(HEAVY)} it loads {', '.join(heavy) or 'none'} (claimed: none)"
    )
    report.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
