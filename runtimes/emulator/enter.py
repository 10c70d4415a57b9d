"""Becomes a program on an emulated board: new namespaces, the board's file system, one program.

Runs in a Python of the host, alone: `python -I -S enter.py REQUEST READY GO`, with the request as JSON and
two file descriptors. A byte on READY says that the namespaces stand; a byte on GO, that users are mapped.
If the parent process ends, however it does, everything in here ends with it, unless the request says that
it stays.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

NO_NAMESPACE, NO_BINFMT, NO_MOUNT = 121, 122, 123  # exit statuses, before the board's program begins

_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000
_BIND, _REC, _PRIVATE, _NOSUID = 0x1000, 0x4000, 0x40000, 0x2
_PR_SET_PDEATHSIG = 1
# The first bytes of every AArch64 program, and which of their bits count (see elf(5) and binfmt_misc).
_MAGIC = r"\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00"
_MASK = r"\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff"

_libc = ctypes.CDLL(None, use_errno=True)


def main(words: list[str]) -> int:
    """Enter, run the program, and end as it ended."""
    request, ready, go = json.loads(words[0]), int(words[1]), int(words[2])
    if _libc.unshare(_NEWUSER | _NEWNS | _NEWPID | _NEWUTS | _NEWIPC) != 0:
        return _failed(NO_NAMESPACE, "new namespaces")
    if not request["stays"]:
        end_with_parent()  # new capabilities made the kernel forget it
    os.write(ready, b".")
    if os.read(go, 1) != b".":
        return NO_NAMESPACE
    child = os.fork()
    if child == 0:
        end_with_parent()
        os.close(ready)
        os.close(go)
        os._exit(_first_process(request))
    os.close(ready)
    os.close(go)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        # The first process of a namespace ignores what it does not handle: only this ends it surely.
        signal.signal(number, lambda *_: os.kill(child, signal.SIGKILL))
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _first_process(request: dict[str, Any]) -> int:
    """Start the program and wait for it; when this process ends, all others in the namespaces do.

    The program cannot be the first process itself: that one survives the signals that end others, and the
    emulator waits for ever for the one that shall end it.
    """
    program = os.fork()
    if program == 0:
        os._exit(_become(request))
    while True:
        ended, status = os.wait()  # also those whose parents are gone
        if ended == program:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def _become(request: dict[str, Any]) -> int:
    """The board's program in place of this one."""
    root, here = Path(request["root"]), Path(request["instance"])
    binfmt = here / "binfmt"
    try:
        _mount("none", Path("/"), None, _REC | _PRIVATE)
        _mount("binfmt_misc", binfmt, "binfmt_misc", 0)
        rule = f":edgepress:M::{_MAGIC}:{_MASK}:{request['launcher']}:FP"
        (binfmt / "register").write_text(rule, encoding="ascii")
    except OSError as error:
        return _failed(NO_BINFMT, f"{error.filename or binfmt}: {error.strerror}")
    try:
        _mount("/dev", root / "dev", None, _BIND | _REC)
        _mount("proc", root / "proc", "proc", 0)
        for source, name in request["binds"]:
            _mount(source, root / name, None, _BIND)
    except OSError as error:
        return _failed(NO_MOUNT, f"{error.filename}: {error.strerror}")
    _libc.sethostname(request["hostname"].encode(), len(request["hostname"]))
    os.chroot(root)
    os.chdir(request["folder"])
    try:
        os.execve(request["program"][0], request["program"], request["environment"])
    except OSError as error:
        return _failed(127, f"{request['program'][0]}: {error.strerror}")


def _mount(source: str, target: Path, kind: str | None, flags: int) -> None:
    of = None if kind is None else kind.encode()
    if _libc.mount(source.encode(), os.fsencode(target), of, ctypes.c_ulong(flags), None) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(target))


def end_with_parent() -> None:
    """Let the kernel end this process when its parent ends."""
    parent = os.getppid()
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended in between
        os._exit(1)


def _failed(status: int, what: str) -> int:
    number = ctypes.get_errno()
    why = f": {os.strerror(number)}" if number and ":" not in what else ""
    sys.stderr.write(f"{what}{why}\n")
    sys.stderr.flush()
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
