"""The device runner: checks and measures a bundle on the board itself, with numpy and the runtime only.

It is one file, and longer than the others, because a bundle carries it as it is: the board has neither
edgepress nor a network, and one file is copied, read and hashed as one thing. For the same reason it keeps
to Python 3.8, has exit codes and errors of its own (those of the product), and imports nothing of edgepress;
edgepress imports from here, so that percentiles and early stopping are written once. In order:

    1. errors and JSON               6. statistics: percentiles, intervals, early stopping
    2. the bundle and its hashes     7. timing
    3. the device                    8. meters of power, clocks and throttling
    4. the runtime, probed in a      9. MLPerf scenarios
       process of its own           10. the command line
    5. inputs, sessions, golden samples

    python device_runner.py              check the hashes, probe the runtime, run the golden samples, time
    python device_runner.py check        only the first two of these
    python device_runner.py scenario --scenario SingleStream --out result.json

Exit codes: 0 ok, 2 wrong usage, 3 a check failed or the run is void, 4 the runtime is not usable here,
130 interrupted. The result's form is published as docs/benchmark.schema.json.
"""

# Python 3.8 has no strict zip; ruff looks at the package's newer version.
# ruff: noqa: B905

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import functools
import gc
import hashlib
import importlib
import importlib.util
import json
import math
import os
import platform
import queue
import random
import re
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    Feeds = Mapping[str, Any]
    Command = Callable[[Sequence[str], float], "str | None"]

SCHEMA_VERSION = 1
FORMAT = "edgepress-device-run"

# --------------------------------------------------------------------------------------------------
# 1. Errors and JSON

EXIT_OK, EXIT_BUG, EXIT_USER, EXIT_CHECK, EXIT_UNAVAILABLE, EXIT_INTERRUPTED = 0, 1, 2, 3, 4, 130


class RunnerError(Exception):
    """A failure that says what happened, why, and what to do next."""

    exit_code = EXIT_BUG

    def __init__(self, what: str, *, why: str = "", remedy: str = "") -> None:
        super().__init__(what)
        self.what, self.why, self.remedy = what, why, remedy

    def __str__(self) -> str:
        """The three parts, a line each."""
        parts = (("error: ", self.what), ("  why: ", self.why), ("  fix: ", self.remedy))
        return "\n".join(label + text for label, text in parts if text)


class WrongUsage(RunnerError):
    """Something that was passed in is wrong."""

    exit_code = EXIT_USER


class BundleBroken(RunnerError):
    """The bundle is not what it says, or its outputs are not."""

    exit_code = EXIT_CHECK


class RuntimeUnusable(RunnerError):
    """The runtime is missing here, dies here, or cannot run this model."""

    exit_code = EXIT_UNAVAILABLE


class ChildFailed(RuntimeUnusable):
    """A child process ended without the report that it was started for; `end` says how."""

    def __init__(self, what: str, end: ChildEnd) -> None:
        super().__init__(f"{what} ends with {end.ending}", why=end.message)
        self.end = end


def dump_json(value: Any) -> str:
    """A value as indented JSON with sorted keys and a final newline, spelled as edgepress itself spells it.

    Equal spelling matters for runs/*.json, whose digest is taken over the text. Numbers that are not
    finite become null.
    """
    return _json(value, "") + "\n"


def _json(value: Any, indent: str) -> str:
    deeper = indent + "  "
    if isinstance(value, dict):
        if not value:
            return "{}"
        items = [f"{deeper}{_json(key, deeper)}: {_json(value[key], deeper)}" for key in sorted(value)]
        return "{\n" + ",\n".join(items) + "\n" + indent + "}"
    if isinstance(value, (list, tuple)):
        if not value:
            return "[]"
        return "[\n" + ",\n".join(deeper + _json(item, deeper) for item in value) + "\n" + indent + "]"
    if isinstance(value, float):
        return _json_float(value)
    return json.dumps(value, ensure_ascii=False)


def _json_float(value: float) -> str:
    if not math.isfinite(value):
        return "null"
    text = repr(value)
    if "e" not in text:
        return text
    mantissa, _, exponent = text.partition("e")
    if int(exponent) != -5:
        return f"{mantissa}e{int(exponent)}"
    sign, digits = ("-", mantissa[1:]) if mantissa.startswith("-") else ("", mantissa)
    return f"{sign}0.0000{digits.replace('.', '')}"


# --------------------------------------------------------------------------------------------------
# 2. The bundle and its hashes

SUMS_NAME, RUNS_NAME, MANIFEST_NAME = "SHA256SUMS", "runs", "manifest.json"
_SUM_LINE = re.compile(r"(?P<digest>[0-9a-f]{64})  (?P<name>[^\n]+)")
_RUN_NAME = re.compile(r"runs/[A-Za-z0-9][A-Za-z0-9._-]*\.json")
_BLOCK_BYTES = 1 << 20
_MANIFEST_LIMIT_BYTES = 64 << 20


def is_safe_name(name: str) -> bool:
    """Whether `name` is a plain relative path with forward slashes that stays in its folder."""
    plain = name.isprintable() and "\\" not in name and ":" not in name
    return plain and all(part not in {"", ".", ".."} for part in name.split("/"))


def parse_sums(data: bytes) -> dict[str, str]:
    """Name → SHA-256 of a SHA256SUMS file.

    Raises:
        ValueError: naming the first line that is malformed, leaves the folder, repeats or is out of order.
    """
    text = data.decode("utf-8")
    if not text.endswith("\n"):
        raise ValueError("the last line is incomplete")
    digests: dict[str, str] = {}
    previous = ""
    for number, line in enumerate(text[:-1].split("\n"), 1):
        match = _SUM_LINE.fullmatch(line)
        if match is None:
            raise ValueError(f"line {number} is not '<digest>  <file>'")
        name = match["name"]
        if not is_safe_name(name) or name == SUMS_NAME or name.split("/")[0] == RUNS_NAME:
            raise ValueError(f"line {number}: {name!r} is no file that the sums may cover")
        if name <= previous:
            raise ValueError(f"line {number}: {name!r} is repeated or out of order")
        digests[name] = match["digest"]
        previous = name
    return digests


def check_sums(root: Path) -> list[str]:
    """What is wrong with the files of a bundle, one line each; nothing if all is as it was written.

    Every file must be listed, regular, present and of its digest; besides the sums only runs/*.json exist.
    """
    try:
        digests = parse_sums((root / SUMS_NAME).read_bytes())
    except OSError as error:
        return [f"{SUMS_NAME}: {error.strerror or 'cannot be read'}"]
    except ValueError as error:
        return [f"{SUMS_NAME}: {error}"]
    files, others = _list_files(root)
    problems = [f"{name}: not a regular file" for name in sorted(others)]
    present = {name for name in files if name != SUMS_NAME and not _RUN_NAME.fullmatch(name)}
    problems += [f"{name}: not listed in {SUMS_NAME}" for name in sorted(present - set(digests))]
    for name, digest in digests.items():
        if name in present:
            try:
                if file_digest(root / name) != digest:
                    problems.append(f"{name}: contents have changed (SHA-256 differs)")
            except OSError as error:
                problems.append(f"{name}: {error.strerror or 'cannot be read'}")
        elif name not in others:
            problems.append(f"{name}: missing")
    return problems


def file_digest(path: Path) -> str:
    """The SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(_BLOCK_BYTES), b""):
            digest.update(block)
    return digest.hexdigest()


def _list_files(root: Path) -> tuple[set[str], set[str]]:
    """Regular files below `root`, and what is neither file nor folder; links are not followed."""
    files, others = set(), set()
    for folder, folders, names in os.walk(str(root)):
        for name in (*names, *folders):
            path = Path(folder) / name
            relative = path.relative_to(root).as_posix()
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                others.add(relative)
            elif path.is_file():
                files.add(relative)
    return files, others


@dataclasses.dataclass(frozen=True)
class Bundle:
    """A bundle's folder with its manifest, as plain values."""

    root: Path
    manifest: dict[str, Any]

    @property
    def model_file(self) -> Path:
        """The .onnx file."""
        return self.root / str(self.manifest["model"]["files"][0])

    @property
    def size_bytes(self) -> int:
        """The bytes of the model's files."""
        return sum((self.root / name).stat().st_size for name in self.manifest["model"]["files"])

    @property
    def digest(self) -> str:
        """What stands for the whole bundle: the SHA-256 of its SHA256SUMS."""
        return file_digest(self.root / SUMS_NAME)

    @property
    def runtime(self) -> str:
        """The target's runtime by name."""
        return str(self.manifest.get("target", {}).get("runtime", "onnxruntime"))

    @property
    def versions(self) -> dict[str, str]:
        """What the bundle was made and checked with."""
        return dict(self.manifest.get("versions", {}))

    def options(self, threads: int) -> SessionSettings:
        """How its sessions are opened."""
        settings = self.manifest.get("session_options", {})
        return SessionSettings(
            threads=threads,
            level=settings.get("graph_optimization_level"),
            config=dict(settings.get("config", {})),
        )


def open_bundle(root: Path) -> Bundle:
    """The bundle in a folder; its files are not checked yet.

    Raises:
        WrongUsage: if it is no bundle.
        BundleBroken: if its manifest is damaged or names files outside of it.
        RuntimeUnusable: if it was written by a newer edgepress.
    """
    path = root / MANIFEST_NAME
    try:
        if path.stat().st_size > _MANIFEST_LIMIT_BYTES:
            raise BundleBroken(f"{MANIFEST_NAME} is larger than a manifest can be")
        manifest = json.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise WrongUsage(
            f"not an edgepress bundle: {root}",
            why=f"{MANIFEST_NAME}: {error.strerror}",
            remedy="run this inside a bundle, or name one with --bundle",
        ) from error
    except ValueError as error:
        raise BundleBroken(f"{MANIFEST_NAME} is damaged", why=str(error), remedy=_COPY_AGAIN) from error
    _require_manifest(manifest)
    return Bundle(root, manifest)


_COPY_AGAIN = "copy the bundle again from where it came from; do not use it as it is"


def _require_manifest(manifest: Any) -> None:
    if not isinstance(manifest, dict) or manifest.get("format") != "edgepress-bundle":
        raise BundleBroken(f"{MANIFEST_NAME} is not a bundle's", remedy=_COPY_AGAIN)
    version = manifest.get("schema_version")
    if version != 1:
        raise RuntimeUnusable(
            f"the bundle has schema version {version}, this runner reads 1",
            remedy="use the runner inside the bundle",
        )
    try:
        model, golden = manifest["model"], manifest.get("golden") or {"samples": ()}
        specs = [*model["inputs"], *model["outputs"]]
        names = [*model["files"], *(str(file) for sample in golden["samples"] for file in sample.values())]
        whole = bool(model["files"]) and all(
            isinstance(spec["name"], str) and spec["dtype"] for spec in specs
        )
        for key, value in manifest.get("session_options", {}).get("config", {}).items():
            if "/" in value or "\\" in value or not key.isprintable():
                raise ValueError(f"the session option {key!r} names a file")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise BundleBroken(f"{MANIFEST_NAME} is damaged", why=repr(error), remedy=_COPY_AGAIN) from error
    unsafe = [name for name in names if not isinstance(name, str) or not is_safe_name(name)]
    if unsafe or not whole:
        raise BundleBroken(
            f"{MANIFEST_NAME} names no model, or a file outside of the bundle",
            why=str(unsafe),
            remedy=_COPY_AGAIN,
        )


def keep_run(bundle: Bundle, payload: dict[str, Any], name: str = "device") -> Path:
    """Add a result to the bundle's runs/, bound to its digest, in the form that `edgepress verify` reads."""
    record = {"schema_version": 1, "name": name, "bundle": bundle.digest}
    bare = _record(record, payload, "")
    text = _record(record, payload, hashlib.sha256(bare.encode("utf-8")).hexdigest())
    folder = bundle.root / RUNS_NAME
    folder.mkdir(exist_ok=True)
    for number in range(1, 100_000):
        path = folder / (f"{name}.json" if number == 1 else f"{name}-{number}.json")
        try:
            with path.open("x", encoding="utf-8", newline="\n") as file:
                file.write(text)
        except FileExistsError:
            continue
        return path
    raise WrongUsage(f"{folder} is full of runs", remedy="move some away")


def _record(head: dict[str, Any], payload: dict[str, Any], digest: str) -> str:
    # The fields of the record stand in this order; the payload's keys are sorted.
    parts = [*head.items(), ("payload", payload), ("sha256", digest)]
    lines = [f'  "{key}": {_json(value, "  ")}' for key, value in parts]
    return "{\n" + ",\n".join(lines) + "\n}\n"


# --------------------------------------------------------------------------------------------------
# 3. The device

