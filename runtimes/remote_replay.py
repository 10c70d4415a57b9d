"""Run many small models on a device, one after another: Python >= 3.8, numpy, onnxruntime, one process.

Called as `remote_replay.py REQUEST [BUNDLE]`; outputs and the report go into outputs.npz in the current
folder; the models and what they are fed are in units.zip beside the request. A model that does not load
or run is reported with the reason and stops no other; its number is on stderr before it is tried, so that
a model that kills the process can be told.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

MARK = "replaying unit"
REPORT = "report"
PACKED = "units.zip"


def main(request_path: str, bundle: str = ".") -> int:
    """Run every unit of the request; outputs by the names u0_s0_o0 (unit, sample, output)."""
    import numpy as np

    path = Path(request_path)
    request = json.loads(path.read_text(encoding="utf-8"))
    report = []
    with zipfile.ZipFile("outputs.npz", "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for unit in request["units"]:
            print(MARK, unit["index"], file=sys.stderr, flush=True)  # noqa: T201 - this is a program
            report.append(attempt(unit, request, path.parent, Path(bundle), archive))
        text = json.dumps(report).encode("utf-8")
        write(archive, REPORT, np.frombuffer(text, np.uint8))
    return 0


def attempt(unit: Any, request: Any, folder: Path, bundle: Path, archive: zipfile.ZipFile) -> Any:
    """Run one unit on all its samples; what ran, or why it did not."""
    failures = runtime_failures()
    told = {"index": unit["index"], "error": None, "kernels": {}, "outputs": 0, "samples": 0}
    try:
        session = open_session(unit, request, folder, bundle)
        for number, names in enumerate(unit["feeds"]):
            feeds = read_feeds(unit, folder, names)
            for place, value in enumerate(session.run(None, feeds)):
                write(archive, "u%d_s%d_o%d" % (unit["index"], number, place), value)  # noqa: UP031
            told["samples"] = number + 1
        told["outputs"] = len(session.get_outputs())
        told["kernels"] = kernels_of(session)
    except failures as error:
        told["error"] = " ".join(str(error).split())[:600] or type(error).__name__
    return told


def runtime_failures() -> Any:
    """What onnxruntime and numpy raise; onnxruntime's own types derive from nothing common."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    kinds = (item for item in vars(state).values() if isinstance(item, type))
    own = [item for item in kinds if issubclass(item, Exception)]
    return (RuntimeError, ValueError, TypeError, MemoryError, KeyError, *own)


def open_session(unit: Any, request: Any, folder: Path, bundle: Path) -> Any:
    """A session that notes which kernels it runs."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = request["threads"]
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    level = unit.get("level") or request["level"]
    if level is not None:
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    for key, value in request["config"].items():
        options.add_session_config_entry(key, value)
    options.enable_profiling = True
    options.profile_file_prefix = "kernels"
    if "file" in unit:
        model: Any = str(bundle / unit["file"])
    else:
        with zipfile.ZipFile(str(folder / PACKED)) as archive:
            model = archive.read(unit["model"])
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def read_feeds(unit: Any, folder: Path, names: Any) -> Any:
    """One sample: the files of its inputs, in order."""
    import numpy as np

    with zipfile.ZipFile(str(folder / PACKED)) as archive:
        arrays = [
            np.lib.format.read_array(io.BytesIO(archive.read(name)), allow_pickle=False) for name in names
        ]
    return dict(zip(unit["inputs"], arrays))  # noqa: B905 - Python 3.8 knows no strict


def kernels_of(session: Any) -> Any:
    """Operator -> how many kernels of it ran, by the runtime's own profile, over all samples."""
    found: Any = {}
    path = Path(session.end_profiling())
    events = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    for event in events:
        if event.get("cat") == "Node" and str(event.get("name", "")).endswith("_kernel_time"):
            name = event.get("args", {}).get("op_name", "?")
            found[name] = found.get(name, 0) + 1
    with contextlib.suppress(OSError):
        path.unlink()
    return found


def write(archive: zipfile.ZipFile, name: str, value: Any) -> None:
    """One array into the archive; text as fixed-width unicode."""
    import numpy as np

    array = np.asarray(value)
    if array.dtype == object:
        array = array.astype(str)
    member = io.BytesIO()
    np.lib.format.write_array(member, array, allow_pickle=False)
    archive.writestr(name + ".npy", member.getvalue())


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
