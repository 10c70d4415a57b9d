"""Drift reports and limits, with runners whose answers are known."""

from __future__ import annotations

import math

import calibration_case as case
import msgspec
import numpy as np
import pytest
from edgepress.calibration import drift as drift_module
from edgepress.calibration.data import open_data
from edgepress.calibration.drift import DriftReport, measure_drift
from edgepress.calibration.limits import Bound, check_limits, default_metric
from edgepress.calibration.reference import ReferenceOutputs
from edgepress.graph.errors import DataError, InternalError, NotSupported, RecipeError
from edgepress.graph.model import Task, TensorSpec

CLASSES = Task(kind="classification")
MEAN = Task(kind="embedding", pooling="mean")


@pytest.fixture
def vectors(tmp_path):
    random = np.random.default_rng(0)
    x = random.standard_normal((30, 3)).astype("f4")
    np.savez(tmp_path / "v.npz", x=x, labels=random.integers(0, 3, 30))
    return open_data(str(tmp_path / "v.npz"), case.VECTOR)


@pytest.fixture
def sentences(tmp_path):
    random = np.random.default_rng(1)
    words = [f"w{i}" for i in range(20)]
    lines = ["sentence1\tsentence2\tscore"]
    for _ in range(25):
        left, right = (" ".join(random.choice(words, random.integers(1, 7))) for _ in range(2))
        lines.append(f"{left}\t{right}\t{random.integers(0, 6)}")
    (tmp_path / "s.tsv").write_text("\n".join(lines))
    return open_data(str(tmp_path / "s.tsv"), case.TEXT, encoder=case.WordEncoder())


def vector_runner(answer):
    return case.FakeRunner(case.VECTOR, lambda feeds: {"logits": answer(feeds["x"])})


def tokens(noise=0.0):
    """Hidden states that depend on the token only; padding gets garbage that must not count."""

    def answer(feeds):
        ids = feeds["input_ids"]
        hidden = np.stack([np.sin(ids * (k + 1) * 0.37) for k in range(5)], -1).astype("f4")
        hidden += np.float32(noise) * np.cos(hidden * 50)
        hidden[feeds["attention_mask"] == 0] = 1e3 * (1 + noise)
        return {"hidden": hidden, "pooled": hidden[:, 0]}

    return case.FakeRunner(case.TEXT, answer)


def test_equal_models_have_no_drift(vectors):
    report = measure_drift(vector_runner(lambda x: x), vector_runner(lambda x: x), vectors, CLASSES)
    assert (report.cosine, report.l2, report.kl, report.flips, report.max_abs) == (0, 0, 0, 0, 0)
    assert report.sqnr_db is None
    assert report.top1 == 1
    results = check_limits(report, {"cosine": 0.0, "sqnr": 90, "flips": 0.0, "accuracy": 0.0})
    assert all(result.met for result in results)
    assert msgspec.json.decode(msgspec.json.encode(report), type=DriftReport) == report


def test_classification_figures_against_a_slow_loop(vectors):
    def changed(x):
        return x + np.float32(0.4) * np.roll(x, 1, axis=1)

    report = measure_drift(vector_runner(lambda x: x), vector_runner(changed), vectors, CLASSES)
    x = np.concatenate([sample["x"] for sample in vectors]).astype(np.float64)
    y = changed(x.astype("f4")).astype(np.float64)
    before, after = x.argmax(1), y.argmax(1)
    labels = vectors.labels
    assert report.samples == 30
    assert report.flips == pytest.approx((before != after).mean())
    assert report.top1 == pytest.approx(1 - report.flips)
    assert report.flips_interval[0] <= report.flips <= report.flips_interval[1]
    assert report.correct_to_wrong == pytest.approx(((before == labels) & (after != labels)).mean())
    assert report.wrong_to_correct == pytest.approx(((before != labels) & (after == labels)).mean())
    assert report.l2 == pytest.approx(np.linalg.norm(y - x) / np.linalg.norm(x))
    assert report.sqnr_db == pytest.approx(20 * math.log10(1 / report.l2))
    assert report.max_abs == pytest.approx(np.abs(y - x).max())
    accuracy = report.task_metrics[0]
    assert accuracy.name == "accuracy"
    assert (accuracy.baseline, accuracy.candidate) == ((before == labels).mean(), (after == labels).mean())
    assert accuracy.change_interval[0] <= accuracy.change <= accuracy.change_interval[1]
    p, q = np.exp(x), np.exp(y)
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    assert report.kl == pytest.approx((p * np.log(p / q)).sum(1).mean(), rel=1e-5)
    assert (report.data_name, report.data_digest) == ("v.npz", vectors.digest)
    assert (report.data_origin, report.data_split) == ("real", "all")


