"""Outlier channels: the noise model against rounding, migration and splitting keep the function, refusals."""

import compress_case as case
import numpy as np
import pytest
from edgepress.calibration.collect import SPREAD, TYPICAL
from edgepress.compress.lower import apply_plan
from edgepress.compress.plan import Decision, Plan
from edgepress.compress.quantize.outlier_choice import choose_outliers
from edgepress.compress.quantize.outlier_noise import (
    Channels,
    changed_weight,
    channels_of,
    choose_factors,
    split_options,
)
from edgepress.compress.quantize.outliers import MIGRATE, MigrateOutliers, migratable
from edgepress.compress.quantize.split import SPLIT, SplitOutliers, splittable
from edgepress.graph.passes import run_passes
from edgepress.graph.scheme import Scheme

COLUMNS = Scheme(dtype="int8", symmetric=True, granularity="per-channel", axis=1)
K, F = 48, 96
WEIGHTS = {
    "gamma": np.where(np.arange(K) == 5, 30.0, 1.0).astype(np.float32),
    "beta": case.random(1, K, scale=0.1),
    "wq": case.random(2, K, K, scale=0.2),
    "wu": case.random(3, K, F, scale=0.2) * np.where(np.arange(F) == 7, 12.0, 1.0).astype(np.float32),
    "bu": case.random(4, F, scale=0.1),
    "wg": case.random(5, K, F, scale=0.2),
    "wd": case.random(6, F, K, scale=0.2),
    "bd": case.random(7, K, scale=0.1),
    "half": np.float32(0.5),
    "one": np.float32(1.0),
    "root": np.float32(2**0.5),
    "quick": np.float32(1.702),
}
NORM = "n = LayerNormalization <axis = -1> (x, gamma, beta)"
UP = "[up] p = MatMul(n, wu) u = Add(p, bu)"
DOWN = "[down] d = MatMul(h, wd) e = Add(d, bd)"
FEEDS = [
    {"x": case.random(10 + rows, *shape)} for rows, shape in enumerate([(1, 1, K), (1, 9, K), (3, 4, K)])
]


def parse(body, output="float[N,S,48] y"):
    used = {
        name: array
        for name, array in WEIGHTS.items()
        if name in body.replace("(", " ").replace(",", " ").replace(")", " ").split()
    }
    return case.parse(f"(float[N,S,48] x) => ({output}) {{ {body} }}", used)


def dynamic(*nodes):
    return tuple(
        Decision(node=node, op="MatMul", group=node, form="dynamic", weight_scheme=COLUMNS, reason="test")
        for node in nodes
    )


def limits_of(model, names):
    """Typical limits and deviations, from their definition."""
    watched = model.fork()
    values = {value.name: value for node in watched.graph for value in node.outputs}
    watched.graph.outputs.extend(values[name] for name in names if not values[name].is_graph_output())
    runner = case.session(watched)
    order = [item.name for item in runner.get_outputs()]
    found = {}
    for name in names:
        samples = [
            runner.run(None, feeds)[order.index(name)].reshape(-1, values[name].shape[-1]) for feeds in FEEDS
        ]
        rows = np.concatenate(samples).astype(np.float64)
        low, high = (
            np.mean([getattr(item, end)(axis=0) for item in samples], axis=0) for end in ("min", "max")
        )
        mean, deviation = rows.mean(axis=0), rows.std(axis=0)
        found[name + TYPICAL] = low.astype(np.float32), high.astype(np.float32)
        found[name + SPREAD] = (mean - deviation).astype(np.float32), (mean + deviation).astype(np.float32)
    return found


def assert_same_function(before, after, tolerance=2e-5):
    for feeds in FEEDS:
        for wanted, found in zip(case.run(before, feeds), case.run(after, feeds), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance * np.abs(wanted).max())
    assert (after.inputs, after.outputs) == (before.inputs, before.outputs)


def migrated(model, *nodes):
    """(changed fork, record) with the factors that are chosen for these planned nodes."""
    decisions = dynamic(*nodes)
    names = migratable(model, decisions)
    factors = {
        name: choose_factors(channels_of(limits[name + TYPICAL], limits[name + SPREAD]), weights).by
        for limits in [limits_of(model, names)]
        for name, weights in ((name, weights_behind(model, name)) for name in names)
    }
    changed = model.fork()
    return changed, run_passes(changed, [MigrateOutliers(factors=factors)])[0]


def weights_behind(model, name):
    return [
        node.inputs[1].const_value.numpy()
        for node in model.graph
        if node.op_type == "MatMul" and node.inputs[0].name == name
    ]


