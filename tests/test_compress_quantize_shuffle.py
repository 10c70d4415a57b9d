"""The channel shuffle: recognised by its shapes, exact as a convolution, left alone where it is none."""

import compress_case as case
import numpy as np
import pytest
from edgepress.compress.quantize.shuffle import channel_shuffle

SHUFFLE = "e = Reshape(r, apart) f = Transpose <perm = [0, 2, 1, 3, 4]> (e) t = Reshape(f, whole)"


def net(body=SHUFFLE, apart=(0, 4, 6, 8, 8), whole=(0, 24, 8, 8), channels=24, outputs=""):
    text = f"""(float[N,4,8,8] x) => (float[N,O,P,Q] y{outputs}) {{ [c1] a = Conv(x, w) r = Relu(a) {body}
        [c2] y = Conv(t, v) }}"""
    weights = {"w": case.random(1, channels, 4, 1, 1), "v": case.random(2, 6, channels, 1, 1)}
    return case.parse(text, weights | {"apart": np.array(apart), "whole": np.array(whole)})


def found(model):
    source = {value.name: "r" for node in model.graph for value in node.outputs}
    (turn,) = (node for node in model.graph if node.op_type == "Transpose")
    return channel_shuffle(turn, source)


def test_the_order_against_numpy():
    data, last, order = found(net())
    assert (data.name, last.outputs[0].name) == ("r", "t")
    channels = np.arange(24).reshape(1, 24, 1, 1) * np.ones((1, 24, 8, 8))
    wanted = channels.reshape(1, 4, 6, 8, 8).transpose(0, 2, 1, 3, 4).reshape(1, 24, 8, 8)[0, :, 0, 0]
    assert order == wanted.astype(int).tolist()


@pytest.mark.parametrize("target", [case.X86, case.ARM])
def test_it_is_exact(target, monkeypatch):
    model = net()
    feeds = [{"x": case.random(3, 2, 4, 8, 8)}]
    plan = case.plan_of(model, target, quantization="static")
    lowered = case.quantized(model, plan, feeds)
    assert case.operators(lowered)["Conv"] == 3
    assert not {"Transpose", "Reshape"} & set(case.operators(lowered))
    monkeypatch.setattr("edgepress.compress.quantize.respell.channel_shuffle", lambda *_: None)
    moved = case.quantized(model, plan, feeds)
    assert case.operators(moved)["Transpose"] == 1
    for optimise in (False, True):
        wanted, have = (case.run(item, feeds[0], optimise=optimise)[0] for item in (moved, lowered))
        np.testing.assert_allclose(have, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())


@pytest.mark.parametrize(
    "options",
    [
        {"apart": (0, 4, 6, 64, 1)},
        {"body": SHUFFLE.replace("[0, 2, 1, 3, 4]", "[0, 1, 2, 4, 3]")},
        {"body": SHUFFLE + " z = Exp(f)", "outputs": ", float[A,B,C,D,E] z"},
        {"channels": 288, "apart": (0, 4, 72, 8, 8), "whole": (0, 288, 8, 8)},
    ],
)
def test_what_is_no_shuffle(options):
    assert found(net(**options)) is None


def test_an_unknown_shape_is_no_shuffle():
    model = net()
    (last,) = (node for node in model.graph if node.outputs[0].name == "t")
    last.outputs[0].shape = None
    assert found(model) is None


def test_both_ends_need_one_scale():
    model = net()
    (turn,) = (node for node in model.graph if node.op_type == "Transpose")
    assert channel_shuffle(turn, {"r": "r", "t": "t"}) is None
    assert channel_shuffle(turn, {"r": "r"}) is None
