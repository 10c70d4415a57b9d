"""What the tests of static INT8 operators share: a net of two convolutions with something between them."""

from __future__ import annotations

import compress_case as case
import numpy as np

C = 8
IN = "(float[2,8,8,8] x)"
WEIGHTS = {
    "w": case.random(1, C, C, 3, 3, scale=0.2),
    "b": case.random(2, C),
    "v": case.random(3, C, C, 3, 3, scale=0.2),
    "u": case.random(4, C, C, 3, 3, scale=0.2),
    "p": case.random(5, C, C, 1, 1),
    "d": case.random(6, C, 1, 3, 3),
    "g": case.random(7, C, 2, 3, 3, scale=0.3),
    "wide": case.random(8, C, 2 * C, 1, 1),
    "half": case.random(9, C, C // 2, 1, 1),
    "few": case.random(10, C, C // 4, 1, 1),
    "many": case.random(11, C, 4 * C, 1, 1, scale=0.3),
    "even": case.random(12, C, C, 4, 4, scale=0.2),
    "chan": case.random(13, 1, C, 1, 1),
    "three": np.float32(3),
    "low": np.float32(-1),
    "high": np.float32(1),
    "zero": np.float32(0),
    "six": np.float32(6),
    "twice": np.array([1, 1, 2, 2], np.float32),
    "tiles": np.array([1, 1, 2, 2]),
    "hw": np.array([2, 3]),
    "from": np.array([1, 1]),
    "to": np.array([-1, -1]),
    "one": np.array([1]),
    "edge": np.array([0, 0, 1, 2, 0, 0, 2, 1]),
    "deeper": np.array([0, 0, 1, 2, 0, C, 2, 1]),
    "turned": np.arange(C)[::-1].copy(),
    "parts": np.array([2, C - 2]),
    "mostly": case.random(14, C, C - 2, 1, 1),
    "grouped": np.array([0, 2, C // 2, 8, 8]),
    "joined": np.array([0, C, 8, 8]),
    "full": np.array([2, C, 8, 8]),
    "mask": case.random(15, 2, C, 8, 8) > 0,
    "other": case.random(16, 2, C, 8, 8),
}
SAME = "<pads = [1, 1, 1, 1]>"
FIRST = "[c1] a = Conv SAME (x, w, b) r = Relu(a)"
LAST = "[c2] y = Conv SAME (t, v)"


def net(body, outputs="(float[N,O,P,Q] y)"):
    """r comes out of the first convolution (through a Relu), t goes into the last one."""
    text = f"{IN} => {outputs} {{ {FIRST} {body} {LAST} }}"
    used = {name: array for name, array in WEIGHTS.items() if f", {name}" in text or f"({name}" in text}
    return case.parse(text.replace("SAME (", f"{SAME} ("), used), [
        {"x": case.random(90 + seed, 2, C, 8, 8)} for seed in range(2)
    ]
