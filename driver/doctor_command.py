"""`edgepress doctor`: check this installation and say what is missing."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from importlib import metadata
from typing import Literal

import msgspec

from .. import __version__
from ..graph.errors import EXIT_OK, EXIT_UNAVAILABLE, EdgepressError
from .cache import cache_folder
from .devices.options import on_devices
from .output import Answer, Table, format_bytes
from .reporter import Reporter

_ENOUGH_DISK_BYTES = 2_000_000_000
_RUNTIME_TIMEOUT_S = 60

# Run in a process of its own: a runtime built for another CPU dies with a signal, not an exception.
_RUNTIME_TRIAL = """
import numpy, onnx, onnxruntime
from onnx import TensorProto, helper
info = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 2])
graph = helper.make_graph([helper.make_node("MatMul", ["x", "x"], ["y"])], "trial", [info("x")], [info("y")])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
x = numpy.array([[1, 2], [3, 4]], numpy.float32)
(y,) = session.run(None, {"x": x})
assert (y == x @ x).all(), y
print(onnxruntime.__version__, *onnxruntime.get_available_providers())
"""


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One thing looked at: "failed" keeps edgepress from working, "missing" only a part of it."""

    name: str
    state: Literal["ok", "missing", "failed"]
    detail: str
    remedy: str | None = None


def run(arguments: argparse.Namespace, reporter: Reporter) -> Answer:
    """Make all checks, here or on devices; exit code 4 if one of them keeps edgepress from working."""
    if on_devices(arguments):
        from .devices import checks as device_checks
        from .devices import commands as device_commands

        if entries := device_commands.devices_of(arguments):
            return device_checks.doctor(entries, reporter)
    with reporter.stage("checks"):
        checks = (_python(), *_packages(), _runtime(), _processor(), _memory(), _cache(), _disk())
    failed = [check for check in checks if check.state == "failed"]
    rows = tuple((check.name, check.state, check.detail) for check in checks)
    remedies = [f"{check.name}: {check.remedy}" for check in checks if check.remedy]
    return Answer(
        document={"edgepress": __version__, "healthy": not failed, "checks": checks},
        blocks=(
            f"edgepress {__version__}",
            Table(columns=("check", "state", "found"), rows=rows),
            *(("What to do:\n" + "\n".join(f"  {line}" for line in remedies),) if remedies else ()),
        ),
        exit_code=EXIT_UNAVAILABLE if failed else EXIT_OK,
    )


def _python() -> Check:
    detail = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.maxsize < 2**32:
        return Check(name="python", state="failed", detail=detail, remedy="use a 64-bit Python")
    return Check(name="python", state="ok", detail=detail)


def _packages() -> list[Check]:
    """One check per package that edgepress or one of its extras asks for."""
    from packaging.requirements import Requirement

    found: dict[str, Check] = {}
    for line in metadata.requires("edgepress") or ():
        requirement = Requirement(line)
        extra = _extra_of(requirement)
        if requirement.name == "edgepress" or extra in ("dev", "demo") or requirement.name in found:
            continue
        found[requirement.name] = _package(requirement.name, str(requirement.specifier), extra)
    return list(found.values())


def _extra_of(requirement: object) -> str | None:
    """The extra that asks for a requirement, or None for the core."""
    marker = str(getattr(requirement, "marker", None) or "")
    _, found, rest = marker.partition("extra == ")
    return rest.strip("\"' )") if found else None


def _package(name: str, wanted: str, extra: str | None) -> Check:
    from packaging.specifiers import SpecifierSet

    bad: Literal["missing", "failed"] = "failed" if extra is None else "missing"
    asked = "" if extra is None else f"[{extra}]"
    remedy = f"pip install 'edgepress{asked}'"
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Check(name=name, state=bad, detail=f"not installed (needs {wanted})", remedy=remedy)
    if not SpecifierSet(wanted).contains(version, prereleases=True):
        detail = f"{version}, but edgepress needs {wanted}"
        return Check(name=name, state=bad, detail=detail, remedy=f"pip install --upgrade '{name}{wanted}'")
    return Check(name=name, state="ok", detail=version)


def _runtime() -> Check:
    """Load onnxruntime and run a small model, in a process that may die of it."""
    name = "onnxruntime runs"
    try:
        done = subprocess.run(
            [sys.executable, "-c", _RUNTIME_TRIAL],
            capture_output=True,
            text=True,
            timeout=_RUNTIME_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        detail = f"gave no answer in {_RUNTIME_TIMEOUT_S} s"
        return Check(name=name, state="failed", detail=detail, remedy="try again on an idle machine")
    if done.returncode == 0:
        return Check(name=name, state="ok", detail=done.stdout.strip())
    if done.returncode < 0:
        number = -done.returncode
        detail = f"the process was killed by {signal.Signals(number).name}"
        remedy = (
            "this onnxruntime uses instructions that this CPU lacks: install another version"
            if number == signal.SIGILL
            else "reinstall onnxruntime: pip install --force-reinstall onnxruntime"
        )
        return Check(name=name, state="failed", detail=detail, remedy=remedy)
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return Check(name=name, state="failed", detail=last, remedy="pip install --force-reinstall onnxruntime")


def _processor() -> Check:
    from ..targets.registry import load_target

    try:
        profile = load_target("host")
    except EdgepressError as error:
        return Check(name="processor", state="missing", detail=error.what, remedy=error.remedy)
    device = profile.device
    classes = [name for name in profile.derived_from if not name.startswith("_")]
    cores = f"{device.cores.value} cores; " if device.cores is not None else ""
    detail = f"{device.core}; {cores}compiled for as {' > '.join(classes) or device.architecture}"
    return Check(name="processor", state="ok", detail=detail)


def _memory() -> Check:
    try:
        total_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return Check(name="memory", state="missing", detail="this system does not say")
    return Check(name="memory", state="ok", detail=format_bytes(total_bytes))


def _cache() -> Check:
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return Check(
            name="cache folder",
            state="missing",
            detail=f"{folder}: {error.strerror}",
            remedy="make the folder writable, or set EDGEPRESS_CACHE to one that is",
        )
    return Check(name="cache folder", state="ok", detail=str(folder))


def _disk() -> Check:
    free_bytes = shutil.disk_usage(tempfile.gettempdir()).free
    detail = f"{format_bytes(free_bytes)} free for temporary files in {tempfile.gettempdir()}"
    if free_bytes < _ENOUGH_DISK_BYTES:
        return Check(name="disk", state="missing", detail=detail, remedy="free some space, or set TMPDIR")
    return Check(name="disk", state="ok", detail=detail)
