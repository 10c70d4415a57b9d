"""The Python on a device that runs models: its own if that has the runtime, else one made there once."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..graph.errors import RecipeError, RuntimeUnavailable
from .ssh_copy import ByteProgress, copy_files
from .ssh_session import ProgramEnd, SshSession

if TYPE_CHECKING:
    from packaging.version import Version

_LEAST_PYTHON = (3, 8)
_INSTALL_S = 1800.0
_TRIAL = (
    "import numpy, onnxruntime; print('onnxruntime', onnxruntime.__version__, 'numpy', numpy.__version__)"
)
_MANYLINUX = {"manylinux1": (2, 5), "manylinux2010": (2, 12), "manylinux2014": (2, 17)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DevicePython:
    """What runs models on a device.

    Attributes:
        program: the interpreter's path there.
        variables: what it needs in its environment.
        runtime_version: of onnxruntime.
        origin: whose it is: the device's own, a virtual environment, or unpacked wheels.
    """

    program: str
    variables: Mapping[str, str]
    runtime_version: str
    origin: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class RuntimeWish:
    """Which runtime a device shall have.

    Attributes:
        version: of onnxruntime; None takes what is there.
        wheels: a folder of wheels to install from, without a network.
        any_version: take the device's own runtime of whatever version (its Python was named on purpose).
    """

    version: str | None = None
    wheels: Path | None = None
    any_version: bool = False


def prepare_python(
    session: SshSession,
    facts: Mapping[str, Any],
    wish: RuntimeWish,
    *,
    progress: ByteProgress | None = None,
) -> DevicePython:
    """Find or make the Python that runs models on a device; tried before it is given out.

    Args:
        session: on a device that is held.
        facts: what `SshSession.probe` found.
        wish: which runtime.
        progress: told (bytes there, bytes in all) of wheels that are copied.

    Raises:
        RecipeError: if the folder of wheels holds none that fits the device.
        RuntimeUnavailable: if there is no runtime and none can be installed, or it does not run there.
        OutputError: if the device's disk is full.
    """
    version = tuple(facts["python"])
    if version < _LEAST_PYTHON:
        raise RuntimeUnavailable(
            f"the device's Python is {'.'.join(map(str, version))}",
            where=session.where,
            remedy="install Python 3.8 or later there, and name it with `python` in the devices file",
        )
    own = facts["packages"].get("onnxruntime") or facts["packages"].get("onnxruntime-gpu")
    takes_own = wish.wheels is None and "numpy" in facts["packages"] and own is not None
    if takes_own and (wish.any_version or wish.version in (None, own)):
        if wish.version not in (None, own):
            session.note(f"{session.where} runs its own onnxruntime {own}, not {wish.version}")
        return DevicePython(
            program=facts["executable"], variables={}, runtime_version=own, origin="the device's own"
        )
    if wish.wheels is not None:
        return _from_wheels(session, facts, wish, progress)
    if wish.version is None:
        raise _missing(session, facts, "it has no onnxruntime, and no version is asked for", "onnxruntime")
    ready = _ready(session, facts, wish.version)
    return ready or _from_index(session, facts, wish.version, own)


def try_runtime(session: SshSession, python: DevicePython) -> str:
    """Load numpy and onnxruntime in a process of their own; their versions as one line.

    Raises:
        RuntimeUnavailable: if they do not load, or the process dies of it.
    """
    end = session.run_program([python.program, "-c", _TRIAL], environment=python.variables, limit_s=180)
    last = next((line for line in reversed(end.told) if line), "")
    if end.status != 0:
        raise RuntimeUnavailable(
            "onnxruntime does not load on the device",
            where=session.where,
            why=last or f"exit status {end.status}",
            remedy="install the wheels that fit it with --wheels DIR, or correct its own installation",
        )
    return last


def fitting_wheels(folder: Path, facts: Mapping[str, Any]) -> dict[str, tuple[Version, Path]]:
    """The newest wheel of each project in a folder that the device's Python can load, by project name.

    Args:
        folder: with .whl files.
        facts: `python` (its version), `machine` and `libc` of the device.
    """
    from packaging.utils import InvalidWheelFilename, parse_wheel_filename

    found: dict[str, tuple[Version, Path]] = {}
    for path in sorted(folder.glob("*.whl")):
        try:
            name, version, _, tags = parse_wheel_filename(path.name)
        except InvalidWheelFilename:
            continue
        fits = any(_fits(tag.interpreter, tag.abi, tag.platform, facts) for tag in tags)
        if fits and (name not in found or found[name][0] < version):
            found[str(name)] = (version, path)
    return found


def _fits(interpreter: str, abi: str, platform: str, facts: Mapping[str, Any]) -> bool:
    major, minor = facts["python"][:2]
    match = re.fullmatch(r"(cp|py)(\d)(\d*)", interpreter)
    if match is None or int(match[2]) != major:
        return False
    of = int(match[3]) if match[3] else 0
    exact = abi == f"cp{major}{minor}" and of == minor
    if not (exact or (abi == "abi3" and of <= minor) or (match[1] == "py" and abi == "none" and of <= minor)):
        return False
    if platform == "any":
        return True
    machine = facts["machine"]
    if not platform.endswith(f"_{machine}"):
        return False
    kind = platform.removesuffix(f"_{machine}")
    needed = _MANYLINUX.get(kind)
    if (numbered := re.fullmatch(r"manylinux_(\d+)_(\d+)", kind)) is not None:
        needed = (int(numbered[1]), int(numbered[2]))
    name, version = facts["libc"]
    has = tuple(map(int, re.findall(r"\d+", version)))[:2]
    return kind == "linux" or (needed is not None and name == "glibc" and needed <= has)


def _key(facts: Mapping[str, Any], version: str, how: str) -> str:
    """The name of an environment: one for each runtime version, Python and way of installing."""
    major, minor = facts["python"][:2]
    return f"onnxruntime-{version}-cp{major}{minor}-{facts['machine']}-{how}"


def _ready(session: SshSession, facts: Mapping[str, Any], version: str) -> DevicePython | None:
    """An environment of this version that was made before, in whatever way."""
    for how in ("venv", "site"):
        key = _key(facts, version, how)
        if key in facts["environments"]:
            return _made(session, facts, version, how)
    return None


def _made(session: SshSession, facts: Mapping[str, Any], version: str, how: str) -> DevicePython:
    folder = f"{session.root}/python/{_key(facts, version, how)}"
    if how == "venv":
        return DevicePython(
            program=f"{folder}/bin/python",
            variables={},
            runtime_version=version,
            origin="virtual environment",
        )
    return DevicePython(
        program=facts["executable"],
        variables={"PYTHONPATH": f"{folder}/site", "PYTHONNOUSERSITE": "1"},
        runtime_version=version,
        origin="unpacked packages",
    )


def _from_wheels(
    session: SshSession, facts: Mapping[str, Any], wish: RuntimeWish, progress: ByteProgress | None
) -> DevicePython:
    """Install from a folder of wheels: by pip in an environment, or unpacked where pip is missing."""
    assert wish.wheels is not None
    wheels = fitting_wheels(wish.wheels, facts)
    lacking = [name for name in ("onnxruntime", "numpy") if name not in wheels]
    if lacking:
        raise RecipeError(
            f"no wheel of {' and '.join(lacking)} fits the device",
            where=f"--wheels {wish.wheels}",
            why=f"the device is {_kind(facts)}",
            remedy=f"fetch them with `{_download(facts, wish.version)}`",
        )
    version = str(wheels["onnxruntime"][0])
    if wish.version not in (None, version):
        session.note(f"the wheels bring onnxruntime {version}, not {wish.version}")
    how = "venv" if {"venv", "ensurepip"} <= set(facts["modules"]) else "site"
    made = _made(session, facts, version, how)
    if _key(facts, version, how) in facts["environments"]:
        return made
    session.note(f"installing onnxruntime {version} on {session.where}, once for this version")
    copied = copy_files(session, {path.name: path for _, path in wheels.values()}, progress=progress)
    paths = [f"{copied.folder}/{path.name}" for _, path in wheels.values()]
    if how == "venv":
        _venv(session, facts, version, ["--no-index", "--no-deps", *paths])
    else:
        folder = f"{session.root}/python/{_key(facts, version, how)}"
        session.ask("unpack", {"folder": folder, "wheels": paths})
    return _finished(session, facts, made, how)


def _from_index(session: SshSession, facts: Mapping[str, Any], version: str, own: str | None) -> DevicePython:
    """Let the device's pip fetch the runtime."""
    modules = set(facts["modules"])
    wanted = [f"onnxruntime=={version}", "numpy"]
    session.note(f"installing onnxruntime {version} on {session.where}, once for this version")
    if {"venv", "ensurepip"} <= modules:
        how = "venv"
        _venv(session, facts, version, wanted)
    elif "pip" in modules:
        how = "site"
        target = f"{session.root}/python/{_key(facts, version, how)}/site"
        _pip(session, facts, facts["executable"], ["--target", target, *wanted], version)
    else:
        has = f"it has onnxruntime {own}, " if own else "it has no onnxruntime, "
        raise _missing(session, facts, f"{has}and neither pip nor ensurepip to install {version}", version)
    return _finished(session, facts, _made(session, facts, version, how), how)


