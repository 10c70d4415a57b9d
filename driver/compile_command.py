"""`edgepress compile`: the command line's words as one call of `compile_model`, and its closing table."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ..graph.errors import OutputError
from ..targets.host import runtime_version
from .compile import compile_model
from .history.record import keep_compiled
from .measuring.device_planning import planning_device
from .options import recipe_from
from .output import Answer
from .reporter import Reporter
from .summary import document_of, dry_run_blocks, summary_blocks

if TYPE_CHECKING:
    from ..compress.recipe import Recipe
    from ..runtimes.device import Device
    from .result import CompileResult


def run(arguments: argparse.Namespace, reporter: Reporter) -> Answer:
    """Compile, or show what a compile would do.

    Raises:
        EdgepressError: whatever `compile_model` raises; RecipeError for a malformed option.
    """
    recipe = recipe_from(arguments)
    if arguments.output is None and not arguments.dry_run:
        raise OutputError(
            "no output is named",
            where="-o",
            remedy="add -o OUT with a folder that does not exist yet, or --dry-run",
        )
    with planning_device(arguments, reporter, version=runtime_version()) as found:
        threads = arguments.threads or (None if found is None else found[1].threads)
        if threads:
            recipe = msgspec.structs.replace(recipe, threads=threads)
        result = _compiled(arguments, recipe, reporter, None if found is None else found[0])
    if found is not None and result.bundle is not None:
        keep_compiled(result.bundle, device=found[1].name, url=found[1].url, reporter=reporter)
    if arguments.dry_run:
        return Answer(
            document=document_of(result), blocks=dry_run_blocks(result, every_node=arguments.verbose)
        )
    return Answer(document=document_of(result), blocks=summary_blocks(result))


def _compiled(
    arguments: argparse.Namespace, recipe: Recipe, reporter: Reporter, device: Device | None
) -> CompileResult:
    return compile_model(
        arguments.model,
        target=recipe.target,
        output=None if arguments.output is None else Path(arguments.output),
        calib=arguments.calib,
        eval_data=arguments.eval,
        calib_cache=arguments.calib_cache,
        recipe=recipe,
        tokenizer=arguments.tokenizer,
        preprocessor=arguments.preprocessor,
        overwrite=arguments.overwrite,
        dry_run=arguments.dry_run,
        reporter=reporter,
        device=device,
    )
