"""What a command answers on stdout: paragraphs and tables for people, one JSON document for programs."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Literal, TextIO

import msgspec

from ..graph.errors import EXIT_OK

if TYPE_CHECKING:
    from rich.console import Console

# What a terminal obeys instead of showing it; texts of devices and file names may hold it.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# Output that goes into a file or a pipe is never wrapped: one row stays one line.
_UNWRAPPED_COLUMNS = 10_000


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of text cells; the columns named in `numeric` are aligned to the right."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str | None = None
    numeric: frozenset[str] = frozenset()


Block = str | Table
CaseState = Literal["passed", "failed", "error", "skipped"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One thing that a CI system shows as a test.

    Attributes:
        group: what belongs together.
        reason: of a failure, in one or two words.
        text: what is to be said of one that did not pass.
        told: what was measured.
    """

    name: str
    group: str
    state: CaseState
    text: str = ""
    reason: str = ""
    told: str = ""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a command found out, in every form, and the exit code that goes with it.

    Attributes:
        document: for --json.
        blocks: for people.
        records: unrounded figures by column, for CSV.
        cases: for JUnit.
    """

    document: object
    blocks: Sequence[Block]
    exit_code: int = EXIT_OK
    records: Sequence[Mapping[str, object]] = ()
    cases: Sequence[Case] = ()


def write_answer(answer: Answer, *, as_json: bool, stream: TextIO) -> None:
    """Write the answer to `stream`; colour and wrapping only where it is a terminal."""
    text = json_text(answer.document) if as_json else render(answer.blocks, stream)
    encoding = stream.encoding or "utf-8"
    # File names need not be printable in the stream's encoding; the answer still has to arrive.
    stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
    stream.flush()


def json_text(document: object) -> str:
    """The document as indented JSON with a final newline."""
    encoded = msgspec.json.encode(document, enc_hook=_plain, order="deterministic")
    return msgspec.json.format(encoded, indent=2).decode() + "\n"


def _plain(value: object) -> object:
    if isinstance(value, PurePath):
        return str(value)
    raise TypeError(f"a {type(value).__name__} cannot stand in an answer")


def render(blocks: Sequence[Block], stream: TextIO) -> str:
    """The blocks as text, one empty line between them, laid out for `stream`."""
    from rich.console import Console

    terminal = stream.isatty()
    text = io.StringIO()
    console = Console(
        file=text,
        force_terminal=terminal,
        width=Console(file=stream).width if terminal else _UNWRAPPED_COLUMNS,
        markup=False,
        highlight=False,
        emoji=False,
    )
    for index, block in enumerate(blocks):
        if index:
            text.write("\n")
        if isinstance(block, str):
            text.write(visible(block) + "\n")
        else:
            _print_table(console, block)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def visible(text: str) -> str:
    """Text without the control characters that a terminal obeys; line ends and tabs stay."""
    return _CONTROL.sub("\ufffd", text)


def _print_table(console: Console, table: Table) -> None:
    from rich.table import Table as RichTable
    from rich.text import Text

    if table.title:
        console.print(Text(visible(table.title), style="bold"))
    drawn = RichTable(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column in table.columns:
        numeric = column in table.numeric
        drawn.add_column(Text(column), justify="right" if numeric else "left", overflow="fold")
    for row in table.rows:
        drawn.add_row(*(Text(visible(cell)) for cell in row))
    console.print(drawn)


def format_bytes(size_bytes: float) -> str:
    """A size in units of 1000: "812 B", "22.9 MB"."""
    value = float(size_bytes)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"


def format_ms(milliseconds: float) -> str:
    """A duration with three significant digits: "11.8 ms", "0.412 ms"."""
    if milliseconds <= 0:
        return "0 ms"
    digits = max(0, 2 - math.floor(math.log10(milliseconds)))
    return f"{milliseconds:.{digits}f} ms"


def format_figure(value: float | None, unit: str) -> str:
    """A figure in its unit (ms, bytes, fraction, joules or count); empty where there is none."""
    if value is None:
        return ""
    if unit == "ms":
        return format_ms(value)
    if unit == "bytes":
        return format_bytes(value)
    if unit == "fraction":
        return format_percent(value)
    scales = {"joules": ((1, "J"), (1e-3, "mJ")), "count": ((1e9, "G"), (1e6, "M"), (1e3, "k"))}[unit]
    for scale, name in scales:
        if abs(value) >= scale:
            return f"{value / scale:.3g} {name}"
    return f"{value / 1e-6:.3g} uJ" if unit == "joules" and value else f"{value:.3g}"


def format_percent(fraction: float) -> str:
    """A fraction as per cent with three significant digits: "25.7 %", "0.0412 %"."""
    if fraction == 0:
        return "0 %"
    if not math.isfinite(fraction):
        return str(fraction)
    digits = max(0, 2 - math.floor(math.log10(abs(fraction) * 100)))
    return f"{fraction * 100:.{digits}f} %" if digits <= 6 else f"{fraction * 100:.1e} %"
