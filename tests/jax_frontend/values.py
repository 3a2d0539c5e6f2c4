"""Inputs that the JAX tests share, and what it takes to compare them: those of xmoe.testing."""

from xmoe.testing import KERNEL_TIER, KINDS, values
from xmoe.testing import assert_same_bytes as assert_same_operand

__all__ = ["KERNEL_TIER", "KINDS", "assert_same_operand", "values"]
