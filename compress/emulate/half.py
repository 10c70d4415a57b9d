"""float16 arithmetic as Arm cores with asimdhp do it: products added in float16, one after another.

onnxruntime 1.31.1 computes MatMul, Gemm and Conv in float16 with FMLA.8H there: each step rounds
acc + a * b once to float16. Its results under QEMU -cpu cortex-a76 are equal bit by bit to these
functions', except Gemm with transB, which adds in another order. On x86 the same file is computed in
float32, an order of magnitude closer to the exact result.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

HalfArray = npt.NDArray[np.float16]


def matmul_float16(left: HalfArray, right: HalfArray, bias: HalfArray | None = None) -> HalfArray:
    """left @ right (+ bias), accumulated in float16 along K in order, starting from the bias.

    Source: IEEE 754-2019, section 5.4.1 (fusedMultiplyAdd); a product of two float16 numbers is exact
    in float64, and so is its sum with a float16 number unless their exponents are more than 31 apart.

    Args:
        left: (..., M, K).
        right: (..., K, N); leading axes broadcast as in numpy.matmul.
        bias: anything that broadcasts to (..., M, N), or None for zero.

    Returns:
        float16 (..., M, N).
    """
    a, b = np.asarray(left, np.float64), np.asarray(right, np.float64)
    shape = (*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
    total = np.zeros(shape) if bias is None else np.array(np.broadcast_to(bias, shape), np.float64)
    step, half = np.empty(shape), np.empty(shape, np.float16)
    with np.errstate(over="ignore", invalid="ignore"):  # an overflow is infinite, as it is on the core
        for k in range(a.shape[-1]):
            np.multiply(a[..., :, k, None], b[..., None, k, :], out=step)
            step += total
            half[...] = step
            total[...] = half
    return total.astype(np.float16)


def conv_float16(
    data: HalfArray,
    weight: HalfArray,
    bias: HalfArray | None = None,
    *,
    strides: Sequence[int] = (1, 1),
    pads: Sequence[int] = (0, 0, 0, 0),
    dilations: Sequence[int] = (1, 1),
    group: int = 1,
) -> HalfArray:
    """A 2-d convolution accumulated in float16: kernel rows, kernel columns, then input channels.

    Args:
        data: (N, C, H, W).
        weight: (O, C / group, KH, KW).
        bias: (O,), what the sums start from.
        strides: two.
        pads: top, left, bottom, right.
        dilations: two.
        group: divides C and O.

    Returns:
        float16 (N, O, OH, OW).
    """
    patches = _patches(data, weight.shape[2:], strides, pads, dilations)  # (N, OH, OW, KH, KW, C)
    count, height, width = patches.shape[:3]
    outputs, inputs = weight.shape[0] // group, weight.shape[1]
    found = np.empty((count, height, width, weight.shape[0]), np.float16)
    for index in range(group):
        part = patches[..., index * inputs : (index + 1) * inputs].reshape(count * height * width, -1)
        rows = slice(index * outputs, (index + 1) * outputs)
        matrix = weight[rows].transpose(2, 3, 1, 0).reshape(-1, outputs)
        sums = matmul_float16(part, matrix, None if bias is None else bias[rows])
        found[..., rows] = sums.reshape(count, height, width, outputs)
    return found.transpose(0, 3, 1, 2)


def _patches(
    data: HalfArray,
    window: Sequence[int],
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
) -> HalfArray:
    top, left, bottom, right = pads
    padded = np.pad(data, ((0, 0), (0, 0), (top, bottom), (left, right)))
    spread = [(size - 1) * gap + 1 for size, gap in zip(window, dilations, strict=True)]
    views = np.lib.stride_tricks.sliding_window_view(padded, spread, axis=(2, 3))
    views = views[:, :, :: strides[0], :: strides[1], :: dilations[0], :: dilations[1]]
    return views.transpose(0, 2, 3, 4, 5, 1)
