"""Options of `edgepress verify` for the comparison of single kernels."""

from __future__ import annotations

from ..command_parts import Option

KERNELS = Option(
    flags=("--kernels",),
    kind="flag",
    help="replay every integer kernel on the device, on inputs recorded here from the golden samples, and "
    "compare bit for bit; the whole model against this machine's own spread; exit code 3 if an integer "
    "differs",
)
BASELINE = Option(
    flags=("--baseline",),
    metavar="MODEL",
    help="with --kernels: also state the drift from this model, here and on the device",
)
KERNEL_OPTIONS = (KERNELS, BASELINE)
