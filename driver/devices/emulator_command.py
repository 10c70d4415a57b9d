"""`edgepress emulator …`: set up, check, use and remove emulated boards."""

from __future__ import annotations

import argparse
import json
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...graph.errors import EXIT_CHECK, EXIT_OK, OutputError, RecipeError, RuntimeUnavailable, VerifyFailed
from ...runtimes.emulator.boards import BOARDS, EmulatedBoard, board_named
from ...runtimes.emulator.counts import instructions_of, read_counts
from ...runtimes.emulator.folders import is_on, switch_off
from ...runtimes.emulator.install import Emulator
from ...runtimes.emulator.instance import BoardInstance
from ..output import Answer, Table, format_bytes
from ..reporter import Reporter
from .emulated import emulator

_LARGEST_FLOAT_DIFFERENCE = 1e-4
_CHECK = "/opt/emulator/check.py"


def run(arguments: argparse.Namespace, reporter: Reporter) -> Answer:
    """Answer the subcommand.

    Raises:
        RecipeError: if no board has this name.
        RuntimeUnavailable: if a board cannot be set up or switched on here.
        OutputError: if the cache folder cannot be written, or a board is in use.
    """
    place = emulator()
    if arguments.subcommand == "setup":
        return _setup(place, _boards(arguments.board), reporter)
    if arguments.subcommand == "check":
        return _check(place, _boards(arguments.board), reporter)
    if arguments.subcommand == "status":
        return _status(place)
    if arguments.subcommand == "remove":
        return _remove(place, reporter)
    board = board_named(arguments.board, where="BOARD")
    if arguments.subcommand == "run":
        return _run(place, board, arguments, reporter)
    return _up(place, board, reporter) if arguments.subcommand == "up" else _down(place, board)


def _boards(names: Sequence[str] | None) -> list[EmulatedBoard]:
    return [board_named(name, where="BOARD") for name in dict.fromkeys(names or BOARDS)]


def _setup(place: Emulator, boards: Sequence[EmulatedBoard], reporter: Reporter) -> Answer:
    started = time.monotonic()
    place.install(boards, reporter.stage)
    site = place.site(None, reporter.stage)
    took_s = time.monotonic() - started
    size_bytes = place.size_bytes()
    counted = place.plugin.is_file()
    if not counted:
        reporter.warn(
            "no C compiler: boards run their programs one by one and count no instructions "
            "(sudo apt install gcc, then set up again)"
        )
    names = ", ".join(f"emulated:{board.name}" for board in boards)
    return Answer(
        document={
            "boards": [board.name for board in boards],
            "folder": str(place.home),
            "runtime": site.name,
            "setup_s": round(took_s, 1),
            "size_bytes": size_bytes,
            "counts_instructions": counted,
        },
        blocks=(f"{names}: ready in {took_s:.1f} s, {format_bytes(size_bytes)} in {place.home}.",),
    )


def _check(place: Emulator, boards: Sequence[EmulatedBoard], reporter: Reporter) -> Answer:
    place.install(boards, reporter.stage)
    site = place.site(None, reporter.stage)
    found = []
    with reporter.stage("checks on the boards", len(boards)) as stage:
        for board in boards:
            found.append(_check_one(place, board, site))
            stage.advance()
    rows = tuple(
        (item["board"], item["how"], item["features"], item["products"], item["kernels"], item["state"])
        for item in found
    )
    columns = ("board", "how", "instruction set", "products", "kernels", "state")
    healthy = all(item["state"] == "ok" for item in found)
    return Answer(
        document={"healthy": healthy, "boards": found},
        blocks=(Table(columns=columns, rows=rows),),
        exit_code=EXIT_OK if healthy else EXIT_CHECK,
    )


def _check_one(place: Emulator, board: EmulatedBoard, site: Path) -> dict[str, Any]:
    """What one board is found to be, and whether that is what it should be."""
    with BoardInstance(place, board, site) as instance:
        try:
            environment, counts = instance.counting("check")
        except RuntimeUnavailable as error:
            environment, counts, why = {}, None, f"not counted: {error.why}"
        script = _CHECK if instance.why_not_whole is None else str(place.root / _CHECK.lstrip("/"))
        told = instance.output([instance.python, script], environment=environment)
        regions = {} if counts is None else read_counts(counts)
        how = "whole board" if instance.why_not_whole is None else f"one by one: {instance.why_not_whole}"
    try:
        seen = json.loads(told)
    except ValueError as error:
        raise VerifyFailed(
            "the emulated board does not do what it should",
            where=board.name,
            why=told.strip()[-400:] or str(error),
            remedy="`edgepress emulator remove`, then `edgepress emulator setup`",
        ) from error
    problems = _problems(board, seen)
    kernels = why if counts is None else ""
    if counts is not None:
        dots = [instructions_of(regions[tag], 1)["dot"] for tag in (0, 1)]
        kernels = "dot products" if all(dots) else "no dot products"
        if all(dots) != _has_dot_product(board) or any(dots) != all(dots):
            problems.append(f"its integer kernels use {kernels}")
    return {
        "board": board.name,
        "how": how,
        "features": ", ".join(name for name, there in seen["features"].items() if there) or "plain NEON",
        "products": "exact" if not problems else "; ".join(problems),
        "kernels": kernels,
        "state": "ok" if not problems else "failed",
        "instructions": {
            name: instructions_of(regions[tag], 1)
            for tag, name in enumerate(("uint8", "int8", "float32"))
            if tag in regions
        },
        "runtime": {name: seen[name] for name in ("python", "onnxruntime", "numpy")},
    }


