"""What every benchmark script prints: the machine, tables, and the same figures as JSON."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgepress.benchmarks import machine


class Report:
    """The figures of one run of a script: printed as they come, written as JSON at the end."""

    def __init__(self, script: str, options: argparse.Namespace) -> None:
        self._json: Path | None = options.json
        self._watch = machine.Watch()
        self._document: dict[str, Any] = {
            "script": script,
            "options": {
                name: value if isinstance(value, (int, float, bool, list, type(None))) else str(value)
                for name, value in sorted(vars(options).items())
            },
            "machine": machine.describe(),
        }
        self.text("\n".join(machine.lines(self._document["machine"])))
        self._document["machine"]["busy_before"] = before = machine.glance()
        self._warn(machine.warning(before, "before the run"))

    def text(self, text: str) -> None:
        """Print a paragraph."""
        print(text, flush=True)

    def machine(self) -> str:
        """The processor and the packages, in one line."""
        return "; ".join(machine.lines(self._document["machine"])[:2])

    def progress(self, text: str) -> None:
        """Say on stderr what is being done."""
        print(f"… {text}", file=sys.stderr, flush=True)

    def _warn(self, text: str | None) -> None:
        if text is not None:
            print(text, file=sys.stderr, flush=True)

    def add(self, name: str, figures: Any) -> None:
        """Keep figures for the JSON document."""
        self._document[name] = figures

    def figures(self, name: str) -> Any:
        """Figures that were added, or None."""
        return self._document.get(name)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table; the first column is on the left, all others on the right."""
        widths = [max(len(row[index]) for row in (columns, *rows)) for index in range(len(columns))]
        print(f"\n{title}")
        for row in (columns, *rows):
            cells = [row[0].ljust(widths[0])]
            cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            print("  ".join(cells).rstrip())
        sys.stdout.flush()

    def close(self) -> None:
        """Say how busy the machine was, and write the JSON document where one was asked for."""
        others = self._watch.others()
        self._document["machine"]["busy_during"] = others
        self._warn(machine.warning(others, "during the run"))
        if self._json is not None:
            self._json.parent.mkdir(parents=True, exist_ok=True)
            self._json.write_text(json.dumps(self._document, indent=1) + "\n", encoding="utf-8")


def parser(description: str | None) -> argparse.ArgumentParser:
    """The parser of a script, with the options that all of them have."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    made.add_argument("--json", type=Path, metavar="OUT", help="write every figure to this file, too")
    return made


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest, largest, and how many there are."""
    return {
        "median": statistics.median(values),
        "low": min(values),
        "high": max(values),
        "count": len(values),
    }
