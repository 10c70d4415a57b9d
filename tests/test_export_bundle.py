"""Writing bundles: layout, overwriting, interruption, full disks, and what must not be in them."""

import hashlib
import json
import os
import re
import runpy
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from edgepress.export import place as place_module
from edgepress.export.bundle import append_run, check_output, write_bundle
from edgepress.export.place import staged, sweep
from edgepress.export.verify import verify_bundle
from edgepress.graph.errors import InternalError, ModelError, OutputError

CASE_FILE = Path(__file__).with_name("export_case.py")
case = SimpleNamespace(**runpy.run_path(str(CASE_FILE)))


@pytest.fixture(scope="module")
def contents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("contents")
    return case.contents_of(case.text_model(folder), folder)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def tree(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def start(folder, out, *options, **environment):
    return subprocess.Popen(
        [sys.executable, str(CASE_FILE), str(folder), str(out), *options],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        # Tests that are run in the background ignore Ctrl-C, and their children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
    )


def wait_for(path, process):
    for _ in range(600):
        if path.exists():
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    raise AssertionError("the subprocess did not get there")


def test_layout_and_sums(contents, tmp_path):
    old = os.umask(0o027)
    try:
        out = write_bundle(contents, tmp_path / "bundle", overwrite=False)
    finally:
        os.umask(old)
    files = tree(out)
    samples = [f"golden/{kind}_{index:03}.npz" for index in range(3) for kind in ("inputs", "outputs")]
    expected = ["README.md", "SHA256SUMS", "drift.json", "manifest.json", "model.onnx", "plan.json"]
    expected += ["recipe.toml", "device_runner.py", "runs/golden.json", *samples]
    expected += [f"snippets/{name}" for name in ("RunCSharp.cs", "run_cpp.cc", "run_python.py")]
    assert sorted(files) == sorted(expected)
    sums = "".join(
        f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n"
        for name in sorted(files)
        if name != "SHA256SUMS" and not name.startswith("runs/")
    )
    assert files["SHA256SUMS"].decode() == sums
    assert files["model.onnx"] == contents.model_files[0].read_bytes()
    record = json.loads(files["runs/golden.json"])
    assert record["bundle"] == hashlib.sha256(sums.encode()).hexdigest()
    assert {stat.S_IMODE(path.stat().st_mode) for path in (out, out / "golden")} == {0o750}
    assert {stat.S_IMODE((out / name).stat().st_mode) for name in files} == {0o640}
    assert names_in(tmp_path) == ["bundle"]


def test_external_weights_travel(tmp_path):
    out = case.make_bundle(tmp_path, external=True)
    assert {"model.onnx", "model.onnx.data"} <= set(tree(out))
    assert verify_bundle(out).golden_samples == 3


def test_existing_output_is_refused_and_untouched(contents, tmp_path):
    out = write_bundle(contents, tmp_path / "bundle", overwrite=False)
    before = tree(out)
    with pytest.raises(OutputError, match="exists already") as caught:
        write_bundle(contents, out, overwrite=False)
    assert "--overwrite" in caught.value.remedy
    assert tree(out) == before
    assert names_in(tmp_path) == ["bundle"]


def test_overwrite_replaces_a_bundle_with_its_runs(contents, tmp_path):
    out = case.make_bundle(tmp_path / "other", seed=7)
    append_run(out, "benchmark", {"p50_ms": 1.0})
    place = tmp_path / "bundle"
    out.rename(place)
    write_bundle(contents, place, overwrite=True)
    fresh = write_bundle(contents, tmp_path / "fresh", overwrite=False)
    assert tree(place) == tree(fresh)
    assert names_in(tmp_path) == ["bundle", "fresh", "other"]


@pytest.mark.parametrize("kind", ["file", "folder", "bundle-with-notes", "half-bundle"])
def test_overwrite_spares_what_is_no_bundle(contents, tmp_path, kind):
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind == "bundle-with-notes":
        write_bundle(contents, out, overwrite=False)
        (out / "notes.txt").write_text("mine")
    else:
        out.mkdir()
        (out / ("thesis.txt" if kind == "folder" else "manifest.json")).write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(OutputError) as caught:
        write_bundle(contents, out, overwrite=True)
    assert tree(tmp_path) == before
    if kind == "bundle-with-notes":
        assert "notes.txt" in caught.value.why


def test_empty_folder_needs_overwrite(contents, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(OutputError, match="exists already"):
        check_output(out, False)
    write_bundle(contents, out, overwrite=True)
    assert verify_bundle(out, run_golden=False).files > 10


def test_output_through_a_file(contents, tmp_path):
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file" / "bundle", tmp_path / "file" / "deeper" / "bundle"):
        with pytest.raises(OutputError, match=r"not a folder|cannot be"):
            check_output(out, False)
        with pytest.raises(OutputError):
            write_bundle(contents, out, overwrite=True)
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize("name", ["x" * 300, "nul\0byte", "loop"])
def test_impossible_paths(tmp_path, name):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OutputError):
        check_output(tmp_path / name, False)
    assert names_in(tmp_path) == ["loop"]


def test_longest_name_that_a_folder_can_have(contents, tmp_path):
    out = tmp_path / ("é" * 127)
    assert write_bundle(contents, out, overwrite=False) == out
    write_bundle(contents, out, overwrite=True)
    assert names_in(tmp_path) == ["é" * 127]


def test_the_current_folder_is_refused(contents, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for out in (Path(), Path(".."), tmp_path):
        with pytest.raises(OutputError, match="folder you are in"):
            write_bundle(contents, out, overwrite=True)


def test_link_to_a_folder_is_followed(contents, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert write_bundle(contents, tmp_path / "link", overwrite=True) == tmp_path / "real"
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "SHA256SUMS").is_file()


def test_missing_parents_are_made_and_unmade(contents, tmp_path):
    out = tmp_path / "a" / "b" / "bundle"
    check_output(out, False)
    assert names_in(tmp_path) == []

    def half_way():
        with staged(out, overwrite=False) as folder:
            (folder / "part").write_text("x")
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        half_way()
    assert names_in(tmp_path) == []
    write_bundle(contents, out, overwrite=False)
    assert names_in(out.parent) == ["bundle"]


def test_failed_swap_brings_the_old_bundle_back(contents, tmp_path, monkeypatch):
    out = write_bundle(contents, tmp_path / "bundle", overwrite=False)
    before, genuine = tree(out), Path.rename

    def rename(self, target):
        if self.name == "new":
            raise OSError(28, "No space left on device")
        return genuine(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OutputError, match="does not fit"):
        write_bundle(contents, out, overwrite=True)
    assert tree(out) == before
    assert names_in(tmp_path) == ["bundle"]


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_interrupted_swap_brings_the_old_bundle_back(contents, tmp_path, monkeypatch, interrupt):
    out = write_bundle(contents, tmp_path / "bundle", overwrite=False)
    before, genuine = tree(out), Path.rename

    def rename(self, target):
        result = genuine(self, target)
        if target.name == "old":
            raise interrupt
        return result

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(interrupt):
        write_bundle(contents, out, overwrite=True)
    assert tree(out) == before
    assert names_in(tmp_path) == ["bundle"]


def test_killed_run_is_swept_by_the_next(tmp_path):
    out = case.make_bundle(tmp_path)
    shutil.rmtree(tmp_path / "work")
    before = tree(out)
    process = start(tmp_path / "child", out, "--overwrite", "--pause-after", "3")
    wait_for(tmp_path / "child" / "paused", process)
    leftovers = [name for name in names_in(tmp_path) if ".edgepress-" in name]
    assert len(leftovers) == 1
    assert leftovers[0].startswith(".bundle.edgepress-")
    sweep(out)  # its owner is alive: not ours to remove
    assert (tmp_path / leftovers[0] / "new" / "README.md").is_file()
    process.kill()
    process.communicate()
    assert (tmp_path / leftovers[0]).is_dir()
    assert tree(out) == before
    with pytest.raises(OutputError, match="exists already"):
        check_output(out, False)
    assert not (tmp_path / leftovers[0]).exists()
    assert tree(out) == before


def test_run_killed_between_the_two_renames_gives_the_old_bundle_back(contents, tmp_path):
    out = write_bundle(contents, tmp_path / "bundle", overwrite=False)
    before = tree(out)
    staging = tmp_path / ".bundle.edgepress-0123456789abcdef"
    (staging / "new").mkdir(parents=True)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (staging / "lock").write_text(json.dumps({"pid": dead.pid, "started": "1", "name": "bundle"}))
    out.rename(staging / "old")
    with pytest.raises(OutputError, match="exists already"):
        check_output(out, False)
    assert tree(out) == before
    assert names_in(tmp_path) == ["bundle"]


def test_sweep_leaves_strangers_alone(tmp_path):
    mine, reused, fresh = (tmp_path / f".out.edgepress-{digit * 16}" for digit in "abc")
    for folder in (mine, reused, fresh):
        folder.mkdir()
    started = place_module._start_time(os.getpid())
    (mine / "lock").write_text(json.dumps({"pid": os.getpid(), "started": started, "name": "out"}))
    (reused / "lock").write_text(json.dumps({"pid": os.getpid(), "started": "1", "name": "out"}))
    (tmp_path / ".out.edgepress-notes").mkdir()
    (tmp_path / f".other.edgepress-{'a' * 16}").mkdir()
    sweep(tmp_path / "out")
    # A reused process number is no owner; a folder that has no lock yet may be getting one.
    assert not reused.exists()
    assert mine.exists()
    assert fresh.exists()
    os.utime(fresh, (0, 0))
    sweep(tmp_path / "out")
    assert not fresh.exists()
    assert len(names_in(tmp_path)) == 3


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_signals_leave_nothing(tmp_path, number, code):
    out = tmp_path / "parent" / "bundle"
    process = start(tmp_path / "child", out, "--pause-after", "3")
    wait_for(tmp_path / "child" / "paused", process)
    process.send_signal(number)
    process.communicate()
    assert process.returncode == code
    assert names_in(tmp_path) == ["child"]


def test_full_disk_leaves_nothing(tmp_path):
    out = tmp_path / "parent" / "bundle"
    process = start(tmp_path / "child", out, "--file-limit-bytes", "4096", "--rows", "5000")
    _, message = process.communicate()
    assert process.returncode == 2, message
    assert "does not fit" in message
    assert "Traceback" not in message
    assert names_in(tmp_path) == ["child"]


def test_same_bytes_under_two_hash_seeds(tmp_path):
    trees = []
    for seed in ("1", "2"):
        out = tmp_path / seed / "bundle"
        process = start(tmp_path / seed / "work", out, PYTHONHASHSEED=seed)
        _, message = process.communicate()
        assert process.returncode == 0, message
        trees.append(tree(out))
    assert trees[0] == trees[1]


def test_nothing_of_the_machine_is_inside(tmp_path):
    home = tmp_path / "home-of-quixotic-user"
    home.mkdir()
    environment = {"HOME": str(home), "USER": "quixotic-user", "LOGNAME": "quixotic-user"}
    out = tmp_path / "bundle"
    process = start(home / "work", out, TMPDIR=str(home), **environment)
    _, message = process.communicate()
    assert process.returncode == 0, message
    secrets = ["quixotic-user", str(tmp_path), str(Path.home()), str(Path(__file__).parents[1])]
    host = re.compile(rb"\b" + re.escape(socket.gethostname().encode()) + rb"\b")
    files = tree(out)
    assert len(files) > 15
    for name, data in files.items():
        assert not [text for text in secrets if len(text) > 5 and text.encode() in data], name
        if not name.endswith((".npz", ".onnx")):
            assert not host.search(data), name


def test_local_paths_are_taken_out_of_assets(tmp_path):
    config = {"_name_or_path": str(tmp_path / "model"), "vocab_size": 50, "label": "ü"}
    hub = {"_name_or_path": "owner/name"}
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    out = case.make_bundle(
        tmp_path,
        assets={
            "config.json": json.dumps(config).encode(),
            "1_Pooling/config.json": json.dumps(hub).encode(),
            "vocab.txt": tmp_path / "vocab.txt",
        },
    )
    assert json.loads((out / "assets/config.json").read_text()) == {"vocab_size": 50, "label": "ü"}
    assert json.loads((out / "assets/1_Pooling/config.json").read_text()) == hub
    assert (out / "assets/vocab.txt").read_text() == "a\nb\n"
    assert str(tmp_path).encode() not in b"".join(tree(out).values())
    assert verify_bundle(out, run_golden=False).files > 15


def test_unreadable_asset_leaves_nothing(tmp_path):
    with pytest.raises(OutputError, match="cannot be read"):
        case.make_bundle(tmp_path, assets={"vocab.txt": tmp_path / "gone.txt"})
    assert names_in(tmp_path) == ["source.onnx", "work"]


def test_manifest_must_fit_the_contents(contents, tmp_path):
    from dataclasses import replace

    with pytest.raises(InternalError, match="golden"):
        write_bundle(replace(contents, golden=None), tmp_path / "bundle", overwrite=False)
    with pytest.raises(InternalError, match="assets"):
        write_bundle(replace(contents, assets={"../x": b""}), tmp_path / "bundle", overwrite=False)
    assert names_in(tmp_path) == []


def test_runs_are_numbered_and_bound(contents, tmp_path):
    out = write_bundle(contents, tmp_path / "bundle", overwrite=False)
    names = [append_run(out, "benchmark", {"p50_ms": value}).name for value in (1.5, 2.5)]
    assert names == ["benchmark.json", "benchmark-2.json"]
    record = json.loads((out / "runs/benchmark-2.json").read_text())
    assert record["payload"] == {"p50_ms": 2.5}
    assert record["bundle"] == hashlib.sha256((out / "SHA256SUMS").read_bytes()).hexdigest()
    assert verify_bundle(out).runs == ("benchmark.json", "benchmark-2.json", "golden.json")
    with pytest.raises(ModelError, match="not an edgepress bundle"):
        append_run(tmp_path, "benchmark", {})
    with pytest.raises(InternalError):
        append_run(out, "../benchmark", {})
