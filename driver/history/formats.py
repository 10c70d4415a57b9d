"""Answers in other forms than tables: CSV, JUnit and Markdown, on stdout or whole into a file."""

from __future__ import annotations

import argparse
import csv
import datetime
import io
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

from ...graph.errors import OutputError, RecipeError
from ..command_parts import Option
from ..output import Answer, Block, Case, json_text, render

FORMATS = ("table", "json", "csv", "junit", "markdown")
_SUFFIXES = {".json": "json", ".csv": "csv", ".xml": "junit", ".md": "markdown", ".txt": "table"}
# Spreadsheets take text that begins so for a formula, which may run programs or fetch pages.
_FORMULA = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
# What XML 1.0 cannot carry, not even escaped.
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

FORMAT = Option(
    flags=("--format",),
    choices=FORMATS,
    help="the form of the answer: a table (the default), JSON, CSV with a unit in every column's name, JUnit "
    "with a test case for every gate, or Markdown",
)
OUTPUT_FILE = Option(
    flags=("--output",),
    metavar="FILE",
    help="write the answer to this file, whole or not at all, over an old one, in the form of --format or of "
    "its ending (.json, .csv, .xml for JUnit, .md); the tables are still shown",
)
FORMAT_OPTIONS = (FORMAT, OUTPUT_FILE)


def check_format(arguments: argparse.Namespace) -> None:
    """Find out before any long work whether the answer can be delivered as asked for.

    Raises:
        RecipeError: if --json and --format contradict each other, or a file's form is not known.
        OutputError: if the file's folder does not exist or the file is a folder.
    """
    if arguments.json and arguments.format not in (None, "json") and arguments.output is None:
        raise RecipeError(
            f"--json and --format {arguments.format} contradict each other",
            where="--format",
            remedy="leave --json out, or add --output FILE for the second form",
        )
    if arguments.output is None:
        return
    _format_of(arguments)
    check_output_file(Path(arguments.output))


def check_output_file(path: Path) -> None:
    """Find out whether a file can be put there; a device or a pipe would be replaced by it.

    Raises:
        OutputError: if the folder does not exist, or something else than a file stands there.
    """
    why, remedy = None, "name a file in a folder that exists"
    if not path.parent.is_dir():
        why = "there is no such folder"
    elif path.is_dir():
        why = "it is a folder"
    elif path.exists() and not path.is_file():
        why, remedy = "it is no file", "name a file; without --output the answer goes to stdout"
    if why is not None:
        raise OutputError(
            "the answer cannot be written there", where=f"--output {path}", why=why, remedy=remedy
        )


def _format_of(arguments: argparse.Namespace) -> str:
    if arguments.format is not None:
        return str(arguments.format)
    found = _SUFFIXES.get(Path(arguments.output).suffix.lower()) if arguments.output else "table"
    if found is None:
        raise RecipeError(
            "the form of the output file is not known",
            where=f"--output {arguments.output}",
            remedy=f"add --format, or let it end with {', '.join(_SUFFIXES)}",
        )
    return found


def deliver(answer: Answer, arguments: argparse.Namespace, stream: TextIO) -> None:
    """Write an answer where and how the command line says.

    Raises:
        OutputError: if the file cannot be written.
    """
    kind = _format_of(arguments)
    if arguments.output is not None:
        write_whole(Path(arguments.output), formatted(answer, kind))
        kind = "table"
    if arguments.json:
        kind = "json"
    text = render(answer.blocks, stream) if kind == "table" else formatted(answer, kind)
    encoding = stream.encoding or "utf-8"
    stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
    stream.flush()


