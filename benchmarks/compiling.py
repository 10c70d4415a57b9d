"""`edgepress compile` in a process of its own, so that the timing process holds nothing of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def compile_bundle(model: Path, output: Path, target: str, *options: str) -> dict[str, Any]:
    """Compile a model and return the JSON document that the command prints.

    Args:
        model: what is to be compiled.
        output: the bundle's folder; one of an earlier run is replaced.
        target: a target's name.
        options: further words of the command line.

    Raises:
        SystemExit: if the command fails, with what it said.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    words = ["compile", str(model), "--target", target, "-o", str(output), "--overwrite", *options]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "edgepress", *words, "--json", "-q"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(
            f"edgepress {' '.join(words)}\nended with exit code {done.returncode}:\n{done.stderr}"
        )
    document: dict[str, Any] = json.loads(done.stdout)
    return document
