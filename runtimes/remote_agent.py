"""What `SshDevice` runs on a device: one file, Python >= 3.8, the standard library only, Linux.

Its source travels in the command line of each call and is executed there, so nothing has to be
installed and nothing stays behind; what only some calls need is imported there, boards are slow. The
request is JSON in base64, so no shell can change it; the answer is one line of JSON on stdout behind a
token that only the caller knows, so that nothing a login script prints is taken for it.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Dict, List, Optional  # noqa: UP035 - Python 3.8 knows no dict[str, Any]

Request = Dict[str, Any]  # noqa: UP006
Reply = Dict[str, Any]  # noqa: UP006

CHUNK_BYTES = 1 << 18
LARGEST_RESULT_BYTES = 64 << 20
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MARK = "complete"
# What tells processor, caches, memory and board apart, below /.
FACTS = (
    *("proc/cpuinfo", "proc/meminfo", "proc/device-tree/model", "sys/firmware/devicetree/base/model"),
    *("sys/fs/cgroup/cpu.max", "sys/fs/cgroup/memory.max"),
    "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq",
    *(
        "sys/devices/system/cpu/cpu0/cache/index%d/%s" % (index, name)  # noqa: UP031 - plain for 3.8
        for index in range(5)
        for name in ("level", "type", "size", "shared_cpu_list")
    ),
)


def main(words: List[str]) -> None:  # noqa: UP006
    """Do what the request in `words[0]` asks for and answer; failures of the system are answers too."""
    request = json.loads(base64.b64decode(words[0]))
    try:
        answer = ACTIONS[request["action"]](request)
    except OSError as error:
        answer = {
            "error": errno.errorcode.get(error.errno or 0, "EIO"),
            "path": str(error.filename or ""),
            "reason": error.strerror or str(error),
        }
    except ValueError as error:
        answer = {"error": "EINVAL", "path": "", "reason": str(error)}
    say(request, answer)


def say(request: Request, answer: Reply) -> None:
    """Write one answer; a caller that is gone is no failure."""
    with contextlib.suppress(OSError):
        sys.stdout.write("\n" + request["token"] + " " + json.dumps(answer) + "\n")
        sys.stdout.flush()


def probe(request: Request) -> Reply:
    """What this device is, what Python has, and where files go; nothing is written."""
    import importlib.metadata
    import importlib.util
    import platform

    root = cache_root()
    packages = {}
    for name in ("onnxruntime", "onnxruntime-gpu", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    held = root
    while not held.exists():
        held = held.parent
    return {
        "root": str(root),
        "boot_id": boot_id(request),
        "system": platform.system(),
        "machine": platform.machine(),
        "python": list(sys.version_info[:3]),
        "executable": sys.executable,
        "modules": [name for name in ("pip", "ensurepip", "venv") if importlib.util.find_spec(name)],
        "packages": packages,
        "libc": list(platform.libc_ver()),
        "free_bytes": shutil.disk_usage(str(held)).free,
        "facts": {name: text for name in FACTS for text in [read_text("/" + name)] if text is not None},
        "environments": sorted(path.parent.name for path in root.glob("python/*/" + MARK)),
        "wall_s": time.time(),
    }


def cache_root() -> Path:
    """The folder that everything is kept in; it need not exist."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(named) if os.path.isabs(named) else Path.home() / ".cache"  # noqa: PTH117
    return base / "edgepress" / "device"