def _has_dot_product(board: EmulatedBoard) -> bool:
    return "asimddp" in board.features.split()


def _problems(board: EmulatedBoard, seen: dict[str, Any]) -> list[str]:
    """What the processor or its products have that they should not."""
    known = board.features.split()
    expected = {
        "dot_product": "asimddp" in known,
        "float16": "asimdhp" in known,
        "int8_matrix": "i8mm" in known,
        "sve": "sve" in known,
    }
    problems = [] if seen["machine"] == "aarch64" else [f"its programs run on {seen['machine']}"]
    problems += [
        f"{name} is {'there' if seen['features'][name] else 'missing'}"
        for name, should in expected.items()
        if bool(seen["features"][name]) != should
    ]
    for item in seen["products"]:
        limit = _LARGEST_FLOAT_DIFFERENCE if item["type"] == "float32" else 0
        if not item["difference"] <= limit:
            problems.append(f"{item['operator']} of {item['type']} is {item['difference']:g} off")
    return problems


def _run(place: Emulator, board: EmulatedBoard, arguments: argparse.Namespace, reporter: Reporter) -> Answer:
    """One program on the board, with this terminal; its exit status becomes ours."""
    bind = None if arguments.bind is None else Path(arguments.bind).resolve()
    if bind is not None and not bind.is_dir():
        raise RecipeError("there is no such folder", where=f"--bind {bind}", remedy="check the path")
    place.install([board], reporter.stage)
    site = place.site(None, reporter.stage)
    with BoardInstance(place, board, site) as instance:
        status = instance.run(arguments.program, bind=bind)
    return Answer(document={"status": status}, blocks=(), exit_code=status)


def _up(place: Emulator, board: EmulatedBoard, reporter: Reporter) -> Answer:
    place.install([board], reporter.stage)
    site = place.site(None, reporter.stage)
    folder = place.instances / board.name
    if not is_on(folder):
        instance = BoardInstance(place, board, site, name=board.name, stays=True)
        instance.open()
        try:
            with reporter.stage(f"starting {board.name}"):
                instance.start_server()
        except BaseException:
            instance.close()
            raise
    config, name = folder / "ssh_config", f"{board.name}-emulated"
    words = shlex.join(["ssh", "-F", str(config), name])
    return Answer(
        document={"board": board.name, "ssh_config": str(config), "host": name},
        blocks=(f"{board.name} is on: {words}\nOff again: edgepress emulator down {board.name}",),
    )


def _down(place: Emulator, board: EmulatedBoard) -> Answer:
    was_on = switch_off(place.instances / board.name)
    return Answer(
        document={"board": board.name, "was_on": was_on},
        blocks=(f"{board.name} is off." if was_on else f"{board.name} was not on.",),
    )


def _status(place: Emulator) -> Answer:
    rows = []
    for board in BOARDS.values():
        ready = place.home.is_dir() and place.is_ready(board)
        on = [folder for folder in sorted(place.instances.glob("*/")) if _of(folder, board) and is_on(folder)]
        config = place.instances / board.name / "ssh_config"
        ssh = shlex.join(["ssh", "-F", str(config), f"{board.name}-emulated"]) if config.is_file() else ""
        rows.append((f"emulated:{board.name}", board.cpu, _state(ready), str(len(on)), ssh))
    size_bytes = place.size_bytes() if place.home.is_dir() else 0
    columns = ("board", "processor", "state", "on", "ssh")
    documents = [dict(zip(columns, row, strict=True)) for row in rows]
    return Answer(
        document={"folder": str(place.home), "size_bytes": size_bytes, "boards": documents},
        blocks=(
            Table(columns=columns, rows=tuple(rows), numeric=frozenset({"on"})),
            f"{format_bytes(size_bytes)} in {place.home}",
        ),
    )


def _state(ready: bool) -> str:
    return "set up" if ready else "not set up"


def _of(folder: Path, board: EmulatedBoard) -> bool:
    return folder.name == board.name or folder.name.rpartition("-")[0] == board.name


def _remove(place: Emulator, reporter: Reporter) -> Answer:
    on = [folder.name for folder in place.instances.glob("*/") if is_on(folder)]
    if on:
        raise OutputError(
            "an emulated board is switched on",
            where=", ".join(sorted(on)),
            remedy="switch it off (`edgepress emulator down BOARD`), or wait for what uses it",
        )
    size_bytes = place.size_bytes() if place.home.is_dir() else 0
    with reporter.stage("removing emulated boards"):
        place.remove()
    return Answer(document={"removed_bytes": size_bytes}, blocks=(f"{format_bytes(size_bytes)} removed.",))
