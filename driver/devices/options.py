"""Options that say on which device a command works."""

from __future__ import annotations

import argparse

from ..command_parts import Option

DEVICE = Option(
    flags=("--device",),
    kind="append",
    metavar="URL",
    help="where to work: local (the default), ssh://[USER@]HOST[:PORT] by the system's OpenSSH with its "
    "configuration, keys and host-key checks, or emulated:raspberry-pi-4, emulated:raspberry-pi-5 or "
    "emulated:jetson-orin (outputs and instruction counts, no times); may be repeated, then all work side "
    "by side",
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

PROBE_OPTIONS = (
    Option(
        flags=("--measure",),
        kind="flag",
        help="time a standard set of operators (MatMul, Gemm, Conv, LSTM… in float32, float16, dynamic and "
        "static INT8) and put their speed into the profile's kernels; what compiles timed goes there, too",
    ),
    Option(
        flags=("--export",),
        metavar="FILE",
        help="with --measure: write the profile to this .toml file, for --target FILE",
    ),
    Option(
        flags=("--max-time",),
        kind="integer",
        metavar="SECONDS",
        least=0,
        help="with --measure: begin nothing more after so many seconds of timing; default 300. The next run "
        "goes on; 0 only shows what is known",
    ),
    Option(
        flags=("--threads",),
        kind="integer",
        metavar="N",
        help="with --measure: threads of what is timed; default 1",
    ),
)


def on_devices(arguments: argparse.Namespace) -> bool:
    """Whether any of these options is given."""
    names = (option.flags[0].removeprefix("--").replace("-", "_") for option in DEVICE_OPTIONS)
    return any(getattr(arguments, name) is not None for name in names)
