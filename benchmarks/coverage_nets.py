"""The nets of coverage.toml: built with random weights, exported, and inputs for them."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from edgepress.benchmarks import zoo

Array = npt.NDArray[Any]
LIST = Path(__file__).with_name("coverage.toml")
# The last scale of a residual branch: without a small one a deep random net magnifies rounding.
_LAST_NORMS = {"Bottleneck": "bn3", "BasicBlock": "bn2"}
_RESIDUAL_SCALE = 0.2
_NOTHING = 1e-3


_MORE_OF_TRANSFORMERS = (
    zoo.Architecture(
        name="Mistral-style",
        model="MistralForCausalLM",
        config="MistralConfig",
        kind="text",
        tiny={
            "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2,
            "intermediate_size": 192, "vocab_size": 500, "head_dim": 16, "sliding_window": None,
        },
        full={
            "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 4,
            "intermediate_size": 2048, "sliding_window": None,
        },
        common={"use_cache": False},
        arguments={"use_cache": False},
    ),
)  # fmt: skip


class Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One net of the list.

    Attributes:
        name: as it appears in the table.
        source: "zoo" (transformers, by the name in zoo.py), "torchvision" (a dotted path below it),
            "timm" (a model name) or "own" (a function of coverage_own.py).
        build: what to build there.
        arguments: of the builder, both forms; "none" is Python's None, which TOML lacks.
        tiny: further arguments of the tiny form.
        side: pixels of a side of the image, (full, tiny).
        part: attribute of the module that is exported instead of it.
    """

    name: str
    source: str
    build: str
    arguments: dict[str, Any] = {}
    tiny: dict[str, Any] = {}
    side: tuple[int, int] = (96, 64)
    part: str | None = None


class _List(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    net: tuple[Entry, ...]


def entries() -> tuple[Entry, ...]:
    """The list, in its order."""
    return msgspec.convert(tomllib.loads(LIST.read_text(encoding="utf-8")), _List).net


def architecture(name: str) -> zoo.Architecture:
    """A net of transformers: of zoo.py, or one that only this list has.

    Raises:
        KeyError: if there is none of the name.
    """
    more = {item.name: item for item in _MORE_OF_TRANSFORMERS}
    return more[name] if name in more else zoo.architecture(name)


def use_site(site: Path | None) -> None:
    """Make torchvision and timm importable from a folder, beside a torch that was built for the CPU.

    torchvision's compiled operators do not load beside another build of torch; only its definitions of
    nets are used here, so what describes those operators to the compiler is left out.
    """
    import torch

    if site is not None and str(site) not in sys.path:
        sys.path.append(str(site))
    register: Any = torch.library.register_fake

    def quietly(name: Any, *arguments: Any, **more: Any) -> Any:
        if isinstance(name, str) and name.startswith("torchvision::"):
            return lambda function: function
        return register(name, *arguments, **more)

    torch.library.register_fake = quietly


def build(entry: Entry, *, tiny: bool, seed: int = 0) -> Any:
    """The module in evaluation mode, every parameter and running statistic random."""
    if entry.source == "zoo":
        return architecture(entry.build).build(full=not tiny, seed=seed)
    with zoo.quiet():
        import torch

        torch.manual_seed(seed)
        given = {**entry.arguments, **(entry.tiny if tiny else {})}
        arguments = {name: None if value == "none" else value for name, value in given.items()}
        module = _builder(entry)(**arguments)
        module = module if entry.part is None else getattr(module, entry.part)
        randomise(module.eval())
        return module


def _builder(entry: Entry) -> Callable[..., Any]:
    if entry.source == "timm":
        import timm

        return lambda **arguments: timm.create_model(entry.build, **arguments)
    if entry.source == "torchvision":
        import importlib

        folder, _, name = f"torchvision.models.{entry.build}".rpartition(".")
        found: Callable[..., Any] = getattr(importlib.import_module(folder), name)
        return found
    from edgepress.benchmarks import coverage_own

    own: Callable[..., Any] = getattr(coverage_own, entry.build)
    return own


def randomise(module: Any) -> None:
    """Random biases, norm scales and shifts, running statistics, and what starts at (almost) zero."""
    import torch

    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1 or float(parameter.abs().max()) < _NOTHING:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn_like(buffer) * 0.1)
            elif name.endswith("running_var"):
                buffer.copy_(torch.rand_like(buffer) + 0.5)
        for block in module.modules():
            last: Any = getattr(block, _LAST_NORMS.get(type(block).__name__, "-"), None)
            if isinstance(getattr(last, "weight", None), torch.Tensor):
                last.weight.mul_(_RESIDUAL_SCALE)


def sample_feeds(entry: Entry, module: Any, *, tiny: bool) -> list[dict[str, Array]]:
    """Two samples of different batch (and length, where there is one)."""
    if entry.source == "zoo":
        item = architecture(entry.build)
        shapes = item.shapes(full=not tiny)[:2]
        ids = zoo.vocabulary_of(module)
        return [item.feeds(*shape, vocabulary=ids, seed=seed) for seed, shape in enumerate(shapes)]
    random = np.random.default_rng(0)
    if entry.source == "own" and hasattr(module, "example"):
        return [module.example(random, batch) for batch in (1, 2)]
    side = entry.side[1 if tiny else 0]
    return [{"images": random.standard_normal((batch, 3, side, side)).astype(np.float32)} for batch in (1, 2)]


def export(entry: Entry, module: Any, file: Path, *, tiny: bool) -> None:
    """Write the ONNX form with a dynamic batch.

    Raises:
        Exception: whatever torch.onnx.export raises.
    """
    if entry.source == "zoo":
        architecture(entry.build).export(module, file, full=not tiny)
        return
    with zoo.quiet():
        import torch

        feeds = sample_feeds(entry, module, tiny=tiny)[1]
        program = torch.onnx.export(
            module,
            tuple(torch.from_numpy(array) for array in feeds.values()),
            dynamic_shapes=tuple({0: torch.export.Dim("batch")} for _ in feeds),
            input_names=list(feeds),
            dynamo=True,
            opset_version=zoo.OPSET,
            verbose=False,
        )
        assert program is not None
        program.save(str(file), external_data=not tiny)


def named(entries_: tuple[Entry, ...]) -> Mapping[str, Entry]:
    """Entries by name."""
    return {entry.name: entry for entry in entries_}
