"""Where the benchmarks find models and data, and where they keep what they make."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_FETCHED_MODEL = ROOT / ".cache" / "demo" / "all-MiniLM-L6-v2"
CALIBRATION_TEXT = "calib-text/calib_sentences_wikitext2_valid.txt"
STS_TEST = "stsb/sts-test.csv"


def add_workdir(parser: argparse.ArgumentParser) -> None:
    """The option for the folder of exports, bundles and peers' models."""
    parser.add_argument(
        "--workdir",
        type=Path,
        default=ROOT / ".cache" / "benchmarks",
        help="folder for exports, bundles and peers' models (default: .cache/benchmarks of the checkout)",
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """The option for the folder of all-MiniLM-L6-v2."""
    parser.add_argument(
        "--model",
        type=Path,
        help="folder of all-MiniLM-L6-v2 (default: $EDGEPRESS_MINILM, else what `make demo` fetches)",
    )


def minilm(option: Path | None) -> Path:
    """The folder of all-MiniLM-L6-v2: the one named, or fetched as `make demo` does.

    Raises:
        SystemExit: if the named folder is no such model, or it cannot be fetched.
    """
    named = option or (Path(os.environ["EDGEPRESS_MINILM"]) if os.environ.get("EDGEPRESS_MINILM") else None)
    if named is None and not (_FETCHED_MODEL / "model.safetensors").is_file():
        fetch = subprocess.run(
            [sys.executable, str(ROOT / "demo" / "fetch_model.py"), str(_FETCHED_MODEL)], check=False
        )
        if fetch.returncode != 0:
            raise SystemExit("all-MiniLM-L6-v2 could not be fetched: name its folder with --model")
    folder = (named or _FETCHED_MODEL).resolve()
    if not (folder / "model.safetensors").is_file():
        raise SystemExit(f"{folder} holds no model.safetensors: name the folder of all-MiniLM-L6-v2")
    return folder


def data(name: str) -> Path:
    """A file of the measuring data: below $EDGEPRESS_DATA, or shared/data beside the checkout.

    Raises:
        SystemExit: if it is not there.
    """
    root = Path(os.environ.get("EDGEPRESS_DATA") or ROOT.parent / "shared" / "data")
    path = root / name
    if not path.exists():
        raise SystemExit(f"{path} does not exist: set EDGEPRESS_DATA to the folder of the measuring data")
    return path
