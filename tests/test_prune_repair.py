"""Ranking and repair of cut models on data, against fits made here by hand."""

from __future__ import annotations

import numpy as np
import pytest
from driver_case import cnn, images, mlp, vectors
from edgepress.calibration.data import open_data
from edgepress.compress.prune.prune import group_names, open_pruner, pinned_pruner
from edgepress.compress.prune.readers import layer_of
from edgepress.graph.edit import Editor
from edgepress.graph.errors import RecipeError
from edgepress.graph.load import load_model
from edgepress.graph.shapes import InferShapes
from edgepress.runtimes.ort_runtime import OrtSession

SIZES = {"N": 1, "T": 4}


def opened(path):
    model = load_model(path)
    InferShapes().run(model)
    return model


def data_of(model, path):
    return open_data(path, model.inputs)


def outputs(model, data):
    session = OrtSession.from_model(model)
    return np.concatenate([next(iter(session.run(feeds).values())).reshape(1, -1) for feeds in data])


@pytest.fixture
def redundant(tmp_path):
    """An MLP whose first hidden layer has each neuron twice, and data for it."""
    import onnx
    from onnx import numpy_helper

    path = mlp(tmp_path / "m.onnx", width=32)
    proto = onnx.load(path)
    for tensor in proto.graph.initializer:
        if tensor.name in ("layer0.weight", "layer0.bias"):
            array = numpy_helper.to_array(tensor).copy()
            array[..., 16:] = array[..., :16]
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(proto, path)
    model = opened(path)
    return model, data_of(model, vectors(tmp_path / "d.npz", width=32, samples=40))


def test_neurons_that_others_replace_go_without_a_loss(redundant):
    model, data = redundant
    pruner = open_pruner(model, data, SIZES)
    place = [group.name for group in pruner.groups].index("layer0.weight")
    curve = pruner.curves[place]
    assert curve.errors[16] < 1e-3
    assert curve.errors[8] > 1e-2
    gone = {pruner.groups[place].units.index(unit) % 16 for unit in curve.removed(16)}
    assert len(gone) == 16
    widths = pruner.units
    widths[place] = 16
    repaired, report = pruner.repaired(widths, data)
    cut = outputs(pruner.cut(widths), data)
    reference, mended = outputs(model, data), outputs(repaired, data)
    assert np.linalg.norm(mended - reference) < 0.02 * np.linalg.norm(cut - reference)
    assert report.output_error < 1e-3
    assert report.groups[place].left == 16
    assert report.macs_after < report.macs_before