def formatted(answer: Answer, kind: str) -> str:
    """The answer as text of one of `FORMATS`."""
    if kind == "json":
        return json_text(answer.document)
    if kind == "csv":
        return csv_text(answer.records)
    if kind == "junit":
        return junit_text(answer.cases)
    if kind == "markdown":
        return markdown_text(answer.blocks)
    return render(answer.blocks, io.StringIO())


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all; an old one stays until then.

    Raises:
        OutputError: if it cannot be written.
    """
    check_output_file(path)
    path = path.resolve()  # what a link leads to is replaced, not the link
    part = path.with_name(f".{path.name[:100]}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        with part.open("x", encoding="utf-8", errors="backslashreplace", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise OutputError(
            "the answer cannot be written",
            where=str(path),
            why=error.strerror,
            remedy="choose another place with --output",
        ) from error
    finally:
        part.unlink(missing_ok=True)


def csv_text(records: Sequence[Mapping[str, object]]) -> str:
    """Records as CSV (RFC 4180, with bare line feeds): figures as they are, unrounded; None is empty.

    Text that a spreadsheet would take for a formula gets an apostrophe in front, numbers never do; control
    characters and line ends in text become spaces.
    """
    columns = list(dict.fromkeys(name for record in records for name in record))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_cell(record.get(name)) for name in columns] for record in records)
    return text.getvalue()


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    text = "; ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    text = _CONTROL.sub(" ", text)
    return f"'{text}" if text.lstrip().startswith(_FORMULA) else text


def markdown_text(blocks: Sequence[Block]) -> str:
    """Blocks as Markdown: paragraphs, and tables in GitHub's form."""
    return "\n".join(_markdown(block) for block in blocks)


def _markdown(block: Block) -> str:
    if isinstance(block, str):
        return "  \n".join(_plain(line) for line in block.splitlines()) + "\n"
    head = [f"**{_plain(block.title)}**\n"] if block.title else []
    rules = ("---:" if name in block.numeric else "---" for name in block.columns)
    lines = [block.columns, *block.rows]
    cells = [f"| {' | '.join(map(_plain, line))} |" for line in lines]
    return "\n".join([*head, cells[0], f"| {' | '.join(rules)} |", *cells[1:]]) + "\n"


def _plain(text: str) -> str:
    """Text that means nothing to Markdown: no table border, no tag, no link, no emphasis, on one line."""
    marked = re.sub(r"([\\`*_\[\]<>|~#])", r"\\\1", " ".join(text.split()))
    return marked.replace("&", "&amp;").replace("\\<", "&lt;").replace("\\>", "&gt;")


def junit_text(cases: Sequence[Case]) -> str:
    """Cases as a JUnit report with one suite, of the elements and attributes that all readers know."""
    from xml.etree import ElementTree

    counts = {
        "tests": str(len(cases)),
        "failures": str(sum(case.state == "failed" for case in cases)),
        "errors": str(sum(case.state == "error" for case in cases)),
        "skipped": str(sum(case.state == "skipped" for case in cases)),
    }
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S")
    # Jenkins' schema has no `skipped` at the top.
    whole = {name: count for name, count in counts.items() if name != "skipped"}
    root = ElementTree.Element("testsuites", {"name": "edgepress", **whole})
    suite = ElementTree.SubElement(
        root, "testsuite", {"name": "edgepress", **counts, "time": "0", "timestamp": stamp}
    )
    for case in cases:
        made = ElementTree.SubElement(
            suite, "testcase", {"name": _xml(case.name), "classname": _xml(case.group), "time": "0"}
        )
        if case.state != "passed":
            kind = {"failed": "failure", "error": "error", "skipped": "skipped"}[case.state]
            reason = ElementTree.SubElement(made, kind, {"message": _xml(case.text)})
            if case.state != "skipped":
                reason.set("type", _xml(case.reason or case.state))
                reason.text = _xml(case.text)
        if case.told:
            ElementTree.SubElement(made, "system-out").text = _xml(case.told)
    ElementTree.indent(root)
    return f"<?xml version='1.0' encoding='utf-8'?>\n{ElementTree.tostring(root, encoding='unicode')}\n"


def _xml(text: str) -> str:
    return _NOT_XML.sub("\ufffd", text)
