"""One call to a device: what is sent along, what it answers, and how it ends."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from typing import IO, Any

from .ssh_errors import clean_lines

Reply = dict[str, Any]
Log = Callable[[str], None]

_BEAT_S = 10.0
_KEPT_LINES = 40


@dataclasses.dataclass(frozen=True, kw_only=True)
class CallEnd:
    """How one call on the device ended.

    Attributes:
        reply: what was answered last; None if nothing was.
        status: the exit status of ssh.
        told: the last lines that ssh and the device wrote to stderr.
        connected: whether the connection stands now; taken as so where there is an answer.
        late: whether the call was given up after its limit.
    """

    reply: Reply | None
    status: int
    told: tuple[str, ...]
    connected: bool
    late: bool = False


class Call:
    """One running call: what it has answered so far, and how it ends."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        token: str,
        connected: Callable[[], bool],
        log: Log | None,
    ) -> None:
        self._process = process
        self._token = token
        self._connected = connected
        self._log = log
        self._told: list[str] = []
        self._replies: list[Reply] = []
        self._news = threading.Condition()
        assert process.stdout is not None
        assert process.stderr is not None
        self._readers = [
            threading.Thread(target=self._read, args=(process.stdout, self._hear), daemon=True),
            threading.Thread(target=self._read, args=(process.stderr, self._note), daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def send(self, chunks: Iterable[bytes]) -> bool:
        """Send bytes and then the end of them; False if nobody takes them any more."""
        stdin = self._process.stdin
        assert stdin is not None
        try:
            for chunk in chunks:
                stdin.write(chunk)
            stdin.close()
        except OSError:
            return False
        return True

    def next_reply(self, limit_s: float, *, after: int = 0) -> Reply | None:
        """The answer number `after` once it is there; None if it does not come."""
        deadline = time.monotonic() + limit_s
        with self._news:
            while len(self._replies) <= after:
                if not any(reader.is_alive() for reader in self._readers):
                    break
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    return None
                self._news.wait(min(left_s, 0.2))
            return self._replies[after] if len(self._replies) > after else None

    def end(self, limit_s: float, *, beat: bool = False) -> CallEnd:
        """Wait until it is over; it is given up after `limit_s` seconds.

        With `beat` the device is told every few seconds that somebody still waits.
        """
        deadline, late = time.monotonic() + limit_s, False
        while True:
            left_s = deadline - time.monotonic()
            try:
                self._process.wait(max(0.0, min(left_s, _BEAT_S)))
                break
            except subprocess.TimeoutExpired:
                if left_s <= 0:
                    late = True
                    break
                if beat:
                    self.beat()
        self.stop()
        return CallEnd(
            reply=self._replies[-1] if self._replies else None,
            status=self._process.returncode,
            told=tuple(self._told),
            connected=bool(self._replies) or self._connected(),
            late=late,
        )

    def beat(self) -> bool:
        """Tell the device that somebody still waits; False if the connection is gone."""
        stdin = self._process.stdin
        assert stdin is not None
        try:
            stdin.write(b".")
            stdin.flush()
        except (OSError, ValueError):
            return False
        return True

    def running(self) -> bool:
        """Whether it goes on, as far as is known here."""
        return self._process.poll() is None

    def stop(self) -> None:
        """End it: the device sees the end of its input and stops what it does."""
        stdin = self._process.stdin
        if stdin is not None and not stdin.closed:
            with contextlib.suppress(OSError):
                stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for reader in self._readers:
            reader.join(5)

    def _read(self, stream: IO[bytes], take: Callable[[str], None]) -> None:
        with stream:
            for line in stream:
                take(line.decode(errors="replace"))
        with self._news:
            self._news.notify_all()

    def _hear(self, line: str) -> None:
        token, _, document = line.partition(" ")
        if token != self._token:
            return
        with self._news:
            self._replies.append(json.loads(document))
            self._news.notify_all()

    def _note(self, text: str) -> None:
        for line in clean_lines(text):
            self._told = [*self._told, line][-_KEPT_LINES:]
            if self._log is not None and line:
                self._log(line)
