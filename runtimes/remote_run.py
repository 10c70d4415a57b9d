"""Run models once, or time them, on a device: Python >= 3.8, numpy, onnxruntime, device_runner.py beside it.

Called as `remote_run.py run|time REQUEST`; answers go into the current folder. The exit status is 3 if a
model fails to load or run, with the reason as the last line on stderr.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from pathlib import Path
from typing import Any


def main(what: str, request_path: str) -> int:
    """Do what the request asks for: outputs into outputs.npz, or latencies in nanoseconds into times.json."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    kinds = (item for item in vars(state).values() if isinstance(item, type))
    own = [item for item in kinds if issubclass(item, Exception)]
    failures: tuple[type[Exception], ...] = (RuntimeError, ValueError, TypeError, *own)
    path = Path(request_path)
    request = json.loads(path.read_text(encoding="utf-8"))
    try:
        if what == "run":
            run(request["forms"][0], path.parent)
        else:
            time_forms(request, path.parent)
    except failures as error:
        print(" ".join(str(error).split()), file=sys.stderr)  # noqa: T201 - this is a program
        return 3
    return 0


def run(form: Any, folder: Path) -> None:
    """One run in a fresh session."""
    import numpy as np

    session = open_session(form)
    names = [output.name for output in session.get_outputs()]
    values = session.run(names, read_feeds(form, folder))
    arrays = {"output_%d" % index: value for index, value in enumerate(values)}  # noqa: UP031
    np.savez("outputs.npz", names=np.array(names), **arrays)


def time_forms(request: Any, folder: Path) -> None:
    """Time forms against each other by the device runner's own loop."""
    sys.path.insert(0, str(folder))
    import device_runner  # type: ignore[import-not-found,unused-ignore] # lies beside this file on the device

    entries = [
        device_runner.Entry(form["name"], functools.partial(open_timed, form, read_feeds(form, folder)))
        for form in request["forms"]
    ]
    found = device_runner.time_entries(entries, device_runner.Plan(**request["plan"]))
    Path("times.json").write_text(json.dumps(found), encoding="utf-8")


def open_session(form: Any) -> Any:
    """A session of one form's options."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = form["threads"]
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    if form["level"] is not None:
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, form["level"])
    for key, value in form["config"].items():
        options.add_session_config_entry(key, value)
    return ort.InferenceSession(form["model"], options, providers=["CPUExecutionProvider"])


def open_timed(form: Any, feeds: Any) -> Any:
    """What runs a fresh session once, and how long opening it took in ms."""
    started = time.perf_counter_ns()
    session = open_session(form)
    load_ms = (time.perf_counter_ns() - started) / 1e6
    return functools.partial(session.run, None, feeds), load_ms


def read_feeds(form: Any, folder: Path) -> Any:
    """A form's inputs by name."""
    import numpy as np

    with np.load(str(folder / form["feeds"]), allow_pickle=False) as stored:
        return {name: stored["input_%d" % index] for index, name in enumerate(form["inputs"])}  # noqa: UP031


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
