"""Saving: the same bytes everywhere, nothing half-written, and bounded memory."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import zoo
from edgepress.graph.cleanup import exact_cleanup
from edgepress.graph.load import load_model
from edgepress.graph.passes import run_passes
from edgepress.graph.save import save_model, to_bytes
from onnx import numpy_helper


def weighted(*sizes):
    """A model of several weights: x @ w0 @ w1 …, and a small one."""
    proto = zoo.parse("g (float[N,40] x) => (float[N,40] y) <float[1] k = {2}> { y = Mul(x, k) }")
    current = "x"
    del proto.graph.node[:]
    for place, size in enumerate(sizes):
        array = np.random.default_rng(place).standard_normal((40, size)).astype(np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(array, f"w{place}"))
        proto.graph.node.append(onnx.helper.make_node("MatMul", [current, f"w{place}"], [f"v{place}"]))
        current = f"v{place}"
    proto.graph.node.append(onnx.helper.make_node("Mul", [current, "k"], ["y"]))
    return proto


@pytest.mark.parametrize("name", zoo.ZOO)
@pytest.mark.parametrize("threshold", [0, 1 << 30])
def test_load_of_save_is_the_same_model(tmp_path, name, threshold):
    model = zoo.load(zoo.ZOO[name])
    save_model(model, tmp_path / "m.onnx", external_threshold_bytes=threshold)
    again = load_model(tmp_path / "m.onnx")
    assert again.fingerprint() == model.fingerprint()
    assert (again.inputs, again.outputs, again.opset) == (model.inputs, model.outputs, model.opset)
    assert to_bytes(again) == to_bytes(model)


def test_load_of_save_with_external_data(tmp_path):
    proto = weighted(40, 40)
    model = zoo.load(proto)
    files = save_model(model, tmp_path / "m.onnx", external_threshold_bytes=1000)
    assert files == [tmp_path / "m.onnx", tmp_path / "m.onnx.data"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert files[1].stat().st_size == 2 * 40 * 40 * 4
    assert files[0].stat().st_size < 2000
    again = load_model(files[0])
    assert again.fingerprint() == model.fingerprint()
    zoo.assert_same(proto, again, reference=False)
    onnx.checker.check_model(files[0])


def test_the_model_in_memory_is_not_changed_by_saving(tmp_path):
    model = zoo.load(weighted(40, 40))
    before = model.structure_hash()
    save_model(model, tmp_path / "m.onnx", external_threshold_bytes=0)
    assert model.structure_hash() == before


def test_tied_weights_are_stored_once(tmp_path):
    model = zoo.load(weighted(40, 40))
    weights = model.graph.initializers
    weights["w1"].const_value = weights["w0"].const_value
    _, data = save_model(model, tmp_path / "m.onnx", external_threshold_bytes=0)
    assert data.stat().st_size == 40 * 40 * 4
    again = load_model(tmp_path / "m.onnx").graph.initializers
    np.testing.assert_array_equal(again["w0"].const_value.numpy(), again["w1"].const_value.numpy())


def test_lazy_and_odd_sized_weights_start_at_aligned_places(tmp_path):
    model = zoo.load(weighted(40, 40, 40))
    array = np.arange(1001, dtype=np.int8)
    for name in ("a", "b"):
        lazy = ir.LazyTensor(
            lambda: ir.tensor(np.tile(array, 2)), dtype=ir.DataType.INT8, shape=ir.Shape([2002])
        )
        value = ir.Value(name=name, type=ir.TensorType(lazy.dtype), shape=ir.Shape([2002]), const_value=lazy)
        model.graph.register_initializer(value)
    path, _ = save_model(model, tmp_path / "m.onnx", external_threshold_bytes=0)
    proto = onnx.load(path, load_external_data=False)
    offsets = [
        int(entry.value)
        for tensor in proto.graph.initializer
        for entry in tensor.external_data
        if entry.key == "offset"
    ]
    assert len(offsets) == 5
    assert all(offset % 64 == 0 for offset in offsets)
    again = load_model(path).graph.initializers
    np.testing.assert_array_equal(again["b"].const_value.numpy(), np.tile(array, 2))


@pytest.mark.parametrize("threshold", [0, 1 << 30])
def test_saving_over_the_mapped_source_is_safe(tmp_path, threshold):
    path = tmp_path / "m.onnx"
    save_model(zoo.load(weighted(40, 40)), path, external_threshold_bytes=0)
    model = load_model(path)
    before = model.fingerprint()
    first = model.graph.initializers["w0"].const_value
    held = first.numpy()
    wanted = held.copy()
    del model.graph.initializers["k"].const_value.meta["edgepress.sha256"]
    save_model(model, path, external_threshold_bytes=threshold)
    np.testing.assert_array_equal(held, wanted)
    np.testing.assert_array_equal(first.numpy(), wanted)
    assert load_model(path).fingerprint() == before


def test_a_failure_leaves_the_old_files_and_no_new_one(tmp_path):
    path = tmp_path / "m.onnx"
    save_model(zoo.load(weighted(40)), path, external_threshold_bytes=0)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    model = zoo.load(weighted(40, 40))

    def fails():
        raise OSError(28, "No space left on device")

    lazy = ir.LazyTensor(fails, dtype=ir.DataType.FLOAT, shape=ir.Shape([40, 40]))
    model.graph.initializers["w1"].const_value = lazy
    with pytest.raises(OSError, match="No space left"):
        save_model(model, path, external_threshold_bytes=0)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert model.graph.initializers["w1"].const_value is lazy


def test_files_have_the_usual_permissions(tmp_path):
    old = os.umask(0o022)
    try:
        files = save_model(zoo.load(weighted(40)), tmp_path / "m.onnx", external_threshold_bytes=0)
    finally:
        os.umask(old)
    assert {file.stat().st_mode & 0o777 for file in files} == {0o644}


def test_shapes_in_between_are_written_or_not(tmp_path):
    model = zoo.load(zoo.ZOO["captures in a branch"])
    run_passes(model, exact_cleanup())
    inner = next(graph for graph in model.graph.subgraphs())
    assert inner is not None
    with_shapes = onnx.load_from_string(to_bytes(model))
    without = onnx.load_from_string(to_bytes(model, with_shapes=False))
    assert len(with_shapes.graph.value_info) > 0
    assert len(without.graph.value_info) == 0
    save_model(model, tmp_path / "m.onnx", with_shapes=False)
    assert (tmp_path / "m.onnx").read_bytes() == to_bytes(model, with_shapes=False)


def test_the_producer_is_edgepress_whoever_made_the_model():
    proto = weighted(40)
    proto.producer_name, proto.producer_version = "pytorch", "9.9+git1234"
    saved = onnx.load_from_string(to_bytes(zoo.load(proto)))
    assert (saved.producer_name, saved.producer_version) == ("edgepress", "")


_SCRIPT = """
import sys
from pathlib import Path
from edgepress.graph.cleanup import exact_cleanup
from edgepress.graph.load import load_model
from edgepress.graph.passes import run_passes
from edgepress.graph.save import save_model
for source in sorted(Path(sys.argv[1]).glob("*.onnx")):
    for threshold in (0, 1 << 30):
        model = load_model(source)
        run_passes(model, exact_cleanup())
        out = Path(sys.argv[2], f"{source.stem}-{threshold}.onnx")
        save_model(model, out, external_threshold_bytes=threshold)
        print(source.stem, model.fingerprint())
