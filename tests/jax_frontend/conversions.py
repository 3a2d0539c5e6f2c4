"""What the tests of `quantize` share: a `grouped_dot` for the code that is converted, and the reference for it."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from xmoe.jax_frontend import ragged_dot

T, D, E = 12, 32, 4
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
