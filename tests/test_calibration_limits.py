"""Limits: relative and absolute ones, intervals, and metrics of the user's own."""

from __future__ import annotations

import sys

import calibration_case as case
import numpy as np
import pytest
from edgepress.calibration.data import open_data
from edgepress.calibration.drift import measure_drift
from edgepress.calibration.limits import Bound, check_limits, own_metrics
from edgepress.compress.drift_limit import DriftLimit, parse_drift_limits
from edgepress.graph.errors import RecipeError
from edgepress.graph.model import Task

CLASSES = Task(kind="classification")
MEAN = Task(kind="embedding", pooling="mean")


def labelled(tmp_path, *, count=200, right=0.5):
    """Samples whose own scores answer `right` of the labels."""
    random = np.random.default_rng(0)
    x = random.standard_normal((count, 3)).astype("f4")
    labels = x.argmax(axis=1)
    wrong = np.arange(count) >= right * count
    labels[wrong] = (labels[wrong] + 1) % 3
    np.savez(tmp_path / "v.npz", x=x, labels=labels)
    return open_data(str(tmp_path / "v.npz"), case.VECTOR)


def runner(answer=lambda x: x):
    return case.FakeRunner(case.VECTOR, lambda feeds: {"logits": answer(feeds["x"])})


def spoiling(data, every):
    """A candidate that answers every n-th of the samples otherwise."""
    order = {feeds["x"].tobytes(): place for place, feeds in enumerate(data)}

    def answer(x):
        return np.roll(x, 1, axis=1) if order[x.tobytes()] % every == 0 else x

    return runner(answer)


def test_a_task_limit_is_relative_to_the_baseline_unless_absolute(tmp_path):
    data = labelled(tmp_path, right=0.5)
    report = measure_drift(runner(), spoiling(data, 25), data, CLASSES)
    accuracy = report.task_metrics[0]
    assert accuracy.baseline == 0.5
    drop = accuracy.baseline - accuracy.candidate
    assert drop > 0
    (relative,) = check_limits(report, {"accuracy": 2 * drop})
    (absolute,) = check_limits(report, {"accuracy": Bound(limit=drop, absolute=True)})
    assert (relative.value, absolute.value) == (pytest.approx(2 * drop), pytest.approx(drop))
    low, high = accuracy.change_interval
    assert relative.interval == pytest.approx((-high / 0.5, -low / 0.5))
    assert not check_limits(report, {"accuracy": Bound(limit=0.99 * drop, absolute=True)})[0].met


def test_a_baseline_of_zero_may_lose_nothing_and_has_nothing_to_lose(tmp_path):
    data = labelled(tmp_path, right=0.0)
    report = measure_drift(runner(), runner(), data, CLASSES)
    assert report.task_metrics[0].baseline == 0
    assert check_limits(report, {"accuracy": 0.0})[0].met


def test_the_interval_is_told_but_the_value_decides(tmp_path):
    data = labelled(tmp_path)
    report = measure_drift(runner(), spoiling(data, 50), data, CLASSES)
    assert report.flips == 0.02
    low, high = report.flips_interval
    assert low < 0.02 < high
    for limit, met, straddles in [
        (0.025, True, True),
        (0.019, False, True),
        (0.5, True, False),
        (0.001, False, False),
    ]:
        (found,) = check_limits(report, {"flips": limit})
        assert (found.met, found.straddles, found.interval) == (met, straddles, (low, high))
        assert ("more samples" in found.reason) == straddles
    (top1,) = check_limits(report, {"top1": 0.025})
    assert top1.interval == pytest.approx((low, high))


@pytest.mark.parametrize("metric", ["cosine", "l2", "sqnr", "kl"])
def test_bootstrap_intervals_surround_the_value_and_repeat(tmp_path, metric):
    data = labelled(tmp_path)
    noise = runner(lambda x: x + np.float32(0.1) * np.sin(40 * x))
    first, second = (measure_drift(runner(), noise, data, CLASSES) for _ in range(2))
    assert first == second
    (found,) = check_limits(first, {metric: 1.0})
    assert found.interval[0] < found.value < found.interval[1]
    assert found.interval[1] - found.interval[0] < found.value


