"""The history of all runs on this machine: one SQLite file in the user's data folder."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ...graph.errors import OutputError
from .rows import Measurement, RecordedRun

APPLICATION_ID = 0x65647072  # "edpr": tells the file from other programs' databases
FILE_NAME = "history.sqlite"
_BUSY_S = 30.0


def history_file() -> Path:
    """The history's file, in EDGEPRESS_HISTORY (a folder) or the user's data folder; it need not exist."""
    named = os.environ.get("EDGEPRESS_HISTORY")
    if named:
        try:
            return Path(named).expanduser() / FILE_NAME
        except RuntimeError:  # "~name" of a user that there is not: a folder of that very name
            return Path(named) / FILE_NAME
    import platformdirs

    return Path(platformdirs.user_data_dir("edgepress", appauthor=False)) / FILE_NAME


def _column(name: str, kind: Any) -> tuple[str, str, bool]:
    """Name, SQLite type, and whether the value is kept as JSON text."""
    parts = set(typing.get_args(kind)) if isinstance(kind, types.UnionType) else {kind}
    parts.discard(type(None))
    (only,) = parts
    if only in (int, bool):
        return name, "INTEGER", False
    if only is float:
        return name, "REAL", False
    return name, "TEXT", typing.get_origin(only) in (dict, tuple)


_COLUMNS = tuple(_column(name, kind) for name, kind in typing.get_type_hints(Measurement).items())
_NAMES = tuple(name for name, _, _ in _COLUMNS)
_AS_JSON = frozenset(name for name, _, as_json in _COLUMNS if as_json)
_BOOLEANS = ("emulated", "outputs_ok", "void")

# Each step takes a file from the version of its place to the next; steps are added, never changed.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        "CREATE TABLE runs (id TEXT PRIMARY KEY, document TEXT NOT NULL) WITHOUT ROWID",
        "CREATE TABLE measurements (run TEXT NOT NULL REFERENCES runs(id) ON DELETE CASCADE, "
        "thing TEXT NOT NULL, role TEXT NOT NULL, kind TEXT NOT NULL, started TEXT NOT NULL, "
        "device TEXT NOT NULL, url TEXT, board TEXT, cpu TEXT, emulated INTEGER NOT NULL, runtime TEXT, "
        "threads INTEGER, shapes TEXT, bundle_digest TEXT, bundle_path TEXT, model TEXT, target TEXT, "
        "runs INTEGER, mean_ms REAL, min_ms REAL, "
        "p50_ms REAL, p50_low_ms REAL, p50_high_ms REAL, p90_ms REAL, p90_low_ms REAL, p90_high_ms REAL, "
        "p99_ms REAL, p99_low_ms REAL, p99_high_ms REAL, "
        "p99_9_ms REAL, p99_9_low_ms REAL, p99_9_high_ms REAL, throughput_per_s REAL, "
        "load_ms REAL, cold_start_ms REAL, peak_memory_bytes INTEGER, file_bytes INTEGER, "
        "drift_cosine REAL, joules_per_inference REAL, instructions REAL, sessions_ms TEXT NOT NULL, "
        "outputs_ok INTEGER, max_abs_diff REAL, void INTEGER NOT NULL, void_reasons TEXT NOT NULL, "
        "edgepress TEXT, PRIMARY KEY (run, thing))",
        "CREATE INDEX measurements_by_time ON measurements (started)",
        "CREATE INDEX measurements_by_model ON measurements (model, target, started)",
        "CREATE TABLE baselines (name TEXT NOT NULL, run TEXT NOT NULL REFERENCES runs(id), "
        "PRIMARY KEY (name, run)) WITHOUT ROWID",
    ),
)


class History:
    """The open history; made on first use, brought to this version's form where it is older.

    Several processes may write at once: each waits for the other's short transaction, up to 30 s.

    Args:
        path: the file.
        migrations: the steps from an empty file to the form that is wanted.

    Raises:
        OutputError: if the file cannot be made or read, is damaged, is no history, or of a newer edgepress.
    """

    def __init__(self, path: Path, *, migrations: Sequence[Sequence[str]] = MIGRATIONS) -> None:
        self.path = path
        with self._errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None)
            try:
                self._connection.execute("PRAGMA foreign_keys = ON")
                self._bring_up(migrations)
            except BaseException:
                self._connection.close()
                raise

    def __enter__(self) -> History:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def add(self, runs: Sequence[RecordedRun]) -> int:
        """Keep runs, whole or not at all; how many were new.

        Raises:
            OutputError: if the file cannot be written.
        """
        marks = ", ".join("?" * len(_NAMES))
        new = 0
        with self._writing() as connection:
            for run in runs:
                text = msgspec.json.encode(run.document, order="deterministic").decode()
                done = connection.execute(
                    "INSERT INTO runs VALUES (?, ?) ON CONFLICT DO NOTHING", (run.id, text)
                )
                if done.rowcount == 0:
                    continue
                new += 1
                connection.executemany(
                    f"INSERT INTO measurements ({', '.join(_NAMES)}) VALUES ({marks})",
                    [_values(row) for row in run.measurements],
                )
        return new

    def rows(
        self, conditions: Sequence[tuple[str, Any]] = (), *, limit: int | None = None
    ) -> list[Measurement]:
        """Rows that meet every condition (an SQL text with one `?`, and its value), the oldest first.

        Args:
            conditions: of this module's callers, never a user's text.
            limit: only so many, the latest.

        Raises:
            OutputError: if the file cannot be read or is damaged.
        """
        where = " AND ".join(f"({text})" for text, _ in conditions) or "1"
        values = [value for _, value in conditions]
        with self._errors():
            found = self._connection.execute(
                f"SELECT {', '.join(_NAMES)} FROM measurements WHERE {where} "
                "ORDER BY started DESC, rowid DESC LIMIT ?",
                [*values, -1 if limit is None else limit],
            ).fetchall()
            return [_row(values) for values in reversed(found)]

    def document(self, run: str) -> dict[str, Any]:
        """The whole document of a run.

        Raises:
            OutputError: if the file cannot be read or is damaged.
            KeyError: if there is no such run.
        """
        with self._errors():
            found = self._connection.execute("SELECT document FROM runs WHERE id = ?", (run,)).fetchone()
            if found is None:
                raise KeyError(run)
            return dict(msgspec.json.decode(found[0], type=dict[str, Any]))

    def baselines(self) -> dict[str, list[str]]:
        """The runs of every baseline, by its name."""
        found: dict[str, list[str]] = {}
        with self._errors():
            for name, run in self._connection.execute("SELECT name, run FROM baselines ORDER BY name, run"):
                found.setdefault(name, []).append(run)
        return found

    def save_baseline(self, name: str, runs: Sequence[str]) -> None:
        """Give runs a name; what had the name before loses it.

        Raises:
            OutputError: if the file cannot be written.
        """
        with self._writing() as connection:
            connection.execute("DELETE FROM baselines WHERE name = ?", (name,))
            connection.executemany("INSERT INTO baselines VALUES (?, ?)", [(name, run) for run in runs])

    def remove(self, runs: Sequence[str], baseline: str | None = None) -> None:
        """Remove runs, and a baseline's name.

        Raises:
            OutputError: if the file cannot be written.
        """
        with self._writing() as connection:
            if baseline is not None:
                connection.execute("DELETE FROM baselines WHERE name = ?", (baseline,))
            connection.executemany("DELETE FROM runs WHERE id = ?", [(run,) for run in runs])

    def shrink(self) -> None:
        """Give the space of what was removed back to the disk."""
        with self._errors():
            self._connection.execute("VACUUM")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction that holds the write lock from its start: two of them never wait in a circle."""
        with self._errors():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def _bring_up(self, migrations: Sequence[Sequence[str]]) -> None:
        if self._version(migrations) == len(migrations):
            return
        with self._writing() as connection:
            # Another process may have done it while this one waited for the lock.
            for step in migrations[self._version(migrations) :]:
                for statement in step:
                    connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {len(migrations)}")

    def _version(self, migrations: Sequence[Sequence[str]]) -> int:
        # One statement sees one state of the file: another process may be making it just now.
        found = self._connection.execute(
            "SELECT user_version, application_id, (SELECT count(*) FROM sqlite_schema) "
            "FROM pragma_user_version, pragma_application_id"
        ).fetchone()
        version, owner, tables = map(int, found)
        if owner != APPLICATION_ID and (owner or version or tables):
            raise OutputError(
                "the file of the history is another program's database",
                where=str(self.path),
                remedy="set EDGEPRESS_HISTORY to a folder of its own",
            )
        if version > len(migrations):
            raise OutputError(
                "the history was written by a newer edgepress",
                where=str(self.path),
                why=f"it has version {version}, this edgepress knows {len(migrations)}",
                remedy="update edgepress, or set EDGEPRESS_HISTORY to another folder",
            )
        return version

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            remedy = "make its folder writable, or set EDGEPRESS_HISTORY to another folder"
            if "is full" in str(error):
                remedy = "free some space, or set EDGEPRESS_HISTORY to another disk"
            if "locked" in str(error):
                remedy = "another process has held it for long: try again when that has ended"
            raise OutputError(
                "the history cannot be used", where=str(self.path), why=str(error), remedy=remedy
            ) from error
        except sqlite3.IntegrityError as error:
            raise OutputError(
                "the history does not hold the run any more, or holds another of its name",
                where=str(self.path),
                why=str(error),
                remedy="another process has changed it meanwhile: try again",
            ) from error
        except (sqlite3.DatabaseError, msgspec.MsgspecError) as error:
            raise OutputError(
                "the history is damaged",
                where=str(self.path),
                why=str(error),
                remedy="move the file away: a new one is begun, and `edgepress history import BUNDLE` brings "
                "back the runs that bundles keep",
            ) from error
        except OSError as error:
            raise OutputError(
                "the history cannot be used",
                where=str(self.path),
                why=error.strerror,
                remedy="set EDGEPRESS_HISTORY to a folder that you may write to",
            ) from error


def _values(row: Measurement) -> list[Any]:
    found = msgspec.structs.asdict(row)
    return [msgspec.json.encode(found[name]).decode() if name in _AS_JSON else found[name] for name in _NAMES]


def _row(values: Sequence[Any]) -> Measurement:
    found = dict(zip(_NAMES, values, strict=True))
    for name in _AS_JSON:
        found[name] = msgspec.json.decode(found[name])
    for name in _BOOLEANS:
        found[name] = None if found[name] is None else bool(found[name])
    return msgspec.convert(found, Measurement)