def test_embeddings_mean_over_attended_tokens_whatever_the_batch(sentences):
    single = measure_drift(tokens(), tokens(0.05), sentences, MEAN)
    batched = measure_drift(tokens(), tokens(0.05), sentences, MEAN, batch_size=7)
    for name in ("cosine", "l2", "sqnr_db", "max_abs", "top1"):
        assert getattr(single, name) == pytest.approx(getattr(batched, name), rel=1e-4)
    assert (single.batch_size, single.padding) == (1, "none (one sample at a time)")
    assert (batched.batch_size, batched.padding) == (7, "to the longest of the batch")
    assert 0 < single.cosine < 0.1
    assert single.compared == "output 'hidden', mean over attended tokens"
    assert single.flips is None
    assert single.top1_meaning.startswith("same nearest neighbour")
    left = []
    for feeds in sentences:
        left.append(tokens().run(feeds)["hidden"][0].mean(0))
    moved = [tokens(0.05).run(feeds)["hidden"][0].mean(0) for feeds in sentences]
    assert single.l2 == pytest.approx(
        np.linalg.norm(np.array(moved) - np.array(left)) / np.linalg.norm(left), rel=1e-5
    )


def test_spearman_of_scored_pairs(sentences):
    report = measure_drift(tokens(), tokens(0.3), sentences, MEAN)
    metric = report.task_metrics[0]
    rows = np.array([tokens().run(feeds)["hidden"][0].mean(0) for feeds in sentences])
    pairs = sentences.pairs
    cosine = [
        float(rows[a] @ rows[b] / np.linalg.norm(rows[a]) / np.linalg.norm(rows[b]))
        for a, b in zip(pairs.first, pairs.second, strict=True)
    ]

    def ranks(items):
        return [sum(o < v for o in items) + (sum(o == v for o in items) + 1) / 2 for v in items]

    slow = np.corrcoef(ranks(np.round(cosine, 6)), ranks(pairs.score))[0, 1]
    assert metric.name == "spearman"
    assert metric.baseline == pytest.approx(slow, abs=0.02)
    assert metric.change == pytest.approx(metric.candidate - metric.baseline)
    assert report.pairs == 25
    drop = check_limits(report, {"spearman": Bound(limit=2.0, absolute=True)})[0]
    assert drop.met
    assert drop.value == pytest.approx(-metric.change)
    assert drop.interval == pytest.approx((-metric.change_interval[1], -metric.change_interval[0]))
    relative = check_limits(report, {"spearman": 0.5})[0]
    assert relative.value == pytest.approx(-metric.change / abs(metric.baseline))


def test_candidate_that_collapses_has_no_correlation(sentences):
    flat = case.FakeRunner(case.TEXT, lambda f: {"hidden": np.ones((*f["input_ids"].shape, 5), "f4")})
    metric = measure_drift(tokens(), flat, sentences, MEAN).task_metrics[0]
    assert metric.candidate == 0.0


@pytest.mark.parametrize(
    ("task", "compared"),
    [
        (Task(kind="embedding", pooling="cls"), "output 'hidden', first token"),
        (Task(), "outputs 'hidden', 'pooled', each flattened per sample"),
        (Task(kind="classification"), "class scores of output 'pooled'"),
        (Task(kind="token-classification"), "class scores of output 'hidden', attended tokens only"),
    ],
)
def test_padding_never_counts(sentences, task, compared):
    single = measure_drift(tokens(), tokens(0.2), sentences, task)
    batched = measure_drift(tokens(), tokens(0.2), sentences, task, batch_size=5)
    assert single.compared == compared
    assert single.l2 == pytest.approx(batched.l2, rel=1e-5)
    assert single.flips == batched.flips
    assert single.l2 < 1
    if task.kind == "token-classification":
        assert single.tokens == sum(int(f["attention_mask"].sum()) for f in sentences)


def test_worst_output_gives_the_headline(vectors):
    def runner(factor):
        return case.FakeRunner(
            case.VECTOR, lambda f: {"same": f["x"], "other": f["x"] + factor * np.roll(f["x"], 1, 1)}
        )

    report = measure_drift(runner(np.float32(0)), runner(np.float32(0.5)), vectors, Task())
    by_name = {output.name: output for output in report.outputs}
    assert by_name["same"].l2 == 0 < by_name["other"].l2 == report.l2
    assert report.cosine == by_name["other"].cosine
    assert report.sqnr_db == by_name["other"].sqnr_db


