"""What is made once for emulated boards: a file system, the emulators, two small programs, the runtime."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ...graph.errors import OutputError, RuntimeUnavailable
from .boards import BOARDS, EmulatedBoard
from .debian import DebianPackages, run_tool, unpack, unpack_only
from .folders import is_on
from .wheels import PYTHON, fetch_site

Step = Callable[[str], contextlib.AbstractContextManager[object]]

_SUITE = "bookworm"  # its QEMU takes plugins
_NEW_SUITE = "trixie-backports"  # its QEMU knows the Cortex-A78AE
_PYTHON = f"{PYTHON[0]}.{PYTHON[1]}"
_PACKAGES = (
    *("bash", "dash", "coreutils", "grep", "sed", "gawk-", "mawk", "findutils", "gzip", "tar", "procps"),
    *("util-linux", "base-files", "openssh-server", "openssh-sftp-server", "openssh-client"),
    *("libstdc++6", "libgomp1", f"python{_PYTHON}-minimal", f"libpython{_PYTHON}-stdlib"),
)
_LEFT_OUT = ("doc", "man", "locale", "info", "lintian", "bash-completion", "perl5", "zoneinfo")
_LIBRARIES = ("./lib64*", "./lib/x86_64-linux-gnu/*", "./usr/lib/x86_64-linux-gnu/*.so*")
_FOLDERS = (
    "root",
    "home",
    "tmp",
    "proc",
    "sys",
    "dev",
    "run",
    "host",
    "etc/ssh",
    "opt/emulator",
    "opt/site",
)
_FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/bash\n"
    "sshd:x:101:65534::/run/sshd:/usr/sbin/nologin\n"
    "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
    "etc/group": "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n",
    "etc/shadow": "root:*:19000:0:99999:7:::\nsshd:*:19000:0:99999:7:::\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nshadow: files\nhosts: files dns\n",
    "etc/hosts": "127.0.0.1 localhost\n",
    "etc/motd": "This is an emulated board. Its clock times are not board times.\n",
    "var/log/lastlog": "",
    "var/log/wtmp": "",
}
_FORMAT = 1  # of what is made here; a new number makes it all again


@dataclasses.dataclass(frozen=True)
class Emulator:
    """The folder that all emulated boards of this machine live in.

    Attributes:
        home: below the cache; some 250 MB once it is set up.
    """

    home: Path

    @property
    def root(self) -> Path:
        """The file system that the boards share; each has its own /root, /tmp, /proc and /sys."""
        return self.home / "root"

    @property
    def instances(self) -> Path:
        """One folder for each board that is switched on."""
        return self.home / "instances"

    def identity(self, board: EmulatedBoard) -> Path:
        """Where a board's own /proc/cpuinfo, /sys and launcher lie."""
        return self.home / "boards" / board.name

    @property
    def plugin(self) -> Path:
        """The instruction counter; missing where there was no C compiler."""
        return self.root / "opt/emulator/libinsnmix.so"

    def launcher(self, board: EmulatedBoard) -> Path:
        """What the kernel starts the board's programs with; missing where there was no C compiler."""
        return self.identity(board) / "pin"

    def is_ready(self, board: EmulatedBoard) -> bool:
        """Whether nothing is left to be made for this board, packages of the runtime apart."""
        stages = self._stages([board])
        return all(self._is_fresh(name, key) for name, key, _ in stages)

    def install(self, boards: Sequence[EmulatedBoard], step: Step) -> None:
        """Make what is missing; safe to repeat, and goes on where an earlier one was stopped.

        Args:
            boards: which shall work afterwards.
            step: opens a stage of the progress by its name.

        Raises:
            RuntimeUnavailable: if a tool, the network or a package is missing.
            OutputError: if the folder cannot be written, or a board is on while its parts must be made anew.
        """
        _need_host()
        with self._locked():
            for name, key, make in self._stages(boards):
                if not self._is_fresh(name, key):
                    if name in ("guest", "programs") and self._stamp(name).exists():  # all boards run on it
                        self._require_off()
                    with step(f"emulator: {_TITLES[name]}"):
                        make()
                    self._stamp(name).parent.mkdir(parents=True, exist_ok=True)
                    self._stamp(name).write_text(key, encoding="ascii")

    def site(self, version: str | None, step: Step) -> Path:
        """The folder with the board's numpy and onnxruntime; fetched on first use.

        Args:
            version: of onnxruntime; None takes this machine's own.
            step: opens a stage of the progress by its name.

        Raises:
            RuntimeUnavailable: if there are no wheels of it for the board, or no network.
            OutputError: if the folder cannot be written.
        """
        from ..ort_runtime import runtime_version

        wanted = version or runtime_version()
        folder = self.home / "sites" / f"onnxruntime-{wanted}-cp{PYTHON[0]}{PYTHON[1]}"
        if not folder.is_dir():
            with self._locked():
                if not folder.is_dir():
                    with step(f"emulator: onnxruntime {wanted} for aarch64"):
                        fetch_site(folder, wanted)
        return folder

    def size_bytes(self) -> int:
        """What it takes on the disk now."""
        return sum(
            path.lstat().st_blocks * 512
            for path in self.home.rglob("*")
            if path.is_file() and not path.is_symlink()
        )

    def remove(self) -> None:
        """Remove everything, while no board is on.

        Raises:
            OutputError: if a board is switched on, or a file cannot be removed.
        """
        if not self.home.is_dir():
            return
        with self._locked():
            self._require_off()
            _remove_folder(self.home)

    def _require_off(self) -> None:
        on = [folder.name for folder in self.instances.glob("*/") if is_on(folder)]
        if on:
            raise OutputError(
                "an emulated board is switched on",
                where=", ".join(sorted(on)),
                remedy="switch it off (`edgepress emulator down BOARD`), or wait for what uses it",
            )

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time makes things here."""
        try:
            self.home.mkdir(parents=True, exist_ok=True)
            with (self.home / "lock").open("w", encoding="ascii") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield
        except OSError as error:
            raise OutputError(
                "the emulated boards' folder cannot be written",
                where=str(error.filename or self.home),
                why=error.strerror,
                remedy="free some space (they need about 300 MB), or set EDGEPRESS_CACHE to another folder",
            ) from error

    def _stages(self, boards: Sequence[EmulatedBoard]) -> list[tuple[str, str, Callable[[], None]]]:
        """What is made, in order: name, what it depends on as a key, and how."""
        guest = _key(_FORMAT, _SUITE, *_PACKAGES)
        compiler = shutil.which("gcc") or shutil.which("cc")
        sources = [_own(name).read_text() for name in ("pin.c", "insnmix.c", "check.py", "boards.py")]
        programs = _key(guest, compiler, *sources)
        stages: list[tuple[str, str, Callable[[], None]]] = [
            ("guest", guest, self._make_guest),
            ("qemu", _key(guest, "qemu"), self._make_emulator),
        ]
        if not all(board.counts for board in boards):
            stages.append(("qemu-new", _key(guest, _NEW_SUITE), self._make_new_emulator))
        stages.append(("programs", programs, lambda: self._make_programs(compiler)))
        return stages

    def _stamp(self, name: str) -> Path:
        return self.home / "stamps" / name

    def _is_fresh(self, name: str, key: str) -> bool:
        try:
            return self._stamp(name).read_text(encoding="ascii") == key
        except OSError:
            return False

    def _make_guest(self) -> None:
        """The arm64 file system, with what maintainer scripts would have added."""
        shutil.rmtree(self.home / "stamps", ignore_errors=True)
        _remove_folder(self.root)
        part = self.home / "root.part"
        _remove_folder(part)
        part.mkdir()
        with self._packages("guest", _SUITE, "arm64") as packages:
            for package in packages.fetch(_PACKAGES):
                unpack(package, part)
        for name in _LEFT_OUT:
            shutil.rmtree(part / "usr/share" / name, ignore_errors=True)
        for name in _FOLDERS:
            (part / name).mkdir(parents=True, exist_ok=True)
        (part / "tmp").chmod(0o1777)
        for name, text in _FILES.items():
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            (part / name).write_text(text, encoding="ascii")
        (part / "etc/shadow").chmod(0o600)
        for link, target in (("usr/bin/awk", "mawk"), ("usr/bin/python3", f"python{_PYTHON}")):
            (part / link).unlink(missing_ok=True)
            (part / link).symlink_to(target)
        if not (part / "bin/sh").exists():
            (part / "bin/sh").symlink_to("dash")
        part.rename(self.root)

    def _make_emulator(self) -> None:
        """QEMU with plugins, and its own libraries beside those of the board (another architecture)."""
        with self._packages("host", _SUITE, "amd64") as packages:
            for package in packages.fetch(["qemu-user"]):
                is_emulator = package.name.startswith("qemu-user_")
                unpack_only(package, self.root, ["./usr/bin/qemu-aarch64"] if is_emulator else _LIBRARIES)
        self._try_emulator([*self.emulator_words("qemu-aarch64"), "--version"], "version")

    def _make_new_emulator(self) -> None:
        """A newer QEMU without plugins: one static program."""
        with self._packages("new", _NEW_SUITE, "amd64") as packages:
            for package in packages.fetch(["qemu-user"], alone=True):
                unpack_only(package, self.home, ["./usr/bin/qemu-aarch64"])
        fetched = self.home / "usr/bin/qemu-aarch64"
        if fetched.is_file():
            fetched.rename(self.root / "usr/bin/qemu-aarch64-new")
        shutil.rmtree(self.home / "usr", ignore_errors=True)
        self._try_emulator([*self.emulator_words("qemu-aarch64-new"), "-cpu", "help"], "cortex-a78ae")

    def emulator_words(self, name: str) -> list[str]:
        """How an emulator is started on this machine, with its own libraries and none of the host's."""
        program = str(self.root / "usr/bin" / name)
        if name != "qemu-aarch64":
            return [program]
        folders = [self.root / below / "x86_64-linux-gnu" for below in ("lib", "usr/lib")]
        loader = self.root / "lib64/ld-linux-x86-64.so.2"
        return [str(loader), "--library-path", ":".join(map(str, folders)), program]

    def _try_emulator(self, words: Sequence[str], expected: str) -> None:
        try:
            done = run_tool(words)
        except OSError as error:
            raise RuntimeUnavailable(
                "the emulator does not start", where=words[-2], why=error.strerror
            ) from error
        if expected not in done.stdout:
            raise RuntimeUnavailable(
                "the emulator does not start",
                where=words[0],
                why=(done.stderr.strip().splitlines() or [f"it says nothing of {expected}"])[-1],
                remedy="`edgepress emulator remove`, then set it up again",
            )

    def _make_programs(self, compiler: str | None) -> None:
        """The launcher of every board and the instruction counter, where there is a C compiler."""
        from .boards import write_identity

        for board in BOARDS.values():
            folder = self.identity(board)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            write_identity(board, folder)
            self._link_sysroot(board)
        shutil.copyfile(_own("check.py"), self.root / "opt/emulator/check.py")
        self.plugin.unlink(missing_ok=True)
        if compiler is None:
            return
        _compile(compiler, ["-shared", "-fPIC"], _own("insnmix.c"), self.plugin)
        for board in BOARDS.values():
            emulator = f"/usr/bin/{board.emulator}"
            fixed = [f'-DCPU="{board.cpu}"', f'-DQEMU="{emulator}"']
            _compile(compiler, ["-static", *fixed], _own("pin.c"), self.launcher(board))

    def _link_sysroot(self, board: EmulatedBoard) -> None:
        """A view of the shared file system with this board's /proc and /sys, for QEMU's option -L."""
        folder = self.identity(board) / "sysroot"
        folder.mkdir()
        for entry in sorted(self.root.iterdir()):
            if entry.name in ("usr", "bin", "sbin", "lib", "etc", "opt"):
                (folder / entry.name).symlink_to(os.path.relpath(entry, folder))
        (folder / "proc").mkdir()
        (folder / "proc/cpuinfo").symlink_to("../../cpuinfo")
        (folder / "sys").symlink_to("../sys")

    @contextlib.contextmanager
    def _packages(self, name: str, suite: str, architecture: str) -> Iterator[DebianPackages]:
        """A place to download to, removed afterwards."""
        folder = self.home / "packages" / name
        try:
            yield DebianPackages(folder, suite, architecture)
        finally:
            shutil.rmtree(self.home / "packages", ignore_errors=True)


