"""Inputs that the JAX tests share, and what it takes to compare them: those of xmoe.testing."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from xmoe.comparison import as_numpy
from xmoe.testing import KERNEL_TIER, KINDS, values
from xmoe.testing import assert_same_bytes as assert_same_operand

__all__ = ["KERNEL_TIER", "KINDS", "assert_same_operand", "bytes_of", "values"]


def bytes_of(x: Any) -> NDArray[np.uint8]:
    """Of a NumPy, JAX or torch array, in the order of its elements."""
    return np.ascontiguousarray(as_numpy(x)).view(np.uint8)
