"""What the differentiable ops share: the names of what they save, for `jax.checkpoint`, and an error where a second
derivative would be wrong."""

import functools
from typing import Any, TypeVar

import jax
from jax.ad_checkpoint import checkpoint_name

RESIDUAL_NAMES = ("xmoe_lhs", "xmoe_x", "xmoe_gate_up", "xmoe_h", "xmoe_amax", "xmoe_order")
"""The names of what `ragged_dot` and `swiglu_experts` save for the backward, for the policies of `jax.checkpoint`:
``jax.checkpoint_policies.save_only_these_names(*RESIDUAL_NAMES)`` spares the backward the ops' forward, unless it also
needs their output, which is called ``OUTPUT_NAME``.

- "xmoe_lhs": of `ragged_dot`, the 8-bit wgrad operand of lhs and its scales; lhs itself where the wgrad runs in bf16
- "xmoe_x", "xmoe_h": of `swiglu_experts`, the same of x and of the hidden activations (no "xmoe_h" in bf16)
- "xmoe_gate_up": of `swiglu_experts`, what the SwiGLU is of
- "xmoe_amax": maxima of weights, which spare the backward a pass over them (``fp8_rowwise`` on a GPU)
- "xmoe_order": of `swiglu_experts` with an order, the rows of each slot and the token of each row

A kernel call is all or nothing: with one of an op's names missing in the policy, its whole forward runs again.
"""

OUTPUT_NAME = "xmoe_out"
"""The name of the ops' outputs. It is known to a policy only where the op is differentiated, as are the residuals."""

_Tree = TypeVar("_Tree")


def named(name: str, tree: _Tree) -> _Tree:
    """``tree`` with each of its arrays under ``name`` for `jax.checkpoint`; another name gives what policies miss."""
    assert name in (*RESIDUAL_NAMES, OUTPUT_NAME), f"{name} is not documented in RESIDUAL_NAMES"
    return jax.tree.map(lambda x: checkpoint_name(x, name), tree)


def once_differentiable(op: str, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """``arrays``, for the forward and backward of ``op``: as they are, until somebody differentiates through them.

    Then it raises ValueError. (The quantizers work on bits, whose derivative JAX takes for zero: without this a Hessian
    would come out wrong, not fail.)
    """
    return tuple(_once_differentiable(op, x) for x in arrays)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _once_differentiable(op: str, x: jax.Array) -> jax.Array:
    return x


@_once_differentiable.defjvp
def _refuse(op: str, primals: Any, tangents: Any) -> Any:
    raise ValueError(
        f"{op} can be differentiated once, in reverse mode: its gradient is computed from quantized operands and has "
        "no derivative; for a Hessian or a gradient of a gradient use jax.lax.ragged_dot, or jax.lax.stop_gradient on "
        "what the second derivative need not see"
    )
