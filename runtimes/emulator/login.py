"""How a whole board is reached: keys of its own, its ssh server's configuration and the client's."""

from __future__ import annotations

import dataclasses
import shutil
import socket
import subprocess
from pathlib import Path

from ...graph.errors import RuntimeUnavailable
from ..remote import DeviceUrl
from ..ssh_connection import SshSettings

_SERVER = """Port {port}
ListenAddress 127.0.0.1
HostKey /etc/ssh/host_ed25519
PidFile none
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
UsePAM no
UseDNS no
AllowTcpForwarding no
X11Forwarding no
LoginGraceTime 300
SetEnv PYTHONDONTWRITEBYTECODE=1 OPENBLAS_NUM_THREADS=1
Subsystem sftp /usr/lib/openssh/sftp-server
"""
_CLIENT = """Host {name}
  HostName 127.0.0.1
  Port {port}
  User root
  IdentityFile "{folder}/client_ed25519"
  IdentitiesOnly yes
  UserKnownHostsFile "{folder}/known_hosts"
  GlobalKnownHostsFile none
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Login:
    """How the board's ssh server is reached, by its own keys."""

    url: DeviceUrl
    settings: SshSettings
    config: Path


def make_keys(folder: Path) -> None:
    """Make the keys of the board and of its one client, in the board's folder.

    Raises:
        RuntimeUnavailable: if OpenSSH's client is missing here.
    """
    if shutil.which("ssh-keygen") is None:
        raise RuntimeUnavailable(
            "OpenSSH's client is not on this machine",
            where="ssh-keygen",
            remedy="install it (`sudo apt install openssh-client`)",
        )
    for path in (folder / "ssh/host_ed25519", folder / "client_ed25519"):
        words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "emulated", "-f", str(path)]
        subprocess.run(words, check=True, stdin=subprocess.DEVNULL, timeout=60)
    authorized = folder / "home/.ssh/authorized_keys"
    shutil.copyfile(folder / "client_ed25519.pub", authorized)
    authorized.parent.chmod(0o700)
    authorized.chmod(0o600)


def configure_server(folder: Path) -> int:
    """Write the server's configuration for a port that is free now; the port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    (folder / "ssh/sshd_config").write_text(_SERVER.format(port=port), encoding="ascii")
    return port


def configure_client(folder: Path, name: str, port: int, python: str) -> Login:
    """Write what ssh needs to know of the board: its key, its port and the client's key.

    Args:
        folder: the board's.
        name: the Host that ssh calls it by.
        port: its server's.
        python: the board's Python.
    """
    key = (folder / "ssh/host_ed25519.pub").read_text(encoding="ascii").split()
    known = folder / "known_hosts"
    known.write_text(f"[127.0.0.1]:{port} {key[0]} {key[1]}\n", encoding="ascii")
    config = folder / "ssh_config"
    config.write_text(_CLIENT.format(name=name, port=port, folder=folder), encoding="utf-8")
    return Login(
        url=DeviceUrl(kind="ssh", host=name),
        settings=SshSettings(config=config, python=python, connect_s=60.0),
        config=config,
    )
