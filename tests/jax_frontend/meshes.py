"""Meshes of host devices, and what the tests of expert parallelism compute on them."""

import jax
import numpy as np
from jax.sharding import AxisType

from xmoe import oracle

T, D, H, E, k = 64, 32, 64, 8, 3
"""T: of all devices together."""
MESHES = {"8": {"expert": 8}, "2x4": {"data": 2, "expert": 4}, "2x2x2": {"data": 2, "expert": 2, "tensor": 2}}


def mesh_of(axes: dict[str, int], kind: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    return jax.make_mesh((*axes.values(),), (*axes,), axis_types=(kind,) * len(axes), devices=jax.devices("cpu"))


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


X, DY = normal(0, T, D), normal(1, T, D)


def sqnr(want: dict[str, jax.Array], got: dict[str, jax.Array]) -> dict[str, float]:
    """dB by name; inf: the same bits."""
    return {
        name: np.inf if np.array_equal(want[name], got[name]) else oracle.sqnr(np.asarray(want[name]), got[name])
        for name in want
    }
