"""`--set target.FIELD=VALUE`, and the check of merged tables against the profile's types."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from typing import Any

import msgspec

from ..graph.errors import TargetError
from .profile import Device, Figure, Gpu, Kernel, Runtime, RuntimeOp, TargetProfile

Tables = dict[str, Any]

_SET = "--set"
_SHAPES: dict[str, type[msgspec.Struct]] = {"device": Device, "gpu": Gpu, "runtime": Runtime}
_ENTRIES: dict[str, type[msgspec.Struct]] = {"kernels": Kernel, "runtime_ops": RuntimeOp}
# By table: the fields whose value is a figure with its source.
FIGURES = {
    group: frozenset(
        field.name for field in msgspec.structs.fields(shape) if field.type in (Figure, Figure | None)
    )
    for group, shape in _SHAPES.items()
}
_FREE_TABLES = ("session_config", "audit_config")
_PATH = re.compile(r"`\$\.?(?P<path>.*)`$")


def apply_override(tables: Tables, override: str) -> None:
    """Write one `target.FIELD=VALUE` into merged tables (changed in place).

    A figure given as a bare number, and a kernel's changed speed or grade, lose the source they
    had: their evidence becomes "none".

    Raises:
        TargetError: if the text is not `target.FIELD=VALUE` or FIELD is no field of a profile.
    """
    keys, value = _parse(override)
    if keys[0] == "derived_from":
        raise TargetError("derived_from is written by edgepress itself", where=f"{_SET} {override}")
    _check_path(tables, keys, override)
    table = tables
    for key in keys[:-1]:
        step = table.setdefault(key, {})
        table[key] = dict(step) if isinstance(step, dict) else {"value": step}
        table = table[key]
    if keys[0] in _FREE_TABLES and not isinstance(value, (str, dict)):
        value = override.partition("=")[2].strip()
    table[keys[-1]] = value
    source = f"{_SET} {override}"
    if keys[0] in _ENTRIES and keys[-1] in ("speedup_over_float", "speedup", "grade"):
        table |= {"evidence": "none", "source": source}
    if keys[-1] == "value" or (_is_figure(keys) and not isinstance(value, dict)):
        figure = {"value": value, "evidence": "none", "source": source}
        if keys[-1] == "value":
            table |= figure
        else:
            table[keys[-1]] = figure


def convert_profile(tables: Tables, *, where: str, overridden: bool = False) -> TargetProfile:
    """Merged tables as a checked profile.

    Raises:
        TargetError: naming the key of the TOML file, and near names for an unknown key.
    """
    raw = dict(tables)
    entry_names: dict[str, list[str]] = {}
    for group in _ENTRIES:
        entries = raw.get(group, {})
        if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
            raise TargetError(f"{group} must be tables [{group}.NAME]", where=f"{where}: {group}")
        entry_names[group] = list(entries)
        raw[group] = [_with_name(group, name, entry) for name, entry in entries.items()]
    for group, figures in FIGURES.items():
        if isinstance(raw.get(group), dict):
            raw[group] = {
                key: {"value": value} if key in figures and not isinstance(value, dict) else value
                for key, value in raw[group].items()
            }
    if isinstance(raw.get("alignment_channels"), (int, float)):
        raw["alignment_channels"] = {"value": raw["alignment_channels"]}
    try:
        return msgspec.convert(raw, TargetProfile)
    except msgspec.ValidationError as error:
        raise _profile_error(str(error), entry_names, where, overridden) from error


def _with_name(group: str, name: str, entry: Tables) -> Tables:
    key = "name" if group == "kernels" else "op"
    if group == "kernels" and entry.get("name", name) != name:
        return {**entry, "name": name}
    return {key: name, **entry}


def _parse(override: str) -> tuple[list[str], Any]:
    left, equals, text = override.partition("=")
    text = text.strip()
    if not equals or not text or "\n" in override or not left.strip().startswith("target."):
        raise TargetError(
            f"{override!r} is not an override",
            where=_SET,
            remedy="write --set target.FIELD=VALUE, such as --set target.default_threads=2",
        )
    document: Tables | None = None
    for candidate in (text, json.dumps(text)):
        try:
            document = tomllib.loads(f"{left} = {candidate}")["target"]
            break
        except tomllib.TOMLDecodeError:
            continue
    if document is None:
        raise TargetError(
            f"{left.strip()!r} is not a dotted key",
            where=_SET,
            remedy="quote parts that contain dots: --set 'target.session_config.\"session.x\"=1'",
        )
    keys: list[str] = []
    value: Any = document
    for _ in range(_depth(left)):
        ((key, value),) = value.items()
        keys.append(key)
    return keys, value


def _depth(left: str) -> int:
    """How many keys follow `target.` in a dotted TOML key that is known to parse."""
    value: Any = tomllib.loads(f"{left} = 0")["target"]
    depth = 0
    while isinstance(value, dict):
        ((_, value),) = value.items()
        depth += 1
    return depth


def _is_figure(keys: list[str]) -> bool:
    if keys == ["alignment_channels"]:
        return True
    return len(keys) == 2 and keys[1] in FIGURES.get(keys[0], ())


def _check_path(tables: Tables, keys: list[str], override: str) -> None:
    """Refuse a path that leads to no field, naming what is near it."""
    steps = iter(enumerate(keys))
    _, first = next(steps)
    _require(first, _names(TargetProfile), keys[:0], override)
    if len(keys) == 1 or first in _FREE_TABLES:
        return
    second = keys[1]
    if first in _ENTRIES:
        _require(second, tuple(tables.get(first, ())), keys[:1], override)
        if len(keys) > 2:
            _require(keys[2], _names(_ENTRIES[first]), keys[:2], override)
    elif first in _SHAPES:
        _require(second, _names(_SHAPES[first]), keys[:1], override)
        if len(keys) > 2 and _is_figure(keys[:2]):
            _require(keys[2], _names(Figure), keys[:2], override)
    elif _is_figure(keys[:1]):
        _require(second, _names(Figure), keys[:1], override)


def _names(shape: type[msgspec.Struct]) -> tuple[str, ...]:
    return tuple(field.name for field in msgspec.structs.fields(shape))


def _require(key: str, known: tuple[str, ...], parents: list[str], override: str) -> None:
    if key in known:
        return
    place = ".".join(["target", *parents])
    raise TargetError(
        f"{place} has no field {key!r}",
        where=f"{_SET} {override}",
        remedy=_near(key, known),
    )


def _near(key: str, known: tuple[str, ...]) -> str:
    containing = [name for name in known if key and (key in name or name in key)]
    near = list(dict.fromkeys([*containing, *difflib.get_close_matches(key, known, n=3, cutoff=0.6)]))[:3]
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"there are: {', '.join(known)}"


def _profile_error(
    message: str, entry_names: dict[str, list[str]], where: str, overridden: bool
) -> TargetError:
    text, _, at = message.partition(" - at ")
    match = _PATH.search(at)
    path = _toml_path(match["path"] if match else "", entry_names)
    unknown = re.search(r"unknown field `(.+)`", text)
    remedy = "`edgepress targets show raspberry-pi-5` prints a complete profile to compare with"
    if unknown:
        remedy = _near(unknown[1], _names(_shape_at(path)))
        path = f"{path}.{unknown[1]}" if path else unknown[1]
    source = f"{where} with --set" if overridden else where
    return TargetError(
        "the target profile is not valid",
        where=f"{source}: {path}" if path else source,
        why=text,
        remedy=remedy,
    )


def _toml_path(path: str, entry_names: dict[str, list[str]]) -> str:
    """msgspec's `kernels[3].grade` as the TOML key `kernels.matmul-float.grade`."""
    match = re.match(r"(kernels|runtime_ops)\[(\d+)\](.*)$", path)
    if not match:
        return path
    group, index, rest = match.groups()
    return f"{group}.{entry_names[group][int(index)]}{rest}"


def _shape_at(path: str) -> type[msgspec.Struct]:
    parts = path.split(".") if path else []
    if not parts:
        return TargetProfile
    if parts[0] in _ENTRIES:
        return _ENTRIES[parts[0]]
    if _is_figure(parts[:2]) or _is_figure(parts[:1]):
        return Figure
    return _SHAPES.get(parts[0], TargetProfile)
