"""Time many jobs on a device: Python >= 3.8, numpy, onnxruntime, with remote_run.py and device_runner.py.

Called as `remote_jobs.py JOBS.npz`; writes jobs.json into the current folder. The jobs are timed by a
process of its own (`remote_jobs.py --work JOBS.npz FIRST`), so that a model that kills the runtime costs its
own times only.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

DONE = "done.jsonl"
RESULT = "jobs.json"


def main(archive: str) -> int:
    """Have all jobs timed, by another process where one dies; 4 if the runtime itself does not start."""
    done = Path(DONE)
    done.write_text("", encoding="utf-8")
    first = 0
    while True:
        words = [sys.executable, __file__, "--work", archive, str(first)]
        status = subprocess.run(words, check=False).returncode
        if status == 0:
            break
        begun = [entry["begun"] for entry in entries(done) if "begun" in entry]
        if status > 0 or not begun or begun[-1] < first:
            return 4
        name = signal_name(-status)
        add(done, {"index": begun[-1], "reason": "the runtime died of %s" % name})  # noqa: UP031
        first = begun[-1] + 1
    ended = [entry for entry in entries(done) if "index" in entry]
    Path(RESULT).write_text(json.dumps(ended), encoding="utf-8")
    return 0


def work(archive: str, first: int) -> int:
    """Time the jobs from `first` on, until the time is over; each is told before and after."""
    import numpy as np

    sys.path.insert(0, str(Path(__file__).parent))
    import device_runner  # type: ignore[import-not-found,unused-ignore] # lies beside this file on the device
    import remote_run  # type: ignore[import-not-found,unused-ignore]
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    kinds = [item for item in vars(state).values() if isinstance(item, type) and issubclass(item, Exception)]
    failures: tuple[type[Exception], ...] = (RuntimeError, ValueError, TypeError, MemoryError, *kinds)
    request, done = read_request(archive), Path(DONE)
    spent_s = sum(entry.get("elapsed_s", 0.0) for entry in entries(done))
    with np.load(archive, allow_pickle=False) as stored:
        for index, job in enumerate(request["jobs"]):
            if index < first:
                continue
            if spent_s >= request["budget_s"]:
                break
            add(done, {"begun": index})
            began_s = time.monotonic()
            try:
                found: dict[str, Any] = {"found": timed(job, stored, device_runner, remote_run)}
            except failures as error:
                found = {"reason": " ".join(str(error).split())[:500]}
            elapsed_s = time.monotonic() - began_s
            spent_s += elapsed_s
            add(done, {"index": index, "elapsed_s": elapsed_s, **found})
    return 0


def timed(job: Any, stored: Any, runner: Any, remote_run: Any) -> Any:
    """The latencies of one job's forms, by the device runner's own loop."""
    made, files = [], []
    for form in job["forms"]:
        feeds = {name: stored[array] for name, array in form["feeds"].items()}
        model = form.get("model")
        if model is None:  # from a file the runtime loads several times as fast as from memory
            files.append(Path("%s.onnx" % form["array"]).absolute())  # noqa: UP031
            stored[form["array"]].tofile(str(files[-1]))
            model = str(files[-1])
        opened = functools.partial(remote_run.open_timed, {**form, "model": model}, feeds)
        made.append(runner.Entry(form["name"], opened))
    try:
        return runner.time_entries(made, runner.Plan(**job["plan"]))
    finally:
        for file in set(files):
            file.unlink()


def read_request(archive: str) -> Any:
    """What is asked for: `jobs`, and `budget_s` after which no further one is begun."""
    import numpy as np

    with np.load(archive, allow_pickle=False) as stored:
        return json.loads(stored["request"].tobytes().decode())


def entries(path: Path) -> Any:
    """What was told so far; a line that a killed process left unfinished is none."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def add(path: Path, entry: Any) -> None:
    """One more line, written at once."""
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" + json.dumps(entry) + "\n")
        file.flush()
        os.fsync(file.fileno())


def signal_name(number: int) -> str:
    """A signal by its name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return "signal %d" % number  # noqa: UP031


if __name__ == "__main__":
    sys.exit(work(sys.argv[2], int(sys.argv[3])) if sys.argv[1] == "--work" else main(sys.argv[1]))
