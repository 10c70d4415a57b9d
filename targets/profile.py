"""`TargetProfile`: what one target's hardware and runtime can do, as frozen data with its evidence."""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

SCHEMA_VERSION = 1

Evidence = Literal["measured-on-target", "measured-elsewhere", "modelled", "none"]
FigureEvidence = Literal["measured-on-target", "measured-elsewhere", "documented", "modelled", "none"]
Form = Literal["float", "dynamic", "static", "weight-only", "fp16", "bf16", "fp16-storage", "bf16-storage"]
"""How a node computes: in float32, in integers (three ways), in 16-bit floats, or in float32 with its
weights stored in 16 bits. Kernels of 16-bit floats have the form "float" and their types."""
ElementType = Literal["uint8", "int8", "uint4", "int4", "float32", "float16", "bfloat16"]
Granularity = Literal["per-tensor", "per-channel", "per-row", "block"]
Grade = Literal["fast", "works", "refused"]
GpuPrecision = Literal["FP32", "TF32", "FP16", "BF16", "INT8", "FP8", "FP4"]

# A scheme of the left granularity can be served by a kernel whose finest granularity is on the right.
_SERVED_BY: dict[Granularity, frozenset[Granularity]] = {
    "per-tensor": frozenset({"per-tensor", "per-channel", "per-row"}),
    "per-channel": frozenset({"per-channel"}),
    "per-row": frozenset({"per-row"}),
    "block": frozenset({"block"}),
}
_EVIDENCE_ORDER: tuple[Evidence, ...] = ("measured-on-target", "measured-elsewhere", "modelled", "none")


