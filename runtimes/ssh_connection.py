"""One connection to a device through the system's OpenSSH: shared by all calls, closed when done.

The user's configuration, agent, jump hosts and host-key checks hold; nothing of them is switched off.
Port forwardings and a RemoteCommand of the configuration are left out: they belong to other uses.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import os
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..graph.errors import RuntimeUnavailable
from .remote import DeviceUrl
from .ssh_call import Call, CallEnd, Log
from .ssh_errors import clean_lines, unreachable

_SSH_FAILED = 255
_NOT_FOUND = (126, 127)
_PERSIST_S = 60
_ALIVE_S, _ALIVE_COUNT = 15, 3
_LOGIN_S = 45.0  # on top of connecting: keys, agents and jump hosts
_LONGEST_SOCKET = 104  # of a path, on macOS; Linux has 108. ssh itself adds 17 while it makes one
_START = (
    "import sys;sys.path=[p for p in sys.path if p];"
    "import base64,zlib;exec(zlib.decompress(base64.b64decode(sys.argv[1])))"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SshSettings:
    """How a device is reached.

    Attributes:
        program: OpenSSH's client.
        config: a configuration file in place of the user's (ssh's -F).
        python: the Python of the device that everything starts with, 3.8 or later.
        connect_s: how long connecting may take.
        answer_s: how long the device may take for a short task.
        silence_s: after how long without a sign of us the device gives up what it does for us.
    """

    program: str = "ssh"
    config: Path | None = None
    python: str = "python3"
    connect_s: float = 15.0
    answer_s: float = 300.0
    silence_s: float = 90.0


class SshConnection:
    """One device, reached through one shared connection.

    Args:
        url: where it is.
        settings: how it is reached.
        agent: source text of the program that carries out the calls (see remote_agent.py).
    """

    def __init__(self, url: DeviceUrl, settings: SshSettings, agent: str) -> None:
        self.url = url
        self.settings = settings
        self._agent = base64.b64encode(zlib.compress(agent.encode(), 9)).decode()
        self.opened = 0
        """How often it was opened: a number that grew says that it was lost in between."""
        self._folder: Path | None = None
        self._closed = False

    @property
    def login(self) -> str:
        """What to type after `ssh` to try by hand."""
        words = [] if self.settings.config is None else ["-F", str(self.settings.config)]
        words += [] if self.url.port is None else ["-p", str(self.url.port)]
        return shlex.join([*words, self.url.destination])

    def open(self) -> None:
        """Connect and log in, unless the connection stands.

        Raises:
            RuntimeUnavailable: with what ssh's own words mean, if it cannot.
        """
        if self._closed:
            raise RuntimeUnavailable("the connection was closed here", where=str(self.url))
        if self.connected():
            return
        if shutil.which(self.settings.program) is None:
            raise RuntimeUnavailable(
                "OpenSSH's client is not on this machine",
                where=self.settings.program,
                remedy="install it (`sudo apt install openssh-client`), or use --device local",
            )
        if self._folder is None:
            self._folder = _private_folder()
        with tempfile.TemporaryFile() as stderr:
            # stderr is a file: the connection stays open in the background and would keep a pipe open too.
            try:
                status = subprocess.run(
                    self._words("true", share="auto"),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=stderr,
                    env=_environment(),
                    timeout=self.settings.connect_s + _LOGIN_S,
                    start_new_session=True,
                    check=False,
                ).returncode
            except subprocess.TimeoutExpired:
                raise self._unreachable("Connection timed out during the login") from None
            stderr.seek(0)
            told = stderr.read(1 << 16).decode(errors="replace")
        if status == _SSH_FAILED:
            raise self._unreachable(told)
        if status != 0:
            raise RuntimeUnavailable(
                "the device lets nobody run commands",
                where=str(self.url),
                why="; ".join([f"`true` ended with {status}", *filter(None, clean_lines(told))]),
                remedy=f"check that `ssh {self.login} true` works",
            )
        self.opened += 1

    def connected(self) -> bool:
        """Whether the connection stands (asks the ssh process here, not the device)."""
        if self._folder is None:
            return False
        return self._control("check") == 0

    def close(self) -> None:
        """Close the connection for good and remove what belongs to it here; may be called twice."""
        self._closed = True
        if self._folder is not None:
            self._control("exit")
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def call(
        self,
        action: str,
        request: Mapping[str, Any],
        *,
        stdin: Iterable[bytes] = (),
        limit_s: float | None = None,
        log: Log | None = None,
    ) -> CallEnd:
        """Let the device do one thing and wait for its answer.

        Args:
            action: what, by its name in remote_agent.py.
            request: what it needs to know, as plain values.
            stdin: bytes sent along.
            limit_s: seconds before it is given up; `answer_s` by default.
            log: told every line that the device writes meanwhile.

        Raises:
            RuntimeUnavailable: if there is no connection and none can be made.
        """
        with self.start(action, request, log=log) as call:
            sent = call.send(stdin)
            if sent is False:
                call.stop()
            return call.end(self.settings.answer_s if limit_s is None else limit_s)

    @contextlib.contextmanager
    def start(self, action: str, request: Mapping[str, Any], *, log: Log | None = None) -> Iterator[Call]:
        """Begin a call that goes on while the block runs; it is over at the latest when the block is.

        Raises:
            RuntimeUnavailable: if there is no connection and none can be made.
        """
        self.open()
        token = f"edgepress-{secrets.token_hex(16)}"
        document = json.dumps({**request, "action": action, "token": token}).encode()
        words = [self.settings.python, "-c", _START, self._agent, base64.b64encode(document).decode()]
        process = subprocess.Popen(
            self._words(shlex.join(words), share="no"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=_environment(),
            start_new_session=True,
        )
        call = Call(process, token, self.connected, log)
        try:
            yield call
        finally:
            call.stop()

    def _unreachable(self, told: str) -> RuntimeUnavailable:
        port = self.url.port
        key = self.url.host if port in (None, 22) else f"[{self.url.host}]:{port}"
        return unreachable(told, login=self.login, key=shlex.quote(key), where=str(self.url))

    def failed(self, end: CallEnd) -> RuntimeUnavailable:
        """The error for a call without an answer that is not about a lost connection."""
        told = [line for line in end.told if line]
        if end.late:
            return RuntimeUnavailable(
                "the device does not answer in time",
                where=str(self.url),
                why="it is connected, but the task it was given did not end",
                remedy="look at what it is busy with (`top`), or restart it, and try again",
            )
        if end.status in _NOT_FOUND:
            return RuntimeUnavailable(
                f"the device has no {self.settings.python}",
                where=str(self.url),
                why=told[-1] if told else None,
                remedy="install Python 3.8 or later there (`sudo apt install python3`), or name it with "
                "`python` in the devices file",
            )
        return RuntimeUnavailable(
            "Python on the device ended without an answer",
            where=str(self.url),
            why="; ".join([f"exit status {end.status}", *told[-3:]]),
            remedy=f"check that `ssh {self.login} {shlex.quote(self.settings.python)} --version` says 3.8 or "
            "later; a process that vanishes was mostly killed for want of memory (`dmesg`)",
        )

    def _words(self, command: str, *, share: str) -> list[str]:
        settings = self.settings
        options = {
            "BatchMode": "yes",
            "ConnectTimeout": str(max(1, round(settings.connect_s))),
            "ServerAliveInterval": str(_ALIVE_S),
            "ServerAliveCountMax": str(_ALIVE_COUNT),
            "ClearAllForwardings": "yes",
            "RemoteCommand": "none",
            "LogLevel": "ERROR",
            **self._sharing(share),
        }
        words = [settings.program, "-T"]
        words += [] if settings.config is None else ["-F", str(settings.config)]
        for name, value in options.items():
            words += ["-o", f"{name}={value}"]
        words += [] if self.url.port is None else ["-p", str(self.url.port)]
        return [*words, "--", self.url.destination, command]

    def _sharing(self, share: str) -> dict[str, str]:
        """Options of the shared connection."""
        if self._folder is None:
            return {}
        return {
            "ControlMaster": share,
            "ControlPath": f"{str(self._folder).replace('%', '%%')}/%C",
            "ControlPersist": str(_PERSIST_S),
        }

    def _control(self, command: str) -> int:
        """Ask the background process of the connection; not 0 if there is none."""
        words = self._words("", share="no")
        try:
            return subprocess.run(
                [*words[:-3], "-O", command, *words[-3:-1]],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=_environment(),
                timeout=10,
                start_new_session=True,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            return _SSH_FAILED


def _private_folder() -> Path:
    """A folder that only this user reads, with a path short enough for a socket in it."""
    short = Path("/tmp")  # macOS's own temporary folder has too long a name; mkdtemp makes both private
    places = [None, short] if sys.platform != "darwin" else [short, None]
    for place in places:
        with contextlib.suppress(OSError):
            folder = Path(tempfile.mkdtemp(prefix="edgepress-", dir=place))
            if len(str(folder)) + 1 + 40 + 17 < _LONGEST_SOCKET:
                return folder
            folder.rmdir()
    raise RuntimeUnavailable(
        "there is no place for the socket of the connection",
        where=tempfile.gettempdir(),
        why="the path of a socket must be shorter than 104 characters",
        remedy="set TMPDIR to a folder with a short path",
    )


def _environment() -> dict[str, str]:
    """The user's own, with messages in English: they are read."""
    return {**os.environ, "LC_ALL": "C"}
