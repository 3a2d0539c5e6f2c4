"""JAX as these tests need it: eight CPU devices, and the CPU as the default device outside ``gpu`` tests."""

import os
from collections.abc import Iterator

import jax
import pytest

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the GPU is shared with PyTorch
jax.config.update("jax_num_cpu_devices", 8)  # for shard_map; only possible before JAX looks at its devices


@pytest.fixture(autouse=True)
def _on_cpu(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.node.get_closest_marker("gpu"):
        yield
        return
    with jax.default_device(jax.devices("cpu")[0]):
        yield
