"""The coupling analysis as a whole: classes against a slow search, tiny architectures, many nodes."""

from collections import Counter

import numpy as np
import prune_case as case
import pytest
from edgepress.benchmarks.coverage import chain
from edgepress.benchmarks.coverage_trial import random_cut, try_cut
from edgepress.compress.prune.coupling import couple, why_kept, work_macs
from edgepress.compress.prune.cut import cut, marked
from edgepress.compress.prune.spaces import Frozen, Spaces
from edgepress.graph.load import load_model
from edgepress.graph.passes import run_passes
from edgepress.graph.shapes import InferShapes
from hypothesis import given, settings
from hypothesis import strategies as st


@given(data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_classes_are_the_connected_elements(data):
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=7))
    spaces = Spaces()
    names = [spaces.new(size) for size in sizes]
    near = {(space, element): set() for space in names for element in range(sizes[space])}

    def connect(first, second):
        near[first].add(second)
        near[second].add(first)

    for _ in range(data.draw(st.integers(0, 6))):
        first, second = data.draw(st.sampled_from(names)), data.draw(st.sampled_from(names))
        if sizes[first] == sizes[second] and data.draw(st.booleans()):
            spaces.join(first, second)
            for element in range(sizes[first]):
                connect((first, element), (second, element))
            continue
        left = data.draw(st.lists(st.integers(0, sizes[first] - 1), max_size=4))
        right = data.draw(st.lists(st.integers(0, sizes[second] - 1), min_size=len(left), max_size=len(left)))
        spaces.link(first, np.array(left, np.int64), second, np.array(right, np.int64))
        for pair in zip(left, right, strict=True):
            connect((first, pair[0]), (second, pair[1]))
    held = data.draw(st.sampled_from(sorted(near)))
    spaces.freeze(held[0], Frozen("node", "Op", "why"), np.array([held[1]]))
    classes = spaces.solve()
    label = {(space, place): int(classes.of(space)[place]) for space, place in near}
    for start in near:
        reached, waiting = {start}, [start]
        while waiting:
            fresh = near[waiting.pop()] - reached
            reached |= fresh
            waiting += fresh
        assert {item for item in near if label[item] == label[start]} == reached
    assert set(classes.frozen) == {label[held]}
    assert sorted(set(label.values())) == list(range(classes.count))
    removed = np.zeros(classes.count, bool)
    removed[label[held]] = True
    for space in names:
        stay = [place for place in range(sizes[space]) if label[space, place] != label[held]]
        assert classes.kept(space, removed).tolist() == stay


def test_axes_of_other_sizes_do_not_join():
    spaces = Spaces()
    with pytest.raises(ValueError, match="spaces of 2 and 3 elements"):
        spaces.join(spaces.new(2), spaces.new(3))


def test_numbers_do_not_depend_on_the_order_of_independent_nodes():
    text = "(float[N,5] x) => (float[N,4] y) { %s c = Add (a, b) d = Relu (c) y = MatMul (d, v) }"
    first, second = "a = MatMul (x, w)", "b = MatMul (x, u)"
    found = [
        case.coupled(text % f"{one} {two}", w=(5, 6), u=(5, 6), v=(6, 4))
        for one, two in ((first, second), (second, first))
    ]
    names = [sorted(use.value.name for use in item.prunable[0].makers) for item in found]
    assert names == [["u", "w"], ["u", "w"]]
    assert [len(item.prunable[0].units) for item in found] == [6, 6]


def test_every_group_that_stays_says_why():
    coupling = case.coupled(
        "(float[N,5] x) => (float[N,4] y) { a = MatMul (x, w) b = LayerNormalization (a, s, t)"
        " y = MatMul (b, v) }",
        w=(5, 6), s=(6,), t=(6,), v=(6, 4),
    )  # fmt: skip
    reasons = dict(zip([(item.name, item.kind) for item in coupling.groups], why_kept(coupling), strict=True))
    assert reasons["w", "stream"].reason == "it normalises over this axis"
    assert reasons["w", "stream"].op == "LayerNormalization"
    assert reasons["v", "neurons"].op == "output"
    assert None not in reasons.values()


def test_a_random_cut_removes_what_is_asked_and_leaves_one_unit():
    coupling = case.coupled(
        "(float[N,5] x) => (float[N,4] y) { a = MatMul (x, w) b = Relu (a) y = MatMul (b, v) }",
        w=(5, 10), v=(10, 4),
    )  # fmt: skip
    macs = work_macs(coupling, {"N": 1})
    counts = [int(random_cut(coupling, macs, part, seed=0).sum()) for part in (0.2, 0.3, 0.5, 1.0)]
    assert counts == [2, 3, 5, 9]


def test_a_trial_names_what_stands_in_the_way():
    model = case.parse(
        "(float[N,5] x) => (float[N,4] y) { a = MatMul (x, w) b = Softmax (a) y = MatMul (b, v) }",
        case.weights(w=(5, 6), v=(6, 4)),
    )
    trial = try_cut(model, [{"x": case.random(0, 2, 5)}])
    assert trial.prunable == 0
    assert "0% removed" in trial.failure
    assert "Softmax: it normalises or sums along this axis" in trial.failure
    assert "equals the whole model" in trial.failure


def test_twenty_thousand_nodes_are_analysed_and_cut(tmp_path):
    path = tmp_path / "chain.onnx"
    path.write_bytes(chain(20_000).SerializeToString())
    model = load_model(path)
    run_passes(model, [InferShapes()])
    coupling = couple(model)
    kinds = Counter(item.kind for item in coupling.prunable)
    assert kinds == {"stream": 2_223, "channels": 4_447}
    units = [unit for item in coupling.prunable for unit in item.units[:1]]
    pruned = cut(coupling, marked(coupling, units))
    assert sum(1 for _ in pruned.graph) == sum(1 for _ in model.graph)