def _venv(session: SshSession, facts: Mapping[str, Any], version: str, packages: Sequence[str]) -> None:
    folder = f"{session.root}/python/{_key(facts, version, 'venv')}"
    end = session.run_program([facts["executable"], "-m", "venv", folder], limit_s=_INSTALL_S)
    if end.status != 0:
        raise _failed(session, facts, end, version, "its Python makes no virtual environment")
    _pip(session, facts, f"{folder}/bin/python", packages, version)


def _pip(
    session: SshSession, facts: Mapping[str, Any], python: str, packages: Sequence[str], version: str
) -> None:
    options = ("--no-input", "--disable-pip-version-check", "--no-cache-dir", "--only-binary=:all:", "-q")
    words = [python, "-m", "pip", "install", *options, *packages]
    end = session.run_program(words, limit_s=_INSTALL_S)
    if end.status != 0:
        raise _failed(session, facts, end, version, "its pip does not install it")


def _finished(session: SshSession, facts: Mapping[str, Any], made: DevicePython, how: str) -> DevicePython:
    """Try a new environment and mark it as whole."""
    try_runtime(session, made)
    key = _key(facts, made.runtime_version, how)
    session.ask("finish", {"folder": f"{session.root}/python/{key}"})
    return made


def _failed(
    session: SshSession, facts: Mapping[str, Any], end: ProgramEnd, version: str, what: str
) -> RuntimeUnavailable:
    told = next((line for line in end.told if line.startswith("ERROR")), None)
    last = told or next((line for line in reversed(end.told) if line), f"exit status {end.status}")
    return _missing(session, facts, f"{what}: {last}", version)


