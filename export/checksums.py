"""SHA256SUMS: one line per file of a bundle, in the format of `sha256sum`, read strictly."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from ..graph.load import file_digest

SUMS_NAME = "SHA256SUMS"
RUNS_NAME = "runs"
_LINE = re.compile(r"(?P<digest>[0-9a-f]{64})  (?P<name>[^\n]+)")
_RUN_NAME = re.compile(r"runs/[A-Za-z0-9][A-Za-z0-9._-]*\.json")


def is_safe_name(name: str) -> bool:
    """Whether `name` is a plain relative path with forward slashes that stays in its folder."""
    parts = name.split("/")
    return (
        name.isprintable()
        and "\\" not in name
        and ":" not in name
        and all(part not in {"", ".", ".."} for part in parts)
    )


def format_sums(digests: Mapping[str, str]) -> bytes:
    """SHA256SUMS of name → digest, sorted by name, as `sha256sum -c` reads it."""
    return "".join(f"{digests[name]}  {name}\n" for name in sorted(digests)).encode()


def parse_sums(data: bytes) -> dict[str, str]:
    """Name → digest of a SHA256SUMS file.

    Raises:
        ValueError: naming the line that is not `<64 hex digits>  <relative path>`, leaves the
            folder, stands twice or out of order, or covers what the sums do not cover.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text: {error}") from error
    if not text.endswith("\n"):
        raise ValueError("the last line is incomplete")
    digests: dict[str, str] = {}
    previous = ""
    for number, line in enumerate(text[:-1].split("\n"), 1):
        match = _LINE.fullmatch(line)
        if not match:
            raise ValueError(f"line {number} is not '<digest>  <file>'")
        name = match["name"]
        if not is_safe_name(name):
            raise ValueError(f"line {number}: {name!r} leaves the bundle or is no plain relative path")
        if name == SUMS_NAME or name.split("/")[0] == RUNS_NAME:
            raise ValueError(f"line {number}: {name!r} is not covered by the sums")
        if name <= previous:
            raise ValueError(f"line {number}: {name!r} is repeated or out of order")
        digests[name] = match["digest"]
        previous = name
    return digests


def bundle_digest(bundle: Path) -> str:
    """The digest that stands for a whole bundle: SHA-256 of its SHA256SUMS file.

    Raises:
        OSError: if the file cannot be read.
    """
    return hashlib.sha256((bundle / SUMS_NAME).read_bytes()).hexdigest()


def list_files(root: Path) -> tuple[list[str], list[str]]:
    """Regular files below `root` by relative name, sorted, and what is neither file nor folder.

    Links are not followed: a bundle has none, and one could lead anywhere.
    """
    files, others = [], []
    for folder, subfolders, names in os.walk(root):
        base = Path(folder)
        for name in (*names, *subfolders):
            path = base / name
            relative = path.relative_to(root).as_posix()
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                others.append(relative)
            elif path.is_file():
                files.append(relative)
    return sorted(files), sorted(others)


def check_sums(root: Path, *, on_bytes: Callable[[int], None] | None = None) -> list[str]:
    """What is wrong with the files of a bundle, one line each; nothing if all is as written.

    Every file must be listed, present and of its digest; besides the sums only runs/*.json exist.

    Args:
        root: the bundle's folder.
        on_bytes: told the size of each file once it has been read.
    """
    try:
        digests = parse_sums((root / SUMS_NAME).read_bytes())
    except OSError as error:
        return [f"{SUMS_NAME}: {error.strerror or 'cannot be read'}"]
    except ValueError as error:
        return [f"{SUMS_NAME}: {error}"]
    files, others = list_files(root)
    problems = [f"{name}: not a regular file" for name in others]
    present = {name for name in files if name != SUMS_NAME and not _RUN_NAME.fullmatch(name)}
    problems += [f"{name}: not listed in {SUMS_NAME}" for name in sorted(present - set(digests))]
    for name, digest in digests.items():
        if name not in present:
            if name not in others:
                problems.append(f"{name}: missing")
            continue
        try:
            if file_digest(root / name) != digest:
                problems.append(f"{name}: contents have changed (SHA-256 differs)")
            if on_bytes is not None:
                on_bytes((root / name).stat().st_size)
        except OSError as error:
            problems.append(f"{name}: {error.strerror or 'cannot be read'}")
    return problems
