"""Options that say on which device a command works."""

from __future__ import annotations

import argparse

from .command_parts import Option

DEVICE = Option(
    flags=("--device",),
    kind="append",
    metavar="URL",
    help="where to work: local (the default) or ssh://[USER@]HOST[:PORT], by the system's OpenSSH with its "
    "configuration, keys and host-key checks; may be repeated, then all work side by side",
)
DEVICES = Option(
    flags=("--devices",),
    metavar="FILE",
    help="a TOML file of devices: [devices.NAME] with url, groups, python, wheels, threads, ssh_config",
)
GROUP = Option(flags=("--group",), metavar="NAME", help="of --devices, only this group or device")
WHEELS = Option(
    flags=("--wheels",),
    metavar="DIR",
    help="install the device's runtime from the wheels in this folder, without a network there",
)
SSH_CONFIG = Option(
    flags=("--ssh-config",), metavar="FILE", help="a configuration file for ssh in place of your own"
)
DEVICE_PYTHON = Option(
    flags=("--device-python",),
    metavar="PATH",
    help="the device's Python to use in place of python3; the runtime that it has is taken as it is",
)
DEVICE_OPTIONS = (DEVICE, DEVICES, GROUP, WHEELS, SSH_CONFIG, DEVICE_PYTHON)


def on_devices(arguments: argparse.Namespace) -> bool:
    """Whether any of these options is given."""
    names = (option.flags[0].removeprefix("--").replace("-", "_") for option in DEVICE_OPTIONS)
    return any(getattr(arguments, name) is not None for name in names)
