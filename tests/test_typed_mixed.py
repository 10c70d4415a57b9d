"""INT8 with its float remainder in 16 bits: which nodes, what the Casts cost, the limit, and the replay."""

from types import SimpleNamespace

import msgspec
import numpy as np
import onnx
import pytest
from compress_case import parse, random
from driver_case import cnn, images, mlp, vectors
from edgepress.compress.plan import Decision, Plan
from edgepress.compress.recipe import DriftLimit, Pins, Recipe
from edgepress.compress.typed.mixed import CAST_MACS, remainder
from edgepress.compress.typed.request import remainder_form
from edgepress.driver.compile import compile_model
from edgepress.driver.mixed_plan import complete, completion_of
from edgepress.driver.reporter import SilentReporter
from edgepress.export.verify import read_manifest, verify_bundle
from edgepress.graph.errors import NotSupported
from edgepress.targets.registry import load_target

PI5 = load_target("raspberry-pi-5")
CHAIN = """(float[N,64] x) => (float[N,64] y) {
    [first] a = MatMul(x, w1)
    [act] r = Relu(a)
    [second] b = MatMul(r, w2)
    [soft] s = Softmax<axis = -1>(b)
    [thin] y = MatMul(s, w3)
}"""
OUTLIER = {"fusions": {"migrate-outliers": False}, "max_drift": (DriftLimit(metric="l2", limit=0.03),)}


def chain():
    weights = {name: random(place, 64, 64, scale=0.1) for place, name in enumerate(("w1", "w2", "w3"))}
    return parse(CHAIN, weights)


def int8_plan(*integers):
    reason = "taken back to float to hold the drift limit"
    decisions = tuple(
        Decision(
            node=name,
            op="MatMul",
            group=name,
            form="dynamic" if name in integers else "float",
            reason="kernel" if name in integers else reason,
        )
        for name in ("first", "second", "thin")
    )
    empty = Plan(target="raspberry-pi-5", precision="fp32", quantization="none", decisions=())
    return empty.with_decisions(decisions)


def forms(plan):
    return {item.node: item.form for item in plan.decisions}


def compiled(source, tmp_path, target, precision, *, calib, out="bundle", **fields):
    recipe = Recipe(target=target, precision=precision, **{"skip": ("benchmark",), **fields})
    return compile_model(source, target=target, output=tmp_path / out, recipe=recipe, calib=calib)


def test_only_what_is_not_int8_takes_16_bits_and_both_reasons_stay():
    plan = remainder(chain(), PI5, int8_plan("thin"), "fp16")
    # 2 x 64 x 64 multiply-accumulates a row against 64 elements in and 64 out: it pays.
    assert forms(plan) == {"first": "fp16", "act": "fp16", "second": "fp16", "thin": "dynamic"}
    assert (plan.precision, plan.quantization) == ("int8+fp16", "dynamic")
    first = plan.decisions[0]
    assert "not INT8: taken back to float to hold the drift limit" in first.reason
    assert set(plan.typed_groups()) == {"first", "second"}
    assert [item.node for item in plan.quantized()] == ["thin"]


def test_an_island_whose_casts_cost_more_than_it_saves_stays_float():
    small = parse(
        "(float[N,8] x) => (float[N,8] y) { [first] a = MatMul(x, w)\n [act] y = Relu(a) }",
        {"w": random(0, 8, 8)},
    )
    kernel = PI5.kernel("MatMul", "float", activation="float16")
    saved = 8 * 8 * (1 - 1 / kernel.speedup_over_float)
    assert saved < CAST_MACS * 16  # a row: 8 elements in, 8 out
    plan = remainder(small, PI5, int8_plan(), "fp16")
    assert forms(plan)["first"] == "float"
    assert plan.precision == "fp32"


def test_excluded_groups_and_kept_ones_stay_float32():
    plan = remainder(chain(), PI5, int8_plan("thin"), "fp16", excluded=["second"])
    assert forms(plan)["second"] == "float"
    plan = remainder(chain(), PI5, int8_plan("thin"), "fp16", keep_float=["w1"])
    assert forms(plan)["first"] == "float"


def test_a_tensor_out_of_range_keeps_its_neighbours_in_float32():
    plan = remainder(chain(), PI5, int8_plan("thin"), "fp16", largest={"a": 5e4})
    assert forms(plan)["first"] == "fp16-storage"  # the weight fits, the results do not
    assert forms(plan)["second"] == "fp16"


def test_storage_leaves_integers_alone():
    plan = remainder(chain(), load_target("raspberry-pi-4"), int8_plan("thin"), "bf16-storage")
    assert forms(plan) == {"first": "bf16-storage", "second": "bf16-storage", "thin": "dynamic"}
    assert plan.precision == "int8+bf16-storage"


@pytest.mark.parametrize(
    ("target", "precision", "form"),
    [
        ("raspberry-pi-5", "int8+fp16", "fp16"),
        ("raspberry-pi-5", "auto", "fp16"),
        ("raspberry-pi-5", "int8+bf16", "bf16-storage"),
        ("raspberry-pi-5", "int8", None),
        ("raspberry-pi-4", "int8+fp16", "fp16-storage"),
        ("raspberry-pi-4", "auto", None),
        ("x86-64-avx512-vnni", "int8+bf16", "bf16-storage"),
        ("x86-64-avx512-vnni", "fp16", None),
    ],
)
def test_what_the_remainder_becomes_depends_on_the_target(target, precision, form):
    assert remainder_form(load_target(target), precision) == form