def test_the_interval_of_l2_covers_what_other_samples_measure(tmp_path):
    noise = runner(lambda x: x + np.float32(0.2) * np.sin(40 * x))
    data = labelled(tmp_path, count=600)
    whole = measure_drift(runner(), noise, data, CLASSES).l2
    hits = 0
    for start in range(0, 600, 30):
        part = measure_drift(runner(), noise, data.select(range(start, start + 30), "all"), CLASSES)
        hits += part.l2_interval[0] <= whole <= part.l2_interval[1]
    assert hits >= 16


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of the user's beside the caller, with metrics in it."""
    (tmp_path / "own_drift_metrics.py").write_text(
        "import numpy as np\n"
        "def hits(outputs, labels):\n"
        "    return float((outputs['logits'].argmax(axis=1) == labels).mean())\n"
        "def pairs(outputs, labels):\n"
        "    rows = outputs['hidden']\n"
        "    return float((rows[labels['first']] * rows[labels['second']]).sum() + len(labels['score']))\n"
        "def words(outputs, labels):\n"
        "    return 'many'\n"
        "def nothing(outputs, labels):\n"
        "    return float('nan')\n"
        "def failing(outputs, labels):\n"
        "    raise KeyError('logit')\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    yield "own_drift_metrics"
    sys.modules.pop("own_drift_metrics", None)


def test_a_metric_of_the_users_own_is_a_task_metric(tmp_path, module):
    data = labelled(tmp_path)
    report = measure_drift(
        runner(), spoiling(data, 25), data, CLASSES, own_metrics=own_metrics(["l2", f"{module}:hits"])
    )
    accuracy, *_, own = report.task_metrics
    assert (own.name, own.baseline, own.candidate) == (
        f"{module}:hits",
        accuracy.baseline,
        accuracy.candidate,
    )
    (limit,) = check_limits(report, {f"{module}:hits": 0.5})
    assert limit.met
    assert limit.value == pytest.approx(-own.change / own.baseline)


def test_a_metric_of_the_users_own_gets_pairs(tmp_path, module):
    (tmp_path / "s.tsv").write_text("sentence1\tsentence2\tscore\na b\tb c\t1\nc\td a\t4\nb\td\t2\n")
    data = open_data(str(tmp_path / "s.tsv"), case.TEXT, encoder=case.WordEncoder())

    def answer(feeds):
        return {"hidden": np.sin(feeds["input_ids"][..., None] * np.arange(1, 4)).astype("f4")}

    model = case.FakeRunner(case.TEXT, answer)
    report = measure_drift(model, model, data, MEAN, own_metrics=[f"{module}:pairs"])
    assert report.task_metrics[-1].change == 0
    assert np.isfinite(report.task_metrics[-1].baseline)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("words", "gives no number"),
        ("nothing", "gives nan"),
        ("failing", "KeyError"),
        ("number", "has no function 'number'"),
        ("hit", "hits"),
    ],
)
def test_a_metric_that_cannot_be_used_is_the_users_error(tmp_path, module, function, message):
    data = labelled(tmp_path)
    with pytest.raises(RecipeError) as caught:
        measure_drift(runner(), runner(), data, CLASSES, own_metrics=[f"{module}:{function}"])
    assert message in str(caught.value)


def test_a_module_that_is_not_there(tmp_path):
    with pytest.raises(RecipeError, match="imported"):
        measure_drift(runner(), runner(), labelled(tmp_path), CLASSES, own_metrics=["no_such_module_here:f"])


@pytest.mark.parametrize(
    ("text", "limits"),
    [
        ("1%", [(None, 0.01, False)]),
        ("0.01abs", [(None, 0.01, True)]),
        (
            "accuracy=0.5%, f1=0.01ABS,Flips=2%",
            [("accuracy", 0.005, False), ("f1", 0.01, True), ("flips", 0.02, False)],
        ),
        ("My.mod_1:Score=1%", [("My.mod_1:Score", 0.01, False)]),
        ("cosine=.5abs,sqnr=30dB", [("cosine", 0.5, True), ("sqnr", 30.0, False)]),
    ],
)
def test_limits_are_read(text, limits):
    assert parse_drift_limits(text) == tuple(
        DriftLimit(metric=metric, limit=limit, absolute=absolute) for metric, limit, absolute in limits
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("l2=0.1abs", "ratio"),
        ("sqnr=3abs", "ratio"),
        ("1%abs", "is not a drift limit"),
        ("abs", "is not a drift limit"),
        ("acuracy=1%", "accuracy"),
        ("module:=1%", "is not a drift limit"),
        (":f=1%", "is not a drift limit"),
        ("a:b:c=1%", "is not a drift limit"),
        ("m:f=1%,m:f=2%", "two drift limits"),
        ("sqnr=30%", "dB"),
    ],
)
def test_limits_that_mean_nothing_are_refused(text, message):
    with pytest.raises(RecipeError) as caught:
        parse_drift_limits(text)
    assert message in str(caught.value)


def test_an_absolute_limit_on_a_ratio_is_refused_wherever_it_comes_from(tmp_path):
    with pytest.raises(RecipeError, match="no absolute limit"):
        DriftLimit(metric="l2", limit=0.1, absolute=True)
    report = measure_drift(runner(), runner(), labelled(tmp_path), Task())
    with pytest.raises(RecipeError, match="no absolute limit"):
        check_limits(report, {"l2": Bound(limit=0.1, absolute=True)})
    assert check_limits(report, {"cosine": Bound(limit=0.1, absolute=True)})[0].met
