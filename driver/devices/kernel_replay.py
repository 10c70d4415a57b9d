"""`edgepress verify --kernels`: every integer kernel of a bundle on a device, bit for bit."""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np

from ...compress.typed.twin import needs_twin
from ...export.arm_sums import with_arm_sums
from ...export.manifest import Manifest
from ...export.nudged import nudged
from ...export.replay_record import Recording, golden_feeds, record_units
from ...export.replay_results import UnitResult, unit_results
from ...export.samples import Feeds
from ...export.verify import read_manifest, verify_bundle
from ...graph.errors import EdgepressError, NotSupported
from ...graph.load import load_model
from ...graph.save import save_model
from ...runtimes.base import SessionOptions
from ...runtimes.device_file import DeviceEntry
from ...runtimes.replay import Job, Played, Stage, on_device, on_this_machine, play
from ...runtimes.ssh import SshDevice
from ...targets.host import HostFacts, read_host
from ...targets.registry import load_target
from ..opened import open_named
from ..output import Answer
from ..reporter import Reporter, absolute_progress
from .commands import THIS_MACHINE, open_entry
from .emulated import set_up
from .end_to_end import EndToEnd, end_to_end
from .fleet import only_error, run_on_devices
from .kernel_tables import kernel_answer
from .running import Told

_NOISES = 2
_ARM = "sums as on Arm"
_LEVELS = {"no graph optimizations": "ORT_DISABLE_ALL", "basic graph optimizations": "ORT_ENABLE_BASIC"}
_ARM_AUDIT = {"session.qdqisint8allowed": "1"}
"""Under this entry an x86 runtime makes integer kernels of signed Q/DQ pairs, as an Arm one does."""


class KernelReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one device made of a bundle's kernels and of the whole model.

    Attributes:
        processor: the device's, with the features that decide which kernels it has.
        runtime: onnxruntime's version there, None where it does not say.
        units: every unit that was replayed.
        whole: the model end to end.
        notes: what else a reader should know.
    """

    processor: str
    runtime: str | None
    units: tuple[UnitResult, ...]
    whole: EndToEnd
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """What is the same for every device: the units, and this machine's results.

    Attributes:
        bundle: its folder.
        manifest: its manifest.
        recording: units and inputs.
        samples: (inputs, recorded outputs) of the golden samples.
        jobs: the units, and the whole model as the last one.
        here: this machine's results, in the order of `jobs`, in the way the target's runtime optimises.
        variants: name -> the whole model on this machine in another, numerically equal form.
        arm: the whole model on this machine with sums as 64-bit Arm computes them, None where it has none.
        baseline: per sample the outputs of the untouched model, None where none was given.
        options: of the device's sessions.
        options_here: of this machine's.
    """

    bundle: Path
    manifest: Manifest
    recording: Recording
    samples: tuple[tuple[Feeds, Feeds], ...]
    jobs: tuple[Job, ...]
    here: tuple[Played, ...]
    variants: Mapping[str, Played]
    arm: Played | None
    baseline: tuple[Feeds, ...] | None
    options: SessionOptions
    options_here: SessionOptions


def run(arguments: argparse.Namespace, entries: Sequence[DeviceEntry], reporter: Reporter) -> Answer:
    """Replay a bundle's kernels on devices, or a second time on this machine where none is named.

    Raises:
        ModelError: if the folder is not a bundle.
        VerifyFailed: if a file of the bundle is not what it was.
        NotSupported: if the bundle has no golden samples, or computes in bfloat16.
        EdgepressError: of a single device, what ended its work.
    """
    bundle = Path(arguments.bundle)
    with reporter.stage("check the bundle"):
        verify_bundle(bundle, run_golden=False)
    with tempfile.TemporaryDirectory(prefix="edgepress-kernels-") as scratch:
        prepared = prepare(bundle, Path(scratch), reporter, baseline=arguments.baseline)

        chosen = entries or (THIS_MACHINE,)
        ready = set_up(chosen, prepared.manifest.versions.get("onnxruntime"), reporter)

        def work(entry: DeviceEntry, told: Told) -> KernelReport:
            ready(entry)
            return replay_on(entry, prepared, Path(scratch), reporter, told)

        with reporter.stage(f"replay kernels on {', '.join(entry.name for entry in chosen)}"):
            outcomes = run_on_devices(chosen, work)
    only_error(outcomes)
    return kernel_answer(prepared.bundle, prepared.recording, outcomes)


def prepare(bundle: Path, folder: Path, reporter: Reporter, *, baseline: str | None = None) -> Prepared:
    """Cut and record a bundle, and run everything on this machine.

    Args:
        bundle: its folder.
        folder: where tensors are written; it has to stay until all devices are done.
        reporter: told the stages.
        baseline: the untouched model, to state drift against.

    Raises:
        NotSupported: if the bundle has no golden samples, or computes in bfloat16.
        ModelError: if it does not run here.
    """
    manifest = read_manifest(bundle)
    if needs_twin(manifest.precision.form, manifest.precision.io_dtype):
        raise NotSupported(
            "kernels of a bfloat16 bundle cannot be replayed",
            where=str(bundle),
            why="onnxruntime's CPU provider has no bfloat16 kernels to compare with",
            remedy="leave --kernels out: the golden samples are compared all the same",
        )
    samples = golden_feeds(bundle, manifest)
    threads = manifest.golden.threads if manifest.golden is not None else 1
    options = manifest.session_options.options(threads=threads)
    here = msgspec.structs.replace(options, config={**_audit_config(manifest), **options.config})
    feeds = [given for given, _ in samples]
    with reporter.stage("record kernels' inputs", total=None) as stage:
        recording = record_units(bundle, feeds, here, folder, progress=absolute_progress(stage))
    jobs = (*_unit_jobs(recording), _whole_job(manifest, feeds, folder))
    with reporter.stage("run on this machine"):
        played = play(jobs, Stage(runs=on_this_machine, bundle=bundle, folder=folder, options=here))
        variants = _variants(bundle, jobs[-1], folder, here)
        arm = variants.pop(_ARM, None)
    if played[-1].error is not None:
        raise NotSupported("the model does not run on this machine", where=str(bundle), why=played[-1].error)
    return Prepared(
        bundle=bundle,
        manifest=manifest,
        recording=recording,
        samples=samples,
        jobs=jobs,
        here=played,
        variants=variants,
        arm=arm,
        baseline=_baseline_outputs(baseline, feeds, manifest, reporter),
        options=options,
        options_here=here,
    )


def replay_on(
    entry: DeviceEntry, prepared: Prepared, folder: Path, reporter: Reporter, told: Told
) -> KernelReport:
    """Replay on one device and compare.

    Raises:
        EdgepressError: what ended the work there.
    """
    version = prepared.manifest.versions.get("onnxruntime")
    stage = Stage(runs=on_this_machine, bundle=prepared.bundle, folder=folder, options=prepared.options_here)
    if entry.url == THIS_MACHINE.url:
        mine = read_host()
        return report(prepared, play(prepared.jobs, stage), entry.name, mine, mine.runtime_version)
    sizes = [item.output_bytes for item in prepared.here]
    with open_entry(entry, reporter, version, told) as device:
        runs = on_device(device, entry.name)
        stage = dataclasses.replace(stage, runs=runs, options=prepared.options)
        there = play(prepared.jobs, stage, output_bytes=sizes)
        return report(prepared, there, entry.name, device.host_facts(), _runtime_version(device))


def report(
    prepared: Prepared, there: Sequence[Played], device: str, facts: HostFacts, runtime: str | None
) -> KernelReport:
    """A device's results, held against this machine's."""
    units = unit_results(prepared.recording, prepared.here[:-1], there[:-1], device)
    whole = end_to_end(
        prepared.manifest,
        [outputs for _, outputs in prepared.samples],
        here=prepared.here[-1],
        there=there[-1],
        variants=prepared.variants,
        baseline=prepared.baseline,
        arm=prepared.arm if facts.architecture == "aarch64" else None,
    )
    name = facts.board or facts.core
    return KernelReport(
        processor=f"{name} ({facts.architecture}: {' '.join(sorted(facts.features)) or 'no features'})",
        runtime=runtime,
        units=units,
        whole=whole,
        notes=tuple(_notes(prepared, units, whole, facts, runtime)),
    )


def _notes(
    prepared: Prepared, units: Sequence[UnitResult], whole: EndToEnd, facts: HostFacts, runtime: str | None
) -> list[str]:
    notes, mine = [], read_host()
    if runtime is not None and mine.runtime_version not in (None, runtime):
        notes.append(f"onnxruntime is {runtime} there and {mine.runtime_version} here: kernels may be others")
    if any(unit.state == "this machine is wrong" for unit in units):
        why = (
            "its processor has no VNNI, and adds products of 8 bits two at a time in 16 bits, which saturate"
            if mine.architecture == "x86-64" and not any("vnni" in name for name in mine.features)
            else "the device is within one step of the operators' definition, this machine is not"
        )
        notes.append(f"this machine is wrong where it differs from the device: {why}")
    return (
        notes + _recorded_notes(prepared, whole, mine, facts) + _half_notes(prepared.manifest, whole, facts)
    )


def _recorded_notes(prepared: Prepared, whole: EndToEnd, mine: HostFacts, facts: HostFacts) -> list[str]:
    if whole.from_record is None or whole.from_here is None or prepared.options == prepared.options_here:
        return []
    if mine.architecture == facts.architecture or whole.from_record.far <= whole.from_here.far:
        return []
    return [
        "the recorded outputs are of a runtime that computes signed Q/DQ pairs in float, as it does on x86; "
        "for the comparison with this machine it was told to use integers, as it does on the device"
    ]


def _half_notes(manifest: Manifest, whole: EndToEnd, facts: HostFacts) -> list[str]:
    in_half = manifest.golden is not None and manifest.golden.numerics == "float16" and not whole.identical
    if not in_half or facts.architecture != "aarch64" or not {"asimdhp", "fphp"} <= facts.features:
        return []
    return [
        "this file is computed in 16-bit floats there and in 32-bit floats here: the difference is the "
        "device's own rounding, which a check on this machine does not show"
    ]


def _audit_config(manifest: Manifest) -> Mapping[str, str]:
    """Config entries under which this machine's runtime optimises as the target's."""
    try:
        return load_target(manifest.target.name).audit_config
    except EdgepressError:  # a profile of the user's own, which is not here
        return {} if manifest.target.name == "host" else _ARM_AUDIT


def _unit_jobs(recording: Recording) -> list[Job]:
    return [
        Job(
            model=item.data,
            inputs=tuple(f"i{place}" for place in range(len(item.inputs[0]))),
            feeds=recording.feeds[index],
        )
        for index, item in enumerate(recording.models)
    ]


def _whole_job(manifest: Manifest, samples: Sequence[Feeds], folder: Path) -> Job:
    names = [spec.name for spec in manifest.model.inputs]
    for number, feeds in enumerate(samples):
        for place, name in enumerate(names):
            np.save(folder / f"g{place}_s{number}.npy", feeds[name], allow_pickle=False)
    files = tuple(
        tuple(f"g{place}_s{number}.npy" for place in range(len(names))) for number in range(len(samples))
    )
    return Job(model="model.onnx", inputs=tuple(names), feeds=files)


def _variants(bundle: Path, whole: Job, folder: Path, options: SessionOptions) -> dict[str, Played]:
    """The whole model in forms that are equal but for roundings; forms that do not run are left out."""
    jobs = {name: dataclasses.replace(whole, level=level) for name, level in _LEVELS.items()}
    model = load_model(bundle / "model.onnx")
    forms = {f"float constants a rounding away, {seed}": nudged(model, seed) for seed in range(_NOISES)}
    summed, sums = with_arm_sums(model)
    if sums:
        forms[_ARM] = summed
    for number, (name, form) in enumerate(forms.items()):
        if form is not None:
            path = folder / f"form{number}" / "model.onnx"
            path.parent.mkdir()
            save_model(form, path, with_shapes=False)
            jobs[name] = dataclasses.replace(whole, model=str(path))
    stage = Stage(runs=on_this_machine, bundle=bundle, folder=folder, options=options)
    played = play(tuple(jobs.values()), stage)
    return {name: item for name, item in zip(jobs, played, strict=True) if item.error is None}


def _baseline_outputs(
    named: str | None, samples: Sequence[Feeds], manifest: Manifest, reporter: Reporter
) -> tuple[Feeds, ...] | None:
    if named is None:
        return None
    opened = open_named(named, reporter, threads=1)
    session = opened.session()
    known = {spec.name: spec.dtype for spec in session.inputs}
    wanted = [spec.name for spec in manifest.model.outputs]
    return tuple(
        session.run(
            {name: array.astype(known.get(name, array.dtype.name)) for name, array in feeds.items()}, wanted
        )
        for feeds in samples
    )


def _runtime_version(device: SshDevice) -> str | None:
    return device.python().runtime_version