def test_one_bad_layer_in_float16_beside_int8_and_its_replay(tmp_path):
    source, data = mlp(tmp_path / "m.onnx", outlier_layer=1), vectors(tmp_path / "d.npz")
    result = compiled(source, tmp_path, "raspberry-pi-5", "int8+fp16", calib=data, **OUTLIER)
    manifest = read_manifest(result.bundle)
    assert (manifest.precision.form, manifest.precision.quantization) == ("int8+fp16", "dynamic")
    products = {item.node: item.form for item in result.plan.decisions if item.op == "MatMul"}
    assert products == {"matmul0": "dynamic", "matmul1": "fp16", "matmul2": "dynamic"}
    assert result.drift.l2 <= 0.03
    assert any("arithmetic emulated" in note for note in result.notes)
    graph = onnx.load(result.bundle / "model.onnx").graph
    assert sum(item.data_type == onnx.TensorProto.FLOAT16 for item in graph.initializer) == 2
    assert verify_bundle(result.bundle).golden_samples == 3
    plain = compiled(source, tmp_path, "raspberry-pi-5", "int8", calib=data, out="plain", **OUTLIER)
    assert result.sizes.bundle_model_bytes < plain.sizes.bundle_model_bytes
    again = compile_model(
        source, target="raspberry-pi-5", output=tmp_path / "again", recipe=result.recipe, calib=data
    )
    assert (again.bundle / "model.onnx").read_bytes() == (result.bundle / "model.onnx").read_bytes()
    stored = msgspec.json.decode((result.bundle / "plan.json").read_bytes(), type=Plan)
    assert stored.precision == "int8+fp16"


def test_a_core_without_float16_stores_the_remainder_and_says_so(tmp_path):
    source, data = mlp(tmp_path / "m.onnx", outlier_layer=1), vectors(tmp_path / "d.npz")
    result = compiled(
        source, tmp_path, "raspberry-pi-4", "int8+fp16", calib=data, allow_unmeasured=True, **OUTLIER
    )
    assert result.plan.precision == "int8+fp16-storage"
    (note,) = (note for note in result.notes if "does not compute in float16" in note)
    assert "stored in it (fp16-storage, 1 operators)" in note


class Limit:
    """A budget that holds while at most `most` groups are in 16 bits."""

    def __init__(self, most):
        self.most = most
        self.asked = []

    def measure(self, candidate, _reporter):
        self.asked.append(len(candidate.plan.typed_groups()))
        return "report", [SimpleNamespace(met=self.asked[-1] <= self.most)]


@pytest.mark.parametrize(
    ("most", "asked", "left"), [(2, [2], ()), (1, [2, 1], ("fp16:second",)), (0, [2, 1], ("fp16:first",))]
)
def test_16_bits_give_way_to_the_limit_and_pins_name_what_did(tmp_path, most, asked, left):
    model, plan, limit = chain(), int8_plan("thin"), Limit(most)
    recipe = Recipe(target="raspberry-pi-5", precision="int8+fp16")
    completion = completion_of(model, PI5, recipe, None, SilentReporter())
    before = SimpleNamespace(prepared=model, plan=plan)
    done = complete(
        before,
        completion,
        lower=lambda made, _folder: SimpleNamespace(plan=made, prepared=model),
        folder=tmp_path,
        passes=(),
        budget=limit,
    )
    assert limit.asked == asked
    assert set(left) <= set(done.back)
    assert (done.candidate is before) == (most == 0)
    assert len(done.back) == 2 - len(done.candidate.plan.typed_groups())
    assert any("stays float32" in note for note in done.notes) == (most == 0)
    pins = Pins(model_sha256="0" * 64, precision="int8", reverted=done.back)
    again = msgspec.structs.replace(recipe, pins=pins)
    replayed, _ = completion_of(model, PI5, again, None, SilentReporter()).plan(model, plan)
    assert forms(replayed) == forms(done.candidate.plan)


def test_auto_takes_no_16_bits_that_nobody_measured(tmp_path):
    source, data = cnn(tmp_path / "c.onnx"), images(tmp_path / "d.npz")
    recipe = Recipe(target="raspberry-pi-5", skip=("benchmark", "drift"), keep_float=("second",))
    result = compile_model(
        source, target="raspberry-pi-5", output=tmp_path / "out", recipe=recipe, calib=data
    )
    assert result.plan.precision == "int8"


def test_a_dry_run_shows_both_forms(tmp_path):
    source, data = mlp(tmp_path / "m.onnx"), vectors(tmp_path / "d.npz")
    recipe = Recipe(target="raspberry-pi-4", precision="int8+bf16", keep_float=())
    result = compile_model(source, target="raspberry-pi-4", recipe=recipe, calib=data, dry_run=True)
    assert {item.form for item in result.plan.decisions} <= {"dynamic", "bf16-storage"}
    assert np.all([item.reason for item in result.plan.decisions])


def test_graphics_processors_have_their_own_word():
    assert remainder_form(load_target("a100"), "int8+bf16") == "bf16"
    with pytest.raises(NotSupported, match="does not compute in bfloat16"):
        remainder_form(load_target("jetson-nano"), "int8+bf16")
