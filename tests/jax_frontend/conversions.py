"""What the tests of `quantize` share: models, and the reference for them.

`RoutedMoE` (NNX) and `LinenMoE` have the structure of MaxText's routed experts: tokens are sorted by expert, three
grouped GEMMs with kernels wi_0, wi_1 [E, D, H] and wo [E, H, D] cast to the layer's dtype, and the way back. Both
take the grouped GEMM from `grouped_dot`, which `reference` replaces.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax

from xmoe.jax_frontend import ragged_dot

T, D, H, E, K = 12, 32, 48, 4, 2
RECIPE = "fp8_rowwise"
LOGGER = "xmoe.jax_frontend.convert"

_dot: Callable[..., jax.Array] = lax.ragged_dot  # bound at import: no patch of jax.lax would reach it


def grouped_dot(*args: Any, **kwargs: Any) -> jax.Array:
    """`jax.lax.ragged_dot`; inside `reference` `xmoe.jax_frontend.ragged_dot`."""
    return _dot(*args, **kwargs)


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """``reference(run, config)``: what ``run()`` gives where the model calls `xmoe.jax_frontend.ragged_dot` itself."""

    def of(run: Callable[[], Any], config: Any = RECIPE) -> Any:
        with monkeypatch.context() as patched:
            patched.setitem(globals(), "_dot", functools.partial(ragged_dot, config=config))
            return run()

    return of


@pytest.fixture(scope="module", autouse=True)
def _compiled_quickly() -> Iterator[None]:
    """Both sides of each comparison are compiled alike; XLA's optimizations are most of the time otherwise."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def x() -> jax.Array:
    return jax.random.normal(jax.random.key(1), (T, D))


def equal(a: Any, b: Any) -> None:
    """The same bits everywhere."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert jnp.result_type(x) == jnp.result_type(y)
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


def experts(x: jax.Array, router: jax.Array, wi_0: Any, wi_1: Any, wo: Any, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """[T, D] -> [T, D] and the tokens of each expert."""
    weights, chosen = lax.top_k(jax.nn.softmax(x @ router), K)
    slots = jnp.argsort(chosen.reshape(-1))
    sizes = jnp.bincount(chosen.reshape(-1), length=E)
    rows = x[slots // K].astype(dtype)
    wi_0, wi_1, wo = (jnp.asarray(w, dtype) for w in (wi_0, wi_1, wo))

    def gmm(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return grouped_dot(lhs, rhs, sizes, preferred_element_type=dtype)

    hidden = jax.nn.silu(gmm(rows, wi_0)) * gmm(rows, wi_1)
    back = gmm(hidden, wo)[jnp.argsort(slots)].reshape(-1, K, D)
    return jnp.einsum("tkd,tk->td", back, weights.astype(dtype)).astype(x.dtype), sizes


class RoutedMoE(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, dtype: Any = jnp.float32) -> None:
        init = nnx.initializers.lecun_normal(batch_axis=0)
        self.gate = nnx.Linear(D, E, use_bias=False, rngs=rngs)
        self.wi_0 = nnx.Param(init(rngs.params(), (E, D, H)))
        self.wi_1 = nnx.Param(init(rngs.params(), (E, D, H)))
        self.wo = nnx.Param(init(rngs.params(), (E, H, D)))
        self.seen = nnx.BatchStat(jnp.zeros(E, jnp.int32))
        self.dtype = dtype

    def __call__(self, x: jax.Array, count: bool = True) -> jax.Array:
        y, sizes = experts(x, self.gate.kernel[...], self.wi_0[...], self.wi_1[...], self.wo[...], self.dtype)
        if count:
            self.seen[...] = self.seen[...] + sizes
        return y


class Model(nnx.Module):
    """Two layers, residual; the second under remat."""

    def __init__(self, rngs: nnx.Rngs, dtype: Any = jnp.float32) -> None:
        self.layers = nnx.List([RoutedMoE(rngs, dtype), RoutedMoE(rngs, dtype)])
        self.calls = 0

    def __call__(self, x: jax.Array) -> jax.Array:
        self.calls += 1
        x = x + self.layers[0](x)
        return x + nnx.remat(lambda layer, x: layer(x))(self.layers[1], x)


class LinenMoE(nn.Module):
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, count: bool = True) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.lecun_normal(batch_axis=0), ("exp", "in", "out"))
        wi_0, wi_1 = (self.param(f"wi_{i}", init, (E, D, H)) for i in range(2))
        wo = self.param("wo", init, (E, H, D))
        router = self.param("router", nn.initializers.lecun_normal(), (D, E))
        y, sizes = experts(x, router, wi_0, wi_1, wo, self.dtype)
        if count:
            self.sow("intermediates", "sizes", sizes)
        return x + y


class LinenModel(nn.Module):
    """Two layers: scanned with remat, so each parameter is a stack."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        block = nn.remat(LinenMoE, static_argnums=(2,))
        stack = nn.scan(
            lambda layer, carry, _: (layer(carry, False), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            metadata_params={nn.PARTITION_NAME: "layers"},
            length=2,
        )
        return nn.Dense(8)(stack(block(name="moe"), x, None)[0])
