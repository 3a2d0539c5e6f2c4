"""The permutation of an MoE layer: tokens to the rows of their experts, and the experts' rows back to tokens.

T = tokens, k = experts that each token goes to, M = T*k slots, slot s of token s // k; D = model width. ``order``
[M], of any integer dtype, is the slot of each row; rows are sorted by expert.
"""

import jax
import jax.numpy as jnp

from xmoe.jax_frontend.checks import check_arrays


def permute_tokens(x: jax.Array, order: jax.Array) -> jax.Array:
    """[M, D]: row r is x[order[r] // k] of x [T, D]. `swiglu_experts` takes ``order`` itself.

    ``order`` is ``jnp.argsort(chosen.reshape(-1), stable=True)`` of the experts that were chosen, [T, k]. The gradient
    gathers too, where that of indexing would add rows up in any order.

    Raises:
        ValueError: a shape that does not fit: M is a multiple of T.
    """
    check_arrays(x=x, order=order)
    if x.ndim != 2:
        raise ValueError(f"x has shape {x.shape}; give the tokens, [T, D]")
    return take(slots_of_token(x, order), x, order, jnp.argsort(order))


def combine(x: jax.Array, scores: jax.Array, order: jax.Array) -> jax.Array:
    """[T, D] float32: the sum over j of scores[t, j] times the row of x [M, D] that is slot t * k + j; ``scores`` is
    float32 [T, k], ``order`` as in `permute_tokens`.

    Raises:
        ValueError: a shape that does not fit.
    """
    check_arrays(x=x, scores=scores, order=order)
    if scores.dtype != jnp.float32:
        raise ValueError(f"scores is {scores.dtype}; give scores.astype(jnp.float32)")
    if x.ndim != 2 or scores.ndim != 2 or scores.size != x.shape[0]:
        raise ValueError(f"x has shape {x.shape} and scores {scores.shape}; give [T * k, D] and [T, k]")
    if order.shape != x.shape[:1]:
        raise ValueError(f"order has shape {order.shape}; give the slot of each row of x, {x.shape[:1]}")
    _check_integers(order)
    rows = take(1, x, jnp.argsort(order), order).reshape(*scores.shape, x.shape[-1])
    return (rows.astype(jnp.float32) * scores[..., None]).sum(axis=1)


def slots_of_token(x: jax.Array, order: jax.Array) -> int:
    """k. Raises ValueError if the M slots of ``order`` are not as many for each of the T tokens of x."""
    T, M = x.shape[0], order.size
    if order.ndim != 1 or (M < T or M % T if T else M):
        raise ValueError(f"order has shape {order.shape} and x T={T} tokens; give [T * k], k slots for each token")
    _check_integers(order)
    return max(1, M // max(1, T))


def _check_integers(order: jax.Array) -> None:
    if not jnp.issubdtype(order.dtype, jnp.integer):
        raise ValueError(f"order is {order.dtype}; give integers, as jnp.argsort does")


def sum_slots(x: jax.Array, place: jax.Array, k: int) -> jax.Array:
    """[T, D] of x [M, D]: the sum of each token's rows, place[t*k : (t+1)*k], in float32, rounded once to the dtype of
    x."""
    rows = x[place].reshape(-1, k, x.shape[-1])
    return rows.astype(jnp.float32).sum(axis=1).astype(x.dtype)


def _take_fwd(k: int, x: jax.Array, index: jax.Array, inverse: jax.Array) -> tuple[jax.Array, jax.Array]:
    return take(k, x, index, inverse), inverse


def _take_bwd(k: int, inverse: jax.Array, gradient: jax.Array) -> tuple[jax.Array, None, None]:
    return sum_slots(gradient, inverse, k), None, None


def take(k: int, x: jax.Array, index: jax.Array, inverse: jax.Array) -> jax.Array:
    """x[index // k], ``index`` a permutation of k slots for each row of x and ``inverse`` its inverse."""
    return x[index // k]


take = jax.custom_vjp(take, nondiff_argnums=(0,))  # no decorator: with that type checkers lose what `take` returns
take.defvjp(_take_fwd, _take_bwd)


def rotate_rows(x: jax.Array, by: jax.Array) -> jax.Array:
    """[M, D]: row r is x[(r + by) % M]; ``by`` is a scalar of int32. A copy of x, and one of its gradient."""
    rows, M = jnp.arange(x.shape[0], dtype=jnp.int32), max(1, x.shape[0])
    return take(1, x, (rows + by) % M, (rows - by) % M)
