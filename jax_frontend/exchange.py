"""Rows between the devices of a mesh axis, as many as the data says, in buffers of static sizes.

P devices of the axis, R and S rows of a device's buffers, D their width. For use inside `jax.shard_map`.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from xmoe.jax_frontend.varying import vary_over, vary_together, varying_axes

Axis = str | tuple[str, ...]
Collective = Literal["ragged_all_to_all", "all_to_all"]


class Slices(NamedTuple):
    """What one device shares with each of P peers, int32 [P] each: rows ``here[p] : here[p] + sizes[p]`` of its own
    buffer are rows ``there[p] : there[p] + sizes[p]`` of peer p's."""

    here: jax.Array
    sizes: jax.Array
    there: jax.Array


def slices(rows: jax.Array, axis: Axis) -> tuple[Slices, Slices]:
    """``(outgoing, incoming)`` of this device, where device p sends ``rows[p, q]`` rows to device q (int32 [P, P], the
    same everywhere), from a buffer ordered by receiver into one ordered by sender, without gaps."""
    me = jax.lax.axis_index(axis)
    at_sender, at_receiver = (jnp.cumsum(rows, axis=a, dtype=jnp.int32) - rows for a in (1, 0))
    return Slices(at_sender[me], rows[me], at_receiver[me]), Slices(at_receiver[:, me], rows[:, me], at_sender[:, me])


def exchange(
    x: jax.Array, size: int, outgoing: Slices, incoming: Slices, *, axis: Axis, collective: Collective
) -> jax.Array:
    """[S, D], S = ``size``: what the peers sent, each row where `Slices` say, zeros elsewhere; of x [R, D].

    The gradient goes the way back: it is this function with ``outgoing`` and ``incoming`` exchanged. (JAX's own
    derivative of `jax.lax.ragged_all_to_all` communicates the offsets once more.)

    "ragged_all_to_all" moves the rows that there are, and needs XLA's backend for TPUs, or for the GPUs of one process.
    "all_to_all" runs anywhere and gives the same bits; it moves blocks padded to min(R, S) rows a peer, which are the
    most that one can send.

    The slices must lie inside both buffers: that is the caller's to see to.
    """
    return _exchange((x.shape[0], size, axis, collective), *_vary_alike(x, outgoing, incoming))


Static = tuple[int, int, Axis, Collective]
"""R, S, the axis and how rows are moved along it."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _exchange(static: Static, x: jax.Array, outgoing: Slices, incoming: Slices) -> jax.Array:
    _, size, axis, collective = static
    if collective == "all_to_all":
        return _exchange_blocks(static, x, outgoing, incoming)
    zeros = vary_over(varying_axes(x), jnp.zeros((size, *x.shape[1:]), x.dtype))
    (here, sizes), (there, _), (_, received) = (
        _pieces(start, rows)
        for start, rows in (
            (outgoing.here, outgoing.sizes), (outgoing.there, outgoing.sizes), (incoming.here, incoming.sizes),
        )
    )  # fmt: skip
    return jax.lax.ragged_all_to_all(x, zeros, here, sizes, there, received, axis_name=axis)


PIECES = 1024
"""That the rows which a device sends are cut into. XLA gives each piece to one block of threads: two H200s exchanged
537 MB each way in 98 ms with one piece for each, in 7.4 with 16, 1.85 with 128 and 1.72 with 1024 (jax 0.11.2)."""


def _pieces(start: jax.Array, sizes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``(start, sizes)`` of the pieces of P slices, int32 [P * pieces], those of a slice together."""
    pieces = max(PIECES // sizes.size, 1)
    piece = jnp.arange(pieces, dtype=jnp.int32)
    least, larger = sizes[:, None] // pieces, sizes[:, None] % pieces  # the first ones have a row more
    starts = start[:, None] + least * piece + jnp.minimum(larger, piece)
    return starts.reshape(-1), (least + (piece < larger)).reshape(-1)


def _exchange_fwd(
    static: Static, x: jax.Array, outgoing: Slices, incoming: Slices
) -> tuple[jax.Array, tuple[Slices, Slices]]:
    return _exchange(static, x, outgoing, incoming), (outgoing, incoming)


def _exchange_bwd(
    static: Static, residuals: tuple[Slices, Slices], gradient: jax.Array
) -> tuple[jax.Array, None, None]:
    (rows, size, axis, collective), (outgoing, incoming) = static, residuals
    return _exchange((size, rows, axis, collective), gradient, incoming, outgoing), None, None


_exchange.defvjp(_exchange_fwd, _exchange_bwd)


def _exchange_blocks(static: Static, x: jax.Array, outgoing: Slices, incoming: Slices) -> jax.Array:
    """A block of the same size for each peer, by `jax.lax.all_to_all`; then its rows to where they belong."""
    rows, size, axis, _ = static
    block = min(rows, size)
    within = jnp.arange(block, dtype=jnp.int32)
    index = jnp.where(within < outgoing.sizes[:, None], outgoing.here[:, None] + within, rows)
    blocks = _rows_or_zeros(x, index)  # [P, block, D]
    blocks = jax.lax.all_to_all(blocks, axis, split_axis=0, concat_axis=0, tiled=True)

    row = jnp.arange(size, dtype=jnp.int32)
    # Slices lie in the order of the peers, in either direction: the last one that begins at or before a row may own it.
    peer = jnp.searchsorted(incoming.here + incoming.sizes, row, side="right", method="scan_unrolled")
    peer = jnp.minimum(peer, incoming.here.size - 1)
    within = row - incoming.here[peer]
    there = (within >= 0) & (within < incoming.sizes[peer])
    blocks = blocks.reshape(-1, *x.shape[1:])
    return _rows_or_zeros(blocks, jnp.where(there, peer * block + within, blocks.shape[0]))


def _rows_or_zeros(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[index], zeros where ``index`` is the number of rows of x."""
    return jnp.take(x, index, axis=0, mode="fill", fill_value=0)


def _vary_alike(x: jax.Array, outgoing: Slices, incoming: Slices) -> tuple[jax.Array, Slices, Slices]:
    """All of them, varying over the axes that any of them varies over."""
    x, *parts = vary_together(x, *outgoing, *incoming)
    return x, Slices(*parts[:3]), Slices(*parts[3:])
