"""Running jobs in rounds: what comes back, models that fail, and models that kill the process."""

import io
import json
import zipfile

import numpy as np
import pytest
import replay_case
from edgepress.export.replay_units import cut_units, unit_models
from edgepress.graph.errors import RuntimeUnavailable
from edgepress.runtimes import remote_replay, replay
from edgepress.runtimes.base import SessionOptions
from edgepress.runtimes.replay import Job, Stage, on_device, on_this_machine, play


@pytest.fixture
def quantizer(tmp_path):
    """One unit as a job: QuantizeLinear of two samples."""
    model = replay_case.static_net(tmp_path)
    feeds = np.linspace(-3, 3, 192, dtype=np.float32).reshape(1, 3, 8, 8)
    np.save(tmp_path / "a.npy", feeds)
    np.save(tmp_path / "b.npy", -feeds)
    unit = cut_units(model)[0]
    made = unit_models([unit], {"x": feeds}, model.graph.opset_imports, model)[0]
    return Job(model=made.data, inputs=("i0",), feeds=(("a.npy",), ("b.npy",)))


def stage(folder, runs=on_this_machine):
    return Stage(runs=runs, bundle=folder, folder=folder, options=SessionOptions())


def quantized(values):
    return np.clip(np.rint(values / np.float32(0.05)) + 120, 0, 255).astype(np.uint8)


def test_outputs_and_kernels_come_back(quantizer, tmp_path):
    (found,) = play([quantizer], stage(tmp_path))
    assert found.error is None
    assert found.kernels == {"QuantizeLinear": 2}
    for sample, name in enumerate(("a.npy", "b.npy")):
        assert np.array_equal(found.outputs[sample][0], quantized(np.load(tmp_path / name)))


def test_a_model_that_does_not_load_or_run_stops_no_other(quantizer, tmp_path):
    np.save(tmp_path / "flat.npy", np.zeros(3, np.float32))
    broken = Job(model=b"no model", inputs=("i0",), feeds=(("a.npy",),))
    unfit = Job(model=quantizer.model, inputs=("i0",), feeds=(("flat.npy",),))
    missing = Job(model="absent.onnx", inputs=("x",), feeds=(("a.npy",),))
    found = play([broken, unfit, missing, quantizer], stage(tmp_path))
    assert [item.error is None for item in found] == [False, False, False, True]
    assert "absent.onnx" in found[2].error
    assert "rank" in found[1].error.lower()
    assert not found[1].outputs


def test_a_model_that_kills_the_process_is_named_and_the_others_run_again(quantizer, tmp_path):
    tried = []

    def runs(files, bundle):
        numbers = [unit["index"] for unit in replay_case.request_of(files)["units"]]
        tried.append(numbers)
        if 1 in numbers:
            raise RuntimeUnavailable(
                "remote_replay.py died with SIGILL", why="crash; its last line: replaying unit 1"
            )
        return on_this_machine(files, bundle)

    found = play([quantizer] * 3, stage(tmp_path, runs))
    assert tried == [[0, 1, 2], [0, 2]]
    assert found[1].error == "remote_replay.py died with SIGILL"
    assert found[0].outputs[0][0].tobytes() == found[2].outputs[0][0].tobytes()


@pytest.mark.parametrize("why", ["the connection was lost", "its last line: replaying unit 7", None])
def test_a_device_that_goes_away_is_no_fault_of_a_model(quantizer, tmp_path, why):
    def runs(_files, _bundle):
        raise RuntimeUnavailable("gone", why=why)

    with pytest.raises(RuntimeUnavailable, match="gone"):
        play([quantizer], stage(tmp_path, runs))


def test_when_every_model_kills_the_process_it_is_given_up(quantizer, tmp_path):
    def runs(files, _bundle):
        first = replay_case.request_of(files)["units"][0]["index"]
        raise RuntimeUnavailable("died", why=f"its last line: replaying unit {first}")

    with pytest.raises(RuntimeUnavailable, match="died"):
        play([quantizer] * 9, stage(tmp_path, runs))


def test_rounds_keep_to_what_one_run_brings_back(quantizer, tmp_path, monkeypatch):
    monkeypatch.setattr(replay, "_ROUND_OUTPUT_BYTES", 1000)
    rounds = []

    def runs(files, bundle):
        rounds.append([unit["index"] for unit in replay_case.request_of(files)["units"]])
        return on_this_machine(files, bundle)

    found = play([quantizer] * 4, stage(tmp_path, runs), output_bytes=[384, 384, 5000, 384])
    assert rounds == [[0, 1], [3]]
    assert "more than one run brings back" in found[2].error
    assert found[3].error is None


@pytest.mark.parametrize("data", [b"", b"no archive", b"PK\x05\x06" + bytes(18)])
def test_damaged_results_are_refused(quantizer, tmp_path, data):
    with pytest.raises(RuntimeUnavailable, match="no valid outputs"):
        play([quantizer], stage(tmp_path, lambda _files, _bundle: data))


def test_a_program_that_fails_says_why(quantizer, tmp_path):
    class Bare:
        def put_bundle(self, bundle):
            return str(bundle)

        def run_program(self, *_, **__):
            told = ("replaying unit 0", "ModuleNotFoundError: No module named 'onnxruntime'")
            return replay.ProgramEnd(status=1, result=None, told=told, elapsed_s=0.1, clock_jump_s=0.0)

    with pytest.raises(RuntimeUnavailable, match="wrote no result") as caught:
        play([quantizer], stage(tmp_path, on_device(Bare(), "ssh://pi")))
    assert caught.value.where == "ssh://pi"
    assert "No module named" in caught.value.why


def packed(report, arrays, kind=zipfile.ZIP_STORED):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", kind) as archive:
        text = np.frombuffer(json.dumps(report).encode(), np.uint8)
        for name, array in {remote_replay.REPORT: text, **arrays}.items():
            remote_replay.write(archive, name, array)
    return out.getvalue()


def told(index=0, samples=2, outputs=1):
    return {"index": index, "error": None, "kernels": {}, "outputs": outputs, "samples": samples}


ARRAYS = {f"u0_s{sample}_o0": np.zeros(1 << 16, np.uint8) for sample in range(2)}


@pytest.mark.parametrize(
    "data",
    [
        packed([told()], ARRAYS, zipfile.ZIP_DEFLATED),  # far larger than what travelled
        packed([told(samples=1)], ARRAYS),
        packed([told(outputs=0)], ARRAYS),
        packed([told(), told(index=1)], ARRAYS),
        packed([told(index=-1)], ARRAYS),
        packed([], ARRAYS),
        packed([told(samples=10**9)], ARRAYS),
        packed([None], ARRAYS),
    ],
    ids=["packed", "fewer", "none", "more", "negative", "empty", "endless", "no entry"],
)
def test_a_device_that_says_what_it_was_not_asked_is_not_believed(quantizer, tmp_path, data):
    with pytest.raises(RuntimeUnavailable, match="no valid outputs"):
        play([quantizer], stage(tmp_path, lambda _files, _bundle: data))


def test_a_device_that_says_what_it_was_asked_is_believed(quantizer, tmp_path):
    (found,) = play([quantizer], stage(tmp_path, lambda _files, _bundle: packed([told()], ARRAYS)))
    assert [len(sample) for sample in found.outputs] == [1, 1]
