"""Deny AMX to this process, so that AVX512-VNNI can be measured on a machine that also has AMX.

A Linux process must ask for AMX's tile registers: arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA). onnxruntime
asks when it is loaded and falls back to AVX512-VNNI where the answer is no. `deny` installs a seccomp
filter under which that one request fails with EPERM; every other system call passes. The filter is
inherited by child processes and cannot be taken off again.
"""

from __future__ import annotations

import ctypes
import platform
import struct
import sys
from pathlib import Path

_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 22, 38
_SECCOMP_MODE_FILTER = 2
_ARCH_PRCTL = 158
_ARCH_REQ_XCOMP_PERM = 0x1023
_XTILEDATA = 18
_AUDIT_ARCH_X86_64 = 0xC000003E
_ALLOW, _FAIL_WITH_EPERM = 0x7FFF0000, 0x00050001
# Classic BPF: load a word of `struct seccomp_data`, jump if equal, return.
_LOAD, _JUMP_EQUAL, _RETURN = 0x20, 0x15, 0x06
_NUMBER_OFFSET, _ARCH_OFFSET, _FIRST_ARGUMENT_OFFSET = 0, 4, 16


class _Program(ctypes.Structure):
    """`struct sock_fprog`."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def deny() -> None:
    """Make this process's requests for AMX fail; call it before onnxruntime is imported.

    Raises:
        SystemExit: if this is no x86-64 Linux, onnxruntime is loaded already, or the kernel says no.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise SystemExit("--no-amx works on x86-64 Linux only")
    if "onnxruntime" in sys.modules:
        raise SystemExit("--no-amx comes too late: onnxruntime is loaded already")
    # Each test either goes on with the next instruction or jumps to the final "allow".
    instructions = (
        (_LOAD, 0, 0, _ARCH_OFFSET),
        (_JUMP_EQUAL, 0, 5, _AUDIT_ARCH_X86_64),
        (_LOAD, 0, 0, _NUMBER_OFFSET),
        (_JUMP_EQUAL, 0, 3, _ARCH_PRCTL),
        (_LOAD, 0, 0, _FIRST_ARGUMENT_OFFSET),
        (_JUMP_EQUAL, 0, 1, _ARCH_REQ_XCOMP_PERM),
        (_RETURN, 0, 0, _FAIL_WITH_EPERM),
        (_RETURN, 0, 0, _ALLOW),
    )
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *item) for item in instructions))
    program = _Program(length=len(instructions), filter=ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    # Without privileges a filter is accepted only where exec can grant none either.
    for arguments in (
        (_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0),
    ):
        if libc.prctl(*arguments) != 0:
            raise SystemExit(f"the kernel refuses the filter that denies AMX: errno {ctypes.get_errno()}")


def state() -> str:
    """Whether a process like this one gets AMX: "absent", "denied" or "available" (found by asking)."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "absent"
    if "amx_tile" not in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").split():
        return "absent"
    libc = ctypes.CDLL(None, use_errno=True)
    granted = libc.syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XTILEDATA) == 0
    return "available" if granted else "denied"