def _missing(session: SshSession, facts: Mapping[str, Any], why: str, version: str) -> RuntimeUnavailable:
    wanted = None if version == "onnxruntime" else version
    return RuntimeUnavailable(
        "the device has no runtime for the model",
        where=session.where,
        why=why,
        remedy=f"fetch wheels here with `{_download(facts, wanted)}` and add --wheels wheels",
    )


def _kind(facts: Mapping[str, Any]) -> str:
    name, version = facts["libc"]
    python = ".".join(map(str, facts["python"]))
    return f"{facts['machine']} with Python {python} and {name or 'no glibc'} {version}".rstrip()


def _download(facts: Mapping[str, Any], version: str | None) -> str:
    """The command that fetches the wheels for a device on a machine with a network."""
    major, minor = facts["python"][:2]
    has = [int(part) for part in re.findall(r"\d+", facts["libc"][1])[:2]] or [2, 17]
    platforms = [f"manylinux_2_{part}" for part in (28, 27, 17) if [2, part] <= has]
    words = ["pip", "download", "-d", "wheels", "--only-binary=:all:"]
    words += ["--python-version", f"{major}.{minor}"]
    for platform in [*platforms, "manylinux2014"]:
        words += ["--platform", f"{platform}_{facts['machine']}"]
    return shlex.join([*words, "numpy", "onnxruntime" if version is None else f"onnxruntime=={version}"])