def test_repair_lowers_the_error_of_a_convolutional_net(tmp_path):
    model = opened(cnn(tmp_path / "c.onnx"))
    data = data_of(model, images(tmp_path / "d.npz"))
    pruner = open_pruner(model, data, {"N": 1}, include=lambda _group: True)
    widths = [max(count // 2, 1) for count in pruner.units]
    repaired, report = pruner.repaired(widths, data)
    reference = outputs(model, data)
    errors = [np.linalg.norm(outputs(item, data) - reference) for item in (pruner.cut(widths), repaired)]
    assert errors[1] < 0.5 * errors[0]
    assert all(item.after <= item.before for item in report.repaired)
    assert [item.node for item in report.repaired] == ["second", "head"]


def test_two_runs_give_the_same_bytes(tmp_path):
    model = opened(mlp(tmp_path / "m.onnx"))
    data = data_of(model, vectors(tmp_path / "d.npz"))
    made = []
    for _ in range(2):
        pruner = open_pruner(model, data, SIZES, alignment=8)
        widths = pruner.widths(pruner.macs, 0.6 * pruner.macs.total([0] * len(pruner.units)))
        made.append((widths, pruner.repaired(widths, data)[0].fingerprint()))
    assert made[0] == made[1]


def test_a_layer_is_fitted_to_a_sum_less_what_is_beside_it(tmp_path):
    model = opened(cnn(tmp_path / "c.onnx"))
    layer = layer_of(next(node for node in model.graph if node.name == "second"))
    assert layer.total.name == "s"
    assert layer.beside.name == "r0"
    assert layer.rectified
    head = layer_of(next(node for node in model.graph if node.name == "head"))
    assert (head.total.name, head.beside) == ("logits", None)


def test_rows_of_a_layer_put_back_give_the_same_layer(tmp_path):
    for path in (mlp(tmp_path / "m.onnx"), cnn(tmp_path / "c.onnx")):
        model = opened(path)
        before = {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}
        editor = Editor(model)
        for node in list(model.graph):
            layer = layer_of(node)
            if layer is not None:
                layer.put(layer.rows(), editor)
                again = layer_of(node)
                np.testing.assert_allclose(again.rows(), layer.rows(), rtol=1e-6)
        after = [value.const_value.numpy() for value in model.graph.initializers.values()]
        for array in before.values():
            assert any(array.shape == other.shape and np.allclose(array, other) for other in after)


def test_a_pinned_cut_is_the_same_cut(tmp_path):
    model = opened(mlp(tmp_path / "m.onnx"))
    data = data_of(model, vectors(tmp_path / "d.npz"))
    pruner = open_pruner(model, data, SIZES)
    widths = [count // 2 for count in pruner.units]
    again, same = pinned_pruner(model, pruner.chosen(widths), SIZES, importance="obs")
    first = pruner.repaired(widths, data)[0]
    assert again.repaired(same, data)[0].fingerprint() == first.fingerprint()


def test_a_pinned_cut_of_another_model_is_refused(tmp_path):
    model = opened(mlp(tmp_path / "m.onnx"))
    with pytest.raises(RecipeError, match="do not fit this model"):
        pinned_pruner(model, {"nothing": (1,)}, SIZES, importance="obs")
    with pytest.raises(RecipeError, match="do not fit this model"):
        pinned_pruner(model, {"layer0.weight": (64,)}, SIZES, importance="obs")


@pytest.mark.parametrize("importance", ["magnitude", "activation", "batchnorm"])
def test_other_rankings_cut_and_repair_too(tmp_path, importance):
    model = opened(cnn(tmp_path / "c.onnx", batch_norm=True))
    data = data_of(model, images(tmp_path / "d.npz"))
    pruner = open_pruner(model, data, {"N": 1}, importance=importance, include=lambda _group: True)
    widths = [max(count // 2, 1) for count in pruner.units]
    repaired, _ = pruner.repaired(widths, data)
    reference = outputs(model, data)
    errors = [np.linalg.norm(outputs(item, data) - reference) for item in (pruner.cut(widths), repaired)]
    assert errors[1] < errors[0]


def test_without_data_the_weights_rank_and_stay(tmp_path):
    model = opened(mlp(tmp_path / "m.onnx"))
    pruner = open_pruner(model, None, SIZES)
    assert pruner.importance == "magnitude"
    widths = [count - 1 for count in pruner.units]
    repaired, report = pruner.repaired(widths, None)
    assert report.repaired == ()
    assert report.output_error is None
    assert repaired.fingerprint() == pruner.cut(widths).fingerprint()
    weight = model.graph.initializers["layer0.weight"].const_value.numpy()
    reader = model.graph.initializers["layer1.weight"].const_value.numpy()
    energy = (weight**2).sum(0) / (weight**2).sum() + (reader**2).sum(1) / (reader**2).sum()
    first = pruner.curves[0]
    assert first.group.units.index(first.order[0]) == int(np.argmin(energy))


def test_groups_of_one_name_are_numbered():
    class Named:
        def __init__(self, name):
            self.name = name

    assert group_names([Named("a"), Named("b"), Named("a")]) == ["a", "b", "a#2"]


def test_groups_that_cannot_be_fitted_are_measured_in_the_same_unit(tmp_path):
    import onnx

    random = np.random.default_rng(0)
    graph = onnx.parser.parse_model(
        """
        <ir_version: 10, opset_import: ["" : 20]>
        agraph (float[N, 3, 8, 8] x) => (float[N, 2, 8, 8] y) {
            a = Conv <pads = [1, 1, 1, 1]> (x, first)
            b = Relu (a)
            c = ConvTranspose <pads = [1, 1, 1, 1]> (b, second)
            d = Relu (c)
            y = Conv <pads = [1, 1, 1, 1]> (d, third)
        }
        """
    )
    shapes = {"first": (8, 3, 3, 3), "second": (8, 12, 3, 3), "third": (2, 12, 3, 3)}
    for name, shape in shapes.items():
        array = (random.standard_normal(shape) * 0.2).astype(np.float32)
        graph.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    for place, node in enumerate(graph.graph.node):
        node.name = f"n{place}"
    onnx.save(graph, tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", x=random.standard_normal((20, 3, 8, 8)).astype(np.float32))
    model = opened(tmp_path / "m.onnx")
    data = data_of(model, str(tmp_path / "d.npz"))
    pruner = open_pruner(model, data, {"N": 1})
    assert [(curve.group.name, curve.fitted) for curve in pruner.curves] == [
        ("first", False),
        ("second", True),
    ]
    assert all(curve.effects for curve in pruner.curves)
    halves = [count // 2 for count in pruner.units]
    assert pruner.repaired(halves, data)[1].unrepaired == ("n2",)
    assert pruner.repaired([8, 6], data)[1].unrepaired == ()
    reference = outputs(model, data)
    spread = float(np.square(reference - reference.mean(axis=0)).sum())
    for place, curve in enumerate(pruner.curves):
        widths = pruner.units
        widths[place] //= 2
        found = outputs(pruner.cut(widths) if place == 0 else pruner.repaired(widths, data)[0], data)
        error = float(np.square(found - reference).sum()) / spread
        assert curve.effects[widths[place]] == pytest.approx(error, rel=0.2)


def blocks_and(tmp_path, *, weak=1e-3):
    """Two residual blocks, the second of which adds next to nothing but its bias; and data."""
    import onnx

    random = np.random.default_rng(1)
    text = """
        <ir_version: 10, opset_import: ["" : 20]>
        agraph (float[N, 3, 8, 8] x) => (float[N, 4] y) {
            s = Conv <pads = [1, 1, 1, 1]> (x, stem)
            a = Conv <pads = [1, 1, 1, 1]> (s, first)
            b = Relu (a)
            c = Conv <pads = [1, 1, 1, 1]> (b, second)
            d = Add (c, s)
            e = Conv <pads = [1, 1, 1, 1]> (d, third)
            f = Relu (e)
            g = Conv <pads = [1, 1, 1, 1]> (f, fourth, bias)
            h = Add (d, g)
            i = GlobalAveragePool (h)
            j = Flatten (i)
            y = MatMul (j, head)
        }
        """
    graph = onnx.parser.parse_model(text)
    shapes = {"stem": (8, 3, 3, 3), "first": (6, 8, 3, 3), "second": (8, 6, 3, 3), "third": (6, 8, 3, 3)}
    arrays = {name: random.standard_normal(shape) * 0.2 for name, shape in shapes.items()}
    arrays |= {"fourth": random.standard_normal((8, 6, 3, 3)) * weak, "bias": random.standard_normal(8)}
    arrays["head"] = random.standard_normal((8, 4))
    for name, array in arrays.items():
        graph.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    for place, node in enumerate(graph.graph.node):
        node.name = f"n{place}"
    onnx.checker.check_model(graph)
    onnx.save(graph, tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", x=random.standard_normal((30, 3, 8, 8)).astype(np.float32))
    model = opened(tmp_path / "m.onnx")
    return model, data_of(model, str(tmp_path / "d.npz"))


def test_a_branch_that_adds_nothing_goes_as_a_whole(tmp_path):
    model, data = blocks_and(tmp_path)
    pruner = open_pruner(model, data, {"N": 1})
    assert [(curve.group.name, curve.may_go) for curve in pruner.curves] == [("first", True), ("third", True)]
    none = [0] * len(pruner.units)
    widths = pruner.widths(pruner.macs, 0.6 * pruner.macs.total(none))
    assert widths == [6, 0]
    masked, plain = outputs(pruner.masked(widths), data), outputs(pruner.cut(widths), data)
    np.testing.assert_allclose(plain, masked, atol=1e-5)
    repaired, report = pruner.repaired(widths, data)
    assert "n6" not in {node.name for node in repaired.graph}
    reference = outputs(model, data)
    assert np.abs(outputs(repaired, data) - reference).max() < 0.02 * np.abs(reference).max()
    assert [group.left for group in report.groups] == [6, 0]
    assert report.macs_after == round(pruner.macs.total([0, 6]))


def test_the_constant_of_a_branch_is_the_mean_of_what_it_added(tmp_path):
    model, data = blocks_and(tmp_path, weak=0.2)
    pruner = open_pruner(model, data, {"N": 1})
    widths = [6, 0]
    repaired, _ = pruner.repaired(widths, data)
    session = OrtSession.from_model(repaired)
    found = np.concatenate([session.run(feeds)["y"] for feeds in data])
    np.testing.assert_allclose(found.mean(axis=0), outputs(model, data).mean(axis=0), atol=1e-4)


def test_a_pinned_branch_goes_again(tmp_path):
    model, data = blocks_and(tmp_path)
    pruner = open_pruner(model, data, {"N": 1})
    again, widths = pinned_pruner(model, pruner.chosen([6, 0]), {"N": 1}, importance="obs")
    assert widths == [6, 0]
    first = pruner.repaired([6, 0], data)[0]
    assert again.repaired(widths, data)[0].fingerprint() == first.fingerprint()


def test_a_layer_without_a_residual_sum_never_loses_all_units(tmp_path):
    model = opened(mlp(tmp_path / "m.onnx"))
    data = data_of(model, vectors(tmp_path / "d.npz"))
    pruner = open_pruner(model, data, SIZES)
    assert not any(curve.may_go for curve in pruner.curves)
    with pytest.raises(RecipeError, match="do not fit"):
        pinned_pruner(model, {"layer0.weight": tuple(range(64))}, SIZES, importance="obs")
