"""A devices file (TOML): the boards of a desk or a lab by name, in groups, with how each is reached."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from ..graph.errors import RecipeError
from .remote import parse_device_url

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_EXAMPLE = '[devices.pi5-desk], then url = "ssh://pi@192.168.1.20" and groups = ["pi"]'


class DeviceEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One device of a devices file.

    Attributes:
        name: the name of its table.
        url: `local`, `ssh://[user@]host[:port]` or `emulated:NAME`.
        groups: names that several devices are chosen by.
        python: the Python to start there, in place of python3; its own runtime is taken as it is.
        wheels: a folder of wheels here, relative to the devices file.
        threads: threads that sessions run with there.
        ssh_config: a configuration file for ssh in place of the user's, relative to the devices file.
    """

    name: str = ""
    url: str
    groups: tuple[str, ...] = ()
    python: str | None = None
    wheels: str | None = None
    threads: int | None = None
    ssh_config: str | None = None


def read_devices(path: Path) -> tuple[DeviceEntry, ...]:
    """Read a devices file, in its own order; paths in it become absolute.

    Raises:
        RecipeError: if it cannot be read, is no TOML, has no device, an unknown key, or a wrong value.
    """
    where = f"--devices {path}"
    try:
        document = tomllib.loads(path.read_bytes().decode())
    except OSError as error:
        raise RecipeError(
            "the devices file cannot be read", where=where, why=error.strerror, remedy="check the path"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(
            "the devices file is not TOML", where=where, why=str(error), remedy=f"write {_EXAMPLE}"
        ) from error
    unknown = sorted(set(document) - {"devices"})
    tables = document.get("devices")
    if unknown or not isinstance(tables, dict) or not tables:
        raise RecipeError(
            f"unknown key {unknown[0]!r}" if unknown else "the devices file names no device",
            where=where,
            remedy=f"write {_EXAMPLE}",
        )
    return tuple(_entry(name, table, path) for name, table in tables.items())


def choose_devices(
    entries: Sequence[DeviceEntry], *, group: str | None = None, where: str = "--group"
) -> tuple[DeviceEntry, ...]:
    """The devices of a group, or that one device if a device has this name; all without a group.

    Raises:
        RecipeError: if nothing is called so.
    """
    if group is None:
        return tuple(entries)
    chosen = tuple(entry for entry in entries if group in entry.groups)
    chosen = chosen or tuple(entry for entry in entries if entry.name == group)
    if chosen:
        return chosen
    known = sorted({name for entry in entries for name in (*entry.groups, entry.name)})
    near = difflib.get_close_matches(group, known, n=2)
    raise RecipeError(
        f"no group or device is called {group!r}",
        where=where,
        remedy=f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}",
    )


def _entry(name: str, table: Any, path: Path) -> DeviceEntry:
    where = f"{path}, [devices.{name}]"
    if not _NAME.fullmatch(name):
        raise RecipeError(
            f"{name!r} is not a name for a device",
            where=where,
            remedy="use letters, digits, dots, dashes and underscores",
        )
    try:
        entry = msgspec.convert(table, DeviceEntry)
    except msgspec.ValidationError as error:
        known = [field for field in DeviceEntry.__struct_fields__ if field != "name"]
        raise RecipeError(
            f"the device {name!r} is not described as it should be",
            where=where,
            why=str(error),
            remedy=f"a device has {', '.join(known)}; only url must be there",
        ) from error
    if entry.name:
        raise RecipeError("a device's name is its table's", where=where, remedy="remove the key name")
    if entry.threads is not None and entry.threads < 1:
        raise RecipeError(f"threads is {entry.threads}", where=where, remedy="give 1 or more")
    parse_device_url(entry.url, where=where)
    for key, folder in (("wheels", True), ("ssh_config", False)):
        value = getattr(entry, key)
        place = None if value is None else path.parent / Path(value).expanduser()
        if place is not None and not (place.is_dir() if folder else place.is_file()):
            raise RecipeError(
                f"{key} names no {'folder' if folder else 'file'}",
                where=where,
                why=f"{place} does not exist",
                remedy="paths are relative to the devices file",
            )
        entry = msgspec.structs.replace(entry, **{key: None if place is None else str(place.absolute())})
    return msgspec.structs.replace(entry, name=name)
