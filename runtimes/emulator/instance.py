"""One emulated board that is switched on.

A whole board is a set of new namespaces: its own users, processes and mounts, with the kernel starting every
program of its architecture in the emulator, and an ssh server. Where the kernel or the user's rights do
not allow that, programs run in the emulator one by one, on the host's processes and files: enough for
outputs and counts.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...graph.errors import OutputError, RuntimeUnavailable
from ..remote import DeviceUrl
from .boards import EmulatedBoard
from .enter import NO_BINFMT, NO_MOUNT, NO_NAMESPACE, end_with_parent
from .folders import new_folder
from .install import Emulator
from .login import Login, configure_client, configure_server, make_keys
from .process import ProcessConnection, write_launcher
from .users import map_users

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_START_S = 60.0
_SITE, _PYTHON = "/opt/site", "/usr/bin/python3"
_REASONS = {
    NO_NAMESPACE: "this user may not make user namespaces here",
    NO_BINFMT: "this kernel has no binfmt_misc for user namespaces (Linux 6.7 and later have)",
    NO_MOUNT: "the board's file systems cannot be mounted here",
}


class BoardInstance:
    """One board: switched on by `open`, off by `close`, when its folder goes as well.

    Args:
        emulator: set up for this board.
        board: which.
        site: the board's Python packages (see `Emulator.site`); None for none.
        name: of its folder; one of its own by default.
        stays: leave it on when this process ends.
    """

    def __init__(
        self,
        emulator: Emulator,
        board: EmulatedBoard,
        site: Path | None,
        *,
        name: str | None = None,
        stays: bool = False,
    ) -> None:
        self.emulator = emulator
        self.board = board
        self.folder = emulator.instances / (name or f"{board.name}-{secrets.token_hex(4)}")
        self.why_not_whole: str | None = None
        """Why programs run one by one; None for a whole board."""
        self._site = site
        self._stays = stays
        self._lock: int | None = None
        self._server: subprocess.Popen[bytes] | None = None

    def open(self) -> None:
        """Switch the board on, without its ssh server.

        Raises:
            OutputError: if its folder cannot be made, or such a board is on already.
        """
        try:
            self._lock = new_folder(self.folder)
            for name in ("home/.ssh", "tmp", "run/sshd", "ssh", "binfmt"):
                (self.folder / name).mkdir(parents=True)
            (self.folder / "tmp").chmod(0o1777)
            (self.folder / "home").chmod(0o700)
        except OSError as error:
            self.close()
            raise OutputError(
                "the emulated board cannot be switched on",
                where=str(self.folder),
                why=error.strerror,
                remedy="`edgepress emulator status` shows what is on; `down` switches it off",
            ) from error
        try:
            self.why_not_whole = self._obstacle()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Switch it off: everything that runs on it ends, and its files go; may be called twice."""
        mine = self._lock is not None or self._server is not None
        if self._server is not None:
            _end(self._server)
            self._server = None
        if mine:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> BoardInstance:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def python(self) -> str:
        """The program on the board that is its Python."""
        return _PYTHON if self.why_not_whole is None else str(self.folder / "python3")

    @property
    def variables(self) -> dict[str, str]:
        """What its Python needs in the environment to find the runtime."""
        if self._site is None:
            return {}
        site = _SITE if self.why_not_whole is None else str(self._site)
        return {"PYTHONPATH": site, "PYTHONNOUSERSITE": "1"}

    def counting(self, name: str) -> tuple[dict[str, str], Path]:
        """The environment that lets programs count instructions, and the file here that they write to.

        Args:
            name: of the file, in the board's folder for temporary files.

        Raises:
            RuntimeUnavailable: if this board's emulator cannot count.
        """
        if not self.board.counts or not self.emulator.plugin.is_file():
            raise RuntimeUnavailable(
                f"instructions of {self.board.name} cannot be counted",
                why="this emulator takes no plugins" if not self.board.counts else "there was no C compiler",
                remedy="count on raspberry-pi-5, where onnxruntime chooses the same kernels"
                if not self.board.counts
                else "install gcc, then `edgepress emulator setup`",
            )
        whole = self.why_not_whole is None
        plugin = f"/opt/emulator/{self.emulator.plugin.name}" if whole else str(self.emulator.plugin)
        place = f"/tmp/{name}" if whole else str(self.folder / "tmp" / name)
        return {"QEMU_PLUGIN": f"{plugin},out={place}"}, self.folder / "tmp" / name

    def start_server(self) -> Login:
        """Start the board's ssh server, with keys of its own.

        Raises:
            RuntimeUnavailable: if it does not start, or this is no whole board.
        """
        if self.why_not_whole is not None:
            raise RuntimeUnavailable(
                "there is no ssh to this emulated board",
                where=self.board.name,
                why=self.why_not_whole,
                remedy="benchmark and verify with --device work without; for ssh use root and Linux 6.7 or "
                "later",
            )
        make_keys(self.folder)
        for attempt in range(3):
            port = configure_server(self.folder)
            if self._listen():
                break
            if attempt == 2 or "Address already in use" not in self._told():
                raise RuntimeUnavailable(
                    "the emulated board's ssh server does not start",
                    where=self.board.name,
                    why=(self._told().splitlines() or ["it ended without a word"])[-1],
                    remedy="`edgepress emulator check` tries the board step by step",
                )
        if self._stays:
            self._unlock()  # the server alone has the folder now, and gives it back when it ends
        return configure_client(self.folder, f"{self.board.name}-emulated", port, _PYTHON)

    def connect(self, url: DeviceUrl, agent: str) -> ProcessConnection:
        """The way to a board whose programs run one by one."""
        launcher = write_launcher(self.emulator, self.board, self.folder)
        return ProcessConnection(url, launcher, self.folder, agent)

    def run(
        self, words: Sequence[str], *, bind: Path | None = None, environment: Mapping[str, str] | None = None
    ) -> int:
        """Run one program on the board with this process's own terminal; its exit status.

        Args:
            words: the program and its arguments; found by the board's PATH, or for a board whose
                programs run one by one a path of the board's, python3 by default.
            bind: a folder here that is the program's working folder there.
            environment: variables on top of the board's own.

        Raises:
            RuntimeUnavailable: if the board cannot run programs.
        """
        own = self.variables | dict(environment or {})
        if self.why_not_whole is not None:
            launcher = write_launcher(self.emulator, self.board, self.folder)
            program = [str(launcher), *words[1:]] if Path(words[0]).name.startswith("python") else None
            if program is None:
                raise RuntimeUnavailable(
                    f"this board runs Python only, not {words[0]}",
                    why=self.why_not_whole,
                    remedy="run python3 SCRIPT, or use root and Linux 6.7 or later",
                )
            variables = process_environment(self.folder) | own
            done = subprocess.run(program, cwd=bind, env=variables, preexec_fn=end_with_parent, check=False)
            return done.returncode if done.returncode >= 0 else 128 - done.returncode
        shell = ["/bin/bash", "-c", 'exec "$@"', "bash", *words]
        process = self._enter(shell, binds=[] if bind is None else [(bind, "host")], environment=own)
        try:
            return process.wait()
        finally:
            _end(process)

    def output(self, words: Sequence[str], *, environment: Mapping[str, str]) -> str:
        """What a Python program on the board writes to stdout, or to stderr if it fails.

        Args:
            words: the board's Python (`python`), a script's path on the board, and its arguments.
            environment: variables on top of the board's own.
        """
        own = self.variables | dict(environment)
        if self.why_not_whole is not None:
            launcher = write_launcher(self.emulator, self.board, self.folder)
            process = subprocess.Popen(
                [str(launcher), *words[1:]],
                env=process_environment(self.folder) | own,
                preexec_fn=end_with_parent,  # noqa: PLW1509 - it only makes one system call
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        else:
            process = self._enter(
                words,
                environment=own,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        try:
            told, errors = process.communicate()
        finally:
            _end(process)
        return (told if process.returncode == 0 else errors).decode(errors="replace")

    def _obstacle(self) -> str | None:
        """Why this can be no whole board; found by trying."""
        if not self.emulator.launcher(self.board).is_file():
            return "there was no C compiler when it was set up"
        if os.geteuid() != 0 and shutil.which("newuidmap") is None:
            return "only root, or a user with newuidmap (package uidmap), can map the board's users"
        process = self._enter(["/bin/true"], stderr=subprocess.PIPE)
        told = process.communicate()[1].decode(errors="replace").strip()
        if process.returncode == 0:
            return None
        reason = _REASONS.get(process.returncode, f"a trial ended with {process.returncode}")
        return f"{reason}: {told}" if told else reason

    def _enter(
        self,
        program: Sequence[str],
        *,
        binds: Sequence[tuple[Path, str]] = (),
        environment: Mapping[str, str] | None = None,
        stdin: int | None = None,
        stderr: int | None = None,
        stdout: int | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a program in new namespaces of the board."""
        identity = self.emulator.identity(self.board)
        own = [(identity / "cpuinfo", "proc/cpuinfo"), (identity / "sys", "sys")]
        own += [(self.folder / name, place) for name, place in _OWN_FOLDERS]
        own += [] if self._site is None else [(self._site, _SITE.lstrip("/"))]
        request = {
            "root": str(self.emulator.root),
            "instance": str(self.folder),
            "launcher": str(self.emulator.launcher(self.board)),
            "binds": [(str(source), place) for source, place in (*own, *binds)],
            "hostname": f"{self.board.name}-emulated",
            "folder": "/host" if binds else "/",
            "program": list(program),
            "environment": {**_environment(), **(environment or {})},
            "stays": self._stays,
        }
        ready_here, ready_there = os.pipe()
        go_there, go_here = os.pipe()
        passed = [ready_there, go_there, *([] if self._lock is None else [self._lock])]
        words = [sys.executable, "-I", "-S", str(Path(__file__).with_name("enter.py")), json.dumps(request)]
        try:
            process = subprocess.Popen(
                [*words, str(ready_there), str(go_there)],
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                pass_fds=passed,
                start_new_session=self._stays,
            )
            os.close(ready_there)
            ready_there = -1
            if os.read(ready_here, 1) == b"." and map_users(process.pid):
                os.write(go_here, b".")
        finally:
            for number in (ready_here, ready_there, go_there, go_here):
                if number >= 0:
                    os.close(number)
        return process

    def _listen(self) -> bool:
        """Start the server and wait until it listens; False if it ended."""
        with (self.folder / "sshd.log").open("wb") as log:
            words = ["/usr/sbin/sshd", "-D", "-e", "-f", "/etc/ssh/sshd_config"]
            self._server = self._enter(
                words, stdin=subprocess.DEVNULL, stdout=log.fileno(), stderr=log.fileno()
            )
        (self.folder / "pid").write_text(str(self._server.pid), encoding="ascii")
        deadline = time.monotonic() + _START_S
        while "Server listening" not in self._told():
            if self._server.poll() is not None or time.monotonic() > deadline:
                _end(self._server)
                return False
            time.sleep(0.05)
        return True

    def _told(self) -> str:
        try:
            return (self.folder / "sshd.log").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""


_OWN_FOLDERS = (("home", "root"), ("tmp", "tmp"), ("run", "run"), ("ssh", "etc/ssh"))


def process_environment(folder: Path) -> dict[str, str]:
    """The environment of a board's programs that run one by one, with its files below `folder`."""
    return {
        "PATH": os.environ.get("PATH", _PATH),
        "HOME": str(folder / "home"),
        "XDG_CACHE_HOME": str(folder / "home/.cache"),
        "TMPDIR": str(folder / "tmp"),
        "LANG": "C.UTF-8",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OPENBLAS_NUM_THREADS": "1",  # threads that wait would be counted, too
    }


def _environment() -> dict[str, str]:
    return {
        "PATH": _PATH,
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "TERM": os.environ.get("TERM", "dumb"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OPENBLAS_NUM_THREADS": "1",  # threads that wait would be counted, too
    }


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
