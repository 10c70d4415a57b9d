"""Blocks of two layers fitted together: gradients, what is a block, when it is kept."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from edgepress.calibration.data import open_data
from edgepress.compress.prune import blocks
from edgepress.compress.prune.blocks import _parameters, _put, _Record, block_of, fit_together
from edgepress.compress.prune.descent import Pair, Pool, columns, loss_and_gradients, loss_of, piece_of, slabs
from edgepress.compress.prune.elementwise import between, erf
from edgepress.compress.prune.observe import Asked
from edgepress.compress.prune.prune import open_pruner
from edgepress.compress.prune.readers import layer_of
from edgepress.compress.refine.patches import Window
from edgepress.graph.edit import Editor
from edgepress.graph.load import load_model
from edgepress.graph.shapes import InferShapes
from edgepress.runtimes.ort_runtime import OrtSession
from onnx import TensorProto, helper, numpy_helper


def saved(path, nodes, weights, inputs, outputs):
    graph = helper.make_graph(
        nodes,
        "case",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, inputs)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, outputs)],
        [numpy_helper.from_array(np.asarray(array, np.float32), name) for name, array in weights.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(proto)
    onnx.save(proto, path)
    model = load_model(path)
    InferShapes().run(model)
    return model


def activation_nodes(kind, source, result):
    make = helper.make_node
    if kind == "SiLU":
        return [make("Sigmoid", [source], ["g"]), make("Mul", [source, "g"], [result])]
    if kind == "Erf":
        return [
            make("Div", [source, "root"], ["d"]),
            make("Erf", ["d"], ["e"]),
            make("Add", ["e", "one"], ["p"]),
            make("Mul", [source, "p"], ["q"]),
            make("Mul", ["q", "half"], [result]),
        ]
    if kind == "Clip":
        return [make("Clip", [source, "low", "high"], [result])]
    if kind == "GeluTanh":
        return [make("Gelu", [source], [result], approximate="tanh")]
    return [make(kind, [source], [result])]


NUMBERS = {"root": math.sqrt(2), "one": 1.0, "half": 0.5, "low": 0.0, "high": 6.0}
KINDS = ["Relu", "Clip", "Gelu", "GeluTanh", "SiLU", "Erf", "LeakyRelu", "Tanh", "Sigmoid", "Neg"]


def network(path, kind="Relu", *, width=24, seed=0, extra=()):
    """x [N, 8] -> width -> activation -> 6 -> Relu -> y."""
    rng = np.random.default_rng(seed)
    weights = {
        "w1": rng.standard_normal((8, width)) / 2,
        "b1": rng.standard_normal(width) / 4,
        "w2": rng.standard_normal((width, 6)) / np.sqrt(width),
        "b2": rng.standard_normal(6) / 4,
        **NUMBERS,
    }
    nodes = [
        helper.make_node("Gemm", ["x", "w1", "b1"], ["u"], name="maker"),
        *activation_nodes(kind, "u", "h"),
        helper.make_node("Gemm", ["h", "w2", "b2"], ["z"], name="reader"),
        helper.make_node("Relu", ["z"], ["y" if not extra else "t"]),
        *extra,
    ]
    return saved(path, nodes, weights, ["N", 8], ["N", 6 if not extra else "M"])


def convolutions(path, *, kernel=3, stride=2, width=4, size=9, beside=True, seed=1):
    """x [N, 3, size, size] -> strided Conv -> Relu -> dilated Conv (+ shortcut) -> Relu -> y."""
    rng = np.random.default_rng(seed)
    weights = {
        "w1": rng.standard_normal((width, 3, kernel, kernel)) / 4,
        "b1": rng.standard_normal(width) / 4,
        "w2": rng.standard_normal((5, width, 3, 3)) / 4,
        "w0": rng.standard_normal((5, 3, 1, 1)),
    }
    pads = [1, 0, 1, 1] if kernel > 1 else [0] * 4
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["u"], name="maker", strides=[stride] * 2, pads=pads),
        helper.make_node("Relu", ["u"], ["h"]),
        helper.make_node("Conv", ["h", "w2"], ["z"], name="reader", dilations=[2, 1], pads=[2, 1, 2, 1]),
    ]
    if beside:
        cut = [] if kernel == 1 else [helper.make_node("Slice", ["a", "from", "to", "axes"], ["c"])]
        nodes += [helper.make_node("Conv", ["x", "w0"], ["a"], strides=[stride] * 2), *cut]
        nodes += [helper.make_node("Add", ["z", "c" if cut else "a"], ["s"])]
    nodes += [helper.make_node("Relu", ["s" if beside else "z"], ["y"])]
    graph = nodes
    shape = ["N", 3, size, size]
    made = helper.make_graph(
        graph,
        "case",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 5, "H", "W"])],
        [numpy_helper.from_array(np.asarray(array, np.float32), name) for name, array in weights.items()]
        + [
            numpy_helper.from_array(np.array([0, 0]), "from"),
            numpy_helper.from_array(np.array([5, 4]), "to"),
            numpy_helper.from_array(np.array([2, 3]), "axes"),
        ],
    )
    proto = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(proto, path)
    model = load_model(path)
    InferShapes().run(model)
    return model


def node_of(model, name):
    return next(node for node in model.graph if node.name == name)


def block_in(model):
    return block_of(layer_of(node_of(model, "reader")))


def samples(tmp_path, model, array):
    np.savez(tmp_path / "d.npz", x=array.astype(np.float32))
    return open_data(str(tmp_path / "d.npz"), model.inputs)


def without(model, data, left):
    """A copy of `network` in which the maker has only so many outputs left."""
    pruner = open_pruner(model, data, {"N": 1})
    return pruner.cut([left] * len(pruner.units))


def outputs(model, array):
    return OrtSession.from_model(model).run({"x": array.astype(np.float32)})["y"]


@pytest.mark.parametrize("kind", KINDS)
def test_functions_equal_the_runtime_and_their_slopes_the_differences(tmp_path, kind):
    model = saved(tmp_path / "m.onnx", activation_nodes(kind, "x", "y"), NUMBERS, ["N", 301], ["N", 301])
    node = model.graph[-1]
    values = np.linspace(-7, 8, 301, dtype=np.float32)[None] + np.float32(0.01)
    # The function is closed by a reader that stands for a layer.
    reader = ir.node("Identity", [node.outputs[0]])
    model.graph.outputs.clear()
    model.graph.append(reader)
    model.graph.outputs.append(reader.outputs[0])
    found = between(node.outputs[0], reader)
    assert found.source is model.graph.inputs[0]
    got, slope = found(values)
    reference = load_model(tmp_path / "m.onnx")
    np.testing.assert_allclose(got, outputs(reference, values), atol=3e-6)
    wide = values.astype(np.float64)
    difference = (found(wide + 1e-3)[0] - found(wide - 1e-3)[0]) / 2e-3
    np.testing.assert_allclose(slope, difference, atol=2e-3)


def test_erf():
    values = np.linspace(-5, 5, 999)
    np.testing.assert_allclose(erf(values), [math.erf(item) for item in values], atol=2e-7)


def smooth(values):
    found = np.tanh(values)
    return found, 1 - found * found


def random_case(rng, axes, rectified, with_beside):
    """Any two layers in double precision, and a pool with a part of their result."""

    def window():
        kernel = tuple(int(k) for k in rng.integers(1, 4, axes))
        dilations = tuple(int(k) for k in rng.integers(1, 3, axes))
        spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
        pads = tuple(int(rng.integers(0, span)) for span in spans * 2)
        return Window(kernel, tuple(int(k) for k in rng.integers(1, 3, axes)), dilations, pads, 1)

    def result(window, sizes):
        return tuple(
            (size + window.pads[i] + window.pads[axes + i] - (window.kernel[i] - 1) * window.dilations[i] - 1)
            // window.strides[i]
            + 1
            for i, size in enumerate(sizes)
        )

    first, second = window(), window()
    sizes = tuple(int(k) for k in rng.integers(14, 18, axes))
    hidden = result(first, sizes)
    whole = result(second, hidden)
    pair = Pair(first, second, smooth, sizes, hidden, rectified)
    shapes = [(math.prod(first.kernel) * 3, 4), (4,), (math.prod(second.kernel) * 4, 2), (2,)]
    parameters = [rng.standard_normal(shape) / 2 for shape in shapes]
    inputs = rng.standard_normal((3, *sizes, 3))
    target = rng.standard_normal((3, *whole, 2))
    beside = rng.standard_normal(target.shape) if with_beside else None
    region = tuple((0, size) for size in whole)
    return pair, parameters, Pool(inputs, beside, np.maximum(target, 0) if rectified else target, region)


def slow(pair, parameters, pool):
    """The loss position by position, from the definition of a convolution."""
    first, second = pair.first, pair.second

    def convolve(values, window, weight, bias, sizes):
        taps = weight.reshape(*window.kernel, -1, weight.shape[1])
        found = np.zeros((len(values), *sizes, weight.shape[1])) + bias
        for place in np.ndindex(*sizes):
            for tap in np.ndindex(*window.kernel):
                at = [
                    p * s - b + t * d
                    for p, s, b, t, d in zip(
                        place, window.strides, window.pads, tap, window.dilations, strict=False
                    )
                ]
                if all(0 <= a < size for a, size in zip(at, values.shape[1:-1], strict=True)):
                    found[(slice(None), *place)] += values[(slice(None), *at)] @ taps[tap]
        return found

    hidden = np.tanh(convolve(pool.inputs, first, parameters[0], parameters[1], pair.hidden))
    result = convolve(hidden, second, parameters[2], parameters[3], pool.target.shape[1:-1])
    total = result if pool.beside is None else result + pool.beside
    lacks = total - pool.target
    if pair.rectified:
        lacks = np.where((pool.target == 0) & (total < 0), 0, lacks)
    return (lacks**2).sum() / (lacks.size // lacks.shape[-1])


@pytest.mark.parametrize("axes", [0, 1, 2])
@pytest.mark.parametrize("rectified", [False, True])
def test_loss_and_gradients_against_slow_sums_and_differences(axes, rectified):
    for seed in range(3):
        rng = np.random.default_rng(seed)
        pair, parameters, pool = random_case(rng, axes, rectified, bool(seed % 2))
        piece = piece_of(pair, pool, slice(None), pool.region)
        loss, gradients = loss_and_gradients(pair, parameters, piece)
        assert loss == pytest.approx(slow(pair, parameters, pool), rel=1e-9)
        assert loss_of(pair, parameters, [pool]) == pytest.approx(loss, rel=1e-6)
        for place, gradient in enumerate(gradients):
            way = rng.standard_normal(gradient.shape)
            ends = []
            for sign in (1, -1):
                moved = [item.copy() for item in parameters]
                moved[place] += sign * 1e-6 * way
                ends.append(slow(pair, moved, pool))
            slope = (ends[0] - ends[1]) / 2e-6
            assert float((gradient * way).sum()) == pytest.approx(slope, rel=2e-4, abs=1e-5)


def test_a_window_gives_what_the_whole_result_has_there():
    for seed in range(6):
        rng = np.random.default_rng(seed)
        pair, parameters, pool = random_case(rng, 2, False, True)
        lows = [int(rng.integers(0, size - 2)) for size in pool.target.shape[1:-1]]
        region = tuple((low, low + 2) for low in lows)
        part = tuple(slice(low, low + 2) for low in lows)
        beside = pool.beside.copy()
        piece = piece_of(pair, pool, np.array([2, 0]), region)
        got, _ = loss_and_gradients(pair, parameters, piece)
        # Only the window counts where all else is made right.
        hidden = np.tanh(
            columns(pool.inputs, pair.first, slabs([(0, n) for n in pair.hidden], pair.first, pair.inputs))
            @ parameters[0]
            + parameters[1]
        )
        whole = columns(hidden, pair.second, slabs(pool.region, pair.second, pair.hidden)) @ parameters[2]
        lacks = (whole + parameters[3] + beside - pool.target)[np.array([2, 0])][(slice(None), *part)]
        assert got == pytest.approx(float((lacks**2).sum() / (lacks.size // 2)), rel=1e-9)


def test_weights_put_back_give_the_same_layers(tmp_path):
    for model in (network(tmp_path / "a.onnx"), convolutions(tmp_path / "b.onnx")):
        for name in ("maker", "reader"):
            layer = layer_of(node_of(model, name))
            before = layer.rows()
            weight, bias = _parameters(layer)
            _put(layer, weight, bias, Editor(model))
            np.testing.assert_allclose(layer_of(node_of(model, name)).rows(), before, rtol=1e-6)


@pytest.mark.parametrize(("kernel", "beside"), [(3, True), (1, False), (3, False)])
@pytest.mark.parametrize("limit_bytes", [1 << 28, 300_000])
def test_the_recorded_loss_is_that_of_the_model(tmp_path, kernel, beside, limit_bytes):
    """With the model's own weights on its own targets nothing is lacking, wherever the windows are."""
    size = 9 if beside else 60
    model = convolutions(tmp_path / "m.onnx", kernel=kernel, beside=beside, size=size)
    block = block_in(model)
    data = samples(tmp_path, model, np.random.default_rng(5).standard_normal((80, 3, size, size)))
    record = _Record(block, len(data), limit_bytes)
    asked = Asked(block.reader, str(block.reader.total.name))
    assert record.read(model, model, asked, data, 1)
    start = [*_parameters(block.maker), *_parameters(block.reader)]
    pools = [record.pools(held_out=apart) for apart in (False, True)]
    assert (len(pools[0]) > 1) == (size == 60 and limit_bytes < 1 << 28)
    assert sum(len(pool.inputs) for pool in pools[0]) >= 3 * sum(len(pool.inputs) for pool in pools[1]) > 0
    held = sum(item.nbytes for part in pools for pool in part for item in pool[:3] if item is not None)
    assert held <= limit_bytes
    for part in pools:
        assert loss_of(record.pair, start, part) < 1e-9
    start[3] = start[3] + 1
    assert loss_of(record.pair, start, pools[1]) > 0.1


