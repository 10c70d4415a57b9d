"""Find, merge, check and write target profiles: built-in TOML files, users' own, and the host."""

from __future__ import annotations

import difflib
import functools
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
import tomli_w

from ..graph.errors import InternalError, TargetError
from .host import base_profile, host_overlay, read_host
from .overrides import FIGURES, apply_override, convert_profile
from .profile import TargetProfile

HOST = "host"
_HOST_DESCRIPTION = "this machine, probed live and laid over the profile of its processor class"
_LIMIT_BYTES = 1 << 20

Tables = dict[str, Any]


class TargetSummary(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One line of `edgepress targets list`."""

    name: str
    kind: str
    aliases: tuple[str, ...]
    description: str


def list_targets() -> list[TargetSummary]:
    """The host and every built-in target: host, boards, GPUs, processor classes, each by name."""
    found = [TargetSummary(name=HOST, kind="host", aliases=(), description=_HOST_DESCRIPTION)]
    for name, tables in _built_in_tables():
        if not name.startswith("_"):
            found.append(
                TargetSummary(
                    name=name,
                    kind=_inherited(tables, "kind"),
                    aliases=tuple(tables.get("aliases", ())),
                    description=tables["description"],
                )
            )
    order = ("host", "board", "gpu", "cpu-class")
    return sorted(found, key=lambda summary: (order.index(summary.kind), summary.name))


def load_target(name_or_path: str | Path, overrides: Sequence[str] = ()) -> TargetProfile:
    """Load a target by name, by alias, as `host`, or from a .toml file, and apply overrides.

    Args:
        name_or_path: a name of `list_targets`, an alias, "host", or the path of a TOML profile;
            a profile may build on another with `base = "NAME"` or `base = "OTHER.toml"` (found
            beside it).
        overrides: `target.FIELD=VALUE`, FIELD a dotted TOML key, VALUE as in TOML (text needs no
            quotes).

    Raises:
        TargetError: if the name is unknown (near names are given), the file is missing or not
            TOML, a key or value does not belong there, or an override does not fit.
    """
    text = str(name_or_path)
    if text == HOST:
        tables, chain = _host_tables()
        where = "this machine"
    elif isinstance(name_or_path, Path) or text.endswith(".toml") or "/" in text or "\\" in text:
        path = Path(name_or_path)
        tables, chain = _resolve(_read_file(path), where=str(path), folder=path.parent)
        tables.setdefault("name", path.stem)
        where = str(path)
    else:
        name = _canonical_name(text)
        tables, chain = _resolve(_read_built_in(name), where=name, folder=None)
        where = name
    for override in overrides:
        apply_override(tables, override)
    tables["derived_from"] = list(dict.fromkeys([*tables.get("derived_from", ()), *chain]))
    return convert_profile(tables, where=where, overridden=bool(overrides))


def to_toml(profile: TargetProfile) -> str:
    """The profile as TOML text that `load_target` reads back to an equal profile."""
    tables: Tables = _without_none(msgspec.to_builtins(profile))
    for group, key in (("kernels", "name"), ("runtime_ops", None)):
        entries = tables.pop(group)
        if entries:
            tables[group] = {_entry_name(entry, key): entry for entry in entries}
    return tomli_w.dumps(tables)


def _entry_name(entry: Tables, key: str | None) -> str:
    if key is not None:
        return str(entry.pop(key))
    domain = entry["domain"]
    return str(entry["op"]) if domain == "com.microsoft" else f"{domain or 'onnx'}-{entry['op']}"


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, (list, tuple)) else value


def _host_tables() -> tuple[Tables, list[str]]:
    facts = read_host()
    base = base_profile(facts)
    tables, chain = _resolve(_read_built_in(base), where=base, folder=None)
    tables.pop("aliases", None)
    return _merge(tables, host_overlay(facts, tables)), [base, *chain]


def _canonical_name(text: str) -> str:
    wanted = text.strip().lower().replace("_", "-")
    known = _known_names()
    if wanted in known and known[wanted] != HOST:
        return known[wanted]
    near = list(
        dict.fromkeys(known[key] for key in difflib.get_close_matches(wanted, known, n=3, cutoff=0.5))
    )
    if Path(text).exists():
        remedy = f"for a profile of your own give a path that ends in .toml, such as ./{text}.toml"
    elif near:
        remedy = f"did you mean {' or '.join(near)}? `edgepress targets list` shows all"
    else:
        remedy = "`edgepress targets list` shows all; a profile of your own is given by its .toml path"
    raise TargetError(f"there is no target {text!r}", where="--target", remedy=remedy)


@functools.cache
def _known_names() -> Mapping[str, str]:
    """Every name and alias, with - for _, to the name of its target."""
    names: dict[str, str] = {HOST: HOST}
    for name, tables in _built_in_tables():
        if not name.startswith("_"):
            names |= {name: name, **dict.fromkeys(tables.get("aliases", ()), name)}
    return MappingProxyType({key.replace("_", "-"): value for key, value in names.items()})


def _built_in_tables() -> Iterator[tuple[str, Tables]]:
    for entry in sorted(resources.files(__package__).iterdir(), key=lambda item: item.name):
        if entry.name.endswith(".toml"):
            name = entry.name.removesuffix(".toml")
            yield name, _read_built_in(name)


def _read_built_in(name: str) -> Tables:
    resource = resources.files(__package__).joinpath(f"{name}.toml")
    if not resource.is_file():
        raise TargetError(
            f"there is no built-in profile {name!r}",
            where="base",
            remedy="`edgepress targets list` shows the names; a file of yours needs its .toml ending",
        )
    return tomllib.loads(resource.read_text(encoding="utf-8"))


def _read_file(path: Path) -> Tables:
    try:
        if path.stat().st_size > _LIMIT_BYTES:
            raise TargetError(f"{path.name} is too large to be a target profile", where=str(path))
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TargetError(
            "the target profile cannot be read",
            where=str(path),
            why=error.strerror,
            remedy="check the path; `edgepress targets list` shows the built-in targets",
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TargetError(
            "the target profile is not TOML",
            where=str(path),
            why=str(error),
            remedy="start from `edgepress targets show raspberry-pi-5 > my-board.toml`",
        ) from error


def _resolve(
    tables: Tables, *, where: str, folder: Path | None, seen: tuple[str, ...] = ()
) -> tuple[Tables, list[str]]:
    """The tables with their bases merged under them, and the bases' names, nearest first."""
    tables = dict(tables)
    base = tables.pop("base", None)
    if base is None:
        return tables, []
    if not isinstance(base, str):
        raise TargetError("base must be the name of a profile", where=f"{where}: base", why=f"it is {base!r}")
    key = str((folder or Path()) / base) if base.endswith(".toml") else base
    if key in seen:
        raise TargetError(
            "profiles build on each other in a circle", where=f"{where}: base", why=" -> ".join(seen)
        )
    if base.endswith(".toml"):
        if folder is None:
            raise InternalError(f"built-in profile {where} has a file as base")
        path = folder / base
        under, chain = _resolve(_read_file(path), where=str(path), folder=path.parent, seen=(*seen, key))
        name = path.name.removesuffix(".toml")
    else:
        name = base if base.startswith("_") else _canonical_name(base)
        under, chain = _resolve(_read_built_in(name), where=name, folder=None, seen=(*seen, key))
    for own in ("name", "aliases"):  # these belong to one target only
        under.pop(own, None)
    return _merge(under, tables), [name, *chain]


def _merge(under: Mapping[str, Any], over: Mapping[str, Any], *, group: str = "") -> Tables:
    """Tables merged key by key; a figure is replaced whole, so that its source stays its own."""
    merged = dict(under)
    for key, value in over.items():
        whole = key == "alignment_channels" or key in FIGURES.get(group, ())
        if isinstance(value, dict) and isinstance(merged.get(key), dict) and not whole:
            merged[key] = _merge(merged[key], value, group=key)
        else:
            merged[key] = value
    return merged


def _inherited(tables: Tables, key: str) -> str:
    while key not in tables:
        tables = _read_built_in(tables["base"])
    return str(tables[key])
