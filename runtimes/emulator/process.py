"""A board's programs one by one, without namespaces: the emulator puts the board's files over the host's."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from ..remote import DeviceUrl
from ..ssh_connection import SshConnection, SshSettings
from .boards import EmulatedBoard
from .install import Emulator


class ProcessConnection(SshConnection):
    """Carries out the same calls as ssh does, each in an emulator of its own on this machine.

    Args:
        url: what the board is called.
        python: the launcher of its Python.
        folder: the board's own, for its files.
        agent: see `SshConnection`.
    """

    def __init__(self, url: DeviceUrl, python: Path, folder: Path, agent: str) -> None:
        super().__init__(url, SshSettings(python=str(python)), agent)
        self._board_folder = folder
        self._is_open = False

    def open(self) -> None:
        """Nothing needs to be connected."""
        if not self._is_open:
            self._is_open = True
            self.opened += 1

    def connected(self) -> bool:
        """It is lost only by closing it."""
        return self._is_open

    def close(self) -> None:
        """See `SshConnection.close`."""
        self._is_open = False

    def _words(self, command: str, *, share: str) -> list[str]:  # noqa: ARG002
        from .instance import process_environment

        variables = process_environment(self._board_folder)
        return ["env", "-i", *(f"{name}={value}" for name, value in variables.items()), "sh", "-c", command]


def write_launcher(emulator: Emulator, board: EmulatedBoard, folder: Path) -> Path:
    """A script of the host that is the board's Python; it can start itself, as programs do with theirs.

    Args:
        emulator: set up for the board.
        board: its processor.
        folder: where the script goes, as `python3`.
    """
    path = folder / "python3"
    sysroot = emulator.identity(board) / "sysroot"
    words = [*emulator.emulator_words(board.emulator), "-cpu", board.cpu, "-L", str(sysroot)]
    line = shlex.join([*words, "-0", str(path), str(sysroot / "usr/bin/python3")])
    part = path.with_name(f".python3.{os.getpid()}")
    part.write_text(f'#!/bin/sh\nexec {line} "$@"\n', encoding="utf-8")
    part.chmod(0o755)
    part.replace(path)
    return path
