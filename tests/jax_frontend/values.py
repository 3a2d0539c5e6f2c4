"""Inputs that the JAX tests share, and what it takes to compare them."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from xmoe.operands import QuantizedOperand

KERNEL_TIER = 50.0
"""dB against the oracle on the same quantized operands, with bfloat16 output (docs/design.md)."""


def values(kind: str, shape: tuple[int, ...], seed: int = 0) -> NDArray[np.float32]:
    """float32 of one kind: "normal", "wide" (every exponent), "subnormal", "bits" (any), "poisoned" or "zero"."""
    rng = np.random.default_rng(seed)
    sign = rng.integers(0, 2, shape, dtype=np.uint32) << np.uint32(31)
    x = rng.standard_normal(shape).astype(np.float32)
    if kind == "wide":
        return ((rng.integers(0, 255 << 23, shape, dtype=np.uint32)) | sign).view(np.float32)
    if kind == "subnormal":  # up to the least normals
        return (rng.integers(0, 1 << 24, shape, dtype=np.uint32) | sign).view(np.float32)
    if kind == "bits":  # among them NaNs and infinities
        return rng.integers(0, 1 << 32, shape, dtype=np.uint32).view(np.float32)
    if kind == "poisoned":
        where = rng.random(shape)
        x[where < 0.01] = np.nan
        x[where > 0.99] = -np.inf
    if kind == "zero":
        x[:] = 0
        x[::2] = -0.0
    return x


KINDS = ("normal", "wide", "subnormal", "bits", "poisoned", "zero")


def bytes_of(x: Any) -> NDArray[np.uint8]:
    """Of a NumPy, JAX or torch array, in the order of its elements."""
    if isinstance(x, torch.Tensor):
        return x.contiguous().view(torch.uint8).numpy()
    return np.ascontiguousarray(np.asarray(x)).view(np.uint8)


def assert_same_operand(got: QuantizedOperand[Any], want: QuantizedOperand[Any]) -> None:
    """Equal bytes of data and scale, shapes, axis and format."""
    for name in ("data", "scale"):
        x, y = getattr(got, name), getattr(want, name)
        assert tuple(x.shape) == tuple(y.shape), name
        np.testing.assert_array_equal(bytes_of(x), bytes_of(y), err_msg=name)
    assert (got.axis, got.format) == (want.axis, want.format), "axis and format"
