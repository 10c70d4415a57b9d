"""Torch-Pruning on a CIFAR-10 ResNet from its .th checkpoint: channels inside blocks, no fine-tuning.

The blocks' inner channels are pruned globally until the net has so many times fewer multiply-accumulates.
Channels that shortcuts join stay: they are padded there (option A), which Torch-Pruning cannot follow.
"""

# mypy: ignore-errors
# torch and torch_pruning are those of the peer's own environment; their types are not ours to check.

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch_pruning
from torch import nn

Feeds = dict[str, npt.NDArray[Any]]
_STEPS = 100
_SCORED = 512
_BATCH = 128


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut that is padded with zero channels where it widens."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.more = stride, outputs - inputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (images, channels, height, width) to the same, or to half the height and width."""
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        if self.more:
            x = x[:, :, :: self.stride, :: self.stride]
            x = nn.functional.pad(x, (0, 0, 0, 0, self.more // 2, self.more // 2))
        return torch.relu(y + x)


class ResNet(nn.Module):
    """The 6n+2 layers of He et al. 2016 (arXiv:1512.03385, §4.2), names as in the checkpoints."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        count = (depth - 2) // 6
        self.layer1 = _stage(16, 16, 1, count)
        self.layer2 = _stage(16, 32, 2, count)
        self.layer3 = _stage(32, 64, 2, count)
        self.linear = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images, shape (images, 3, 32, 32), to scores, shape (images, 10)."""
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))


def _stage(inputs: int, outputs: int, stride: int, count: int) -> nn.Sequential:
    first = Block(inputs, outputs, stride)
    return nn.Sequential(first, *(Block(outputs, outputs, 1) for _ in range(count - 1)))


def macs_of(net: nn.Module) -> int:
    """Multiply-accumulates of one image."""
    counts = []

    def count(layer: nn.Module, _inputs: object, output: torch.Tensor) -> None:
        counts.append(layer.weight.numel() * output[0, 0].numel())

    hooks = [
        layer.register_forward_hook(count)
        for layer in net.modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear))
    ]
    with torch.no_grad():
        net.eval()(torch.zeros(1, 3, 32, 32))
    for hook in hooks:
        hook.remove()
    return sum(counts)


def pruned(net: ResNet, ratio: float, importance: Any, labelled: tuple[torch.Tensor, torch.Tensor]) -> ResNet:
    """A copy with so many times fewer multiply-accumulates; scored anew before each of up to 100 steps."""
    net = copy.deepcopy(net).eval()
    whole = macs_of(net)
    outer = [net.conv1, net.linear]
    outer += [block.conv2 for block in net.modules() if isinstance(block, Block)]
    pruner = torch_pruning.pruner.BasePruner(
        net,
        torch.zeros(1, 3, 32, 32),
        importance=importance,
        global_pruning=True,
        pruning_ratio=0.9,
        max_pruning_ratio=0.95,
        iterative_steps=_STEPS,
        ignored_layers=outer,
    )
    for _ in range(_STEPS):
        if isinstance(importance, torch_pruning.importance.GroupTaylorImportance):
            net.zero_grad()
            for images, labels in zip(*(part.split(_BATCH) for part in labelled), strict=True):
                nn.functional.cross_entropy(net(images), labels, reduction="sum").backward()
        pruner.step()
        if whole >= ratio * macs_of(net):
            return net
    raise RuntimeError(f"Torch-Pruning stops at {whole / macs_of(net):.2f} times fewer multiply-accumulates")


def normalised_anew(net: ResNet, images: torch.Tensor) -> ResNet:
    """A copy whose BatchNorm statistics are those of the images."""
    net = copy.deepcopy(net).train()
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.momentum = None
    with torch.no_grad():
        for part in images.split(_BATCH):
            net(part)
    return net.eval()


def save(net: ResNet, file: Path) -> None:
    """The net as .onnx, normalisation folded by the exporter, of any number of images."""
    torch.onnx.export(
        net.eval(),
        (torch.zeros(1, 3, 32, 32),),
        str(file),
        input_names=["input"],
        output_names=["logits"],
        dynamic_axes={"input": {0: "N"}, "logits": {0: "N"}},
        opset_version=17,
        dynamo=False,
    )


def prepare(request: dict[str, str], samples: list[Feeds]) -> list[dict[str, Any]]:
    """Group L1, Taylor with labels, and both with BatchNorm statistics estimated anew, at equal MACs."""
    torch.manual_seed(0)
    settings = json.loads(Path(request["settings"]).read_text(encoding="utf-8"))
    torch.set_num_threads(settings["threads"])
    net = ResNet(settings["depth"])
    stored = torch.load(request["model"], map_location="cpu", weights_only=True)["state_dict"]
    net.load_state_dict({name.removeprefix("module."): value for name, value in stored.items()})
    (sample,) = samples
    images = torch.from_numpy(sample["input"])
    labels = torch.from_numpy(sample["labels"].astype(np.int64))
    labelled = images[:_SCORED], labels[:_SCORED]
    nets: dict[str, ResNet] = {}
    for name, importance in (
        ("group L1", torch_pruning.importance.GroupMagnitudeImportance(p=1)),
        ("Taylor", torch_pruning.importance.GroupTaylorImportance()),
    ):
        nets[f"Torch-Pruning, {name}"] = found = pruned(net, settings["ratio"], importance, labelled)
        nets[f"Torch-Pruning, {name}, BatchNorm anew"] = normalised_anew(found, images)
    forms = []
    for index, (name, found) in enumerate(nets.items()):
        file = Path(request["output"]) / f"torch-pruning-{index}.onnx"
        save(found, file)
        options = {
            "macs": macs_of(found),
            "parameters": sum(values.numel() for values in found.parameters()),
        }
        forms.append(
            {"name": name, "program": "onnxruntime_file.py", "files": [str(file)], "options": options}
        )
    return forms
