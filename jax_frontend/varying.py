"""The axes of the enclosing `shard_map`'s mesh that values vary over; it keeps track of them with ``check_vma``."""

from collections.abc import Iterable

import jax


def varying_axes(*arrays: jax.Array) -> frozenset[str]:
    """The axes over which an array of these varies; none without ``check_vma``, and outside of `shard_map`."""
    return frozenset().union(*(jax.typeof(x).mat.varying for x in arrays))


def vary_over(axes: Iterable[str], x: jax.Array) -> jax.Array:
    """x, varying over ``axes``, which `varying_axes` gave, besides its own.

    The transpose of that cast is the sum over those axes which the gradient of a replicated value needs.
    """
    missing = tuple(frozenset(axes) - varying_axes(x))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def vary_together(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """All of them, varying over the axes that any of them varies over."""
    axes = varying_axes(*arrays)
    return tuple(vary_over(axes, x) for x in arrays)
