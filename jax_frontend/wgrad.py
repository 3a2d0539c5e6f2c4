"""`ragged_dot_wgrad`: the weight gradient of a grouped GEMM as an op of its own, to write a backward with.

M tokens, K contraction of the forward, N output features, G groups.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from xmoe.jax_frontend import bridge, emulation
from xmoe.jax_frontend.autodiff import once_differentiable
from xmoe.jax_frontend.plan import Plan, make_wgrad_plan
from xmoe.jax_frontend.ragged_dot import backward, call_op, forward, report_bad_sizes
from xmoe.jax_frontend.varying import vary_together


def ragged_dot_wgrad(
    lhs: jax.Array,
    dout: jax.Array,
    group_sizes: jax.Array,
    preferred_element_type: jax.typing.DTypeLike | None = None,
    *,
    config: Any = None,
    transpose_rhs: bool = False,
    implementation: Literal["bridge", "jax"] | None = None,
) -> jax.Array:
    """[G, K, N]: each group's rows of ``lhs``, transposed, times its rows of ``dout``; quantized by ``config``.

    What `jax.lax.ragged_dot_general` computes with a ragged contracting dimension, and, bit for bit, what the backward
    of `ragged_dot` gives for rhs under the same config. Both operands are quantized along the tokens of each group, or
    multiplied in bf16 where ``config`` computes weight gradients so. A group without rows gives exact zeros; rows past
    the last group count nowhere, whatever they hold.

    It can be differentiated, once: with the cotangent in the place of rhs, the gradient of ``dout`` is the forward of
    `ragged_dot`, and that of ``lhs`` its gradient of lhs, each quantized by ``config``. For that backward stay ``dout``
    and ``lhs`` as they are, each for the other's gradient. Inside `shard_map` the result is of the local rows: sum it
    over the axes that split the tokens.

    Args:
        lhs: [M, K], bfloat16 or float32. K and N are multiples of 16.
        dout: [M, N], bfloat16 or float32; the gradient of `ragged_dot`'s output.
        group_sizes: [G], of any integer dtype; values as in `ragged_dot`.
        preferred_element_type: bfloat16 or float32, of the result; None: the dtype of ``lhs``. (``config.out_dtype`` is
            of the forward's output, and says nothing here.)
        config: a `GroupedMMConfig`, a recipe (enum or name, see `xmoe.RECIPES`), or None for the bfloat16 baseline.
        transpose_rhs: give [G, N, K], the layout of rhs that `ragged_dot` takes with this; nothing is copied.
        implementation: as in `ragged_dot`.

    Raises:
        ValueError: at trace time, naming the argument, its value and the fix.
        ImportError: torch or Triton, which the bridge needs, cannot be imported.
    """
    plan = make_wgrad_plan(lhs, dout, group_sizes, preferred_element_type, config, transpose_rhs, implementation)
    if plan.config.debug:
        jax.debug.callback(functools.partial(report_bad_sizes, plan.M), group_sizes)
    return call_op(_wgrad, plan, *vary_together(lhs, dout, jnp.cumsum(group_sizes, dtype=jnp.int32)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _wgrad(plan: Plan, lhs: jax.Array, dout: jax.Array, offs: jax.Array) -> jax.Array:
    return _compute(plan, lhs, dout, offs)


def _compute(plan: Plan, lhs: jax.Array, dout: jax.Array, offs: jax.Array) -> jax.Array:
    if plan.engine == "bridge":
        saved = bridge.wgrad_operand(plan, lhs, offs)
    else:
        saved = emulation.wgrad_operand(lhs, offs, plan.config)
    drhs = backward(plan, dout, saved, None, offs)[1]
    assert drhs is not None, "backward gives drhs where lhs is saved"
    return drhs


def _wgrad_fwd(plan: Plan, lhs: Any, dout: Any, offs: Any) -> tuple[jax.Array, Any]:
    a, d = once_differentiable("ragged_dot_wgrad", lhs.value, dout.value)
    return _compute(plan, a, d, offs.value), (
        lhs.value if dout.perturbed else None,
        dout.value if lhs.perturbed else None,
        offs.value,
    )


def _wgrad_bwd(plan: Plan, residuals: Any, weights: Any) -> tuple[jax.Array | None, jax.Array | None, None]:
    """``weights`` [G, K, N], or as ``plan`` has them: the cotangent."""
    lhs, dout, offs = residuals
    if isinstance(weights, SymbolicZero):
        return None, None, None
    (weights,) = once_differentiable("ragged_dot_wgrad", weights)
    dlhs = None if dout is None else backward(plan, dout, None, weights, offs)[0]
    ddout = None if lhs is None else forward(plan, lhs, weights, offs)[0]
    return dlhs, ddout, None


_wgrad.defvjp(_wgrad_fwd, _wgrad_bwd, symbolic_zeros=True)
