"""Devices by URL: `local`, `ssh://user@host[:port]`, `emulated:NAME`.

What a URL says, and nothing that could be an option.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

from ..graph.errors import RecipeError

_HOST = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,252})")
_ADDRESS_6 = re.compile(r"\[([0-9A-Fa-f:.]{2,45}(?:%[A-Za-z0-9_.-]{1,32})?)\]")
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.$-]{0,63}")
_FORMS = (
    "write local, ssh://HOST or ssh://USER@HOST:PORT (HOST may be a name of your ssh configuration), or "
    "emulated:BOARD"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceUrl:
    """Where a device is.

    Attributes:
        kind: this machine, one that OpenSSH reaches, or an emulated board.
        host: a name, an address, or a Host of the user's ssh configuration; the name of an emulated
            board; empty for this machine.
        user, port: None leaves them to the ssh configuration.
    """

    kind: Literal["local", "ssh", "emulated"]
    host: str = ""
    user: str | None = None
    port: int | None = None

    @property
    def destination(self) -> str:
        """What ssh is called with: `user@host` or `host`."""
        return self.host if self.user is None else f"{self.user}@{self.host}"

    def __str__(self) -> str:
        if self.kind == "local":
            return "local"
        if self.kind == "emulated":
            return f"emulated:{self.host}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        user = "" if self.user is None else f"{self.user}@"
        port = "" if self.port is None else f":{self.port}"
        return f"ssh://{user}{host}{port}"


def parse_device_url(text: str, *, where: str = "--device") -> DeviceUrl:
    """Read where a device is.

    Args:
        text: `local`, `ssh://[user@]host[:port]`, or `emulated:NAME`.
        where: what names it, for errors.

    Raises:
        RecipeError: if it is none of these, names no board that can be emulated, has a password or a
            path, or could be read as an option of ssh.
    """
    if text == "local":
        return DeviceUrl(kind="local")
    if text.startswith("emulated:"):
        from .emulator.boards import board_named

        board = board_named(text.removeprefix("emulated:"), where=where)
        return DeviceUrl(kind="emulated", host=board.name)
    scheme, found, rest = text.partition("://")
    if not found or scheme != "ssh":
        raise RecipeError(f"{_shown(text)} is not a device", where=where, remedy=_FORMS)
    login, at, place = rest.rpartition("@")
    if ":" in login:
        raise RecipeError(
            "a device's URL carries a password",
            where=where,
            why="passwords in a command line can be read by every process, and are never used",
            remedy="log in with a key: `ssh-copy-id USER@HOST`, then --device ssh://USER@HOST",
        )
    host, port = _host_and_port(place, text, where)
    if at and not _USER.fullmatch(login):
        raise RecipeError(f"{_shown(text)} has no valid user name", where=where, remedy=_FORMS)
    return DeviceUrl(kind="ssh", host=host, user=login if at else None, port=port)


def _host_and_port(place: str, text: str, where: str) -> tuple[str, int | None]:
    bracketed = _ADDRESS_6.match(place)
    host = bracketed[1] if bracketed else place.partition(":")[0]
    rest = place[bracketed.end() :] if bracketed else place[len(host) :]
    if not bracketed and not _HOST.fullmatch(host):
        raise RecipeError(f"{_shown(text)} has no valid host name", where=where, remedy=_FORMS)
    if not rest:
        return host, None
    port = rest[1:]
    if rest[0] != ":" or not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise RecipeError(
            f"{_shown(text)} does not end with a port",
            where=where,
            why="after the host comes nothing, or : and a number from 1 to 65535; a device has no path",
            remedy=_FORMS,
        )
    return host, int(port)


def _shown(text: str) -> str:
    """The text in quotes, on one line and without what might be a password before `@`."""
    _, at, rest = text.rpartition("@")
    return repr(f"…@{rest}" if at else text)
