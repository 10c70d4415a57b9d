"""Files onto a device: only what is not there yet, resumed where a copy was cut, checked by SHA-256."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from ..graph.errors import ModelError, RuntimeUnavailable
from .ssh_session import SshSession

_CHUNK_BYTES = 1 << 18
_ATTEMPTS = 2

ByteProgress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CopyReport:
    """What a copy did.

    Attributes:
        folder: where the files lie on the device, named by their content.
        sent_bytes: what travelled now.
        present_bytes: what was there already, whole files and parts that the copy went on from.
    """

    folder: str
    sent_bytes: int
    present_bytes: int


def copy_files(
    session: SshSession, files: Mapping[str, Path], *, progress: ByteProgress | None = None
) -> CopyReport:
    """Bring files onto the device, into the folder that belongs to exactly these contents.

    Args:
        session: on a device that was probed and is held.
        files: by the name that each gets there, relative with `/`.
        progress: told (bytes there, bytes in all).

    Raises:
        ModelError: if a file cannot be read here.
        OutputError: if the device's disk is full or not writable.
        RuntimeUnavailable: if the device goes away, or a file arrives damaged twice.
    """
    digests = {name: _digest(path) for name, path in sorted(files.items())}
    sizes = {name: files[name].stat().st_size for name in digests}
    content = "".join(f"{digest}  {name}\n" for name, digest in digests.items())
    folder = f"{session.root}/files/{hashlib.sha256(content.encode()).hexdigest()[:40]}"
    found = session.ask("compare", {"folder": folder, "files": sizes})
    total = sum(sizes.values())
    offsets = {
        name: _offset(files[name], sizes[name], digests[name], entry)
        for name, entry in found["files"].items()
    }
    present = sum(offsets.values())
    if total - present > found["free_bytes"]:
        raise session.full_for(total - present, found["free_bytes"])
    told = _Told(progress, present, total)
    missing = [
        _Sent(name=name, path=files[name], sha256=digest, size_bytes=sizes[name], offset=offsets[name])
        for name, digest in digests.items()
        if found["files"][name]["whole"] != digest
    ]
    _send(session, folder, missing, told)
    told.add(0)
    return CopyReport(folder=folder, sent_bytes=total - present, present_bytes=present)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sent:
    """A file that goes to the device: where from, what is there then, and from which byte on."""

    name: str
    path: Path
    sha256: str
    size_bytes: int
    offset: int


def _send(session: SshSession, folder: str, files: Sequence[_Sent], told: _Told) -> None:
    """Send files in one call: on a slow board beginning one takes longer than most files."""
    for _ in range(_ATTEMPTS):
        if not files:
            return
        wanted = [
            {"name": file.name, "sha256": file.sha256, "size_bytes": file.size_bytes, "offset": file.offset}
            for file in files
        ]
        chunks = itertools.chain.from_iterable(_chunks(file, told) for file in files)
        reply = session.ask("receive", {"folder": folder, "files": wanted}, stdin=chunks)
        files = [dataclasses.replace(file, offset=0) for file in files if file.name in reply["damaged"]]
    if files:
        raise RuntimeUnavailable(
            "a file arrives damaged on the device",
            where=f"{session.where}, {files[0].name}",
            why="its SHA-256 differs from the file's here, twice",
            remedy="check the device's memory card, and that nothing changes the file here meanwhile",
        )


class _Told:
    """Counts bytes and tells of them."""

    def __init__(self, progress: ByteProgress | None, done: int, total: int) -> None:
        self._progress = progress
        self._done = done
        self._total = total

    def add(self, size_bytes: int) -> None:
        self._done += size_bytes
        if self._progress is not None:
            self._progress(min(self._done, self._total), self._total)


def _chunks(sent: _Sent, told: _Told) -> Iterator[bytes]:
    """Exactly the bytes that the device waits for; zeros for what a file lost meanwhile: its hash tells."""
    left = sent.size_bytes - sent.offset
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(sent.path.open("rb"))
            file.seek(sent.offset)
        except OSError as error:
            raise _unreadable(sent.path, error) from error
        while left > 0:
            try:
                chunk = file.read(min(left, _CHUNK_BYTES)) or bytes(min(left, _CHUNK_BYTES))
            except OSError as error:  # not one of the connection, which whoever sends would take it for
                raise _unreadable(sent.path, error) from error
            left -= len(chunk)
            yield chunk
            told.add(len(chunk))


def _offset(path: Path, size_bytes: int, digest: str, found: Mapping[str, object]) -> int:
    """How much of a file is on the device and equal to its beginning here."""
    if found["whole"] == digest:
        return size_bytes
    part_bytes = found["part_bytes"]
    if not isinstance(part_bytes, int) or not 0 < part_bytes <= size_bytes:
        return 0
    return part_bytes if _digest(path, part_bytes) == found["part"] else 0


def _digest(path: Path, size_bytes: int | None = None) -> str:
    """The SHA-256 of a file or of its first bytes."""
    digest = hashlib.sha256()
    left = size_bytes
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES if left is None else min(left, _CHUNK_BYTES)):
                digest.update(chunk)
                left = None if left is None else left - len(chunk)
    except OSError as error:
        raise _unreadable(path, error) from error
    return digest.hexdigest()


def _unreadable(path: Path, error: OSError) -> ModelError:
    return ModelError(
        "a file that the device needs cannot be read",
        where=str(path),
        why=error.strerror,
        remedy="check the path",
    )
