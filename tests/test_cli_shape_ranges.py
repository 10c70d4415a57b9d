"""--shape with a range, and --preset: how they are written, what they come to, what is checked with them."""

import json

import calibration_case
import numpy as np
import pytest
from cli_case import make_model, model_file
from edgepress.calibration.data import open_data
from edgepress.compress.presets import PRESETS, preset_line
from edgepress.compress.recipe import Recipe, ShapeRange, parse_recipe, read_recipe, to_toml, write_recipe
from edgepress.driver.cli import main
from edgepress.driver.compile_options import COMPILE
from edgepress.driver.input_shapes import check_shapes, extreme_shapes, input_shapes, shape_ranges
from edgepress.driver.options import parse_arguments, parse_shape, recipe_from
from edgepress.export.verify import verify_bundle
from edgepress.graph.errors import DataError, RecipeError
from edgepress.graph.load import load_model
from onnx import TensorProto, helper


def asked(words):
    target = () if "--target" in words else ("--target", "host")
    return recipe_from(parse_arguments(["compile", "m.onnx", *target, *words.split()]))


@pytest.mark.parametrize(
    ("text", "name", "least", "usual", "most"),
    [
        ("ids:1x16:1x128:8x512", "ids", (1, 16), (1, 128), (8, 512)),
        ("image:0:1x3x8x8:2x3x8x8:4x3x8x8", "image:0", (1, 3, 8, 8), (2, 3, 8, 8), (4, 3, 8, 8)),
        ("scores:1:4:8", "scores", (1,), (4,), (8,)),
        ("x:1:1x2:1x2:1X3", "x:1", (1, 2), (1, 2), (1, 3)),
    ],
)
def test_ranges(text, name, least, usual, most):
    assert parse_shape(text) == (name, usual, ShapeRange(min=least, max=most))


@pytest.mark.parametrize("text", ["x:1x2", "x:0:1x2", "x:1:1x128", "a:3:1x2x3"])
def test_one_shape_is_no_range_whatever_the_name_looks_like(text):
    assert parse_shape(text)[2] is None
    assert parse_shape(text)[0] == text.rpartition(":")[0]


@pytest.mark.parametrize(
    "text", ["x:1x2:1x4", "x:1x4:1x2:1x8", "x:1x2:1x8:1x4", "x:2x2:1x4:4x8", "x:1:1x4:4x8", ":1x1:1x2:1x3"]
)
def test_malformed_ranges_are_refused(text):
    with pytest.raises(RecipeError, match="is not a shape") as caught:
        parse_shape(text)
    assert "MIN:OPT:MAX" in caught.value.remedy


def test_a_range_goes_into_the_recipe_and_back(tmp_path):
    recipe = asked("--shape ids:1x16:1x128:8x512 --shape other:1x3")
    assert recipe.shapes == {"ids": (1, 128), "other": (1, 3)}
    assert recipe.shape_ranges == {"ids": ShapeRange(min=(1, 16), max=(8, 512))}
    write_recipe(recipe, tmp_path / "r.toml")
    assert read_recipe(tmp_path / "r.toml") == recipe
    again = asked(f"--recipe {tmp_path / 'r.toml'} --shape ids:1x64")
    assert again.shapes["ids"] == (1, 64)
    assert again.shape_ranges == {}
    again = asked(f"--recipe {tmp_path / 'r.toml'} --shape other:1x1:1x3:1x5")
    assert set(again.shape_ranges) == {"ids", "other"}


@pytest.mark.parametrize(
    "tables",
    [
        {"shape_ranges": {"x": {"min": [1], "max": [2]}}},
        {"shapes": {"x": [1, 2]}, "shape_ranges": {"x": {"min": [1], "max": [2]}}},
        {"shapes": {"x": [3]}, "shape_ranges": {"x": {"min": [1], "max": [2]}}},
        {"shapes": {"x": [1]}, "shape_ranges": {"x": {"min": [0], "max": [2]}}},
        {"shapes": {"x": [1]}, "shape_ranges": {"x": {"min": [1], "mx": [2]}}},
        {"shapes": {"x": [1]}, "shape_ranges": {"x": {"min": [1]}}},
    ],
)
def test_a_recipes_range_is_checked(tables):
    import tomli_w

    with pytest.raises(RecipeError) as caught:
        parse_recipe('target = "host"\n' + tomli_w.dumps(tables))
    assert caught.value.remedy


