"""Tiny nets of transformers through the product: exported, cleaned up, fused, and compiled to INT8."""

import numpy as np
import pytest
from edgepress.compress.lower import fusion_passes
from edgepress.compress.recipe import DriftLimit, Recipe
from edgepress.driver.compile import compile_model
from edgepress.graph.cleanup import exact_cleanup
from edgepress.graph.load import load_model
from edgepress.graph.passes import run_passes
from edgepress.runtimes.ort_runtime import OrtSession
from edgepress.targets.registry import load_target

pytest.importorskip("torch")
pytest.importorskip("transformers")

from edgepress.benchmarks.zoo import architecture, vocabulary_of

QUICK = ("ViT", "ResNet")
SLOW = (
    "BERT", "ALBERT", "DeBERTa-v2", "Swin", "ConvNeXt", "MobileNet v1", "EfficientNet", "SegFormer",
    "Whisper encoder", "wav2vec2", "T5 encoder", "GPT-2", "Llama-style",
)  # fmt: skip
# What clean-up and fusion must find, of (operator, how often it is left).
LEFT = {
    "BERT": {"Gelu": 2, "LayerNormalization": 5, "IsNaN": 0, "Gemm": 0, "GatherND": 0},
    "ALBERT": {"Gelu": 2, "Tanh": 1, "Gemm": 0},
    "ViT": {"Gelu": 2, "LayerNormalization": 5, "IsNaN": 0, "Gemm": 0},
    "EfficientNet": {"ReduceMean": 0, "AveragePool": 0, "GlobalAveragePool": 4, "BatchNormalization": 0},
    "GPT-2": {"Gelu": 2, "Gemm": 0, "IsNaN": 0, "Tanh": 0},
    "ResNet": {"BatchNormalization": 0},
    "Llama-style": {"IsNaN": 0, "GatherND": 0},
}
# The weights are random: this bounds wrong arithmetic, not what a trained model loses.
LARGEST_L2 = 0.06


@pytest.fixture(
    scope="module", params=[*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def net(request, tmp_path_factory):
    """(architecture, exported file, three pairs of inputs and torch's outputs)."""
    item = architecture(request.param)
    module = item.build()
    file = tmp_path_factory.mktemp("net") / "model.onnx"
    item.export(module, file)
    ids = vocabulary_of(module)
    samples = [
        item.feeds(batch, size, vocabulary=ids, seed=seed) for seed, (batch, size) in enumerate(item.shapes())
    ]
    return item, file, [(feeds, item.run(module, feeds)) for feeds in samples]


def test_clean_up_and_fusion_keep_what_torch_computes(net):
    item, file, samples = net
    model = load_model(file)
    before = [node.op_type for node in model.graph.all_nodes()]
    run_passes(model, exact_cleanup())
    run_passes(model, fusion_passes(model, load_target("raspberry-pi-5"), {}))
    found = [node.op_type for node in model.graph.all_nodes()]
    assert len(found) <= len(before) + before.count("Gemm")  # each may become MatMul + Add
    assert {op: found.count(op) for op in LEFT.get(item.name, {})} == LEFT.get(item.name, {})
    session = OrtSession.from_model(model)
    for feeds, expected in samples:
        results = session.run({spec.name: feeds[spec.name] for spec in model.inputs})
        for wanted, got in zip(expected, results.values(), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


def test_int8_runs_in_integers_and_near_to_float(net, tmp_path):
    _, file, samples = net
    feeds = samples[0][0]
    recipe = Recipe(
        target="raspberry-pi-5",
        precision="int8",
        data_free=True,
        samples=6,
        max_drift=(DriftLimit(metric="l2", limit=LARGEST_L2),),
        skip=("benchmark", "golden"),
        shapes={spec.name: feeds[spec.name].shape for spec in load_model(file).inputs},
    )
    result = compile_model(file, target="raspberry-pi-5", output=tmp_path / "out", recipe=recipe)
    assert result.drift.l2 <= LARGEST_L2
    assert result.plan.integer_share() > 0.7
    reasons = [item.reason for item in result.plan.decisions if item.form == "float"]
    assert not [reason for reason in reasons if "the runtime does not turn it" in reason]
    assert not [reason for reason in reasons if "drift" in reason]
    assert not [note for note in result.notes if "changed the results" in note]
