"""Which tensors share one scale: what a Concat joins, and what every output of a Split needs."""

import compress_case as case
from edgepress.compress.quantize.static import static_layout
from operators_case import FIRST, IN, LAST, SAME, WEIGHTS, C, net


def layout(body, outputs="(float[N,O,P,Q] y)"):
    model, _ = net(body, outputs)
    return static_layout(model, case.plan_of(model, quantization="static").decisions)


TWO = "[m] s = Conv SAME (r, u) [k] q = Conv(r, p)"


def test_a_concat_gives_its_scale_to_what_only_it_reads():
    joined = "[o] j = Concat <axis = 1> (s, q) [n] t = Conv(j, wide)"
    source = layout(f"{TWO} {joined}").source
    assert (source["s"], source["q"], source["r"]) == ("j", "j", "r")
    # r has other readers; behind a Relu the lowest integer must stay zero, which q does not allow.
    assert layout(f"[m] s = Conv SAME (r, u) {joined.replace('q', 'r')}").source["r"] == "r"
    assert layout(f"{TWO.replace('s =', 's0 =')} s = Relu(s0) {joined}").source["s"] == "s"
    both = f"{TWO.replace('s =', 's0 =').replace('q =', 'q0 =')} s = Relu(s0) q = Relu(q0) {joined}"
    source = layout(both).source
    assert (source["s"], source["q"]) == ("j", "j")
    # Through what only moves data, and through a Concat of a Concat.
    moved = (
        f"{TWO.replace('s =', 's0 =')} s = MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (s0) {joined}"
    )
    assert {layout(moved).source[name] for name in ("s0", "s", "q")} == {"j"}
    nested = (
        f"{FIRST} {TWO} [l] i = Concat <axis = 1> (s, q) [e] z = Conv(r, p)"
        f" [o] j = Concat <axis = 1> (i, z) [n] t = Conv(j, more) {LAST}"
    ).replace("SAME (", f"{SAME} (")
    model = case.parse(
        f"{IN} => (float[N,O,P,Q] y) {{ {nested} }}",
        {name: WEIGHTS[name] for name in "wbvup"} | {"more": case.random(1, C, 3 * C, 1, 1)},
    )
    source = static_layout(model, case.plan_of(model, quantization="static").decisions).source
    assert {source[name] for name in ("s", "q", "i", "z", "j")} == {"j"}


def test_a_hard_sigmoid_and_an_output_keep_their_own_scale():
    joined = "[o] j = Concat <axis = 1> (s, q) [n] t = Conv(j, wide)"
    source = layout(f"{TWO.replace('s =', 's0 =')} [h] s = HardSigmoid(s0) {joined}").source
    assert (source["s"], source["q"]) == ("s", "j")
    assert layout(f"{TWO} {joined}", "(float[N,O,P,Q] y, float[N,O,P,Q] s)").source["s"] == "s"


def test_every_output_of_a_split_has_its_pair():
    halves = "e, f = Split <axis = 1, num_outputs = 2> (r)"
    source = layout(f"{halves} [m] s = Conv(e, half) [n] q = Conv(f, half) [o] t = Add(s, q)").source
    assert (source["e"], source["f"]) == ("r", "r")
    body = (
        "e, f = Split <axis = 1, num_outputs = 2> (r) [m] i = Conv(e, half) l = Exp(f)"
        " k = Concat <axis = 1> (l, l) t = Add(i, k)"
    )
    source = layout(body).source
    assert (source["e"], source["f"]) == ("r", "r")