def test_reference_runs_once_for_many_candidates(vectors):
    reference = vector_runner(lambda x: x)
    with ReferenceOutputs.collect(reference, vectors, CLASSES) as known:
        runs = reference.runs
        for factor in (1.0, 1.5, 2.0):
            candidate = vector_runner(lambda x, factor=factor: x * np.float32(factor))
            cached = measure_drift(reference, candidate, vectors, CLASSES, reference_cache=known)
            direct = measure_drift(vector_runner(lambda x: x), candidate, vectors, CLASSES)
            assert cached == direct
        assert reference.runs == runs == 30
        with pytest.raises(InternalError, match="other data"):
            measure_drift(reference, reference, vectors, Task(), reference_cache=known)


def test_reference_outputs_spill_to_a_file(vectors, monkeypatch):
    monkeypatch.setattr("edgepress.calibration.reference.IN_MEMORY_BYTES", 16)
    spilled = measure_drift(vector_runner(lambda x: x), vector_runner(lambda x: x * 2), vectors, CLASSES)
    monkeypatch.undo()
    assert spilled == measure_drift(
        vector_runner(lambda x: x), vector_runner(lambda x: x * 2), vectors, CLASSES
    )


def test_neighbours_use_bounded_memory(vectors, monkeypatch):
    monkeypatch.setattr(drift_module, "KEPT_BYTES", 100)
    report = measure_drift(vector_runner(lambda x: x), vector_runner(lambda x: x), vectors, Task())
    assert report.top1 == 1
    assert "among 5 samples" in report.top1_meaning


def test_probabilities_are_not_put_through_softmax(vectors):
    def soft(x, heat=1.0):
        e = np.exp(x.astype(np.float64) * heat)
        return (e / e.sum(1, keepdims=True)).astype("f4")

    report = measure_drift(vector_runner(soft), vector_runner(lambda x: soft(x, 1.3)), vectors, CLASSES)
    logits = measure_drift(
        vector_runner(lambda x: x), vector_runner(lambda x: x * np.float32(1.3)), vectors, CLASSES
    )
    assert report.kl == pytest.approx(logits.kl, rel=1e-4)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_answers_always_fail(vectors, value):
    def broken(x):
        y = x.copy()
        y[x[:, 0] > 1] = value
        return y

    report = measure_drift(vector_runner(lambda x: x), vector_runner(broken), vectors, CLASSES)
    assert report.non_finite_candidate > 0
    assert report.cosine is None
    for result in check_limits(report, {"cosine": 9.0, "sqnr": -1e9}):
        assert not result.met
        assert "NaN or infinite" in result.reason
    reverse = measure_drift(vector_runner(broken), vector_runner(lambda x: x), vectors, CLASSES)
    assert not check_limits(reverse, {"flips": 1.0})[0].met


def test_a_reference_of_zeros(vectors):
    report = measure_drift(vector_runner(lambda x: x * 0), vector_runner(lambda x: x), vectors, Task())
    assert report.l2 is None
    assert msgspec.json.decode(msgspec.json.encode(report), type=DriftReport) == report
    assert [r.met for r in check_limits(report, {"l2": 5.0, "sqnr": 0.0})] == [False, False]


def test_limits_at_and_beyond(vectors):
    report = measure_drift(
        vector_runner(lambda x: x), vector_runner(lambda x: x * np.float32(1.1)), vectors, Task()
    )
    assert report.l2 == pytest.approx(0.1, rel=1e-5)
    assert report.sqnr_db == pytest.approx(20, rel=1e-4)
    met = {
        (m, v): check_limits(report, {m: v})[0].met
        for m, v in [("l2", 0.11), ("l2", 0.09), ("sqnr", 19), ("sqnr", 21), ("cosine", 1e-6), ("top1", 0.0)]
    }
    assert list(met.values()) == [True, False, True, False, True, True]
    with pytest.raises(RecipeError, match="does not apply") as caught:
        check_limits(report, {"flips": 0.01})
    assert "cosine" in str(caught.value)
    with pytest.raises(RecipeError, match="unknown drift metric"):
        check_limits(report, {"cosin": 0.01})


def test_labels_beyond_the_classes(tmp_path):
    np.savez(tmp_path / "v.npz", x=np.eye(3, dtype="f4"), labels=[0, 1, 3])
    data = open_data(str(tmp_path / "v.npz"), case.VECTOR)
    with pytest.raises(DataError, match="label 3"):
        measure_drift(vector_runner(lambda x: x), vector_runner(lambda x: x), data, CLASSES)


def test_different_models_are_refused(vectors):
    with pytest.raises(DataError, match="differ in shape"):
        measure_drift(vector_runner(lambda x: x), vector_runner(lambda x: x[:, :2]), vectors, CLASSES)
    other = case.FakeRunner(case.VECTOR, lambda f: {"scores": f["x"]})
    with pytest.raises(DataError, match="no output 'logits'"):
        measure_drift(vector_runner(lambda x: x), other, vectors, CLASSES)
    with pytest.raises(NotSupported, match="3 axes"):
        measure_drift(vector_runner(lambda x: x), other, vectors, MEAN)


