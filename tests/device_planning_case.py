"""A board for the planner's tests: its programs run here, in folders of their own, without any connection."""

import shutil
import subprocess
import sys
from pathlib import Path

from edgepress.graph.errors import RuntimeUnavailable
from edgepress.runtimes.device import LocalDevice
from edgepress.runtimes.ort_runtime import OrtSession
from edgepress.runtimes.ssh_session import ProgramEnd
from edgepress.targets.host import read_host

KILLER = """
import os, signal
import real_run
def open_timed(form, feeds):
    if form["name"] == "kills":
        os.kill(os.getpid(), signal.SIGSEGV)
    return real_run.open_timed(form, feeds)
"""


class Board:
    """What `SshTimer` uses of a device, with this machine's processor and runtime.

    Args:
        folder: where its files lie.
        cut_after: so many programs run; then the connection is cut.
    """

    name, where, evidence = "board", "ssh://board", "measured-on-target"

    def __init__(self, folder, *, cut_after=None):
        self.folder, self.cut_after = folder, cut_after
        self.programs, self.copies, self.removed, self.bundles = [], [], [], []
        self.host = read_host()
        self.installed, self.interrupted, self.runner = True, False, None

    def host_facts(self):
        return self.host

    def features(self):
        assert self.installed, "nothing is installed on a device that does not fit"
        return LocalDevice().features()

    def put_files(self, files):
        place = self.folder / str(len(self.copies))
        self.copies.append(sorted(files))
        for name, path in files.items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place / name)
        if "remote_run.py" in files:
            (place / "remote_run.py").rename(place / "real_run.py")
            (place / "remote_run.py").write_text(KILLER)
            if self.runner is not None:
                (place / "device_runner.py").write_text(self.runner)
        return str(place)

    def put(self, files):
        base = files[0].parent
        folder = self.put_files({path.relative_to(base).as_posix(): path for path in files})
        return Path(folder) / files[0].name

    def remove_files(self, folder):
        self.removed.append(folder)
        shutil.rmtree(folder)

    def run(self, model, feeds, options):
        return OrtSession(model, options).run(feeds)

    def run_program(self, files, words, *, result="result.json", limit_s=None, keep=True):  # noqa: ARG002
        if self.cut_after is not None and len(self.programs) >= self.cut_after:
            raise RuntimeUnavailable("the connection to the device was cut", where=self.where)
        folder = self.put_files(files)
        self.programs.append(words[0].rpartition("/")[2])
        if self.interrupted:
            raise KeyboardInterrupt
        work = self.folder / f"run{len(self.programs)}"
        work.mkdir()
        words = [word.replace("{files}", folder, 1) for word in words]
        done = subprocess.run([sys.executable, *words], cwd=work, capture_output=True, text=True, check=False)
        found = work / result
        if not keep:
            self.remove_files(folder)
        return ProgramEnd(
            status=done.returncode,
            result=found.read_bytes() if found.is_file() else None,
            told=tuple(done.stderr.splitlines()),
            elapsed_s=1.0,
            clock_jump_s=0.0,
        )

    def run_bundle(self, bundle, commands, options=(), *, limit_s=None):  # noqa: ARG002
        self.bundles.append((tuple(commands), tuple(options)))
        outputs = {"samples": 3, "within_tolerance": True}
        return {"outputs": outputs, "void": False, "void_reasons": [], "notes": [], "error": None}