def two_inputs(folder):
    """y[N,T] = relu(x[N,T] + m[N,T])."""
    nodes = [helper.make_node("Add", ["x", "m"], ["s"]), helper.make_node("Relu", ["s"], ["y"])]
    model = make_model(nodes=nodes, weights={"w": np.ones(1, np.float32)})
    del model.graph.input[:], model.graph.output[:], model.graph.initializer[:]
    for name, place in (("x", model.graph.input), ("m", model.graph.input), ("y", model.graph.output)):
        place.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", "T"]))
    return model_file(folder, model)


def test_inputs_with_the_same_axes_follow(tmp_path):
    model = load_model(two_inputs(tmp_path))
    recipe = asked("--shape x:1x2:1x4:3x8")
    wanted = ShapeRange(min=(1, 2), max=(3, 8))
    assert shape_ranges(model, recipe) == {"x": wanted, "m": wanted}
    least, usual, most = extreme_shapes(model, recipe)
    assert (least["m"], usual["m"], most["m"]) == ((1, 2), (1, 4), (3, 8))
    assert input_shapes(model, recipe) == usual
    assert extreme_shapes(model, asked("--shape x:1x4")) == []
    check_shapes(model, recipe)
    with pytest.raises(RecipeError, match="two sizes"):
        check_shapes(model, asked("--shape x:1x2:1x4:3x8 --shape m:1x2:1x4:3x9"))
    with pytest.raises(RecipeError, match="no input 'q'"):
        check_shapes(model, asked("--shape q:1x2:1x4:3x8"))


