"""Debian packages for a board's file system: fetched by the host's apt-get, unpacked, never installed.

apt-get works with a state folder of its own here: no sources, lists or packages of the host are read or
changed. Signatures are checked as ever, against Debian's keyring.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from ...graph.errors import RuntimeUnavailable

_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_MIRROR, _SECURITY = "http://deb.debian.org/debian", "http://deb.debian.org/debian-security"
_LIMIT_S = 900
# What only maintainer scripts use, and those are never run here.
_UNUSED = re.compile(
    r"perl|perl-base|perl-modules.*|libperl.*|libgdbm.*|lib.*-perl|usrmerge|debconf|adduser|passwd|dpkg|"
    r"sensible-utils|ucf|runit-helper|init-system-helpers|sysvinit-utils|lsb-base|libpam-modules.*|"
    r"libpam-runtime|libsemanage.*|libsepol2|util-linux-extra"
)


class DebianPackages:
    """Packages of one suite for one architecture.

    Args:
        folder: for apt's state and the downloads; it can be removed afterwards.
        suite: "bookworm", "trixie-backports".
        architecture: "arm64", "amd64".
    """

    def __init__(self, folder: Path, suite: str, architecture: str) -> None:
        self._folder = folder
        self._suite = suite
        self._architecture = architecture

    def fetch(self, packages: Sequence[str], *, alone: bool = False) -> list[Path]:
        """Download packages and what they depend on; the .deb files.

        Args:
            packages: their names.
            alone: these only, without what they depend on.

        Raises:
            RuntimeUnavailable: if apt-get, its keyring or the network is missing.
        """
        _need_tools()
        self._prepare()
        self._apt("update")
        names = list(packages) if alone else self._closure(packages)
        archives = self._folder / "archives"
        self._apt("download", *names, folder=archives)
        return sorted(archives.glob("*.deb"))

    def _prepare(self) -> None:
        for name in ("lists/partial", "archives/partial"):
            (self._folder / name).mkdir(parents=True, exist_ok=True)
        (self._folder / "status").touch()
        mirror, security = _mirrors()
        signed = f"deb [signed-by={_KEYRING}]"
        sources = [f"{signed} {mirror} {self._suite} main"]
        if not self._suite.endswith("-backports"):
            sources.append(f"{signed} {mirror} {self._suite}-updates main")
            sources.append(f"{signed} {security} {self._suite}-security main")
        (self._folder / "sources.list").write_text("\n".join([*sources, ""]), encoding="utf-8")
        places = {
            "Dir::State": "",
            "Dir::State::status": "status",
            "Dir::State::lists": "lists",
            "Dir::Cache": "",
            "Dir::Cache::archives": "archives",
            "Dir::Etc::sourcelist": "sources.list",
        }
        lines = [f'{name} "{self._folder / place}";' for name, place in places.items()]
        lines += [
            f'APT::Architecture "{self._architecture}";',
            f'APT::Architectures {{ "{self._architecture}"; }};',
            'Dir::Etc::sourceparts "-";',
            'APT::Sandbox::User "";',
            'Acquire::Languages "none";',
            'APT::Update::Error-Mode "any";',  # a mirror that is not there is an error, not a warning
        ]
        (self._folder / "apt.conf").write_text("\n".join([*lines, ""]), encoding="utf-8")

    def _closure(self, packages: Sequence[str]) -> list[str]:
        told = self._apt("install", "--simulate", "--no-install-recommends", *packages)
        names = re.findall(r"^Inst (\S+)", told, re.MULTILINE)
        return [name for name in names if not _UNUSED.fullmatch(name)]

    def _apt(self, *words: str, folder: Path | None = None) -> str:
        environment = {**os.environ, "APT_CONFIG": str(self._folder / "apt.conf"), "LC_ALL": "C"}
        done = run_tool(["apt-get", "-q", *words], folder=folder, environment=environment)
        if done.returncode == 0:
            return done.stdout
        told = [line for line in (done.stderr + done.stdout).splitlines() if line.startswith(("E:", "Err:"))]
        raise RuntimeUnavailable(
            f"Debian's packages ({self._suite}, {self._architecture}) cannot be fetched",
            where=f"apt-get {words[0]}",
            why="; ".join(told[:3]) or f"exit status {done.returncode}",
            remedy="check the network; EDGEPRESS_DEBIAN_MIRROR and EDGEPRESS_DEBIAN_SECURITY name other "
            "mirrors",
        )


def unpack(package: Path, folder: Path) -> None:
    """All files of a package into a folder.

    Raises:
        RuntimeUnavailable: if it is damaged, or the folder cannot be written.
    """
    done = run_tool(["dpkg-deb", "--extract", str(package), str(folder)])
    _require(done, package)


def unpack_only(package: Path, folder: Path, names: Sequence[str]) -> None:
    """Some files of a package into a folder, by names as tar matches them ("./usr/bin/qemu-aarch64").

    Raises:
        RuntimeUnavailable: if it is damaged, or the folder cannot be written.
    """
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE) as archive:
        words = ["tar", "--extract", "--directory", str(folder), "--wildcards", *names]
        # A package has only some of the names; what is missed in the end is found by starting the program.
        subprocess.run(words, stdin=archive.stdout, stderr=subprocess.DEVNULL, timeout=_LIMIT_S, check=False)
        assert archive.stdout is not None
        archive.stdout.close()


def run_tool(
    words: Sequence[str], *, folder: Path | None = None, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program of the host to its end and keep what it says.

    Raises:
        RuntimeUnavailable: if it does not end in time.
    """
    try:
        return subprocess.run(
            words,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeUnavailable(
            f"{words[0]} did not end within {_LIMIT_S} s",
            where=" ".join(words[:3]),
            remedy="check the network, and try again: what is done is kept",
        ) from error


def _require(done: subprocess.CompletedProcess[str], package: Path) -> None:
    if done.returncode != 0:
        raise RuntimeUnavailable(
            "a package cannot be unpacked",
            where=package.name,
            why=(done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1],
            remedy="free some space, and try again: what is done is kept",
        )


def _need_tools() -> None:
    missing = [name for name in ("apt-get", "dpkg-deb", "tar") if shutil.which(name) is None]
    if missing:
        raise RuntimeUnavailable(
            f"setting up an emulated board needs {' and '.join(missing)}",
            why="its file system is made of Debian's packages, which the host's apt-get fetches and checks",
            remedy="use a Debian or Ubuntu machine or container, or a board by ssh: --device ssh://USER@HOST",
        )
    if not _KEYRING.is_file():
        raise RuntimeUnavailable(
            "Debian's keyring is not on this machine",
            where=str(_KEYRING),
            why="without it nobody can tell whether the packages are Debian's own",
            remedy="sudo apt install debian-archive-keyring",
        )


def _mirrors() -> tuple[str, str]:
    """Debian's mirrors: as named in the environment, else those that the host's own apt uses, else usual."""
    words = ["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE)", "Created-By: Packages"]
    rows = [line.split() for line in run_tool(words).stdout.splitlines()]
    known = [row for row in rows if len(row) == 2 and "/debian" in row[0]]
    plain = next((uri for uri, release in known if not release.endswith("-security")), _MIRROR)
    security = next((uri for uri, release in known if release.endswith("-security")), _SECURITY)
    named = os.environ.get("EDGEPRESS_DEBIAN_MIRROR"), os.environ.get("EDGEPRESS_DEBIAN_SECURITY")
    return (named[0] or plain).rstrip("/"), (named[1] or security).rstrip("/")
