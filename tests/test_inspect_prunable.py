"""`edgepress inspect --prunable`: what can be cut, what cannot and why, for people and for programs."""

import json

import numpy as np
import onnx
import pytest
from cli_case import make_model, model_file
from edgepress.driver.cli import main
from edgepress.driver.prunable_tables import find_prunable
from edgepress.graph.load import load_model


@pytest.fixture
def answered(tmp_path, capsys):
    def ask(*words, model=None):
        path = model_file(tmp_path, model)
        assert main(["inspect", str(path), "--prunable", *words]) == 0
        return capsys.readouterr().out

    return ask


def test_groups_and_reasons_as_json(answered):
    found = json.loads(answered("--json"))["prunable"]
    assert found["macs"] == 64 * 64 + 64 * 16
    assert found["sizes"] == {"N": 1}
    free = [item for item in found["groups"] if item["kept"] is None]
    assert free == [
        {
            "name": "w1", "kind": "neurons", "units": 64, "width": 1, "macs_fraction": 1.0,
            "makers": ["w1"], "readers": ["w2"], "kept": None,
        }
    ]  # fmt: skip
    kept = {(item["name"], item["units"]): item["kept"] for item in found["groups"] if item["kept"]}
    assert kept["w2", 16] == {"node": "y", "op": "output", "reason": "the graph's output has this axis"}
    assert kept["w1", 64]["op"] == "MatMul"


def test_groups_and_reasons_as_tables(answered):
    text = answered()
    assert "Can be cut" in text
    assert "Cannot be cut" in text
    assert "the graph's output has this axis" in text
    assert "1 of 3 groups can be cut" in text
    assert "5,120 multiply-accumulates at N = 1" in text
    assert "add --target NAME" not in text


def test_a_normalised_stream_names_its_normalisation(answered):
    weights = {
        "w1": np.ones((64, 8), np.float32),
        "s": np.ones(8, np.float32),
        "w2": np.ones((8, 16), np.float32),
    }
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "w1"], ["h"], name="first"),
        onnx.helper.make_node("LayerNormalization", ["h", "s"], ["r"], name="norm"),
        onnx.helper.make_node("MatMul", ["r", "w2"], ["y"], name="second"),
    ]
    found = json.loads(answered("--json", model=make_model(weights=weights, nodes=nodes)))["prunable"]
    kept = {item["units"]: item["kept"] for item in found["groups"]}
    assert kept[8] == {
        "node": "norm",
        "op": "LayerNormalization",
        "reason": "it normalises over this axis",
    }


def test_the_model_is_cleaned_up_first_and_not_changed(tmp_path):
    nodes = [
        onnx.helper.make_node("Identity", ["x"], ["i"]),
        onnx.helper.make_node("MatMul", ["i", "w1"], ["h"]),
        onnx.helper.make_node("Relu", ["h"], ["r"]),
        onnx.helper.make_node("MatMul", ["r", "w2"], ["y"]),
    ]
    model = load_model(model_file(tmp_path, make_model(nodes=nodes)))
    before = model.structure_hash()
    found = find_prunable(model)
    assert model.structure_hash() == before
    assert [item.units for item in found.groups if item.kept is None] == [64]


def test_a_model_without_layers_has_no_groups(answered):
    nodes = [onnx.helper.make_node("Slice", ["x", "z", "e", "a"], ["y"])]
    arrays = {name: np.array([value], np.int64) for name, value in (("z", 0), ("e", 16), ("a", 1))}
    assert "0 of 0 groups can be cut" in answered(model=make_model(weights=arrays, nodes=nodes))
