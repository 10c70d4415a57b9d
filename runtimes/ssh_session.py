"""A session on a device: its lock held, tasks and programs run, and every way that they end told apart."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import secrets
import shlex
import socket
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..graph.errors import EdgepressError, OutputError, RuntimeUnavailable
from .ssh_call import Call, CallEnd, Log, Reply
from .ssh_connection import SshConnection

_FULL = ("ENOSPC", "EDQUOT", "EFBIG")
_FULL_WORDS = ("No space left on device", "Disk quota exceeded", "File too large")
_CLOSED = ("EACCES", "EPERM", "EROFS")
_BEAT_S = 10.0
_RETRY_S = 3.0
_CLOCK_JUMP_S = 1.0
_KEEP_S = 30 * 86400.0
# Without it onnxruntime reports its use to its maker, and leaves files of its own in the cache folder.
_ENVIRONMENT = {"ORT_DISABLE_TELEMETRY": "1"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SessionLimits:
    """How long a session waits for what.

    Attributes:
        busy_s: for another run on the device to end.
        return_s: for a device that went away, to learn whether it was started anew.
        program_s: for one program.
        keep_s: copied files that nobody used for so long are removed from the device.
    """

    busy_s: float = 600.0
    return_s: float = 90.0
    program_s: float = 7200.0
    keep_s: float = _KEEP_S


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramEnd:
    """How a program on the device ended.

    Attributes:
        status: its exit status.
        result: the file that it was asked to write, None if it wrote none.
        told: the last lines of its output.
        elapsed_s: from start to end, by a clock that nobody sets.
        clock_jump_s: by how much the device's wall clock was set meanwhile; positive is forward.
    """

    status: int
    result: bytes | None
    told: tuple[str, ...]
    elapsed_s: float
    clock_jump_s: float


class SshSession:
    """One run's dealings with a device; no other run of edgepress disturbs it meanwhile.

    Args:
        connection: the way to it.
        limits: how long to wait.
        log: told what a person should know while it lasts.
        boot_id_file: where the device says which start of it this is; its kernel's own by default.
    """

    def __init__(
        self,
        connection: SshConnection,
        *,
        limits: SessionLimits | None = None,
        log: Log | None = None,
        boot_id_file: str | None = None,
    ) -> None:
        self.connection = connection
        self.where = str(connection.url)
        self._limits = limits or SessionLimits()
        self._log = log
        self._fixed: dict[str, Any] = {} if boot_id_file is None else {"boot_id_file": boot_id_file}
        self._open = contextlib.ExitStack()
        self._lock: Call | None = None
        self._held_at = 0
        self._closed = False
        self._boot_id = ""
        self._root = ""

    @property
    def root(self) -> str:
        """The folder on the device that everything is kept in; empty before `probe`."""
        return self._root

    def note(self, text: str) -> None:
        """Tell a person something."""
        if self._log is not None:
            self._log(text)

    def probe(self) -> Reply:
        """What the device is (see `remote_agent.probe`).

        Raises:
            RuntimeUnavailable: if it cannot be reached, has no Python, or is no Linux.
        """
        facts = self.ask("probe", {})
        self._root = facts["root"]
        self._boot_id = facts["boot_id"]
        if facts["system"] != "Linux":
            raise RuntimeUnavailable(
                f"the device runs {facts['system']}", where=self.where, remedy="devices by ssh run Linux"
            )
        return facts

    def hold(self) -> None:
        """Keep other runs off the device until `close`; waits for one that is there.

        Raises:
            RuntimeUnavailable: if another run stays for longer than `busy_s`, or the device goes away.
            OutputError: if the device's folder cannot be written.
        """
        if self._lock is not None:
            return
        settings, limits = self.connection.settings, self._limits
        request = {
            "root": self._root,
            "wait_s": limits.busy_s,
            "holder": f"{socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S %z')}",
            "keep_s": limits.keep_s,
            "silence_s": settings.silence_s,
        }
        call = self._open.enter_context(self.connection.start("hold", self._fixed | request))
        reply = call.next_reply(settings.answer_s)
        if reply is not None and reply.get("state") == "waiting":
            self.note(f"{self.where} is in use by {reply['holder'] or 'another run'}; waiting for it")
            reply = call.next_reply(limits.busy_s + settings.answer_s, after=1)
        if reply is None or reply.get("state") != "held":
            self._refused(call, reply)
        else:
            self._boot_id = reply["boot_id"]
            self._lock = call
            self._held_at = self.connection.opened
            over = threading.Event()
            self._open.callback(over.set)
            threading.Thread(target=_beat, args=(call, over), daemon=True).start()

    def close(self) -> None:
        """Give the device free and close the connection; may be called twice."""
        self._lock = None
        self._closed = True
        try:
            self._open.close()
        finally:
            self.connection.close()

    def ask(self, action: str, request: Mapping[str, Any], *, stdin: Iterable[bytes] = ()) -> Reply:
        """Let the device do one thing of remote_agent.py and give its answer.

        Raises:
            RuntimeUnavailable: if the device goes away, is started anew or does not answer.
            OutputError: if its disk is full or not writable.
        """
        with self.connection.start(action, self._fixed | dict(request)) as call:
            self._still_held(action)
            if not call.send(stdin):
                call.stop()
            end = call.end(self.connection.settings.answer_s)
        reply = self._answer(end, f"during {action!r}")
        if reply.get("state") == "incomplete":
            raise self._lost(f"during {action!r}", end)
        return reply

    def run_program(
        self,
        words: Sequence[str],
        *,
        result: str | None = None,
        environment: Mapping[str, str] | None = None,
        limit_s: float | None = None,
    ) -> ProgramEnd:
        """Run a program in an empty folder of its own, and bring back the file `result` that it writes there.

        The device ends the program when the connection is cut, and removes its folder in any case.

        Args:
            words: the program and its arguments; no shell reads them.
            result: a file name, relative to the program's folder.
            environment: variables on top of the login's own.
            limit_s: the program is ended after so many seconds.

        Raises:
            RuntimeUnavailable: if the program is missing, is ended by a signal or the limit, or the device
                goes away or is started anew meanwhile.
            OutputError: if the device's disk is full.
        """
        limit_s = self._limits.program_s if limit_s is None else limit_s
        settings = self.connection.settings
        request = {
            "root": self._root,
            "run": secrets.token_hex(8),
            "words": list(words),
            "environment": _ENVIRONMENT | dict(environment or {}),
            "result": result,
            "limit_s": limit_s,
            "silence_s": settings.silence_s,
        }
        with self.connection.start("supervise", self._fixed | request) as call:
            self._still_held("run")
            end = call.end(limit_s + settings.answer_s, beat=True)
        reply = self._answer(end, f"while {_short(words)} ran")
        return self._program_end(reply, words, end.told, limit_s)

    def _program_end(
        self, reply: Reply, words: Sequence[str], told: tuple[str, ...], limit_s: float
    ) -> ProgramEnd:
        program = _short(words)
        lines = [line for line in told if line]
        if reply["state"] == "missing":
            raise RuntimeUnavailable(
                f"the device has no program {reply['path']}",
                where=self.where,
                why=reply["reason"],
                remedy="name the Python of the device with `python` in the devices file",
            )
        if reply["state"] == "limit":
            raise RuntimeUnavailable(
                f"{program} was ended after {limit_s:g} s",
                where=self.where,
                why=lines[-1] if lines else "it did not end by itself",
                remedy="fewer rounds or runs take less time",
            )
        if reply["state"] == "alone":
            raise self._lost(f"while {program} ran", None)
        jump_s = float(reply["clock_jump_s"])
        if abs(jump_s) > _CLOCK_JUMP_S:
            self.note(
                f"the clock of {self.where} was set by {jump_s:+.1f} s meanwhile; latencies are not "
                "concerned, they come from a clock that nobody sets"
            )
        if reply["signal"] is not None:
            raise self._died(program, reply["signal"], lines)
        if reply["status"] != 0 and any(word in line for word in _FULL_WORDS for line in lines):
            raise self._full("\n".join(lines[-1:]))
        result = reply["result"]
        return ProgramEnd(
            status=reply["status"],
            result=None if result is None else base64.b64decode(result),
            told=told,
            elapsed_s=float(reply["elapsed_s"]),
            clock_jump_s=jump_s,
        )

    def _died(self, program: str, signal_name: str, lines: Sequence[str]) -> RuntimeUnavailable:
        last = f"; its last line: {lines[-1]}" if lines else ""
        if signal_name == "SIGILL":
            return RuntimeUnavailable(
                f"{program} died on the device with SIGILL (Illegal instruction)",
                where=self.where,
                why=f"the runtime was built for a processor with other instructions than this one has{last}",
                remedy="give the device a runtime that fits it: its wheels with --wheels DIR, or an earlier "
                f"onnxruntime; `edgepress doctor --device {self.where}` shows what the processor can do",
            )
        if signal_name == "SIGKILL":
            return RuntimeUnavailable(
                f"{program} was killed on the device",
                where=self.where,
                why=f"most often the memory is used up{last}",
                remedy=f"see `ssh {self.connection.login} dmesg`; use a smaller batch or model",
            )
        return RuntimeUnavailable(
            f"{program} died on the device with {signal_name}",
            where=self.where,
            why=f"the process crashed; the device itself and the connection are well{last}",
            remedy="try another version of the runtime there, and report the model if it stays so",
        )

    def _answer(self, end: CallEnd, when: str) -> Reply:
        """The answer of a call that is over, or the error that says why there is none."""
        if end.reply is None:
            if end.late or end.connected:
                raise self.connection.failed(end)
            raise self._lost(when, end)
        if "error" in end.reply:
            raise self._system_error(end.reply)
        return end.reply

    def _system_error(self, reply: Reply) -> EdgepressError:
        if reply["error"] in _FULL:
            return self._full(f"{reply['path']}: {reply['reason']}".lstrip(": "))
        if reply["error"] in _CLOSED:
            return OutputError(
                "the device's folder cannot be written",
                where=f"{self.where}, {reply['path'] or self._root}",
                why=reply["reason"],
                remedy="make it writable for this login, or set XDG_CACHE_HOME there to a folder that is",
            )
        return RuntimeUnavailable(
            "the device could not do it",
            where=f"{self.where}, {reply['path'] or self._root}",
            why=f"{reply['error']}: {reply['reason']}",
            remedy=f"check the device's disk and its log (`ssh {self.connection.login} dmesg`)",
        )

    def _full(self, why: str) -> OutputError:
        return OutputError(
            "the device's disk or quota is full",
            where=f"{self.where}, {self._root}",
            why=why or None,
            remedy=f"free some space there (`ssh {self.connection.login} df -h`): what edgepress keeps there "
            f"can all be removed with `ssh {self.connection.login} rm -r {shlex.quote(self._root)}`",
        )

    def full_for(self, needed_bytes: int, free_bytes: int) -> OutputError:
        """The error for files that do not fit on the device."""
        return self._full(f"{needed_bytes} bytes are to be copied, {free_bytes} are free")

    def _refused(self, call: Call, reply: Reply | None) -> None:
        if reply is not None and reply.get("state") == "busy":
            self._open.close()
            raise RuntimeUnavailable(
                "another run is on the device",
                where=self.where,
                why=f"it belongs to {reply['holder'] or 'somebody who did not say'}, and two at once would "
                "disturb each other's times",
                remedy=f"wait for it; it stayed longer than {self._limits.busy_s:g} s",
            )
        end = call.end(0.5)
        self._open.close()
        self._answer(end, "before the run")
        raise self.connection.failed(end)

    def _still_held(self, action: str) -> None:
        """A lock or a connection that is gone means that another run may have begun meanwhile."""
        kept = self._lock is None or (self._lock.running() and self.connection.opened == self._held_at)
        if not kept:
            self._lock = None
            raise self._lost(f"before {action!r}", None)

    def _lost(self, when: str, end: CallEnd | None) -> RuntimeUnavailable:
        """Whether a device that went away was started anew, is well, or stays away."""
        told = [line for line in end.told if line] if end is not None else []
        last = f"; the last line before: {told[-1]}" if told else ""
        self.note(f"the connection to {self.where} was lost; asking whether the device is still there")
        now, why = self._boot_id_now()
        if now is None:
            return RuntimeUnavailable(
                f"the device went away {when}",
                where=self.where,
                why=f"it did not come back within {self._limits.return_s:g} s ({why}){last}",
                remedy="check its power supply and network; the next attempt goes on with what was copied",
            )
        if self._boot_id and now != self._boot_id:
            return RuntimeUnavailable(
                f"the device restarted {when}",
                where=self.where,
                why=f"its boot id is another one now: it was not the program alone that stopped{last}",
                remedy="check the power supply (a Raspberry Pi under load needs its own) and the cooling, "
                "then try again",
            )
        return RuntimeUnavailable(
            f"the connection to the device was cut {when}",
            where=self.where,
            why=f"the device is up and was not restarted{last}",
            remedy="try again: a copy goes on where it stopped; a cable is steadier than a radio",
        )

    def _boot_id_now(self) -> tuple[str | None, str]:
        """The boot id once the device answers again; None and why, if it does not within `return_s`."""
        deadline = time.monotonic() + self._limits.return_s
        why = "the session was ended here"
        while not self._closed:
            try:
                end = self.connection.call("boot", self._fixed)
                if end.reply is not None:
                    return str(end.reply["boot_id"]), ""
                why = "no answer"
            except RuntimeUnavailable as error:
                why = error.what
            if time.monotonic() + _RETRY_S >= deadline:
                break
            time.sleep(_RETRY_S)
        return None, why


def _beat(call: Call, over: threading.Event) -> None:
    while not over.wait(_BEAT_S) and call.beat():
        pass


def _short(words: Sequence[str]) -> str:
    """A program by the name of its script."""
    script = next((word for word in words[1:] if word.endswith(".py")), words[0])
    return script.rpartition("/")[2]
