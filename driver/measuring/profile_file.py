"""A measured profile written to a file, whole or not at all, and never over an old one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ...graph.errors import OutputError
from ...targets.registry import to_toml

if TYPE_CHECKING:
    from ...targets.profile import TargetProfile


def check_place(path: Path) -> Path:
    """The path, if a profile can be written there.

    Raises:
        OutputError: if it is no .toml file, or exists.
    """
    if path.suffix != ".toml":
        raise OutputError(
            "a profile is a .toml file", where=f"--export {path}", remedy=f"write --export {path}.toml"
        )
    if path.exists():
        raise _failed(path, "it exists already")
    return path


def write_profile(path: Path, profile: TargetProfile) -> None:
    """Write a profile.

    Raises:
        OutputError: if it is no .toml file, exists, or cannot be written.
    """
    check_place(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(to_toml(profile), encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise _failed(path, error.strerror) from error
    finally:
        part.unlink(missing_ok=True)


def _failed(path: Path, why: str | None) -> OutputError:
    return OutputError(
        "the profile cannot be written",
        where=str(path),
        why=why,
        remedy="choose another place with --export, or remove the old file",
    )