def read_text(path: str) -> Optional[str]:  # noqa: UP045
    """The file's text, None where there is none."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")[: 1 << 20]
    except OSError:
        return None


def boot_id(request: Request) -> str:
    """The number that the kernel draws at every start, empty where it has none."""
    return (read_text(request.get("boot_id_file", "/proc/sys/kernel/random/boot_id")) or "").strip()


def boot(request: Request) -> Reply:
    """Only the boot id."""
    return {"boot_id": boot_id(request)}


def hold(request: Request) -> Reply:
    """Hold the device for one caller until it closes stdin or is not heard of for `silence_s`.

    The kernel gives the lock back when this process ends, however it ends, and at a restart.
    """
    root = Path(request["root"])
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    deadline = time.monotonic() + request["wait_s"]
    with (root / "lock").open("a+", encoding="utf-8") as file:
        waiting = False
        while not locked(file):
            file.seek(0)
            holder = file.read(200)
            if time.monotonic() >= deadline:
                return {"state": "busy", "holder": holder}
            if not waiting:
                say(request, {"state": "waiting", "holder": holder})
                waiting = True
            if select.select([0], [], [], 0.2)[0] and not os.read(0, 4096):
                return {"state": "released"}
        file.truncate(0)
        file.write(request["holder"])
        file.flush()
        clean(root, request["keep_s"])
        say(request, {"state": "held", "boot_id": boot_id(request)})
        while heard(request["silence_s"]):
            pass
        file.truncate(0)
    return {"state": "released"}


def locked(file: Any) -> bool:
    """Take the lock if it is free."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def heard(silence_s: float) -> bool:
    """Wait for a sign of the caller; False when it closed stdin or was silent for too long."""
    return bool(select.select([0], [], [], silence_s)[0] and os.read(0, 4096))


def clean(root: Path, keep_s: float) -> None:
    """Remove what runs that were cut off left, and copies that nobody used for `keep_s`; under the lock."""
    shutil.rmtree(str(root / "runs"), ignore_errors=True)
    for folder in root.glob("python/*"):
        if not (folder / MARK).exists():
            shutil.rmtree(str(folder), ignore_errors=True)
    for folder in root.glob("files/*"):
        if folder.stat().st_mtime < time.time() - keep_s:
            shutil.rmtree(str(folder), ignore_errors=True)


def place(request: Request, name: str) -> Path:
    """Where a file of the request lies, always inside its folder."""
    path = Path(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ValueError("a file name leaves its folder: " + name)
    return Path(request["folder"]) / path


def compare(request: Request) -> Reply:
    """Size and SHA-256 of what lies here of each file, whole or in part."""
    folder = Path(request["folder"])
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    os.utime(str(folder))
    found = {}
    for name, size_bytes in request["files"].items():
        whole = place(request, name)
        part = part_of(whole)
        found[name] = {
            "whole": sha256(whole) if whole.is_file() and whole.stat().st_size == size_bytes else None,
            "part_bytes": part.stat().st_size if part.is_file() else 0,
            "part": sha256(part) if part.is_file() else None,
        }
    return {"files": found, "free_bytes": shutil.disk_usage(str(folder)).free}


def part_of(whole: Path) -> Path:
    """Where a file lies until all of it is here."""
    return whole.with_name(whole.name + ".part")


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for chunk in iter(lambda: file.read(CHUNK_BYTES), b""):
            digest.update(chunk)
    return digest.hexdigest()


def receive(request: Request) -> Reply:
    """Take files from stdin, one after the other, each from its offset on; say which arrived damaged."""
    damaged = []
    for wanted in request["files"]:
        state = receive_one(request, wanted)
        if state == "incomplete":  # the caller went away: what follows is not there either
            return {"state": state}
        if state == "damaged":
            damaged.append(wanted["name"])
    return {"state": "received", "damaged": damaged}


def receive_one(request: Request, wanted: Request) -> str:
    """Append stdin to the part that is here; put the file in place if it is whole and its hash holds."""
    whole = place(request, wanted["name"])
    part = part_of(whole)
    whole.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(str(part), os.O_RDWR | os.O_CREAT, 0o600)
    left = wanted["size_bytes"] - wanted["offset"]
    try:
        os.ftruncate(descriptor, wanted["offset"])
        os.lseek(descriptor, 0, os.SEEK_END)
        while left > 0:
            chunk = os.read(0, min(left, CHUNK_BYTES))
            if not chunk:
                break
            left -= len(chunk)
            view = memoryview(chunk)
            while view:
                view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    except OSError as error:
        if error.errno in FULL:  # a part that cannot grow only takes up room
            part.unlink()
        raise
    finally:
        os.close(descriptor)
    if left > 0:
        return "incomplete"
    if sha256(part) != wanted["sha256"]:
        part.unlink()
        return "damaged"
    os.replace(str(part), str(whole))  # noqa: PTH105 - pathlib's replace differs between releases
    return "whole"


def supervise(request: Request) -> Reply:
    """Run one program in a folder of its own until it ends, the limit is over or the caller is gone.

    Nothing of it stays: its process group is killed and its folder removed, also when the connection is cut.
    """
    import resource

    folder = Path(request["root"]) / "runs" / request["run"]
    folder.mkdir(parents=True, mode=0o700)
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))
    environment = dict(os.environ)
    environment["TMPDIR"] = str(folder)  # what a program that is killed leaves there goes with the folder
    environment.update(request["environment"])
    began_s, offset_s = time.monotonic(), time.time() - time.monotonic()
    try:
        try:
            process = subprocess.Popen(
                request["words"],
                cwd=str(folder),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=2,
                stderr=2,
                start_new_session=True,
            )
        except (FileNotFoundError, PermissionError) as error:
            return {"state": "missing", "reason": error.strerror, "path": request["words"][0]}
        state = wait(process, request)
        return {
            "state": state,
            "status": process.returncode,
            "signal": signal_name(process.returncode),
            "result": result_of(folder, request["result"]),
            "elapsed_s": time.monotonic() - began_s,
            "clock_jump_s": time.time() - time.monotonic() - offset_s,
            "boot_id": boot_id(request),
        }
    finally:
        shutil.rmtree(str(folder), ignore_errors=True)


