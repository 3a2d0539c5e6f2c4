"""PyTorch's part of ``xmoe parity``: the emulation, and on a GPU the kernels.

M tokens, K contraction of the forward, N output features, G groups.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from xmoe.config import GroupedMMConfig, KernelPreference
from xmoe.kernels import emulation, operands, pipeline
from xmoe.kernels.dispatch import select
from xmoe.operands import QuantizedOperand
from xmoe.parity.layouts import tokens_operand
from xmoe.testing import Gemm, as_numpy
from xmoe.torch_backend.grouped_gemm import scaled_grouped_mm

Operands = dict[str, QuantizedOperand[NDArray[Any]]]


def systems(config: GroupedMMConfig, device: str) -> list["TorchSystem"]:
    """The emulation of ``config`` and, where it has kernels on this device ("auto": a GPU if there is one), those."""
    on = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    emulated = dataclasses.replace(config, kernel_preference=KernelPreference.EMULATED)
    found = [TorchSystem("torch-emulated", emulated, on)]
    if select(config, pipeline.device_of(on.type, on.index)).gemm != "emulated":
        found.append(TorchSystem("torch-triton", config, on))
    return found


class TorchSystem:
    """`scaled_grouped_mm` under one config on one device."""

    def __init__(self, name: str, config: GroupedMMConfig, device: torch.device) -> None:
        self.name, self._config, self._device = name, config, device
        self._implementation = select(config, pipeline.device_of(device.type, device.index))
        self.runs = f"{self._implementation.name} on {device.type}"

    def operands(self, inputs: Gemm) -> Operands:
        fmt = self._config.format
        if fmt == "bf16":
            return {}
        A, B, offs, dOut = (to_torch(x, self._device) for x in inputs)
        emulated = self._implementation.gemm == "emulated"
        if emulated:
            rows, weights = emulation.quantize_rows, lambda B, fmt: emulation.quantize_weights(B, "K", fmt)
        else:
            rows, weights = operands.quantize_rows, operands.quantize_weights
        made = {
            "A rows": rows(A, fmt),
            "dOut rows": dataclasses.replace(rows(dOut, fmt), axis="N"),
            "B along K": weights(B, fmt),
            "B along N": dataclasses.replace(weights(B.mT, fmt), axis="N"),
        }
        found = {name: operand.map(as_numpy) for name, operand in made.items()}
        if not pipeline.saves_input(self._config):
            for name, x, weight in (("A tokens", A, B), ("dOut tokens", dOut, B.mT)):
                found[name] = self._saved_tokens(x, weight, offs, inputs.offs)
        return found

    def _saved_tokens(
        self, x: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor, ends: NDArray[np.int32]
    ) -> QuantizedOperand[NDArray[Any]]:
        """What the forward saves of x for the backward."""
        key = self._config.to_key()
        _, data, scale, _ = torch.ops.xmoe.grouped_mm_forward(x, weight, offs, key, True)
        return tokens_operand(
            as_numpy(data), as_numpy(scale), ends, x.shape[0], self._config.format, self._implementation
        )

    def results(self, inputs: Gemm) -> dict[str, NDArray[Any]]:
        A, B, offs, dOut = (to_torch(x, self._device) for x in inputs)
        A.requires_grad_()
        B.requires_grad_()
        with one_thread():
            out = scaled_grouped_mm(A, B, offs, self._config)
            out.backward(dOut.to(out.dtype))
        return {name: as_numpy(x) for name, x in (("out", out), ("dA", A.grad), ("dB", B.grad))}


def to_torch(x: NDArray[Any], device: torch.device | str = "cpu") -> torch.Tensor:
    """A copy on ``device`` in the same dtype, bfloat16 included."""
    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view(np.uint16).copy()).view(torch.bfloat16).to(device)
    return torch.from_numpy(x.copy()).to(device)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """As under the bridge: the split of a GEMM over threads may change the order of its sums."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
