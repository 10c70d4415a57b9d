"""From documents of runs, as edgepress and the device runner write them, to rows of the history."""

import copy
import json
import shutil

import export_case
import msgspec
import pytest
from edgepress.driver.history.documents import Source, bundle_facts, read_document
from edgepress.driver.history.record import device_run, runs_at, runs_of_bundle, verify_run
from edgepress.driver.history.rows import run_id
from edgepress.export.runs import append_run
from edgepress.graph.errors import DataError
from history_case import LATENCY, device_document


def rows_of(document, **source):
    (run,) = read_document(document, Source(where="test", **source))
    return {row.role: row for row in run.measurements}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return export_case.make_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture
def bundle(original, tmp_path):
    return shutil.copytree(original, tmp_path / "bundle")


def test_every_figure_of_a_device_run_has_its_place():
    rows = rows_of(device_document(), device="pi5", url="ssh://pi")
    assert set(rows) == {"bundle", "baseline", "batch 4", "2 threads", "cores 0,1", "SingleStream"}
    row = rows["bundle"]
    assert (row.device, row.url, row.board, row.cpu) == (
        "pi5",
        "ssh://pi",
        "Raspberry Pi 5 Model B",
        "Cortex-A76",
    )
    assert (row.threads, row.shapes, row.runtime) == (4, "a:1, b:1x3", "onnxruntime 1.31.1")
    assert (row.p50_ms, row.p50_low_ms, row.p50_high_ms) == (10.0, 9.9, 10.1)
    assert (row.p99_ms, row.p99_low_ms, row.p99_high_ms, row.p99_9_ms) == (13.0, 12.1, None, None)
    assert (row.load_ms, row.cold_start_ms, row.peak_memory_bytes) == (5.0, 300.0, 50_000_000)
    assert (row.file_bytes, row.joules_per_inference) == (1234, 0.05)
    assert row.sessions_ms == {"p50": (9.9, 10.1), "load": (4.0, 6.0), "cold_start": (290.0, 300.0)}
    assert (row.outputs_ok, row.max_abs_diff, row.void) == (True, 0.01, False)
    assert (rows["baseline"].p50_ms, rows["baseline"].target, rows["baseline"].file_bytes) == (
        20.0,
        None,
        None,
    )
    assert (rows["2 threads"].threads, rows["batch 4"].shapes) == (2, None)
    assert rows["SingleStream"].p90_ms == 12.0


def test_an_emulated_board_gives_counts_and_no_time():
    counts = {"total": 5e8, "dot": 1e7, "widening": 0, "fma": 0}
    benchmark = {
        "threads": 1, "file_bytes": 99, "counted_inferences": 2,
        "instructions": {"bundle": counts, "baseline": {**counts, "total": 9e8}},
    }  # fmt: skip
    rows = rows_of(device_document(emulated=True, benchmark=benchmark, instructions=counts, scenarios=[]))
    row = rows["bundle"]
    assert (row.emulated, row.instructions, row.file_bytes) == (True, 5e8, 99)
    assert rows["baseline"].instructions == 9e8
    for each in rows.values():
        assert all(
            getattr(each, name) is None
            for name in each.__struct_fields__
            if name.endswith("_ms") and name != "sessions_ms"
        )
        assert each.sessions_ms == {}


def test_a_void_run_and_a_verification():
    rows = rows_of(device_document(void=True, void_reasons=["throttled"]))
    assert (rows["bundle"].void, rows["bundle"].void_reasons) == (True, ("throttled",))
    rows = rows_of(device_document(benchmark=None, scenarios=[]))
    assert (rows["bundle"].kind, rows["bundle"].outputs_ok, rows["bundle"].p50_ms) == ("verify", True, None)


