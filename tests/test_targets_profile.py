"""Target profiles: what the built-in ones say, how kernels are chosen, evidence and sources."""

from __future__ import annotations

import itertools
from importlib import resources

import msgspec
import pytest
from edgepress.targets.profile import Figure, Kernel, RuntimeOp, TargetProfile
from edgepress.targets.registry import list_targets, load_target

BUILT_IN = [summary.name for summary in list_targets() if summary.kind != "host"]
ON_CPU = [name for name in BUILT_IN if load_target(name).runtime.name == "onnxruntime"]


def _kernel(name: str, **fields: object) -> Kernel:
    given = {
        "name": name,
        "op": "MatMul",
        "form": "static",
        "activation": "uint8",
        "grade": "works",
        **fields,
    }
    return msgspec.convert(given, Kernel)


def _profile(*kernels: Kernel) -> TargetProfile:
    return msgspec.structs.replace(load_target("x86-64"), kernels=kernels)


def test_the_promised_targets_are_there() -> None:
    assert {"raspberry-pi-4", "raspberry-pi-5", "x86-64-avx2", "x86-64-avx512-vnni"} <= set(BUILT_IN)
    files = [
        entry.name for entry in resources.files("edgepress.targets").iterdir() if entry.name.endswith(".toml")
    ]
    assert sorted(BUILT_IN) == sorted(name[:-5] for name in files if not name.startswith("_"))


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_figure_has_a_source_or_no_evidence(name: str) -> None:
    profile = load_target(name)
    parts = [part for part in (profile, profile.device, profile.gpu) if part is not None]
    figures = [
        value for part in parts for value in msgspec.structs.astuple(part) if isinstance(value, Figure)
    ]
    assert figures
    for figure in figures:
        assert figure.source
        assert figure.evidence != "none"
    for entry in (*profile.kernels, *profile.runtime_ops):
        assert entry.source or entry.evidence == "none"
    for kernel in profile.kernels:
        if kernel.speedup_over_float is not None and kernel.name not in (
            "matmul-float",
            "gemm-float",
            "conv-float",
            "gather-float",
        ):
            assert kernel.evidence != "none", kernel.name
    for entry in profile.runtime_ops:
        assert entry.speedup is None or entry.evidence != "none", entry.op
    assert profile.device.isa_source
    assert profile.runtime.limits_source


@pytest.mark.parametrize("name", ON_CPU)
def test_every_target_has_a_float_and_an_integer_path(name: str) -> None:
    profile = load_target(name)
    for op in ("MatMul", "Gemm", "Conv"):
        assert profile.kernel(op, "float", activation="float32") is not None
        static = profile.kernel(op, "static", activation=profile.static_activation_type)
        assert static is not None
        assert static.weight_granularity == "per-channel"
    for op, kind in itertools.product(("Add", "Concat", "GlobalAveragePool", "MaxPool"), ("uint8", "int8")):
        assert profile.kernel(op, "static", activation=kind) is not None
    dynamic = profile.kernel("MatMul", "dynamic")
    assert dynamic is not None
    assert (dynamic.activation, dynamic.weight) == ("uint8", "int8")


@pytest.mark.parametrize("name", ON_CPU)
def test_matmul_scales_lie_on_the_output_axis(name: str) -> None:
    """Scales along K are computed wrongly by onnxruntime when K = N, without an error."""
    for kernel in load_target(name).kernels:
        if kernel.op == "MatMul" and kernel.weight_granularity == "per-channel":
            assert kernel.weight_axis == 1
        if kernel.op == "Conv" and kernel.weight_granularity == "per-channel":
            assert kernel.weight_axis == 0


@pytest.mark.parametrize("name", ON_CPU)
def test_bfloat16_arithmetic_is_refused_with_its_reason(name: str) -> None:
    profile = load_target(name)
    for op in ("MatMul", "Gemm", "Conv"):
        assert profile.kernel(op, "float", activation="bfloat16") is None
        assert "bfloat16" in (profile.refusal(op, "float", activation="bfloat16") or "")


def test_reduced_range_is_needed_where_products_saturate() -> None:
    assert load_target("x86-64-avx2").needs_reduced_range
    assert load_target("x86-64-avx512").needs_reduced_range
    for name in (
        "x86-64",
        "x86-64-avx-vnni",
        "x86-64-avx512-vnni",
        "x86-64-amx",
        "raspberry-pi-4",
        "raspberry-pi-5",
    ):
        assert not load_target(name).needs_reduced_range
    avx2 = load_target("x86-64-avx2")
    saturating = avx2.kernel("MatMul", "static", weight="int8")
    exact = avx2.kernel("MatMul", "static", weight="uint8")
    assert saturating is not None
    assert exact is not None
    assert saturating.reduced_range
    assert not exact.reduced_range


def test_a_refused_kernel_does_not_ask_for_reduced_range() -> None:
    refused = _kernel("a", reduced_range=True, grade="refused", reason="no")
    assert not _profile(refused).needs_reduced_range


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("raspberry-pi-5", "int8"),
        ("raspberry-pi-4", "uint8"),
        ("x86-64-avx512-vnni", "uint8"),
        ("x86-64-avx2", "uint8"),
    ],
)
def test_static_activation_type(name: str, kind: str) -> None:
    assert load_target(name).static_activation_type == kind


def test_static_activation_type_without_static_kernels() -> None:
    assert _profile(_kernel("a", form="dynamic")).static_activation_type is None


def test_float16_computes_only_on_cores_that_have_it() -> None:
    for name in ON_CPU:
        profile = load_target(name)
        kernel = profile.kernel("MatMul", "float", activation="float16")
        assert kernel is not None
        assert (kernel.grade == "fast") == ("asimdhp" in profile.device.isa_features)


