"""GeluFromParts: every spelling of GELU becomes one Gelu; look-alikes stay as they are."""

import compress_case as case
import numpy as np
import pytest
from edgepress.compress.fuse.activation import GeluFromParts
from edgepress.compress.fuse.polynomial import Expansion, close

SHAPES = ((1, 3, 8), (2, 5, 8))
NUMBERS = {
    "half": np.float32(0.5),
    "one": np.float32(1.0),
    "two": np.float32(2.0),
    "three": np.float32(3.0),
    "root2": np.float32(2**0.5),
    "inverse_root2": np.float32(0.5**0.5),
    "slope": np.float32((2 / np.pi) ** 0.5),
    "cubic": np.float32(0.044715),
}


def gelu(body, opset=20, **more):
    return case.parse(f"(float[N,S,8] x) => (float[N,S,8] y) {{ {body} }}", NUMBERS | more, opset)


def feeds(scale=3.0):
    return [{"x": case.random(seed, *shape, scale=scale)} for seed, shape in enumerate(SHAPES)]


ERF_ARGUMENTS = {
    "div": "a = Div(x, root2)",
    "mul-right": "a = Mul(x, inverse_root2)",
    "mul-left": "a = Mul(inverse_root2, x)",
}
COMBINATIONS = {
    "half-first": "h = Mul(half, x) t = Add(e, one) y = Mul(h, t)",
    "half-of-sum": "t = Add(one, e) h = Mul(t, half) y = Mul(x, h)",
    "half-last": "t = Add(e, one) p = Mul(x, t) y = Mul(p, half)",
    "half-last-left": "t = Add(e, one) p = Mul(t, x) y = Mul(half, p)",
    "divided-by-two": "t = Add(e, one) h = Div(x, two) y = Mul(h, t)",
    "product-over-two": "t = Add(e, one) p = Mul(x, t) y = Div(p, two)",
    "distributed": "h = Mul(x, half) g = Mul(x, half) p = Mul(g, e) y = Add(h, p)",
}
CUBES = {
    "pow": "c = Pow(x, three)",
    "products": "s = Mul(x, x) c = Mul(s, x)",
    "square-then": "s = Pow(x, two) c = Mul(x, s)",
}
TANH_ARGUMENTS = {
    "outside": "k = Mul(c, cubic) i = Add(x, k) a = Mul(i, slope)",
    "outside-left": "k = Mul(cubic, c) i = Add(k, x) a = Mul(slope, i)",
    "factored": "s2 = Mul(x, x) k = Mul(s2, cubic) i = Add(k, one) z = Mul(x, slope) a = Mul(z, i)",
}


@pytest.mark.parametrize("argument", ERF_ARGUMENTS)
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_every_erf_spelling(argument, combination):
    model = gelu(f"{ERF_ARGUMENTS[argument]} e = Erf(a) {COMBINATIONS[combination]}")
    changed = case.assert_rewritten(model, GeluFromParts(), feeds())
    assert case.operators(changed) == {"Gelu": 1}
    assert "approximate" not in case.node_of(changed, "Gelu").attributes or (
        case.node_of(changed, "Gelu").attributes["approximate"].as_string() == "none"
    )


@pytest.mark.parametrize("cube", CUBES)
@pytest.mark.parametrize("argument", TANH_ARGUMENTS)
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_every_tanh_spelling(cube, argument, combination):
    model = gelu(f"{CUBES[cube]} {TANH_ARGUMENTS[argument]} e = Tanh(a) {COMBINATIONS[combination]}")
    changed = case.assert_rewritten(model, GeluFromParts(), feeds())
    assert case.node_of(changed, "Gelu").attributes["approximate"].as_string() == "tanh"


ERF = "a = Div(x, root2) e = Erf(a) "


@pytest.mark.parametrize(
    "behind",
    ["y = Add(g, x)", "y = Mul(g, x)", "y = Add(g, g)", "n = Neg(g) y = Div(n, two)", "y = Mul(g, two)"],
)
def test_arithmetic_behind_a_gelu_does_not_hide_it(behind):
    """A residual or gated (GEGLU) reader continues the arithmetic: the GELU in front is still one."""
    model = gelu(f"{ERF} h = Mul(x, half) t = Add(e, one) g = Mul(h, t) {behind}")
    assert "Gelu" in case.operators(case.assert_rewritten(model, GeluFromParts(), feeds()))


def test_gelu_of_a_gelu():
    first = "a = Div(x, root2) e = Erf(a) h = Mul(x, half) t = Add(e, one) g = Mul(h, t)"
    second = "b = Div(g, root2) f = Erf(b) k = Mul(g, half) u = Add(f, one) y = Mul(k, u)"
    case.assert_rewritten(gelu(f"{first} {second}"), GeluFromParts(), feeds(), times=2)


def test_a_bias_in_front_stays_in_front():
    body = f"x1 = Add(x, bias) {ERF.replace('x,', 'x1,')} h = Mul(x1, half) t = Add(e, one) y = Mul(h, t)"
    changed = case.assert_rewritten(gelu(body, bias=case.random(1, 8)), GeluFromParts(), feeds())
    assert case.operators(changed) == {"Add": 1, "Gelu": 1}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (ERF + "t = Add(e, one) y = Mul(x, t)", "x and erf(x) are not combined as in GELU"),
        (ERF + "t = Add(e, two) h = Mul(x, half) y = Mul(h, t)", "x and erf(x) are not combined as in GELU"),
        (ERF + "t = Sub(e, one) h = Mul(x, half) y = Mul(h, t)", None),
        (
            "a = Mul(x, half) e = Erf(a) t = Add(e, one) h = Mul(x, half) y = Mul(h, t)",
            "the argument of Erf is not that of GELU",
        ),
        (
            "a = Mul(x, slope) e = Tanh(a) t = Add(e, one) h = Mul(x, half) y = Mul(h, t)",
            "the argument of Tanh is not that of GELU",
        ),
        (
            "c = Pow(x, two) k = Mul(c, cubic) i = Add(x, k) a = Mul(i, slope) e = Tanh(a) "
            "t = Add(e, one) h = Mul(x, half) y = Mul(h, t)",
            "the argument of Tanh is not that of GELU",
        ),
    ],
)
def test_look_alikes_are_refused(body, reason):
    case.assert_refused(gelu(body), GeluFromParts(), *([reason] if reason else []))


