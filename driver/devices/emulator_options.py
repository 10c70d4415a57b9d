"""The `emulator` command as data."""

from __future__ import annotations

from ..command_parts import COMMON, Argument, Command, Option

_BOARD = Argument(name="BOARD", help="raspberry-pi-4, raspberry-pi-5 or jetson-orin")
_BOARDS = Option(
    flags=("--board",),
    kind="append",
    metavar="BOARD",
    help="raspberry-pi-4, raspberry-pi-5 or jetson-orin; may be repeated; default: all",
)

EMULATOR = Command(
    name="emulator",
    summary="boards emulated on this machine: outputs and instruction counts without the board",
    description=(
        "QEMU runs the board's own kind of programs on its own processor (Cortex-A72, A76, A78AE), with the "
        "stock aarch64 wheels. Outputs, missing instructions and chosen kernels are as on the board; times "
        "are not, so there are none. `--device emulated:BOARD` of verify, benchmark and doctor sets up what "
        "it needs by itself."
    ),
    subcommands=(
        Command(
            name="setup",
            summary="fetch and prepare what emulated boards need: once, about 280 MB and half a minute",
            options=(_BOARDS, *COMMON),
            examples=("edgepress emulator setup", "edgepress emulator setup --board raspberry-pi-5"),
        ),
        Command(
            name="check",
            summary="prove on each board that instruction set, products and kernels are the board's",
            options=(_BOARDS, *COMMON),
            examples=("edgepress emulator check",),
        ),
        Command(
            name="run",
            summary="run one program on a board",
            description=(
                "What follows -- is the program and its arguments; its exit status becomes edgepress's own."
            ),
            arguments=(_BOARD, Argument(name="PROGRAM", help="the program and its arguments", many=True)),
            options=(
                Option(
                    flags=("--bind",),
                    metavar="DIR",
                    help="a folder here that is the program's working folder there",
                ),
                *COMMON,
            ),
            examples=(
                "edgepress emulator run raspberry-pi-5 -- uname -m",
                "edgepress emulator run raspberry-pi-4 --bind out -- python3 device_runner.py verify",
            ),
        ),
        Command(
            name="up",
            summary="switch a board on, with an ssh server on this machine's own address",
            arguments=(_BOARD,),
            options=COMMON,
            examples=("edgepress emulator up raspberry-pi-4",),
        ),
        Command(
            name="down",
            summary="switch a board off; what was on it is gone",
            arguments=(_BOARD,),
            options=COMMON,
            examples=("edgepress emulator down raspberry-pi-4",),
        ),
        Command(
            name="status",
            summary="which boards are set up and on, and how large all this is",
            options=COMMON,
            examples=("edgepress emulator status",),
        ),
        Command(
            name="remove",
            summary="remove everything that setup made",
            options=COMMON,
            examples=("edgepress emulator remove",),
        ),
    ),
)