def test_rows_are_recorded_within_the_limit(tmp_path):
    model = network(tmp_path / "m.onnx")
    block = block_in(model)
    data = samples(tmp_path, model, np.random.default_rng(5).standard_normal((400, 8)))
    record = _Record(block, len(data), 8_000)
    assert record.read(model, model, Asked(block.reader, "z"), data, 1)
    pools = record.pools(held_out=False) + record.pools(held_out=True)
    assert 4_000 < sum(item.nbytes for pool in pools for item in pool[:3] if item is not None) <= 8_000


def closed_form(model, cut, data):
    """The cut model with its reader fitted by least squares."""
    from edgepress.compress.prune.repair import repair

    repair(model, cut, {"reader": None}, data)
    return cut


def test_a_fit_together_repairs_what_the_reader_alone_cannot(tmp_path):
    model = network(tmp_path / "m.onnx")
    inputs = np.random.default_rng(7).standard_normal((600, 8))
    data = samples(tmp_path, model, inputs)
    cut = closed_form(model, without(model, data, 8), data)
    fresh = np.random.default_rng(8).standard_normal((400, 8))
    reference = outputs(model, fresh)
    before = np.square(outputs(cut, fresh) - reference).mean()
    block = block_in(cut)
    assert fit_together(model, cut, block, Asked(block.reader, "z"), data, editor=Editor(cut))
    after = np.square(outputs(cut, fresh) - reference).mean()
    assert after < 0.6 * before