@pytest.mark.parametrize("constant", [0.7, 0.7073, 0.6])
def test_a_wrong_constant_is_refused(constant):
    body = "a = Mul(x, wrong) e = Erf(a) t = Add(e, one) h = Mul(x, half) y = Mul(h, t)"
    model = gelu(body, wrong=np.float32(constant))
    case.assert_refused(model, GeluFromParts(), "the argument of Erf is not that of GELU")


def test_factors_of_different_tensors_are_no_gelu():
    text = "(float[N,8] x, float[N,8] z) => (float[N,8] y) { a = Div(z, root2) e = Erf(a) %s }"
    model = case.parse(text % COMBINATIONS["half-first"], NUMBERS)
    case.assert_refused(model, GeluFromParts())


def test_a_second_reader_in_the_middle_is_no_gelu():
    text = f"(float[N,8] x) => (float[N,8] y, float[N,8] t) {{ {ERF} {COMBINATIONS['half-first']} }}"
    case.assert_refused(case.parse(text, NUMBERS), GeluFromParts())


def test_x_may_be_read_elsewhere_and_be_an_output():
    text = (
        f"(float[N,8] z) => (float[N,8] y, float[N,8] x) {{ x = Neg(z) {ERF} {COMBINATIONS['half-first']} }}"
    )
    model = case.parse(text, NUMBERS)
    case.assert_rewritten(model, GeluFromParts(), [{"z": case.random(0, 4, 8)}])


def test_the_curve_may_be_read_elsewhere():
    text = f"(float[N,8] x) => (float[N,8] y, float[N,8] e) {{ {ERF} {COMBINATIONS['half-first']} }}"
    changed = case.assert_rewritten(case.parse(text, NUMBERS), GeluFromParts(), [{"x": case.random(0, 4, 8)}])
    assert case.operators(changed) == {"Div": 1, "Erf": 1, "Gelu": 1}


@pytest.mark.parametrize("opset", [13, 19])
def test_an_old_operator_set_is_refused(opset):
    model = gelu(ERF + COMBINATIONS["half-first"], opset)
    case.assert_refused(model, GeluFromParts(), f"Gelu needs operator set 20, the model has {opset}")


def test_float16_is_refused():
    numbers = {name: value.astype(np.float16) for name, value in NUMBERS.items()}
    text = f"(float16[N,8] x) => (float16[N,8] y) {{ {ERF} {COMBINATIONS['half-first']} }}"
    case.assert_refused(case.parse(text, numbers), GeluFromParts(), "x is not known to be float32")


def test_a_constant_that_adds_axes_is_refused():
    text = f"(float[N,8] x) => (float[1,N,8] y) {{ {ERF} {COMBINATIONS['half-first']} }}"
    model = case.parse(text, NUMBERS | {"half": np.full((1, 1, 1), 0.5, np.float32)})
    case.assert_refused(model, GeluFromParts())
    text = f"(float x) => (float[1] y) {{ {ERF} {COMBINATIONS['half-first']} }}"
    model = case.parse(text, NUMBERS | {"half": np.full(1, 0.5, np.float32)})
    case.assert_refused(model, GeluFromParts(), "a constant gives the result more axes than x")


def test_in_both_branches_of_an_if():
    branch = f"{{ {ERF} {COMBINATIONS['half-first']} }}".replace("y =", "{0} =")
    text = (
        "(bool c, float[2,8] x) => (float[2,8] y) { y = If (c) <then_branch = t () => (float[2,8] y1) "
        + branch.replace("{0}", "y1")
        + ", else_branch = f () => (float[2,8] y2) { y2 = Neg(x) }> }"
    )
    model = case.parse(text, NUMBERS)
    both = [{"c": np.array(flag), "x": case.random(0, 2, 8)} for flag in (True, False)]
    case.assert_rewritten(model, GeluFromParts(), both)


@pytest.mark.parametrize("exponent", [np.inf, np.nan, -1.0, 0.5, 100.0])
def test_odd_exponents_do_no_harm(exponent):
    body = (
        "c = Pow(x, odd) k = Mul(c, cubic) i = Add(x, k) a = Mul(i, slope) e = Tanh(a) "
        + COMBINATIONS["half-first"]
    )
    case.assert_refused(gelu(body, odd=np.float32(exponent)), GeluFromParts())


def test_expansion_multiplies_out():
    model = gelu("s = Add(x, one) d = Sub(x, two) p = Mul(s, d) n = Neg(p) y = Pow(n, two)")
    polynomial = Expansion().of(model.graph.outputs[0])
    wanted = {(): 4.0, ((0, 1),): 4.0, ((0, 2),): -3.0, ((0, 3),): -2.0, ((0, 4),): 1.0}  # (x² - x - 2)²
    assert polynomial == wanted
    assert not close({(): 1.0}, {((0, 1),): 1.0})
    assert not close({((0, 1),): 1.001}, {((0, 1),): 1.0})
