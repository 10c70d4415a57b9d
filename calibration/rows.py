"""Rows of text files (.txt, .jsonl, .csv, .tsv): checked line by line, one row in memory at a time."""

from __future__ import annotations

import csv
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from ..graph.errors import DataError
from .schema import quoted

SUFFIXES = (".txt", ".jsonl", ".csv", ".tsv")
_COLUMNS = "text, sentence, text + text_pair, or sentence1 + sentence2 with score; and label"
# STS Benchmark files have no header: genre, file, year, id, score, sentence1, sentence2, sources.
_INTEGER = re.compile(r"[+-]?[0-9]{1,9}")
_MAX_LABEL = 10**9
_STS_COLUMNS = ("score", "sentence1", "sentence2")


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One row: a text, perhaps with a second one; scored rows are similarity pairs."""

    text: str
    second: str | None = None
    score: float | None = None
    label: int | str | None = None

    @property
    def kind(self) -> Literal["text", "text-pair", "similarity"]:
        """What the row is to a model: one input, one input of two texts, or two inputs."""
        if self.score is not None:
            return "similarity"
        return "text" if self.second is None else "text-pair"


def read_rows(path: Path) -> Iterator[Row]:
    """Rows of a text file, UTF-8; empty lines are skipped.

    A .txt file has one text a line. .jsonl has one object (or string) a line, .csv and .tsv a
    header; TAB-separated files have no quoting. STS Benchmark files are known without a header.

    Raises:
        DataError: if the file is missing, not UTF-8 text, or a row is malformed (with its line).
    """
    readers = {".txt": _read_plain, ".jsonl": _read_json_lines}
    reader = readers.get(path.suffix.lower(), _read_table)
    kind = None
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            for number, row in reader(_without_binary(lines, path), path):
                if kind not in (None, (row.kind, row.label is None)):
                    raise _bad_row(path, number, "the row has other columns than the rows before it")
                kind = (row.kind, row.label is None)
                yield row
    except FileNotFoundError as error:
        raise DataError("data file does not exist", where=path.name, remedy="check the path") from error
    except OSError as error:
        raise DataError(
            "data file cannot be read", where=path.name, why=error.strerror or str(error)
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(
            "the file is not UTF-8 text", where=path.name, why=str(error), remedy="save it as UTF-8"
        ) from error


def _bad_row(path: Path, number: int, why: str) -> DataError:
    return DataError(
        "a row cannot be read", where=f"{path.name}, row {number}", why=why, remedy=f"columns: {_COLUMNS}"
    )


def _without_binary(lines: Iterator[str], path: Path) -> Iterator[str]:
    for line in lines:
        if "\0" in line:
            raise DataError("the file is not text", where=path.name, why="it holds zero bytes")
        yield line


def _read_plain(lines: Iterator[str], path: Path) -> Iterator[tuple[int, Row]]:
    del path
    for number, line in enumerate(lines, 1):
        if text := line.strip():
            yield number, Row(text=text)


def _read_json_lines(lines: Iterator[str], path: Path) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = msgspec.json.decode(line)
        except msgspec.DecodeError as error:
            raise _bad_row(path, number, f"not JSON: {error}") from error
        if isinstance(value, str):
            yield number, Row(text=value)
        elif isinstance(value, dict):
            yield number, _row(value, path, number)
        else:
            raise _bad_row(path, number, "neither an object nor a string")


def _read_table(lines: Iterator[str], path: Path) -> Iterator[tuple[int, Row]]:
    first = next(lines, "")
    tabs = "\t" in first or path.suffix.lower() == ".tsv"
    rows = _cells(itertools.chain([first], lines), tabs=tabs)
    header: list[str] | None = None
    number = 0
    try:
        for number, cells in enumerate(rows, 1):
            if header is None:
                header = [cell.strip().lower() for cell in cells]
                if _is_header(header):
                    continue
                header = _sts_header(cells, path)
            if not any(cell.strip() for cell in cells):
                continue
            headless = header[0] == ""
            if len(cells) < len(header) or (len(cells) > len(header) and not headless):
                raise _bad_row(path, number, f"{len(cells)} cells where {len(header)} are expected")
            named = zip(header, cells, strict=False)
            yield number, _row({key: cell for key, cell in named if key}, path, number)
    except csv.Error as error:
        raise _bad_row(path, number + 1, str(error)) from error


def _cells(lines: Iterator[str], *, tabs: bool) -> Iterator[list[str]]:
    if tabs:
        return (line.rstrip("\r\n").split("\t") for line in lines)
    return csv.reader(lines, strict=True)


def _is_header(cells: Sequence[str]) -> bool:
    return bool({"text", "sentence", "sentence1"} & set(cells))


def _sts_header(cells: Sequence[str], path: Path) -> list[str]:
    """The columns of a file without header: only the STS Benchmark layout is known."""
    if len(cells) >= 7 and score_of(cells[4]) is not None:
        return ["", "", "", "", *_STS_COLUMNS]
    raise DataError(
        "the table has no known columns",
        where=path.name,
        why=f"its first line holds {quoted(cells[:5])}",
        remedy=f"give it a header line; columns: {_COLUMNS}",
    )


def score_of(value: object) -> float | None:
    """A finite number, also one written as text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _row(cells: dict[str, object], path: Path, number: int) -> Row:
    first = next((cells[key] for key in ("text", "sentence", "sentence1") if key in cells), None)
    second = cells.get("sentence2") if "sentence1" in cells else cells.get("text_pair")
    if not isinstance(first, str):
        raise _bad_row(path, number, "no text")
    if second is not None and not isinstance(second, str):
        raise _bad_row(path, number, "the second text is not a string")
    if "sentence1" in cells and second is None:
        raise _bad_row(path, number, "sentence1 without sentence2")
    score = None
    if "score" in cells and second is not None:
        score = score_of(cells["score"])
        if score is None:
            raise _bad_row(path, number, f"score {cells['score']!r} is not a number")
    return Row(text=first, second=second, score=score, label=_label(cells.get("label"), path, number))


def _label(value: object, path: Path, number: int) -> int | str | None:
    if value is None:
        return None
    if (
        not isinstance(value, (int, str))
        or value == ""
        or (isinstance(value, int) and abs(value) > _MAX_LABEL)
    ):
        raise _bad_row(path, number, f"label {value!r} is neither a class index nor a class name")
    if isinstance(value, str) and not _INTEGER.fullmatch(value.strip()):
        return value.strip()
    return int(value)