def test_a_convolutional_block_is_fitted_too_and_twice_alike(tmp_path):
    model = convolutions(tmp_path / "m.onnx", width=8, beside=False)
    data = samples(tmp_path, model, np.random.default_rng(3).standard_normal((120, 3, 9, 9)))
    pruner = open_pruner(model, data, {"N": 1})
    widths = [max(count // 2, 1) for count in pruner.units]
    plain, report = pruner.repaired(widths, data)
    assert not any(item.together for item in report.repaired)
    made = [pruner.repaired(widths, data, thorough=True) for _ in range(2)]
    assert made[0][0].fingerprint() == made[1][0].fingerprint()
    assert made[0][0].fingerprint() != plain.fingerprint()
    assert [item.together for item in made[0][1].repaired] == [True]
    fresh = np.random.default_rng(9).standard_normal((60, 3, 9, 9))
    reference = outputs(model, fresh)
    errors = [np.square(outputs(item, fresh) - reference).mean() for item in (plain, made[0][0])]
    assert errors[1] < 0.9 * errors[0]


def test_a_fit_that_is_no_better_on_held_out_samples_is_dropped(tmp_path, monkeypatch):
    model = network(tmp_path / "m.onnx")
    data = samples(tmp_path, model, np.random.default_rng(7).standard_normal((100, 8)))
    cut = closed_form(model, without(model, data, 8), data)
    before, block = cut.fingerprint(), block_in(cut)
    asked = Asked(block.reader, "z")
    seen = []

    def worse(pair, start, pools, **_options):
        seen.append(loss_of(pair, start, pools))
        return [start[0], start[1], start[2], start[3] + 5]

    monkeypatch.setattr(blocks, "descend", worse)
    assert not fit_together(model, cut, block, asked, data, editor=Editor(cut))
    assert seen[0] > 0
    assert cut.fingerprint() == before
    # Neither is a fit kept that changes nothing.
    monkeypatch.setattr(blocks, "descend", lambda _pair, start, _pools, **_options: start)
    assert not fit_together(model, cut, block, asked, data, editor=Editor(cut))


def test_without_enough_samples_nothing_can_be_held_out(tmp_path):
    model = network(tmp_path / "m.onnx")
    data = samples(tmp_path, model, np.random.default_rng(7).standard_normal((4, 8)))
    cut = without(model, data, 8)
    block = block_in(cut)
    assert not fit_together(model, cut, block, Asked(block.reader, "z"), data, editor=Editor(cut))


def read_twice(path):
    extra = [helper.make_node("Concat", ["t", "h"], ["y"], axis=1)]
    return network(path, extra=extra)


def maker_read_twice(path):
    extra = [helper.make_node("Concat", ["t", "u"], ["y"], axis=1)]
    return network(path, extra=extra)


def two_makers(path):
    rng = np.random.default_rng(0)
    weights = {"w1": rng.random((8, 5)), "w2": rng.random((8, 5)), "w3": rng.random((5, 6))}
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["u"]),
        helper.make_node("MatMul", ["x", "w2"], ["v"]),
        helper.make_node("Mul", ["u", "v"], ["h"]),
        helper.make_node("MatMul", ["h", "w3"], ["y"], name="reader"),
    ]
    return saved(path, nodes, weights, ["N", 8], ["N", 6])


