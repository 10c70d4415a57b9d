"""The temporary folder of a compile, and what killed processes left behind."""

import os
import subprocess
import sys
import tempfile

import pytest
from edgepress.driver.workspace import sweep, workspace


@pytest.fixture
def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_only_folders_of_dead_processes_are_swept(tmp_path, dead_pid):
    left = tmp_path / f"edgepress-{dead_pid}-abc"
    (left / "candidate").mkdir(parents=True)
    (left / "candidate" / "model.onnx").write_bytes(b"x")
    kept = [tmp_path / f"edgepress-{os.getpid()}-abc", tmp_path / "edgepress-mine", tmp_path / "other"]
    for folder in kept:
        folder.mkdir()
    (tmp_path / f"edgepress-{dead_pid}-file").write_text("not a folder")
    (tmp_path / f"edgepress-{dead_pid}-link").symlink_to(kept[2])
    assert sweep(tmp_path) == [left]
    assert not left.exists()
    assert all(folder.exists() for folder in kept)


def test_workspace_sweeps_and_leaves_nothing(tmp_path, dead_pid, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / f"edgepress-{dead_pid}-abc").mkdir()
    with workspace() as folder:
        assert [path.name for path in tmp_path.iterdir()] == [folder.name]
        (folder / "file").write_text("x")
    assert list(tmp_path.iterdir()) == []