def wait(process: subprocess.Popen[bytes], request: Request) -> str:
    """Wait for a program; why it ended: "ended", "limit" or "alone" (nobody listens any more)."""
    states = []

    def listen() -> None:
        while heard(request["silence_s"]):
            pass
        states.append("alone")
        stop(process)

    threading.Thread(target=listen, daemon=True).start()
    try:
        process.wait(request["limit_s"])
    except subprocess.TimeoutExpired:
        states.append("limit")
    stop(process)
    return states[0] if states else "ended"


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a program and all that it started: asked first, killed after three seconds."""
    with contextlib.suppress(ProcessLookupError):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(3)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def signal_name(status: int) -> Optional[str]:  # noqa: UP045
    """The signal that a program died of, also where a shell reports it as 128 + its number."""
    number = -status if status < 0 else status - 128
    try:
        return signal.Signals(number).name
    except ValueError:
        return None


def result_of(folder: Path, name: Optional[str]) -> Optional[str]:  # noqa: UP045
    """The file that a program wrote, in base64; None if it wrote none."""
    path = folder / name if name else None
    if path is None or not path.is_file():
        return None
    if path.stat().st_size > LARGEST_RESULT_BYTES:
        raise ValueError("the result is larger than %d bytes" % LARGEST_RESULT_BYTES)  # noqa: UP031
    return base64.b64encode(path.read_bytes()).decode()


def unpack(request: Request) -> Reply:
    """Unpack wheels beside each other, for a Python that has no pip; their own scripts are left out."""
    import zipfile

    site = Path(request["folder"]) / "site"
    shutil.rmtree(str(site), ignore_errors=True)
    site.mkdir(parents=True, mode=0o700)
    for wheel in request["wheels"]:
        try:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(str(site))
        except zipfile.BadZipFile as error:
            raise ValueError("%s: %s" % (wheel, error)) from error  # noqa: UP031
    for extra in [*site.glob("*.data/purelib"), *site.glob("*.data/platlib")]:
        for path in extra.iterdir():
            shutil.move(str(path), str(site / path.name))
    return {"site": str(site)}


def finish(request: Request) -> Reply:
    """Mark an environment as whole."""
    (Path(request["folder"]) / MARK).write_text("", encoding="utf-8")
    return {}


def remove(request: Request) -> Reply:
    """Remove folders of the cache."""
    root = Path(request["root"])
    for name in request["names"]:
        shutil.rmtree(str(place({"folder": str(root)}, name)), ignore_errors=True)
    return {}


ACTIONS = {
    action.__name__: action
    for action in (probe, boot, hold, compare, receive, supervise, unpack, finish, remove)
}

if __name__ == "__main__":
    main(sys.argv[2:])