def scaled_by_channel(path):
    rng = np.random.default_rng(0)
    weights = {"w1": rng.random((8, 5)), "scale": rng.random(5), "w3": rng.random((5, 6))}
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["u"]),
        helper.make_node("Mul", ["u", "scale"], ["h"]),
        helper.make_node("MatMul", ["h", "w3"], ["y"], name="reader"),
    ]
    return saved(path, nodes, weights, ["N", 8], ["N", 6])


def grouped(path):
    rng = np.random.default_rng(0)
    weights = {"w1": rng.random((4, 1, 3, 3)), "w2": rng.random((6, 4, 1, 1))}
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["u"], group=4, pads=[1] * 4),
        helper.make_node("Conv", ["u", "w2"], ["y"], name="reader"),
    ]
    return saved(path, nodes, weights, ["N", 4, 8, 8], ["N", 6, 8, 8])


def pooled(path):
    rng = np.random.default_rng(0)
    weights = {"w1": rng.random((5, 4, 3, 3)), "w2": rng.random((6, 5, 1, 1))}
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["u"], pads=[1] * 4),
        helper.make_node("MaxPool", ["u"], ["h"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Conv", ["h", "w2"], ["y"], name="reader"),
    ]
    return saved(path, nodes, weights, ["N", 4, 8, 8], ["N", 6, 4, 4])


@pytest.mark.parametrize(
    "case", [read_twice, maker_read_twice, two_makers, scaled_by_channel, grouped, pooled]
)
def test_what_is_not_so_simple_is_no_block(tmp_path, case):
    assert block_in(case(tmp_path / "m.onnx")) is None


def test_a_product_with_a_bias_added_is_a_block(tmp_path):
    rng = np.random.default_rng(0)
    weights = {"w1": rng.random((8, 5)), "b1": rng.random(5), "w2": rng.random((5, 6))}
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["u"], name="maker"),
        helper.make_node("Add", ["b1", "u"], ["v"]),
        helper.make_node("Gelu", ["v"], ["h"]),
        helper.make_node("MatMul", ["h", "w2"], ["y"], name="reader"),
    ]
    block = block_in(saved(tmp_path / "m.onnx", nodes, weights, ["N", "T", 8], ["N", "T", 6]))
    assert block.maker.node.name == "maker"
    assert (block.maker.has_constant, block.reader.has_constant) == (True, False)


def test_blocks_without_anything_between(tmp_path):
    rng = np.random.default_rng(0)
    weights = {"w1": rng.random((8, 5)), "w2": rng.random((5, 6))}
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["u"], name="maker"),
        helper.make_node("MatMul", ["u", "w2"], ["y"], name="reader"),
    ]
    block = block_in(saved(tmp_path / "m.onnx", nodes, weights, ["N", 8], ["N", 6]))
    values = rng.random((3, 5), np.float32)
    got, slope = block.between(values)
    assert got is values
    assert (slope == 1).all()
