"""What the tests of pruning share: small graphs, their groups by name, and cut against mask."""

import numpy as np
import onnx
from compress_case import parse, random, session
from edgepress.compress.prune.coupling import couple
from edgepress.compress.prune.cut import cut, mask, nothing_removed
from edgepress.graph.save import to_bytes

__all__ = ["agree", "coupled", "cut", "group", "half", "parse", "random", "removing", "session", "weights"]


def weights(**shapes):
    """Normal weights by name, each of its own numbers."""
    return {name: random(place, *shape, scale=0.5) for place, (name, shape) in enumerate(shapes.items())}


def coupled(text, arrays=None, opset=20, **shapes):
    """The coupling of a graph in text form, with random weights of these shapes."""
    return couple(parse(text, weights(**shapes) | (arrays or {}), opset))


def group(coupling, name):
    """The only group that this weight names, makers first."""
    (found,) = (item for item in coupling.groups if item.name == name and item.blocked is None)
    return found


def removing(coupling, picks):
    """Flags that remove these positions of these groups: {weight: positions}."""
    removed = nothing_removed(coupling)
    for name, positions in picks.items():
        units = group(coupling, name).units
        removed[[units[position] for position in positions]] = True
    return removed


def half(coupling, seed=0, *, streams=True, normalised=False):
    """Flags that remove a random half of every group, never a whole one."""
    rng = np.random.default_rng(seed)
    removed = nothing_removed(coupling)
    for item in coupling.groups:
        if item.blocked is None and (normalised or not item.normalised):
            if item.kind == "stream" and not streams:
                continue
            count = min(max(1, len(item.units) // 2), len(item.units) - 1)
            removed[rng.permutation(item.units)[:count]] = True
    return removed


def agree(coupling, removed, feeds, *, tolerance=2e-5):
    """Cut and mask agree on each of the inputs, keep the interface, and differ from the whole model.

    Returns:
        The cut model.
    """
    model = coupling.model
    before = model.structure_hash()
    pruned, masked = cut(coupling, removed), mask(coupling, removed)
    assert model.structure_hash() == before
    assert (pruned.inputs, pruned.outputs) == (model.inputs, model.outputs)
    assert to_bytes(cut(coupling, removed)) == to_bytes(pruned)
    onnx.checker.check_model(onnx.load_from_string(to_bytes(pruned)), full_check=True)
    sessions = [session(item) for item in (masked, pruned, model)]
    moved = False
    for sample in feeds if isinstance(feeds, list) else [feeds]:
        wanted, found, whole = (item.run(None, sample) for item in sessions)
        for expected, got, first in zip(wanted, found, whole, strict=True):
            assert got.shape == expected.shape == first.shape
            np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)
            moved |= not np.allclose(got, first, rtol=1e-3, atol=1e-3)
    assert moved == bool(removed.any())
    return pruned
