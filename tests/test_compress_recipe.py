"""The recipe: TOML round trip, refusals with their path, drift limits, overrides and pins."""

import math

import msgspec
import pytest
from edgepress.calibration.limits import LIMIT_METRICS
from edgepress.compress.drift_limit import METRICS, parse_drift_limits
from edgepress.compress.recipe import (
    SCHEMA_VERSION,
    DriftLimit,
    Pins,
    Recipe,
    override,
    parse_recipe,
    read_recipe,
    to_toml,
    write_recipe,
)
from edgepress.graph.errors import OutputError, RecipeError
from hypothesis import given
from hypothesis import strategies as st

# Every character that can stand in a TOML string; lone surrogates cannot be encoded at all.
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
metrics = st.sampled_from(["cosine", "l2", "sqnr", "kl", "top1", "flips", "spearman"])
limits = st.builds(DriftLimit, metric=metrics, limit=st.floats(0, 1e9, allow_nan=False))
pins = st.builds(
    Pins,
    model_sha256=texts,
    data_sha256=st.none() | texts,
    precision=st.sampled_from(["int8", "fp32"]),
    quantization=st.none() | st.sampled_from(["dynamic", "static", "weight-only"]),
    calib_method=st.none() | st.sampled_from(["minmax", "entropy"]),
    fusions=st.dictionaries(names, st.booleans(), max_size=3),
    reverted=st.lists(names, max_size=3).map(tuple),
    rolled_back=st.lists(names, max_size=3).map(tuple),
    ranges_sha256=st.none() | texts,
)
recipes = st.builds(
    Recipe,
    target=names,
    target_overrides=st.dictionaries(names, texts, max_size=3),
    precision=st.sampled_from(["auto", "int8", "bf16", "bf16-compute", "fp16", "fp32"]),
    quantization=st.sampled_from(["auto", "dynamic", "static", "weight-only"]),
    calib_method=st.sampled_from(["auto", "minmax", "percentile", "entropy", "mse"]),
    max_drift=st.lists(limits, max_size=3, unique_by=lambda limit: limit.metric).map(tuple),
    keep_float=st.lists(st.sampled_from(["layer\\.0", "^embed", 'a"b', "é\\d+"]), max_size=2).map(tuple),
    shapes=st.dictionaries(names, st.lists(st.integers(1, 4096), max_size=4).map(tuple), max_size=3),
    threads=st.integers(1, 64),
    samples=st.none() | st.integers(1, 10**6),
    seed=st.integers(0, 2**32 - 1),
    skip=st.lists(st.sampled_from(["drift", "benchmark", "golden"]), max_size=3, unique=True).map(tuple),
    golden=st.sampled_from(["generated", "data"]),
    data_free=st.booleans(),
    trust_code=st.booleans(),
    fusions=st.dictionaries(names, st.booleans(), max_size=3),
    pins=st.none() | pins,
)


@given(recipes)
def test_toml_round_trip_is_exact(recipe):
    text = to_toml(recipe)
    again = parse_recipe(text)
    assert again == recipe
    assert to_toml(again) == text


def test_header_states_the_schema_version():
    assert f"schema version {SCHEMA_VERSION}" in to_toml(Recipe(target="host")).splitlines()[0]


def test_files_round_trip(tmp_path):
    recipe = Recipe(target="host", shapes={"input:0": (1, 128)}, keep_float=("encoder/layer\\.0",))
    write_recipe(recipe, tmp_path / "recipe.toml")
    assert read_recipe(tmp_path / "recipe.toml") == recipe


def test_writing_into_a_missing_folder_is_an_output_error(tmp_path):
    with pytest.raises(OutputError, match="cannot be written"):
        write_recipe(Recipe(target="host"), tmp_path / "absent" / "recipe.toml")


def test_a_minimal_file_takes_the_defaults():
    assert parse_recipe('target = "host"') == Recipe(target="host")
    assert Recipe(target="host").max_drift == (DriftLimit(limit=0.01),)


def test_the_fallback_target_serves_only_a_file_without_one():
    assert parse_recipe("seed = 3", target="host") == Recipe(target="host", seed=3)
    assert parse_recipe('target = "raspberry-pi-5"', target="host").target == "raspberry-pi-5"