def test_the_document_alone_decides_about_the_id():
    document = device_document()
    named, unnamed = rows_of(document, device="pi5"), rows_of(document)
    assert named["bundle"].run == unnamed["bundle"].run == run_id(document)
    assert unnamed["bundle"].device == "Raspberry Pi 5 Model B"
    assert rows_of(device_document(started="2026-02-01T00:00:00Z"))["bundle"].run != run_id(document)
    again = json.loads(json.dumps(document))
    assert run_id(dict(reversed(again.items()))) == run_id(document)
    # What a command's answer adds to a local document is no part of it.
    local = local_document()
    assert rows_of({**local, "run": ["x"], "gates": [], "comparison": []})["model"].run == run_id(local)


def local_document(**changes):
    return {
        "started": "2026-01-31T12:00:00Z", "edgepress": "0.1.0", "threads": 2,
        "inputs": ["x:1x3", "a:1"], "environment": {"cpu": "Xeon", "runtime": "onnxruntime 1.31.1"},
        "measured": [
            {"name": "m.onnx", "role": "baseline", "model": "m", "file_bytes": 10},
            {"name": "out", "role": "bundle", "model": "m", "target": "host", "bundle_digest": "d",
             "bundle_path": "/out", "file_bytes": 5, "drift_cosine": 0.001},
            {"name": "n.onnx", "role": "model", "model": "n", "file_bytes": 7},
        ],
        "benchmark": {
            "timings": [
                {**LATENCY, "name": name, "peak_memory_bytes": 7, "cold_start_ms": 3.0}
                for name in ("m.onnx", "out", "n.onnx")
            ],
            "comparisons": [], "pairs": 2, "runs_per_pair": 50, "method": "",
        },
        **changes,
    }  # fmt: skip


def test_a_local_benchmark_says_what_it_measured():
    rows = rows_of(local_document())
    assert set(rows) == {"baseline", "bundle", "model"}
    row = rows["bundle"]
    assert (row.thing, row.model, row.target, row.bundle_digest) == ("out", "m", "host", "d")
    assert (row.shapes, row.threads, row.cpu, row.url) == ("a:1, x:1x3", 2, "Xeon", "local")
    assert (row.peak_memory_bytes, row.cold_start_ms, row.drift_cosine) == (7, 3.0, 0.001)
    assert rows["model"].target is None


def test_an_old_local_benchmark_in_a_bundle_is_of_that_bundle(bundle):
    document = local_document()
    for key in ("started", "measured", "edgepress"):
        del document[key]
    document["benchmark"]["timings"] = document["benchmark"]["timings"][1:2]
    del document["benchmark"]["timings"][0]["intervals_ms"]
    append_run(bundle, "benchmark", document)
    ((run,), problems) = runs_of_bundle(bundle)
    (row,) = run.measurements
    assert problems == []
    assert (row.role, row.model, row.target) == ("bundle", "tiny", "host")
    assert row.bundle_digest == bundle_facts(bundle).digest
    assert row.p50_low_ms is None
    assert row.started > "2026"


def test_the_runs_of_a_bundle_by_kind(bundle):
    facts = bundle_facts(bundle)
    append_run(bundle, "device", device_document(facts.digest))
    timing = {**LATENCY, "peak_memory_bytes": 5}
    append_run(
        bundle,
        "benchmark",
        {"where": "the machine that compiled", "comparisons": [], "pairs": 2, "runs_per_pair": 9,
         "method": "", "timings": [{**timing, "name": "before"}, {**timing, "name": "after"}]},
    )  # fmt: skip
    append_run(bundle, "benchmark", {"odd": 1})
    append_run(bundle, "pareto", {"points": []})
    runs, problems = runs_of_bundle(bundle)
    kinds = {run.measurements[0].kind: run.measurements for run in runs}
    assert set(kinds) == {"benchmark", "compile"}
    assert [row.role for row in kinds["compile"]] == ["before", "bundle"]
    assert kinds["compile"][1].drift_cosine == 0.0
    device = kinds["benchmark"][0]
    assert (device.bundle_path, device.drift_cosine) == (str(bundle.resolve()), 0.0)
    assert len(problems) == 1
    assert "runs/benchmark-2.json" in problems[0]


