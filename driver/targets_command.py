"""`edgepress targets list|show|probe`: which targets there are and what is known about them."""

from __future__ import annotations

import argparse

from .output import Answer, Table
from .reporter import Reporter


def run(arguments: argparse.Namespace, reporter: Reporter) -> Answer:
    """Answer the subcommand.

    Raises:
        TargetError: if the target or an override does not exist.
    """
    if arguments.subcommand == "list":
        return _list()
    if arguments.subcommand == "show":
        return _profile(arguments.name, tuple(arguments.set or ()))
    with reporter.stage("probe"):
        return _profile("host", ())


def _list() -> Answer:
    from ..targets.registry import list_targets

    targets = list_targets()
    rows = tuple((item.name, item.kind, ", ".join(item.aliases), item.description) for item in targets)
    return Answer(
        document={"targets": targets},
        blocks=(Table(columns=("target", "kind", "also called", "what it is"), rows=rows),),
    )


def _profile(name: str, overrides: tuple[str, ...]) -> Answer:
    from ..targets.registry import load_target, to_toml

    profile = load_target(name, overrides)
    return Answer(document=profile, blocks=(to_toml(profile).rstrip("\n"),))
