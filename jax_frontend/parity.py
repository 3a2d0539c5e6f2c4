"""JAX's part of ``xmoe parity``: the pure-JAX path and the bridge.

M tokens, K contraction of the forward, N output features, G groups.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from xmoe.config import GroupedMMConfig
from xmoe.jax_frontend import bridge, emulation
from xmoe.jax_frontend.plan import Engine
from xmoe.jax_frontend.ragged_dot import ragged_dot
from xmoe.operands import QuantizedOperand
from xmoe.parity.layouts import tokens_operand
from xmoe.testing import Gemm

Operands = dict[str, QuantizedOperand[NDArray[Any]]]


def systems(config: GroupedMMConfig, device: str) -> list["JaxSystem"]:
    """The pure-JAX path and, where torch can be imported and reaches the device ("auto": JAX's first), the bridge."""
    on = jax.devices("cpu")[0] if device == "cpu" else jax.devices()[0]
    found = [JaxSystem("jax", config, on)]
    try:
        reachable = on.platform in ("cpu", "gpu") and not bridge.obstacle(on.platform)
    except ImportError:
        reachable = False
    return [*found, JaxSystem("jax-bridge", config, on)] if reachable else found


class JaxSystem:
    """`ragged_dot` under one config on one device, by one implementation."""

    def __init__(self, name: str, config: GroupedMMConfig, device: Any) -> None:
        self.name, self._config, self._device = name, config, device
        self._engine: Engine = "jax" if name == "jax" else "bridge"
        self.runs = f"jax on {device.platform}"
        if self._engine == "bridge":
            self._layout = bridge.implementation_of(config, device.platform)
            self.runs = f"{self._layout.name} on {'cuda' if device.platform == 'gpu' else device.platform}"

    def operands(self, inputs: Gemm) -> Operands:
        """Of the bridge the two that leave the kernels: what the backward is given of A, and of dOut in A's place."""
        fmt = self._config.format
        if fmt == "bf16":
            return {}
        if self._engine == "jax":
            with jax.default_device(self._device):
                made = _operands(fmt, not self._config.wgrad_with_hp, *inputs)
            return {name: operand.map(np.asarray) for name, operand in made.items()}
        if self._config.wgrad_with_hp:
            return {}
        A, B, offs, dOut = inputs
        pairs = (("A tokens", A, B), ("dOut tokens", dOut, B.swapaxes(1, 2)))
        with jax.default_device(self._device):
            saved = {name: _residuals(self._config, x, b, inputs.group_sizes) for name, x, b in pairs}
        return {name: self._tokens(leaves, offs, len(A)) for name, leaves in saved.items()}

    def _tokens(self, leaves: list[jax.Array], offs: NDArray[np.int32], M: int) -> QuantizedOperand[NDArray[Any]]:
        """The wgrad operand among a backward's residuals."""
        (data,) = (x for x in leaves if x.dtype == jnp.float8_e4m3fn)
        scale_dtype = jnp.float32 if self._config.format.startswith("fp8") else jnp.float8_e8m0fnu
        (scale,) = (x for x in leaves if x.dtype == scale_dtype and x.shape != data.shape and x.size)
        return tokens_operand(np.asarray(data), np.asarray(scale), offs, M, self._config.format, self._layout)

    def results(self, inputs: Gemm) -> dict[str, NDArray[Any]]:
        with jax.default_device(self._device):
            found = _results(self._config, self._engine, inputs.A, inputs.B, inputs.group_sizes, inputs.dOut)
        return dict(zip(("out", "dA", "dB"), map(np.asarray, found), strict=True))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _results(config: GroupedMMConfig, engine: Engine, A: Any, B: Any, sizes: Any, dOut: Any) -> tuple[jax.Array, ...]:
    out, vjp = jax.vjp(lambda A, B: ragged_dot(A, B, sizes, config=config, implementation=engine), A, B)
    return out, *vjp(dOut.astype(out.dtype))


@functools.partial(jax.jit, static_argnums=0)
def _residuals(config: GroupedMMConfig, x: Any, b: Any, sizes: Any) -> list[jax.Array]:
    """What the backward of the weights' gradient keeps."""
    _, vjp = jax.vjp(lambda b: ragged_dot(x, b, sizes, config=config, implementation="bridge"), b)
    return jax.tree.leaves(vjp)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _operands(fmt: str, tokens: bool, A: Any, B: Any, offs: Any, dOut: Any) -> dict[str, emulation.Operand]:
    made = {
        "A rows": emulation.quantize_rows(A, fmt),
        "dOut rows": emulation.quantize_rows(dOut, fmt, axis="N"),
        "B along K": emulation.quantize_weights(B, "K", fmt),
        "B along N": emulation.quantize_weights(B, "N", fmt),
    }
    if tokens:
        made |= {f"{name} tokens": emulation.quantize_tokens(x, offs, fmt) for name, x in (("A", A), ("dOut", dOut))}
    return made