def test_a_run_of_another_bundle_is_not_given_this_ones_facts(bundle):
    run = device_run(device_document("0" * 64), device="pi", url="ssh://pi", bundle=bundle)
    row = run.measurements[0]
    assert (row.bundle_digest, row.bundle_path, row.drift_cosine) == ("0" * 64, None, None)


def test_a_fleets_answer_is_one_run_a_device(bundle):
    digest = bundle_facts(bundle).digest
    answer = {
        "devices": [
            {"name": "pi5", "url": "ssh://pi5", "error": None,
             "results": [{"bundle": str(bundle), "result": device_document(digest)}]},
            {"name": "pi4", "url": "ssh://pi4", "error": None,
             "results": [{"bundle": "gone", "result": device_document(digest, started="2026-01-31")}]},
            {"name": "off", "url": "ssh://off", "error": {"what": "no"}, "results": []},
        ],
        "run": [], "gates": [],
    }  # fmt: skip
    runs = read_document(answer, Source(where="test"))
    first, second = (run.measurements[0] for run in runs)
    assert (first.device, first.bundle_path, first.drift_cosine) == ("pi5", str(bundle.resolve()), 0.0)
    assert (second.device, second.bundle_path) == ("pi4", None)


def test_a_verification_is_a_run(bundle):
    good = verify_run(bundle, {"verified": True, "golden_samples": 3, "digest": "d"}, "2026-01-31T12:00:00Z")
    bad = verify_run(bundle, {"verified": False, "error": "x"}, "2026-01-31T12:00:01Z")
    none = verify_run(bundle, {"verified": True, "golden_samples": 0}, "2026-01-31T12:00:02Z")
    assert [run.measurements[0].outputs_ok for run in (good, bad, none)] == [True, False, None]
    assert good.measurements[0].bundle_digest == "d"


WRONG = [
    [],
    "text",
    {},
    {"format": "edgepress-device-run"},
    {"format": "edgepress-history", "runs": [{"document": {}, "measurements": [{}]}]},
    {"devices": [1]},
    {"payload": {}, "sha256": ""},
    {"timings": 1, "comparisons": 1},
    {"benchmark": {"timings": []}},
]


@pytest.mark.parametrize("document", WRONG, ids=range(len(WRONG)))
def test_what_is_no_result_is_refused(document):
    with pytest.raises(DataError, match="not the result of a run"):
        read_document(document, Source(where="test"))


def paths_of(value, path=()):
    if isinstance(value, dict):
        for key, item in value.items():
            yield (*path, key)
            yield from paths_of(item, (*path, key))


@pytest.mark.parametrize("wrong", [None, [], {}, "text", -1, True, 1 << 70, float("inf")])
def test_damaged_results_are_refused_or_read_never_a_crash(wrong):
    """Every value of both forms replaced by one of another type."""
    for original in (device_document(), local_document()):
        for path in paths_of(original):
            document = copy.deepcopy(original)
            place = document
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = wrong
            try:
                runs = read_document(document, Source(where="test"))
            except DataError:
                continue
            assert all(isinstance(row.started, str) for run in runs for row in run.measurements)


def test_files_that_hold_no_result(tmp_path):
    for name, content in (("a.json", b"{"), ("b.json", b"\xff\xfe"), ("c.json", b"[" * 100_000)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match="no JSON"):
            runs_at(tmp_path / name)
    with pytest.raises(DataError, match="cannot be read"):
        runs_at(tmp_path / "missing.json")
    with pytest.raises(DataError, match="no bundle"):
        runs_at(tmp_path)


def test_a_record_of_a_bundles_runs_is_read_as_a_file(bundle):
    file = append_run(bundle, "device", msgspec.to_builtins(device_document(bundle_facts(bundle).digest)))
    (run,), _ = runs_at(file)
    assert run.measurements[0].model == "net"