def test_arm_targets_are_audited_with_signed_activations() -> None:
    for name in ON_CPU:
        profile = load_target(name)
        expected = {"session.qdqisint8allowed": "1"} if profile.device.architecture == "aarch64" else {}
        assert profile.audit_config == expected
        assert not profile.session_config


def test_weight_only_costs_more_than_float_without_dot_products() -> None:
    forms = [(kernel.name, kernel.form) for kernel in load_target("raspberry-pi-4").candidates("MatMul")]
    names = [name for name, _ in forms]
    assert names.index("matmul-float") < names.index("matmul-weight-only-4bit")
    names = [kernel.name for kernel in load_target("raspberry-pi-5").candidates("MatMul")]
    assert names.index("matmul-weight-only-4bit") < names.index("matmul-float")


def test_candidates_are_ordered_by_grade_speed_evidence_and_position() -> None:
    kernels = [
        _kernel("unknown-speed"),
        _kernel("slow", speedup_over_float=0.5, evidence="modelled", source="s"),
        _kernel("modelled", speedup_over_float=2.0, evidence="modelled", source="s"),
        _kernel("measured", speedup_over_float=2.0, evidence="measured-on-target", source="s"),
        _kernel("refused", grade="refused", reason="no"),
        _kernel("fast", grade="fast"),
        _kernel("unknown-speed-2"),
        _kernel("conv", op="Conv"),
    ]
    ordered = [kernel.name for kernel in _profile(*kernels).candidates("MatMul")]
    assert ordered == ["fast", "measured", "modelled", "unknown-speed", "unknown-speed-2", "slow"]
    assert [kernel.name for kernel in _profile(*kernels).candidates("MatMul", forms=("float",))] == []


def test_what_is_no_faster_than_float32_comes_after_it() -> None:
    same = _kernel(
        "same", form="float", activation="float16", speedup_over_float=1.0, evidence="modelled", source="s"
    )
    unknown = _kernel("unknown")
    reference = _kernel("reference", form="float", activation="float32", speedup_over_float=1.0, source="s")
    ordered = [kernel.name for kernel in _profile(same, unknown, reference).candidates("MatMul")]
    assert ordered == ["reference", "same", "unknown"]


def test_kernel_honours_every_constraint() -> None:
    block = _kernel("block", weight="uint8", weight_granularity="block", grade="fast")
    channel = _kernel(
        "channel", weight="int8", weight_granularity="per-channel", symmetric_activation_only=True
    )
    profile = _profile(block, channel)
    assert profile.kernel("MatMul", "static") == block
    assert profile.kernel("MatMul", "static", weight="int8") == channel
    assert profile.kernel("MatMul", "static", granularity="per-tensor") == channel
    assert profile.kernel("MatMul", "static", granularity="block") == block
    assert profile.kernel("MatMul", "static", granularity="per-row") is None
    assert profile.kernel("MatMul", "static", activation="int8") is None
    assert profile.kernel("MatMul", "static", weight="int8", symmetric_activation=True) == channel
    assert profile.kernel("MatMul", "static", weight="int8", symmetric_activation=False) is None


def test_refusals_say_why() -> None:
    refused = _kernel("a", grade="refused", activation="int8", reason="because of the sign")
    usable = _kernel("b")
    both = _profile(refused, usable)
    assert both.refusal("MatMul", "static") is None
    assert both.refusal("MatMul", "static", activation="int8") == "because of the sign"
    assert "there are: b" in (both.refusal("MatMul", "static", activation="float32") or "")
    assert _profile(refused).refusal("MatMul", "static", activation="uint8") == "because of the sign"
    assert "no static kernel for Gelu" in (both.refusal("Gelu", "static") or "")


def test_runtime_ops_are_found_by_name_and_domain() -> None:
    vnni = load_target("x86-64-avx512-vnni")
    skip = vnni.runtime_op("SkipLayerNormalization")
    assert skip is not None
    assert skip.grade == "slower"
    assert vnni.is_faster("Attention", "")
    assert not vnni.is_faster("SkipLayerNormalization")
    assert not vnni.is_faster("NoSuchOp")
    arm = load_target("raspberry-pi-5").runtime_op("SkipLayerNormalization")
    assert arm is not None
    assert arm.evidence == "modelled"


@pytest.mark.parametrize(
    ("shape", "fields", "message"),
    [
        (Figure, {"value": 1, "evidence": "documented"}, "needs a source"),
        (Figure, {"value": 0}, "above zero"),
        (
            Kernel,
            {"name": "a", "op": "X", "form": "static", "activation": "int8", "grade": "refused"},
            "reason",
        ),
        (
            Kernel,
            {
                "name": "a",
                "op": "X",
                "form": "static",
                "activation": "int8",
                "grade": "fast",
                "evidence": "modelled",
            },
            "needs a source",
        ),
        (
            Kernel,
            {
                "name": "a",
                "op": "X",
                "form": "static",
                "activation": "int8",
                "grade": "fast",
                "weight": "int8",
            },
            "belong together",
        ),
        (RuntimeOp, {"op": "X", "replaces": "Y", "grade": "faster"}, "needs a source"),
        (Kernel, {"name": "a", "op": "X", "form": "static", "activation": "int9", "grade": "fast"}, "enum"),
    ],
)
def test_inconsistent_values_are_refused(
    shape: type[msgspec.Struct], fields: dict[str, object], message: str
) -> None:
    with pytest.raises(msgspec.ValidationError, match=message):
        msgspec.convert(fields, shape)


def test_profiles_survive_json() -> None:
    profile = load_target("raspberry-pi-5")
    assert msgspec.json.decode(msgspec.json.encode(profile), type=TargetProfile) == profile