def test_golden_samples_are_of_the_ends_and_the_range_stands_in_the_manifest(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    two_inputs(tmp_path)
    rng = np.random.default_rng(0)
    data = {name: rng.standard_normal((10, 5)).astype(np.float32) for name in "xm"}
    np.savez("data.npz", **data)
    words = "compile model.onnx --target host --calib data.npz -o out --shape x:1x2:1x4:3x8 --skip benchmark"
    assert main(words.split()) == 0, capsys.readouterr().err
    found = [dict(np.load(path)) for path in sorted((tmp_path / "out" / "golden").glob("inputs_*.npz"))]
    assert [{name: array.shape for name, array in item.items()} for item in found] == [
        {"x": (1, 2), "m": (1, 2)},
        {"x": (1, 4), "m": (1, 4)},
        {"x": (3, 8), "m": (3, 8)},
    ]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["shapes"]["m"] == {"min": [1, 2], "opt": [1, 4], "max": [3, 8]}
    assert manifest["golden"]["source"] == "generated"
    assert verify_bundle(tmp_path / "out").golden_samples == 3
    assert read_recipe(tmp_path / "out" / "recipe.toml").shape_ranges["x"].max == (3, 8)

    assert main(["drift", "model.onnx", "out", "--data", "data.npz"]) == 0
    capsys.readouterr()
    assert main(["benchmark", "out", "--baseline", "model.onnx", "--rounds", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["inputs"] == ["x:1x4", "m:1x4"]
    np.savez("long.npz", **{name: rng.standard_normal((4, 9)).astype(np.float32) for name in "xm"})
    assert main(["drift", "model.onnx", "out", "--data", "long.npz"]) == 2
    assert "1x2 to 3x8" in capsys.readouterr().err


def test_the_usual_shape_is_timed_with_its_batch(tmp_path, monkeypatch, capsys):
    from edgepress.driver.measuring.local_benchmark import timing_inputs
    from edgepress.frontends.source import load_source

    monkeypatch.chdir(tmp_path)
    source = load_source(str(two_inputs(tmp_path)))
    feeds = timing_inputs(source, asked("--shape x:1x2:3x4:8x8"))
    assert {name: array.shape for name, array in feeds.items()} == {"x": (3, 4), "m": (3, 4)}
    words = "benchmark model.onnx --rounds 1 --shape x:1x2:3x4:8x8 --json"
    assert main(words.split()) == 0
    assert json.loads(capsys.readouterr().out)["inputs"] == ["x:3x4", "m:3x4"]


LIMITS = {"input_ids": ((1, 5), (4, 7)), "attention_mask": ((1, 5), (4, 7))}


def test_texts_are_padded_to_the_least_and_cut_at_the_largest_length(tmp_path):
    texts = ["a", "a b c", " ".join("abcdefghijkl")]
    (tmp_path / "t.txt").write_text("\n".join(texts))
    data = open_data(
        str(tmp_path / "t.txt"),
        calibration_case.TEXT,
        encoder=calibration_case.WordEncoder(),
        shape_ranges=LIMITS,
        shapes={"input_ids": (1, 6)},
    )
    found = sorted(
        (sample["attention_mask"].shape[1], int(sample["attention_mask"].sum())) for sample in data
    )
    assert found == [(5, 3), (5, 5), (7, 7)]
    assert "at least 5 tokens" in data.padding
    for sample in data:
        assert (sample["input_ids"][sample["attention_mask"] == 0] == 9).all()


@pytest.mark.parametrize(("length", "inside"), [(4, False), (5, True), (7, True), (8, False)])
def test_arrays_outside_the_range_are_refused(tmp_path, length, inside):
    shape = (3, length)
    np.savez(tmp_path / "d.npz", input_ids=np.ones(shape, np.int64), attention_mask=np.ones(shape, np.int64))
    given = {"shape_ranges": LIMITS}
    if inside:
        assert len(open_data(str(tmp_path / "d.npz"), calibration_case.TEXT, **given)) == 3
        return
    with pytest.raises(DataError, match="outside its range") as caught:
        open_data(str(tmp_path / "d.npz"), calibration_case.TEXT, **given)
    assert f"1x{length}" in caught.value.why
    assert "1x5 to 4x7" in caught.value.why


# --- presets -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_resolved_into_fields_that_exist(name):
    recipe = asked(f"--preset {name}")
    for field, value in PRESETS[name].items():
        assert getattr(recipe, field) == value
    others = set(Recipe.__struct_fields__) - set(PRESETS[name])
    plain = asked("")
    assert all(getattr(recipe, field) == getattr(plain, field) for field in others)
    assert parse_recipe(to_toml(recipe)) == recipe
    assert "preset" not in to_toml(recipe)


def test_the_default_preset_is_what_happens_without_one():
    assert asked("--preset default") == asked("")


def test_options_win_over_a_preset_and_a_preset_over_the_file(tmp_path):
    recipe = asked("--preset quick --rounds 7 --samples 9 --eval-samples 3 --ranking-samples 2")
    found = recipe.benchmark_rounds, recipe.samples, recipe.eval_samples, recipe.ranking_samples
    assert found == (7, 9, 3, 2)
    write_recipe(recipe, tmp_path / "r.toml")
    again = asked(f"--recipe {tmp_path / 'r.toml'} --preset extensive")
    assert (again.samples, again.ranking_samples) == (None, PRESETS["extensive"]["ranking_samples"])


def test_help_says_what_each_preset_does(capsys):
    assert main(["compile", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for name in PRESETS:
        assert preset_line(name) in text
    assert any("--preset" in line for line in COMPILE.examples)


def test_more_is_looked_at_from_preset_to_preset():
    quick, default, extensive = PRESETS.values()
    for field in ("ranking_samples", "benchmark_rounds"):
        assert quick[field] < default[field] < extensive[field]
    for field in ("samples", "eval_samples"):
        assert (quick[field], default[field], extensive[field])[1:] == (None, None)
        assert quick[field] is not None


def test_evaluation_samples_are_bounded_in_both_ways_of_giving_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model_file(tmp_path)
    rng = np.random.default_rng(0)
    for name, count in (("calib", 40), ("eval", 30)):
        np.savez(f"{name}.npz", x=rng.standard_normal((count, 64)).astype(np.float32))
    words = "compile model.onnx --target raspberry-pi-5 --calib calib.npz --skip benchmark --json"
    assert main([*words.split(), "-o", "one", "--eval-samples", "3"]) == 0
    assert json.loads(capsys.readouterr().out)["drift"]["samples"] == 3
    assert main([*words.split(), "-o", "two", "--eval", "eval.npz", "--eval-samples", "5"]) == 0
    assert json.loads(capsys.readouterr().out)["drift"]["samples"] == 5


def test_rounds_are_run_and_survive_with_the_pins(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model_file(tmp_path)
    np.savez("calib.npz", x=np.random.default_rng(0).standard_normal((20, 64)).astype(np.float32))
    words = "compile model.onnx --target raspberry-pi-5 --calib calib.npz -o out --rounds 2 --json"
    assert main(words.split()) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["benchmark"]["pairs"] == 2
    recipe = read_recipe(tmp_path / "out" / "recipe.toml")
    assert recipe.benchmark_rounds == 2
    assert asked("--recipe out/recipe.toml --target raspberry-pi-5 --rounds 3").pins == recipe.pins
    assert recipe.pins is not None
    assert asked("--recipe out/recipe.toml --target raspberry-pi-5 --ranking-samples 3").pins is None