def quantization_error(model, *nodes):
    lowered, _ = apply_plan(
        model, Plan(target="t", precision="int8", quantization="dynamic", decisions=dynamic(*nodes))
    )
    wanted = np.concatenate([case.run(model, feeds)[0].ravel() for feeds in FEEDS])
    return case.relative_l2(wanted, np.concatenate([case.run(lowered, feeds)[0].ravel() for feeds in FEEDS]))


def test_predicted_noise_is_that_of_rounding():
    rng = np.random.default_rng(0)
    values = rng.uniform(-1, 1, (4000, K)) * np.where(np.arange(K) == 3, 20.0, 1.0)
    weight = rng.standard_normal((K, 24)).astype(np.float32)
    channels = Channels(values.min(axis=0), values.max(axis=0), np.square(values).mean(axis=0))
    for by in (np.ones(K), choose_factors(channels, [weight]).by):
        step = channels.divided(by).step()
        scales = np.abs(weight * by[:, None]).max(axis=0) / 127
        rounded = np.rint(values / by / step) * step
        stored = np.rint(weight * by[:, None] / scales) * scales
        wanted = values @ weight
        noise = np.square(rounded @ stored - wanted).sum() / np.square(wanted).sum()
        found = choose_factors(channels, [weight])
        predicted = found.before if by is not found.by and (by == 1).all() else found.after
        assert predicted == pytest.approx(noise, rel=0.25)


def test_factors_even_out_the_outlier_and_leave_the_rest():
    high = np.where(np.arange(K) == 3, 40.0, 1.0)
    channels = Channels(-high, high, np.where(np.arange(K) == 3, 1.0, 0.3))
    weight = case.random(0, K, 16) * np.where(np.arange(K) == 3, 0.02, 1.0)[:, None].astype(np.float32)
    found = choose_factors(channels, [weight])
    assert np.flatnonzero(found.by > 1).tolist() == [3]
    assert found.by[3] == pytest.approx(40.0)
    assert found.after < 0.1 * found.before


def test_split_options_take_the_largest_channels():
    high = np.ones(64)
    high[[9, 2, 50, 33]] = 30.0, 20.0, 25.0, 15.0
    options = split_options(Channels(np.zeros(64), high, np.square(high) / 3), case.random(0, 64, 8))
    assert [len(option.chosen) for option in options] == [4, 8, 16]
    assert options[0].chosen.tolist() == [2, 9, 33, 50]
    assert options[0].after < 0.01 * options[0].before


def test_dead_channels_are_no_reason_to_divide():
    dead = Channels(np.zeros(K), np.zeros(K), np.zeros(K))
    assert (choose_factors(dead, [case.random(0, K, 8)]).by == 1).all()
    assert split_options(dead, case.random(0, K, 8)) == []


