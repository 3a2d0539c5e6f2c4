"""What the implementations promise of each other: one table, which the command, the tests and docs/parity.md go by."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from numpy.typing import NDArray

from xmoe.operands import QuantizedOperand
from xmoe.testing import KERNEL_TIER, Gemm

ORACLE = "oracle"
SYSTEMS = {
    ORACLE: "NumPy: quantizers by the book, GEMMs in float64 (xmoe/oracle.py)",
    "torch-emulated": "PyTorch without kernels (kernels/emulation.py)",
    "torch-triton": "PyTorch with the kernels that the dispatch table gives; on GPUs of capability 8.9 or newer",
    "jax": "plain JAX (jax_frontend/emulation.py)",
    "jax-bridge": "JAX through PyTorch's implementation: the kernels on a GPU, the emulation on a CPU",
}
"""The implementations, by name."""
RESULTS = ("out", "dA", "dB")
"""Of a grouped GEMM and its backward."""

What = Literal["operands", "results"]


class System(Protocol):
    """One implementation of one recipe on one device."""

    name: str
    """One of `SYSTEMS`."""
    runs: str
    """What computes, and where: "triton-fp8 on cuda". Two systems that run the same must give the same bits."""

    def operands(self, inputs: Gemm) -> dict[str, QuantizedOperand[NDArray[Any]]]:
        """The quantized operands that leave it, in the oracle's layouts: {"A rows", "dOut rows", "B along K",
        "B along N", "A tokens", "dOut tokens"} or some of them; none of bf16."""
        ...

    def results(self, inputs: Gemm) -> dict[str, NDArray[Any]]:
        """out [M, N], dA [M, K] and dB [G, K, N]."""
        ...


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of the contract."""

    what: What
    pair: str
    """Which two systems, in words."""
    least_db: float | None
    """The SQNR that every array reaches, the first system as the reference. None: the same bytes."""
    why: str

    @property
    def demand(self) -> str:
        return "equal bytes" if self.least_db is None else f"at least {self.least_db:g} dB"


OPERANDS = Rule("operands", "any two", None, "scales and casts are exact integer rules, the same everywhere")
SAME_CODE = Rule("results", "two that run the same code", None, "the bridge hands XLA's buffers to the same kernels")
ANY_TWO = Rule("results", "any other two", KERNEL_TIER, "float32 sums in another order, then one rounding to bfloat16")

CONTRACT: tuple[Rule, ...] = (OPERANDS, SAME_CODE, ANY_TWO)
"""The first rule that fits is the one that counts."""


def rule_of(what: What, a: System, b: System) -> Rule:
    """What the pair has to keep."""
    if what == "operands":
        return OPERANDS
    return SAME_CODE if a.runs == b.runs else ANY_TWO


def contract_table() -> str:
    """The contract as a Markdown table, as docs/parity.md has it."""
    rows: Sequence[tuple[str, ...]] = [
        ("what", "between", "must be", "because"),
        ("---",) * 4,
        *((rule.what, rule.pair, rule.demand, rule.why) for rule in CONTRACT),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