@pytest.mark.parametrize(
    ("text", "what", "where_or_why", "remedy"),
    [
        ("target = ]\nseed = 1", "not valid TOML", "line 1", "mend"),
        (
            'target = "host"\nprecison = "int8"',
            "unknown key 'precison'",
            "precision",
            "did you mean precision",
        ),
        ('target = "host"\nkeep-float = []', "unknown key 'keep-float'", "keep_float", "mean keep_float"),
        ('target = "host"\nzzz = 1', "unknown key 'zzz'", "seed", "remove the key"),
        (
            'target = "host"\n[pins]\nmodel_sha256 = ""\nprecision = "int8"\nrevertd = []',
            "unknown key 'pins.revertd'",
            "model_sha256",
            "did you mean pins.reverted",
        ),
        (
            'target = "host"\n[[max_drift]]\nlimit = 0.1\n[[max_drift]]\nlimits = 0.1',
            "unknown key 'max_drift[1].limits'",
            "metric",
            "did you mean max_drift[1].limit",
        ),
        ('target = "host"\nprecision = "int9"', "not allowed", "`precision`", "mend"),
        ('target = "host"\nthreads = "two"', "not allowed", "`threads`", "mend"),
        ('target = "host"\nthreads = true', "not allowed", "`threads`", "mend"),
        ('target = "host"\nskip = ["verify"]', "not allowed", "`skip[0]`", "mend"),
        ('target = "host"\nthreads = 0', "0 is not allowed", "threads", "from 1"),
        ('target = "host"\nsamples = 0', "0 is not allowed", "samples", "from 1"),
        ('target = "host"\nseed = -1', "-1 is not allowed", "seed", "4294967295"),
        ('target = ""', "'' is not allowed", "target", "name of a target"),
        ('target = "host"\nkeep_float = ["a", "("]', "not a regular expression", "keep_float[1]", "escape"),
        ('target = "host"\n[shapes]\nx = [1, 0]', "is not allowed", "shapes.x", "from 1"),
        ('target = "host"\nmax_drift = [{limit = -0.1}]', "is not a number from 0", "max_drift", "1%"),
        ('target = "host"\nmax_drift = [{limit = inf}]', "is not a number from 0", "max_drift", "1%"),
        (
            'target = "host"\nmax_drift = [{metric = "l2", limit = 1}, {metric = "l2", limit = 2}]',
            "two drift limits for l2",
            "max_drift",
            "once",
        ),
        ("seed = 1", "names no target", "a.toml", "--target"),
        ('schema_version = 99\nnew_key = 1\ntarget = "host"', "schema version 99", "a.toml", "upgrade"),
        ('schema_version = "1"\ntarget = "host"', "'1' is not allowed", "schema_version", "whole number"),
    ],
)
def test_a_bad_recipe_says_where_and_what_to_do(text, what, where_or_why, remedy):
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, where="a.toml")
    error = caught.value
    assert what in error.what
    assert error.where is not None
    assert error.where.startswith("a.toml")
    assert where_or_why in f"{error.where} {error.why}"
    assert error.remedy is not None
    assert remedy in error.remedy


@pytest.mark.parametrize("content", [None, b"\xff\xfe target", "folder"])
def test_an_unreadable_file_is_a_recipe_error(tmp_path, content):
    path = tmp_path / "recipe.toml"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        read_recipe(path)
    assert caught.value.where == str(path)
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1%", [(None, 0.01)]),
        ("0.5 %", [(None, 0.005)]),
        ("cosine=1%,flips=0.02", [("cosine", 0.01), ("flips", 0.02)]),
        (" Cosine = 1e-3 , SQNR=30dB", [("cosine", 0.001), ("sqnr", 30.0)]),
        ("sqnr=30", [("sqnr", 30.0)]),
        ("accuracy=.5%", [("accuracy", 0.005)]),
        ("0", [(None, 0.0)]),
    ],
)
def test_drift_limits(text, expected):
    limits = parse_drift_limits(text)
    assert [limit.metric for limit in limits] == [metric for metric, _ in expected]
    assert [limit.limit for limit in limits] == pytest.approx([value for _, value in expected], rel=1e-15)


@pytest.mark.parametrize(
    "text",
    [
        *["", ",", "1%,", "abc", "cosine=", "=1%", "cosine=1%%", "-1%", "cosine=nan", "inf", "1e999", "30dB"],
        *["cosine=3dB", "sqnr=1%", "1%,2%", "l2=1%,L2=2%", "cosine==1%", "cos ine=1%", "1 2%", "l2=1%;kl=1%"],
    ],
)
def test_malformed_drift_limits_are_refused(text):
    with pytest.raises(RecipeError) as caught:
        parse_drift_limits(text)
    assert caught.value.exit_code == 2
    assert caught.value.remedy


def test_an_unknown_metric_is_refused_with_the_near_ones():
    with pytest.raises(RecipeError, match="unknown drift metric 'cosin'") as caught:
        parse_drift_limits("cosin=1%")
    assert "cosine" in caught.value.remedy
    with pytest.raises(RecipeError, match="unknown drift metric 'loss'"):
        parse_recipe('target = "host"\nmax_drift = [{metric = "loss", limit = 1}]')


def test_the_metrics_are_those_that_can_be_measured():
    assert set(METRICS) == set(LIMIT_METRICS)


@given(st.floats(0, 1e6, allow_nan=False))
def test_a_printed_limit_reads_back(value):
    assert parse_drift_limits(f"l2={value!r}") == (DriftLimit(metric="l2", limit=value),)
    assert math.isclose(parse_drift_limits(f"{value!r}%")[0].limit, value / 100)


PINNED = Recipe(target="host", pins=Pins(model_sha256="0" * 64, precision="int8", quantization="dynamic"))


@pytest.mark.parametrize(
    "given_options", [{}, {"skip": ("drift",)}, {"golden": "data"}, {"seed": 0, "target": "host"}]
)
def test_pins_stay_when_no_choice_depends_on_the_change(given_options):
    assert override(PINNED, given_options).pins == PINNED.pins


@pytest.mark.parametrize(
    "given_options",
    [{"seed": 1}, {"target": "raspberry-pi-5"}, {"max_drift": (DriftLimit(limit=0.02),)}, {"threads": 2}],
)
def test_pins_go_when_a_choice_depends_on_the_change(given_options):
    result = override(PINNED, given_options)
    assert result.pins is None
    assert all(getattr(result, name) == value for name, value in given_options.items())


def test_override_checks_its_values():
    with pytest.raises(RecipeError, match="0 is not allowed"):
        override(PINNED, {"threads": 0})
    with pytest.raises(RecipeError, match="not allowed"):
        override(PINNED, {"precision": "int9"})


def test_values_are_frozen_and_closed():
    with pytest.raises(AttributeError):
        PINNED.seed = 2
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"limit": 1.0, "unit": "%"}, DriftLimit)
