"""`edgepress compile`: the command line's words as one call of `compile_model`, and its closing table."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..graph.errors import OutputError
from .compile import compile_model
from .options import recipe_from
from .output import Answer
from .reporter import Reporter
from .summary import document_of, dry_run_blocks, summary_blocks


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
    result = compile_model(
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
    )
    if arguments.dry_run:
        return Answer(
            document=document_of(result), blocks=dry_run_blocks(result, every_node=arguments.verbose)
        )
    return Answer(document=document_of(result), blocks=summary_blocks(result))