"""


def test_the_same_bytes_in_processes_with_different_hash_seeds(tmp_path):
    sources = tmp_path / "sources"
    sources.mkdir()
    for place, text in enumerate(zoo.ZOO.values()):
        (sources / f"{place}.onnx").write_bytes(zoo.parse(text).SerializeToString())
    (sources / "weighted.onnx").write_bytes(weighted(40, 40, 40).SerializeToString())
    written, printed = [], []
    for seed in ("1", "2"):
        out = tmp_path / seed
        out.mkdir()
        done = subprocess.run(
            [sys.executable, "-c", _SCRIPT, sources, out],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        printed.append(done.stdout)
        written.append({file.name: file.read_bytes() for file in sorted(out.iterdir())})
    assert printed[0] == printed[1] != ""
    assert written[0] == written[1]
    assert any(name.endswith(".data") for name in written[0])


_MEMORY = """
import sys
from pathlib import Path
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) // 1024
from edgepress.graph.load import load_model, require_no_nan
from edgepress.graph.save import save_model
base = peak()
model = load_model(Path(sys.argv[1]))
require_no_nan(model)
save_model(model, Path(sys.argv[2]), external_threshold_bytes=0)
print(peak() - base)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads a process's peak from /proc")
@pytest.mark.slow
def test_a_gigabyte_of_weights_passes_through_little_memory(tmp_path):
    proto = zoo.parse("g (float[N,1024] x) => (float[N,1024] y) { y = Relu(x) }")
    rows = 1 << 17  # 512 MB each
    for place in range(2):
        tensor = proto.graph.initializer.add(name=f"w{place}", data_type=1, dims=[rows, 1024])
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", "w.data"), ("offset", place * rows * 4096)):
            tensor.external_data.add(key=key, value=str(value))
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    with (tmp_path / "w.data").open("wb") as file:
        file.truncate(2 * rows * 4096)  # sparse
    command = [sys.executable, "-c", _MEMORY, tmp_path / "m.onnx", tmp_path / "out.onnx"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 150
