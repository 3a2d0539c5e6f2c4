"""`ragged_dot`: the grouped GEMM of an MoE layer in 8 bits, forward and backward, in place of `jax.lax.ragged_dot`.

M tokens, K contraction, N output features, G groups; Mp = ``xmoe.operands.padded_tokens(M, G)``.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from xmoe.jax_frontend import bridge, emulation
from xmoe.jax_frontend.autodiff import named, once_differentiable
from xmoe.jax_frontend.emulation import Saved
from xmoe.jax_frontend.permute import rotate_rows
from xmoe.jax_frontend.plan import Plan, make_plan
from xmoe.jax_frontend.varying import vary_together

_log = logging.getLogger(__name__)


def ragged_dot(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    precision: Any = None,
    preferred_element_type: jax.typing.DTypeLike | None = None,
    group_offset: jax.Array | None = None,
    out_sharding: Any = None,
    *,
    config: Any = None,
    transpose_rhs: bool = False,
    implementation: Literal["bridge", "jax"] | None = None,
) -> jax.Array:
    """[M, N]: each group's rows of ``lhs`` times its matrix in ``rhs``; quantized by ``config``, differentiable.

    ``config=None`` is the bfloat16 baseline: it rounds float32 operands to bfloat16, as `jax.lax.ragged_dot` does not.

    The rows of group g follow those of group g-1; rows past the last group come out as zeros, in the output and in the
    gradient. Sizes are data: where their sum exceeds M the last groups are cut, and no value reads or writes out of
    bounds.

    **Saved for the backward**: ``rhs`` itself, 4 bytes a group, and of ``lhs``, if somebody wants the gradient of
    ``rhs``, bytes a token:

    =====================================  ==================================================================
    bf16, ``..._wgrad_with_hp``            2 K, or 4 K in float32: ``lhs`` itself
    ``fp8_rowwise``                        K, and 4 G K in all
    ``fp8_blockwise``, ``mxfp8_...``       K + K / 32
    =====================================  ==================================================================

    with each group's tokens padded to a multiple of 128 (8-bit data of MX formats are not on sm_89 and sm_90). With
    ``transpose_rhs``, `fp8_rowwise` also saves 4 G K bytes of maxima of ``rhs`` on a GPU. `RESIDUAL_NAMES` has the
    names for the policies of `jax.checkpoint`.

    **Layouts**: an array's layout is row-major where the kernels get it. Both ways of storing weights are read as they
    lie, [G, K, N] and, with ``transpose_rhs``, [G, N, K]; a transposition in JAX (``rhs.swapaxes(1, 2)``) is a copy.
    float32 operands are quantized without a copy in between; the bf16 baseline casts them in scratch memory.

    **Transformations**: reverse-mode differentiation, once (that of a gradient raises ValueError, forward mode
    TypeError), `jax.checkpoint`, `scan`, `cond` and `shard_map`. `vmap` is a loop over calls: each element has its own
    ``group_sizes`` and its own scales, and what all share is quantized again for each; one call with the groups of all
    elements is faster. Sharding is `shard_map`'s alone, because kernels cannot be split automatically: an operand that
    would be raises ValueError if the trace shows it. Where it does not (arguments without a mesh, and ``in_shardings``)
    XLA gathers the operands, and every device does all of the work.

    Args:
        lhs: [M, K], bfloat16 or float32. K and N are multiples of 16.
        rhs: [G, K, N], bfloat16 or float32.
        group_sizes: [G], of any integer dtype, computed with as int32; its cotangent is None.
        precision: None or DEFAULT. HIGH, HIGHEST and algorithms are refused, because the operands have 8 or 16 bits
            whatever the precision; what is left to choose is ``config.accumulation``.
        preferred_element_type: bfloat16 or float32; None: ``config.out_dtype``, or else the dtype of ``lhs``.
        group_offset: one integer, shape (1,) or (): ``rhs`` holds groups from this one on, and ``group_sizes`` [E] are
            those of all; rows of other groups come out as zeros. Costs a copy of ``lhs`` and of the output, forward and
            backward. A value that is not in 0 .. E - G raises ValueError; where only the trace of it is known, as
            under `jax.jit`, it is clipped to that, and ``config.debug`` logs it.
        out_sharding: only None; here for the signature of `jax.lax.ragged_dot`.
        config: a `GroupedMMConfig`, a recipe (enum or name, see `xmoe.RECIPES`), or None for the bfloat16 baseline.
        transpose_rhs: ``rhs`` is [G, N, K], as PyTorch stores linear weights; nothing is copied.
        implementation: "bridge" (xmoe's kernels through torch), "jax" (plain JAX on any backend), or None: the
            bridge on a GPU, unless ``config.kernel_preference`` is EMULATED, and plain JAX elsewhere.

    Raises:
        ValueError: at trace time, naming the argument, its value and the fix.
        ImportError: torch or Triton, which the bridge needs, cannot be imported.
    """
    if precision not in (None, jax.lax.Precision.DEFAULT, "default"):
        raise ValueError(
            f"precision={precision!r} is not supported; use None, with config.accumulation='precise' for more "
            "exact sums, or jax.lax.ragged_dot for float32 operands"
        )
    if out_sharding is not None:
        raise ValueError("out_sharding is not supported; use None, and call ragged_dot inside jax.shard_map")
    plan = make_plan(lhs, rhs, group_sizes, preferred_element_type, config, transpose_rhs, implementation, group_offset)
    if plan.config.debug:
        jax.debug.callback(functools.partial(report_bad_sizes, plan.M), group_sizes)
        if group_offset is not None:
            jax.debug.callback(functools.partial(report_bad_offset, group_sizes.shape[0] - plan.G), group_offset)
    if group_offset is None:
        return call_op(_ragged_dot, plan, *vary_together(lhs, rhs, jnp.cumsum(group_sizes, dtype=jnp.int32)))
    # The kernels know groups from row 0 on.
    lhs, rhs, offs, first = vary_together(lhs, rhs, *_from_offset(plan, group_sizes, group_offset))
    return rotate_rows(call_op(_ragged_dot, plan, rotate_rows(lhs, first), rhs, offs), -first)


def _from_offset(plan: Plan, group_sizes: jax.Array, group_offset: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of the groups that rhs holds: their ends, counted from their first row, and that row. ``group_sizes`` [E] are
    those of all."""
    E = group_sizes.shape[0]
    held = jnp.clip(group_offset.reshape(()), 0, E - plan.G).astype(jnp.int32)
    before = jnp.where(jnp.arange(E) < held, group_sizes, 0)
    first = jnp.clip(before.sum(dtype=jnp.int32), 0, plan.M)
    ends = jnp.cumsum(jax.lax.dynamic_slice_in_dim(group_sizes, held, plan.G), dtype=jnp.int32)
    return jnp.minimum(ends, plan.M - first), first


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ragged_dot(plan: Plan, lhs: jax.Array, rhs: jax.Array, offs: jax.Array) -> jax.Array:
    return forward(plan, lhs, rhs, offs)[0]


def _ragged_dot_fwd(plan: Plan, lhs: Any, rhs: Any, offs: Any) -> tuple[jax.Array, Any]:
    """Saves for the backward what the gradients that somebody wants will need, and nothing for the others."""
    a, b = once_differentiable("ragged_dot", lhs.value, rhs.value)
    out, saved, b_amax = forward(plan, a, b, offs.value, save=rhs.perturbed, save_amax=lhs.perturbed)
    return named("xmoe_out", out), (
        named("xmoe_lhs", saved) if rhs.perturbed else None,
        rhs.value if lhs.perturbed else None,
        offs.value,
        named("xmoe_amax", b_amax),
    )


def _ragged_dot_bwd(plan: Plan, residuals: Any, dout: Any) -> tuple[jax.Array | None, jax.Array | None, None]:
    saved, rhs, offs, b_amax = residuals
    if isinstance(dout, SymbolicZero) or (saved is None and rhs is None):
        return None, None, None
    (dout,) = once_differentiable("ragged_dot", dout)
    return *backward(plan, dout, saved, rhs, offs, b_amax), None


_ragged_dot.defvjp(_ragged_dot_fwd, _ragged_dot_bwd, symbolic_zeros=True)


# --------------------------------------------------------------------------------------------------------- the engines


def forward(
    plan: Plan, lhs: jax.Array, rhs: jax.Array, offs: jax.Array, *, save: bool = False, save_amax: bool = False
) -> tuple[jax.Array, Saved, jax.Array | None]:
    """out [M, N]; with ``save`` what `backward` needs of lhs (else ``()``); with ``save_amax``, where they come at no
    cost, the maxima of rhs that it can use."""
    if plan.engine == "bridge":
        return bridge.forward(plan, lhs, rhs, offs, save=save, save_amax=save_amax)
    return *emulation.forward(lhs, _as_gkn(plan, rhs), offs, plan.config, plan.out_dtype, save_tokens=save), None


def backward(
    plan: Plan,
    dout: jax.Array,
    saved: Saved | None,
    rhs: jax.Array | None,
    offs: jax.Array,
    b_amax: jax.Array | None = None,
) -> tuple[jax.Array | None, jax.Array | None]:
    """dlhs where ``rhs`` is given, drhs where ``saved`` is. ``b_amax``: what `bridge.forward` found of rhs."""
    if plan.engine == "bridge":
        return bridge.backward(plan, dout, saved, rhs, offs, b_amax)
    dlhs = drhs = None
    if rhs is not None:
        dlhs = emulation.dgrad(dout, _as_gkn(plan, rhs), offs, plan.config, plan.lhs_dtype)
    if saved is not None:
        drhs = _as_gkn(plan, emulation.wgrad(saved, dout, offs, plan.config, plan.rhs_dtype))
    return dlhs, drhs


def _as_gkn(plan: Plan, rhs: jax.Array) -> jax.Array:
    """[G, K, N] from the caller's layout, and back: a transposition is its own inverse."""
    return rhs.swapaxes(1, 2) if plan.transpose_rhs else rhs


def call_op(op: Callable[..., Any], plan: Any, *arrays: jax.Array) -> Any:
    """``op(plan, *arrays)``; compiled in a `shard_map` that is not, where JAX lacks this kind of `custom_vjp`.

    There JAX compiles every operation at every call, this one too, whichever `jax.jit` object it is given; the trace
    is kept, by ``op``, ``plan`` and the shapes.
    """
    if any(type(x).__name__ == "ShardMapTracer" for x in arrays):
        return jax.jit(op, static_argnums=0)(plan, *arrays)
    return op(plan, *arrays)


def report_bad_sizes(M: int, group_sizes: Any) -> None:
    """``config.debug``: says so, and does not raise, because an exception on one shard hangs the others."""
    sizes = np.asarray(group_sizes).tolist()
    if min(sizes) < 0 or sum(sizes) > M:
        _log.error("group_sizes=%s, in sum %d: give sizes of 0 or more that sum to at most M=%d", sizes, sum(sizes), M)


def report_bad_order(order: Any) -> None:
    """``config.debug``: as `report_bad_sizes`, of an ``order`` [M] that is no permutation."""
    missing = np.setdiff1d(np.arange(np.size(order)), order)
    if missing.size:
        _log.error(
            "order is no permutation of 0 to M-1=%d: %d of these are not in it, %d first; give jnp.argsort(chosen)",
            np.size(order) - 1, missing.size, missing[0],
        )  # fmt: skip


def report_bad_offset(most: int, group_offset: Any) -> None:
    """``config.debug``: as `report_bad_sizes`, of an offset that was clipped."""
    first = int(np.asarray(group_offset).reshape(()))
    if not 0 <= first <= most:
        _log.error("group_offset=%d is out of range, and was clipped: give 0 to %d", first, most)
