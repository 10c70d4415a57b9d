"""Fetching from a hub: a small server on this machine stands in for it."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("huggingface_hub")

SHA = "c" * 40
CONFIG = json.dumps({"model_type": "bert", "architectures": ["BertModel"]}).encode()
FILES = {
    "config.json": CONFIG,
    "model.safetensors": b"\x02\0\0\0\0\0\0\0{}",
    "model.fp16.safetensors": b"another precision",
    "onnx/model.safetensors": b"another format",
    "pytorch_model.bin": b"a pickle",
    "modeling.py": b"raise SystemExit",
    "tokenizer.json": b"{}",
    "1_Pooling/config.json": b"{}",
}
REPOS = {
    "owner/good": FILES,
    "owner/pickled": {"config.json": CONFIG, "pytorch_model.bin": b"a pickle"},
    "owner/code": FILES | {"config.json": CONFIG.replace(b"{", b'{"auto_map": {"AutoModel": "a.B"}, ', 1)},
}


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers what huggingface_hub asks: model info, file tree, and files."""

    asked: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(path)
        name = "/".join(path.removeprefix("/api/models").split("/")[1:3])
        files = REPOS.get(name)
        if files is None:
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if path.startswith("/api/models/"):
            if "/tree/" in path:
                tree = [
                    {"type": "file", "path": file, "size": len(data), "oid": etag(data)}
                    for file, data in files.items()
                ]
                return self.answer(200, json.dumps(tree).encode(), {})
            siblings = [{"rfilename": file} for file in files]
            info = {"id": name, "modelId": name, "sha": SHA, "siblings": siblings}
            return self.answer(200, json.dumps(info).encode(), {})
        data = files[path.partition(f"/resolve/{SHA}/")[2]]
        return self.answer(200, data, {"ETag": f'"{etag(data)}"', "X-Repo-Commit": SHA})

    def answer(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_args: object) -> None:
        """Keep the test's stderr for what edgepress writes."""


def etag(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


@pytest.fixture
def hub() -> Iterator[http.server.ThreadingHTTPServer]:
    Hub.asked = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


CODE = """
import pathlib, sys
from edgepress.frontends.hub import fetch
from edgepress.frontends.source import load_source
from edgepress.graph.errors import EdgepressError
cache = pathlib.Path(sys.argv[1])
for reference in sys.argv[2:]:
    try:
        if reference.startswith("load:"):
            load_source(reference[5:], cache_folder=cache, trust_code=True)
        folder = fetch(reference, cache_folder=cache, offline=False)
        print(*sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()))
    except EdgepressError as error:
        print(type(error).__name__, error.what, error.remedy, sep="|")
"""


def ask(hub: http.server.ThreadingHTTPServer, cache: Path, *references: str) -> list[str]:
    """Fetch in a process of its own: the hub library reads its endpoint when it is imported."""
    port = hub.server_address[1]
    settings = {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_XET": "1"}
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")} | settings
    result = subprocess.run(
        [sys.executable, "-c", CODE, str(cache), *references],
        env=environment | {"HF_HOME": str(cache / "home")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout.splitlines()


def test_only_safe_files_are_fetched(hub: http.server.ThreadingHTTPServer, tmp_path: Path) -> None:
    (line,) = ask(hub, tmp_path, "owner/good")
    assert line.split() == ["1_Pooling/config.json", "config.json", "model.safetensors", "tokenizer.json"]
    asked = [path.partition("/resolve/")[2] for path in Hub.asked if "/resolve/" in path]
    assert asked
    assert not any(path.endswith((".bin", ".py", "fp16.safetensors")) or "/onnx/" in path for path in asked)
    # The second time without the hub: what was fetched is used.
    hub.shutdown()
    hub.server_close()
    assert ask(hub, tmp_path, "owner/good") == [line]


def test_refusals(hub: http.server.ThreadingHTTPServer, tmp_path: Path) -> None:
    missing, pickled, code = ask(hub, tmp_path, "owner/nothing", "owner/pickled", "load:owner/code")
    assert missing.startswith("ModelError|there is no such model, neither here nor on")
    assert pickled.startswith("ModelError|the hub model has no safetensors weights|")
    assert not any("/resolve/" in path and "pickled" in path for path in Hub.asked)
    assert code.startswith("NotSupported|the hub model needs its own Python code|")
    assert "hf download owner/code" in code
