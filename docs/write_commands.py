"""Write docs/commands.md from the command line's own definition (`driver/commands.py`): `make docs`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from edgepress.driver.command_parts import EXIT_CODES, Command, Option
from edgepress.driver.commands import COMMANDS

HEADER = """\
# Commands

<!-- Written by docs/write_commands.py (`make docs`); a test compares it with the code. -->

Options accept `-` and `_` alike (`--max-drift`, `--max_drift`) and are never abbreviated. Every
command answers on stdout; progress, notes and errors go to stderr. `python -m edgepress` is the
same command line as `edgepress`.
"""


def reference() -> str:
    """The whole page."""
    return "\n".join([HEADER, *_commands(COMMANDS, "edgepress"), *_exit_codes()]) + "\n"


def _commands(commands: tuple[Command, ...], prefix: str) -> Iterator[str]:
    for command in commands:
        full = f"{prefix} {command.name}"
        if command.subcommands:
            yield from _commands(command.subcommands, full)
            continue
        usage = " ".join([full, *(f"{item.name}{'…' if item.many else ''}" for item in command.arguments)])
        yield f"## {full}\n"
        yield f"{command.description or command.summary[0].upper() + command.summary[1:] + '.'}\n"
        yield f"    {usage} [options]\n"
        rows = [(f"`{item.name}`", item.help) for item in command.arguments]
        rows += [(_flags(option), option.help) for option in command.options]
        yield from _table(("argument or option", "meaning"), rows)
        yield "Examples:\n"
        yield "\n".join(f"    {line}" for line in command.examples) + "\n"


def _flags(option: Option) -> str:
    value = "|".join(option.choices) or option.metavar
    return ", ".join(f"`{flag}`" for flag in option.flags) + (f" `{value}`" if value else "")


def _exit_codes() -> Iterator[str]:
    yield "## Exit codes\n"
    yield from _table(("code", "meaning"), list(EXIT_CODES))


def _table(head: tuple[str, str], rows: list[tuple[str, str]]) -> Iterator[str]:
    yield f"| {head[0]} | {head[1]} |"
    yield "|---|---|"
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
    yield ""


if __name__ == "__main__":
    Path(__file__).with_name("commands.md").write_text(reference(), encoding="utf-8")
