"""Where the Triton kernels run in a test: in the CPU interpreter, or on a GPU (`pytest -m gpu`)."""

from typing import Any

import ml_dtypes
import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import TensorHandle


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


INTERPRETER_WORKS = _release(triton.__version__) >= (3, 7) or _release(np.__version__) < (2, 4)
"""Triton 3.6's interpreter turns arrays into scalars in a way that numpy 2.4 forbids."""


class Interpreter:
    """Triton's CPU interpreter. Two of its own conversions are wrong and stay out of these tests: bf16 subnormals
    become zero on a load, and rounding to bf16 truncates."""

    device = torch.device("cpu")
    hardware = False


class Gpu:
    """The kernels as compiled."""

    device = torch.device("cuda", 0)
    hardware = True


def interpreted_dot_scaled(a, a_scale, a_format, b, b_scale, b_format, acc) -> Any:
    """`tl.dot_scaled` of e4m3 a [M, K] and b [K, N] with E8M0 scales [M, K/32] and [N, K/32], padding and all."""
    assert a_format == b_format == "e4m3", f"{a_format} and {b_format}: only e4m3 here"

    def values(data: np.ndarray, scale: np.ndarray) -> np.ndarray:
        factor = np.repeat(scale.astype(np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float64), 32, 1)
        return data.astype(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64) * factor

    left, right = values(a.handle.data, a_scale.handle.data), values(b.handle.data.T.copy(), b_scale.handle.data)
    return tl.tensor(TensorHandle((acc.handle.data + left @ right.T).astype(np.float32), tl.float32), acc.type)


def same_bytes(x: torch.Tensor, expected: np.ndarray) -> bool:
    """Whether a tensor and an oracle array hold the same bytes in the same shape."""
    got = x.detach().cpu().flatten().view(torch.uint8).numpy()
    want = np.ascontiguousarray(expected).view(np.uint8)
    return tuple(x.shape) == expected.shape and np.array_equal(got.ravel(), want.ravel())


def awkward(rows: int, cols: int, seed: int = 0, poison: bool = True) -> torch.Tensor:
    """float32 [rows, cols] over forty powers of two, with zero, negative-zero, tiny, huge and poisoned rows."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, cols, generator=generator)
    x *= torch.exp2(torch.randint(-20, 20, (rows, 1), generator=generator).float())
    special = [0.0, -0.0, 1e-30, 1e-38, 3e38, 448.0, 464.0]
    for row, value in zip(range(1, rows, 3), special, strict=False):
        x[row] = value if value > 1 else x[row] * value
    if poison and rows > 24:
        x[22, cols // 2], x[24, 0] = float("nan"), float("-inf")
    return x


def arrays(x: torch.Tensor) -> np.ndarray:
    """The tensor for the oracle: bf16 becomes float32, which holds it exactly."""
    return x.detach().cpu().float().numpy()
