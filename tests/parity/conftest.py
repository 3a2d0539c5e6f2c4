"""JAX as the JAX tests have it: the fixtures of ``tests/jax_frontend``."""

from tests.jax_frontend.conftest import _on_cpu as _on_cpu
