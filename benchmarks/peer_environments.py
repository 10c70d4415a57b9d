"""The peers: a virtual environment for each, made once, and the models that each makes in its own.

What a peer needs is pinned here and installed by this environment's pip from the package index that it is set
up with. Nothing of edgepress is installed beside it, and nothing of a peer is imported by edgepress.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgepress.graph.errors import RuntimeUnavailable

PROGRAMS = Path(__file__).resolve().parent / "peer_programs"
_RUNNER = PROGRAMS / "program.py"
_INSTALLED = "installed.json"
_INSTALL_LIMIT_S, _PREPARE_LIMIT_S = 3600, 3600
_ONNX = ("onnx==1.23.2", "onnxruntime==1.31.1", "numpy==2.4.6")
_TORCH = ("torch==2.13.0", "transformers==4.57.6")
# No peer asks a hub for anything or reports that it was used.
_QUIET = {
    "CI": "true",
    "NNCF_CI": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "ORT_DISABLE_TELEMETRY": "1",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peer:
    """How a peer is installed and asked.

    Attributes:
        program: file in `peer_programs` (or elsewhere) whose `prepare` quantizes.
        requirements: what pip is given.
        calibrated: whether its result depends on the calibration sentences.
    """

    name: str
    program: str
    requirements: tuple[str, ...]
    calibrated: bool


PEERS: Mapping[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer(
            name="optimum",
            program="optimum_dynamic.py",
            requirements=("optimum-onnx[onnxruntime]==0.1.0", "optimum==2.1.0", *_TORCH, *_ONNX),
            calibrated=False,
        ),
        Peer(
            name="ort-legacy",
            program="legacy_export.py",
            requirements=(*_TORCH, *_ONNX),
            calibrated=False,
        ),
        Peer(
            name="openvino",
            program="openvino_int8.py",
            requirements=("openvino==2026.4.1", "nncf==3.4.0", "numpy==2.4.6"),
            calibrated=True,
        ),
        Peer(
            name="nncf",
            program="nncf_onnx.py",
            requirements=("nncf==3.4.0", *_ONNX),
            calibrated=True,
        ),
    )
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeerForm:
    """A model that a program can serve.

    Attributes:
        python: the interpreter of the environment that it is served in.
        program: file in `peer_programs` (or elsewhere) whose `load` opens it.
        files: the model's files, the one to open first.
        options: what `load` is given.
    """

    name: str
    python: Path
    program: str
    files: tuple[Path, ...]
    options: Mapping[str, Any]

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.stat().st_size for file in self.files)


def make_environment(peer: Peer, folder: Path, extra_index: str | None = None) -> Path:
    """The interpreter of the peer's environment in `folder`, which is made unless an earlier run did.

    Args:
        peer: which.
        folder: where environments are kept; each has its requirements' digest in its name.
        extra_index: a further package index, for a CPU build of torch.

    Raises:
        RuntimeUnavailable: if it cannot be made or installed.
    """
    described = json.dumps([sys.version, *peer.requirements])
    environment = folder / f"{peer.name}-{hashlib.sha256(described.encode()).hexdigest()[:12]}"
    python = environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if (environment / _INSTALLED).is_file():
        return python
    if environment.exists():
        shutil.rmtree(environment)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    index = [] if extra_index is None else ["--extra-index-url", extra_index]
    where = f"the environment of {peer.name}"
    folder.mkdir(parents=True, exist_ok=True)
    run_quietly([sys.executable, "-m", "venv", "--without-pip", str(environment)], where, _INSTALL_LIMIT_S)
    if peer.requirements:
        run_quietly([*pip, "install", "--quiet", *index, *peer.requirements], where, _INSTALL_LIMIT_S)
    packages = run_quietly([*pip, "list", "--format", "json"], where, _INSTALL_LIMIT_S)
    (environment / _INSTALLED).write_text(packages, encoding="utf-8")
    return python


def packages_of(python: Path) -> dict[str, str]:
    """Versions by name of what was installed into a finished environment."""
    listed = json.loads((python.parents[1] / _INSTALLED).read_text(encoding="utf-8"))
    return {item["name"]: item["version"] for item in listed}


def prepare(peer: Peer, python: Path, output: Path, request: Mapping[str, Path]) -> list[PeerForm]:
    """Have the peer make its models in its environment.

    Args:
        peer: which.
        python: the interpreter of its environment.
        output: the folder for what it makes; emptied first.
        request: `model` (folder of the Hugging Face model), `baseline` (.onnx), `calibration` (.npz).

    Raises:
        RuntimeUnavailable: if the program fails, with what it said last.
    """
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    asked, answer = output / "request.json", output / "forms.json"
    fields = {name: str(path.resolve()) for name, path in {**request, "output": output}.items()}
    asked.write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
    run_quietly(
        [*program_command(python, peer.program), "prepare", str(asked), str(answer)],
        f"the quantization by {peer.name}",
        _PREPARE_LIMIT_S,
    )
    return [
        PeerForm(
            name=item["name"],
            python=python,
            program=item["program"],
            files=tuple(Path(file) for file in item["files"]),
            options=item["options"],
        )
        for item in json.loads(answer.read_text(encoding="utf-8"))
    ]


def program_command(python: Path, program: str) -> list[str]:
    """The words that run a program, cut off from this process's Python settings."""
    return [str(python), "-I", str(_RUNNER), str(PROGRAMS / program)]


def environment_variables() -> dict[str, str]:
    """The variables that peers' processes get."""
    return {**os.environ, **_QUIET}


def run_quietly(words: Sequence[str], where: str, limit_s: float) -> str:
    """Run a command to its end and return what it printed.

    Raises:
        RuntimeUnavailable: if it cannot be started, ends with another code than 0, or takes too long.
    """
    try:
        done = subprocess.run(
            words,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            env=environment_variables(),
            timeout=limit_s,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeUnavailable("a peer cannot be used", where=where, why=str(error)) from error
    if done.returncode != 0:
        raise RuntimeUnavailable(
            "a peer cannot be used",
            where=where,
            why=last_words(done.stderr or done.stdout, f"exit code {done.returncode}"),
        )
    return done.stdout


def last_words(text: str, otherwise: str) -> str:
    """The line of a failed program's output that names its failure: pip's first ERROR, else the last line."""
    said = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in said if line.startswith("ERROR:")]
    return (named or said[-1:] or [otherwise])[0]
