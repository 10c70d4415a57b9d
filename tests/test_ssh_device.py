"""A whole device by ssh: models run and timed there, and bundles checked by the device runner."""

import ast

import export_case
import numpy as np
import pytest
import ssh_case
from edgepress.export.verify import read_manifest
from edgepress.graph.errors import CheckFailed, DataError, ModelError, RuntimeUnavailable, VerifyFailed
from edgepress.runtimes.base import SessionOptions
from edgepress.runtimes.device import Device, Form
from edgepress.runtimes.ort_runtime import OrtSession
from edgepress.runtimes.ssh import runner_result, void_error
from edgepress.runtimes.timing import Schedule
from edgepress.targets.host import read_host

OPTIONS = SessionOptions()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return export_case.make_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    with ssh_case.running_board(tmp_path_factory.mktemp("board")) as made:
        yield made


@pytest.fixture(scope="module")
def feeds():
    ids = np.arange(6, dtype=np.int64).reshape(2, 3)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def test_it_is_what_its_own_files_say(board):
    with ssh_case.device(board) as ssh_device:
        device: Device = ssh_device
        features, host = device.features(), read_host()
    assert (features.core, features.board) == (host.core, host.board)
    assert features.isa_features == tuple(sorted(host.features))
    assert features.runtime_version == host.runtime_version
    assert device.evidence == "measured-on-target"


def test_a_model_runs_there_as_here_and_is_timed(board, bundle, feeds):
    file = bundle / "model.onnx"
    with ssh_case.device(board) as device:
        there = device.put([file])
        outputs = device.run(there, feeds, OPTIONS)
        forms = [
            Form(name="file", model=there, options=OPTIONS),
            Form(name="bytes", model=file.read_bytes(), options=SessionOptions(threads=2)),
        ]
        result = device.time(forms, feeds, Schedule(pairs=2, runs=3, warm_up_runs=1))
        with pytest.raises(ModelError, match="does not run on the device") as caught:
            device.run(there, {"input_ids": feeds["input_ids"]}, OPTIONS)
        with pytest.raises(DataError, match="one name"):
            device.time([forms[0], forms[0]], feeds, Schedule())
    expected = OrtSession(file, OPTIONS).run(feeds)
    assert outputs.keys() == expected.keys()
    np.testing.assert_array_equal(outputs["y"], expected["y"])
    assert [timing.name for timing in result.timings] == ["file", "bytes"]
    assert result.timings[0].runs == 6
    assert result.timings[0].p50_ms > 0
    assert result.comparisons[0].candidate == "bytes"
    assert len(result.comparisons[0].pair_ratios) == result.pairs == 2
    assert "attention_mask" in caught.value.why
    assert board.left() == []
    # What only these runs needed is gone; the models stay for the next run.
    assert {path.suffix for path in (board.root / "files").rglob("*.*")} == {".onnx"}


def test_a_bundle_is_verified_there(board, bundle):
    (bundle / "runs").mkdir(exist_ok=True)
    with ssh_case.device(board) as device:
        result = device.run_bundle(bundle, ["verify"])
    assert result["outputs"]["within_tolerance"]
    assert result["outputs"]["samples"] == len(read_manifest(bundle).golden.samples)
    assert void_error(result, "board") is None
    assert board.left() == []


def test_a_corrupted_bundle_is_reported_and_the_whole_one_works(board, tmp_path):
    bundle = export_case.make_bundle(tmp_path)
    model = bundle / "model.onnx"
    good = model.read_bytes()
    model.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with ssh_case.device(board) as device:
        with pytest.raises(VerifyFailed) as caught:
            device.run_bundle(bundle, ["check"])
        assert caught.value.where == board.url
        assert "model.onnx" in str(caught.value)
        model.write_bytes(good)
        assert device.run_bundle(bundle, ["check"])["exit_code"] == 0


def test_what_is_no_bundle_is_refused_before_anything_is_sent(board, tmp_path):
    with ssh_case.device(board) as device:
        with pytest.raises(ModelError, match="not an edgepress bundle"):
            device.put_bundle(tmp_path)
        (tmp_path / "link").symlink_to("/etc/hostname")
        with pytest.raises(ModelError, match="plain files only"):
            device.put_bundle(tmp_path)
        with pytest.raises(ModelError, match="does not exist"):
            device.put([tmp_path / "absent.onnx"])


def test_a_runner_that_dies_is_told_apart_from_one_that_refuses(board, tmp_path):
    (tmp_path / "dies.py").write_text("import os, sys\nos.kill(os.getpid(), 4)\n")
    (tmp_path / "silent.py").write_text("import sys\nsys.exit('no module named numpy')\n")
    with ssh_case.device(board) as device:
        with pytest.raises(RuntimeUnavailable, match="SIGILL"):
            device.run_program({"dies.py": tmp_path / "dies.py"}, ["{files}/dies.py"])
        end = device.run_program({"silent.py": tmp_path / "silent.py"}, ["{files}/silent.py"])
    assert (end.status, end.result) == (1, None)


@pytest.mark.parametrize(
    ("status", "kind"), [(2, ModelError), (3, VerifyFailed), (4, RuntimeUnavailable), (1, RuntimeUnavailable)]
)
def test_the_runners_errors_keep_their_kind(status, kind):
    document = b'{"error": {"what": "it is so", "why": "because", "remedy": ""}}'
    with pytest.raises(kind, match="it is so") as caught:
        runner_result(document, status, "board")
    assert (caught.value.why, caught.value.remedy) == ("because", None)


@pytest.mark.parametrize("document", [b"", b"[]", b"{}", b'{"error": '])
def test_a_result_that_is_none(document):
    with pytest.raises(RuntimeUnavailable, match="no valid result"):
        runner_result(document, 0, "board")


def test_a_run_on_a_throttled_board_is_void():
    error = void_error({"void": True, "void_reasons": ["throttled"]}, "board")
    assert isinstance(error, CheckFailed)
    assert error.why == "throttled"


@pytest.mark.parametrize("name", ["remote_agent.py", "remote_run.py"])
def test_what_travels_is_python_38(name):
    source = ssh_case.Path(ssh_case.remote_agent.__file__).with_name(name).read_text()
    ast.parse(source, feature_version=(3, 8))
