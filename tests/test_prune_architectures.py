"""Tiny architectures pruned at random: the check of benchmarks/coverage.py, without torchvision and timm."""

import dataclasses

import pytest
from edgepress.benchmarks.coverage_trial import try_cut
from edgepress.graph.cleanup import exact_cleanup
from edgepress.graph.load import load_model
from edgepress.graph.passes import run_passes

pytest.importorskip("torch")
pytest.importorskip("transformers")

from edgepress.benchmarks import coverage_nets
from edgepress.benchmarks.coverage_nets import Entry, build, export, sample_feeds

QUICK = ("ViT", "ResNet", "LSTM tagger", "U-Net")
SLOW = (
    "ALBERT", "BERT", "ConvNeXt", "EfficientNet", "GPT-2", "Llama-style", "MobileNet v1", "SegFormer", "Swin",
    "T5 encoder", "Whisper encoder", "wav2vec2",
)  # fmt: skip


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_tiny_architecture_is_pruned(name, tmp_path):
    listed = {entry.name: entry for entry in coverage_nets.entries() if entry.source == "own"}
    entry = listed.get(name) or Entry(name=name, source="zoo", build=name)
    module = build(entry, tiny=True)
    file = tmp_path / "model.onnx"
    export(entry, module, file, tiny=True)
    model = load_model(file)
    run_passes(model, exact_cleanup())
    feeds = sample_feeds(entry, module, tiny=True)
    samples = [{spec.name: sample[spec.name] for spec in model.inputs} for sample in feeds]
    trial = try_cut(model, samples)
    assert trial.failure == ""
    assert trial.macs_left_fraction <= 0.7
    again = try_cut(model, samples)
    assert dataclasses.replace(again, coupling_s=0.0) == dataclasses.replace(trial, coupling_s=0.0)


def test_the_list_of_architectures_is_long_and_its_names_are_its_own():
    names = [entry.name for entry in coverage_nets.entries()]
    assert len(names) >= 40
    assert len(set(names)) == len(names)
