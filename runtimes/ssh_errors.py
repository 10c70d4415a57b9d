"""What OpenSSH says when it cannot reach a device, told apart and said with what to do about it."""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

from ..graph.errors import RuntimeUnavailable

TroubleKind = Literal[
    "changed host key",
    "unknown host key",
    "refused login",
    "unknown host",
    "refused connection",
    "no route",
    "timeout",
    "cut",
    "configuration",
    "unknown",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Pattern:
    """Words of OpenSSH (of any release from 7.6 on), what they mean, and what helps."""

    kind: TroubleKind
    words: str
    what: str
    remedy: str


# The first that is found counts: a login that is refused ends with "Connection closed" as well.
_PATTERNS = (
    _Pattern(
        kind="changed host key",
        words=r"REMOTE HOST IDENTIFICATION HAS CHANGED|host key for .* has changed",
        what="the device shows another host key than the one that is known",
        remedy="if the board was set up anew, remove the old key with `{removal}` and log in once "
        "with `ssh {login}`; if not, somebody may be in between: do not go on",
    ),
    _Pattern(
        kind="unknown host key",
        words=r"host key is known for|Host key verification failed",
        what="the device's host key is not known yet",
        remedy="log in once with `ssh {login}`, compare the fingerprint with the board's own and accept it",
    ),
    _Pattern(
        kind="refused login",
        words=r"Permission denied \(|Too many authentication failures|No supported authentication methods",
        what="the device refuses the login",
        remedy="let it know your key with `ssh-copy-id {login}`, or load the key with `ssh-add`; "
        "passwords are never asked for",
    ),
    _Pattern(
        kind="unknown host",
        words=r"Could not resolve hostname|Name or service not known",
        what="no host has this name",
        remedy="check the name, or use the address; a name of your own goes into the ssh configuration",
    ),
    _Pattern(
        kind="refused connection",
        words=r"Connection refused",
        what="the host is there, but no ssh server answers at this port",
        remedy="switch ssh on on the board (`sudo systemctl enable --now ssh`), or give its port in the URL",
    ),
    _Pattern(
        kind="no route",
        words=r"No route to host|Network is unreachable|Host is down",
        what="the device cannot be reached",
        remedy="check that it is switched on, and that both are in the same network",
    ),
    _Pattern(
        kind="timeout",
        words=r"[Tt]imed out|Timeout, server",
        what="the device does not answer in time",
        remedy="check that it is switched on and not behind a firewall; `ssh {login}` should work",
    ),
    _Pattern(
        kind="configuration",
        words=r"Bad configuration option|Bad owner or permissions|terminating, \d+ bad configuration"
        r"|Can't open user config file|keyword .* extra arguments",
        what="ssh does not accept its own configuration",
        remedy="correct the ssh configuration; `ssh -G {login}` shows how it is read",
    ),
    _Pattern(
        kind="cut",
        words=r"Connection (closed|reset|to \S+ closed)|closed by remote host|[Bb]roken pipe"
        r"|kex_exchange_identification|mux_client|Connection aborted",
        what="the device closed the connection",
        remedy="try again; if it stays so, the server's own log says why (`journalctl -u ssh`)",
    ),
)
_UNKNOWN = _Pattern(kind="unknown", words="", what="ssh failed", remedy="check that `ssh {login}` works")
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_REMOVAL = re.compile(r"ssh-keygen -f .+ -R .+")
_CREDENTIALS = re.compile(r"://[^/\s@]+@")
_LONGEST_LINE = 300


def trouble_kind(stderr: str) -> TroubleKind:
    """What ssh's own messages mean; "unknown" for words that are not known."""
    return _find(stderr).kind


def unreachable(stderr: str, *, login: str, key: str, where: str) -> RuntimeUnavailable:
    """The error that says what ssh's messages mean.

    Args:
        stderr: what ssh wrote, and nothing that the device's programs wrote.
        login: what to type after `ssh` to try by hand.
        key: the name under which ssh keeps the host's key.
        where: the device.
    """
    pattern = _find(stderr)
    lines = [line for line in clean_lines(stderr) if line and not line.startswith("@")]
    removal = next((match[0] for line in lines if (match := _REMOVAL.search(line))), f"ssh-keygen -R {key}")
    told = next((line for line in lines if re.search(pattern.words, line)), lines[-1] if lines else None)
    return RuntimeUnavailable(
        pattern.what,
        where=where,
        why=f"ssh says: {told}" if told else "ssh said nothing",
        remedy=pattern.remedy.format(login=login, removal=removal),
    )


def clean_lines(text: str) -> list[str]:
    """Lines of another machine, cut at 300 characters, without what steers a terminal or logs in."""
    plain = (_CREDENTIALS.sub("://…@", _CONTROL.sub("", line)) for line in text.splitlines())
    return [line[:_LONGEST_LINE].rstrip() for line in plain]


def _find(stderr: str) -> _Pattern:
    found = next((item for item in _PATTERNS if re.search(item.words, stderr)), _UNKNOWN)
    # Of a connection that ends while it is made, ssh says nothing.
    return found if stderr.strip() else _PATTERNS[-1]
