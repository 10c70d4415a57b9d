"""The runtime's packages for a board: the stock aarch64 wheels, unpacked once for each version."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from ...graph.errors import RuntimeUnavailable

PYTHON = (3, 11)  # of the board's Debian release
_GLIBC = (35, 34, 31, 28, 27, 24, 17)  # minor versions that wheels are tagged with and the board satisfies
_LIMIT_S = 900


def fetch_site(folder: Path, version: str | None) -> str:
    """Fetch numpy and onnxruntime and unpack them into `folder`; the version of onnxruntime.

    Args:
        folder: it must not exist; nothing is left there on failure.
        version: of onnxruntime; None takes this machine's own, as far as there is one for the board.

    Raises:
        RuntimeUnavailable: if pip is missing, or there are no such wheels.
    """
    from ..ort_runtime import runtime_version

    wanted = version or runtime_version()
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    downloads, site = part / "wheels", part / "site"
    downloads.mkdir(parents=True)
    site.mkdir()
    try:
        _download(downloads, [f"onnxruntime=={wanted}", "numpy>=2,<3"], wanted)
        for wheel in sorted(downloads.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)
        site.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return wanted


def _download(folder: Path, packages: list[str], version: str) -> None:
    major, minor = PYTHON
    words = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    words += ["--only-binary=:all:", "--implementation", "cp", "--python-version", f"{major}.{minor}"]
    words += [word for abi in (f"cp{major}{minor}", "abi3", "none") for word in ("--abi", abi)]
    platforms = [f"manylinux_2_{number}_aarch64" for number in _GLIBC]
    words += [word for name in (*platforms, "manylinux2014_aarch64") for word in ("--platform", name)]
    try:
        done = subprocess.run(
            [*words, "--dest", str(folder), *packages],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeUnavailable(
            f"pip did not fetch the board's packages within {_LIMIT_S} s", remedy="check the network"
        ) from error
    if done.returncode == 0:
        return
    lines = done.stderr.strip().splitlines()
    told = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR")]
    lacks_pip = any("No module named pip" in line for line in lines)
    raise RuntimeUnavailable(
        f"onnxruntime {version} for the emulated board cannot be fetched",
        where="pip download",
        why="this Python has no pip" if lacks_pip else (told or lines or ["it ended without a word"])[-1],
        remedy=f"{sys.executable} -m ensurepip"
        if lacks_pip
        else f"check the network, and that there is a wheel of it for Python {major}.{minor} on aarch64",
    )
