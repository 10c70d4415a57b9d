"""A device for tests: an ssh server of the test's own on the loopback, with its own keys and folders."""

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from edgepress.runtimes import remote_agent
from edgepress.runtimes.remote import parse_device_url
from edgepress.runtimes.ssh import SshDevice
from edgepress.runtimes.ssh_connection import SshConnection, SshSettings
from edgepress.runtimes.ssh_session import SessionLimits, SshSession

SERVER = shutil.which("sshd") or next(filter(os.path.exists, ["/usr/sbin/sshd", "/usr/libexec/sshd"]), None)


def need_server():
    """Skip where OpenSSH's server or its tools are missing."""
    for program in ("ssh", "ssh-keygen"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    if SERVER is None:
        pytest.skip("sshd is not installed (openssh-server)")
    if not Path("/proc/self/task").is_dir():
        pytest.skip("the tests stop servers by what /proc says of them")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd wants it when it runs as root


def make_key(path):
    words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", str(path)]
    subprocess.run(words, check=True, stdin=subprocess.DEVNULL)
    return path.with_name(path.name + ".pub").read_text().split()[:2]


class Board:
    """The server, its client's configuration, and the folder that the device keeps its files in."""

    def __init__(self, base):
        self.base = base
        self.cache = base / "cache"
        self.boot_id = base / "boot_id"
        self.port = free_port()
        self.config = base / "client_config"
        self.known_hosts = base / "known_hosts"
        self.authorized = base / "authorized_keys"
        self.log = base / "sshd.log"
        self.host_key = make_key(base / "host_key")
        self.user_key = make_key(base / "user_key")
        self.server = None
        self.extra = ()
        self.tests = 0
        self.reset()

    def reset(self):
        """As it was at first, with an empty `folder` for a test's own files."""
        self.tests += 1
        self.folder = self.base / f"test{self.tests}"
        self.folder.mkdir()
        shutil.rmtree(self.cache, ignore_errors=True)
        self.boot_id.write_text("first\n")
        self.write()
        if self.server is None or self.extra:
            self.restart()
        return self

    @property
    def root(self):
        """Where the device keeps what it was sent."""
        return self.cache / "edgepress" / "device"

    @property
    def url(self):
        return f"ssh://board:{self.port}"

    def write(self, extra=()):
        """Keys and configurations, right for both sides."""
        self.authorized.write_text(" ".join(self.user_key) + "\n")
        self.know(self.host_key)
        lines = (
            f"Port {self.port}",
            "ListenAddress 127.0.0.1",
            f"HostKey {self.base}/host_key",
            f"AuthorizedKeysFile {self.authorized}",
            f"PidFile {self.base}/pid",
            *("StrictModes no", "UsePAM no", "PasswordAuthentication no", "PermitRootLogin yes"),
            *("KbdInteractiveAuthentication no", "LogLevel VERBOSE"),
            # A home of its own: what the user's login scripts do takes time and may print.
            *extra,
            f"SetEnv XDG_CACHE_HOME={self.cache} HOME={self.base}",
        )
        (self.base / "sshd_config").write_text("\n".join(lines) + "\n")
        client = (
            "Host board",
            "  HostName 127.0.0.1",
            f"  User {getpass.getuser()}",
            f"  IdentityFile {self.base}/user_key",
            f"  UserKnownHostsFile {self.known_hosts}",
            *("  IdentitiesOnly yes", "  IdentityAgent none", "  GlobalKnownHostsFile /dev/null"),
            "  StrictHostKeyChecking yes",
        )
        self.config.write_text("\n".join(client) + "\n")

    def know(self, key):
        """Make the client believe that the host's key is this one."""
        self.known_hosts.write_text(f"[127.0.0.1]:{self.port} {' '.join(key)}\n")

    def start(self):
        with self.log.open("ab") as log:
            self.server = subprocess.Popen(
                [SERVER, "-D", "-e", "-f", f"{self.base}/sshd_config"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={"PATH": os.environ["PATH"]},
            )
        until(lambda: answers(self.port) or self.server.poll() is not None)
        if self.server.poll() is not None:
            pytest.skip(f"sshd does not start here: {self.log.read_text()[-300:]}")

    def restart(self, extra=()):
        """Start again, with other lines in the server's configuration."""
        self.stop()
        self.extra = extra
        self.write(extra)
        self.start()

    def stop(self):
        if self.server is not None:
            self.cut()
            self.server.kill()
            self.server.wait()
            self.server = None

    def cut(self):
        """Cut all connections, as a cable that is pulled does; the server goes on."""
        for pid in descendants(self.server.pid):
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/comm").read_text().startswith("sshd"):
                    os.kill(pid, signal.SIGKILL)

    def left(self):
        """What lies in the device's folder of runs."""
        return sorted(path.name for path in (self.root / "runs").glob("*"))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(port):
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1) as peer:
        return peer.recv(4) == b"SSH-"
    return False


def descendants(pid):
    """The processes that a process started, and those that they started."""
    found = []
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            found += [int(child), *descendants(int(child))]
    return found


def until(condition, limit_s=10.0):
    """Wait until something is so; fail if it does not become so."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


AGENT = Path(remote_agent.__file__).read_text()
# Without the packages of the tests' environment, and so twice as quick to start.
BARE_PYTHON = next(filter(os.path.exists, [f"{sys.base_prefix}/bin/python3", sys.executable]))


def connection(board, url=None, **settings):
    settings = {"config": board.config, "python": BARE_PYTHON, "connect_s": 5.0, **settings}
    return SshConnection(parse_device_url(url or board.url), SshSettings(**settings), AGENT)


@contextlib.contextmanager
def session(board, *, hold=True, log=None, settings=None, **limits):
    """A session on the board; by default it holds the device."""
    made = SshSession(
        connection(board, **(settings or {})),
        limits=SessionLimits(**{"busy_s": 5.0, "return_s": 5.0, **limits}),
        log=log,
        boot_id_file=str(board.boot_id),
    )
    try:
        made.probe()
        if hold:
            made.hold()
        yield made
    finally:
        made.close()


def device(board, log=None, **more):
    """A device whose own Python and runtime are those of the tests."""
    settings = SshSettings(config=board.config, python=sys.executable, connect_s=5.0)
    return SshDevice(
        parse_device_url(board.url), settings=settings, log=log, boot_id_file=str(board.boot_id), **more
    )


def python(*lines):
    """The words that run a Python program of these lines on the device."""
    return [BARE_PYTHON, "-c", "\n".join(lines)]


@contextlib.contextmanager
def running_board(base):
    """A board that answers for as long as the block lasts."""
    need_server()
    board = Board(base)
    try:
        yield board
    finally:
        board.stop()
