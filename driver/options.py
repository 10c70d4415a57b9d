"""From the words of a command line to typed values: the parsers, and the recipe that options make."""

from __future__ import annotations

import argparse
import difflib
import re
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from .. import __version__
from ..calibration.size import parse_size
from ..compress.drift_limit import parse_drift_limits
from ..compress.presets import PRESETS
from ..compress.recipe import (
    Recipe,
    Shape,
    ShapeRange,
    SkippableStage,
    choices,
    override,
    read_recipe,
)
from ..graph.errors import RecipeError
from .command_parts import EXIT_CODES, Argument, Command, Option
from .commands import COMMANDS

# Options that set the recipe field of the same name without any conversion.
_PLAIN_RECIPE_OPTIONS = (
    *("target", "precision", "io_dtype", "quantization", "calib_method", "threads", "samples", "seed"),
    *("golden", "data_free", "trust_code", "eval_samples", "ranking_samples", "measure_seconds"),
    *("allow_unmeasured", "prune_importance", "prune_repair"),
)
_SIZES = re.compile(r"[1-9][0-9]{0,8}(x[1-9][0-9]{0,8})*", re.IGNORECASE)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are errors of the tree, with the nearest option named."""

    def error(self, message: str) -> NoReturn:
        raise RecipeError(
            message,
            where="the command line",
            remedy=self._remedy(message),
        )

    def _remedy(self, message: str) -> str:
        see = f"see `{self.prog} --help`"
        unknown = re.search(r"(?:unrecognized arguments: |invalid choice: ')([^\s=']+)", message)
        if not unknown:
            return see
        known = [
            *self._option_string_actions,
            *re.findall(r"[a-z][a-z0-9-]*", message.partition("choose from")[2]),
        ]
        near = difflib.get_close_matches(unknown[1], known, n=2)
        return f"did you mean {' or '.join(near)}? {see}" if near else see


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line, made from `commands.COMMANDS`."""
    parser = _Parser(
        prog="edgepress",
        description="Compile a real model for your own board: smaller, never slower, its drift measured.",
        epilog=_epilog(
            ("edgepress compile model.onnx --target host -o out --calib samples.npz", "edgepress doctor"),
            "Exit codes:\n" + "\n".join(f"  {code:>3}  {meaning}" for code, meaning in EXIT_CODES),
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"edgepress {__version__}")
    _add_commands(parser, COMMANDS, "command")
    return parser


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse a command line; `_` in an option's name counts as `-`.

    Raises:
        RecipeError: if the command line is not understood.
        SystemExit: after --help or --version.
    """
    words = list(argv)
    for index, word in enumerate(words):
        if word == "--":
            break
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            words[index] = name.replace("_", "-") + equals + value
    parser = build_parser()
    arguments, unknown = parser.parse_known_args(words)
    if unknown:
        # The command's own parser knows which options the word may have meant.
        arguments.parser.error("unrecognized arguments: " + " ".join(unknown))
    if arguments.quiet and arguments.verbose:
        arguments.parser.error("-q and -v contradict each other")
    return arguments


def recipe_from(arguments: argparse.Namespace) -> Recipe:
    """The recipe that `edgepress compile` was asked for: --recipe, then --preset, then options.

    Raises:
        RecipeError: if no target is named, the file cannot be used, or an option's value is wrong.
    """
    if arguments.recipe is not None:
        recipe = read_recipe(Path(arguments.recipe), target=arguments.target)
    elif arguments.target is not None:
        recipe = Recipe(target=arguments.target)
    else:
        raise RecipeError(
            "no target is named",
            where="--target",
            remedy="add --target host, or one of `edgepress targets list`",
        )
    given: dict[str, object] = {} if arguments.preset is None else dict(PRESETS[arguments.preset])
    for name in _PLAIN_RECIPE_OPTIONS:
        value = getattr(arguments, name)
        if value is not None and value is not False:
            given[name] = value
    given |= _pruning(arguments)
    if arguments.max_drift is not None:
        given["max_drift"] = parse_drift_limits(arguments.max_drift)
    if arguments.keep_float is not None:
        given["keep_float"] = tuple(arguments.keep_float)
    if arguments.shape is not None:
        shapes = shapes_from(arguments.shape)
        kept = {name: limits for name, limits in recipe.shape_ranges.items() if name not in shapes}
        given["shapes"] = {**recipe.shapes, **shapes}
        given["shape_ranges"] = kept | ranges_from(arguments.shape)
    if arguments.max_memory is not None:
        given["max_memory_bytes"] = parse_size(arguments.max_memory)
    if arguments.rounds is not None:
        given["benchmark_rounds"] = arguments.rounds
    if arguments.set is not None:
        given["target_overrides"] = {**recipe.target_overrides, **overrides_from(arguments.set)}
    if arguments.skip is not None:
        given["skip"] = _stages(arguments.skip)
    return override(recipe, given)


def _pruning(arguments: argparse.Namespace) -> dict[str, object]:
    """What is asked of pruning; no drift limit is held then unless one is given, in words or by a recipe."""
    given: dict[str, object] = {}
    if arguments.prune is not None:
        given["prune"] = parse_part(arguments.prune)
    if arguments.min_speedup is not None:
        given["min_speedup"] = parse_times(arguments.min_speedup)
    if arguments.max_size is not None:
        given["max_size_bytes"] = parse_size(arguments.max_size, option="--max-size")
    if given and arguments.recipe is None:
        given["max_drift"] = ()
    return given


def parse_part(text: str) -> float:
    """A part written as 0.5 or 50%.

    Raises:
        RecipeError: if it is not between 0 and 1.
    """
    match = re.fullmatch(r"([0-9]{0,3}(?:\.[0-9]{1,9})?)(%?)", text.strip())
    part = float(match[1]) / (100 if match[2] else 1) if match is not None and match[1] else 0.0
    if not 0 < part < 1:
        raise RecipeError(
            f"{text!r} is no part between 0 and 1",
            where="--prune",
            remedy="write the part of the multiply-accumulates that goes as 0.5 or 50%",
        )
    return part


def parse_times(text: str) -> float:
    """A speed-up written as 2x or 2.

    Raises:
        RecipeError: if it is not above 1.
    """
    match = re.fullmatch(r"([0-9]{1,4}(?:\.[0-9]{1,6})?) ?x?", text.strip(), re.IGNORECASE)
    if match is None or not 1 < float(match[1]) <= 1000:
        raise RecipeError(
            f"{text!r} is no speed-up", where="--min-speedup", remedy="write it as 2x; it must be above 1"
        )
    return float(match[1])


def shapes_from(texts: Sequence[str] | None) -> dict[str, Shape]:
    """The shapes of repeated --shape options, by input name; of a range the usual one.

    Raises:
        RecipeError: if one is malformed or an input is named twice.
    """
    shapes: dict[str, Shape] = {}
    for text in texts or ():
        name, shape, _ = parse_shape(text)
        if name in shapes:
            raise RecipeError(f"two shapes for {name!r}", where="--shape", remedy="give each input once")
        shapes[name] = shape
    return shapes


def ranges_from(texts: Sequence[str] | None) -> dict[str, ShapeRange]:
    """The ranges of repeated --shape options, by input name; inputs with one shape are left out.

    Raises:
        RecipeError: if one is malformed.
    """
    parsed = (parse_shape(text) for text in texts or ())
    return {name: limits for name, _, limits in parsed if limits is not None}


def overrides_from(texts: Sequence[str] | None) -> dict[str, str]:
    """The profile fields of repeated --set options, by their path below `target`.

    Raises:
        RecipeError: if one is not target.FIELD=VALUE.
    """
    return dict(parse_assignment(text) for text in texts or ())


def parse_shape(text: str) -> tuple[str, Shape, ShapeRange | None]:
    """Read `name:1x128`, or the range `name:1x16:1x128:8x512` of a least, usual and largest shape.

    The name may itself hold colons: it is a range only if the last three parts are shapes with as many
    axes each.

    Returns:
        The input's name, its (usual) shape, and the range where one is given.

    Raises:
        RecipeError: if the name or a size is missing, a size is not a whole number from 1 upwards, or
            a range has two shapes or is not in order.
    """
    name, *parts = text.strip().split(":")
    sizes = [_sizes(part) for part in parts]
    if not sizes or sizes[-1] is None:
        raise _bad_shape(text, None)
    axes = [None if shape is None else len(shape) for shape in sizes]
    alike = 0
    while alike < len(axes) and axes[-1 - alike] == axes[-1]:
        alike += 1
    count = 3 if alike >= 3 else 1
    if alike == 2 and len(sizes[-1]) > 1:
        raise _bad_shape(text, "a range has three shapes: the least, the usual and the largest")
    name = ":".join([name, *parts[: len(parts) - count]])
    shapes = [shape for shape in sizes[-count:] if shape is not None]
    if not name:
        raise _bad_shape(text, None)
    if count == 1:
        return name, shapes[0], None
    least, usual, most = shapes
    if not all(low <= size <= high for low, size, high in zip(least, usual, most, strict=True)):
        raise _bad_shape(text, "on every axis the least size comes first, then the usual, then the largest")
    return name, usual, ShapeRange(min=least, max=most)


def _sizes(text: str) -> Shape | None:
    """The sizes of `1x128`, None where it is no shape."""
    return tuple(map(int, text.lower().split("x"))) if _SIZES.fullmatch(text) else None


def _bad_shape(text: str, why: str | None) -> RecipeError:
    return RecipeError(
        f"{text!r} is not a shape",
        where="--shape",
        why=why,
        remedy="give the input's name and its sizes, such as --shape input_ids:1x128, or three of them "
        "for a range (MIN:OPT:MAX), such as --shape input_ids:1x16:1x128:8x512",
    )


def parse_assignment(text: str) -> tuple[str, str]:
    """Read `target.field=value` of --set as the field's dotted path below `target` and its value.

    Raises:
        RecipeError: if there is no "=", no field, or the path does not begin with "target.".
    """
    path, equals, value = text.partition("=")
    prefix, dot, field = path.strip().partition(".")
    if not equals or not dot or prefix != "target" or not field or not value.strip():
        raise RecipeError(
            f"{text!r} is not an override",
            where="--set",
            remedy="write --set target.FIELD=VALUE; `edgepress targets show NAME` lists the fields",
        )
    return field, value.strip()


def _stages(text: str) -> tuple[str, ...]:
    known = choices(SkippableStage)
    stages = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for stage in stages:
        if stage not in known:
            near = difflib.get_close_matches(stage, known, n=1)
            raise RecipeError(
                f"{stage!r} cannot be skipped",
                where="--skip",
                remedy=f"did you mean {near[0]}?" if near else f"give some of {', '.join(known)}",
            )
    return stages


def _add_commands(parser: argparse.ArgumentParser, commands: Sequence[Command], dest: str) -> None:
    group = parser.add_subparsers(dest=dest, metavar="COMMAND", required=True, parser_class=_Parser)
    for command in commands:
        child = group.add_parser(
            command.name,
            help=command.summary,
            description=_escape(textwrap.fill(command.description or _sentence(command.summary), 96)),
            epilog=_epilog(command.examples),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        child.set_defaults(parser=child)
        for argument in command.arguments:
            _add_argument(child, argument)
        for option in command.options:
            _add_option(child, option)
        if command.subcommands:
            _add_commands(child, command.subcommands, "subcommand")


def _add_argument(parser: argparse.ArgumentParser, argument: Argument) -> None:
    dest = argument.name.lower().replace("|", "_or_")
    if argument.many:
        parser.add_argument(dest, metavar=argument.name, nargs="+", help=_escape(argument.help))
    else:
        parser.add_argument(dest, metavar=argument.name, help=_escape(argument.help))


def _add_option(parser: argparse.ArgumentParser, option: Option) -> None:
    text = _escape(option.help)
    if option.kind == "flag":
        parser.add_argument(*option.flags, action="store_true", help=text)
        return
    if option.kind == "optional":
        parser.add_argument(*option.flags, nargs="?", const="", metavar=option.metavar, help=text)
        return
    parser.add_argument(
        *option.flags,
        action="append" if option.kind == "append" else "store",
        type=_whole_number(option.least) if option.kind == "integer" else str,
        choices=option.choices or None,
        metavar=None if option.choices else option.metavar,
        help=text,
    )


def _whole_number(least: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]{1,18}", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} upwards")
        return int(text)

    return convert


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _escape(text: str) -> str:
    """Text for argparse, which formats help with `%`."""
    return text.replace("%", "%%")


def _epilog(examples: Sequence[str], more: str = "") -> str:
    parts = ["Examples:\n" + "\n".join(f"  {line}" for line in examples)] if examples else []
    if more:
        parts.append(more)
    return "\n\n".join(parts)