_AT_HWCAP, _AT_HWCAP2 = 16, 26
# Bits of AT_HWCAP and AT_HWCAP2 on 64-bit Arm, from the kernel's asm/hwcap.h.
_ARM_HWCAP = (
    *(
        "fp",
        "asimd",
        "evtstrm",
        "aes",
        "pmull",
        "sha1",
        "sha2",
        "crc32",
        "atomics",
        "fphp",
        "asimdhp",
        "cpuid",
    ),
    *("asimdrdm", "jscvt", "fcma", "lrcpc", "dcpop", "sha3", "sm3", "sm4", "asimddp", "sha512", "sve"),
    *("asimdfhm", "dit", "uscat", "ilrcpc", "flagm", "ssbs", "sb", "paca", "pacg"),
)
_ARM_HWCAP2 = (
    *(
        "dcpodp",
        "sve2",
        "sveaes",
        "svepmull",
        "svebitperm",
        "svesha3",
        "svesm4",
        "flagm2",
        "frint",
        "svei8mm",
    ),
    *("svef32mm", "svef64mm", "svebf16", "i8mm", "bf16", "dgh", "rng", "bti", "mte", "ecv", "afp", "rpres"),
    *("mte3", "sme"),
)
_EMULATED = re.compile(r"emulated|qemu", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Probe:
    """Where readers read: a root folder and a way to run commands, so that they read recorded boards too.

    Attributes:
        root: what stands for "/".
        command: runs a program for at most so many seconds; its output, or None if it failed or is not there.
        gpus: gives NVML; this machine's own by default, none for a recorded board.
    """

    root: Path = Path("/")
    command: Command | None = None
    gpus: Callable[[], Nvml | None] | None = None

    def nvml(self) -> Nvml | None:
        """NVIDIA's management library where there are GPUs."""
        if self.gpus is not None:
            return self.gpus()
        return load_nvml() if self.root == Path("/") else None

    def text(self, path: str | Path) -> str | None:
        """The stripped text of a file below the root; None if it cannot be read."""
        try:
            raw = (self.root / str(path).lstrip("/") if isinstance(path, str) else path).read_bytes()
        except (OSError, ValueError):
            return None
        return raw.decode("utf-8", "replace").strip("\0\n \t")

    def number(self, path: str | Path) -> int | None:
        """The whole number in a file; None if there is none."""
        text = self.text(path)
        return int(text) if text is not None and re.fullmatch(r"-?\d+", text) else None

    def glob(self, pattern: str) -> list[Path]:
        """Paths below the root that match, sorted."""
        try:
            return sorted(self.root.glob(pattern.lstrip("/")))
        except OSError:
            return []

    def run(self, *argv: str, timeout_s: float = 5.0) -> str | None:
        """The output of a program; None if it failed or is not there."""
        return (self.command or run_command)(argv, timeout_s)


def run_command(argv: Sequence[str], timeout_s: float) -> str | None:
    """The output of a program, one that never ends cut off after its first line; None if there is none.

    Args:
        argv: the program and its arguments.
        timeout_s: it is ended after so many seconds.
    """
    try:
        process = subprocess.Popen(
            list(argv), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
    except OSError:
        return None
    endless = argv[0] == "tegrastats"
    timer = threading.Timer(timeout_s, process.kill)
    timer.start()
    try:
        assert process.stdout is not None
        with process.stdout:
            output = process.stdout.readline() if endless else process.stdout.read()
        if endless:
            process.kill()
        code = process.wait()
    finally:
        timer.cancel()
    return output.decode("utf-8", "replace") if output and (endless or code == 0) else None


def read_auxv(data: bytes, word_bytes: int = struct.calcsize("L")) -> dict[int, int]:
    """Type → value of an auxiliary vector (/proc/self/auxv): pairs of unsigned words up to type 0."""
    code = {4: "I", 8: "Q"}[word_bytes]
    usable = len(data) // (2 * word_bytes) * (2 * word_bytes)
    words = struct.unpack(f"={usable // word_bytes}{code}", data[:usable])
    found: dict[int, int] = {}
    for kind, value in zip(words[::2], words[1::2]):
        if kind == 0:
            break
        found[kind] = value
    return found


def hwcap_features(hwcap: int, hwcap2: int = 0) -> list[str]:
    """The names of the features in AT_HWCAP and AT_HWCAP2 on 64-bit Arm, sorted."""
    bits = [name for bit, name in enumerate(_ARM_HWCAP) if hwcap >> bit & 1]
    return sorted(bits + [name for bit, name in enumerate(_ARM_HWCAP2) if hwcap2 >> bit & 1])


def read_cpu(probe: Probe, machine: str | None = None) -> dict[str, Any]:
    """The processor: its name, its features by /proc/cpuinfo, and by the kernel's own word (AT_HWCAP)."""
    machine = machine or platform.machine()
    text = probe.text("proc/cpuinfo") or ""
    lines: dict[str, str] = {}
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            lines.setdefault(key.strip(), value.strip())
    features = sorted((lines.get("flags") or lines.get("Features") or "").split())
    found: dict[str, Any] = {
        "machine": machine,
        "name": lines.get("model name") or _arm_part(lines) or platform.processor() or machine,
        "features": features,
        "cores": os.cpu_count(),
    }
    try:
        vector = read_auxv((probe.root / "proc/self/auxv").read_bytes())
    except (OSError, KeyError, struct.error):
        return found
    if _AT_HWCAP in vector:
        found["hwcap"] = hex(vector[_AT_HWCAP])
        found["hwcap2"] = hex(vector.get(_AT_HWCAP2, 0))
        if machine in ("aarch64", "arm64"):
            known = hwcap_features(vector[_AT_HWCAP], vector.get(_AT_HWCAP2, 0))
            found["hwcap_features"] = known
            found["claimed_only"] = [name for name in features if name in _ARM_HWCAP and name not in known]
    return found


def _arm_part(lines: Mapping[str, str]) -> str | None:
    known = {"0xd03": "Cortex-A53", "0xd08": "Cortex-A72", "0xd0b": "Cortex-A76", "0xd42": "Cortex-A78AE"}
    part = lines.get("CPU part")
    return None if part is None else known.get(part, f"Arm part {part}")


def read_device(probe: Probe) -> dict[str, Any]:
    """What the run was made on: board, processor, memory, system, and the cores this process may use."""
    board = probe.text("proc/device-tree/model") or probe.text("sys/firmware/devicetree/base/model")
    memory = re.search(r"^MemTotal:\s+(\d+) kB", probe.text("proc/meminfo") or "", re.MULTILINE)
    return {
        "board": board,
        "cpu": read_cpu(probe),
        "memory_bytes": int(memory[1]) * 1024 if memory else None,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "affinity": own_affinity(),
        "load_1min": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "governor": probe.text("sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "power_mode": read_power_mode(probe),
    }


def own_affinity() -> list[int] | None:
    """The cores that this process may use; None where the system does not say."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def is_emulated(device: Mapping[str, Any]) -> bool:
    """Whether the board says of itself that it is none: its times mean nothing then."""
    return bool(_EMULATED.search(device.get("board") or ""))


# --------------------------------------------------------------------------------------------------
# 4. The runtime, probed in a process of its own

_CHILD_MARK = "edgepress-runner "
_WINDOWS_SIGNALS = {0xC000001D: "SIGILL", 0xC0000005: "SIGSEGV"}
_SIGNAL_WORDS = {
    "SIGILL": "an instruction that this CPU does not have",
    "SIGSEGV": "a segmentation fault",
    "SIGBUS": "a bus error",
    "SIGABRT": "an abort of the library",
    "SIGKILL": "killed, as a rule for want of memory",
}


@dataclasses.dataclass(frozen=True)
class ChildEnd:
    """How a child process ended.

    Attributes:
        stages: what it reported, in order; each a mapping with "stage".
        at_ms: when each report came, in milliseconds since the process was started.
        code: its exit status; negative is a signal. None if it was ended for taking too long.
        message: the last line that it wrote to stderr.
    """

    stages: list[dict[str, Any]]
    at_ms: list[float]
    code: int | None
    message: str

    @property
    def ending(self) -> str:
        """How it ended, in words."""
        return self.signal_name or ("a timeout" if self.code is None else f"exit status {self.code}")

    def report(self, stage: str) -> dict[str, Any] | None:
        """What it said at a stage; None if it never got there."""
        return next((item for item in self.stages if item["stage"] == stage), None)

    @property
    def signal_name(self) -> str | None:
        """The signal that ended it; None if none did."""
        if self.code is None:
            return None
        if self.code < 0:
            try:
                return signal.Signals(-self.code).name
            except ValueError:
                return f"signal {-self.code}"
        # A shell or an emulator in between turns a signal into 128 + its number.
        by_shell = {132: "SIGILL", 139: "SIGSEGV", 135: "SIGBUS", 134: "SIGABRT", 137: "SIGKILL"}
        return _WINDOWS_SIGNALS.get(self.code) or by_shell.get(self.code)


def run_child(
    request: Mapping[str, Any], *, timeout_s: float = 120.0, argv: Sequence[str] | None = None
) -> ChildEnd:
    """Run this file as a child process and collect its reports.

    Args:
        request: what it shall do (see `child_main`).
        timeout_s: it is ended after so many seconds.
        argv: another program in its place.
    """
    prefix = "edgepress-runner-"
    with tempfile.TemporaryDirectory(prefix=prefix) as folder, tempfile.TemporaryFile() as errors:
        file = Path(folder) / "request.json"
        file.write_text(json.dumps(dict(request)), encoding="utf-8")
        program = (
            list(argv) if argv is not None else [sys.executable, str(Path(__file__).resolve()), "--child"]
        )
        started = time.perf_counter()
        process = subprocess.Popen(
            [*program, str(file)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors
        )
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            process.kill()

        timer = threading.Timer(timeout_s, expire)
        timer.start()
        stages, at_ms = [], []
        try:
            assert process.stdout is not None
            with process.stdout:
                for line in process.stdout:
                    if line.startswith(_CHILD_MARK.encode()):
                        now_ms = (time.perf_counter() - started) * 1e3
                        with contextlib.suppress(ValueError):  # it died in the middle of a line
                            stages.append(json.loads(line[len(_CHILD_MARK) :].decode("utf-8")))
                            at_ms.append(now_ms)
            code: int | None = process.wait()
        finally:
            timer.cancel()
            process.kill()
            process.wait()
        errors.seek(0)
        lines = errors.read().decode("utf-8", "replace").strip().splitlines()
    return ChildEnd(stages, at_ms, None if expired.is_set() else code, lines[-1] if lines else "")


def child_main(request_file: str) -> int:
    """The child process: import, and on request load the model and run it once, reporting each step."""
    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    _report("started", python=platform.python_version())
    started = time.perf_counter()
    import numpy as np

    _report("numpy", version=np.__version__)
    ort = import_runtime()
    import_ms = (time.perf_counter() - started) * 1e3
    _report(
        "onnxruntime", version=ort.__version__, providers=ort.get_available_providers(), import_ms=import_ms
    )
    if request["what"] == "import":
        return EXIT_OK
    if request["what"] == "loadgen":
        return loadgen_child(ort, request)
    imports_bytes = own_peak_bytes()
    feeds = read_npz(Path(request["feeds"]), request["names"])
    settings = SessionSettings(request["threads"], request["level"], request["config"], request["provider"])
    started = time.perf_counter()
    session = settings.open(ort, Path(request["model"]))
    load_ms = (time.perf_counter() - started) * 1e3
    started = time.perf_counter()
    session.run(None, feeds)
    first_ms = (time.perf_counter() - started) * 1e3
    _report(
        "first",
        import_ms=import_ms,
        load_ms=load_ms,
        first_run_ms=first_ms,
        peak_memory_bytes=own_peak_bytes(),
        imports_bytes=imports_bytes,
    )
    return EXIT_OK


def _forget_own_folder() -> None:
    """Files beside this one must not stand in for packages."""
    own = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != own]


def _report(stage: str, **values: Any) -> None:
    sys.stdout.write(_CHILD_MARK + json.dumps({"stage": stage, **values}) + "\n")
    sys.stdout.flush()


def own_peak_bytes() -> int | None:
    """The largest resident memory that this process has had (VmHWM), in bytes; None where unknown."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        if sys.platform != "darwin":
            return None
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def import_runtime() -> Any:
    """The onnxruntime module, with telemetry off before it is first imported."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    return onnxruntime


def probe_runtime(
    versions: Mapping[str, str],
    cpu: Mapping[str, Any],
    *,
    timeout_s: float = 120.0,
    argv: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Import numpy and the runtime in a process of its own: a crash there is a finding, not our end.

    Args:
        versions: the manifest's, which are known to work together.
        cpu: from `read_cpu`; its features go into the finding.
        timeout_s: for the import.
        argv: another program in place of the child's, in tests.

    Returns:
        "status" ("ok", "missing", "crashed", "timeout", "failed"), versions, providers, and, where it
        is not ok, "what", "why" and "remedy".
    """
    end = run_child({"what": "import"}, timeout_s=timeout_s, argv=argv)
    found: dict[str, Any] = {"name": "onnxruntime", "known_good": _known_good(versions)}
    numpy_report, runtime_report = end.report("numpy"), end.report("onnxruntime")
    if numpy_report is not None:
        found["numpy"] = numpy_report["version"]
    if runtime_report is not None and end.code == 0:
        return {**found, "status": "ok", **{k: v for k, v in runtime_report.items() if k != "stage"}}
    package = "numpy" if numpy_report is None else "onnxruntime"
    found["signal"] = end.signal_name
    if end.code is None:
        found.update(status="timeout", what=f"importing {package} took more than {timeout_s:g} s")
    elif end.signal_name is not None:
        found.update(status="crashed", what=f"importing {package} ends with {end.signal_name}")
        found["why"] = _crash_reason(end.signal_name, cpu)
    elif "ModuleNotFoundError" in end.message and f"'{package}'" in end.message:
        found.update(
            status="missing", what=f"{package} is not installed for {sys.executable}", why=end.message
        )
    else:
        found.update(status="failed", what=f"{package} cannot be imported", why=end.message)
    good = " ".join(f"{name}=={version}" for name, version in sorted(found["known_good"].items()))
    found["remedy"] = f"install the versions that this bundle was made with: python -m pip install {good}"
    return found


def _known_good(versions: Mapping[str, str]) -> dict[str, str]:
    return {name: versions[name] for name in ("numpy", "onnxruntime") if name in versions}


def _crash_reason(name: str, cpu: Mapping[str, Any]) -> str:
    features = " ".join(cpu.get("hwcap_features") or cpu.get("features") or ()) or "unknown"
    text = f"{_SIGNAL_WORDS.get(name, name)}; CPU {cpu.get('name')}, features: {features}"
    if cpu.get("claimed_only"):
        text += f"; /proc/cpuinfo claims {' '.join(cpu['claimed_only'])}, which the kernel does not confirm"
    return text


# --------------------------------------------------------------------------------------------------
# 5. Inputs, sessions, golden samples

_SILENT = 4
CPU_PROVIDER = "CPUExecutionProvider"
_FLOATS = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64"}
_MADE_UP_AXIS, _MADE_UP_IMAGE = 16, 64


@dataclasses.dataclass(frozen=True)
class SessionSettings:
    """How a session is opened: threads inside an operator, the optimization level's enum name, entries."""

    threads: int = 1
    level: str | None = None
    config: dict[str, str] = dataclasses.field(default_factory=dict)
    provider: str = CPU_PROVIDER

    def open(self, ort: Any, model: Path) -> Any:
        """A session of the runtime.

        Raises:
            RuntimeUnusable: if the runtime refuses the model or has no such provider.
        """
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = _SILENT
        if self.level:
            options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, self.level)
        for key, value in self.config.items():
            options.add_session_config_entry(key, value)
        if self.provider not in ort.get_available_providers():
            raise RuntimeUnusable(
                f"this onnxruntime has no {self.provider}",
                why=f"it has {', '.join(ort.get_available_providers())}",
            )
        try:
            session = ort.InferenceSession(str(model), options, providers=[self.provider], enable_fallback=0)
        except _ort_errors(ort) as error:
            raise RuntimeUnusable(
                f"onnxruntime {ort.__version__} does not load {model.name}", why=str(error).strip()
            ) from error
        if session.get_providers()[0] != self.provider:
            raise RuntimeUnusable(f"{self.provider} does not come up", why=f"got {session.get_providers()}")
        return session


def _ort_errors(ort: Any) -> tuple[type[Exception], ...]:
    """What the runtime raises: its own exceptions derive from nothing but Exception."""
    state = ort.capi.onnxruntime_pybind11_state
    found = [getattr(state, name) for name in dir(state)]
    own = [item for item in found if isinstance(item, type) and issubclass(item, Exception)]
    return (RuntimeError, ValueError, *own)


def read_npz(path: Path, names: Iterable[str]) -> dict[str, Any]:
    """The arrays of an .npz file in the order of `names`; text becomes objects, as the runtime takes it.

    Raises:
        BundleBroken: if the file is damaged or holds other arrays.
    """
    import zipfile

    import numpy as np

    wanted = list(names)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            stored = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise BundleBroken(f"{path.name} cannot be read", why=str(error), remedy=_COPY_AGAIN) from error
    if set(stored) != set(wanted):
        raise BundleBroken(f"{path.name} holds {sorted(stored)}, not {sorted(wanted)}", remedy=_COPY_AGAIN)
    return {
        name: stored[name].astype(object) if stored[name].dtype.kind == "U" else stored[name]
        for name in wanted
    }


def require_runnable(bundle: Bundle) -> list[str]:
    """Notes on running a bundle with onnxruntime.

    Raises:
        RuntimeUnusable: if onnxruntime has no kernels for its types.
    """
    precision = bundle.manifest.get("precision", {})
    form, io_dtype = str(precision.get("form", "")), str(precision.get("io_dtype", "fp32"))
    if form.rpartition("+")[2] == "bf16" or io_dtype == "bf16":
        raise RuntimeUnusable(
            "onnxruntime has no kernels for a bfloat16 model",
            why=f"the bundle is for {bundle.runtime}",
            remedy="build an engine here: trtexec --onnx=model.onnx --stronglyTyped --saveEngine=model.plan",
        )
    if bundle.runtime == "onnxruntime":
        return []
    return [f"the bundle is for {bundle.runtime}: these are onnxruntime's outputs and times, not an engine's"]


def benchmark_feeds(bundle: Bundle) -> tuple[dict[str, Any], str]:
    """One set of inputs to time with, and where it came from.

    The golden sample of the usual shapes where the bundle was made for a range, else the first; without
    golden samples made-up values (latency does not depend on them).
    """
    names = [spec["name"] for spec in bundle.manifest["model"]["inputs"]]
    golden = bundle.manifest.get("golden")
    if not golden or not golden["samples"]:
        return _made_up(bundle), "made up"
    samples = [read_npz(bundle.root / sample["inputs"], names) for sample in golden["samples"]]
    usual = {name: tuple(shape["opt"]) for name, shape in bundle.manifest.get("shapes", {}).items()}
    for feeds in samples:
        if all(feeds[name].shape == shape for name, shape in usual.items() if name in feeds):
            return feeds, "golden"
    return samples[0], "golden"


def _made_up(bundle: Bundle) -> dict[str, Any]:
    import numpy as np

    rng = np.random.RandomState(0)
    feeds = {}
    for spec in bundle.manifest["model"]["inputs"]:
        usual = bundle.manifest.get("shapes", {}).get(spec["name"], {}).get("opt")
        axes = spec["shape"] or []
        free = _MADE_UP_IMAGE if len(axes) >= 4 else _MADE_UP_AXIS
        shape = usual or [
            size if isinstance(size, int) else 1 if axis == 0 else free for axis, size in enumerate(axes)
        ]
        if spec["dtype"].startswith("float"):
            feeds[spec["name"]] = np.asarray(rng.standard_normal(shape), spec["dtype"])
        elif spec["dtype"] == "string":
            feeds[spec["name"]] = np.full(shape, "a", object)
        else:
            feeds[spec["name"]] = np.ones(shape, spec["dtype"])
    return feeds


def with_batch(feeds: Feeds, inputs: Sequence[Mapping[str, Any]], batch: int) -> dict[str, Any] | None:
    """The inputs repeated to another batch size; None where the batch axis is fixed at another size."""
    import numpy as np

    shapes = {spec["name"]: spec["shape"] or [] for spec in inputs}
    axes = {shape[0] for shape in shapes.values() if shape and not isinstance(shape[0], int)}
    free = [name for name, shape in shapes.items() if shape and shape[0] in axes]
    if not free:
        sizes = {feeds[name].shape[0] for name, shape in shapes.items() if shape}
        return dict(feeds) if sizes == {batch} else None
    return {
        name: np.ascontiguousarray(np.take(array, np.arange(batch) % array.shape[0], axis=0))
        if name in free
        else array
        for name, array in feeds.items()
    }


def difference(reference: Any, candidate: Any) -> dict[str, float | None]:
    """How far an output is from its record, over all elements.

    Cosine distance 1 - <r, c> / (|r| |c|) and relative L2 |c - r| / |r| for floats, else the fraction of
    elements that differ. Values that are not finite must stand in the same places, else the distances
    are infinite.
    """
    import numpy as np

    if reference.dtype.kind != "f":
        differs = reference != candidate
        share = float(np.mean(differs)) if differs.size else 0.0
        largest = None
        if reference.dtype.kind in "iu" and differs.size:
            largest = float(np.max(np.abs(reference.astype(np.float64) - candidate.astype(np.float64))))
        return {"mismatch_fraction": share, "max_abs_diff": largest}
    r, c = np.asarray(reference, np.float64).ravel(), np.asarray(candidate, np.float64).ravel()
    finite = np.isfinite(r)
    rest, other = r[~finite], c[~finite]
    same = np.array_equal(finite, np.isfinite(c)) and bool(
        np.all((rest == other) | (np.isnan(rest) & np.isnan(other)))
    )
    if not same:
        return {"cosine_distance": math.inf, "relative_l2": math.inf, "max_abs_diff": math.inf}
    r, c = r[finite], c[finite]
    gap, r_norm, c_norm = (float(np.linalg.norm(item)) for item in (c - r, r, c))
    largest = float(np.max(np.abs(c - r))) if r.size else 0.0
    if r_norm == 0.0 or c_norm == 0.0:
        cosine = 0.0 if r_norm == c_norm else 1.0
        far = 0.0 if r_norm == c_norm else math.inf if r_norm == 0.0 else gap / r_norm
        return {"cosine_distance": cosine, "relative_l2": far, "max_abs_diff": largest}
    cosine = max(0.0, 1.0 - float(r @ c) / (r_norm * c_norm))
    return {"cosine_distance": cosine, "relative_l2": gap / r_norm, "max_abs_diff": largest}


def check_golden(bundle: Bundle, ort: Any, provider: str = CPU_PROVIDER) -> dict[str, Any] | None:
    """Run the golden samples against the manifest's tolerance; None where the bundle has none.

    Returns:
        "samples", "within_tolerance", "max_abs_diff" (the largest of all outputs), "worst" (per output the
        largest of each measure) and "problems", one line each.
    """
    golden, model = bundle.manifest.get("golden"), bundle.manifest["model"]
    if not golden:
        return None
    settings = dataclasses.replace(bundle.options(int(golden.get("threads", 1))), provider=provider)
    session = settings.open(ort, bundle.model_file)
    names = {kind: [spec["name"] for spec in model[kind]] for kind in ("inputs", "outputs")}
    limits = {item["name"]: item for item in golden["tolerances"]}
    problems: list[str] = []
    worst: dict[str, dict[str, float]] = {name: {} for name in names["outputs"]}
    for sample in golden["samples"]:
        feeds = read_npz(bundle.root / sample["inputs"], names["inputs"])
        recorded = read_npz(bundle.root / sample["outputs"], names["outputs"])
        try:
            outputs = session.run(names["outputs"], feeds)
        except _ort_errors(ort) as error:
            problems.append(f"{sample['inputs']}: the model fails: {str(error).strip()}")
            continue
        for name, found in zip(names["outputs"], outputs):
            problems += _compare(
                f"{sample['outputs']}: {name!r}", recorded[name], found, limits[name], worst[name]
            )
    largest = [item["max_abs_diff"] for item in worst.values() if "max_abs_diff" in item]
    return {
        "samples": len(golden["samples"]),
        "within_tolerance": not problems,
        "max_abs_diff": max(largest) if largest else None,
        "worst": worst,
        "problems": problems,
    }


def _compare(
    where: str, reference: Any, found: Any, limits: Mapping[str, Any], worst: dict[str, float]
) -> list[str]:
    if reference.shape != found.shape or reference.dtype != found.dtype:
        return [
            f"{where}: {found.dtype}{list(found.shape)} instead of {reference.dtype}{list(reference.shape)}"
        ]
    problems = []
    for measure, value in difference(reference, found).items():
        if value is None:
            continue
        worst[measure] = max(worst.get(measure, 0.0), value)
        allowed = limits.get(measure)
        if allowed is not None and not value <= allowed[1]:
            problems.append(f"{where}: {measure.replace('_', ' ')} {value:.3g} exceeds {allowed[1]:.3g}")
    return problems


# --------------------------------------------------------------------------------------------------
# 6. Statistics: percentiles, intervals, early stopping

QUANTILES = (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p99_9", 0.999))
# Two-sided 95 % quantiles of Student's t distribution for 1 to 30 degrees of freedom.
_STUDENT_95 = (
    *(
        12.706,
        4.303,
        3.182,
        2.776,
        2.571,
        2.447,
        2.365,
        2.306,
        2.262,
        2.228,
        2.201,
        2.179,
        2.160,
        2.145,
        2.131,
    ),
    *(
        2.120,
        2.110,
        2.101,
        2.093,
        2.086,
        2.080,
        2.074,
        2.069,
        2.064,
        2.060,
        2.056,
        2.052,
        2.048,
        2.045,
        2.042,
    ),
)


def percentile(ordered: Sequence[float], fraction: float) -> float:
    """The value of rank floor(n · fraction) + 1 of n ordered values: LoadGen's definition.

    Args:
        ordered: at least one value, in ascending order.
        fraction: in [0, 1).

    Raises:
        ValueError: if there is no value, or the fraction is outside of [0, 1).

    Source: mlcommons/inference, loadgen/results.cc, ProcessLatencies.
    """
    if not ordered or not 0 <= fraction < 1:
        raise ValueError("a percentile needs values and a fraction in [0, 1)")
    return ordered[int(len(ordered) * fraction)]


def binomial_cdf(successes: int, trials: int, chance: float) -> float:
    """P(X <= successes) for X ~ Binomial(trials, chance).

    It equals the regularised incomplete beta function I_{1-chance}(trials - successes, successes + 1)
    (DLMF 8.17.5), and is summed from the larger end of the smaller tail, whose terms fall geometrically.
    """
    if successes < 0 or successes >= trials:
        return 0.0 if successes < 0 else 1.0
    if not 0 < chance < 1:
        return 1.0 if chance <= 0 else 0.0
    if successes < trials * chance:
        return _binomial_tail(successes, trials, chance, downwards=True)
    return 1.0 - _binomial_tail(successes + 1, trials, chance, downwards=False)


def _binomial_tail(start: int, trials: int, chance: float, *, downwards: bool) -> float:
    logarithm = math.lgamma(trials + 1) - math.lgamma(start + 1) - math.lgamma(trials - start + 1)
    logarithm += start * math.log(chance) + (trials - start) * math.log1p(-chance)
    term = total = math.exp(logarithm)
    odds, k = chance / (1 - chance), start
    while (k > 0) if downwards else (k < trials):
        if downwards:
            term *= k / ((trials - k + 1) * odds)
            k -= 1
        else:
            term *= (trials - k) / (k + 1) * odds
            k += 1
        total += term
        if term <= total * 1e-17:
            break
    return min(total, 1.0)


def _first(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """The least whole number in [low, high] for which `holds`, which stays true above it; else high."""
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low


def quantile_interval(
    ordered: Sequence[float], fraction: float, confidence: float = 0.95
) -> tuple[float | None, float | None]:
    """An interval of order statistics that holds the true quantile with at least the confidence, whatever the
    distribution; None on a side that so few values cannot bound.

    With B ~ Binomial(n, fraction) values at or below the quantile: low is the largest x_(l) with
    P(B < l) <= (1 - confidence) / 2, high the smallest x_(u) with P(B >= u) <= (1 - confidence) / 2.

    Args:
        ordered: n values in ascending order, drawn independently.
        fraction: in (0, 1).
        confidence: in (0, 1).

    Source: David & Nagaraja, Order Statistics, 3rd ed., 2003, §7.1.
    """
    n, tail = len(ordered), (1 - confidence) / 2
    # Ranks count from 1. The least k with P(B <= k) > tail is the largest l with P(B < l) <= tail.
    rank_low = _first(0, n, lambda k: binomial_cdf(k, n, fraction) > tail)
    rank_high = _first(1, n + 1, lambda u: 1 - binomial_cdf(u - 1, n, fraction) <= tail)
    return (
        ordered[rank_low - 1] if rank_low >= 1 else None,
        ordered[rank_high - 1] if rank_high <= n else None,
    )


def summarise(latencies_ns: Sequence[int]) -> dict[str, Any]:
    """Latencies as milliseconds: count, mean, least, largest, percentiles and their 95 % intervals.

    A percentile beyond what the count can show (fewer than one value above it) is None.
    """
    ordered = sorted(latencies_ns)
    n = len(ordered)
    found: dict[str, Any] = {
        "runs": n,
        "mean_ms": sum(ordered) / n / 1e6,
        "min_ms": ordered[0] / 1e6,
        "max_ms": ordered[-1] / 1e6,
    }
    intervals = {}
    for name, fraction in QUANTILES:
        known = n * (1 - fraction) >= 1 - 1e-9
        found[f"{name}_ms"] = percentile(ordered, fraction) / 1e6 if known else None
        low, high = quantile_interval(ordered, fraction) if known else (None, None)
        intervals[name] = [None if side is None else side / 1e6 for side in (low, high)]
    found["intervals_ms"] = intervals
    return found


def student_95(degrees: int) -> float:
    """The two-sided 95 % quantile of Student's t distribution; beyond 30 degrees of freedom to 0.2 %."""
    return _STUDENT_95[degrees - 1] if degrees <= len(_STUDENT_95) else 1.960 + 2.46 / degrees


def pair_ratio(before: Sequence[float], after: Sequence[float]) -> float:
    """How many times as long the runs of one session took as those of another that they alternated with.

    The median of the ratios of neighbouring runs: what else the machine does, and its clock, change more
    slowly than runs alternate, and slow down both of two neighbours. The ratio of the two medians would
    compare one's quiet times with the other's busy ones.

    Args:
        before: latencies in the order of their runs.
        after: of the runs in between, as many.
    """
    return statistics.median(one / other for one, other in zip(before, after))


def ratio_interval(ratios: Sequence[float]) -> tuple[float, float | None, float | None]:
    """The geometric mean of ratios (or times) with its 95 % interval, by Student's t on their logarithms.

    Each ratio comes from a pair of fresh sessions: within a pair the noise is shared, between pairs it is
    not. With one ratio there is no interval.
    """
    logs = [math.log(ratio) for ratio in ratios]
    middle = statistics.fmean(logs)
    if len(logs) < 2:
        return math.exp(middle), None, None
    half = student_95(len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(middle), math.exp(middle - half), math.exp(middle + half)


# The standard deviation, of logarithms, that comparisons of a file with itself have from process to process
# beyond what the pairs of each explain: 0.37 % in all beside 0.33 %, in 80 (benchmarks/self_comparison.py).
_PROCESS_SPREAD, _NORMAL_95 = 0.002, 1.960
_LEAST_BALANCED = 6


def balanced_interval(ratios: Sequence[float]) -> tuple[float, float | None, float | None]:
    """The mean ratio of pairs whose sessions were opened in alternating order, with its 95 % interval.

    Which session is opened first makes a difference, up to some percent, for as long as both live. Over the
    pairs it cancels out, so it must not widen the interval: it is estimated along with the ratio, by least
    squares on log(ratio of pair k) = m + d (-1)^k + noise, and m has its interval by Student's t with two
    degrees of freedom less than there are pairs. Below six pairs the two are worth more than what the order
    explains, and the interval is that of `ratio_interval`. What all pairs of one process have in common, no
    pair can show: `_PROCESS_SPREAD` stands for it.

    Args:
        ratios: in the order of the pairs.

    Returns:
        exp(m) and its bounds; no bounds with one pair.
    """
    count = len(ratios)
    if count < _LEAST_BALANCED:
        mean, low, high = ratio_interval(ratios)
        if low is None or high is None:
            return mean, None, None
        half = math.hypot(math.log(high / mean), _NORMAL_95 * _PROCESS_SPREAD)
        return mean, mean * math.exp(-half), mean * math.exp(half)
    logs = [math.log(ratio) for ratio in ratios]
    signs = [1.0 - 2.0 * (index % 2) for index in range(count)]
    excess = sum(signs)  # 1 where one order came once more often, else 0
    along = math.fsum(sign * value for sign, value in zip(signs, logs))
    scale = count * count - excess * excess
    middle = (count * math.fsum(logs) - excess * along) / scale
    order = (count * along - excess * math.fsum(logs)) / scale
    left = math.fsum((value - middle - order * sign) ** 2 for value, sign in zip(logs, signs))
    own = student_95(count - 2) * math.sqrt(left / (count - 2) * count / scale)
    half = math.hypot(own, _NORMAL_95 * _PROCESS_SPREAD)
    return math.exp(middle), math.exp(middle - half), math.exp(middle + half)


def min_passing_queries(over: int, fraction: float, confidence: float = 0.99) -> int:
    """How many queries must stay within a bound, beside `over` that did not, to trust the percentile.

    The least h with P(Binomial(h + over, 1 - fraction) <= over) < 1 - confidence: if more than 1 - fraction
    of all queries were over the bound, so few overs would be that unlikely.

    Args:
        over: queries beyond the bound, at least 0.
        fraction: the percentile, in (0, 1).
        confidence: in (0, 1); MLPerf asks for 0.99.

    Source: mlcommons/inference, loadgen/early_stopping.cc (MinPassingQueriesFinder, tolerance 0).
    """

    def enough(h: int) -> bool:
        return binomial_cdf(over, h + over, 1 - fraction) < 1 - confidence

    high = max(1, int(2 * (over + 1) * fraction / (1 - fraction)))
    while not enough(high):
        high *= 2
    return _first(0, high, enough)


def early_stopping(ordered: Sequence[float], fraction: float, confidence: float = 0.99) -> dict[str, Any]:
    """MLPerf's early-stopping estimate of a percentile: the t-th largest value, t the most overs that pass.

    Args:
        ordered: latencies in ascending order.
        fraction: the percentile.
        confidence: that the true percentile is not above the estimate.

    Returns:
        "met", "least_queries", and where met "estimate" (in the latencies' unit) and "discarded" (t - 1).

    Source: mlcommons/inference, loadgen/results.cc, PerformanceSummary::EarlyStopping.
    """
    n = len(ordered)
    least = min_passing_queries(1, fraction, confidence) + 1
    if n < least:
        return {"met": False, "least_queries": least, "estimate": None, "discarded": None}
    beyond = _first(2, n, lambda t: not binomial_cdf(t, n, 1 - fraction) < 1 - confidence)
    t = beyond - 1
    return {"met": True, "least_queries": least, "estimate": ordered[n - t], "discarded": t - 1}


def early_stopping_bound(
    ordered: Sequence[float], bound: float, fraction: float, confidence: float = 0.99
) -> dict[str, Any]:
    """MLPerf's early stopping under a latency bound (Server): whether so few overs in so many queries do.

    Returns:
        "met", "over" (latencies beyond the bound) and "more_queries" needed, all of them within the bound.
    """
    over = sum(1 for value in ordered if value > bound)
    needed = min_passing_queries(over, fraction, confidence) + over
    return {"met": len(ordered) >= needed, "over": over, "more_queries": max(0, needed - len(ordered))}


# --------------------------------------------------------------------------------------------------
# 7. Timing

_WINDOW, _STEADY_FRACTION, _MOST_WARM_UP_FOLD, _MOST_RUNS_FOLD = 5, 0.05, 10, 50
_LEAST_WARM_UP_RUNS, _LEAST_RUNS = 2, 3
# A session's own percentile says something where so many of its runs lie beyond.
_LEAST_BEYOND = 10


@dataclasses.dataclass(frozen=True)
class Entry:
    """One thing to time: `open` makes a session and gives what runs it once, and its load time in ms."""

    name: str
    open: Callable[[], tuple[Callable[[], Any], float]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much to measure.

    Attributes:
        pairs: how often everything is opened afresh, each time in the other order.
        runs: timed runs of each in a pair, at least; up to 50 times as many until `least_pair_s` have passed.
        warm_up_runs: untimed runs at least; more until two windows of 5 agree within 5 %, at most ten times.
        limit_s: no new pair after so many seconds, once there are two.
        most_pair_s: a pair stops before its `runs` after so many seconds, once there are 3 runs of each.
        warm_up_limit_s: likewise the warm-up of one session, after 2 runs.
    """

    pairs: int = 8
    runs: int = 30
    warm_up_runs: int = 5
    least_pair_s: float = 0.2
    limit_s: float = 120.0
    most_pair_s: float = math.inf
    warm_up_limit_s: float = math.inf


def time_entries(
    entries: Sequence[Entry],
    plan: Plan,
    *,
    between: Callable[[], None] | None = None,
    clock_ns: Callable[[], int] = time.perf_counter_ns,
) -> dict[str, dict[str, Any]]:
    """Time entries against each other: fresh sessions in alternating order, runs interleaved one by one.

    Args:
        entries: at least one, with different names; the first is the baseline of ratios.
        plan: how much to measure.
        between: called after each pair, outside of what is timed.
        clock_ns: a monotonic clock in nanoseconds.

    Returns:
        By name: "series_ns" (a list of latencies per session), "load_ms" (per session), "warm_up_runs".
    """
    found: dict[str, dict[str, Any]] = {
        entry.name: {"series_ns": [], "load_ms": [], "warm_up_runs": 0} for entry in entries
    }
    started = clock_ns()
    for pair in range(plan.pairs):
        order = list(entries) if pair % 2 == 0 else list(reversed(entries))
        opened = []
        for entry in order:
            step, load_ms = entry.open()
            opened.append((entry.name, step))
            found[entry.name]["load_ms"].append(load_ms)
        for name, step in opened:
            found[name]["warm_up_runs"] += warm_up(step, plan, clock_ns)
        for name, series in timed_runs(opened, plan, clock_ns).items():
            found[name]["series_ns"].append(series)
        del opened, step
        if between is not None:
            between()
        if pair >= 1 and (clock_ns() - started) / 1e9 > plan.limit_s:
            break
    return found


def warm_up(step: Callable[[], Any], plan: Plan, clock_ns: Callable[[], int] = time.perf_counter_ns) -> int:
    """Run untimed until two windows of runs have the same median; how many runs that took."""
    series: list[int] = []
    least = max(plan.warm_up_runs, 1)
    while len(series) < _MOST_WARM_UP_FOLD * least:
        before = clock_ns()
        step()
        series.append(clock_ns() - before)
        if len(series) >= max(least, 2 * _WINDOW):
            earlier = statistics.median(series[-2 * _WINDOW : -_WINDOW])
            if abs(statistics.median(series[-_WINDOW:]) - earlier) <= _STEADY_FRACTION * earlier:
                break
        if len(series) >= _LEAST_WARM_UP_RUNS and sum(series) / 1e9 > plan.warm_up_limit_s:
            break
    return len(series)


def timed_runs(
    opened: Sequence[tuple[str, Callable[[], Any]]],
    plan: Plan,
    clock_ns: Callable[[], int] = time.perf_counter_ns,
) -> dict[str, list[int]]:
    """Latencies in ns by name, one run of each in turn; the garbage collector waits."""
    series: dict[str, list[int]] = {name: [] for name, _ in opened}
    collecting = gc.isenabled()
    started, done = clock_ns(), 0
    gc.disable()
    try:
        while _goes_on(plan, done, (clock_ns() - started) / 1e9):
            for name, step in opened:
                before = clock_ns()
                step()
                series[name].append(max(1, clock_ns() - before))
            done += 1
    finally:
        if collecting:
            gc.enable()
    return series


def _goes_on(plan: Plan, done: int, elapsed_s: float) -> bool:
    if done < plan.runs:
        return done < _LEAST_RUNS or elapsed_s <= plan.most_pair_s
    return done < _MOST_RUNS_FOLD * plan.runs and elapsed_s < plan.least_pair_s


def latency_of(timed: Mapping[str, Any], samples_per_run: int = 1) -> dict[str, Any]:
    """The summary of one entry of `time_entries`, with load time and throughput."""
    flat = [value for series in timed["series_ns"] for value in series]
    found = summarise(flat)
    found["sessions"] = len(timed["series_ns"])
    found["warm_up_runs"] = timed["warm_up_runs"]
    found["load_ms"] = statistics.median(timed["load_ms"])
    found["throughput_per_s"] = samples_per_run * 1000.0 / found["mean_ms"]
    found["session_ms"] = session_figures(timed["series_ns"], timed["load_ms"])
    fewest = min(len(series) for series in timed["series_ns"])
    intervals = [
        widened(
            found["intervals_ms"][name],
            found["session_ms"].get(name, ()) if fewest * (1 - fraction) >= _LEAST_BEYOND else (),
        )
        for name, fraction in QUANTILES
    ]
    found["intervals_ms"] = dict(zip(found["intervals_ms"], in_order(intervals)))
    return found


def widened(bounds: Sequence[float | None], sessions: Sequence[float]) -> list[float | None]:
    """An interval of order statistics, wide enough for what the sessions' own percentiles say.

    Order statistics take all runs as independent of each other. Runs of one session are not: it has its
    place in memory, and what else the machine did just then.

    Args:
        bounds: low and high over all runs; None is not bounded, and stays so.
        sessions: the same percentile of each session; they count from two on.
    """
    if len(sessions) < 2:
        return list(bounds)
    _, low, high = ratio_interval(sessions)
    sides = zip(bounds, (low, high), (min, max))
    return [None if side is None or own is None else wider(side, own) for side, own, wider in sides]


def in_order(intervals: Sequence[Sequence[float | None]]) -> list[list[float | None]]:
    """Intervals of ever higher percentiles: none is below the low side, or above the high side, of another.

    A percentile is at least as large as a lower one, so what bounds one from below bounds the next, too.
    """
    lows, highs = [low for low, _ in intervals], [high for _, high in intervals]
    for index in range(1, len(lows)):
        low, before = lows[index], lows[index - 1]
        if low is not None and before is not None:
            lows[index] = max(low, before)
    for index in range(len(highs) - 2, -1, -1):
        high, after = highs[index], highs[index + 1]
        if high is not None and after is not None:
            highs[index] = min(high, after)
    return [[low, high] for low, high in zip(lows, highs)]


def session_figures(series_ns: Sequence[Sequence[int]], load_ms: Sequence[float]) -> dict[str, list[float]]:
    """Load time, mean and percentiles in ms, one value per session: runs made apart are compared by these.

    A percentile that some session has too few runs for is left out.
    """
    ordered = [sorted(series) for series in series_ns]
    fewest = min(len(series) for series in ordered)
    found = {
        "load": [float(value) for value in load_ms],
        "mean": [sum(series) / len(series) / 1e6 for series in ordered],
    }
    for name, fraction in QUANTILES:
        if fewest * (1 - fraction) >= 1 - 1e-9:
            found[name] = [percentile(series, fraction) / 1e6 for series in ordered]
    return found


def compare(baseline: Mapping[str, Any], candidate: Mapping[str, Any]) -> dict[str, Any]:
    """Baseline time / candidate time: the pairs' ratios, their mean, its 95 % interval."""
    ratios = [
        pair_ratio(before, after) for before, after in zip(baseline["series_ns"], candidate["series_ns"])
    ]
    ratio, low, high = balanced_interval(ratios)
    return {"ratio": ratio, "low": low, "high": high, "pair_ratios": ratios}


@dataclasses.dataclass
class ClockWatch:
    """Notices when the wall clock jumped or the machine slept while something was measured.

    Timing uses a monotonic clock, so a jump of the wall clock spoils nothing but time stamps; sleep does.
    """

    wall: Callable[[], float] = time.time
    monotonic: Callable[[], float] = time.monotonic
    boot: Callable[[], float] | None = None
    tolerance_s: float = 0.25

    def __post_init__(self) -> None:
        """Remember now."""
        if self.boot is None and hasattr(time, "CLOCK_BOOTTIME"):
            self.boot = lambda: time.clock_gettime(time.CLOCK_BOOTTIME)
        self._start = self._now()

    def _now(self) -> tuple[float, float, float | None]:
        return self.wall(), self.monotonic(), self.boot() if self.boot is not None else None

    def read(self) -> dict[str, float | None]:
        """Seconds since the start, how far the wall clock was set meanwhile, how long the machine slept."""
        now = self._now()
        elapsed = now[1] - self._start[1]
        asleep = None
        if now[2] is not None and self._start[2] is not None:
            asleep = now[2] - self._start[2] - elapsed
            asleep = asleep if asleep > self.tolerance_s else 0.0
        # Time servers slew a clock by up to 0.05 %; only more than that is a jump.
        jump = now[0] - self._start[0] - elapsed - (asleep or 0.0)
        allowed = self.tolerance_s + 5e-4 * elapsed
        return {
            "elapsed_s": elapsed,
            "wall_clock_step_s": jump if abs(jump) > allowed else 0.0,
            "suspended_s": asleep,
        }


def cold_starts(
    model: Path, feeds: Feeds, settings: SessionSettings, *, repeats: int = 5, timeout_s: float = 600.0
) -> dict[str, Any]:
    """Process start → first result, in fresh processes: medians in ms, and the largest peak memory.

    Raises:
        ChildFailed: if the process dies.
    """
    starts = []
    with tempfile.TemporaryDirectory(prefix="edgepress-runner-") as folder:
        request = _model_request("first", model, feeds, settings, Path(folder))
        for _ in range(repeats):
            end = run_child(request, timeout_s=timeout_s)
            report = end.report("first")
            if report is None or end.code != 0:
                raise ChildFailed("a fresh process that runs the model once", end)
            starts.append({**report, "cold_start_ms": end.at_ms[-1]})
    found: dict[str, Any] = {
        key: statistics.median(item[key] for item in starts)
        for key in ("cold_start_ms", "import_ms", "load_ms", "first_run_ms")
    }
    for key in ("peak_memory_bytes", "imports_bytes"):
        values = [item[key] for item in starts if item[key] is not None]
        found[key] = max(values) if values else None
    found["each_ms"] = [item["cold_start_ms"] for item in starts]
    return {**found, "processes": len(starts)}


def _model_request(
    what: str, model: Path, feeds: Feeds, settings: SessionSettings, folder: Path
) -> dict[str, Any]:
    """A request to a child process that opens a model; its inputs are written into `folder`."""
    import numpy as np

    arrays = folder / "feeds.npz"
    plain = {name: array.astype(str) if array.dtype.kind == "O" else array for name, array in feeds.items()}
    with arrays.open("wb") as file:
        np.savez(file, **plain)
    return {
        "what": what,
        "model": str(model.resolve()),
        "feeds": str(arrays),
        "names": list(feeds),
        **dataclasses.asdict(settings),
    }


# --------------------------------------------------------------------------------------------------
# 8. Meters of power, clocks and throttling

# Bits of `vcgencmd get_throttled`: now, and 16 higher since the board was started.
_PI_BITS = {0: "under-voltage", 1: "Arm frequency capped", 2: "throttled", 3: "soft temperature limit"}
_PI_SINCE_BOOT = 16
# A Jetson rail by one of these names carries all that the board or module draws.
_WHOLE_BOARD = ("VDD_IN", "POM_5V_IN")
# On an AGX Orin the memory's rail is fed from the 5 V rail (its monitor reads the same 5 V), which is
# counted already.
_FED_FROM = {"VDDQ_VDD2_1V8AO": "VIN_SYS_5V0"}
# An AGX Orin Industrial also has monitors on the carrier board's own supplies, beside the module's rails.
_CARRIER_RAILS = "CVB_"
_TEGRASTATS_RAIL = re.compile(r"(?<!\S)([A-Z][A-Z0-9_]*) (\d+)(?:mW)?/(\d+)(?:mW)?(?!\S)")


def parse_throttled(text: str) -> tuple[list[str], list[str]]:
    """What `vcgencmd get_throttled` says: what is wrong now, and what was since the board was started.

    Raises:
        ValueError: if the text is not `throttled=0x…`.
    """
    match = re.fullmatch(r"(?:throttled=)?0x([0-9a-fA-F]+)", text.strip())
    if match is None:
        raise ValueError(f"not an answer of get_throttled: {text!r}")
    value = int(match[1], 16)
    now = [name for bit, name in _PI_BITS.items() if value >> bit & 1]
    return now, [name for bit, name in _PI_BITS.items() if value >> (bit + _PI_SINCE_BOOT) & 1]


def parse_pmic(text: str) -> dict[str, float]:
    """Watts by rail from `vcgencmd pmic_read_adc` (Raspberry Pi 5): volts times amperes, rails with both."""
    values: dict[str, dict[str, float]] = {"A": {}, "V": {}}
    for match in re.finditer(r"(\S+)_([AV]) (?:current|volt)\(\d+\)=([0-9.]+)[AV]", text):
        values[match[2]][match[1]] = float(match[3])
    return {name: amperes * values["V"][name] for name, amperes in values["A"].items() if name in values["V"]}


def parse_tegrastats(line: str) -> dict[str, float]:
    """Watts by rail from a line of `tegrastats`: `VDD_IN 4800mW/4800mW`, once `POM_5V_IN 1560/1560`."""
    return {
        match[1]: int(match[2]) / 1e3
        for match in _TEGRASTATS_RAIL.finditer(line)
        if match[1] not in ("RAM", "SWAP", "IRAM") and "_FREQ" not in match[1]
    }


def jetson_rails(probe: Probe) -> dict[str, float]:
    """Watts by rail from INA3221 monitors in sysfs: iio up to JetPack 4, hwmon from JetPack 5."""
    found: dict[str, float] = {}
    for folder in probe.glob("sys/bus/i2c/drivers/ina3221*/*/iio*device*"):
        for channel in range(3):
            name = probe.text(folder / f"rail_name_{channel}")
            milliwatts = probe.number(folder / f"in_power{channel}_input")
            if name and milliwatts is not None and name != "NC":
                found[name] = milliwatts / 1e3
    for folder in probe.glob("sys/bus/i2c/drivers/ina3221*/*/hwmon/hwmon*"):
        for channel in range(1, 4):
            name = probe.text(folder / f"in{channel}_label")
            millivolts, milliamperes = (
                probe.number(folder / f"{kind}{channel}_input") for kind in ("in", "curr")
            )
            if name and name != "NC" and millivolts is not None and milliamperes is not None:
                found[name] = millivolts * milliamperes / 1e6
    return found


def whole_board(rails: Mapping[str, float]) -> tuple[float, list[str]]:
    """The watts of the whole board from its rails, and which of them were added up.

    The input rail where there is one (Nano, Xavier NX, Orin Nano and NX), else the sum of all that are not
    fed from another one of them (AGX Xavier, AGX Orin).
    """
    for name in _WHOLE_BOARD:
        if name in rails:
            return rails[name], [name]
    module = [name for name in rails if not name.startswith(_CARRIER_RAILS)]
    used = [name for name in module if _FED_FROM.get(name) not in rails]
    return sum(rails[name] for name in used), used


class PowerMeter:
    """Joules from readings of power by the trapezoid rule; `read` gives watts, None if a reading fails."""

    def __init__(self, name: str, covers: str, read: Callable[[], float | None]) -> None:
        self.name, self.covers, self._read = name, covers, read
        self.restart()

    def restart(self) -> None:
        """Begin at nothing."""
        self.joules, self.readings = 0.0, 0
        self._first_s: float | None = None
        self._last: tuple[float, float] | None = None

    def sample(self, now_s: float) -> None:
        """Read once; `now_s` is the time of a monotonic clock."""
        watts = self._read()
        if watts is None:
            return
        if self._last is None:
            self._first_s = now_s
        else:
            self.joules += (now_s - self._last[0]) * (watts + self._last[1]) / 2
        self._last = (now_s, watts)
        self.readings += 1

    @property
    def covered_s(self) -> float:
        """How long a time the readings cover."""
        return self._last[0] - self._first_s if self._last is not None and self._first_s is not None else 0.0


class EnergyCounter:
    """Joules from counters of energy that wrap: (what reads it, largest value) of each, in microjoules."""

    def __init__(self, name: str, covers: str, zones: Sequence[tuple[Callable[[], int | None], int]]) -> None:
        self.name, self.covers, self._zones = name, covers, list(zones)
        self.restart()

    def restart(self) -> None:
        """Begin at nothing."""
        self.joules, self.readings = 0.0, 0
        self._last: list[int] | None = None
        self._first_s = self._last_s = 0.0

    def sample(self, now_s: float) -> None:
        """Read once; a counter that went down has wrapped once: read more often than that takes (minutes)."""
        values = [read() for read, _ in self._zones]
        known = [value for value in values if value is not None]
        if len(known) != len(values):
            return
        if self._last is None:
            self._first_s = now_s
        else:
            for value, before, (_, limit) in zip(known, self._last, self._zones):
                step = value - before
                self.joules += (step if step >= 0 else step + limit) / 1e6
        self._last, self._last_s = known, now_s
        self.readings += 1

    @property
    def covered_s(self) -> float:
        """How long a time the readings cover."""
        return self._last_s - self._first_s


class Nvml:
    """NVIDIA's management library: energy, power and slow-downs of every GPU that it sees.

    Only what a GPU answers is there: a call that fails gives None.

    Source: NVML API reference, nvmlDeviceGetTotalEnergyConsumption, nvmlDeviceGetPowerUsage,
    nvmlDeviceGetCurrentClocksThrottleReasons.
    """

    def __init__(self, library: Any) -> None:
        """Initialise the library and find the GPUs.

        Raises:
            OSError: if the library has no such functions, or does not come up.
        """
        self._library = library
        try:
            count = ctypes.c_uint(0)
            started = library.nvmlInit_v2() == 0
            if not started or library.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
                raise OSError("NVML does not come up")
            self._gpus = []
            for index in range(count.value):
                handle = ctypes.c_void_p()
                if library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle)) == 0:
                    self._gpus.append(handle)
        except AttributeError as error:
            raise OSError(str(error)) from error

    def _read(self, function: str, gpu: ctypes.c_void_p, value: Any) -> int | None:
        try:
            code = getattr(self._library, function)(gpu, ctypes.byref(value))
        except AttributeError:
            return None
        return int(value.value) if code == 0 else None

    def energy_counters(self) -> list[Callable[[], int | None]]:
        """What reads each GPU's energy in microjoules; none where one of them does not count it."""
        readers = [functools.partial(self._energy_uj, gpu) for gpu in self._gpus]
        return list(readers) if all(read() is not None for read in readers) else []

    def _energy_uj(self, gpu: ctypes.c_void_p) -> int | None:
        millijoules = self._read("nvmlDeviceGetTotalEnergyConsumption", gpu, ctypes.c_ulonglong())
        return None if millijoules is None else 1000 * millijoules

    def watts(self) -> float | None:
        """The power of all GPUs that answer; None if none does."""
        found = [self._read("nvmlDeviceGetPowerUsage", gpu, ctypes.c_uint()) for gpu in self._gpus]
        known = [milliwatts for milliwatts in found if milliwatts is not None]
        return sum(known) / 1e3 if known else None

    def slowdowns(self) -> list[str] | None:
        """What slows a GPU down now: heat, a power brake; None if no GPU tells.

        The power limit that a card keeps to under load (SW power cap) is its usual way of working.
        """
        found: list[str] = []
        known = False
        for index, gpu in enumerate(self._gpus):
            reasons = self._read("nvmlDeviceGetCurrentClocksThrottleReasons", gpu, ctypes.c_ulonglong())
            if reasons is not None:
                known = True
                found += [f"GPU {index}: {name}" for bit, name in _GPU_SLOWDOWNS.items() if reasons & bit]
        return found if known else None


_GPU_SLOWDOWNS = {
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake slowdown",
}
_NO_WRAP_UJ = 1000 << 64
_NVML_LIBRARIES = {"linux": "libnvidia-ml.so.1", "win32": "nvml.dll"}


@functools.lru_cache(maxsize=1)
def load_nvml() -> Nvml | None:
    """NVML of this machine; None where there is none or it finds no driver."""
    name = _NVML_LIBRARIES.get(sys.platform)
    try:
        return Nvml(ctypes.CDLL(name)) if name is not None else None
    except OSError:
        return None


if TYPE_CHECKING:
    Meter = PowerMeter | EnergyCounter


def find_meters(probe: Probe) -> tuple[list[Meter], list[str]]:
    """The meters that answer on this machine, and notes on those that are there but do not."""
    meters: list[Meter] = []
    notes: list[str] = []
    rails = jetson_rails(probe)
    if rails:
        names = "+".join(whole_board(rails)[1])
        meters.append(PowerMeter("INA3221", names, lambda: _total(jetson_rails(probe))))
    elif parse_tegrastats(probe.run("tegrastats", "--interval", "100") or ""):
        names = "+".join(whole_board(_tegrastats(probe))[1])
        meters.append(PowerMeter("tegrastats", names, lambda: _total(_tegrastats(probe))))
    if parse_pmic(probe.run("vcgencmd", "pmic_read_adc") or ""):
        covers = "all rails of the PMIC; not its own losses, nor what hangs on 5 V"
        meters.append(PowerMeter("PMIC", covers, lambda: _pmic_watts(probe)))
    counter, note = _rapl(probe)
    meters += [counter] if counter is not None else []
    notes += [note] if note else []
    gpus = _gpu_meter(probe)
    meters += [gpus] if gpus is not None else []
    return meters, notes


def _gpu_meter(probe: Probe) -> Meter | None:
    """NVIDIA's cards through NVML: counters of energy where they have them, else power; else nvidia-smi."""
    covers = "NVIDIA GPUs, boards included"
    nvml = probe.nvml()
    if nvml is not None and nvml.energy_counters():
        return EnergyCounter("NVML", covers, [(read, _NO_WRAP_UJ) for read in nvml.energy_counters()])
    if nvml is not None and nvml.watts() is not None:
        return PowerMeter("NVML", covers, nvml.watts)
    if _gpu_watts(probe) is not None:
        return PowerMeter("nvidia-smi", covers, lambda: _gpu_watts(probe))
    return None


def _total(rails: Mapping[str, float]) -> float | None:
    return whole_board(rails)[0] if rails else None


def _tegrastats(probe: Probe) -> dict[str, float]:
    return parse_tegrastats(probe.run("tegrastats", "--interval", "100") or "")


def _pmic_watts(probe: Probe) -> float | None:
    rails = parse_pmic(probe.run("vcgencmd", "pmic_read_adc") or "")
    return sum(rails.values()) if rails else None


def _gpu_watts(probe: Probe) -> float | None:
    text = probe.run("nvidia-smi", "--query-gpu=power.draw", "--format=csv,noheader,nounits")
    watts = [float(line) for line in (text or "").split() if re.fullmatch(r"\d+(\.\d+)?", line)]
    return sum(watts) if watts else None


def _rapl(probe: Probe) -> tuple[EnergyCounter | None, str | None]:
    """Packages and their memory; "psys" (the whole platform) would count them twice."""
    zones, names, unreadable = [], [], False
    for folder in probe.glob("sys/class/powercap/intel-rapl:*"):
        name = probe.text(folder / "name") or ""
        limit = probe.number(folder / "max_energy_range_uj")
        if not (name.startswith("package") or name == "dram") or limit is None:
            continue
        if probe.number(folder / "energy_uj") is None:
            unreadable = True
            continue
        zones.append((functools.partial(probe.number, folder / "energy_uj"), limit))
        names.append(name)
    if zones:
        return EnergyCounter("RAPL", "+".join(names), zones), None
    note = "RAPL is there but not readable: energy needs root, or read permission on energy_uj"
    return None, note if unreadable else None


def measure_energy(
    step: Callable[[], Any],
    meters: Sequence[Meter],
    *,
    seconds: float = 5.0,
    idle_s: float = 2.0,
    interval_s: float = 0.2,
    clock: Callable[[], float] = time.monotonic,
) -> list[dict[str, Any]]:
    """Joules per inference by every meter, in a phase of its own so that reading disturbs no latency.

    Args:
        step: runs the model once.
        meters: from `find_meters`.
        seconds: how long to run back to back.
        idle_s: how long to read the idle power before.
        interval_s: between readings.
        clock: monotonic seconds.
    """
    idle = _sampled(meters, lambda: _idle_until(clock() + idle_s, clock), interval_s, clock)
    counted, worked_s = [0], [0.0]

    def work() -> None:
        started = clock()
        while not counted[0] or worked_s[0] < seconds:
            step()
            counted[0] += 1
            worked_s[0] = clock() - started

    busy = _sampled(meters, work, interval_s, clock)
    found = []
    for meter in meters:
        joules, covered_s, readings = busy[meter.name]
        item: dict[str, Any] = {"meter": meter.name, "covers": meter.covers, "readings": readings}
        if readings < 2 or covered_s <= 0:
            found.append(
                {**item, "joules_per_inference": None, "why": "not measured: the meter did not answer"}
            )
            continue
        idle_joules, idle_covered_s, _ = idle[meter.name]
        idle_watts = idle_joules / idle_covered_s if idle_covered_s > 0 else None
        watts, each_s = joules / covered_s, worked_s[0] / counted[0]  # readings may fail for a part of it
        item.update(
            joules_per_inference=watts * each_s,
            joules_per_inference_above_idle=None
            if idle_watts is None
            else max(0.0, (watts - idle_watts) * each_s),
            watts=watts,
            idle_watts=idle_watts,
            inferences=counted[0],
            seconds=covered_s,
        )
        found.append(item)
    return found


def _idle_until(end: float, clock: Callable[[], float]) -> None:
    while clock() < end:
        time.sleep(max(0.0, min(0.05, end - clock())))


def _sampled(
    meters: Sequence[Meter], work: Callable[[], None], interval_s: float, clock: Callable[[], float]
) -> dict[str, tuple[float, float, int]]:
    """(joules, seconds covered, readings) by meter while `work` runs in this thread and another one reads."""
    stop = threading.Event()

    def read_all() -> None:
        for meter in meters:
            meter.sample(clock())

    def read_on() -> None:
        while not stop.wait(interval_s):
            read_all()

    for meter in meters:
        meter.restart()
    read_all()
    reader = threading.Thread(target=read_on, daemon=True)
    reader.start()
    try:
        work()
    finally:
        stop.set()
        reader.join()
    read_all()
    return {meter.name: (meter.joules, meter.covered_s, meter.readings) for meter in meters}


def read_power_mode(probe: Probe) -> str | None:
    """A Jetson's power mode as `nvpmodel -q` names it; None elsewhere."""
    match = re.search(r"NV Power Mode:\s*(.+)", probe.run("nvpmodel", "-q") or "")
    return match[1].strip() if match else None


def read_state(probe: Probe, *, gpus: bool = False) -> dict[str, Any]:
    """Clock, temperature, and every sign of throttling or lost voltage that this machine gives, or None.

    Args:
        probe: where to read.
        gpus: also what slows NVIDIA's GPUs down, where they are what runs the model.
    """
    now, since_boot = None, None
    answer = probe.run("vcgencmd", "get_throttled") or probe.text(
        "sys/devices/platform/soc/soc:firmware/get_throttled"
    )
    if answer is not None and re.fullmatch(r"(throttled=)?(0x)?[0-9a-fA-F]+", answer.strip()):
        digits = answer.strip().replace("throttled=", "").replace("0x", "")
        now, since_boot = parse_throttled(f"throttled=0x{digits}")
    events: dict[str, int] = {}
    for folder in probe.glob("sys/class/hwmon/hwmon*"):
        name = probe.text(folder / "name")
        if name == "soctherm_oc":
            for file in sorted(folder.glob("oc*_event_cnt")):
                events[f"over-current {file.name.split('_')[0]}"] = probe.number(file) or 0
        elif name == "rpi_volt" and now is None and probe.number(folder / "in0_lcrit_alarm") is not None:
            now = ["under-voltage"] if probe.number(folder / "in0_lcrit_alarm") else []
    for file in probe.glob("sys/devices/system/cpu/cpu*/thermal_throttle/*_throttle_count"):
        key = f"thermal throttling, {file.name.split('_')[0]}"
        events[key] = events.get(key, 0) + (probe.number(file) or 0)
    nvml = probe.nvml() if gpus else None
    slow = nvml.slowdowns() if nvml is not None else None
    if slow is not None:
        now = [*(now or ()), *slow]
    return {
        "clock_hz": _clock_hz(probe),
        "temperature_c": _temperature_c(probe),
        "throttled_now": now,
        "throttled_since_boot": since_boot,
        "throttle_events": events or None,
    }


def _clock_hz(probe: Probe) -> int | None:
    match = re.search(r"frequency\(\d+\)=(\d+)", probe.run("vcgencmd", "measure_clock", "arm") or "")
    if match:
        return int(match[1])
    found = [
        probe.number(file) for file in probe.glob("sys/devices/system/cpu/cpu*/cpufreq/scaling_cur_freq")
    ]
    known = [value for value in found if value is not None]
    return max(known) * 1000 if known else None


def _temperature_c(probe: Probe) -> float | None:
    match = re.search(r"temp=([0-9.]+)'C", probe.run("vcgencmd", "measure_temp") or "")
    if match:
        return float(match[1])
    found = [probe.number(file) for file in probe.glob("sys/class/thermal/thermal_zone*/temp")]
    # Zones that are switched off read as far below zero.
    known = [value for value in found if value is not None and 0 < value < 200_000]
    return max(known) / 1000 if known else None


def void_reasons(states: Sequence[Mapping[str, Any]]) -> list[str]:
    """Why a run does not count: signs of throttling or lost voltage in states read before, during, after."""
    reasons = []
    for state in states:
        for name in state.get("throttled_now") or ():
            if f"{name} during the run" not in reasons:
                reasons.append(f"{name} during the run")
    before, after = states[0], states[-1]
    for name in after.get("throttled_since_boot") or ():
        known = name in (before.get("throttled_since_boot") or ()) or f"{name} during the run" in reasons
        if not known:
            reasons.append(f"{name} during the run")
    earlier = before.get("throttle_events") or {}
    for name, count in (after.get("throttle_events") or {}).items():
        if count > earlier.get(name, 0):
            reasons.append(f"{name}: {count - earlier.get(name, 0)} times during the run")
    return reasons


def mark_region(begin: bool, tag: int = 0) -> None:
    """Tell an emulator that counts instructions where a region begins or ends, by an unknown system call.

    A real kernel answers ENOSYS, and nothing happens.
    """
    ctypes.CDLL(None).syscall(0xC0DE, 1 if begin else 2, tag)


# --------------------------------------------------------------------------------------------------
# 9. MLPerf scenarios: by the official LoadGen where it is installed, else in a light form of our own

SCENARIOS = ("SingleStream", "MultiStream", "Offline", "Server")
SCENARIO_FRACTIONS = {"SingleStream": 0.9, "MultiStream": 0.99, "Server": 0.99}
LOADGEN_MODULE, LOADGEN_PACKAGE = "mlperf_loadgen", "mlcommons-loadgen"
_SPIN_S = 0.002
_ESTIMATING_RUNS = 5


@dataclasses.dataclass(frozen=True)
class ScenarioPlan:
    """How a scenario is run.

    Attributes:
        seconds: the least duration.
        queries: the least number of queries; never fewer than early stopping asks for.
        samples_per_query: of MultiStream (8 in MLPerf) and of one batch of Offline.
        qps: the arrival rate of Server in queries a second.
        bound_ms: the latency bound of Server.
        seed: of Server's arrivals.
        most_s: no further queries after so many seconds; a result with fewer than it needs is not valid.
    """

    seconds: float = 10.0
    queries: int = 0
    samples_per_query: int = 8
    qps: float = 1.0
    bound_ms: float = 100.0
    seed: int = 0
    most_s: float = 600.0


def stream_latencies(
    query: Callable[[], Any],
    plan: ScenarioPlan,
    fraction: float,
    clock_ns: Callable[[], int] = time.perf_counter_ns,
) -> list[int]:
    """Latencies in ns of queries one after another (SingleStream, MultiStream), to the plan's minima."""
    least = max(plan.queries, min_passing_queries(1, fraction) + 1)
    latencies: list[int] = []
    started = clock_ns()
    while True:
        before = clock_ns()
        query()
        now = clock_ns()
        latencies.append(max(1, now - before))
        elapsed_s = (now - started) / 1e9
        if (len(latencies) >= least and elapsed_s >= plan.seconds) or elapsed_s >= plan.most_s:
            return latencies


def poisson_arrivals(qps: float, count: int, seed: int) -> list[float]:
    """Arrival times in seconds of a Poisson process: sums of exponential gaps of mean 1 / qps, from 0 on."""
    draw = random.Random(seed)
    times, now = [], 0.0
    for _ in range(count):
        times.append(now)
        now += draw.expovariate(qps)
    return times


def serve(
    query: Callable[[], Any],
    arrivals: Sequence[float],
    *,
    clock_ns: Callable[[], int] = time.perf_counter_ns,
    sleep: Callable[[float], None] = time.sleep,
    most_s: float = math.inf,
) -> list[int]:
    """Latencies in ns, scheduled arrival → completion, of queries that one worker serves in order.

    Args:
        query: answers one query.
        arrivals: seconds after the start, in ascending order.
        clock_ns: a monotonic clock.
        sleep: waits for so many seconds.
        most_s: no further queries after so many seconds.
    """
    latencies: list[int] = []
    started = clock_ns()
    for arrival in arrivals:
        due = started + round(arrival * 1e9)
        wait_s = (due - clock_ns()) / 1e9
        if wait_s > _SPIN_S:
            sleep(wait_s - _SPIN_S)
        while clock_ns() < due:
            pass
        query()
        now = clock_ns()
        latencies.append(max(1, now - due))
        if (now - started) / 1e9 > most_s:
            break
    return latencies


def stream_result(scenario: str, latencies_ns: Sequence[int], samples_per_query: int = 1) -> dict[str, Any]:
    """The result of SingleStream or MultiStream: the percentile, as observed and by early stopping."""
    ordered = sorted(latencies_ns)
    fraction = SCENARIO_FRACTIONS[scenario]
    stopping = early_stopping(ordered, fraction)
    estimate = stopping.pop("estimate")
    return {
        "scenario": scenario,
        "percentile": fraction,
        "percentile_ms": percentile(ordered, fraction) / 1e6,
        "samples_per_query": samples_per_query,
        "early_stopping": {**stopping, "estimate_ms": None if estimate is None else estimate / 1e6},
        "latency": summarise(ordered),
        "valid": stopping["met"],
        "official": False,
    }


def server_result(latencies_ns: Sequence[int], plan: ScenarioPlan, asked: int) -> dict[str, Any]:
    """The result of Server: whether the percentile is within the bound, as observed and by early stopping."""
    ordered = sorted(latencies_ns)
    fraction, bound_ns = SCENARIO_FRACTIONS["Server"], plan.bound_ms * 1e6
    observed = percentile(ordered, fraction)
    stopping = early_stopping_bound(ordered, bound_ns, fraction)
    return {
        "scenario": "Server",
        "percentile": fraction,
        "percentile_ms": observed / 1e6,
        "bound_ms": plan.bound_ms,
        "qps": plan.qps,
        "early_stopping": stopping,
        "latency": summarise(ordered),
        "valid": stopping["met"] and observed <= bound_ns and len(ordered) == asked,
        "official": False,
    }


def offline_result(query: Callable[[], Any], samples: int, plan: ScenarioPlan) -> dict[str, Any]:
    """The result of Offline: samples a second, batch after batch, for the plan's least duration."""
    done, started = 0, time.perf_counter_ns()
    while True:
        query()
        done += samples
        elapsed_s = (time.perf_counter_ns() - started) / 1e9
        enough = elapsed_s >= plan.seconds and done >= plan.queries
        if enough or elapsed_s >= plan.most_s:
            return {
                "scenario": "Offline",
                "samples": done,
                "samples_per_query": samples,
                "seconds": elapsed_s,
                "throughput_per_s": done / elapsed_s,
                "valid": enough,
                "official": False,
            }


def run_scenario(
    scenario: str, query: Callable[[int], Callable[[], Any]], plan: ScenarioPlan
) -> dict[str, Any]:
    """Run one scenario.

    Args:
        scenario: one of `SCENARIOS`.
        query: gives, for a number of samples, what answers a query of so many.
        plan: how.
    """
    if scenario == "Offline":
        return offline_result(query(plan.samples_per_query), plan.samples_per_query, plan)
    if scenario == "Server":
        count = max(least_queries(scenario, plan), math.ceil(plan.seconds * plan.qps))
        arrivals = poisson_arrivals(plan.qps, count, plan.seed)
        return server_result(serve(query(1), arrivals, most_s=plan.most_s), plan, count)
    samples = plan.samples_per_query if scenario == "MultiStream" else 1
    return stream_result(
        scenario, stream_latencies(query(samples), plan, SCENARIO_FRACTIONS[scenario]), samples
    )


def least_queries(scenario: str, plan: ScenarioPlan) -> int:
    """How many queries a scenario has at least: the plan's, and those that early stopping asks for."""
    if scenario == "Offline":
        return plan.queries
    fraction = SCENARIO_FRACTIONS[scenario]
    passing = (
        min_passing_queries(0, fraction) if scenario == "Server" else min_passing_queries(1, fraction) + 1
    )
    return max(plan.queries, passing, 1)


def query_of(
    session: Any, feeds: Feeds, inputs: Sequence[Mapping[str, Any]], samples: int
) -> tuple[Callable[[], Any], bool]:
    """What answers a query of so many samples, and whether it does so in one batch.

    One sample after another where the batch axis is fixed.
    """
    batch = with_batch(feeds, inputs, samples)
    if batch is not None:
        return functools.partial(session.run, None, batch), True

    def one_by_one() -> None:
        for _ in range(samples):
            session.run(None, feeds)

    return one_by_one, False


def loadgen_settings(lg: Any, scenario: str, plan: ScenarioPlan, query_ns: int) -> Any:
    """LoadGen's settings for a plan.

    Args:
        lg: the module.
        scenario: one of `SCENARIOS`.
        plan: how.
        query_ns: about how long a query takes (of Offline: one batch), from which LoadGen decides how many
            it makes ready beforehand; one that runs out of them ends too early and is not valid.
    """
    settings = lg.TestSettings()
    settings.scenario = getattr(lg.TestScenario, scenario)
    settings.mode = lg.TestMode.PerformanceOnly
    settings.min_duration_ms = max(1, round(plan.seconds * 1e3))
    settings.max_duration_ms = max(1, round(plan.most_s * 1e3))
    settings.min_query_count = max(1, least_queries(scenario, plan))
    settings.single_stream_target_latency_percentile = SCENARIO_FRACTIONS["SingleStream"]
    settings.multi_stream_target_latency_percentile = SCENARIO_FRACTIONS["MultiStream"]
    settings.server_target_latency_percentile = SCENARIO_FRACTIONS["Server"]
    settings.single_stream_expected_latency_ns = max(1, query_ns // 2)
    settings.multi_stream_expected_latency_ns = max(1, query_ns // 2)
    settings.multi_stream_samples_per_query = plan.samples_per_query
    settings.server_target_qps = plan.qps
    settings.server_target_latency_ns = round(plan.bound_ms * 1e6)
    # Offline is one query: its samples are 1.1 times what this rate gives in the least duration.
    least_rate = plan.queries / (1.1 * settings.min_duration_ms / 1e3)
    settings.offline_expected_qps = max(1.2 * plan.samples_per_query * 1e9 / query_ns, least_rate, 1.0)
    settings.qsl_rng_seed = settings.sample_index_rng_seed = settings.schedule_rng_seed = plan.seed
    return settings


def run_loadgen(
    lg: Any,
    scenario: str,
    query: Callable[[], Any],
    plan: ScenarioPlan,
    folder: Path,
    *,
    query_ns: int,
    trace: bool = False,
) -> int:
    """Run a scenario by the official LoadGen, whose logs go into `folder`; how many samples it asked for.

    A stream's queries and Offline's batches are answered where they are asked, Server's in a thread of
    their own: LoadGen goes on asking meanwhile. A query that fails ends the process, for an exception
    cannot pass through LoadGen.

    Args:
        lg: the module.
        scenario: one of `SCENARIOS`.
        query: answers one query; of Offline, one batch.
        plan: how.
        folder: an empty folder.
        query_ns: about how long a query takes.
        trace: let LoadGen log every query's latency, too.
    """
    batch = plan.samples_per_query if scenario == "Offline" else 0
    asked = [0]
    waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def answer(ids: Sequence[int]) -> None:
        step = batch or len(ids)
        try:
            for start in range(0, len(ids), step):
                query()
                done = [lg.QuerySampleResponse(item, 0, 0) for item in ids[start : start + step]]
                lg.QuerySamplesComplete(done)
        except BaseException as error:  # noqa: BLE001 - nothing may pass through LoadGen
            sys.stderr.write(f"{type(error).__name__}: {' '.join(str(error).split())}\n")
            sys.stderr.flush()
            os._exit(EXIT_UNAVAILABLE)

    def issue(samples: Sequence[Any]) -> None:
        ids = [sample.id for sample in samples]
        asked[0] += len(ids)
        if scenario == "Server":
            waiting.put(ids)
        else:
            answer(ids)

    def serve_all() -> None:
        for ids in iter(waiting.get, None):
            answer(ids)

    worker = threading.Thread(target=serve_all, daemon=True)
    worker.start()
    sut, qsl = lg.ConstructSUT(issue, _nothing), lg.ConstructQSL(1024, 1024, _nothing, _nothing)
    output, log = lg.LogOutputSettings(), lg.LogSettings()
    output.outdir = str(folder)
    log.log_output, log.enable_trace = output, trace
    lg.StartTestWithLogSettings(sut, qsl, loadgen_settings(lg, scenario, plan, query_ns), log)
    waiting.put(None)
    worker.join()
    lg.DestroyQSL(qsl)
    lg.DestroySUT(sut)
    return asked[0]


def _nothing(*_: Any) -> None:
    """LoadGen's calls that have nothing to do here: the samples are in memory, every query is answered."""


def parse_loadgen(summary: str, detail: str, samples: int) -> dict[str, Any]:
    """A scenario's result as LoadGen's own summary gives it.

    Args:
        summary: mlperf_log_summary.txt.
        detail: mlperf_log_detail.txt, for LoadGen's version.
        samples: how many samples were asked for.

    Raises:
        RuntimeUnusable: if there is no result in the summary.
    """

    def found(pattern: str) -> str | None:
        match = re.search(pattern, summary, re.MULTILINE)
        return match[1] if match else None

    def ms(pattern: str) -> float | None:
        value = found(pattern)
        return None if value is None else int(value) / 1e6

    scenario, verdict = found(r"^Scenario : (\w+)"), found(r"^Result is : (\w+)")
    if scenario not in SCENARIOS or verdict is None:
        raise RuntimeUnusable("LoadGen gave no result", why=summary.strip()[-500:])
    version = re.search(r'"loadgen_version", "value": "([^" ]+)', detail)
    result: dict[str, Any] = {
        "scenario": scenario,
        "valid": verdict == "VALID",
        "unmet": [
            name.strip().lower() for name in re.findall(r"^  (.+?) satisfied ?: NO", summary, re.MULTILINE)
        ],
        "official": True,
        "loadgen_version": version[1] if version else None,
    }
    each = int(found(r"^samples_per_query : (\d+)") or 1)
    if scenario == "Offline":
        rate = float(found(r"^Samples per second: ([\d.e+]+)") or "nan")
        seconds = (ms(r"^Max latency \(ns\)\s*: (\d+)") or 0.0) / 1e3
        return {**result, "samples": samples, "seconds": seconds, "throughput_per_s": rate}
    fraction = SCENARIO_FRACTIONS[scenario]
    result.update(
        percentile=fraction,
        percentile_ms=ms(rf"^{100 * fraction:.2f} percentile latency \(ns\)\s*: (\d+)"),
        latency=_loadgen_latency(ms, samples // each),
    )
    met = found(r"Early stopping satisfied: (\w+)") == "Yes"
    if scenario == "Server":
        more = found(r"at least (\d+) more queries")
        result["early_stopping"] = {"met": met, "more_queries": int(more or 0)}
        result["qps"] = float(found(r"^target_qps : ([\d.e+]+)") or "nan")
        result["bound_ms"] = ms(r"^target_latency \(ns\): (\d+)")
        return result
    discarded, least = found(r"Would discard (\d+) "), found(r"at least (\d+) queries")
    result["early_stopping"] = {
        "met": met,
        "least_queries": int(least) if least else None,
        "discarded": int(discarded) if discarded else None,
        "estimate_ms": ms(rf"^ \* Early stopping {100 * fraction:.1f}th percentile estimate: (\d+)"),
    }
    return {**result, "samples_per_query": each}


def _loadgen_latency(ms: Callable[[str], float | None], runs: int) -> dict[str, Any]:
    """The latencies of LoadGen's summary as `summarise` has them; `ms` finds a figure by a pattern."""
    found: dict[str, Any] = {"runs": runs}
    for key in ("mean", "min", "max"):
        found[f"{key}_ms"] = ms(rf"^{key.title()} latency \(ns\)\s*: (\d+)")
    for name, part in QUANTILES:
        known = runs * (1 - part) >= 1 - 1e-9
        pattern = rf"^{100 * part:.2f} percentile latency \(ns\)\s*: (\d+)"
        found[f"{name}_ms"] = ms(pattern) if known else None
    return {**found, "intervals_ms": {}}


def loadgen_child(ort: Any, request: Mapping[str, Any]) -> int:
    """The child process that runs a scenario by LoadGen: whatever ends it ends nothing else."""
    lg = importlib.import_module(LOADGEN_MODULE)
    feeds = read_npz(Path(request["feeds"]), request["names"])
    settings = SessionSettings(request["threads"], request["level"], request["config"], request["provider"])
    plan, scenario = ScenarioPlan(**request["plan"]), request["scenario"]
    session = settings.open(ort, Path(request["model"]))
    size = plan.samples_per_query if scenario in ("MultiStream", "Offline") else 1
    query, batched = query_of(session, feeds, request["inputs"], size)
    warm_up(query, Plan())
    taken = []
    for _ in range(_ESTIMATING_RUNS):
        before = time.perf_counter_ns()
        query()
        taken.append(max(1, time.perf_counter_ns() - before))
    # Beside the request, whose folder goes however this process ends; and as the working folder, from which
    # LoadGen would read an audit.config that overrides its settings.
    logs = Path(request["feeds"]).with_name("loadgen").resolve()
    logs.mkdir()
    os.chdir(str(logs))
    samples = run_loadgen(lg, scenario, query, plan, logs, query_ns=round(statistics.median(taken)))
    summary, detail = (
        (logs / f"mlperf_log_{name}.txt").read_text(encoding="utf-8", errors="replace")
        for name in ("summary", "detail")
    )
    result = parse_loadgen(summary, detail, samples)
    if scenario == "Offline":
        result["samples_per_query"] = size
    _report("loadgen", result=result, batched=batched)
    return EXIT_OK


def official_scenario(
    scenario: str,
    plan: ScenarioPlan,
    *,
    model: Path,
    feeds: Feeds,
    settings: SessionSettings,
    inputs: Sequence[Mapping[str, Any]],
) -> tuple[dict[str, Any], bool]:
    """A scenario by the official LoadGen in a process of its own: the result, whether in real batches.

    Raises:
        ChildFailed: if that process ends without a result.
    """
    with tempfile.TemporaryDirectory(prefix="edgepress-runner-") as folder:
        request = _model_request("loadgen", model, feeds, settings, Path(folder))
        request.update(scenario=scenario, plan=dataclasses.asdict(plan), inputs=list(inputs))
        end = run_child(request, timeout_s=2 * plan.most_s + 120.0)
    report = end.report("loadgen")
    if report is None or end.code != 0:
        raise ChildFailed(f"LoadGen's {scenario}", end)
    return report["result"], report["batched"]


# --------------------------------------------------------------------------------------------------
# 10. The command line

COMMANDS = ("check", "verify", "benchmark", "scenario")
_DEFAULT_COMMANDS = ("check", "verify", "benchmark")
_CLAIM = "\0edgepress-device-runner"
_ENERGY_NOTE = "energy: not measured, no meter answers here"
_ONE_BY_ONE = "the batch axis is fixed: queries of several samples run them one after another"
_LIGHT_NOTE = (
    "scenarios by the runner's own light implementation, not by the official LoadGen, "
    f"which is not installed here: python -m pip install {LOADGEN_PACKAGE}"
)


@dataclasses.dataclass
class Job:
    """One call of the runner: what was asked for, the bundle, and the result as it grows."""

    options: argparse.Namespace
    bundle: Bundle
    result: dict[str, Any]
    probe: Probe = dataclasses.field(default_factory=Probe)
    ort: Any = None

    def note(self, text: str) -> None:
        """Add a note once."""
        if text and text not in self.result["notes"]:
            self.result["notes"].append(text)

    def check(self) -> None:
        """Hashes, then the runtime in a process of its own.

        Raises:
            BundleBroken: if the files are not what the sums say.
            RuntimeUnusable: if the runtime does not import.
        """
        problems = check_sums(self.bundle.root)
        self.result["bundle"]["problems"] = problems
        if problems:
            raise BundleBroken(
                "the bundle is not what its hashes say",
                why="\n       ".join(problems[:20]),
                remedy=_COPY_AGAIN,
            )
        self.result["bundle"]["digest"] = self.bundle.digest
        found = probe_runtime(
            self.bundle.versions, self.result["device"]["cpu"], timeout_s=self.options.import_timeout
        )
        if self.result["emulated"]:
            found.pop("import_ms", None)
        self.result["runtime"] = found
        if found["status"] != "ok":
            raise RuntimeUnusable(found["what"], why=found.get("why", ""), remedy=found["remedy"])

    def load_runtime(self) -> Any:
        """The runtime, imported into this process once it is known not to end it."""
        if self.ort is None:
            for text in require_runnable(self.bundle):
                self.note(text)
            self.ort = import_runtime()
        return self.ort

    def verify(self) -> None:
        """The golden samples.

        Raises:
            BundleBroken: if an output is out of tolerance.
        """
        outputs = check_golden(self.bundle, self.load_runtime(), self.options.provider)
        self.result["outputs"] = outputs
        if outputs is None:
            self.note("the bundle has no golden samples: outputs were not compared")
        elif outputs["problems"]:
            raise BundleBroken(
                "outputs are not within the bundle's tolerance",
                why="\n       ".join(outputs["problems"][:20]),
                remedy="compare the runtime's version with the manifest's, and report both",
            )

    def state(self) -> dict[str, Any]:
        """Clocks and throttling now, of NVIDIA GPUs only where they are what runs the model."""
        return read_state(self.probe, gpus=self.options.provider != CPU_PROVIDER)

    def settings(self, threads: int | None = None) -> SessionSettings:
        """The bundle's session settings under this call's options."""
        own = self.bundle.options(threads or self.options.threads)
        return dataclasses.replace(own, provider=self.options.provider)

    def entry(self, name: str, model: Path, settings: SessionSettings, feeds: Feeds) -> Entry:
        """A model as something to time."""
        ort = self.load_runtime()

        def open_one() -> tuple[Callable[[], Any], float]:
            started = time.perf_counter_ns()
            session = settings.open(ort, model)
            load_ms = (time.perf_counter_ns() - started) / 1e6
            own = fit_feeds(session, feeds)
            return lambda: session.run(None, own), load_ms

        return Entry(name, open_one)

    def query(self, feeds: Feeds) -> Callable[[int], Callable[[], Any]]:
        """What answers scenario queries: a batch where the batch axis is free, else sample after sample."""
        session = self.settings().open(self.load_runtime(), self.bundle.model_file)

        def of_size(samples: int) -> Callable[[], Any]:
            run, batched = query_of(session, feeds, self.bundle.manifest["model"]["inputs"], samples)
            if not batched:
                self.note(_ONE_BY_ONE)
            warm_up(run, Plan())
            return run

        return of_size


def fit_feeds(session: Any, feeds: Feeds) -> dict[str, Any]:
    """The inputs in the float types that a session takes.

    Raises:
        WrongUsage: if the model has other inputs.
    """
    wanted = {item.name: item.type for item in session.get_inputs()}
    if set(wanted) != set(feeds):
        raise WrongUsage(
            "a model to compare with has other inputs", why=f"{sorted(wanted)} instead of {sorted(feeds)}"
        )
    return {
        name: array.astype(_FLOATS[wanted[name]])
        if array.dtype.kind == "f" and wanted[name] in _FLOATS
        else array
        for name, array in feeds.items()
    }


def baseline_entries(job: Job, feeds: Feeds) -> list[Entry]:
    """The models to compare with: .onnx files with default options, or other bundles with their own."""
    entries = []
    for number, text in enumerate(job.options.baseline, 1):
        path = Path(text)
        name = "baseline" if len(job.options.baseline) == 1 else f"baseline {number}"
        if path.is_dir():
            other = open_bundle(path)
            problems = check_sums(path)
            if problems:
                raise BundleBroken(f"{text} is not what its hashes say", why=problems[0], remedy=_COPY_AGAIN)
            settings = dataclasses.replace(other.options(job.options.threads), provider=job.options.provider)
            entries.append(job.entry(name, other.model_file, settings, feeds))
        elif path.is_file():
            entries.append(
                job.entry(
                    name, path, SessionSettings(job.options.threads, provider=job.options.provider), feeds
                )
            )
        else:
            raise WrongUsage(f"there is no model {text}", remedy="name an .onnx file or a bundle's folder")
    return entries


def benchmark(job: Job) -> None:
    """Latency against baselines, cold start, sweeps and energy, into the job's result."""
    feeds, source = benchmark_feeds(job.bundle)
    if job.result["emulated"]:
        job.result["benchmark"] = _counted_region(job, feeds)
        return
    options, states, watch = job.options, [job.state()], ClockWatch()
    plan = Plan(pairs=options.pairs, runs=options.runs, limit_s=options.seconds)
    entries = [
        *baseline_entries(job, feeds),
        job.entry("bundle", job.bundle.model_file, job.settings(), feeds),
    ]
    timed = time_entries(entries, plan, between=lambda: states.append(job.state()))
    batch = _batch_of(job.bundle, feeds)
    found: dict[str, Any] = {
        "threads": options.threads,
        "provider": options.provider,
        "inputs": source,
        "shapes": {name: list(array.shape) for name, array in feeds.items()},
        "batch": batch,
        "file_bytes": job.bundle.size_bytes,
        "latency": {name: latency_of(item, batch) for name, item in timed.items()},
        "comparisons": {name: compare(timed[name], timed["bundle"]) for name in timed if name != "bundle"},
        "cold_start": cold_starts(job.bundle.model_file, feeds, job.settings(), repeats=options.cold_starts)
        if options.cold_starts
        else None,
        "batch_sweep": _batch_sweep(job, feeds, plan),
        "thread_sweep": _thread_sweep(job, feeds, plan, batch),
        "affinity_sweep": _affinity_sweep(job, feeds, plan, batch),
        "energy": None,
    }
    if options.energy_seconds > 0:
        found["energy"] = _energy(job, feeds)
    states.append(job.state())
    found["states"] = [states[0], states[-1]]
    found["clock"] = watch.read()
    job.result["benchmark"] = found
    _judge(job, states, found["clock"])


def _judge(job: Job, states: Sequence[Mapping[str, Any]], clock: Mapping[str, float | None]) -> None:
    """Void the run where the board throttled, lost voltage or slept; note a jump of the wall clock."""
    reasons = void_reasons(states)
    if clock["suspended_s"]:
        reasons.append(f"the machine slept for {clock['suspended_s']:.1f} s during the run")
    job.result["void_reasons"] += [reason for reason in reasons if reason not in job.result["void_reasons"]]
    job.result["void"] = bool(job.result["void_reasons"])
    if clock["wall_clock_step_s"]:
        job.note(
            f"the wall clock was set by {clock['wall_clock_step_s']:+.1f} s during the run; "
            "latencies are of another clock"
        )
    earlier = states[0].get("throttled_since_boot")
    if earlier:
        job.note(f"since the board was started it has had: {', '.join(earlier)}; a repeat may go unseen")


def _counted_region(job: Job, feeds: Feeds) -> dict[str, Any]:
    """On an emulated board: inferences between marks for the instruction counter, and no times."""
    job.note(
        "an emulated board: outputs and instruction counts only, its times say nothing about the real one"
    )
    count = job.options.counted
    job.options.threads = 1  # those of several would race for the counters, and be counted while they wait
    entries = [
        job.entry("bundle", job.bundle.model_file, job.settings(1), feeds),
        *baseline_entries(job, feeds),
    ]
    for tag, entry in enumerate(entries):
        step, _ = entry.open()
        step()
        mark_region(True, tag)
        for _ in range(count):
            step()
        mark_region(False, tag)
    return {
        "threads": 1,
        "counted_inferences": count,
        "counted": [entry.name for entry in entries],
        "shapes": {name: list(array.shape) for name, array in feeds.items()},
        "file_bytes": job.bundle.size_bytes,
    }


def _batch_of(bundle: Bundle, feeds: Feeds) -> int:
    first = feeds[bundle.manifest["model"]["inputs"][0]["name"]]
    return int(first.shape[0]) if first.ndim else 1


def _batch_sweep(job: Job, feeds: Feeds, plan: Plan) -> list[dict[str, Any]]:
    found = []
    for size in job.options.batch_sweep:
        batch = with_batch(feeds, job.bundle.manifest["model"]["inputs"], size)
        if batch is None:
            job.note(f"batch {size}: the model's batch axis is fixed")
            continue
        entry = job.entry("bundle", job.bundle.model_file, job.settings(), batch)
        timed = time_entries([entry], dataclasses.replace(plan, pairs=min(2, plan.pairs)))
        found.append({"batch": size, "latency": latency_of(timed["bundle"], size)})
    return found


def _thread_sweep(job: Job, feeds: Feeds, plan: Plan, batch: int) -> list[dict[str, Any]]:
    found = []
    for threads in job.options.thread_sweep:
        entry = job.entry("bundle", job.bundle.model_file, job.settings(threads), feeds)
        timed = time_entries([entry], dataclasses.replace(plan, pairs=min(2, plan.pairs)))
        found.append({"threads": threads, "latency": latency_of(timed["bundle"], batch)})
    return found


def _affinity_sweep(job: Job, feeds: Feeds, plan: Plan, batch: int) -> list[dict[str, Any]]:
    found = []
    for cores in job.options.affinity_sweep:
        with pinned(cores):
            entry = job.entry("bundle", job.bundle.model_file, job.settings(), feeds)
            timed = time_entries([entry], dataclasses.replace(plan, pairs=min(2, plan.pairs)))
        found.append({"affinity": cores, "latency": latency_of(timed["bundle"], batch)})
    return found


@contextlib.contextmanager
def pinned(cores: Sequence[int] | None) -> Iterator[None]:
    """Keep this thread, and the threads and processes that it starts, to some cores; None changes nothing.

    Raises:
        WrongUsage: if the system cannot do so, or none of the cores is there.
    """
    if cores is None:
        yield
        return
    if not hasattr(os, "sched_setaffinity"):
        raise WrongUsage("this system pins no process to cores", remedy="leave --affinity out")
    before = os.sched_getaffinity(0)
    if not set(cores) <= before:
        raise WrongUsage(
            f"there are no cores {','.join(map(str, sorted(set(cores) - before)))} for this process",
            why=f"it may use {','.join(map(str, sorted(before)))}",
        )
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _energy(job: Job, feeds: Feeds) -> list[dict[str, Any]] | None:
    meters, notes = find_meters(job.probe)
    for text in notes:
        job.note(text)
    if not meters:
        job.note(_ENERGY_NOTE)
        return None
    step, _ = job.entry("bundle", job.bundle.model_file, job.settings(), feeds).open()
    warm_up(step, Plan())
    return measure_energy(step, meters, seconds=job.options.energy_seconds)


def scenarios(job: Job) -> None:
    """The MLPerf scenarios that were asked for, into the job's result.

    Raises:
        WrongUsage: on an emulated board, or for a Server without a rate and a bound.
        RuntimeUnusable: if LoadGen is asked for and cannot be used.
    """
    if job.result["emulated"]:
        raise WrongUsage("scenarios are about time, which an emulated board does not have")
    options = job.options
    if "Server" in options.scenario and not min(options.qps or 0.0, options.bound_ms or 0.0) > 0:
        raise WrongUsage("Server needs --qps and --bound-ms", remedy="for example --qps 20 --bound-ms 100")
    feeds, _ = benchmark_feeds(job.bundle)
    single = with_batch(feeds, job.bundle.manifest["model"]["inputs"], 1)
    if single is None:
        job.note(
            f"the batch axis is fixed: a sample of the scenarios is a batch of {_batch_of(job.bundle, feeds)}"
        )
        single = feeds
    plan = ScenarioPlan(
        seconds=options.scenario_seconds,
        queries=options.queries,
        samples_per_query=options.samples_per_query,
        qps=options.qps or 0.0,
        bound_ms=options.bound_ms or 0.0,
        seed=options.seed,
        most_s=max(600.0, 2 * options.scenario_seconds),
    )
    official = _wants_loadgen(job)
    query = None if official else job.query(single)
    states, watch = [job.state()], ClockWatch()
    for name in options.scenario:
        job.result["scenarios"].append(
            _by_loadgen(job, name, single, plan) if query is None else run_scenario(name, query, plan)
        )
        states.append(job.state())
    _judge(job, states, watch.read())


def _wants_loadgen(job: Job) -> bool:
    if job.options.loadgen == "light":
        return False
    if importlib.util.find_spec(LOADGEN_MODULE) is not None:
        return True
    if job.options.loadgen == "official":
        raise RuntimeUnusable(
            "the official LoadGen is not installed here",
            remedy=f"python -m pip install {LOADGEN_PACKAGE}, or leave --loadgen official out",
        )
    job.note(_LIGHT_NOTE)
    return False


def _by_loadgen(job: Job, scenario: str, feeds: Feeds, plan: ScenarioPlan) -> dict[str, Any]:
    inputs = [
        {"name": spec["name"], "shape": spec["shape"]} for spec in job.bundle.manifest["model"]["inputs"]
    ]
    result, batched = official_scenario(
        scenario, plan, model=job.bundle.model_file, feeds=feeds, settings=job.settings(), inputs=inputs
    )
    if not batched:
        job.note(_ONE_BY_ONE)
    return result


def _whole_numbers(text: str) -> list[int]:
    values = [int(item) for item in text.split(",") if item]
    if not values or min(values) < 1:
        raise argparse.ArgumentTypeError("whole numbers from 1 on, separated by commas")
    return values


def _cores(text: str) -> list[int]:
    """The numbers of cores: 0,1 or 0-3 or 0-3,6."""
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise argparse.ArgumentTypeError("cores such as 0,1 or 0-3")
        found.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return sorted(found)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("a whole number from 1 on")
    return value


def _from_nothing(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError("a whole number from 0 on")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="device_runner.py",
        description="Check and measure an edgepress bundle on this machine, with numpy and the runtime only.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "commands",
        nargs="*",
        metavar="COMMAND",
        help=f"any of {', '.join(COMMANDS)} (default: the first three)",
    )
    add(
        "--bundle",
        default=str(Path(__file__).resolve().parent),
        help="the bundle's folder (default: this file's)",
    )
    add("--out", help="write the result as JSON to this file; - is standard output")
    add("--keep", action="store_true", help="also add the result to the bundle's runs/")
    add("--threads", type=_positive, default=1, help="threads inside one operator (default 1)")
    add("--provider", default=CPU_PROVIDER, help=f"the runtime's execution provider (default {CPU_PROVIDER})")
    add(
        "--baseline",
        action="append",
        default=[],
        metavar="MODEL",
        help="an .onnx file or bundle to compare with",
    )
    add("--pairs", type=_positive, default=8, help="how often sessions are opened afresh (default 8)")
    add("--runs", type=_positive, default=30, help="timed runs in each, at least (default 30)")
    add("--seconds", type=float, default=120.0, help="no new pair of sessions after this time (default 120)")
    add("--batch-sweep", type=_whole_numbers, default=[], metavar="1,2,4", help="also time these batch sizes")
    add(
        "--thread-sweep",
        type=_whole_numbers,
        default=[],
        metavar="1,2,4",
        help="also time these thread counts",
    )
    add("--affinity", type=_cores, metavar="CORES", help="keep to these cores, such as 0-3 or 0,2")
    add(
        "--affinity-sweep",
        type=_cores,
        action="append",
        default=[],
        metavar="CORES",
        help="also time on these cores; may be repeated",
    )
    add(
        "--cold-starts",
        type=_from_nothing,
        default=5,
        help="fresh processes for the cold start (default 5; 0 skips it)",
    )
    add(
        "--energy-seconds",
        type=float,
        default=5.0,
        help="how long to run for the energy (default 5; 0 skips it)",
    )
    add("--counted", type=_positive, default=1, help="marked inferences on an emulated board (default 1)")
    add("--scenario", action="append", default=[], choices=SCENARIOS, help="for `scenario`; may be repeated")
    add(
        "--scenario-seconds",
        type=float,
        default=10.0,
        help="least duration of a scenario (default 10; MLPerf: 600)",
    )
    add("--queries", type=_from_nothing, default=0, help="least number of a scenario's queries")
    add("--samples-per-query", type=_positive, default=8, help="of MultiStream and Offline (default 8)")
    add("--qps", type=float, help="arrival rate of Server, queries a second")
    add("--bound-ms", type=float, help="latency bound of Server")
    add("--seed", type=int, default=0, help="of Server's arrivals (default 0)")
    add(
        "--loadgen",
        choices=("auto", "official", "light"),
        default="auto",
        help="who runs the scenarios: the official LoadGen, or light (default: LoadGen where installed)",
    )
    add("--import-timeout", type=float, default=120.0, help="seconds for importing the runtime (default 120)")
    return parser


def new_result(bundle: Bundle, commands: Sequence[str], probe: Probe) -> dict[str, Any]:
    """A result with everything in it that is known before anything was run."""
    device = read_device(probe)
    return {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "commands": list(commands),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": device,
        "emulated": is_emulated(device),
        "bundle": {
            "model": bundle.manifest["model"].get("name"),
            "target": bundle.manifest.get("target", {}).get("name"),
            "digest": None,
            "problems": [],
        },
        "runtime": None,
        "outputs": None,
        "benchmark": None,
        "instructions": None,
        "scenarios": [],
        "void": False,
        "void_reasons": [],
        "notes": [],
        "error": None,
        "exit_code": EXIT_OK,
    }


def run_commands(job: Job, commands: Sequence[str]) -> int:
    """Run commands in the order of `COMMANDS`; the exit code, also in the result.

    Every command begins with `check`: what is not what it says is neither run nor timed.
    """
    steps: dict[str, Callable[[], None]] = {
        "check": job.check,
        "verify": job.verify,
        "benchmark": lambda: benchmark(job),
        "scenario": lambda: scenarios(job),
    }
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(pinned(job.options.affinity))
            if job.options.affinity is not None:
                job.result["device"]["affinity"] = job.options.affinity
            if not set(commands) <= {"check", "verify"} and not job.result["emulated"]:
                _watch_for_others(job, stack)
            for name in COMMANDS:
                if name == "check" or name in commands:
                    steps[name]()
        code = EXIT_CHECK if job.result["void"] else EXIT_OK
    except RunnerError as error:
        job.result["error"] = {"what": error.what, "why": error.why, "remedy": error.remedy}
        code = error.exit_code
    job.result["exit_code"] = code
    return code


def _watch_for_others(job: Job, stack: contextlib.ExitStack) -> None:
    """Note what spoils a measurement from outside: another run of this program, or a busy machine."""
    if sys.platform == "linux":
        # A name in the abstract namespace goes with its process, however that ends.
        claim = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        try:
            claim.bind(_CLAIM)
        except OSError:
            job.note("another run of the device runner is measuring at the same time: figures are noisier")
    load, cores = job.result["device"]["load_1min"], os.cpu_count() or 1
    if load is not None and load > cores / 2:
        job.note(f"a load average of {load:.1f} before the run: other programs are at work")


def summary_lines(result: Mapping[str, Any]) -> list[str]:
    """The result in a few lines for a person."""
    device, bundle = result["device"], result["bundle"]
    lines = [f"{bundle['model']} for {bundle['target']} on {device['board'] or device['cpu']['name']}"]
    if bundle["digest"]:
        lines.append("hashes      all files are as they were written")
    if (result["runtime"] or {}).get("status") == "ok":
        lines.append(
            f"runtime     onnxruntime {result['runtime']['version']}, numpy {result['runtime']['numpy']}"
        )
    if result["outputs"]:
        state = "within tolerance" if result["outputs"]["within_tolerance"] else "OUT OF TOLERANCE"
        lines.append(f"outputs     {result['outputs']['samples']} golden samples {state}")
    found = result["benchmark"] or {}
    for name, item in found.get("latency", {}).items():
        values = [f"{label} {item[key]:.3f}" for key, label in _SHOWN if item[key] is not None]
        lines.append(f"{name:<11} {', '.join(values)} ms; {item['runs']} runs in {item['sessions']} sessions")
    for name, item in found.get("comparisons", {}).items():
        spread = f" [{item['low']:.3f}, {item['high']:.3f}]" if item["low"] is not None else ""
        lines.append(f"speed       {item['ratio']:.3f}x{spread} of {name}")
    cold = found.get("cold_start")
    if cold:
        peak = cold["peak_memory_bytes"]
        memory = f", peak memory {peak / 1e6:.0f} MB" if peak is not None else ""
        lines.append(
            f"cold start  {cold['cold_start_ms']:.0f} ms{memory}, file {found['file_bytes'] / 1e6:.2f} MB"
        )
    for kind, label in (("batch_sweep", "batch"), ("thread_sweep", "threads")):
        for item in found.get(kind, ()):
            lines.append(
                f"{label:<7} {item[label]:<3} p50 {item['latency']['p50_ms']:.3f} ms, "
                f"{item['latency']['throughput_per_s']:.1f} samples/s"
            )
    for item in found.get("affinity_sweep", ()):
        cores = ",".join(map(str, item["affinity"]))
        lines.append(f"cores   {cores:<3} p50 {item['latency']['p50_ms']:.3f} ms")
    for item in found.get("energy") or ():
        if item["joules_per_inference"] is not None:
            lines.append(f"energy      {item['joules_per_inference']:.4g} J per inference ({item['meter']})")
    lines += [_scenario_line(item) for item in result["scenarios"]]
    lines += [f"VOID        {reason}" for reason in result["void_reasons"]]
    return lines + [f"note        {text}" for text in result["notes"]]


_SHOWN = (("p50_ms", "p50"), ("p90_ms", "p90"), ("p99_ms", "p99"), ("p99_9_ms", "p99.9"))


def _scenario_line(item: Mapping[str, Any]) -> str:
    valid = "valid" if item["valid"] else "NOT VALID"
    valid += f", LoadGen {item['loadgen_version']}" if item["official"] else ", light"
    if item["scenario"] == "Offline":
        return f"{item['scenario']:<12} {item['throughput_per_s']:.1f} samples/s, {valid}"
    text = f"{item['scenario']:<12} p{100 * item['percentile']:g} {item['percentile_ms']:.3f} ms"
    estimate = item["early_stopping"].get("estimate_ms")
    return (
        text + (f", early-stopping estimate {estimate:.3f} ms" if estimate is not None else "") + f", {valid}"
    )


def main(arguments: Sequence[str] | None = None, *, probe: Probe | None = None) -> int:
    """The command line; returns the exit code. `probe` reads another machine than this one, in tests."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["--child"]:
        try:
            return child_main(given[1])
        except RunnerError as error:
            sys.stderr.write(f"{error.what}: {' '.join(error.why.split())}\n")
            return error.exit_code
    options = _parser().parse_args(given)
    commands = list(options.commands) or list(_DEFAULT_COMMANDS)
    try:
        unknown = [name for name in commands if name not in COMMANDS]
        if unknown:
            raise WrongUsage(f"there is no command {unknown[0]!r}", remedy=f"one of {', '.join(COMMANDS)}")
        if "scenario" in commands and not options.scenario:
            options.scenario = ["SingleStream"]
        bundle = open_bundle(Path(options.bundle))
        out = _output(options.out, bundle)
        source = probe or Probe()
        job = Job(options, bundle, new_result(bundle, commands, source), source)
        code = run_commands(job, commands)
        if out is not None:
            out.write_text(dump_json(job.result), encoding="utf-8")
        _say(job, options.out)
        if options.keep and job.result["bundle"]["digest"]:
            keep_run(bundle, job.result)
    except RunnerError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    except OSError as error:
        sys.stderr.write(f"error: {error.strerror}: {error.filename}\n")
        return EXIT_USER
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return EXIT_INTERRUPTED
    return code


def _output(out: str | None, bundle: Bundle) -> Path | None:
    if out is None or out == "-":
        return None
    path = Path(out)
    root = bundle.root.resolve()
    if root in (path.resolve(), *path.resolve().parents):
        raise WrongUsage(
            "the result would lie inside the bundle, which would no longer be what its hashes say",
            remedy="choose a place outside of it with --out, or pass --keep to add it to the bundle's runs/",
        )
    with path.open("a", encoding="utf-8"):
        pass  # better refused now than after the measurement
    return path


def _say(job: Job, out: str | None) -> None:
    if out == "-":
        sys.stdout.write(dump_json(job.result))
    else:
        sys.stdout.write("\n".join(summary_lines(job.result)) + "\n")
    error = job.result["error"]
    if error is not None:
        sys.stderr.write(f"{RunnerError(error['what'], why=error['why'], remedy=error['remedy'])}\n")


if __name__ == "__main__":
    _forget_own_folder()
    raise SystemExit(main())