class Figure(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One number about the hardware and how it is known.

    `documented` is a vendor's or runtime's own statement, which is no measurement. Without a
    source the evidence is `none`.
    """

    value: int | float
    evidence: FigureEvidence = "none"
    source: str = ""

    def __post_init__(self) -> None:
        _require_source(self.evidence, self.source)
        if not self.value > 0:
            raise ValueError(f"a figure must be above zero, not {self.value}")


class Device(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The hardware; a figure that nobody sourced is absent, never guessed.

    Caches are per core (`l1d_bytes`, `l1i_bytes`, and `l2_bytes` where `l2_shared` is false) or of
    the whole chip (`l3_bytes`). `isa_features` are the names that Linux prints in /proc/cpuinfo.
    """

    architecture: Literal["x86-64", "aarch64"]
    core: str
    isa_features: tuple[str, ...]
    isa_source: str
    board: str | None = None
    soc: str | None = None
    cores: Figure | None = None
    clock_hz: Figure | None = None
    l1d_bytes: Figure | None = None
    l1i_bytes: Figure | None = None
    l2_bytes: Figure | None = None
    l2_shared: bool = False
    l3_bytes: Figure | None = None
    memory_bytes: Figure | None = None
    memory_bandwidth_bytes_per_s: Figure | None = None
    copy_bytes_per_s: Figure | None = None
    peak_float32_flops: Figure | None = None


class Runtime(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The inference runtime on the target: the largest opset and IR version that it loads.

    Attributes:
        max_ir: the largest IR version; TensorRT's parser documents none.
        jetpack: the Jetson software release that brings this version.
        typing: how a TensorRT network gets its precisions: weak (builder flags), strong (the types
            in the ONNX file), or both forms.
        operator_table: the version whose table of parser operators stands for this one (see
            `targets.operator_table`), which may be the nearest older one.
    """

    name: Literal["onnxruntime", "tensorrt"]
    version: str
    max_opset: int
    max_ir: int | None = None
    limits_source: str
    wheel: str = ""
    jetpack: str | None = None
    typing: Literal["weak", "strong", "both"] | None = None
    operator_table: str | None = None

    def __post_init__(self) -> None:
        if self.name == "onnxruntime" and self.max_ir is None:
            raise ValueError("onnxruntime needs max_ir")
        if self.name == "tensorrt" and (self.operator_table is None or self.typing is None):
            raise ValueError("tensorrt needs operator_table and typing")


class Gpu(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The graphics processor and its accelerators (DLA); what nobody sourced is absent.

    Attributes:
        compute_capability: "8.7"; decides which engines and precisions there are.
        memory_shared: whether the CPU's memory is the GPU's (then the sizes stand under `device`).
        advertised_int8_ops: operations per second as the vendor advertises them; the source says
            whether for 2:4 sparse weights and whether the DLA's are included.
        peak_int8_ops: dense, per second; so are the other peaks.
        precisions: what TensorRT computes in.
        disputed_precisions: precisions about which the sources contradict each other.
        dla_cores: deep-learning accelerators beside the GPU.
    """

    compute_capability: str
    capability_source: str
    precisions: tuple[GpuPrecision, ...]
    precisions_source: str
    disputed_precisions: tuple[GpuPrecision, ...] = ()
    disputed_source: str = ""
    dla_cores: int
    dla_source: str
    sm_count: Figure | None = None
    cuda_cores: Figure | None = None
    tensor_cores: Figure | None = None
    clock_hz: Figure | None = None
    l2_bytes: Figure | None = None
    memory_shared: bool
    memory_bytes: Figure | None = None
    memory_bandwidth_bytes_per_s: Figure | None = None
    advertised_int8_ops: Figure | None = None
    peak_float32_flops: Figure | None = None
    peak_tf32_flops: Figure | None = None
    peak_float16_flops: Figure | None = None
    peak_bfloat16_flops: Figure | None = None
    peak_int8_ops: Figure | None = None

    def __post_init__(self) -> None:
        if set(self.precisions) & set(self.disputed_precisions):
            raise ValueError("a precision is either known or disputed")
        if self.disputed_precisions and not self.disputed_source:
            raise ValueError("disputed_precisions need disputed_source")
        if self.dla_cores < 0:
            raise ValueError(f"dla_cores must be at least 0, not {self.dla_cores}")


class Kernel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one operator runs in one arithmetic form.

    Attributes:
        name: its key in the profile, for overrides and messages.
        op: the ONNX operator that is quantized ("MatMul"), whatever the runtime calls the result; a
            variant of it, where they differ, stands behind a colon ("Resize:linear").
        form: float; dynamic (activations quantized while running); static (Q/DQ with calibrated
            ranges); weight-only (weights stored small, arithmetic as `reason` says).
        weight: None where the operator has no weight.
        weight_granularity: the finest that is served; per-tensor is always served too, except by
            block kernels.
        weight_axis: the axis of the weight that carries the scales (MatMul [K, N]: 1).
        block_sizes: the block lengths along K of a block kernel.
        output: whether Q/DQ must stand behind the operator ("quantized"), must not ("float"), or
            either works.
        symmetric_activation_only: zero points other than the middle are not served.
        reduced_range: 8-bit weights saturate in this kernel; weights must keep to 7 bits.
        runtime_ops: operators of the runtime's optimised graph that prove this kernel runs.
        needs: what else the graph must look like.
        speedup_over_float: float32 cost / cost in this form of the same operator or, where the
            source says so, of a whole model; with evidence `modelled` a ratio of instructions.
    """

    name: str
    op: str
    form: Form
    activation: ElementType
    weight: ElementType | None = None
    weight_granularity: Granularity | None = None
    weight_axis: int | None = None
    block_sizes: tuple[int, ...] = ()
    output: Literal["quantized", "float", "either"] = "either"
    symmetric_activation_only: bool = False
    reduced_range: bool = False
    grade: Grade
    speedup_over_float: float | None = None
    evidence: Evidence = "none"
    source: str = ""
    reason: str = ""
    needs: str = ""
    runtime_ops: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _require_source(self.evidence, self.source)
        if self.grade == "refused" and not self.reason:
            raise ValueError("a refused kernel needs a reason")
        if (self.weight is None) != (self.weight_granularity is None):
            raise ValueError("weight and weight_granularity belong together")
        if self.speedup_over_float is not None and not self.speedup_over_float > 0:
            raise ValueError(f"speedup_over_float must be above zero, not {self.speedup_over_float}")


class RuntimeOp(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whether a fused operator pays on this target, against the standard operators it replaces.

    `speedup` is cost of the standard operators / cost of the fused one.
    """

    op: str
    domain: str = "com.microsoft"
    replaces: str
    grade: Literal["faster", "slower", "same", "unknown"]
    speedup: float | None = None
    evidence: Evidence = "none"
    source: str = ""
    reason: str = ""

    def __post_init__(self) -> None:
        _require_source(self.evidence, self.source)
        if self.grade != "unknown" and not self.source:
            raise ValueError(f"grade {self.grade!r} needs a source")


class TargetProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One target: device, runtime, and the kernels and fused operators with their evidence.

    Attributes:
        gpu: the graphics processor that TensorRT runs on; None for a CPU target.
        alignment_channels: channel counts that are multiples of this fill the kernels' vectors.
        session_config: runtime config entries that artifacts for this target ship with.
        audit_config: entries that make a runtime on another machine optimise a graph as this
            target would; for looking at the graph, never for timing.
        derived_from: the profiles under this one, nearest first; informational.
    """

    schema_version: int = SCHEMA_VERSION
    name: str
    kind: Literal["board", "cpu-class", "gpu", "host"]
    aliases: tuple[str, ...] = ()
    description: str
    device: Device
    gpu: Gpu | None = None
    runtime: Runtime
    kernels: tuple[Kernel, ...]
    runtime_ops: tuple[RuntimeOp, ...] = ()
    alignment_channels: Figure | None = None
    default_threads: int = 1
    session_config: dict[str, str] = {}
    audit_config: dict[str, str] = {}
    notes: tuple[str, ...] = ()
    derived_from: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.schema_version != SCHEMA_VERSION:
            raise ValueError(f"schema_version {self.schema_version} is not {SCHEMA_VERSION}")
        if self.default_threads < 1:
            raise ValueError(f"default_threads must be at least 1, not {self.default_threads}")
        if self.runtime.name == "tensorrt" and self.gpu is None:
            raise ValueError("a tensorrt target needs a [gpu] table")
        if self.runtime.name == "onnxruntime" and self.alignment_channels is None:
            raise ValueError("an onnxruntime target needs alignment_channels")

    def kernel(
        self,
        op: str,
        form: Form,
        *,
        activation: ElementType | None = None,
        weight: ElementType | None = None,
        granularity: Granularity | None = None,
        symmetric_activation: bool | None = None,
    ) -> Kernel | None:
        """The best usable kernel for an operator in a form, or None; see `refusal` for why not.

        Args:
            op: ONNX operator name.
            form: the arithmetic form.
            activation: only kernels of this activation type.
            weight: only kernels of this weight type.
            granularity: only kernels that serve weights of this granularity.
            symmetric_activation: False asks for kernels that take any zero point.
        """
        for kernel in self.candidates(op, forms=(form,)):
            if _fits(kernel, activation, weight, granularity, symmetric_activation):
                return kernel
        return None

    def candidates(self, op: str, *, forms: tuple[Form, ...] | None = None) -> list[Kernel]:
        """All usable kernels for an operator, best first.

        Order: grade, then speed-up over float (unknown counts as 1), then float32 itself (what
        is no faster than it has no claim), then evidence, then the order in the profile.
        """
        usable = [
            kernel
            for kernel in self.kernels
            if kernel.op == op and kernel.grade != "refused" and (forms is None or kernel.form in forms)
        ]
        return sorted(usable, key=_preference)

    def refusal(
        self,
        op: str,
        form: Form,
        *,
        activation: ElementType | None = None,
        weight: ElementType | None = None,
        granularity: Granularity | None = None,
        symmetric_activation: bool | None = None,
    ) -> str | None:
        """Why `kernel` with the same arguments finds nothing; None where it finds one."""
        wanted: _Constraints = (activation, weight, granularity, symmetric_activation)
        known = [kernel for kernel in self.kernels if kernel.op == op and kernel.form == form]
        fitting = [kernel for kernel in known if _fits(kernel, *wanted)]
        if any(kernel.grade != "refused" for kernel in fitting):
            return None
        if fitting:
            return fitting[0].reason
        if not known:
            return f"{self.name} has no {form} kernel for {op}"
        usable = [kernel for kernel in known if kernel.grade != "refused"]
        if not usable:
            return known[0].reason
        names = ", ".join(kernel.name for kernel in usable)
        return f"no {form} kernel for {op} on {self.name} has these types; there are: {names}"

    def runtime_op(self, op: str, domain: str = "com.microsoft") -> RuntimeOp | None:
        """What is known about a fused operator, or None."""
        for entry in self.runtime_ops:
            if (entry.op, entry.domain) == (op, domain):
                return entry
        return None

    def is_faster(self, op: str, domain: str = "com.microsoft") -> bool:
        """Whether a fused operator is known to be faster here than the standard ones."""
        entry = self.runtime_op(op, domain)
        return entry is not None and entry.grade == "faster"

    @property
    def needs_reduced_range(self) -> bool:
        """Whether any usable kernel saturates with 8-bit weights; ask `Kernel.reduced_range` per kernel."""
        return any(kernel.reduced_range and kernel.grade != "refused" for kernel in self.kernels)

    @property
    def static_activation_type(self) -> Literal["uint8", "int8"] | None:
        """The activation type of the best static kernel (of Conv, else MatMul, else Gemm)."""
        for op in ("Conv", "MatMul", "Gemm"):
            for kernel in self.candidates(op, forms=("static",)):
                if kernel.activation == "int8":
                    return "int8"
                if kernel.activation == "uint8":
                    return "uint8"
        return None


_Constraints: TypeAlias = tuple[ElementType | None, ElementType | None, Granularity | None, bool | None]


def _require_source(evidence: str, source: str) -> None:
    if evidence != "none" and not source:
        raise ValueError(f"evidence {evidence!r} needs a source")


def _fits(
    kernel: Kernel,
    activation: ElementType | None,
    weight: ElementType | None,
    granularity: Granularity | None,
    symmetric_activation: bool | None,
) -> bool:
    if activation is not None and kernel.activation != activation:
        return False
    if weight is not None and kernel.weight != weight:
        return False
    if granularity is not None and kernel.weight_granularity not in _SERVED_BY[granularity]:
        return False
    return not (symmetric_activation is False and kernel.symmetric_activation_only)


def _preference(kernel: Kernel) -> tuple[bool, float, bool, int]:
    speedup = 1.0 if kernel.speedup_over_float is None else kernel.speedup_over_float
    reference = kernel.form == "float" and kernel.activation == "float32"
    return kernel.grade != "fast", -speedup, not reference, _EVIDENCE_ORDER.index(kernel.evidence)