RESIDUAL = f"{NORM} {UP} h = Gelu(u) {DOWN} y = Add(e, n)"
MIGRATIONS = {
    "folds into a normalization": (f"{NORM} [up] y = MatMul(n, wq)", {"LayerNormalization": 1, "MatMul": 1}),
    "a residual reads it too": (
        RESIDUAL,
        {"LayerNormalization": 1, "Mul": 1, "MatMul": 2, "Add": 3, "Gelu": 1},
    ),
    "leaves the graph too": (
        f"{NORM} [up] y = MatMul(n, wq)",
        {"LayerNormalization": 1, "Mul": 1, "MatMul": 1},
    ),
    "two products with a tied weight": (
        f"{NORM} [up] a = MatMul(n, wq) [other] b = MatMul(n, wq) y = Add(a, b)",
        {"LayerNormalization": 1, "MatMul": 2, "Add": 1},
    ),
    "root mean square, spelled out": (
        "s = Mul(x, x) m = ReduceMean <axes = [-1]> (s) r = Sqrt(m) q = Div(x, r) n = Mul(gamma, q)"
        " [up] y = MatMul(n, wq)",
        {"Mul": 2, "ReduceMean": 1, "Sqrt": 1, "Div": 1, "MatMul": 1},
    ),
    "through a Relu to its weight": (
        f"{UP.replace('n,', 'x,')} h = Relu(u) [down] y = MatMul(h, wd)",
        {"MatMul": 2, "Add": 1, "Relu": 1},
    ),
    "through a gate to the other factor": (
        "[gate] g = MatMul(x, wg) s = Sigmoid(g) i = Mul(g, s) [up] u = MatMul(x, wu) h = Mul(i, u)"
        " [down] y = MatMul(h, wd)",
        {"MatMul": 3, "Sigmoid": 1, "Mul": 2},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MIGRATIONS)
def test_migration_keeps_the_function_and_evens_the_range(name):
    body, operators = MIGRATIONS[name]
    if "ReduceMean" in body:
        text = f"(float[N,S,48] x) => (float[N,S,48] y) {{ {body} }}"
        model = case.parse(text, {key: WEIGHTS[key] for key in ("gamma", "wq")}, 17)
    else:
        model = parse(body, "float[N,S,48] y, float[N,S,48] n" if "leaves" in name else "float[N,S,48] y")
    node = "down" if "[down]" in body and "Gelu" not in body else "up"
    changed, record = migrated(model, node)
    assert record.applied == {MIGRATE: 1}
    assert case.operators(changed) == operators
    assert_same_function(model, changed)
    assert quantization_error(changed, node) < 0.7 * quantization_error(model, node)
    again, _ = migrated(changed, node)
    assert_same_function(model, again)


@pytest.mark.parametrize(
    "body",
    [
        "[up] y = MatMul(x, wq)",  # nothing in front that could take the factors
        f"{NORM} t = Transpose <perm = [0, 2, 1]> (n) [up] y = MatMul(wq, t)",
        "[gate] g = MatMul(x, wg) h = Sigmoid(g) [up] y = MatMul(h, wd)",  # not homogeneous
        "[a] u = MatMul(x, wu) r = Relu(u) z = Neg(u) [up] d = MatMul(r, wd)"
        " [b] e = MatMul(z, wd) y = Add(d, e)",
    ],
)
def test_what_cannot_be_migrated(body):
    model = parse(body, "float[N,M,S] y" if "Transpose" in body else "float[N,S,48] y")
    assert migratable(model, dynamic("up")) == []


BRANCH = """(bool f, float[1,4,48] x) => (float[1,4,48] y) {
    n = LayerNormalization <axis = -1> (x, gamma, beta)
    y = If (f) <then_branch = t () => (float[1,4,48] y1) { [inner] y1 = MatMul(n, wq) },
                else_branch = e () => (float[1,4,48] y2) { y2 = Relu(n) }> }"""


def test_bodies_of_control_flow_are_left_alone_and_keep_what_they_read():
    weights = {key: WEIGHTS[key] for key in ("gamma", "beta", "wq")}
    model = case.parse(BRANCH, weights)
    assert migratable(model, dynamic("inner")) == []
    outside = case.parse(BRANCH.replace("y = If", "[up] z = MatMul(n, wq) y = If").replace(
        "(float[1,4,48] y) {", "(float[1,4,48] y, float[1,4,48] z) {"), weights)  # fmt: skip
    changed = outside.fork()
    by = np.where(np.arange(K) == 5, 30.0, 1.0)
    assert run_passes(changed, [MigrateOutliers(factors={"n": by})])[0].applied == {MIGRATE: 1}
    assert case.operators(changed)["Mul"] == 1  # the body reads n as it was
    for flag in (True, False):
        feeds = {"f": np.array(flag), "x": FEEDS[1]["x"][:, :4]}
        for wanted, found in zip(case.run(outside, feeds), case.run(changed, feeds), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_factors_of_other_channels_are_refused():
    changed = parse(RESIDUAL)
    (record,) = run_passes(changed, [MigrateOutliers(factors={"n": np.ones(K - 1)})])
    assert record.applied == {}
    assert [item.reason for item in record.refused] == ["the calibrated channels are not the weight's"]


FUNCTIONS = {
    "Gelu": "h = Gelu(u)",
    "tanh Gelu": 'h = Gelu <approximate = "tanh"> (u)',
    "SiLU": "s = Sigmoid(u) h = Mul(u, s)",
    "QuickGelu": "a = Mul(u, quick) s = Sigmoid(a) h = Mul(u, s)",
    "Gelu, spelled out": "a = Div(u, root) b = Erf(a) c = Add(b, one) s = Mul(u, c) h = Mul(s, half)",
    "Relu": "h = Relu(u)",
}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_splitting_keeps_the_function(function, bias):
    up = UP if bias else "[up] u = MatMul(n, wu)"
    model = parse(f"{NORM} {up} {FUNCTIONS[function]} [down] d = MatMul(h, wd) e = Add(d, bd) y = Add(e, n)")
    assert splittable(model, dynamic("down")) == ["h"]
    chosen = split_options(
        channels_of(*(limits_of(model, ["h"])["h" + kind] for kind in (TYPICAL, SPREAD))), WEIGHTS["wd"]
    )[0].chosen
    assert 7 in chosen
    changed = model.fork()
    (record,) = run_passes(changed, [SplitOutliers(channels={"h": chosen})])
    assert record.applied == {SPLIT: 1}
    assert_same_function(model, changed)
    nodes = case.operators(changed)
    assert nodes["MatMul"] == 4
    assert quantization_error(changed, "down") < 0.7 * quantization_error(model, "down")


def test_a_result_that_leaves_the_graph_keeps_its_name():
    model = parse(f"{UP.replace('n,', 'x,')} h = Gelu(u) [down] y = MatMul(h, wd)")
    changed = model.fork()
    run_passes(changed, [SplitOutliers(channels={"h": np.array([3, 7])})])
    assert_same_function(model, changed)


def test_tied_weights_are_split_apart():
    model = parse(
        f"{UP.replace('n,', 'x,')} h = Gelu(u) [down] d = MatMul(h, wd) v = Add(d, x)"
        " [again] q = MatMul(v, wu)"
        " r = Add(q, bu) s = Gelu(r) [last] y = MatMul(s, wd)"
    )
    changed = model.fork()
    (record,) = run_passes(changed, [SplitOutliers(channels={"h": np.array([7, 9])})])
    assert record.applied == {SPLIT: 1}
    assert_same_function(model, changed)
    assert {"wu", "wd", "bu"} <= set(changed.graph.initializers)


@pytest.mark.parametrize(
    "body",
    [
        f"{NORM} {UP} h = Gelu(u) z = Neg(h) [down] d = MatMul(h, wd) [o] e = MatMul(z, wd) y = Add(d, e)",
        f"{NORM} {UP} h = Sigmoid(u) [down] y = MatMul(h, wd)",  # not 0 at 0
        f"{NORM} {UP} h = Softmax <axis = -1> (u) [down] y = MatMul(h, wd)",
        f"{NORM} [g] v = MatMul(n, wg) s = Sigmoid(v) {UP} h = Mul(s, u) [down] y = MatMul(h, wd)",
        f"{NORM} {UP} a = Gelu(u) h = Add(a, u) t = Tanh(u) [down] d = MatMul(h, wd) [o] e = MatMul(t, wd)"
        " y = Add(d, e)",
        f"{NORM} [down] y = MatMul(n, wq)",
    ],
)
def test_what_cannot_be_split(body):
    assert splittable(parse(body), dynamic("down")) == []


def test_channels_of_another_weight_are_refused():
    changed = parse(RESIDUAL)
    (record,) = run_passes(changed, [SplitOutliers(channels={"h": np.array([F])})])
    assert record.applied == {}
    assert [item.reason for item in record.refused] == ["the calibrated channels are not the weight's"]


def test_the_choice_weighs_noise_against_time():
    model = parse(RESIDUAL)
    planned = dynamic("up", "down")
    limits = limits_of(model, ["n", "h"])
    cheap = {key: pair for key, pair in limits.items() if key.startswith("n ")}
    choice = choose_outliers(model, planned, limits)
    # The narrow products and the sum cost more time than this small model has; the Mul does not.
    assert list(choice.factors) == ["n"]
    assert choice.channels == {}
    assert [item.rule for item in choice.refused] == [SPLIT]
    assert "more time" in choice.refused[0].reason
    assert 0 < choice.noise_after < choice.noise_before
    free = parse(f"{NORM} [up] y = MatMul(n, wq)")
    found = choose_outliers(free, dynamic("up"), limits_of(free, ["n"]))
    assert list(found.factors) == ["n"]
    assert found.noise_after < 0.5 * found.noise_before
    assert choose_outliers(free, dynamic("up"), limits_of(free, ["n"]), migrate=False).factors == {}
    assert choose_outliers(model, (), cheap).noise_before == 0


def test_changed_weights_are_read_when_they_are_used():
    import onnx_ir as ir

    reads = []

    def contents():
        reads.append(1)
        return ir.tensor(WEIGHTS["wu"])

    lazy = ir.LazyTensor(contents, dtype=ir.DataType.FLOAT, shape=ir.Shape([K, F]), cache=False)
    rows, columns = np.arange(K) + 1.0, 1.0 / (np.arange(F) + 1.0)
    made = changed_weight(lazy, rows=rows, columns=columns)
    few = changed_weight(lazy, take_columns=np.array([1, 7]), take_rows=np.array([0, 2, 3]))
    assert reads == []
    assert list(few.shape) == [3, 2]
    np.testing.assert_allclose(made.numpy(), WEIGHTS["wu"] * rows[:, None] * columns, rtol=1e-5)
    np.testing.assert_array_equal(few.numpy(), WEIGHTS["wu"][[0, 2, 3]][:, [1, 7]])