_TITLES = {
    "guest": f"the board's file system (Debian {_SUITE}, arm64)",
    "qemu": "QEMU",
    "qemu-new": "a newer QEMU",
    "programs": "launchers and instruction counter",
}


def _need_host() -> None:
    machine, system = platform.machine(), platform.system()
    if system != "Linux" or machine != "x86_64":
        raise RuntimeUnavailable(
            "emulated boards run on Linux on x86-64",
            where=f"{system} on {machine}",
            remedy="use such a machine or container, or a board by ssh: --device ssh://USER@HOST",
        )


def _compile(compiler: str, options: Sequence[str], source: Path, program: Path) -> None:
    done = run_tool([compiler, "-O2", *options, "-o", str(program), str(source)])
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise RuntimeUnavailable(
            f"{source.name} does not compile",
            where=compiler,
            why=next((line for line in lines if "error" in line), lines[-1] if lines else None),
            remedy="install the C library's headers (`sudo apt install gcc libc6-dev`)",
        )


def _key(*parts: object) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:16]


def _own(name: str) -> Path:
    return Path(__file__).with_name(name)


def _remove_folder(folder: Path) -> None:
    """Remove a folder, also one with folders in it that its owner may not write to."""
    for path in [folder, *folder.rglob("*")] if folder.is_dir() else []:
        if path.is_dir() and not path.is_symlink() and not os.access(path, os.W_OK):
            path.chmod(0o700)
    shutil.rmtree(folder, ignore_errors=not folder.is_dir())
