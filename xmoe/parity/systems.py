"""The implementations that this machine has."""

import importlib.util
from typing import Any

from numpy.typing import NDArray

from xmoe import oracle
from xmoe.config import GroupedMMConfig
from xmoe.operands import QuantizedOperand
from xmoe.parity.contract import ORACLE, System
from xmoe.testing import Gemm


class Oracle:
    """The NumPy oracle; its results are float64, without the last rounding."""

    name, runs = ORACLE, "numpy"

    def __init__(self, config: GroupedMMConfig) -> None:
        self._config = config

    def operands(self, inputs: Gemm) -> dict[str, QuantizedOperand[NDArray[Any]]]:
        fmt, (A, B, offs, dOut) = self._config.format, inputs
        if fmt == "bf16":
            return {}
        made = {
            "A rows": oracle.quantize_rows(A, fmt),
            "dOut rows": oracle.quantize_rows(dOut, fmt, axis="N"),
            "B along K": oracle.quantize_weights(B, "K", fmt),
            "B along N": oracle.quantize_weights(B, "N", fmt),
        }
        if not self._config.wgrad_with_hp:
            made |= {f"{name} tokens": oracle.quantize_tokens(x, offs, fmt) for name, x in (("A", A), ("dOut", dOut))}
        return made

    def results(self, inputs: Gemm) -> dict[str, NDArray[Any]]:
        A, B, offs, dOut = inputs
        return {
            "out": oracle.forward(A, B, offs, self._config),
            "dA": oracle.dgrad(dOut, B, offs, self._config),
            "dB": oracle.wgrad(A, dOut, offs, self._config),
        }


def find_systems(config: GroupedMMConfig, device: str = "auto") -> list[System]:
    """Those that can run ``config`` here, the oracle first.

    Args:
        device: "cpu", or "auto": a framework's GPU where it finds one.
    """
    found: list[System] = [Oracle(config)]
    if importlib.util.find_spec("torch"):
        from xmoe.torch_backend import parity as of_torch

        found += of_torch.systems(config, device)
    if importlib.util.find_spec("jax"):
        from xmoe.jax_frontend import parity as of_jax

        found += of_jax.systems(config, device)
    return found


def missing() -> list[str]:
    """Which frameworks are not installed, and what installs them."""
    extras = {"torch": "pip install torch", "jax": 'pip install "xmoe[jax]"'}
    return [f"{name} is not installed ({how})" for name, how in extras.items() if not importlib.util.find_spec(name)]