def test_fixed_batch_wins(tmp_path):
    spec = (TensorSpec(name="x", dtype="float32", shape=(4, 3)),)
    np.save(tmp_path / "x.npy", np.random.default_rng(0).random((6, 3)).astype("f4"))
    data = open_data(str(tmp_path / "x.npy"), spec)

    def answer(feeds):
        assert feeds["x"].shape == (4, 3)
        return {"y": feeds["x"]}

    report = measure_drift(case.FakeRunner(spec, answer), case.FakeRunner(spec, answer), data, CLASSES)
    assert (report.samples, report.batch_size) == (6, 4)


@pytest.mark.parametrize(
    ("task", "labels", "metric"),
    [
        (MEAN, True, "spearman"),
        (MEAN, False, "cosine"),
        (CLASSES, True, "accuracy"),
        (CLASSES, False, "flips"),
        (Task(kind="token-classification"), True, "flips"),
    ],
)
def test_default_metric(task, labels, metric):
    assert default_metric(task, labels) == metric


def outputs_of(*shapes):
    return [TensorSpec(name=f"o{i}", dtype="float32", shape=shape) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize(
    ("shapes", "metric"),
    [
        ([("N", 1)], "l2"),
        ([("N",)], "l2"),
        ([("N", 1, 1), ("N", 1)], "l2"),
        ([("N", 2)], "flips"),
        ([("N", 1), ("N", 5)], "flips"),
        ([("N", "T")], "flips"),
        ([None], "flips"),
        ([], "flips"),
    ],
)
def test_models_that_answer_one_value_are_limited_by_l2(shapes, metric):
    assert default_metric(CLASSES, False, outputs_of(*shapes)) == metric
    if metric == "l2":
        assert default_metric(MEAN, False, outputs_of(*shapes)) == "l2"


@pytest.mark.parametrize("task", [CLASSES, Task()])
def test_one_value_has_no_class_and_no_neighbour(vectors, task):
    report = measure_drift(
        vector_runner(lambda x: x[:, :1] + 2), vector_runner(lambda x: x[:, :1] + 2.5), vectors, task
    )
    x = np.concatenate([sample["x"] for sample in vectors])[:, 0] + 2
    assert report.l2 == pytest.approx(0.5 * math.sqrt(30) / np.linalg.norm(x), rel=1e-5)
    assert (report.flips, report.kl, report.top1, report.task_metrics) == (None, None, None, ())


def spans(noise):
    """Start and end scores of a span; what padding scores is garbage that must not count."""

    def answer(feeds):
        scores = np.sin(feeds["input_ids"] * 0.7).astype("f4")
        found = {}
        for name, shift in (("start_logits", 0.0), ("end_logits", 1.0)):
            found[name] = scores + np.float32(shift + noise)
            found[name][feeds["attention_mask"] == 0] = -1e4 * (1 + noise)
        return found

    return case.FakeRunner(case.TEXT, answer)


def test_padded_positions_of_a_question_answerer_do_not_count(sentences):
    single = measure_drift(spans(0), spans(0.01), sentences, Task())
    padded = measure_drift(spans(0), spans(0.01), sentences, Task(), batch_size=6)
    assert padded.max_abs == pytest.approx(0.01, rel=1e-3)
    for name in ("cosine", "l2", "max_abs"):
        assert getattr(padded, name) == pytest.approx(getattr(single, name), rel=1e-4)


def test_an_output_as_wide_as_the_text_is_long_is_kept_whole(tmp_path):
    """Only the scores of a span are known to be of tokens: an embedding may be as wide by chance."""
    mask = np.array([[1, 1, 0]], np.int64)
    np.savez(tmp_path / "d.npz", input_ids=mask, attention_mask=mask)
    data = open_data(str(tmp_path / "d.npz"), case.TEXT)

    def runner(last):
        return case.FakeRunner(case.TEXT, lambda _: {"embedding": np.array([[1.0, 2.0, last]], "f4")})

    assert measure_drift(runner(3), runner(4), data, Task()).max_abs == 1


def test_progress_counts_both_models(vectors):
    steps = []
    measure_drift(
        vector_runner(lambda x: x),
        vector_runner(lambda x: x),
        vectors,
        CLASSES,
        batch_size=8,
        progress=lambda done, total: steps.append((done, total)),
    )
    assert steps == [(8, 30), (16, 30), (24, 30), (30, 30)] * 2
