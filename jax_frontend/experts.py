"""`swiglu_experts`: the three grouped GEMMs of SwiGLU experts, and the SwiGLU between them, as one differentiable op.

M rows sorted by expert, D model width, H hidden width of an expert, G experts, T tokens that go to k experts each. What
the stages do, and what they save beside three `ragged_dot`, is in ``kernels/experts.py``.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from xmoe.jax_frontend import bridge, emulation
from xmoe.jax_frontend.autodiff import named, once_differentiable
from xmoe.jax_frontend.permute import permute_tokens, sum_slots
from xmoe.jax_frontend.plan import ExpertsPlan, make_experts_plan
from xmoe.jax_frontend.ragged_dot import backward as gemm_backward
from xmoe.jax_frontend.ragged_dot import call_op, ragged_dot, report_bad_order, report_bad_sizes
from xmoe.jax_frontend.varying import vary_together
from xmoe.operands import whole_blocks


def swiglu_experts(
    x: jax.Array,
    w1: jax.Array,
    w2: jax.Array,
    w3: jax.Array,
    group_sizes: jax.Array,
    *,
    config: Any = None,
    order: jax.Array | None = None,
    implementation: Literal["bridge", "jax"] | None = None,
) -> jax.Array:
    """[M, D]: w2 (silu(w1 x) * w3 x) of every row with the weights of its expert; quantized by ``config``.

    The forward's GEMMs have the numbers of `ragged_dot`; the SwiGLU is computed in float32 and rounded once; the
    gradient of x is one GEMM over the gradients of both halves. Where the blocks of the format do not divide H (32 in
    MX formats, 128 in ``fp8_blockwise``), and only there, it is three `ragged_dot`.

    **Saved for the backward**, a row: 4 H bytes, the gate and up projections in the dtype of ``x`` (8 H in float32),
    and the wgrad operands of ``x`` and of the hidden activations, of D and H features with the bytes of `ragged_dot`'s
    table (where that is ``lhs`` itself: ``x`` alone). With ``order`` 4 or 8 bytes more. Names: `RESIDUAL_NAMES`.

    With ``order`` the tokens come as the router saw them, and are quantized through the permutation: no sorted copy of
    them is made. The result is sorted by expert either way; `combine` takes it back.

    Args:
        x: [M, D], sorted, or, with ``order``, [T, D], bfloat16 or float32; the rows of expert g follow those of g-1,
            rows past the last come out as zeros.
        w1, w3: [G, H, D], gate and up, bfloat16 or float32. D and H are multiples of 16.
        w2: [G, D, H], down, in the dtype of w1 and w3.
        group_sizes: [G], of any integer dtype; values as in `ragged_dot`.
        config: a `GroupedMMConfig`, a recipe (enum or name), or None for the bfloat16 baseline.
        order: [M], M = T * k, the slot of each row (`permute_tokens`): row r is token ``order[r] // k``. One that is no
            permutation gives wrong numbers; ``config.debug`` logs it.
        implementation: as in `ragged_dot`.

    Raises:
        ValueError: at trace time, naming the argument, its value and the fix.
        ImportError: torch or Triton, which the bridge needs, cannot be imported.
    """
    plan = make_experts_plan(x, w1, w2, w3, group_sizes, config, implementation, order)
    if plan.config.debug:
        jax.debug.callback(functools.partial(report_bad_sizes, plan.M), group_sizes)
        if order is not None:
            jax.debug.callback(report_bad_order, order)
    if not whole_blocks(plan.config.format, plan.H):
        quiet = dataclasses.replace(plan.config, debug=False)  # reported once, not three times
        dot = functools.partial(
            ragged_dot, group_sizes=group_sizes, config=quiet, transpose_rhs=True, implementation=implementation
        )
        x = x if order is None else permute_tokens(x, order)
        gate, up = dot(x, w1), dot(x, w3)
        return dot(jax.nn.silu(gate.astype(jnp.float32)).astype(gate.dtype) * up, w2)
    offs = jnp.cumsum(group_sizes, dtype=jnp.int32)
    permutation = () if order is None else (order.astype(jnp.int32),)
    return call_op(_swiglu_experts, plan, *vary_together(x, w1, w2, w3, offs, *permutation))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _swiglu_experts(
    plan: ExpertsPlan, x: jax.Array, w1: jax.Array, w2: jax.Array, w3: jax.Array, offs: jax.Array, *order: jax.Array
) -> jax.Array:
    """``order``: nothing where x is sorted."""
    return _forward(plan, x, w1, w2, w3, offs, *order, save=False)["out"]


def _fwd(plan: ExpertsPlan, x: Any, w1: Any, w2: Any, w3: Any, *rest: Any) -> tuple[jax.Array, Any]:
    """Saves for the backward what the gradients that somebody wants will need, and nothing for the others."""
    needs = tuple(argument.perturbed for argument in (x, w1, w2, w3))
    offs, *order = (argument.value for argument in rest)
    operands = once_differentiable("swiglu_experts", *(argument.value for argument in (x, w1, w2, w3)))
    got = _forward(plan, *operands, offs, *order, save=True)
    x_saved, h_saved = (
        tuple(got[name] for name in (f"{part}_tokens", f"{part}_tokens_scale") if name in got) for part in "xh"
    )
    if not x_saved:  # the config's wgrad takes x, and h, which the backward makes again
        x_saved = (x.value,)
    permutation = {name: got[name] for name in ("place", "tokens") if name in got}
    return named("xmoe_out", got["out"]), (
        named("xmoe_gate_up", got["gate_up"]),
        named("xmoe_x", x_saved) if needs[1] or needs[3] else None,
        named("xmoe_h", h_saved) if needs[2] else None,
        w1.value, w2.value, w3.value,
        *named("xmoe_amax", (got.get("w13_amax"), got.get("w2_amax"))),
        offs, named("xmoe_order", permutation), () if needs[0] else None,
    )  # fmt: skip


def _bwd(plan: ExpertsPlan, residuals: Any, dout: Any) -> tuple[jax.Array | None, ...]:
    gate_up, x_saved, h_saved, w1, w2, w3, w13_amax, w2_amax, offs, permutation, wants_dx = residuals
    need_dx, no_gradient = wants_dx is not None, (None,) * (2 if plan.k else 1)
    if isinstance(dout, SymbolicZero):
        return None, None, None, None, *no_gradient
    (dout,) = once_differentiable("swiglu_experts", dout)
    if h_saved == ():
        h_saved = (bridge.swiglu(gate_up, plan) if _has_kernels(plan) else emulation.swiglu(gate_up),)
    need_dh = need_dx or x_saved is not None
    if not need_dh and h_saved is None:
        return None, None, None, None, *no_gradient
    dh, dw2 = gemm_backward(plan.of_output, dout, h_saved, w2 if need_dh else None, offs, w2_amax)
    dx = dw1 = dw3 = None
    if need_dh:
        gradient = _gradient(plan, dh, gate_up, offs, need_dx, x_saved is not None)
        if need_dx:
            dx = _dgrad(plan, gradient, w1, w3, offs, w13_amax, permutation.get("place"))
        if x_saved is not None:
            dw1, dw3 = _wgrad(plan, gradient, x_saved, offs, permutation.get("tokens"))
    return dx, dw1, dw2, dw3, *no_gradient


_swiglu_experts.defvjp(_fwd, _bwd, symbolic_zeros=True)


# --------------------------------------------------------------------------------------------------------- the engines


def _has_kernels(plan: ExpertsPlan) -> bool:
    return plan.engine == "bridge" and bridge.has_kernels(plan.config, plan.platform)


def _forward(plan: ExpertsPlan, x, w1, w2, w3, offs, *order, save: bool) -> dict[str, jax.Array]:
    """By name out, and with ``save`` gate_up and, where they are, what else `bridge.experts_forward` gives."""
    if plan.engine == "bridge":
        return bridge.experts_forward(plan, x, w1, w2, w3, offs, *order, save=save)
    permutation = {}
    if order:
        permutation = {"place": jnp.argsort(order[0]), "tokens": order[0] // plan.k}
        x = x[permutation["tokens"]]

    def dot(a: jax.Array, w: jax.Array, out_dtype: str, save: bool) -> tuple[jax.Array, emulation.Saved]:
        return emulation.forward(a, w.swapaxes(1, 2), offs, plan.config, out_dtype, save_tokens=save)

    gate, x_saved = dot(x, w1, plan.x_dtype, save)
    up, _ = dot(x, w3, plan.x_dtype, False)
    gate_up = jnp.concatenate([gate, up], axis=1)
    out, h_saved = dot(emulation.swiglu(gate_up), w2, plan.out_dtype, save)
    got = {"out": out, "gate_up": gate_up, **permutation} if save else {"out": out}
    for part, saved in (("x", x_saved), ("h", h_saved)):
        if len(saved) == 2:
            got[f"{part}_tokens"], got[f"{part}_tokens_scale"] = saved
    return got


def _gradient(plan: ExpertsPlan, dh, gate_up, offs, need_dx: bool, need_dw: bool) -> bridge.Gradient:
    """Of gate_up, as the GEMMs take it."""
    if plan.engine == "bridge":
        return bridge.experts_gradient(plan, dh, gate_up, offs, need_dx, need_dw)
    d_gate_up = emulation.swiglu_gradient(dh, gate_up)
    return bridge.Gradient(d_gate_up, None, d_gate_up, None)


def _dgrad(
    plan: ExpertsPlan, gradient: bridge.Gradient, w1, w3, offs, w13_amax: jax.Array | None, place: jax.Array | None
) -> jax.Array:
    """The gradient of x."""
    if plan.engine == "bridge":
        return bridge.experts_dgrad(plan, gradient, w1, w3, offs, w13_amax, place)
    joint = jnp.concatenate([w1, w3], axis=1).swapaxes(1, 2)
    dx = emulation.dgrad(gradient.d, joint, offs, plan.config, plan.x_dtype)
    return dx if place is None else sum_slots(dx, place, plan.k)


def _wgrad(
    plan: ExpertsPlan, gradient: bridge.Gradient, x_saved: emulation.Saved, offs, tokens: jax.Array | None
) -> tuple[jax.Array, ...]:
    """The gradients of w1 and w3."""
    if plan.engine == "bridge":
        return bridge.experts_wgrad(plan, gradient, x_saved, offs, tokens)
    if tokens is not None and len(x_saved) == 1:
        x_saved = (x_saved[0][tokens],)
    halves = jnp.split(gradient.d_tokens, 2, axis=1)
    return tuple(emulation.wgrad(x_saved, d, offs, plan.config, plan.w_dtype).swapaxes(1, 2) for d in halves)
